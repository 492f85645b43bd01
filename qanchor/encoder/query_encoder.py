"""A question as rows of a suffix: read by a frozen pre-trained sentence encoder, then mapped.

Not in the paper, whose decoder has read before it is trained and reads the question itself. A
decoder trained from scratch knows the words of its training questions only; here a sentence encoder
that has read stands before it, and what is learnt is which of its states to look at and a linear
map of them: in a mean over all words the one that turns a question round ("no visits", "fewer than
five days") hardly counts.

A token's state joins those of a middle and of the last layer. The last says best what a text is
about, to which such encoders are trained; which way it is put the middle says better.

Legend: N texts, T tokens per text, J tokens of all texts, R rows per question, E width of a state
(twice the encoder's), H heads, K head_dim, D decoder width.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from qanchor.backbone_maths import QUERY_ENCODERS, num_text_positions
from qanchor.bundle.packing import FloatArray, SuffixQuery
from qanchor.config import Config
from qanchor.encoder.event_encoder import load_text_encoder
from qanchor.errors import ConfigError
from qanchor.tokenization import load_tokenizer

TEXTS_PER_PIECE = 64
_TOKENIZER_FILE = "tokenizer.json"
_LEAST_SPREAD = 0.1
"""Of the mean spread."""


class QueryEncoderConfig(Config, frozen=True, kw_only=True):
    """What reads a question in the decoder's place."""

    path: str = ""
    """Hugging Face directory of a sentence encoder, such as all-MiniLM-L6-v2; it stays as it is.
    Empty: the decoder reads the question's text itself, in the schema's template."""
    num_rows: int = 2
    """Suffix positions a question takes, whatever its length."""
    num_heads: int = 16
    """Ways to look at the tokens of a question, each a weighted mean of its states."""
    head_dim: int = 64
    """Numbers kept of each."""
    dropout: float = 0.15
    """Share of the encoder's numbers left out of a training step: there are many to tell the
    questions of a training apart by, and most say nothing of what is asked."""
    cache: str = ""
    """Directory for what the encoder has read of a run's questions, 30 to 70 KB of each, so that
    other runs on the same triples need not read them. Empty: in the run directory until the run
    ends; shards keep their own."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"query_encoder.{name}", getattr(self, name), "must be at least 1", "e.g. 2"
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                "query_encoder.dropout", self.dropout, "must be in [0, 1)", "e.g. 0.3"
            )


@dataclass(frozen=True, slots=True)
class QueryEncoder:
    """A frozen sentence encoder with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Tokenizer

    @property
    def state_dim(self) -> int:
        """Width E of a token's state."""
        return 2 * int(self.model.config.hidden_size)

    @property
    def num_positions(self) -> int:
        """Most tokens of a text, the tokenizer's own included."""
        return num_text_positions(self.model.config)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a question as it stands, closed by the tokenizer's own."""
        return tuple(self.tokenizer.encode(text).ids)

    @property
    def digest(self) -> str:
        """Content id, 64 hex digits, of what the states of given tokens hang on: the weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.inference_mode()
    def states(
        self, token_ids: Sequence[Sequence[int]], into_JE: npt.NDArray[Any] | None = None
    ) -> list[FloatArray]:
        """States of each text's tokens, two layers side by side, [T, E] each.

        They stand one text's below another's, in `into_JE` where it is given, else in float32.
        """
        lens = [len(of_text) for of_text in token_ids]
        if into_JE is None:
            into_JE = np.empty((sum(lens), self.state_dim), np.float32)
        found = texts_apart(into_JE, lens)
        by_length = sorted(range(len(lens)), key=lens.__getitem__)
        pieces = range(0, len(by_length), TEXTS_PER_PIECE)
        # One text is a caller who waits, many are a training run that starts.
        for start in tqdm(pieces, desc="reading questions", disable=len(pieces) < 2):
            rows = by_length[start : start + TEXTS_PER_PIECE]
            ids_NT = nn.utils.rnn.pad_sequence(
                [torch.tensor(token_ids[row]) for row in rows], batch_first=True
            )
            len_N = torch.tensor([lens[row] for row in rows])
            mask_NT = (torch.arange(ids_NT.shape[1]) < len_N[:, None]).long()
            states = self.model(
                input_ids=ids_NT, attention_mask=mask_NT, output_hidden_states=True
            ).hidden_states
            states_NTE = torch.cat([states[layer] for layer in read_layers(self.model)], dim=-1)
            for row, states_TE in zip(rows, states_NTE.numpy(), strict=True):
                found[row][:] = states_TE[: lens[row]]
        return found

    def save(self, directory: Path) -> None:
        """Write a Hugging Face directory that `load_query_encoder` reads."""
        self.model.save_pretrained(directory)
        self.tokenizer.save(str(directory / _TOKENIZER_FILE))


def texts_apart(states_JE: npt.NDArray[Any], lens: Sequence[int]) -> list[FloatArray]:
    """The states of each text, of those of texts of these lengths one below another."""
    return np.split(states_JE, np.cumsum(lens)[:-1]) if lens else []


def read_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of the middle and the last layer, from 1; 0 is the embeddings."""
    num_layers = int(model.config.num_hidden_layers)
    return num_layers // 2, num_layers


