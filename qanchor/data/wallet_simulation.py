"""One simulated wallet user: traits, the events they lead to, and the labels of the future.

Knows numbers only: habits and items are indices into the tables; `wallet` puts them into words.

Legend: H habits, K traits, R drifts, I intents, W items of a habit, T days, N events.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qanchor.data.wallet_habits import DRIFTS, INTENTS, TRAITS, WalletScenario, WalletTables

HISTORY_DAYS = 90
FUTURE_DAYS = 30

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_NUM_DAYS = HISTORY_DAYS + FUTURE_DAYS
_INTENT_DAYS = 14
_INTENT_ODDS = (0.10, 0.08, 0.10, 0.04)
"""In the order of INTENTS."""
_MAX_LOG_FACTOR = 3.0
"""No habit is more than exp(3) times as frequent as the table says, by traits alone."""
_SILENT_FACTOR = 0.03
_AMOUNT_SPREAD = 0.45
_AMOUNT_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
"""Amounts are rounded to these times a power of ten, so that event texts repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The tables as matrices."""

    base_H: FloatArray
    """Log of events per day."""
    traits_HK: FloatArray
    drifts_HR: FloatArray
    intents_HI: FloatArray
    rhythm_HT: FloatArray
    """Factor of weekdays and weekends."""
    median_H: FloatArray
    """Yuan; 0 for visits."""
    has_item_HW: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedUser:
    """What one user is and did; events in the order of day and habit."""

    traits: dict[str, float]
    day_N: IntArray
    habit_N: IntArray
    item_N: IntArray
    value_N: FloatArray
    """Yuan, or the number of visits of the day."""
    noise: FloatArray
    """Eight standard normal numbers for attributes that only hint at the traits."""


def make_rates(tables: WalletTables) -> Rates:
    """Turn the tables into matrices."""
    habits = tables.habits
    weekday_T = np.arange(_NUM_DAYS) % 7
    weekend_H = np.array([habit.weekend for habit in habits])
    num_items_H = np.array([len(habit.items) for habit in habits])
    return Rates(
        base_H=np.log([habit.per_week / 7 for habit in habits]),
        traits_HK=np.array([[h.traits.get(name, 0.0) for name in TRAITS] for h in habits]),
        drifts_HR=np.array([[h.drifts.get(name, 0.0) for name in DRIFTS] for h in habits]),
        intents_HI=np.array([[h.intents.get(name, 0.0) for name in INTENTS] for h in habits]),
        rhythm_HT=np.where(weekday_T >= 5, weekend_H[:, None], 1.0),
        median_H=np.array([habit.yuan for habit in habits]),
        has_item_HW=np.arange(num_items_H.max()) < num_items_H[:, None],
    )


def simulate_user(rates: Rates, seed: int, user_id: int) -> SimulatedUser:
    """Draw a user; the result depends on the tables, the seed and the user's number only."""
    rng = np.random.default_rng([seed, user_id])
    traits_K = rng.standard_normal(len(TRAITS))
    traits = dict(zip(TRAITS, traits_K.tolist(), strict=True))
    count_HT = rng.poisson(_daily_rates(rates, traits_K, rng))
    habit_C, day_C = np.nonzero(count_HT)
    count_C = count_HT[habit_C, day_C]
    # A payment is an event of its own; the visits of a day are one event that counts them.
    is_payment_C = rates.median_H[habit_C] > 0
    repeats_C = np.where(is_payment_C, count_C, 1)
    order_C = np.lexsort((habit_C, day_C))
    order_N = np.repeat(order_C, repeats_C[order_C])
    habit_N = habit_C[order_N]
    spending = np.exp(0.35 * traits["income"] - 0.2 * traits["thrift"])
    spread_N = np.exp(_AMOUNT_SPREAD * rng.standard_normal(len(habit_N)))
    amount_N = _rounded(rates.median_H[habit_N] * spending * spread_N)
    return SimulatedUser(
        traits=traits,
        day_N=day_C[order_N],
        habit_N=habit_N,
        item_N=_items(rates, habit_N, traits["brand"], rng),
        value_N=np.where(is_payment_C[order_N], amount_N, count_C[order_N]),
        noise=rng.standard_normal(8),
    )


