"""Configuration types shared by training, export and serving, and how they are read. Torch-free.

Every type is a frozen struct: an unknown key or a wrong type is a `ConfigError` that names the
nearest valid key. `save` writes the resolved form beside every checkpoint, bundle and result.
"""

import argparse
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from qanchor.errors import ConfigError

T = TypeVar("T")

MAX_MEASURED_TYPES = 8

_EVENT_FIELDS = {"days_ago": 1, "text": "", "event_type": "", "value": ""}
_PERIOD_FIELDS = {
    "days_ago": 1, "weeks_ago": 0, "num_days": 1, "items": "", "num_events": "", "text": ""
}  # fmt: skip
_ITEM_FIELDS = {"event_type": "", "num_events": "", "total_value": ""}
_SUMMARY_FIELDS = {
    "num_events": "", "num_days": 1, "num_days_7": 1, "num_days_30": 1, "days_since_last": 1,
    "total_value": "", "mean_value": "",
}  # fmt: skip
_MAX_NAME_CHARS = 256


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all configuration structs; each says `frozen=True, kw_only=True` itself."""


class ModalitySpec(Config, frozen=True, kw_only=True):
    """One modality: what is kept of a user and how it is put into words. A row, never a class."""

    name: str
    """Lower-case identifier; also names the special tokens <|name_start|> and <|name_end|>."""
    kind: Literal["events", "attributes"] = "events"
    """`events`: time-stamped behaviour. `attributes`: one text per tabular attribute."""
    max_events: int
    """Newest events (or first attributes) kept per user; one prefix position each."""
    max_event_tokens: int
    """Tokens kept per event text, the encoder's own special tokens included."""
    group_by: Literal["none", "day", "week"] = "none"
    """`day` or `week` joins the events of this modality in one such period, counted back from the
    as-of time, into one text, one item per event type."""
    template: str = "{days_ago} days ago: {text}"
    """Event text. Fields: days_ago, text, event_type, value; by period: days_ago (of the newest
    event), weeks_ago, num_days (with an event), items, num_events."""
    item_template: str = "{event_type} {num_events}x {total_value}"
    """One event type within a grouped day. Fields: event_type, num_events, total_value."""
    summary_template: str = ""
    """Text that opens the modality's block and counts as one of its max_events: the whole window in
    one line, what the limit cuts off included; no events, no summary; empty switches it off.
    Fields: num_events, num_days (days with an event), num_days_7, num_days_30, days_since_last,
    total_value, mean_value ("unknown" where no event has a value)."""
    measured_types: tuple[str, ...] = ()
    """Event types whose amounts get a number of their own where the schema has measures; at most
    MAX_MEASURED_TYPES."""

    def __post_init__(self) -> None:
        if self.kind == "events":
            fields = _EVENT_FIELDS if self.group_by == "none" else _PERIOD_FIELDS
            _check_template(f"{self.name}.template", self.template, fields)
            _check_template(f"{self.name}.item_template", self.item_template, _ITEM_FIELDS)
            _check_template(f"{self.name}.summary_template", self.summary_template, _SUMMARY_FIELDS)
        if len(self.measured_types) > MAX_MEASURED_TYPES:
            raise ConfigError(
                f"{self.name}.measured_types",
                self.measured_types,
                f"at most {MAX_MEASURED_TYPES} event types; these are {len(self.measured_types)}",
                "name those that matter most",
            )


class ProfileSchema(Config, frozen=True, kw_only=True):
    """What a user profile of one data set looks like and how it becomes a prefix."""

    modalities: tuple[ModalitySpec, ...]
    """In prefix order."""
    window_days: int = 90
    """Events older than this at the as-of time are outside the rolling window."""
    header: str = "The recent behaviour of one user:"
    """Instruction text that opens every prefix."""
    query_template: str = "Query: {query}"
    """Suffix text before the soft prompt and <USER_EMB>. Empty: no query is ever said, whatever is
    asked; the suffix is <USER_EMB> alone, in training as in serving (a user-only model)."""
    has_user_token: bool = True
    """False leaves z_usr of Q-Anchor Eq. (2) out of every prefix."""
    has_modality_tokens: bool = True
    """False leaves all z_m of Q-Anchor Eq. (2) out of every prefix."""
    has_measures: bool = False
    """Numbers stand beside each event vector: time since the event, counts, values (see
    qanchor.data.measures). Not in the paper."""

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.modalities]
        for name in names:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
                raise ConfigError(
                    "modalities.name", name, "must match [a-z][a-z0-9_]{0,31}", "rename it"
                )
        if len(set(names)) != len(names):
            raise ConfigError("modalities", names, "names must be unique", "rename one")
        if self.query_template and "{query}" not in self.query_template:
            raise ConfigError(
                "query_template",
                self.query_template,
                "must contain {query}, or be empty for a model without queries",
                "add it",
            )
        _check_template("query_template", self.query_template, {"query": ""})

    def modality_index(self, name: str) -> int:
        """Position of a modality in prefix order. Raises ConfigError for an unknown name."""
        names = [spec.name for spec in self.modalities]
        if name not in names:
            raise ConfigError(
                "modality", name, f"must be one of {', '.join(names)}", nearest(name, names)
            )
        return names.index(name)


