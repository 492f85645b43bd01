"""What an export starts from: a model with its tokens, as plain fields. Knows no ONNX."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from torch import nn

from qanchor.config import ProfileSchema, Scenario
from qanchor.data.prefix import PrefixTokens
from qanchor.towers import QAnchorModel

if TYPE_CHECKING:
    from qanchor.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class ExportSource:
    """A model and everything a bundle says about it."""

    model: QAnchorModel
    """In eval mode, float32, CPU; adapters of peft may be present, `merged` takes them in."""
    recipe: str
    schema: ProfileSchema
    tokens: PrefixTokens
    tokenizer: Tokenizer
    event_tokenizer: Tokenizer
    scenarios: tuple[Scenario, ...]
    max_query_len: int
    """Tokens of one suffix: query text, soft prompt and <USER_EMB>."""


def source_of(checkpoint: "Checkpoint") -> ExportSource:
    """The export source of a loaded checkpoint.

    A checkpoint counts query tokens only; <USER_EMB> and the longest soft prompt come on top.
    """
    meta = checkpoint.meta
    longest_prompt = max((len(s.soft_prompt) for s in meta.scenarios), default=0)
    return ExportSource(
        model=checkpoint.model,
        recipe=meta.recipe.name,
        schema=meta.profile_schema,
        tokens=meta.tokens,
        tokenizer=checkpoint.tokenizer,
        event_tokenizer=checkpoint.event_tokenizer,
        scenarios=meta.scenarios,
        max_query_len=meta.recipe.train.max_query_len + 1 + longest_prompt,
    )


def merged(module: nn.Module) -> nn.Module:
    """`module` with peft adapters taken into the weights: a copy if there are any, else itself."""
    if not hasattr(module, "merge_and_unload"):
        return module
    peft_model: Any = copy.deepcopy(module)
    plain: nn.Module = peft_model.merge_and_unload()
    return plain
