"""A simulated day of arrivals over three tiers: seeded, long, and sure to use every way there is.

The invariants are those of the random machine, checked after every event; Hypothesis finds odd
sequences, this finds what needs many users and a long time.
"""

import random
from collections import Counter

import pytest
from test_scheduler_properties import MAX_BEGUN, USERS, SchedulerMachine

from qanchor_server.kv_tiers import Demote, Move, Read, Scrub, Unlink, Write
from qanchor_server.steps import PrefillStep, RestoreStep

NUM_EVENTS = 3000


class Counting(SchedulerMachine):
    """The random machine, and how often each kind of step and move came."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        run, move_done = self.world.run, self.scheduler.move_done

        def counted_run(step: object, is_encoded: bool) -> None:
            found = step.found.value if isinstance(step, RestoreStep) else ""
            self.counts[type(step).__name__ + found] += 1
            run(step, is_encoded)  # type: ignore[arg-type]

        def counted_done(move: Move, is_ok: bool) -> tuple[Move, ...]:
            self.counts[type(move).__name__] += 1
            return move_done(move, is_ok)

        self.world.run = counted_run  # type: ignore[method-assign]
        self.scheduler.move_done = counted_done  # type: ignore[method-assign]


def happen(machine: Counting, chance: random.Random) -> None:
    """One event: mostly arrivals of a few busy users, steps and ends of moves."""
    user = USERS[min(int(chance.paretovariate(0.7)) - 1, len(USERS) - 1)]
    match chance.choices(range(7), (30, 45, 20, 2, 2, 2, 20))[0]:
        case 0:
            lens = [chance.randint(1, 12) for _ in range(chance.randint(0, 2))]
            wait_s = chance.choice((None, None, None, 4))
            machine.arrive(user=user, lens=lens, wait_s=wait_s, changes=chance.random() < 0.1)
        case 1 if len(machine.begun) < MAX_BEGUN and not machine.failed:
            fails, goes_on = chance.random() < 0.03, chance.random() < 0.5
            machine.step(fails=fails, is_encoded=chance.random() < 0.7, goes_on=goes_on)
            machine.counts[f"{len(machine.begun)} begun"] += 1
        case 2 if machine.world.pending:
            machine.end_move(is_ok=chance.random() < 0.95)
        case 3 if not machine.begun:
            machine.delete(user=user, ends=chance.random() < 0.5)
        case 4:
            machine.keep(user=user, seconds=5)
        case 5 if machine.open and not machine.begun:
            machine.scheduler.cancel(chance.choice(sorted(machine.open)))
        case 6 if machine.begun:
            machine.end_step(last=chance.random() < 0.5, fails=chance.random() < 0.05)
    machine.pool_is_sound()


@pytest.mark.parametrize("seed", range(4))
def test_invariants_hold_over_a_long_run(seed: int) -> None:
    machine, chance = Counting(), random.Random(seed)
    for _ in range(NUM_EVENTS):
        happen(machine, chance)
    machine.teardown()
    for kind in (Demote, Write, Read, Unlink, Scrub, PrefillStep):
        assert machine.counts[kind.__name__] > 0, machine.counts
    assert machine.counts["2 begun"] > 50, machine.counts
    assert machine.counts["RestoreStephost"] > 20, machine.counts
    assert machine.counts["RestoreStepdisk"] > 5, machine.counts
