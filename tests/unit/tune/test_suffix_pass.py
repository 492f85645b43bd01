"""Cached prefixes give what a full pass gives, and nothing but the soft prompt learns."""

import copy

import msgspec
import numpy as np
import pytest
import torch

from qanchor.bundle.packing import SuffixQuery
from qanchor.checkpoint import Checkpoint, build_model
from qanchor.config import Scenario, override
from qanchor.eval.embed import embed_users
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus
from qanchor.tune.prefix_cache import PrefixCache, encode_prefixes, kv_bytes_per_position
from qanchor.tune.suffix_pass import SuffixPass, frozen, pooled_rows
from tests.unit.core.conftest import NUM_USERS, QUERIES

HIDDEN_DIM = 32


def prompt(num_rows: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_rows, HIDDEN_DIM)).astype(np.float32)


@torch.no_grad()
def full_pass(checkpoint: Checkpoint, corpus: PrefixCorpus, query: SuffixQuery) -> torch.Tensor:
    """Plain causal transformers passes over [prefix, text, soft prompt, <USER_EMB>], by user."""
    model, found = checkpoint.model, []
    for user in range(NUM_USERS):
        batch = anchor_batch(corpus, [user], [[Segment(())]])
        parts = [model.prefix_embeddings(batch)[0, : int(batch.prefix_len_B[0])]]
        parts.append(model.embed_tokens(torch.tensor(query.token_ids, dtype=torch.int64)))
        if query.prompt_rows_KD is not None:
            parts.append(torch.from_numpy(query.prompt_rows_KD))
        parts.append(model.embed_tokens(torch.tensor([corpus.tokens.user_emb])))
        states = model.decoder(inputs_embeds=torch.cat(parts)[None], use_cache=False)
        found.append(model.head(states.last_hidden_state[0, -1]))
    return torch.stack(found)


def queries_of(checkpoint: Checkpoint) -> list[SuffixQuery]:
    text = checkpoint.encode_query(QUERIES[2])
    return [
        SuffixQuery(text),
        SuffixQuery(text, prompt(6)),
        SuffixQuery((), prompt(8)),
        SuffixQuery((), prompt(1)),
    ]


@pytest.mark.parametrize("case", range(4))
def test_a_cached_suffix_equals_a_full_pass(
    checkpoint: Checkpoint, corpus: PrefixCorpus, passes: SuffixPass, case: int
) -> None:
    """Twelve prefixes of different length in one padded batch; text, soft prompt, both."""
    assert len({corpus.prefix_len(user) for user in range(NUM_USERS)}) > 4
    query = queries_of(checkpoint)[case]
    found = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
    assert (found - full_pass(checkpoint, corpus, query)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sdpa", "lora"])
def test_the_same_holds_for_other_decoders(
    checkpoint: Checkpoint, corpus: PrefixCorpus, kind: str
) -> None:
    """Transformers' flash path; adapters of peft with trained token rows."""
    settings = ["decoder.attention=sdpa"] if kind == "sdpa" else ['lora={"rank": 4}']
    recipe = override(checkpoint.meta.recipe, settings)
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    model = build_model(meta, checkpoint.tokenizer, checkpoint.event_tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.normal_(std=0.2)
    other = Checkpoint(model, meta, checkpoint.tokenizer, checkpoint.event_tokenizer)
    cache = encode_prefixes(model, corpus, range(NUM_USERS), torch.float32)
    passes = SuffixPass(model, cache, corpus.tokens.user_emb)
    for query in queries_of(checkpoint):
        found = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
        assert (found - full_pass(other, corpus, query)).abs().max() < 1e-5


def test_the_anchor_tower_takes_soft_prompts_among_plain_queries(
    checkpoint: Checkpoint, corpus: PrefixCorpus, passes: SuffixPass
) -> None:
    queries = queries_of(checkpoint)
    segments = [Segment(q.token_ids, prompt_rows_RD=q.prompt_rows_KD) for q in queries]
    batch = anchor_batch(corpus, list(range(NUM_USERS)), [segments] * NUM_USERS)
    with torch.no_grad():
        anchors = checkpoint.model.anchor(batch)[0].reshape(NUM_USERS, len(queries), -1)
    for place, query in enumerate(queries):
        cached = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
        assert (anchors[:, place] - cached).abs().max() < 1e-5


def test_the_order_of_users_and_their_company_do_not_matter(
    checkpoint: Checkpoint, passes: SuffixPass
) -> None:
    suffix = passes.suffix_of(queries_of(checkpoint)[1])
    together = passes.all_embeddings(range(NUM_USERS), suffix)
    mixed = passes.all_embeddings([7, 0, 11, 3], suffix)
    alone = torch.cat([passes.all_embeddings([row], suffix) for row in (7, 0, 11, 3)])
    assert (mixed - alone).abs().max() < 1e-5
    assert (mixed - together[[7, 0, 11, 3]]).abs().max() < 1e-5


def test_a_step_changes_neither_cache_nor_model_and_only_the_prompt_gets_a_gradient(
    checkpoint: Checkpoint, passes: SuffixPass
) -> None:
    before = [kv.clone() for kv in passes.cache.kv]
    weights = copy.deepcopy(checkpoint.model.state_dict())
    trainable = [p for p in checkpoint.model.parameters() if p.requires_grad]
    text = passes.text_embeddings(checkpoint.encode_query(QUERIES[0]))
    rows = torch.from_numpy(prompt(6)).requires_grad_()
    with frozen(checkpoint.model):
        for _ in range(3):
            passes.embeddings([1, 5, 9], passes.suffix(text, rows))[:, 0].sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum(dim=1).min() > 0
    assert all(parameter.grad is None for parameter in checkpoint.model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, passes.cache.kv, strict=True))
    after = checkpoint.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert [p for p in checkpoint.model.parameters() if p.requires_grad] == trainable


def test_a_text_may_be_kept_behind_the_prefix_too(
    checkpoint: Checkpoint, passes: SuffixPass
) -> None:
    """[prefix, text] cached and [soft prompt, <USER_EMB>] run = all of the suffix run."""
    text = passes.text_embeddings(checkpoint.encode_query(QUERIES[2]))
    rows = torch.from_numpy(prompt(6))
    behind = passes.after_text(text)
    before = passes.positions.num_suffix
    for users in (list(range(NUM_USERS)), [9, 2]):
        for soft in (rows, rows[:0]):
            found = behind.all_embeddings(users, behind.suffix(text[:0], soft))
            wanted = passes.all_embeddings(users, passes.suffix(text, soft))
            assert (found - wanted).abs().max() < 1e-5
    num_passes = NUM_USERS + 2
    assert passes.positions.num_suffix - before == num_passes * (2 * len(text) + 2 * 7 + 2 * 1)


def test_positions_are_counted_with_and_without_reuse(passes: SuffixPass) -> None:
    lens = passes.cache.past_lens(range(NUM_USERS))
    suffix = passes.suffix_of(SuffixQuery((), prompt(2)))
    passes.embeddings([0, 4], suffix)
    passes.embeddings([4], suffix)
    count = passes.positions
    assert count.num_prefix == sum(lens)
    assert count.num_suffix == 3 * 3
    assert count.num_reused == lens[0] + 2 * lens[4]
    assert count.times_fewer == (lens[0] + 2 * lens[4] + 9) / (sum(lens) + 9)


def test_the_cache_costs_what_it_says_and_bfloat16_half(
    checkpoint: Checkpoint, corpus: PrefixCorpus, cache: PrefixCache
) -> None:
    per_position = kv_bytes_per_position(checkpoint.model, torch.float32)
    assert cache.num_bytes == per_position * cache.num_positions
    # 2 layers x (keys, values) x 2 KV heads x 8 numbers x 4 bytes
    assert per_position == 2 * 2 * 2 * 8 * 4
    half = encode_prefixes(checkpoint.model, corpus, range(NUM_USERS), torch.bfloat16)
    assert half.num_bytes * 2 == cache.num_bytes
    passes = [SuffixPass(checkpoint.model, kept, corpus.tokens.user_emb) for kept in (cache, half)]
    suffix = passes[0].suffix_of(SuffixQuery((), prompt(2)))
    exact, rounded = (one.all_embeddings(range(NUM_USERS), suffix) for one in passes)
    assert 0 < (exact - rounded).abs().max() < 0.02


def test_evaluation_asks_a_scenario_with_its_soft_prompt(
    checkpoint: Checkpoint, rendered: RenderedCorpus, passes: SuffixPass
) -> None:
    rows = tuple(tuple(row) for row in prompt(6).tolist())
    tuned = Scenario(name="t", question=QUERIES[0], soft_prompt=rows)
    compiled = Scenario(name="c", question=QUERIES[0], soft_prompt=rows, is_compiled=True)
    found = embed_users(checkpoint, rendered, [QUERIES[0], tuned, compiled])
    text = checkpoint.encode_query(QUERIES[0])
    queries = [SuffixQuery(text), SuffixQuery(text, prompt(6)), SuffixQuery((), prompt(6))]
    for place, query in enumerate(queries):
        wanted = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
        np.testing.assert_allclose(found[:, place], wanted.numpy(), atol=1e-5)


def test_pooled_rows_are_means_of_neighbours_or_repeats() -> None:
    embeddings = torch.arange(8.0).reshape(4, 2)
    assert pooled_rows(embeddings, 2).tolist() == [[1, 2], [5, 6]]
    assert pooled_rows(embeddings, 4).tolist() == embeddings.tolist()
    assert pooled_rows(embeddings[:1], 3).tolist() == [[0, 1]] * 3
