"""A checkpoint directory: resolved recipe, schema, tokenizers, scenarios, weights.

Whatever is needed to go on training, to evaluate, or to export; nothing refers outside of it.
"""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, Qwen2ForCausalLM

from qanchor import config
from qanchor.bundle.packing import SuffixQuery, check_questions, scenario_suffix
from qanchor.config import Config, ProfileSchema, Scenario
from qanchor.data.measures import num_measures
from qanchor.data.prefix import PrefixTokens, max_prefix_len
from qanchor.data.statistics import StatisticSpace
from qanchor.decoder import add_lora, build_language_model
from qanchor.encoder.event_encoder import EventEncoder, build_event_encoder
from qanchor.encoder.hierarchical import HierarchicalEncoder
from qanchor.encoder.query_encoder import QueryEncoder, QueryMap, load_query_encoder, read_query
from qanchor.errors import ConfigError
from qanchor.statistics_head import StatisticsHead
from qanchor.tokenization import event_cls_id
from qanchor.towers import Head, QAnchorModel
from qanchor.train.recipes import Recipe

META_FILE = "checkpoint.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
EVENT_TOKENIZER_FILE = "event_tokenizer.json"
TRAINER_FILE = "trainer.pt"
DECODER_DIR = "decoder"
ENCODER_DIR = "event_encoder"
QUERY_ENCODER_DIR = "query_encoder"
CHECKPOINT_ID_CHARS = 32


class CheckpointMeta(Config, frozen=True, kw_only=True):
    """What is said of a checkpoint in its JSON file."""

    recipe: Recipe
    profile_schema: ProfileSchema
    tokens: PrefixTokens
    event_pad: int
    scenarios: tuple[Scenario, ...]
    step: int
    """Optimizer steps taken; 0 is the untrained model."""
    statistics: StatisticSpace | None = None
    """Columns of the statistics loss, where it is on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with everything it was trained with."""

    model: QAnchorModel
    meta: CheckpointMeta
    tokenizer: Tokenizer
    event_tokenizer: Tokenizer
    query_encoder: QueryEncoder | None = None
    """What reads questions before the model, on the CPU; None: the decoder reads them itself."""

    @property
    def hidden_dim(self) -> int:
        """Width of the decoder, and so of a soft-prompt row."""
        return int(self.model.language_model.config.hidden_size)

    def encode_query(self, query: str) -> tuple[int, ...]:
        """Token ids a query's text is read as, however many; see `check_questions`.

        By the query encoder, as it stands, where there is one; else by the decoder, in the schema's
        template, as tokens of the suffix.
        """
        if self.query_encoder is not None:
            return self.query_encoder.tokens(query)
        text = self.meta.profile_schema.query_template.format(query=query)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def query(self, text: str) -> SuffixQuery:
        """The suffix of a query's text."""
        token_ids = self.encode_query(text)
        if self.query_encoder is None:
            return SuffixQuery(token_ids)
        query_map = self.model.query_map
        assert query_map is not None, "This is a bug: a query encoder comes with its map."
        return read_query(self.query_encoder, query_map, token_ids)

    def scenario(self, scenario: Scenario) -> SuffixQuery:
        """The suffix of a scenario. Raises ConfigError for a soft prompt of another width."""
        return scenario_suffix(scenario, self.query, self.hidden_dim)

    def check_questions(self, scenarios: Iterable[Scenario]) -> None:
        """Raise ConfigError for a scenario whose question is longer than any in training."""
        limit = self.meta.recipe.train.max_query_len
        check_questions(scenarios, self.encode_query, limit)

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer, without eos, cut to the recipe's limit."""
        ids = self.tokenizer.encode(answer, add_special_tokens=False).ids
        return tuple(ids[: self.meta.recipe.train.max_answer_len])


