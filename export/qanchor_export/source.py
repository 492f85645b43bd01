"""What an export starts from: a model with its tokens, as plain fields. Knows no ONNX."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from torch import nn

from qanchor.bundle.scenario_file import ScenarioFile, check_fits, with_replaced
from qanchor.config import ProfileSchema, Scenario
from qanchor.data.prefix import PrefixTokens
from qanchor.encoder.query_encoder import QueryEncoder
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
    """Tokens of one suffix: query text or the rows in its place, soft prompt and <USER_EMB>."""
    checkpoint_id: str = ""
    """Content id of the checkpoint; empty for a model that came from none."""
    query_encoder: QueryEncoder | None = None
    """What reads questions before the model; None: the decoder does itself."""
    max_read_len: int = 0
    """Most tokens it reads of a question."""

    @property
    def hidden_dim(self) -> int:
        """Width of the decoder, and so of a soft-prompt row."""
        return int(self.model.language_model.config.hidden_size)

    @property
    def max_text_len(self) -> int:
        """Tokens a question may be read as.

        For the decoder what the longest soft prompt and <USER_EMB> leave of a suffix.
        """
        if self.query_encoder is not None:
            return self.max_read_len
        return self.max_query_len - 1 - _longest_prompt(self.scenarios)

    def encode_query(self, text: str) -> tuple[int, ...]:
        """Token ids a question is read as, by query encoder or decoder."""
        if self.query_encoder is not None:
            return self.query_encoder.tokens(text)
        templated = self.schema.query_template.format(query=text)
        return tuple(self.tokenizer.encode(templated, add_special_tokens=False).ids)


def source_of(checkpoint: "Checkpoint", tuned: ScenarioFile | None = None) -> ExportSource:
    """The export source of a loaded checkpoint; scenarios of `tuned` replace its own by name.

    A checkpoint counts query tokens only; <USER_EMB> and the longest soft prompt come on top.
    Raises ConfigError when `tuned` belongs to another checkpoint.
    """
    # Not at the top: random models are exported without transformers' checkpoints.
    from qanchor.checkpoint import checkpoint_id

    meta, content_id = checkpoint.meta, checkpoint_id(checkpoint)
    scenarios = meta.scenarios
    if tuned is not None:
        check_fits(tuned, content_id, checkpoint.hidden_dim)
        scenarios = with_replaced(scenarios, tuned.scenarios)
    return ExportSource(
        model=checkpoint.model,
        recipe=meta.recipe.name,
        schema=meta.profile_schema,
        tokens=meta.tokens,
        tokenizer=checkpoint.tokenizer,
        event_tokenizer=checkpoint.event_tokenizer,
        scenarios=scenarios,
        max_query_len=meta.recipe.max_query_positions + 1 + _longest_prompt(scenarios),
        checkpoint_id=content_id,
        query_encoder=checkpoint.query_encoder,
        max_read_len=meta.recipe.train.max_query_len,
    )


def _longest_prompt(scenarios: Iterable[Scenario]) -> int:
    return max((len(scenario.soft_prompt) for scenario in scenarios), default=0)


def merged(module: nn.Module) -> nn.Module:
    """`module` with peft adapters taken into the weights: a copy if there are any, else itself."""
    if not hasattr(module, "merge_and_unload"):
        return module
    peft_model: Any = copy.deepcopy(module)
    plain: nn.Module = peft_model.merge_and_unload()
    return plain
