"""`qanchor userqa`: questions and answers about users, by a language model or by rules."""

import argparse
from pathlib import Path

from qanchor.config import add_set_argument

_DESCRIPTION = """\
Writes UserU question-answering triples (D_uqa) of a data set's train users, in three steps per
user: pick the 10 topics the profile says most about, draft a question and an answer to each,
reflect: keep, revise or drop each answer. Labels and futures are never sent, nor are user ids.

Who writes:
  --model NAME [--base-url URL]   any OpenAI-compatible endpoint; the key is read from the
                                  environment (OPENAI_API_KEY, or endpoint.api_key_variable)
  neither                         the built-in rules of `qanchor data triples`: free, nothing
                                  leaves this machine, but the same few phrasings for everybody
OPENAI_BASE_URL and OPENAI_MODEL stand in for the two; --builtin passes over them.

The topic pool: `life`, 72 topics of everyday life, as many as Q-Anchor's. `--set pool=dataset`
takes the data set's own (62 for the simulated wallet, 85 for OULAD), another word a TOML file. The
built-in rules can only answer the data set's own.

OUT gets triples.parquet (for `qanchor pretrain --triples`), report.json (what reflection changed
and dropped, tokens, cost), config.json and replies.sqlite. Every reply is stored there before it
is used: run the same command again after a crash, a kill or a spent budget, and it goes on without
asking anything twice. --set budget.max_tokens=N or budget.max_cost=X (with prices) is a limit on
all runs in OUT together; raise it to go on.

Exit codes: 0 done; 2 wrong usage or input, or a key or model that the endpoint does not accept;
3 stopped before the end (budget spent or endpoint failing), the file holds the complete users;
130 interrupted."""

STOPPED = 3
INTERRUPTED = 130

_CLIENT_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor userqa`."""
    parser = subparsers.add_parser(
        "userqa",
        help="let a language model (or rules) ask and answer about users, to train on",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", type=Path, help="data set directory, see `qanchor data`")
    parser.add_argument("output", type=Path, metavar="OUT", help="new directory, or one to go on")
    parser.add_argument("--model", help="the language model's name at the endpoint")
    parser.add_argument("--base-url", metavar="URL", help="e.g. http://localhost:8000/v1")
    parser.add_argument("--builtin", action="store_true", help="use the rules, whatever is set")
    parser.add_argument(
        "--future",
        type=int,
        metavar="N",
        help="add N rule-made future triples per train user: complete material in one file",
    )
    parser.add_argument(
        "--with-valid",
        action="store_true",
        help="users of split valid too, to watch training by; pretrain refuses such a file",
    )
    parser.add_argument("--max-users", type=int, metavar="N", help="only the first N, to try")
    parser.add_argument("--config", type=Path, help="JSON or TOML; fields as in config.json")
    add_set_argument(parser, "--set endpoint.concurrency=4 --set budget.max_tokens=1000000")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Synthesise; the last line is the report."""
    import asyncio
    import logging
    import os
    import sys

    import msgspec

    from qanchor.config import load, override
    from qanchor.data.dataset import open_dataset
    from qanchor.userqa.config import UserQaConfig
    from qanchor.userqa.endpoint import find_address
    from qanchor.userqa.synthesis import synthesise

    logger = logging.getLogger(__name__)
    # A line per request would tear the progress bar, and debug lines hold whole profiles.
    for name in _CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    config = load(UserQaConfig, args.config) if args.config else UserQaConfig()
    config = override(config, [*args.assignments, *_shortcuts(args)])
    address = None if config.builtin else find_address(config.endpoint, os.environ)
    dataset = open_dataset(args.dataset)
    if address is None:
        logger.info("no endpoint: the built-in rules write the answers")
        if config.pool != "life":
            logger.warning("pool=%s has no effect: the rules have their own topics", config.pool)
    else:
        logger.info("profiles are sent to %s, model %s", address.base_url, address.model)
    try:
        report = asyncio.run(synthesise(dataset, args.output, config, address))
    except KeyboardInterrupt:
        print("qanchor: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    if report.num_users_refused:
        logger.warning("the endpoint refused %d users, see above", report.num_users_refused)
    if not report.is_complete:
        why = report.stopped_by or "endpoint"
        logger.warning(
            "stopped by %s, %d users left; run again to go on", why, report.num_users_unfinished
        )
    print(msgspec.json.encode({"output": str(args.output), **_fields(report)}).decode())
    return 0 if report.is_complete else STOPPED


def _shortcuts(args: argparse.Namespace) -> list[str]:
    """The flags as assignments; they win over --set."""
    import json

    flags = {
        "endpoint.model": args.model,
        "endpoint.base_url": args.base_url,
        "num_future": args.future,
        "max_users": args.max_users,
        "builtin": args.builtin or None,
        "with_valid": args.with_valid or None,
    }
    return [f"{path}={json.dumps(value)}" for path, value in flags.items() if value is not None]


def _fields(report: object) -> dict[str, object]:
    import msgspec

    fields: dict[str, object] = msgspec.to_builtins(report)
    return fields
