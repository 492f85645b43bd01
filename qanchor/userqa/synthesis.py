"""The synthesis of a whole data set: users in, triples.parquet and a report out.

Users are worked on side by side and written in ascending order, so that the file does not depend
on which reply came first. Where the run stops early, it holds the users that are complete.
"""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from msgspec import structs
from tqdm import tqdm

from qanchor.config import save
from qanchor.data.dataset import Dataset
from qanchor.data.useru import TRIPLE_COLUMNS, Triple, TripleOptions, make_triples
from qanchor.data.writer import TableWriter
from qanchor.userqa.asking import Asking
from qanchor.userqa.author import Author, QaUser
from qanchor.userqa.budget import Budget
from qanchor.userqa.builtin import BuiltinAuthor
from qanchor.userqa.config import UserQaConfig
from qanchor.userqa.endpoint import Address, Endpoint
from qanchor.userqa.language_model import LanguageModelAuthor
from qanchor.userqa.outcomes import Refused, Report, Tally, Unfinished
from qanchor.userqa.pool import load_pool
from qanchor.userqa.store import ReplyStore

TRIPLES_FILE = "triples.parquet"
REPLIES_FILE = "replies.sqlite"
REPORT_FILE = "report.json"
CONFIG_FILE = "config.json"

_SCHEMA = pa.schema([(name, pa.string()) for name in TRIPLE_COLUMNS])
_CHUNK_TRIPLES = 1 << 13
_USERS_AT_ONCE = 4
"""Per request on the way: a user that waits for a slow reply must not hold up the others."""

S = TypeVar("S")
T = TypeVar("T")


async def synthesise(
    dataset: Dataset, output: Path, config: UserQaConfig, address: Address | None
) -> Report:
    """Write OUTPUT/triples.parquet and its report; without an address the rules are the author.

    Raises ConfigError for a key or model the endpoint does not accept, and then leaves an earlier
    triples.parquet as it was; replies that came before are in the store.
    """
    output.mkdir(parents=True, exist_ok=True)
    tally, started = Tally(), time.monotonic()
    if address is None:
        save(config, output / CONFIG_FILE)
        builtin = BuiltinAuthor(dataset, config.num_topics, config.seed)
        run = _Run(dataset, config, builtin, tally)
        counts = await run.write(output / TRIPLES_FILE)
        size, budget, stopped_by = len(builtin.pool.topics), Budget(config.budget, 0, 0), ""
    else:
        pool, store = load_pool(config.pool, dataset), ReplyStore(output / REPLIES_FILE)
        budget = Budget(config.budget, *store.tokens())
        try:
            # Not before the store has let this run in: another one may be at work here.
            save(_resolved(config, address), output / CONFIG_FILE)
            async with aclosing(Endpoint(address, config.endpoint)) as endpoint:
                asking = Asking(endpoint, store, budget, tally, config.endpoint)
                model = LanguageModelAuthor(asking, pool, dataset.schema, config)
                run = _Run(dataset, config, model, tally, budget)
                counts = await run.write(output / TRIPLES_FILE)
        finally:
            store.close()
        size, stopped_by = len(pool.topics), asking.stopped_by
    report = Report(
        **asdict(tally),
        dataset=dataset.name,
        author=address.model if address else "builtin",
        num_pool_topics=size,
        num_uqa=counts["uqa"],
        num_future=counts["future"],
        num_tokens_in=budget.num_tokens_in,
        num_tokens_out=budget.num_tokens_out,
        cost=round(budget.cost, 6),
        stopped_by=stopped_by,
        seconds=round(time.monotonic() - started, 1),
    )
    save(report, output / REPORT_FILE)
    return report


def history_only(dataset: Dataset, user_ids: list[str]) -> Iterator[QaUser]:
    """Stream users; an event at or after the as-of moment is left out, wherever it comes from."""
    for profile in dataset.profiles(user_ids):
        events = tuple(event for event in profile.events if event.time_s < profile.as_of_s)
        yield QaUser(profile.user_id, replace(profile, events=events))


async def answer_user(user: QaUser, author: Author, tally: Tally) -> list[Triple]:
    """Pick, draft, reflect: one user's triples, in the order of its topics."""
    topics = await author.pick(user)
    tally.num_topics_picked += len(topics)
    if not topics:
        return []
    drafts = await author.draft(user, topics)
    drafted = [drafts[topic] for topic in topics if topic in drafts]
    tally.num_drafted += len(drafted)
    tally.num_draft_missing += len(topics) - len(drafted)
    if not drafted:
        return []
    verdicts = await author.reflect(user, drafted)
    triples = []
    for draft in drafted:
        verdict = verdicts.get(draft.topic)
        answer = draft.answer
        if verdict is None:
            tally.num_verdict_missing += 1
            continue
        if verdict.verdict == "drop":
            tally.num_dropped += 1
            continue
        if verdict.verdict == "revise" and verdict.answer != draft.answer:
            answer = verdict.answer
            tally.num_revised += 1
        else:
            tally.num_kept += 1
        triples.append(Triple(user.user_id, "uqa", draft.topic, draft.query, answer))
    return triples