def label_of(scenario: WalletScenario, user: SimulatedUser, counting_HW: IntArray) -> int:
    """Whether the user's future meets the scenario; `counting_HW` is 1 where an event counts."""
    in_window_N = (user.day_N >= HISTORY_DAYS) & (user.day_N < HISTORY_DAYS + scenario.days)
    counts_N = in_window_N & (counting_HW[user.habit_N, user.item_N] == 1)
    if scenario.min_yuan:
        return int(user.value_N[counts_N].sum() >= scenario.min_yuan)
    return int(len(np.unique(user.day_N[counts_N])) >= scenario.min_active_days)


def _daily_rates(rates: Rates, traits_K: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Expected events per habit and day [H, T]."""
    day_T = np.arange(_NUM_DAYS)
    drifts_R = rng.standard_normal(len(DRIFTS))
    intends_I = rng.random(len(INTENTS)) < np.array(_INTENT_ODDS)
    steady_H = np.clip(rates.traits_HK @ traits_K, -_MAX_LOG_FACTOR, _MAX_LOG_FACTOR)
    log_HT = (rates.base_H + steady_H)[:, None] + np.outer(
        rates.drifts_HR @ drifts_R, (day_T - HISTORY_DAYS / 2) / HISTORY_DAYS
    )
    log_HT += np.outer(rates.intents_HI @ intends_I, day_T >= HISTORY_DAYS - _INTENT_DAYS)
    # Good and bad days: activity comes in clumps, more than a Poisson process would have it.
    mood_T = rng.gamma(1.5, 1 / 1.5, _NUM_DAYS)
    silent_odds = 1 / (1 + np.exp(1.8 + 0.8 * traits_K[0] + 0.6 * drifts_R[0]))
    silent_from = rng.integers(HISTORY_DAYS // 2, _NUM_DAYS)
    if rng.random() < silent_odds:
        mood_T[silent_from:] *= _SILENT_FACTOR
    daily_HT: FloatArray = np.exp(log_HT) * rates.rhythm_HT * mood_T
    return daily_HT


def _rounded(yuan_N: FloatArray) -> FloatArray:
    """Amounts in whole yuan on a coarse ladder; visits (0) become 1."""
    amount_N = np.maximum(yuan_N, 2.0)
    tens_N = 10.0 ** np.floor(np.log10(amount_N))
    steps = np.array(_AMOUNT_STEPS)
    nearest_N = np.abs((amount_N / tens_N)[:, None] - steps).argmin(axis=1)
    rounded_N: FloatArray = np.rint(steps[nearest_N] * tens_N)
    return rounded_N


def _items(rates: Rates, habit_N: IntArray, loyalty: float, rng: np.random.Generator) -> IntArray:
    """What each event is about: favourites by habit, sharper for loyal users."""
    sharpness = 0.3 + 2.0 / (1 + np.exp(-loyalty))
    taste_HW = np.exp(sharpness * rng.gumbel(size=rates.has_item_HW.shape))
    share_HW = np.where(rates.has_item_HW, taste_HW, 0.0)
    ladder_HW = np.cumsum(share_HW / share_HW.sum(axis=1, keepdims=True), axis=1)
    # The last step is 1 up to rounding, and never reached by a draw below it.
    ladder_HW[:, -1] = 1.0
    item_N: IntArray = (rng.random(len(habit_N))[:, None] >= ladder_HW[habit_N]).sum(axis=1)
    last_N: IntArray = rates.has_item_HW.sum(axis=1)[habit_N] - 1
    return np.minimum(item_N, last_N)
