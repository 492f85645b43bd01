"""A question's text to what a suffix step takes: its tokens, or the rows a query encoder makes.

The query encoder runs with ONNX Runtime on the CPU whatever the engine, once per text, in a thread
of its own. Must not know grpc or an engine.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qanchor.bundle.manifest import QUERY_ENCODER
from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.reader import Bundle


class QueryReader:
    """Reads questions as the bundle says. `query` may be called from any thread."""

    def __init__(self, bundle: Bundle) -> None:
        """Open the query encoder, where the bundle has one. Raises BundleError."""
        self._bundle = bundle
        manifest = bundle.manifest
        self.max_tokens = manifest.limits.max_query_len - 1
        """Tokens a question may be read as; of a suffix <USER_EMB> takes one."""
        self._session: Any = None
        if manifest.query_encoder is not None:
            self.max_tokens = manifest.query_encoder.max_text_len
            self._session = _open(bundle)
            self._thread = ThreadPoolExecutor(1, "query-encoder")

    @property
    def is_quick(self) -> bool:
        """Whether reading is no more than tokenising: nothing an event loop would notice."""
        return self._session is None

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a question, however many."""
        return self._bundle.encode_query(text)

    def query(self, text: str) -> SuffixQuery:
        """The suffix of a question."""
        return self.query_of(self.token_ids(text))

    def query_of(self, token_ids: Sequence[int]) -> SuffixQuery:
        """The suffix of a question that is tokenised already."""
        if self._session is None:
            return SuffixQuery(tuple(token_ids))
        feeds = {"query_token_ids": np.array(token_ids, dtype=np.int64)}
        (rows_RD,) = self._session.run(None, feeds)
        return SuffixQuery((), rows_RD)

    async def query_aside(self, token_ids: Sequence[int]) -> SuffixQuery:
        """The same off the event loop; first come, first read."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.query_of, token_ids)


def _open(bundle: Bundle) -> Any:
    # Only here: a server whose bundle needs none of it runs without ONNX Runtime.
    import onnxruntime

    from qanchor_server.engine.ort_session import open_session

    options = onnxruntime.SessionOptions()
    # A new text is rare, and the cores belong to the engine.
    options.intra_op_num_threads = 1
    return open_session(bundle, QUERY_ENCODER, options)