async def in_order(
    items: Iterable[S], work: Callable[[S], Coroutine[Any, Any, T]], num_at_once: int
) -> AsyncGenerator[T, None]:
    """Work on up to `num_at_once` items side by side; yield results in the items' order.

    The first error of any item ends it, and what is under way is cancelled.
    """
    pending: deque[asyncio.Task[T]] = deque()
    failed: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def note_failure(task: asyncio.Task[T]) -> None:
        if not (task.cancelled() or failed.done()) and (error := task.exception()):
            failed.set_exception(error)

    async def oldest() -> T:
        await asyncio.wait((pending[0], failed), return_when=asyncio.FIRST_COMPLETED)
        return failed.result() if failed.done() else pending.popleft().result()

    try:
        for item in items:
            pending.append(asyncio.create_task(work(item)))
            pending[-1].add_done_callback(note_failure)
            if len(pending) >= num_at_once:
                yield await oldest()
        while pending:
            yield await oldest()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if not failed.cancel():
            failed.exception()  # Marks it as seen, or asyncio would complain of it.


@dataclass(frozen=True, slots=True)
class _Run:
    """One pass over the users."""

    dataset: Dataset
    config: UserQaConfig
    author: Author
    tally: Tally
    budget: Budget | None = None

    async def write(self, path: Path) -> Mapping[str, int]:
        """Write the file, with a progress bar on stderr; returns the count by kind."""
        users = self._users()
        counts = {"future": 0, "uqa": 0}
        rows: list[Triple] = []
        with (
            TableWriter(path, _SCHEMA) as writer,
            tqdm(total=len(users), unit=" users", desc="userqa") as bar,
        ):

            def add(triples: Iterable[Triple]) -> None:
                for triple in triples:
                    counts[triple.kind] += 1
                    rows.append(triple)
                if len(rows) >= _CHUNK_TRIPLES:
                    writer.write(_table(rows))
                    rows.clear()

            for triple in self._futures(set(users)):
                add((triple,))
            profiles = history_only(self.dataset, users)
            num_at_once = self.config.endpoint.concurrency * _USERS_AT_ONCE
            async with aclosing(in_order(profiles, self._finish, num_at_once)) as results:
                async for triples in results:
                    add(triples)
                    bar.set_postfix(self._progress(), refresh=False)
                    bar.update()
            writer.write(_table(rows))
        return counts

    async def _finish(self, user: QaUser) -> list[Triple]:
        """One user, however it ends."""
        counts = Tally()
        self.tally.num_users += 1
        try:
            triples = await answer_user(user, self.author, counts)
        except Unfinished:
            self.tally.num_users_unfinished += 1
            return []
        except Refused:
            self.tally.num_users_refused += 1
            return []
        counts.num_users_without_triples = int(not triples)
        # Only now: a user that is not in the file does not count.
        for name, count in asdict(counts).items():
            setattr(self.tally, name, getattr(self.tally, name) + count)
        return triples

    def _users(self) -> list[str]:
        split_of, wanted = self.dataset.split_of, {"train"}
        if self.config.with_valid:
            wanted.add("valid")
        chosen = (user_id for user_id, split in split_of.items() if split in wanted)
        return list(itertools.islice(chosen, self.config.max_users))

    def _futures(self, users: set[str]) -> Iterator[Triple]:
        """Rule-made future triples; of train users only, `make_triples` sees to that."""
        if self.config.num_future:
            options = TripleOptions(
                per_user_future=self.config.num_future, per_user_uqa=0, seed=self.config.seed
            )
            for triple in make_triples(self.dataset, options):
                if triple.user_id in users:
                    yield triple

    def _progress(self) -> dict[str, Any]:
        if self.budget is None:
            return {}
        tokens = self.budget.num_tokens_in + self.budget.num_tokens_out
        shown: dict[str, Any] = {"asked": self.tally.num_requests, "tokens": tokens}
        if self.budget.cost:
            shown["cost"] = f"{self.budget.cost:.2f}"
        return shown


def _resolved(config: UserQaConfig, address: Address) -> UserQaConfig:
    """The config with the endpoint that is really asked; without its key."""
    endpoint = structs.replace(config.endpoint, base_url=address.base_url, model=address.model)
    return structs.replace(config, endpoint=endpoint)


def _table(rows: list[Triple]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
