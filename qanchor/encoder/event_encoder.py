"""Event text tokens to event vectors: a transformers encoder read at its CLS position.

Legend: N texts, T tokens per text, E event_dim.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedModel

from qanchor.backbone_maths import check_text_encoder
from qanchor.config import Config
from qanchor.errors import ConfigError

TEXTS_PER_PIECE = 256


class EventEncoderConfig(Config, frozen=True, kw_only=True):
    """The event text encoder: a Hugging Face directory, or a small BERT trained along."""

    path: str = ""
    """Hugging Face directory such as gte-base; empty builds a BERT of the sizes below."""
    hidden_dim: int = 128
    num_layers: int = 1
    num_heads: int = 4
    intermediate_dim: int = 256
    max_text_len: int = 64
    """Longest event text in tokens the position table allows."""
    is_trained: bool = True
    """False leaves the encoder as it starts and encodes every distinct text once, before the first
    step. Steps are cheaper then; and an encoder that starts from random weights does not grow the
    direction that all texts share (see qanchor.train.centre)."""


class EventEncoder(nn.Module):
    """h_{m,t}: the CLS vector of each event text."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    @property
    def event_dim(self) -> int:
        """Width E of an event vector."""
        return int(self.model.config.hidden_size)

    def forward(self, event_token_ids_NT: Tensor) -> Tensor:
        """Event vectors [N, E] (float, device of the weights) of padded texts [N, T] (int64)."""
        mask_NT = (event_token_ids_NT != self.pad_id).long()
        states_NTE = self.model(
            input_ids=event_token_ids_NT, attention_mask=mask_NT
        ).last_hidden_state
        vectors_NE: Tensor = states_NTE[:, 0]
        return vectors_NE

    def in_pieces(self, event_token_ids_NT: Tensor) -> Tensor:
        """The same vectors, each piece cut to its longest text: for texts sorted by length."""
        pieces = []
        for piece_NT in event_token_ids_NT.split(TEXTS_PER_PIECE):
            text_len = int((piece_NT != self.pad_id).sum(dim=1).max())
            pieces.append(self(piece_NT[:, : max(text_len, 1)]))
        return torch.cat(pieces)


def build_event_encoder(
    config: EventEncoderConfig, vocab_size: int, *, pad_id: int, cls_id: int
) -> EventEncoder:
    """Load the directory `config.path`, or build a BERT for `vocab_size` tokens.

    Raises ConfigError when the directory holds no BERT-like encoder.
    """
    if config.path:
        return EventEncoder(load_text_encoder(Path(config.path), "event_encoder.path"), pad_id)
    bert = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_dim,
        max_position_embeddings=config.max_text_len,
        type_vocab_size=1,
        # The usual 0.02 suits width 768; at small widths texts would hardly move the CLS vector.
        initializer_range=config.hidden_dim**-0.5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad_id,
    )
    model = BertModel(bert, add_pooling_layer=False)
    _empty_cls(model, cls_id)
    return EventEncoder(model, pad_id)


def _empty_cls(model: BertModel, cls_id: int) -> None:
    """Start CLS from nothing, so that its vector is what it reads: else all texts look alike."""
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[cls_id] = 0
        model.embeddings.position_embeddings.weight[0] = 0
        model.embeddings.token_type_embeddings.weight[0] = 0


def load_text_encoder(
    path: Path, field: str, kinds: tuple[str, ...] = ("bert",)
) -> PreTrainedModel:
    """A text encoder from a local Hugging Face directory. Raises ConfigError at `field`."""
    if not (path / "config.json").is_file():
        raise ConfigError(
            field,
            str(path),
            "no config.json there",
            "give a Hugging Face model directory",
        )
    found = AutoConfig.from_pretrained(path, local_files_only=True)
    check_text_encoder(found, field.removesuffix(".path"), kinds)
    model: PreTrainedModel = AutoModel.from_pretrained(
        path, add_pooling_layer=False, local_files_only=True, dtype=torch.float32
    )
    return model