class Scenario(Config, frozen=True, kw_only=True):
    """A named, versioned query."""

    name: str
    """Stable identifier used on the wire."""
    question: str
    """The query text."""
    version: int = 1
    """Rises with every change of question, soft prompt or prototypes."""
    domain: str = ""
    """Free grouping label, for people."""
    definition: str = ""
    """How its label is computed, for people."""
    soft_prompt: tuple[tuple[float, ...], ...] = ()
    """Learnt suffix rows [num_prompt_rows, hidden_dim], between the query and <USER_EMB>."""
    prototypes: tuple[tuple[float, ...], ...] = ()
    """Learnt unit vectors [num_classes, embedding_dim], row k for label k: the embedding's dot
    product with row k says how much it looks like class k, Q-Anchor Eq. (7)."""
    is_compiled: bool = False
    """The soft prompt stands for the question: no text tokens are sent, the suffix is the soft
    prompt and <USER_EMB>. The question is kept for people."""

    def __post_init__(self) -> None:
        if self.is_compiled and not self.soft_prompt:
            raise ConfigError(
                f"{self.name}.is_compiled",
                True,
                "a compiled scenario needs a soft prompt: it sends no text",
                "make it with `qanchor compile`",
            )
        for field, rows in (("soft_prompt", self.soft_prompt), ("prototypes", self.prototypes)):
            widths = sorted({len(row) for row in rows})
            if len(widths) > 1:
                raise ConfigError(
                    f"{self.name}.{field}", widths, "rows must be of one width", "make it again"
                )


def _check_template(field: str, template: str, fields: Mapping[str, object]) -> None:
    """Raise ConfigError unless `template` can be filled in with values like those of `fields`."""
    try:
        template.format(**fields)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        rule = f"may have fields in braces, of these only: {', '.join(fields)}"
        raise ConfigError(field, template, rule, f"correct it ({error})") from None


def nearest(name: str, valid: list[str]) -> str:
    """Remedy text that names the valid spelling closest to `name`."""
    # Cut: a caller may send megabytes for a name, and comparing takes time for each character.
    close = difflib.get_close_matches(name[:_MAX_NAME_CHARS], valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def from_mapping(kind: type[T], data: Any, where: str = "config", shown: Any = None) -> T:
    """Build a config struct from plain data. Raises ConfigError naming path, rule and remedy.

    `shown`: what an error gives as the wrong value, in place of all the data.
    """
    try:
        return msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            cause = error.__cause__
            raise ConfigError(
                f"{where}: {cause.field}", cause.value, cause.rule, cause.remedy
            ) from None
        message = str(error)
        unknown = re.search(r"unknown field `([^`]+)`", message)
        remedy = "see the field's docstring"
        if unknown:
            remedy = nearest(unknown.group(1), _all_field_names(kind))
        raise ConfigError(where, shown or data, message, remedy) from None


def load(kind: type[T], path: Path) -> T:
    """Read a JSON or TOML file (by suffix) into `kind`. Raises ConfigError."""
    raw = path.read_bytes()
    try:
        data = msgspec.toml.decode(raw) if path.suffix == ".toml" else msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise ConfigError(
            str(path), raw[:40], f"not readable: {error}", "repair the file"
        ) from None
    return from_mapping(kind, data, str(path))


def to_json(value: Any) -> bytes:
    """Indented JSON of a struct or plain data, keys in declaration order."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def save(value: Any, path: Path) -> None:
    """Write `to_json(value)` to `path`."""
    path.write_bytes(to_json(value))


def add_set_argument(parser: argparse.ArgumentParser, examples: str) -> None:
    """Add `--set PATH=VALUE`, repeatable; `args.assignments` is then what `override` takes."""
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help=f"override a field, e.g. {examples}",
    )


def override(config: T, assignments: list[str]) -> T:
    """Apply `a.b=value` assignments (values in JSON, bare words are strings) to a config.

    Raises ConfigError for a path that does not exist or a value of the wrong type.
    """
    data = msgspec.to_builtins(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError("--set", assignment, "must be path=value", "e.g. train.steps=100")
        *parents, leaf = path.split(".")
        node = data
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                raise ConfigError("--set", path, "no such section", nearest(parent, list(node)))
            node = node[parent]
        try:
            node[leaf] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            node[leaf] = text
    return from_mapping(type(config), data, "--set", shown=" ".join(assignments))


def _all_field_names(kind: Any) -> list[str]:
    names: set[str] = set()
    pending, seen = [kind], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        pending.extend(getattr(current, "__args__", ()))
        if isinstance(current, type) and issubclass(current, msgspec.Struct):
            for field in msgspec.structs.fields(current):
                names.add(field.encode_name)
                pending.append(field.type)
    return sorted(names)
