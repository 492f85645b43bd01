"""A bundle without files and an engine that adds integers, for tests of the whole server.

Words have ids: digits 10 to 19, coffee 2, tea 3, shoes 4, Query 5, ":" 6, anything else 1. The
event vector of a text is [sum of its ids, number of its tokens]. A prefix position counts its
token id plus the first number of its vector. The embedding of a query is

    [sum over prefix positions, sum of query ids, suffix tokens, sum of soft-prompt numbers]

Example (the parity case): one "buy" event "0 coffee", no attributes, query "coffee".
    event vector: 10 + 2 = 12; modality means: 12 and 0; user mean: 6
    prefix: header 100, user 6, modalities 12 + 0, <buy> 101, event 12, </buy> 103, <about> 102,
    </about> 104: 540
    query "Query: coffee": 5 + 6 + 2 = 13, with <USER_EMB> 4 tokens
    embedding: [540, 13, 4, 0]
"""

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from qanchor.bundle.manifest import Limits, Manifest, ModelDims, ParityCase
from qanchor.bundle.packing import PackedSuffix
from qanchor.bundle.reader import Bundle
from qanchor.config import ModalitySpec, ProfileSchema, Scenario
from qanchor.data.prefix import PrefixTokens, max_prefix_len
from qanchor_server.engine import ByteArray, FloatArray, IntArray, PrefixChunk, SuffixRun
from qanchor_server.engine.lanes import Done, Lanes

WORDS = {"<pad>": 0, "<unk>": 1, "coffee": 2, "tea": 3, "shoes": 4, "Query": 5, ":": 6}
USER_EMB = 105
KV_BYTES_PER_TOKEN = 8
MAX_PREFIX_LEN = 14
NUM_STRUCTURE_TOKENS = 8
"""Prefix positions that are no event: header, user, two modality tokens, four delimiters."""


class FakeEngine:
    """Counts its calls; waits at `gate` before each; raises what `failures` hold, in order."""

    def __init__(self, step_seconds: float = 0.0, num_lanes: int = 1) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[Exception] = []
        self.copy_failures: list[Exception] = []
        """What exports and imports raise, in order."""
        self.step_seconds = step_seconds
        self.num_entered = 0
        """Calls that have come to the gate."""
        self.side_by_side = FakeSideBySide(self, num_lanes) if num_lanes > 1 else None
        self.num_encode_calls = 0
        self.num_prefill_calls = 0
        self.suffix_steps: list[tuple[int, int]] = []
        """(users, queries) per step."""
        self.threads: set[int] = set()
        self.cleared: list[FloatArray] = []
        self.num_slots = 0

    def encode_events(self, token_ids_NT: IntArray) -> FloatArray:
        self._enter()
        self.num_encode_calls += 1
        sums_N = token_ids_NT.sum(axis=1)
        counts_N = (token_ids_NT != 0).sum(axis=1)
        return np.stack([sums_N, counts_N], axis=1).astype(np.float32)

    def allocate_slot(self, capacity: int) -> FloatArray:
        """[2, capacity]: what a position counts, and the position itself."""
        self.num_slots += 1
        return np.zeros((2, capacity), dtype=np.float32)

    def clear_slot(self, slot: FloatArray) -> None:
        slot[:] = 0
        self.cleared.append(slot)

    def clear_working(self) -> None:
        """There are no copies."""

    def free_slot(self, slot: FloatArray) -> None:
        self.num_slots -= 1

    @property
    def slot_layout(self) -> str:
        return "float32 [2, tokens]"

    def host_arena(self, num_bytes: int) -> ByteArray:
        self.arena = np.empty(num_bytes, dtype=np.uint8)
        return self.arena

    def export_slot(self, slot: FloatArray, num_tokens: int, out: ByteArray) -> None:
        self._fail_copy()
        out.view(np.float32).reshape(2, num_tokens)[:] = slot[:, :num_tokens]

    def import_slot(self, slot: FloatArray, num_tokens: int, source: ByteArray) -> None:
        self._fail_copy()
        slot[:, :num_tokens] = source.view(np.float32).reshape(2, num_tokens)

    def _fail_copy(self) -> None:
        if self.copy_failures:
            raise self.copy_failures.pop(0)

    def prefill(self, slot: FloatArray, chunk: PrefixChunk) -> None:
        self._enter()
        self.num_prefill_calls += 1
        stop = chunk.start + len(chunk.token_ids_C)
        slot[0, chunk.start : stop] = chunk.token_ids_C + chunk.vectors_CE[:, 0]
        slot[1, chunk.start : stop] = np.arange(chunk.start, stop)

    def runs(self, num_tokens: Sequence[int]) -> list[list[int]]:
        return [list(range(len(num_tokens)))]

    def suffix(self, packed: PackedSuffix, slots: Sequence[FloatArray]) -> FloatArray:
        self._enter()
        num_queries = len(packed.emb_index_Q)
        self.suffix_steps.append((len(slots), num_queries))
        row_len = packed.row_index_BR.shape[1]
        embeddings = []
        for segment in range(num_queries):
            own_S = packed.segment_ids_S == segment
            user = packed.flat_index_S[own_S][0] // row_len
            prefix_len = packed.prefix_len_B[user]
            positions = slots[user][1, :prefix_len]
            assert (positions == np.arange(prefix_len)).all(), "a slot is not whole"
            rows = packed.prompt_index_S[own_S]
            embeddings.append(
                [
                    slots[user][0, :prefix_len].sum(),
                    packed.token_ids_S[own_S].sum() - USER_EMB,
                    own_S.sum(),
                    packed.prompt_rows_KD[rows[rows > 0] - 1].sum(),
                ]
            )
        return np.array(embeddings, dtype=np.float32)

    def _enter(self) -> None:
        self.threads.add(threading.get_ident())
        self.num_entered += 1
        if not self.gate.wait(timeout=20):
            raise TimeoutError("the test never opened the gate")
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.failures:
            raise self.failures.pop(0)


