"""A prefix is encoded in bounded pieces, and the pieces do not change what comes out."""

import numpy as np
import pytest
from fake_engine import FakeEngine, fake_bundle

from qanchor.data.render import RenderedProfile
from qanchor_server.engine import IntArray
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import prepare_rendered

# Tokens: 6 (the modality's limit), 4, 2, 2 and, as an attribute, 3.
TEXTS = (("1 coffee tea tea tea tea tea", "2 tea tea shoes", "3 tea", "4 coffee"), ("a tea 5",))


class SizingEngine(FakeEngine):
    """Also notes the padded size of each event batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def encode_events(self, token_ids_NT: IntArray) -> np.ndarray:
        self.sizes.append(token_ids_NT.shape)
        return super().encode_events(token_ids_NT)


def encode(max_event_tokens: int, chunk_len: int) -> tuple[np.ndarray, SizingEngine, int]:
    """The slot, the engine, and in how many pieces it was filled."""
    engine, bundle = SizingEngine(), fake_bundle()
    encoder = PrefixEncoder(
        engine,
        bundle,
        chunk_len=chunk_len,
        max_event_tokens_per_step=max_event_tokens,
        max_cached_texts=10,
    )
    prepared = prepare_rendered(
        RenderedProfile(TEXTS), user_id="a", version=1, as_of_s=0, manifest=bundle.manifest
    )
    slot = engine.allocate_slot(len(prepared.layout))
    encoding = encoder.start(prepared, slot)
    num_pieces = 1
    while not encoder.advance(encoding):
        num_pieces += 1
    return slot, engine, num_pieces


@pytest.mark.parametrize(("max_event_tokens", "num_batches"), [(1, 5), (8, 3), (100, 1)])
def test_no_piece_is_larger_than_asked_but_for_a_single_text(max_event_tokens, num_batches) -> None:
    slot, engine, num_pieces = encode(max_event_tokens, chunk_len=5)
    assert len(engine.sizes) == num_batches
    assert sum(num_texts for num_texts, _ in engine.sizes) == 5
    assert all(n == 1 or n * length <= max_event_tokens for n, length in engine.sizes)
    # 13 positions in chunks of 5.
    assert engine.num_prefill_calls == 3
    assert num_pieces == num_batches + 3
    whole, _, _ = encode(1000, chunk_len=1000)
    assert np.array_equal(slot, whole)
    assert whole.any()
