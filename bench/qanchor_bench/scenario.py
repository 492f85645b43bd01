"""A bench scenario: what is measured, as a data file. Must not know torch, engines or grpc."""

from pathlib import Path
from typing import Literal

import msgspec

from qanchor import config
from qanchor.bundle.manifest import KvDType, Precision
from qanchor.config import Config, nearest
from qanchor.errors import ConfigError

Suite = Literal["static", "engine", "serve", "cache", "peers"]

MIN_REPEATS = 5
SCENARIO_DIR = Path(__file__).resolve().parents[1] / "scenarios"


class BenchScenario(Config, frozen=True, kw_only=True):
    """One measurement. Of a tuple the first value is the base; the others vary one at a time."""

    name: str
    """Theme of the result file; equals the file's name."""
    about: str
    """One line for people."""
    suite: Suite
    is_short: bool = False
    """Part of what `make bench` runs."""
    shape: str = "mini"
    """Random weights of this shape: tiny, mini, qwen2.5-0.5b. No effect if `bundle` is set."""
    bundle: str = ""
    """Path of a bundle to measure instead, such as a trained one."""
    engine: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """What runs the graphs, as in the server's settings."""
    precision: Precision = "float32"
    """Precision of the exported bundle; a `bundle` has its own."""
    kv_dtype: KvDType | None = None
    """Type of its keys and values; none: what the exporter takes for the precision."""
    threads: int = 0
    """Threads of one operator; 0 takes all cores."""
    seed: int = 0
    """Of weights, users, queries and arrivals."""
    repeats: int = MIN_REPEATS
    """How often every point is measured, in rounds: each round measures every point once."""
    warmup: int = 1
    """Rounds before that, not counted."""
    users: tuple[int, ...] = (1,)
    """engine: users of one step. serve: hot users. static: users per server in the tables."""
    queries: tuple[int, ...] = (10,)
    """Queries per user and request."""
    prefix_lens: tuple[int, ...] = (760,)
    """Prefix positions; serve fills the schema's limits up to about the first one."""
    suffix_lens: tuple[int, ...] = (20,)
    """Tokens of a query, <USER_EMB> included."""
    hit_ratios: tuple[float, ...] = (1.0,)
    """serve: shares of requests whose user is held; the others are users never asked before."""
    load: float = 0.5
    """serve: open-loop arrival rate as a share of what the engine alone can do at the lowest hit
    ratio, measured in the same run; without effect if `arrival_rate` is set."""
    arrival_rate: float = 0.0
    """serve: open-loop arrivals per second, instead of `load`."""
    zipf: float = 1.0
    """serve: exponent of the users' popularity; 0 asks all users alike."""
    concurrency: int = 32
    """serve: requests in flight in the closed loop that saturates the server."""
    clients: int = 1
    """serve: client processes; load is divided among them."""
    seconds: float = 5.0
    """serve: length of each phase."""
    deadline: float = 10.0
    """serve: seconds after its intended send time at which a request counts as incomplete."""
    budget_gib: tuple[float, ...] = (2.0,)
    """static: memory for keys and values."""
    server: dict[str, int | float | bool] = msgspec.field(default_factory=dict)
    """serve: ServerConfig fields to set."""
    full_repeats: int = 1
    """peers: repeats of the full passes, which take long."""
    at_most: dict[str, float] = msgspec.field(default_factory=dict)
    """Figures of the result that must not exceed this."""
    at_least: dict[str, float] = msgspec.field(default_factory=dict)
    """Figures of the result that must reach this."""

    def __post_init__(self) -> None:
        if self.repeats < MIN_REPEATS:
            raise ConfigError(
                "repeats", self.repeats, f"at least {MIN_REPEATS}, so that a spread is seen",
                f"set {MIN_REPEATS}",
            )  # fmt: skip
        for name in ("users", "queries", "prefix_lens", "suffix_lens", "budget_gib"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ConfigError(name, values, "needs positive values, the base first", "add one")
        if not self.hit_ratios or not all(0 < ratio <= 1 for ratio in self.hit_ratios):
            raise ConfigError("hit_ratios", self.hit_ratios, "must lie in (0, 1]", "e.g. 1.0, 0.8")
        if self.suite == "serve" and self.clients < 1:
            raise ConfigError("clients", self.clients, "at least one sends requests", "set 1")


def load_scenario(path: Path) -> BenchScenario:
    """Read a scenario file. Raises ConfigError for a wrong field or a name unlike the file's."""
    scenario = config.load(BenchScenario, path)
    if scenario.name != path.stem:
        raise ConfigError(f"{path}: name", scenario.name, "must be the file's name", path.stem)
    return scenario


def scenario_files(directory: Path = SCENARIO_DIR) -> list[Path]:
    """All scenario files of a directory, by name."""
    return sorted(directory.glob("*.toml"))


def find_scenario(word: str, directory: Path = SCENARIO_DIR) -> Path:
    """The file of a scenario given by name or path. Raises ConfigError for an unknown one."""
    if Path(word).suffix == ".toml" and Path(word).is_file():
        return Path(word)
    names = {path.stem: path for path in scenario_files(directory)}
    if word not in names:
        raise ConfigError("scenario", word, "no such scenario", nearest(word, list(names)))
    return names[word]
