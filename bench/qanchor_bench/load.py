"""Requests sent by a plan, and what became of each: open-loop and closed-loop.

Open loop: when a request is to be sent is settled before the first is sent, and its latency
counts from that moment. A server that stalls makes every request planned during the stall late,
and all of them are counted (no coordinated omission). Closed loop: a fixed number in flight, for
throughput. Must not know grpc.
"""

import asyncio
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np


class Outcome(Enum):
    """What became of a request."""

    ANSWERED = "answered"
    REJECTED = "rejected"
    """The server said no: overload, draining, a wrong field."""
    INCOMPLETE = "incomplete"
    """No answer within the deadline after the intended send time."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a sender learnt of one request."""

    outcome: Outcome
    was_hit: bool = True
    """The user's prefix was held when the server needed it."""
    queue_s: float = 0.0
    """What the server says the request waited."""
    step_s: float = 0.0
    """What the server says its suffix steps took."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request; seconds on one monotonic clock."""

    intended_s: float
    sent_s: float
    done_s: float
    reply: Reply

    @property
    def latency_s(self) -> float:
        """From the intended send time; infinite without an answer in time."""
        if self.reply.outcome is Outcome.INCOMPLETE:
            return math.inf
        return self.done_s - self.intended_s


Send = Callable[[int, float], Awaitable[Reply]]
"""Sends request number n with that many seconds left; returns its reply."""


def poisson_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times within [0, seconds) of a Poisson process of `rate` per second."""
    draw = random.Random(seed)
    times, now = [], draw.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += draw.expovariate(rate)
    return times


NUM_CHOICES = 1 << 15
"""Users drawn ahead; then they are asked in the same order again."""


def zipf_choices(num_users: int, exponent: float, count: int, seed: int) -> list[int]:
    """Users by popularity: number k is chosen in proportion to 1 / (k + 1) ** exponent."""
    weights = 1.0 / np.arange(1, num_users + 1) ** exponent
    rng = np.random.default_rng(seed)
    return [int(user) for user in rng.choice(num_users, count, p=weights / weights.sum())]


async def open_loop(
    send: Send, times: Sequence[float], *, start_s: float, deadline_s: float
) -> list[Record]:
    """Send request n at `start_s + times[n]` whatever became of the others; waits for all.

    Times are of `time.monotonic`.
    """
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[Record]] = []
    all_sent = asyncio.Event()

    def begin(number: int) -> None:
        intended_s = start_s + times[number]
        tasks.append(loop.create_task(_one(send, number, intended_s, deadline_s)))
        if number == len(times) - 1:
            all_sent.set()

    def pace() -> None:
        # A thread of its own: the loop's own timer is a millisecond coarse.
        for number, offset_s in enumerate(times):
            time.sleep(max(0.0, start_s + offset_s - time.monotonic()))
            loop.call_soon_threadsafe(begin, number)

    if times:
        threading.Thread(target=pace, name="pace", daemon=True).start()
        await all_sent.wait()
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    send: Send, *, concurrency: int, seconds: float, start_s: float, deadline_s: float
) -> list[Record]:
    """Keep `concurrency` requests in flight for `seconds` from `start_s` on."""
    records: list[Record] = []
    numbers = iter(range(1 << 62))

    async def chain() -> None:
        while (now_s := time.monotonic()) < start_s + seconds:
            records.append(await _one(send, next(numbers), now_s, deadline_s))

    await asyncio.sleep(max(0.0, start_s - time.monotonic()))
    await asyncio.gather(*(chain() for _ in range(concurrency)))
    return records


async def _one(send: Send, number: int, intended_s: float, deadline_s: float) -> Record:
    sent_s = time.monotonic()
    left_s = intended_s + deadline_s - sent_s
    try:
        async with asyncio.timeout(max(0.0, left_s)):
            reply = await send(number, left_s)
    except TimeoutError:
        reply = Reply(Outcome.INCOMPLETE)
    return Record(intended_s, sent_s, time.monotonic(), reply)


def latencies(records: Sequence[Record], *, hits_only: bool = False) -> list[float]:
    """Latencies of what was not rejected, infinite ones included.

    What has no answer does not tell whether it was a hit: it counts as one.
    """
    return [
        record.latency_s
        for record in records
        if record.reply.outcome is not Outcome.REJECTED and (record.reply.was_hit or not hits_only)
    ]


def outcomes(records: Sequence[Record]) -> dict[str, int]:
    """Requests by what became of them; hits and misses among the answered."""
    counts = Counter(record.reply.outcome.value for record in records)
    answered = [r.reply for r in records if r.reply.outcome is Outcome.ANSWERED]
    return {
        **{outcome.value: counts[outcome.value] for outcome in Outcome},
        "hits": sum(reply.was_hit for reply in answered),
        "misses": sum(not reply.was_hit for reply in answered),
    }


def throughput(records: Sequence[Record], seconds: float, start_s: float) -> float:
    """Answers per second that came within the phase."""
    end_s = start_s + seconds
    done = [r for r in records if r.reply.outcome is Outcome.ANSWERED and r.done_s <= end_s]
    return len(done) / seconds