class FakeSideBySide:
    """Runs go on in threads, which wait at a `gate` of their own; counts what has not ended."""

    def __init__(self, engine: FakeEngine, num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self.gate = threading.Event()
        self.gate.set()
        self.num_begun = 0
        self.most_begun = 0
        self._engine = engine
        self._lanes = Lanes(num_lanes)
        self._lock = threading.Lock()

    def begin(self, runs: Sequence[SuffixRun[FloatArray]], done: Done[FloatArray]) -> None:
        with self._lock:
            self.num_begun += 1
            self.most_begun = max(self.most_begun, self.num_begun)

        def ended(found: list[FloatArray] | Exception) -> None:
            with self._lock:
                self.num_begun -= 1
            done(found)

        self._lanes.begin([partial(self._run, packed, slots) for packed, slots in runs], ended)

    def _run(self, packed: PackedSuffix, slots: Sequence[FloatArray], lane: int) -> FloatArray:
        if not self.gate.wait(timeout=20):
            raise TimeoutError("the test never opened the lanes' gate")
        return self._engine.suffix(packed, slots)


def fake_bundle(parity_embedding: tuple[float, ...] = (540, 13, 4, 0)) -> Bundle:
    """A bundle of two modalities and three scenarios; see the module's arithmetic."""
    schema = ProfileSchema(
        modalities=(
            ModalitySpec(
                name="buy", max_events=4, max_event_tokens=6, template="{days_ago} {text}"
            ),
            ModalitySpec(name="about", kind="attributes", max_events=2, max_event_tokens=6),
        ),
        window_days=9,
    )
    tokens = PrefixTokens(
        header=(100,), modality_start=(101, 102), modality_end=(103, 104),
        user_emb=USER_EMB, eos=106, pad=0,
    )  # fmt: skip
    manifest = Manifest(
        format_version=1,
        export_id="fake-export",
        model_id="fake-model",
        checkpoint_id="fake-checkpoint",
        recipe="fake",
        dims=ModelDims(
            num_layers=1, hidden_dim=3, num_heads=1, num_kv_heads=1, head_dim=1,
            intermediate_dim=1, event_dim=2, embedding_dim=4,
        ),
        profile_schema=schema,
        tokens=tokens,
        event_pad=0,
        limits=Limits(max_prefix_len=max_prefix_len((4, 2), tokens), max_query_len=12),
        graphs={},
        files={},
    )  # fmt: skip
    scenarios = (
        Scenario(name="coffee_fan", question="coffee", version=3, domain="drinks"),
        Scenario(name="tea_fan", question="tea tea"),
        Scenario(name="tuned", question="shoes", soft_prompt=((1.0, 2.0, 3.0), (4.0, 0.0, 0.0))),
    )
    parity = ParityCase(
        texts=(("0 coffee",), ()), queries=("coffee",), embeddings=(parity_embedding,)
    )
    return Bundle(
        path=Path("fake"),
        manifest=manifest,
        scenarios=scenarios,
        parity=(parity,),
        tokenizer=_tokenizer(),
        event_tokenizer=_tokenizer(),
    )


def _tokenizer() -> Tokenizer:
    vocabulary = WORDS | {str(digit): 10 + digit for digit in range(10)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer
