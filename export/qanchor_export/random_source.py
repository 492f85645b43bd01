"""Randomly initialised models of a named shape: engines can be measured before training is done."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

from qanchor.config import ModalitySpec, ProfileSchema, nearest
from qanchor.data.measures import num_measures
from qanchor.encoder.event_encoder import EventEncoder
from qanchor.encoder.hierarchical import HierarchicalEncoder
from qanchor.encoder.query_encoder import QueryEncoder, QueryEncoderConfig, QueryMap
from qanchor.errors import ConfigError
from qanchor.tokenization import (
    add_prefix_tokens,
    event_pad_id,
    train_decoder_tokenizer,
    train_event_tokenizer,
)
from qanchor.towers import Head, QAnchorModel
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.source import ExportSource

_NOISE = 0.05
_EMBEDDING_STD = 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, an event encoder and a head."""

    name: str
    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    rope_theta: float
    event_vocab_size: int
    event_dim: int
    event_layers: int
    event_heads: int
    event_intermediate_dim: int
    head_inner_dim: int = 512
    embedding_dim: int = 128
    max_query_len: int = 64
    """Tokens of one suffix, and those a query encoder reads of a question."""
    num_query_rows: int = 0
    """Suffix positions of a question that a query encoder reads; 0: the decoder reads its text."""


QWEN_0_5B = Shape(
    name="qwen2.5-0.5b",
    vocab_size=151_936,
    hidden_dim=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_dim=4864,
    rope_theta=1e6,
    event_vocab_size=30_522,
    event_dim=768,
    event_layers=12,
    event_heads=12,
    event_intermediate_dim=3072,
)
TINY = Shape(
    name="tiny",
    vocab_size=701,
    hidden_dim=36,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    intermediate_dim=52,
    rope_theta=1e4,
    event_vocab_size=601,
    event_dim=20,
    event_layers=2,
    event_heads=4,
    event_intermediate_dim=44,
    head_inner_dim=24,
    embedding_dim=12,
)
MINI = Shape(
    name="mini",
    vocab_size=2048,
    hidden_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_dim=256,
    rope_theta=1e4,
    event_vocab_size=2048,
    event_dim=128,
    event_layers=1,
    event_heads=4,
    event_intermediate_dim=256,
)
"""The sizes of the recipe `mini`."""
MINI_READING = replace(MINI, name="mini-reading", num_query_rows=2)
"""The same with a query encoder, a small one: it reads a text once."""
SHAPES = (QWEN_0_5B, MINI, MINI_READING, TINY)


def shape_named(name: str) -> Shape:
    """The shape of that name. Raises ConfigError for an unknown one."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ConfigError("--shape", name, "no such shape", nearest(name, [s.name for s in SHAPES]))


def method_schema() -> ProfileSchema:
    """The six modalities and limits of the method: 710 event positions at most."""
    limits = {"bill": (250, 50), "minipro": (150, 17), "spm": (150, 20), "app": (100, 15)}
    limits["search"] = (10, 12)
    events = [
        ModalitySpec(name=name, max_events=num_events, max_event_tokens=num_tokens)
        for name, (num_events, num_tokens) in limits.items()
    ]
    tabular = ModalitySpec(name="tabular", kind="attributes", max_events=50, max_event_tokens=16)
    return ProfileSchema(modalities=(*events, tabular))


def random_source(shape: Shape, schema: ProfileSchema, seed: int = 0) -> ExportSource:
    """A model of `shape` with random weights, and tokenizers trained on sample texts.

    Equal arguments give equal models.
    """
    texts = [text for user in sample_users(schema, 8, seed, fill=0.5) for text in user.flat()]
    queries = [schema.query_template.format(query=query) for query in SAMPLE_QUERIES]
    # Room for <USER_EMB> and the modality delimiters, which come after training.
    num_added = 1 + 2 * len(schema.modalities)
    budget = min(shape.vocab_size, 4096) - num_added
    tokenizer = train_decoder_tokenizer([schema.header, *queries, *texts], budget)
    event_tokenizer = train_event_tokenizer(texts, min(shape.event_vocab_size, 4096))
    tokens = add_prefix_tokens(tokenizer, schema)
    model = _random_model(shape, schema, event_pad_id(event_tokenizer), seed)
    source = ExportSource(
        model=model,
        recipe=f"random-{shape.name}",
        schema=schema,
        tokens=tokens,
        tokenizer=tokenizer,
        event_tokenizer=event_tokenizer,
        scenarios=(),
        max_query_len=shape.max_query_len,
    )
    if not shape.num_query_rows:
        return source
    encoder, model.query_map = _random_query_reader(shape)
    return replace(
        source,
        query_encoder=encoder,
        max_read_len=shape.max_query_len,
    )


def _random_query_reader(shape: Shape) -> tuple[QueryEncoder, QueryMap]:
    """A small sentence encoder, and the map of its states to rows."""
    tokenizer = train_event_tokenizer(SAMPLE_QUERIES, 512)
    bert = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=shape.max_query_len,
    )
    encoder = QueryEncoder(BertModel(bert, add_pooling_layer=False).eval(), tokenizer)
    _draw(encoder.model)
    config = QueryEncoderConfig(num_rows=shape.num_query_rows)
    query_map = QueryMap(encoder.state_dim, shape.hidden_dim, config)
    query_map.set_scale(encoder.states([encoder.tokens(text) for text in SAMPLE_QUERIES]))
    return encoder, query_map.eval()


def _random_model(shape: Shape, schema: ProfileSchema, pad_id: int, seed: int) -> QAnchorModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"head_dim": shape.head_dim}
    qwen2 = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_dim,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    bert = BertConfig(
        vocab_size=shape.event_vocab_size,
        hidden_size=shape.event_dim,
        num_hidden_layers=shape.event_layers,
        num_attention_heads=shape.event_heads,
        intermediate_size=shape.event_intermediate_dim,
        pad_token_id=pad_id,
    )
    model = QAnchorModel(
        EventEncoder(BertModel(bert, add_pooling_layer=False), pad_id),
        HierarchicalEncoder(
            len(schema.modalities), shape.event_dim + num_measures(schema), shape.hidden_dim
        ),
        Qwen2ForCausalLM(qwen2),
        Head(shape.hidden_dim, shape.head_inner_dim, shape.embedding_dim),
    )
    _draw(model)
    return model.float().eval()


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Weights that keep signals of order one, so that users and queries differ visibly.

    Biases and norms leave their 0 and 1: a graph that forgets one must not pass a parity check.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * _NOISE)
            elif isinstance(module, nn.Linear):
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(std=_EMBEDDING_STD)
