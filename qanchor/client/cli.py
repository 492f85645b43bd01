"""The verbs that talk to a server: embed, ask, profile, scenarios. grpc is imported by the verb."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from qanchor import config
from qanchor.config import Config
from qanchor.data.profile import Event, Profile
from qanchor.errors import InvalidInput

if TYPE_CHECKING:
    from qanchor.client.sync import Client
    from qanchor.client.values import EmbedResult

T = TypeVar("T")

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_EMBED_HELP = """\
Embed a stored user under named scenarios. All of them run in one pass over the user's encoded
behaviour, so ten scenarios cost little more than one. The answer says what it rests on: model,
profile version, and whether the prefix was on the device or had to be encoded.

  qanchor embed --user u1 --scenario takeout --scenario fraud
"""
_ASK_HELP = """\
Embed a stored user under free text. Embeddings are compared with others of the same model, or
fed to a classifier; a scenario tuned for the question is usually better than free text.

  qanchor ask --user u1 "Will the user take out food next week?"
"""
_PROFILE_HELP = """\
Store, extend, inspect, warm or delete profiles. JSON comes from FILE or stdin:

  put     {"user_id": "u1", "as_of_s": 1767225600,
           "events": [{"time_s": 1767139200, "modality": "app", "event_type": "open",
                       "text": "maps", "value": 1}],
           "attributes": {"age_group": "30-39", "is_member": true}}
  append  {"user_id": "u1", "events": [...], "append_id": "batch-17"}

Times are Unix seconds. What is acknowledged is on disk. An append_id makes a repeat harmless.
"""
_SCENARIOS_HELP = """\
  list    what the server knows, with versions (default)
  reload  have it read its --scenarios file or directory again: all of it, or nothing if anything is
          wrong. A changed scenario needs a higher version. Requests go on meanwhile.
"""


class EventInput(Config, frozen=True, kw_only=True):
    """One event in JSON."""

    time_s: int
    """Unix seconds."""
    modality: str
    event_type: str = ""
    text: str = ""
    value: float | None = None


class ProfileInput(Config, frozen=True, kw_only=True):
    """A profile in JSON."""

    user_id: str
    as_of_s: int | None = None
    """Unix seconds; absent: now."""
    events: tuple[EventInput, ...] = ()
    attributes: dict[str, str | float | bool] = msgspec.field(default_factory=dict)


class AppendInput(Config, frozen=True, kw_only=True):
    """Events to add, in JSON."""

    user_id: str
    events: tuple[EventInput, ...] = ()
    as_of_s: int | None = None
    """Unix seconds; absent: the newest event, or what is stored."""
    append_id: str = ""
    """Stored once under this id."""


def add_parser(subparsers: Any) -> None:
    """Add the client's verbs."""
    embed = _verb(subparsers, "embed", "embed a user under scenarios", _EMBED_HELP, _embed)
    _user(embed)
    embed.add_argument(
        "--scenario", action="append", required=True, metavar="NAME", help="repeat for several"
    )
    ask = _verb(subparsers, "ask", "embed a user under free text", _ASK_HELP, _ask)
    _user(ask)
    ask.add_argument("query", nargs="+", help="the question; quote each one")
    profile = subparsers.add_parser(
        "profile",
        help="store and inspect profiles",
        description=_PROFILE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = profile.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text, act in (
        ("put", "store a profile in place of the old one", _put),
        ("append", "add events to a stored profile", _append),
    ):
        parser = _verb(actions, name, text, _PROFILE_HELP, act)
        parser.add_argument("file", nargs="?", type=Path, help="JSON file; absent: stdin")
    for name, text, act in (
        ("state", "what is stored and whether it is encoded", _state),
        ("delete", "delete the user everywhere", _delete),
    ):
        _user(_verb(actions, name, text, text, act))
    text = "bring the prefix to the device now, so that the next query is quick"
    warm = _verb(actions, "warm", text, text, _warm)
    _user(warm)
    warm.add_argument(
        "--pin-seconds",
        type=int,
        default=0,
        help="keep it there so long; other users are evicted in its place (default 0)",
    )
    scenarios = _verb(
        subparsers,
        "scenarios",
        "list a server's scenarios, or have it read its scenario files again",
        _SCENARIOS_HELP,
        _scenarios,
    )
    scenarios.add_argument("action", nargs="?", choices=("list", "reload"), default="list")


def _verb(
    subparsers: Any,
    name: str,
    summary: str,
    description: str,
    act: "Callable[[Client, argparse.Namespace], Any]",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--address", default=_DEFAULT_ADDRESS, help=f"server (default {_DEFAULT_ADDRESS})"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="deadline of the call in seconds (default 10)"
    )
    parser.set_defaults(run=lambda args: _run(args, act))
    return parser


def _user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="ID", help="user id")


