"""Tokens and money spent, and the limits they must not pass. For one event loop."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from qanchor.userqa.config import BudgetConfig
from qanchor.userqa.outcomes import Unfinished


@dataclass(slots=True)
class Budget:
    """Reserves before each request what it may cost at most, so that no limit is passed."""

    config: BudgetConfig
    num_tokens_in: int
    """Spent so far, in earlier runs too."""
    num_tokens_out: int
    reached: Literal["", "max_tokens", "max_cost"] = ""
    """The limit that ended spending; it stays ended."""
    _reserved: list[tuple[int, int]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def cost(self) -> float:
        """Money spent so far."""
        return self._cost(self.num_tokens_in, self.num_tokens_out)

    async def reserve(self, tokens_in: int, tokens_out: int) -> None:
        """Set tokens aside; waits while requests on the way may yet turn out cheaper.

        Raises Unfinished when a limit is reached.
        """
        async with self._changed:
            while True:
                limit = self._limit_passed(tokens_in, tokens_out)
                if self.reached or (limit and not self._reserved):
                    self.reached = self.reached or limit
                    self._changed.notify_all()
                    raise Unfinished(f"budget.{self.reached} is reached")
                if not limit:
                    self._reserved.append((tokens_in, tokens_out))
                    return
                await self._changed.wait()

    async def settle(self, reserved: tuple[int, int], spent: tuple[int, int]) -> None:
        """Give a reservation back and book what was spent."""
        async with self._changed:
            self._reserved.remove(reserved)
            self.num_tokens_in += spent[0]
            self.num_tokens_out += spent[1]
            self._changed.notify_all()

    def _limit_passed(
        self, tokens_in: int, tokens_out: int
    ) -> Literal["", "max_tokens", "max_cost"]:
        total_in = self.num_tokens_in + tokens_in + sum(each[0] for each in self._reserved)
        total_out = self.num_tokens_out + tokens_out + sum(each[1] for each in self._reserved)
        config = self.config
        if config.max_tokens is not None and total_in + total_out > config.max_tokens:
            return "max_tokens"
        if config.max_cost is not None and self._cost(total_in, total_out) > config.max_cost:
            return "max_cost"
        return ""

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        config = self.config
        return (
            tokens_in * config.price_in_per_million + tokens_out * config.price_out_per_million
        ) / 1e6


def estimated_tokens(text: str) -> int:
    """A careful guess: a token per three bytes of UTF-8, so one per Chinese character."""
    return len(text.encode()) // 3 + 1
