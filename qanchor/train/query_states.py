"""What a query encoder has read of a run's questions, kept in a file and read from there.

Reading takes a large encoder up to an hour, and what it found more memory than the rest of a run:
processes that join a run, a run that goes on, and others on the same triples take the file as it
is. Its name is a digest of all it hangs on.

Legend as in qanchor.encoder.query_encoder.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.lib.format import open_memmap

from qanchor.bundle.packing import FloatArray
from qanchor.encoder.query_encoder import QueryEncoder, texts_apart


def kept_states(
    encoder: QueryEncoder, token_ids: Sequence[Sequence[int]], directory: Path
) -> list[FloatArray]:
    """States of each text, [T, E] each, float16, of the directory's file; made where it is not.

    They stay on disk until they are looked at. A file appears when it is whole.
    """
    lens = [len(of_text) for of_text in token_ids]
    digest = hashlib.sha256(encoder.digest.encode())
    digest.update(np.array([*lens, *(id_ for ids in token_ids for id_ in ids)], np.int64).data)
    path = directory / f"{digest.hexdigest()[:32]}.npy"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory, prefix=".reading-") as scratch:
            made, shape = Path(scratch) / path.name, (sum(lens), encoder.state_dim)
            encoder.states(token_ids, open_memmap(made, "w+", np.float16, shape))
            os.replace(made, path)
    # Nobody writes to them; torch only takes what could be written to.
    return texts_apart(np.load(path, mmap_mode="c"), lens)
