"""A question's text to what a suffix step takes: its tokens, or the rows a query encoder makes.

The query encoder runs with ONNX Runtime on the CPU whatever the engine, once per text, in a thread
of its own. Must not know grpc.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qanchor.bundle.manifest import QUERY_ENCODER
from qanchor.bundle.packing import FloatArray, SuffixQuery
from qanchor.bundle.reader import Bundle
from qanchor.errors import ConfigError


class QueryReader:
    """Reads questions as the bundle says. `query` may be called from any thread."""

    def __init__(self, bundle: Bundle) -> None:
        """Open the query encoder, where the bundle has one. Raises BundleError, ConfigError."""
        self._bundle = bundle
        manifest = bundle.manifest
        self.max_tokens = manifest.limits.max_query_len - 1
        """Tokens a question may be read as; of a suffix <USER_EMB> takes one."""
        self._read: Callable[[Sequence[int]], FloatArray] | None = None
        if manifest.query_encoder is not None:
            self.max_tokens = manifest.query_encoder.max_text_len
            self._read = _open(bundle)
            self._thread = ThreadPoolExecutor(1, "query-encoder")

    @property
    def is_quick(self) -> bool:
        """Whether reading is no more than tokenising: nothing an event loop would notice."""
        return self._read is None

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a question, however many."""
        return self._bundle.encode_query(text)

    def query(self, text: str) -> SuffixQuery:
        """The suffix of a question. Raises Retryable when out of memory."""
        return self.query_of(self.token_ids(text))

    def query_of(self, token_ids: Sequence[int]) -> SuffixQuery:
        """The suffix of a question that is tokenised already. Raises Retryable."""
        if self._read is None:
            return SuffixQuery(tuple(token_ids))
        return SuffixQuery((), self._read(token_ids))

    async def query_aside(self, token_ids: Sequence[int]) -> SuffixQuery:
        """The same off the event loop, first come, first read; not read where cancelled before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.query_of, token_ids)


def _open(bundle: Bundle) -> Callable[[Sequence[int]], FloatArray]:
    """What makes rows [R, D] of token ids. Raises BundleError, ConfigError."""
    # Only here: a server whose bundle needs none of it runs without ONNX Runtime.
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ConfigError(
            "bundle",
            str(bundle.path),
            "a query encoder reads its questions, with ONNX Runtime on the CPU whatever the engine",
            "pip install onnxruntime",
        ) from None
    from qanchor_server.engine.ort_session import memory_is_retryable, open_session

    options = onnxruntime.SessionOptions()
    # A new text is rare, and the cores belong to the engine.
    options.intra_op_num_threads = 1
    session = open_session(bundle, QUERY_ENCODER, options)

    def read(token_ids: Sequence[int]) -> FloatArray:
        feeds = {"query_token_ids": np.array(token_ids, dtype=np.int64)}
        with memory_is_retryable():
            (rows_RD,) = session.run(None, feeds)
        found: FloatArray = rows_RD
        return found

    return read