def _run(args: argparse.Namespace, act: "Callable[[Client, argparse.Namespace], Any]") -> int:
    """Call the server and print the answer as JSON; 1 when the call fails."""
    from qanchor.client.errors import ClientError
    from qanchor.client.sync import Client

    try:
        with Client(args.address, timeout_s=args.timeout) as client:
            answer = act(client, args)
    except ClientError as error:
        print(f"qanchor: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


def _embed(client: "Client", args: argparse.Namespace) -> Any:
    result = client.embed(args.user, scenarios=args.scenario)
    return _shown(result, [{"scenario": name} for name in args.scenario])


def _ask(client: "Client", args: argparse.Namespace) -> Any:
    result = client.embed(args.user, queries=args.query)
    return _shown(result, [{"query": query} for query in args.query])


def _put(client: "Client", args: argparse.Namespace) -> Any:
    given = _read(args.file, ProfileInput)
    as_of_s = int(time.time()) if given.as_of_s is None else given.as_of_s
    profile = Profile(
        user_id=given.user_id,
        as_of_s=as_of_s,
        events=_events(given.events),
        attributes=given.attributes,
    )
    return asdict(client.put_profile(profile))


def _append(client: "Client", args: argparse.Namespace) -> Any:
    given = _read(args.file, AppendInput)
    result = client.append_events(
        given.user_id, _events(given.events), as_of_s=given.as_of_s, append_id=given.append_id
    )
    return asdict(result)


def _state(client: "Client", args: argparse.Namespace) -> Any:
    return _plain(client.profile_state(args.user))


def _warm(client: "Client", args: argparse.Namespace) -> Any:
    return _plain(client.warm_profile(args.user, pin_seconds=args.pin_seconds))


def _delete(client: "Client", args: argparse.Namespace) -> Any:
    return {"was_stored": client.delete_profile(args.user)}


def _scenarios(client: "Client", args: argparse.Namespace) -> Any:
    if args.action == "reload":
        return asdict(client.reload_scenarios())
    return [asdict(scenario) for scenario in client.list_scenarios()]


def _read(file: Path | None, kind: type[T]) -> T:
    if file is not None:
        return config.load(kind, file)
    try:
        data = json.load(sys.stdin)
    except ValueError as error:
        raise InvalidInput("stdin", "", f"is no JSON: {error}", "see --help") from None
    return config.from_mapping(kind, data, "stdin")


def _events(given: tuple[EventInput, ...]) -> tuple[Event, ...]:
    return tuple(
        Event(
            time_s=event.time_s,
            modality=event.modality,
            event_type=event.event_type,
            text=event.text,
            value=event.value,
        )
        for event in given
    )


def _shown(result: "EmbedResult", asked: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "results": [
            {**query, "vector": vector.tolist()}
            for query, vector in zip(asked, result.vectors, strict=True)
        ],
        "provenance": _plain(result.provenance),
    }


def _plain(value: Any) -> dict[str, Any]:
    fields = asdict(value)
    return {**fields, "cache_state": fields["cache_state"].name}