def build_model(
    meta: CheckpointMeta,
    tokenizer: Tokenizer,
    event_tokenizer: Tokenizer,
    query_encoder: QueryEncoder | None = None,
) -> QAnchorModel:
    """A model with fresh (or, for paths in the recipe, pre-trained) weights; seeds torch.

    Raises ConfigError for wrong paths, and for limits that a backbone has no positions for.
    """
    recipe = meta.recipe
    torch.manual_seed(recipe.train.seed)
    event_encoder = build_event_encoder(
        recipe.event_encoder,
        event_tokenizer.get_vocab_size(),
        pad_id=meta.event_pad,
        cls_id=event_cls_id(event_tokenizer),
    )
    language_model = build_language_model(recipe.decoder, tokenizer.get_vocab_size())
    _check_lengths(meta, event_encoder, language_model, query_encoder)
    return _assemble(meta, event_encoder, language_model, query_encoder)


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint; the directory appears whole or not at all."""
    staging = directory.with_name(directory.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model = checkpoint.model
    model.language_model.config.save_pretrained(staging / DECODER_DIR)
    model.event_encoder.model.config.save_pretrained(staging / ENCODER_DIR)
    save_model(model, str(staging / WEIGHTS_FILE))
    if checkpoint.query_encoder is not None:
        checkpoint.query_encoder.save(staging / QUERY_ENCODER_DIR)
    checkpoint.tokenizer.save(str(staging / TOKENIZER_FILE))
    checkpoint.event_tokenizer.save(str(staging / EVENT_TOKENIZER_FILE))
    config.save(checkpoint.meta, staging / META_FILE)
    if directory.exists():
        shutil.rmtree(directory)
    staging.rename(directory)


def read_meta(directory: Path) -> CheckpointMeta:
    """Read what is said of a checkpoint. Raises ConfigError when the directory is none."""
    if not (directory / META_FILE).is_file():
        raise ConfigError(
            "checkpoint",
            str(directory),
            f"no {META_FILE} there",
            "give a directory `qanchor pretrain` wrote",
        )
    return config.load(CheckpointMeta, directory / META_FILE)


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint; the model comes back in eval mode on the CPU.

    Raises ConfigError when the directory is no checkpoint, or one of another version's model.
    """
    meta = read_meta(directory)
    decoder_config = AutoConfig.from_pretrained(directory / DECODER_DIR, local_files_only=True)
    encoder_config = AutoConfig.from_pretrained(directory / ENCODER_DIR, local_files_only=True)
    event_encoder = EventEncoder(
        AutoModel.from_config(encoder_config, add_pooling_layer=False), meta.event_pad
    )
    language_model = Qwen2ForCausalLM._from_config(
        decoder_config, attn_implementation=meta.recipe.decoder.attention
    )
    query_encoder = None
    if meta.recipe.query_encoder.path:
        query_encoder = load_query_encoder(directory / QUERY_ENCODER_DIR)
    model = _assemble(meta, event_encoder, language_model, query_encoder)
    try:
        load_model(model, str(directory / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ConfigError(
            "checkpoint",
            str(directory),
            f"its weights must fit the model of its recipe ({_first_misfit(error)})",
            "another version of qanchor wrote it: train again, or read it with that version",
        ) from error
    return Checkpoint(
        model=model.eval(),
        meta=meta,
        tokenizer=Tokenizer.from_file(str(directory / TOKENIZER_FILE)),
        event_tokenizer=Tokenizer.from_file(str(directory / EVENT_TOKENIZER_FILE)),
        query_encoder=query_encoder,
    )


def _first_misfit(error: RuntimeError) -> str:
    """The first of the tensors torch lists below its heading."""
    lines = str(error).splitlines()
    return lines[min(1, len(lines) - 1)].strip().rstrip(".")


def load_for_inference(directory: Path) -> Checkpoint:
    """`load_checkpoint` with the model on the GPU, where there is one."""
    checkpoint = load_checkpoint(directory)
    checkpoint.model.to(inference_device())
    return checkpoint


def inference_device() -> torch.device:
    """Where models run that are not trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """Content id, 32 hex digits, of weights, tokenizers, schema and tokens: all embeddings rest on.

    Where the checkpoint lies, how long it was trained and its scenarios do not matter.
    """
    digest = hashlib.sha256()
    query_encoder = checkpoint.query_encoder
    tensors = sorted(checkpoint.model.state_dict().items())
    tokenizers = [checkpoint.tokenizer, checkpoint.event_tokenizer]
    if query_encoder is not None:
        tensors += sorted(query_encoder.model.state_dict().items())
        tokenizers.append(query_encoder.tokenizer)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes: numpy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    for tokenizer in tokenizers:
        digest.update(tokenizer.to_str().encode())
    meta = checkpoint.meta
    digest.update(config.to_json(meta.profile_schema) + config.to_json(meta.tokens))
    return digest.hexdigest()[:CHECKPOINT_ID_CHARS]


def at_step(checkpoint: Checkpoint, step: int) -> Checkpoint:
    """The same checkpoint, said to stand at `step`."""
    return replace(checkpoint, meta=msgspec.structs.replace(checkpoint.meta, step=step))


def _check_lengths(
    meta: CheckpointMeta,
    event_encoder: EventEncoder,
    language_model: PreTrainedModel,
    query_encoder: QueryEncoder | None,
) -> None:
    num_positions = int(event_encoder.model.config.max_position_embeddings)
    for spec in meta.profile_schema.modalities:
        if spec.max_event_tokens > num_positions:
            raise ConfigError(
                f"{spec.name}.max_event_tokens",
                spec.max_event_tokens,
                f"the event encoder has {num_positions} positions",
                "lower it in schema.json, or raise event_encoder.max_text_len",
            )
    train = meta.recipe.train
    if query_encoder is not None and train.max_query_len > query_encoder.num_positions:
        raise ConfigError(
            "train.max_query_len",
            train.max_query_len,
            f"the query encoder has {query_encoder.num_positions} positions",
            "lower it",
        )
    max_events = tuple(spec.max_events for spec in meta.profile_schema.modalities)
    longest = max_prefix_len(max_events, meta.tokens)
    longest += meta.recipe.max_query_positions + 1 + train.max_answer_len
    num_positions = int(language_model.config.max_position_embeddings)
    if longest > num_positions:
        raise ConfigError(
            "decoder.max_positions",
            num_positions,
            f"the longest prefix, query and answer need {longest}",
            "raise it, or lower max_events, train.max_query_len or train.max_answer_len",
        )


def _assemble(
    meta: CheckpointMeta,
    event_encoder: EventEncoder,
    language_model: PreTrainedModel,
    query_encoder: QueryEncoder | None,
) -> QAnchorModel:
    recipe, tokens = meta.recipe, meta.tokens
    hidden_dim = int(language_model.config.hidden_size)
    if recipe.lora is not None:
        new_tokens = [tokens.user_emb, *tokens.modality_start, *tokens.modality_end]
        language_model = add_lora(
            language_model, recipe.lora, recipe.lora.decoder_targets, new_tokens
        )
        if recipe.event_encoder.is_trained:
            event_encoder.model = add_lora(
                event_encoder.model, recipe.lora, recipe.lora.encoder_targets, []
            )
    if not recipe.event_encoder.is_trained:
        event_encoder.requires_grad_(False)
    embedding_dim = recipe.head.embedding_dim
    query_map = None
    if query_encoder is not None:
        query_map = QueryMap(query_encoder.state_dim, hidden_dim, recipe.query_encoder)
    is_apart = recipe.loss.next_token_context == "embedding"
    return QAnchorModel(
        event_encoder=event_encoder,
        encoder=HierarchicalEncoder(
            len(meta.profile_schema.modalities),
            event_encoder.event_dim + num_measures(meta.profile_schema),
            hidden_dim,
        ),
        language_model=language_model,
        head=Head(hidden_dim, recipe.head.inner_dim, embedding_dim),
        query_map=query_map,
        answer_start=nn.Linear(embedding_dim, hidden_dim) if is_apart else None,
        statistics_head=StatisticsHead(embedding_dim, meta.statistics) if meta.statistics else None,
    )