class QueryMap(nn.Module):
    """States of questions to the rows that stand for them in a suffix: the part that is trained.

    Each head takes a mean of a question's states, weighted by a softmax over its tokens, and keeps
    K numbers of it; the rows are linear in those of all heads. States of one data set's questions
    share most of their direction, so their mean is taken off first.
    """

    mean_E: Tensor
    spread_E: Tensor

    def __init__(self, state_dim: int, hidden_dim: int, config: QueryEncoderConfig) -> None:
        super().__init__()
        num_heads, head_dim = config.num_heads, config.head_dim
        self.register_buffer("mean_E", torch.zeros(state_dim))
        self.register_buffer("spread_E", torch.ones(state_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.look_EH = nn.Parameter(torch.empty(state_dim, num_heads))
        self.keep_HEK = nn.Parameter(torch.empty(num_heads, state_dim, head_dim))
        for weights in (self.look_EH, self.keep_HEK):
            nn.init.normal_(weights, std=state_dim**-0.5 / math.sqrt(3))
        self.rows = nn.ModuleList(
            nn.Linear(num_heads * head_dim, hidden_dim) for _ in range(config.num_rows)
        )

    def set_scale(self, states: Sequence[FloatArray]) -> None:
        """Have each number of a token's state come out with mean 0 and spread 1 in training."""
        states_TE = np.concatenate(states).astype(np.float32)
        spread_E = states_TE.std(axis=0)
        # What hardly differs between texts tells nothing, and must not be blown up.
        least = _LEAST_SPREAD * float(spread_E.mean()) or 1.0
        self.mean_E.copy_(torch.from_numpy(states_TE.mean(axis=0)))
        self.spread_E.copy_(torch.from_numpy(spread_E.clip(min=least)))

    def forward(self, states_NTE: Tensor, len_N: Tensor) -> Tensor:
        """States [N, T, E], padded behind each text's length, to rows [N, R, D]."""
        # One draw for all tokens of a question, or what one lacks another would tell.
        kept_NE = self.dropout(torch.ones_like(states_NTE[:, 0]))
        # The mean is the same for all tokens: a softmax over them does not see it.
        look_NEH = (kept_NE / self.spread_E)[..., None] * self.look_EH
        is_padding_NT = torch.arange(states_NTE.shape[1], device=len_N.device) >= len_N[:, None]
        scores_NTH = (states_NTE @ look_NEH).masked_fill(is_padding_NT[..., None], -torch.inf)
        pooled_NHE = torch.softmax(scores_NTH, dim=1).transpose(1, 2) @ states_NTE
        centred_NHE = (pooled_NHE - self.mean_E) / self.spread_E * kept_NE[:, None]
        numbers_NHK = torch.einsum("nhe,hek->nhk", centred_NHE, self.keep_HEK)
        numbers_NJ = self.dropout(numbers_NHK.flatten(start_dim=1))
        return torch.stack([row(numbers_NJ) for row in self.rows], dim=1)


@torch.inference_mode()
def read_query(encoder: QueryEncoder, query_map: QueryMap, token_ids: Sequence[int]) -> SuffixQuery:
    """The suffix of a question of these tokens: rows [R, D] (float32) alone, without dropout."""
    device = query_map.mean_E.device
    (states_TE,) = encoder.states([token_ids])
    len_N = torch.tensor([len(states_TE)], device=device)
    (rows_RD,) = query_map.eval()(torch.from_numpy(states_TE)[None].to(device), len_N)
    return SuffixQuery((), rows_RD.float().cpu().numpy())


def load_query_encoder(directory: Path) -> QueryEncoder:
    """A sentence encoder of a Hugging Face directory, for reading alone. Raises ConfigError."""
    field = "query_encoder.path"
    model = (
        load_text_encoder(directory, field, QUERY_ENCODERS)
        .eval()
        .requires_grad_(requires_grad=False)
    )
    return QueryEncoder(model, load_tokenizer(directory, field))
