"""Types of the simulated wallet's tables; the tables themselves are in `wallet_habits.toml`."""

from pathlib import Path

import msgspec

from qanchor.config import Config, load

TRAITS = (
    "activity",
    "thrift",
    "travel",
    "gaming",
    "takeout",
    "investing",
    "eco",
    "risk",
    "price",
    "brand",
    "income",
)
"""Lasting; standard normal per user. `price` is sensitivity to prices, `brand` loyalty."""

DRIFTS = ("activity", "takeout", "investing", "eco")
"""Slow change over the simulated months; standard normal per user, reached after 90 days."""

INTENTS = ("concert", "fund", "trip", "attack")
"""Short-lived: a few users have one from two weeks before the as-of day on."""


class Habit(Config, frozen=True, kw_only=True):
    """One kind of event and the odds that a user shows it."""

    modality: str
    event_type: str
    per_week: float
    """Events per week of a user whose traits, drifts and intents are all zero."""
    items: tuple[str, ...]
    """What the event may be about; users have favourites, the stronger the more brand-loyal."""
    traits: dict[str, float] = msgspec.field(default_factory=dict)
    """Change of the log rate per unit of a trait."""
    drifts: dict[str, float] = msgspec.field(default_factory=dict)
    """Change of the log rate per unit of a drift, over 90 days."""
    intents: dict[str, float] = msgspec.field(default_factory=dict)
    """Change of the log rate while an intent lasts."""
    weekend: float = 1.0
    """Factor on Saturdays and Sundays."""
    yuan: float = 0.0
    """Median amount of a payment; 0: the event is a visit and its value counts visits."""


class WalletScenario(Config, frozen=True, kw_only=True):
    """A question about the days after the as-of moment, answered by the simulated future."""

    name: str
    domain: str
    question: str
    definition: str
    event_types: tuple[str, ...] = ()
    """Events that count; none: every event."""
    item: str = ""
    """Only events about this item count; empty: all."""
    days: int = 30
    """Length of the label window."""
    min_active_days: int = 0
    """Label 1 from this many days with counting events on; 0: no condition."""
    min_yuan: float = 0.0
    """Label 1 from this sum of payments on; 0: no condition."""


class WalletTables(Config, frozen=True, kw_only=True):
    """Everything the simulation is made of."""

    habits: tuple[Habit, ...]
    """Modality by modality."""
    scenarios: tuple[WalletScenario, ...]


def load_wallet_tables() -> WalletTables:
    """Read the packaged tables."""
    return load(WalletTables, Path(__file__).with_name("wallet_habits.toml"))
