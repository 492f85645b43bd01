"""Load generation and its accounting: what a stall of the server does to the numbers."""

import asyncio
import math
import time
from itertools import pairwise

import pytest

from qanchor_bench.load import (
    Outcome,
    Record,
    Reply,
    closed_loop,
    latencies,
    open_loop,
    outcomes,
    poisson_times,
    throughput,
    zipf_choices,
)
from qanchor_bench.spread import is_beyond_noise, median, percentile

STALL_S = 0.4
GAP_S = 0.02
ANSWERED = Reply(Outcome.ANSWERED)


class StallingServer:
    """Answers at once, but for one stall during which it answers nobody."""

    def __init__(self, stall_from_s: float) -> None:
        self._from_s = stall_from_s

    async def send(self, number: int, left_s: float) -> Reply:
        """Wait for the end of a stall that has begun."""
        end_s = self._from_s + STALL_S
        if self._from_s <= time.monotonic() < end_s:
            await asyncio.sleep(end_s - time.monotonic())
        return ANSWERED


async def test_a_stall_makes_all_requests_late_that_were_planned_during_it() -> None:
    """60 requests 20 ms apart; 20 of them fall into a stall of 400 ms, waiting 400, 380, ... 20.

    A sender that waits for its reply before it sends the next one sees one late request.
    """
    start_s = time.monotonic() + 0.05
    server = StallingServer(start_s + 0.2 + GAP_S / 2)
    times = [number * GAP_S for number in range(60)]
    records = await open_loop(server.send, times, start_s=start_s, deadline_s=5.0)
    assert len(records) == 60
    late = [latency for latency in latencies(records) if latency > GAP_S / 2]
    assert len(late) >= 18
    assert percentile(latencies(records), 90.0) > STALL_S / 2

    server = StallingServer(time.monotonic() + 0.1)
    chained = await closed_loop(
        server.send, concurrency=1, seconds=1.0, start_s=time.monotonic(), deadline_s=5.0
    )
    stalled = [latency for latency in latencies(chained) if latency > STALL_S / 2]
    # One by the stall; a busy machine may add a pause of its own.
    assert 1 <= len(stalled) <= 3


async def test_latency_counts_from_the_intended_time_when_the_sender_itself_is_late() -> None:
    start_s = time.monotonic() - 0.5
    (record,) = await open_loop(
        StallingServer(math.inf).send, [0.0], start_s=start_s, deadline_s=5.0
    )
    assert record.latency_s >= 0.5
    assert record.sent_s - record.intended_s >= 0.5


async def test_no_answer_by_the_deadline_is_infinitely_late() -> None:
    async def never(number: int, left_s: float) -> Reply:
        await asyncio.sleep(60)
        return ANSWERED

    records = await open_loop(never, [0.0, 0.01], start_s=time.monotonic(), deadline_s=0.1)
    assert outcomes(records)["incomplete"] == 2
    assert latencies(records) == [math.inf, math.inf]


def test_rejected_requests_are_counted_and_have_no_latency() -> None:
    records = [
        Record(0.0, 0.0, 0.1, ANSWERED),
        Record(0.0, 0.0, 0.3, Reply(Outcome.ANSWERED, was_hit=False)),
        Record(0.0, 0.0, 0.2, Reply(Outcome.REJECTED)),
    ]
    counts = {"answered": 2, "rejected": 1, "incomplete": 0, "hits": 1, "misses": 1}
    assert outcomes(records) == counts
    assert latencies(records) == [0.1, 0.3]
    assert latencies(records, hits_only=True) == [0.1]
    assert throughput(records, seconds=0.2, start_s=0.0) == 5.0


def test_arrivals_have_the_rate_asked_for_and_repeat_with_the_seed() -> None:
    times = poisson_times(200.0, 50.0, seed=1)
    assert times == poisson_times(200.0, 50.0, seed=1) != poisson_times(200.0, 50.0, seed=2)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    gaps = [b - a for a, b in pairwise(times)]
    # Exponential gaps: 1 / e of them are longer than the mean.
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


def test_zipf_asks_the_first_user_twice_as_often_as_the_second() -> None:
    chosen = zipf_choices(100, 1.0, 100_000, seed=0)
    assert chosen.count(0) / chosen.count(1) == pytest.approx(2.0, rel=0.05)
    assert chosen.count(0) / chosen.count(9) == pytest.approx(10.0, rel=0.1)
    even = zipf_choices(100, 0.0, 100_000, seed=0)
    assert even.count(0) / even.count(99) == pytest.approx(1.0, rel=0.15)


def test_percentiles_are_observed_values() -> None:
    values = [float(number) for number in range(1, 1001)]
    assert percentile(values, 50.0) == 500
    assert percentile(values, 99.0) == 990
    assert percentile(values, 99.9) == 999
    assert percentile([*values[:-20], *[math.inf] * 20], 99.0) == math.inf
    assert math.isnan(percentile([], 50.0))
    assert median([4.0, 1.0, 2.0]) == 2.0


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ([1.0, 1.01, 1.02, 1.03, 1.04], [1.2, 1.21, 1.22, 1.23, 1.24], True),
        # As far apart in the median, but the middle halves overlap.
        ([1.0, 1.0, 1.02, 1.4, 1.5], [1.0, 1.1, 1.22, 1.3, 1.5], False),
        # Clearly apart, but within the tolerance.
        ([1.0, 1.0, 1.0, 1.0, 1.0], [1.04, 1.04, 1.04, 1.04, 1.04], False),
        ([1.0, 1.0, 1.0], [math.inf, math.inf, math.inf], True),
    ],
)
def test_only_what_stands_out_of_the_spread_is_a_change(before, after, differs) -> None:
    assert is_beyond_noise(before, after, 0.05) is differs
