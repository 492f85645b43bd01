"""The start-up proof: this engine on this machine gives the embeddings torch gave at export.

For each stored case: all queries packed over a fresh prefix equal the stored embeddings; each
query alone over the kept prefix equals the packed one (cached = uncached); a second encoding in
another slot equals the first. Runs on the worker thread before the server says SERVING; it is
also the warm-up. Must not know grpc or ONNX Runtime.
"""

import logging

import numpy as np

from qanchor.bundle.manifest import ParityCase
from qanchor.bundle.packing import PackedSuffix, SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle
from qanchor.bundle.tolerance import Tolerance, tolerances
from qanchor.errors import BundleError
from qanchor_server.engine import Engine, FloatArray, SlotT
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import PreparedPrefix, prepare_rendered
from qanchor_server.query_reader import QueryReader
from qanchor_server.suffix_runner import run_each

log = logging.getLogger(__name__)

# Another machine's kernels sum in another order: room beyond what `qanchor verify` grants float32.
_MIN_ALLOWED = 1e-3


def check_parity(
    engine: Engine[SlotT],
    encoder: PrefixEncoder[SlotT],
    bundle: Bundle,
    reader: QueryReader | None = None,
) -> float:
    """Run every parity case; returns the largest difference to the stored embeddings.

    `reader` of the bundle's questions, if one is open already.

    Raises BundleError when a difference exceeds what the bundle's types allow.
    """
    worst = 0.0
    reader = reader or QueryReader(bundle)
    for number, case in enumerate(bundle.parity):
        queries = [reader.query(text) for text in case.queries]
        name = f"parity case {number}"
        worst = max(worst, _check_case(engine, encoder, bundle, case, queries, name))
    log.info("parity: %d cases, max abs difference %.2e", len(bundle.parity), worst)
    return worst


def _check_case(
    engine: Engine[SlotT],
    encoder: PrefixEncoder[SlotT],
    bundle: Bundle,
    case: ParityCase,
    queries: list[SuffixQuery],
    name: str,
) -> float:
    prepared = prepare_rendered(
        case.rendered, user_id="", version=0, as_of_s=0, manifest=bundle.manifest
    )
    slot = engine.allocate_slot(len(prepared.layout))
    again = engine.allocate_slot(len(prepared.layout))
    try:
        encoder.encode(prepared, slot)
        packed = _pack(bundle, prepared, queries)
        packed_QZ = engine.suffix(packed, [slot])
        stored_QZ = np.array(case.embeddings, dtype=np.float32)
        allowed = tolerances(bundle.manifest)
        what = f"{name}: engine against stored embeddings"
        difference = _compare(packed_QZ, stored_QZ, what, allowed.torch)
        alone = [engine.suffix(_pack(bundle, prepared, [query]), [slot]) for query in queries]
        _compare(np.concatenate(alone), packed_QZ, f"{name}: alone against packed", allowed.ways)
        encoder.encode(prepared, again)
        for again_QZ in run_each(engine, [(packed, [slot]), (packed, [again])]):
            _compare(again_QZ, packed_QZ, f"{name}: encoded again against kept", allowed.ways)
    finally:
        engine.free_slot(slot)
        engine.free_slot(again)
    return difference


def _pack(bundle: Bundle, prepared: PreparedPrefix, queries: list[SuffixQuery]) -> PackedSuffix:
    manifest = bundle.manifest
    return pack(
        [UserSuffix(len(prepared.layout), tuple(queries))],
        user_emb=manifest.tokens.user_emb,
        hidden_dim=manifest.dims.hidden_dim,
    )


def _compare(found_QZ: FloatArray, wanted_QZ: FloatArray, name: str, allowed: Tolerance) -> float:
    if found_QZ.shape != wanted_QZ.shape:
        raise BundleError(f"{name}: shape {found_QZ.shape}, expected {wanted_QZ.shape}")
    difference = np.abs(found_QZ - wanted_QZ)
    worst = float(difference.max())
    # `not <=` so that a NaN fails too.
    most = max(allowed.max_abs, _MIN_ALLOWED)
    if not worst <= most:
        raise BundleError(
            f"{name}: max abs difference {worst:.2e}, mean {float(difference.mean()):.2e}, allowed "
            f"{most:.0e}; export the checkpoint again or use another execution provider"
        )
    return worst
