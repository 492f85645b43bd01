"""A question as rows of a suffix: read by a frozen pre-trained sentence encoder, mapped linearly.

Not in the paper, whose decoder has read before it is trained and reads the question itself. A
decoder trained from scratch knows the words of its training questions only; here a sentence encoder
that has read stands before it, and what is learnt is a linear map of the encoder's vectors.

The vector joins the means of a middle and of the last layer. The last says best what a text is
about, to which such encoders are trained; which way it is put ("no visits") the middle says better.

Legend: N texts, T tokens per text, R rows per question, H width of the encoder, E = 2 H, D decoder
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from qanchor.bundle.packing import FloatArray, SuffixQuery
from qanchor.config import Config
from qanchor.encoder.event_encoder import load_text_encoder
from qanchor.errors import ConfigError
from qanchor.tokenization import load_tokenizer

TEXTS_PER_PIECE = 64
_TOKENIZER_FILE = "tokenizer.json"


class QueryEncoderConfig(Config, frozen=True, kw_only=True):
    """What reads a question in the decoder's place."""

    path: str = ""
    """Hugging Face directory of a sentence encoder, such as all-MiniLM-L6-v2; it stays as it is.
    Empty: the decoder reads the question's text itself, in the schema's template."""
    num_rows: int = 2
    """Suffix positions a question takes, whatever its length."""
    dropout: float = 0.3
    """Share of the encoder's numbers left out of a training step: there are many to tell the few
    thousand questions of a training apart by, and most say nothing of what is asked."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(
                "query_encoder.num_rows", self.num_rows, "must be at least 1", "e.g. 2"
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
    def vector_dim(self) -> int:
        """Width E of its vectors."""
        return 2 * int(self.model.config.hidden_size)

    @property
    def num_positions(self) -> int:
        """Most tokens of a text, the tokenizer's own included."""
        return int(self.model.config.max_position_embeddings)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of a question as it stands, closed by the tokenizer's own."""
        return tuple(self.tokenizer.encode(text).ids)

    @torch.inference_mode()
    def vectors(self, token_ids: Sequence[Sequence[int]]) -> FloatArray:
        """Mean of each text's states, two layers side by side, each of length 1, [N, E]."""
        found = np.empty((len(token_ids), self.vector_dim), dtype=np.float32)
        by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
        pieces = range(0, len(by_length), TEXTS_PER_PIECE)
        # One text is a caller who waits, many are a training run that starts.
        for start in tqdm(pieces, desc="reading questions", disable=len(pieces) < 2):
            rows = by_length[start : start + TEXTS_PER_PIECE]
            ids_NT = nn.utils.rnn.pad_sequence(
                [torch.tensor(token_ids[row]) for row in rows], batch_first=True
            )
            len_N = torch.tensor([len(token_ids[row]) for row in rows])
            mask_NT = (torch.arange(ids_NT.shape[1]) < len_N[:, None]).long()
            states = self.model(
                input_ids=ids_NT, attention_mask=mask_NT, output_hidden_states=True
            ).hidden_states
            means = [
                (states[layer] * mask_NT[..., None]).sum(dim=1) / len_N[:, None]
                for layer in read_layers(self.model)
            ]
            found[rows] = torch.cat(
                [functional.normalize(mean_NH, dim=-1) for mean_NH in means], dim=-1
            ).numpy()
        return found

    def save(self, directory: Path) -> None:
        """Write a Hugging Face directory that `load_query_encoder` reads."""
        self.model.save_pretrained(directory)
        self.tokenizer.save(str(directory / _TOKENIZER_FILE))


def read_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of the middle and the last layer, from 1; 0 is the embeddings."""
    num_layers = int(model.config.num_hidden_layers)
    return num_layers // 2, num_layers


class QueryMap(nn.Module):
    """Vectors of questions to the rows that stand for them in a suffix: the part that is trained.

    Questions of one data set share most of their direction, so their mean is taken off first.
    """

    mean_E: Tensor
    scale: Tensor

    def __init__(self, vector_dim: int, hidden_dim: int, config: QueryEncoderConfig) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(vector_dim))
        self.register_buffer("scale", torch.ones(()))
        self.dropout = nn.Dropout(config.dropout)
        self.rows = nn.ModuleList(nn.Linear(vector_dim, hidden_dim) for _ in range(config.num_rows))

    def set_scale(self, vectors_NE: FloatArray) -> None:
        """Have the questions of training come out with mean 0 and spread 1."""
        self.mean_E.copy_(torch.from_numpy(vectors_NE.mean(axis=0)))
        spread = float((vectors_NE - vectors_NE.mean(axis=0)).std())
        # A single question has none.
        self.scale.fill_(spread or 1.0)

    def forward(self, vectors_NE: Tensor) -> Tensor:
        """[N, E] to rows [N, R, D]."""
        scaled_NE = self.dropout((vectors_NE - self.mean_E) / self.scale)
        return torch.stack([row(scaled_NE) for row in self.rows], dim=1)


@torch.inference_mode()
def read_query(encoder: QueryEncoder, query_map: QueryMap, token_ids: Sequence[int]) -> SuffixQuery:
    """The suffix of a question of these tokens: rows [R, D] (float32) alone, without dropout."""
    vectors_NE = torch.from_numpy(encoder.vectors([token_ids])).to(query_map.mean_E.device)
    (rows_RD,) = query_map.eval()(vectors_NE)
    return SuffixQuery((), rows_RD.float().cpu().numpy())


def load_query_encoder(directory: Path) -> QueryEncoder:
    """A sentence encoder of a Hugging Face directory, for reading alone. Raises ConfigError."""
    field = "query_encoder.path"
    model = load_text_encoder(directory, field).eval().requires_grad_(requires_grad=False)
    return QueryEncoder(model, load_tokenizer(directory, field))
