"""One embedding, whichever way it is computed: torch, ONNX Runtime, chunks, packed, batched."""

import numpy as np
import pytest
import torch

from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor.data.prefix import build_layout
from qanchor.data.render import RenderedProfile
from qanchor_export.reference import anchor_embeddings, full_pass_embeddings, make_query
from qanchor_export.runner import BundleRunner, EncodedPrefix
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.source import ExportSource
from qanchor_export.verify import Check, compare

EQUALITIES = (
    "torch at export = ONNX Runtime",
    "prefix in one piece = in chunks of 1",
    "prefix in one piece = in chunks of 7",
    "prefix in one piece = in chunks of 64",
    "noise in unused prefix columns",
    "query alone = packed",
    "users apart = batched",
    "soft prompts alone = packed",
    "anchor tower = ONNX Runtime",
    "one full pass = prefix + suffix",
    "one full pass, soft prompts",
    "one full pass, the bundle's scenarios",
)


def hold(check: Check) -> None:
    """Fail with both differences when a check is beyond its tolerance."""
    assert check.is_ok, f"{check.name}: max {check.max_abs:.3e}, mean {check.mean_abs:.3e}"


@pytest.mark.parametrize("name", EQUALITIES)
def test_an_equality_of_verify_holds(checks: dict[str, Check], name: str) -> None:
    hold(checks[name])


def test_no_equality_of_verify_is_left_out(checks: dict[str, Check]) -> None:
    assert set(checks) == set(EQUALITIES)


def test_users_and_queries_have_visibly_different_embeddings(
    runner: BundleRunner, source: ExportSource
) -> None:
    """Otherwise every equality above would hold for a graph that ignores its inputs."""
    users = sample_users(source.schema, 2, seed=3, fill=0.6)
    queries = [runner.query(text) for text in SAMPLE_QUERIES[:2]]
    rows = np.concatenate(
        [runner.suffix([(runner.encode_prefix(user), queries)]) for user in users]
    )
    apart = np.abs(rows[:, None] - rows[None, :]).max(-1)[~np.eye(4, dtype=bool)]
    assert apart.min() > 100 * 1e-4, f"smallest difference of two embeddings {apart.min():.3e}"


def test_more_columns_than_tokens_with_huge_garbage_change_nothing(
    runner: BundleRunner, source: ExportSource
) -> None:
    (user,) = sample_users(source.schema, 1, seed=5, fill=0.3)
    queries = [runner.query(text) for text in SAMPLE_QUERIES]
    prefix = runner.encode_prefix(user)
    dims = runner.bundle.manifest.dims
    shape = (dims.num_layers, 2, dims.num_kv_heads, 768, dims.head_dim)
    wide = np.full(shape, 1e20, dtype=np.float32)
    wide[:, :, :, : prefix.length] = prefix.kv_L2GCK
    found = runner.suffix([(EncodedPrefix(wide, prefix.length), queries)])
    hold(compare("capacity 768", found, runner.suffix([(prefix, queries)])))


def test_prefill_into_a_slot_full_of_garbage_changes_nothing(
    runner: BundleRunner, source: ExportSource
) -> None:
    (user,) = sample_users(source.schema, 1, seed=5, fill=0.5)
    queries = [runner.query(text) for text in SAMPLE_QUERIES]
    found = runner.suffix([(runner.encode_prefix(user, chunk_len=5, spare=700), queries)])
    hold(compare("spare 700", found, anchor_embeddings(source, user, queries)))


def test_a_user_without_events_has_an_embedding(runner: BundleRunner, source: ExportSource) -> None:
    nothing = tuple(() for _ in source.schema.modalities)
    nobody = RenderedProfile(nothing, nothing)
    queries = [make_query(source, text) for text in SAMPLE_QUERIES]
    found = runner.suffix([(runner.encode_prefix(nobody), queries)])
    hold(compare("no events", found, anchor_embeddings(source, nobody, queries)))


def test_sizes_of_one_are_not_baked_into_the_suffix_graph(
    runner: BundleRunner, source: ExportSource
) -> None:
    """One user, one query, one packed token, one prompt row; then three users."""
    users = sample_users(source.schema, 3, seed=11, fill=0.4)
    prefixes = [runner.encode_prefix(user) for user in users]
    lone = SuffixQuery(())
    prompted = runner.query("Why?", np.ones((1, 36), dtype=np.float32))
    for query in (lone, prompted):
        found = runner.suffix([(prefix, [query]) for prefix in prefixes])
        alone = [runner.suffix([(prefix, [query])]) for prefix in prefixes]
        hold(compare("three users = one", found, np.concatenate(alone)))
        wanted = [full_pass_embeddings(source, user, [query]) for user in users]
        hold(compare("one full pass", found, np.concatenate(wanted)))


def test_the_order_of_columns_in_the_grid_is_free(
    runner: BundleRunner, source: ExportSource
) -> None:
    """A row of the grid may list a user's packed positions in any order, padding anywhere."""
    (user,) = sample_users(source.schema, 1, seed=2, fill=0.4)
    prefix = runner.encode_prefix(user)
    queries = tuple(runner.query(text) for text in SAMPLE_QUERIES[:3])
    packed = pack(
        [UserSuffix(prefix.length, queries)], user_emb=source.tokens.user_emb, hidden_dim=36
    )
    wanted = runner.run_suffix(packed, [prefix.kv_L2GCK])
    row_len = packed.row_index_BR.shape[1] + 3
    columns = np.random.default_rng(0).permutation(row_len)[: packed.row_index_BR.shape[1]]
    packed.row_index_BR.resize((1, row_len), refcheck=False)
    packed.row_index_BR[:] = -1
    packed.row_index_BR[0, columns] = np.arange(len(columns))
    packed.flat_index_S[:] = columns
    hold(compare("shuffled grid", runner.run_suffix(packed, [prefix.kv_L2GCK]), wanted))


@pytest.mark.parametrize(("num_texts", "text_len"), [(1, 1), (1, 8), (3, 2), (65, 11)])
def test_event_vectors_equal_the_transformers_encoder(
    runner: BundleRunner, source: ExportSource, num_texts: int, text_len: int
) -> None:
    encoder = source.model.event_encoder
    ids = torch.randint(3, 600, (num_texts, text_len), generator=torch.manual_seed(0))
    ids[-1, (text_len + 1) // 2 :] = encoder.pad_id
    with torch.no_grad():
        wanted = encoder(ids).numpy()
    (found,) = runner.session("event_encoder").run(None, {"event_token_ids": ids.numpy()})
    hold(compare("event vectors", found, wanted))


def test_prefill_writes_every_column_of_the_prefix(
    runner: BundleRunner, source: ExportSource
) -> None:
    """Keys and values themselves agree between one piece and single tokens, not only embeddings."""
    (user,) = sample_users(source.schema, 1, seed=4, fill=0.2)
    whole = runner.encode_prefix(user)
    assert whole.length == len(build_layout(user.num_events, source.tokens))
    single = runner.encode_prefix(user, chunk_len=1)
    apart = np.abs(whole.kv_L2GCK - single.kv_L2GCK)
    assert apart.max() <= 1e-4, f"max {apart.max():.3e}, mean {apart.mean():.3e}"
