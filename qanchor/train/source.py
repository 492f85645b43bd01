"""Where a run's batches come from: a step number gives users, their corpus and their segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qanchor.train.batches import Segment
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.triples import BatchOrder


@dataclass(frozen=True, slots=True)
class Picked:
    """Users (rows of `corpus`) and the segments asked of each."""

    corpus: PrefixCorpus
    users: Sequence[int]
    segments: Sequence[Sequence[Segment]]

    def part(self, places: Sequence[int]) -> "Picked":
        """The users at the given places of this batch."""
        return Picked(
            self.corpus,
            [self.users[place] for place in places],
            [self.segments[place] for place in places],
        )

    def pieces(self, users_per_piece: int) -> list["Picked"]:
        """This batch cut into runs of at most `users_per_piece` users; 0 leaves it whole."""
        size = users_per_piece or len(self.users)
        starts = range(0, len(self.users), size)
        return [self.part(range(len(self.users))[start : start + size]) for start in starts]


class BatchSource(Protocol):
    """Global batches by step alone: the same on every process and after every restart."""

    @property
    def num_users(self) -> int:
        """Users it draws from."""

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one pass over the users."""

    def batch(self, step: int) -> Picked:
        """What is trained on in a step, counted from 0."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run trains on, and what it watches itself by (None: nobody held out)."""

    training: BatchSource
    heldout: BatchSource | None


@dataclass(frozen=True, slots=True)
class InMemory:
    """Batches of a corpus that is held whole."""

    order: BatchOrder
    corpus: PrefixCorpus

    @property
    def num_users(self) -> int:
        """Users with triples."""
        return len(self.order.triples.users)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in one pass."""
        return self.order.batches_per_epoch

    def batch(self, step: int) -> Picked:
        """What is trained on in a step, counted from 0."""
        return Picked(self.corpus, *self.order.batch(step))
