"""A client process of the serve suite: phases of load over a real channel, every request noted.

For each phase, over stdin and stdout: it reads the paths of a plan and of the records to write,
says `ready` when its channel is warm, reads the start time, runs, writes, says `done`.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np

from qanchor import config
from qanchor.client.messages import decode_vector
from qanchor.config import Config
from qanchor.v1 import embedding_pb2, embedding_pb2_grpc
from qanchor_bench.echo import METHOD
from qanchor_bench.load import (
    NUM_CHOICES,
    Outcome,
    Record,
    Reply,
    closed_loop,
    open_loop,
    poisson_times,
    zipf_choices,
)

_NUM_WARM_CALLS = 20
_REJECTIONS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}


class ClientPlan(Config, frozen=True, kw_only=True):
    """What one client process does."""

    kind: Literal["turns", "closed", "open"]
    """`turns`: one in flight, echo calls and Embed calls in alternating blocks."""
    is_stream: bool = False
    """Send through one StreamEmbed instead of Embed calls."""
    address: str
    echo_address: str
    users: tuple[str, ...]
    """Hot users, most popular first."""
    cold_users: tuple[str, ...] = ()
    """Asked once each, in this order."""
    hit_ratio: float = 1.0
    queries: tuple[str, ...]
    """Free texts asked in every request."""
    zipf: float
    rate: float = 0.0
    concurrency: int = 1
    seconds: float
    deadline: float
    seed: int
    expected: str
    """.npz with the right vectors of some users, [queries, embedding_dim]."""
    min_cosine: float
    check_every: int = 1
    """Of the replies about such users every how manieth is compared."""


class Records(Config, frozen=True, kw_only=True):
    """What one client process noted, column by column."""

    intended_s: tuple[float, ...]
    sent_s: tuple[float, ...]
    done_s: tuple[float, ...]
    outcome: tuple[str, ...]
    was_hit: tuple[bool, ...]
    queue_s: tuple[float, ...]
    step_s: tuple[float, ...]
    echo_s: tuple[float, ...] = ()
    """Round trips of the empty call."""
    num_compared: int = 0
    """Replies whose vectors were compared, of those about users in `expected`."""
    num_wrong: int = 0


def as_records(columns: Records) -> list[Record]:
    """Rows of the columns."""
    rows = zip(
        columns.intended_s, columns.sent_s, columns.done_s, columns.outcome, columns.was_hit,
        columns.queue_s, columns.step_s, strict=True,
    )  # fmt: skip
    return [
        Record(intended, sent, done, Reply(Outcome(outcome), *of_reply))
        for intended, sent, done, outcome, *of_reply in rows
    ]


@dataclass(slots=True)
class _Sender:
    plan: ClientPlan
    channel: grpc.aio.Channel
    expected: dict[str, Any]
    choices: list[int]
    is_cold: list[bool]
    next_cold: int = 0
    stub: Any = None
    queries: list[embedding_pb2.Query] = field(default_factory=list)
    kept: list[tuple[str, Any]] = field(default_factory=list)
    """Users and responses to compare once nothing is timed any more."""

    @classmethod
    def of(cls, plan: ClientPlan, channel: grpc.aio.Channel) -> "_Sender":
        with np.load(plan.expected) as stored:
            expected = {name: stored[name] for name in stored.files}
        sender = cls(
            plan,
            channel,
            expected,
            zipf_choices(len(plan.users), plan.zipf, NUM_CHOICES, plan.seed),
            [False] * NUM_CHOICES,
        )
        sender.stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        sender.queries = [embedding_pb2.Query(text=text) for text in plan.queries]
        return sender

    def user(self, number: int) -> str:
        place = number % NUM_CHOICES
        if self.is_cold[place] and self.next_cold < len(self.plan.cold_users):
            self.next_cold += 1
            return self.plan.cold_users[self.next_cold - 1]
        return self.plan.users[self.choices[place]]

    async def unary(self, number: int, left_s: float) -> Reply:
        user = self.user(number)
        request = embedding_pb2.EmbedRequest(
            user_id=user,
            queries=self.queries,
            encoding=embedding_pb2.VECTOR_ENCODING_FLOAT32_BYTES,
        )
        try:
            response = await self.stub.Embed(request, timeout=left_s)
        except grpc.aio.AioRpcError as error:
            return _failed(error)
        return self.reply(number, user, response)

    def reply(self, number: int, user: str, response: Any) -> Reply:
        if user in self.expected and number % self.plan.check_every == 0:
            self.kept.append((user, response))
        provenance = response.provenance
        was_hit = provenance.cache_state == embedding_pb2.CACHE_STATE_DEVICE
        waited_s, step_s = provenance.queue_seconds, provenance.suffix_seconds
        return Reply(Outcome.ANSWERED, was_hit, waited_s, step_s)

    def num_wrong(self) -> int:
        """Of the replies kept."""
        return sum(not self._is_right(user, response) for user, response in self.kept)

    def _is_right(self, user: str, response: Any) -> bool:
        found = np.stack([decode_vector(result.vector) for result in response.results])
        cosine = (found * self.expected[user]).sum(-1).min()
        return bool(cosine >= self.plan.min_cosine)


def _failed(error: grpc.aio.AioRpcError) -> Reply:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Reply(Outcome.INCOMPLETE)
    if error.code() in _REJECTIONS:
        return Reply(Outcome.REJECTED)
    raise error


class _StreamSender:
    """The same requests as items of one stream; replies find their futures by request id."""

    def __init__(self, sender: _Sender) -> None:
        self._sender = sender
        self._call = sender.stub.StreamEmbed()
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def send(self, number: int, left_s: float) -> Reply:
        user = self._sender.user(number)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[str(number)] = future
        item = embedding_pb2.StreamEmbedRequest(
            request_id=str(number),
            user_id=user,
            queries=self._sender.queries,
            encoding=embedding_pb2.VECTOR_ENCODING_FLOAT32_BYTES,
        )
        async with self._writing:
            await self._call.write(item)
        response = await future
        if response.status.code:
            return Reply(Outcome.REJECTED)
        return self._sender.reply(number, user, response)

    async def close(self) -> None:
        await self._call.done_writing()
        await self._reader

    async def _read(self) -> None:
        async for response in self._call:
            future = self._waiting.pop(response.request_id)
            if not future.done():
                future.set_result(response)


async def run_plan(plan: ClientPlan, await_start: Callable[[], Awaitable[float]]) -> Records:
    """Warm the channel up, then do what the plan says from the moment on that is awaited.

    That moment is of `time.monotonic`, which is one clock for all processes of a machine.
    """
    async with grpc.aio.insecure_channel(plan.address) as channel:
        sender = _Sender.of(plan, channel)
        for number in range(_NUM_WARM_CALLS):
            await sender.unary(number, plan.deadline)
        # Only now: a warm-up call must not warm a user who is to be cold.
        rng = np.random.default_rng(plan.seed + 1)
        sender.is_cold = (rng.random(NUM_CHOICES) >= plan.hit_ratio).tolist()
        echo_s: list[float] = []
        start_s = await await_start()
        if plan.kind == "turns":
            records, echo_s = await _turns(plan, sender)
        else:
            records = await _load(plan, sender, start_s)
    return Records(
        intended_s=tuple(record.intended_s for record in records),
        sent_s=tuple(record.sent_s for record in records),
        done_s=tuple(record.done_s for record in records),
        outcome=tuple(record.reply.outcome.value for record in records),
        was_hit=tuple(record.reply.was_hit for record in records),
        queue_s=tuple(record.reply.queue_s for record in records),
        step_s=tuple(record.reply.step_s for record in records),
        echo_s=tuple(echo_s),
        num_compared=len(sender.kept),
        num_wrong=sender.num_wrong(),
    )


async def _load(plan: ClientPlan, sender: _Sender, start_s: float) -> list[Record]:
    stream = _StreamSender(sender) if plan.is_stream else None
    send = stream.send if stream else sender.unary
    if plan.kind == "open":
        times = poisson_times(plan.rate, plan.seconds, plan.seed)
        records = await open_loop(send, times, start_s=start_s, deadline_s=plan.deadline)
    else:
        records = await closed_loop(
            send,
            concurrency=plan.concurrency,
            seconds=plan.seconds,
            start_s=start_s,
            deadline_s=plan.deadline,
        )
    if stream:
        await stream.close()
    return records


async def _turns(plan: ClientPlan, sender: _Sender) -> tuple[list[Record], list[float]]:
    """Blocks of echo calls and of Embed calls, one in flight, until the time is up."""
    records: list[Record] = []
    echo_s: list[float] = []
    async with grpc.aio.insecure_channel(plan.echo_address) as channel:
        echo = channel.unary_unary(METHOD, None, None)
        for _ in range(_NUM_WARM_CALLS):
            await echo(b"")
        end_s = time.monotonic() + plan.seconds
        while time.monotonic() < end_s:
            for _ in range(_NUM_WARM_CALLS):
                start_s = time.monotonic()
                await echo(b"")
                echo_s.append(time.monotonic() - start_s)
            for _ in range(_NUM_WARM_CALLS):
                start_s = time.monotonic()
                reply = await sender.unary(len(records), plan.deadline)
                records.append(Record(start_s, start_s, time.monotonic(), reply))
    return records, echo_s


async def main() -> None:
    """Run phases until stdin ends."""

    async def line() -> str:
        text: str = await asyncio.to_thread(sys.stdin.readline)
        return text.strip()

    async def start() -> float:
        print("ready", flush=True)
        return float(await line())

    while plan_path := await line():
        plan = config.load(ClientPlan, Path(plan_path))
        records_path = Path(await line())
        config.save(await run_plan(plan, start), records_path)
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
