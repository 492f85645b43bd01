"""A bench scenario: what is measured, as a data file. Must not know torch, engines or grpc."""

from pathlib import Path
from typing import Literal

import msgspec

from qanchor import config
from qanchor.bundle.manifest import KvDType, Precision
from qanchor.config import Config, nearest
from qanchor.errors import ConfigError

Suite = Literal["static", "engine", "serve", "cache", "peers", "accuracy", "training"]

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
    checkpoint: str = ""
    """Path of a checkpoint to export and measure instead of random weights."""
    dataset: str = ""
    """Data set directory. accuracy: whose users are embedded. int8: whose train users calibrate."""
    calibrate_users: int = 32
    """Train users of `dataset` that an int8 export is calibrated on."""
    engine: Literal["cpu", "cuda", "tensorrt", "static"] = "cpu"
    """What runs the graphs, as in the server's settings; plan files are built before. static: the
    GPU engines' buckets on host memory, a proof without a GPU and no way to be quick."""
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
    """engine: users of one step. serve: hot users. cache: users of the trace. accuracy: users per
    split. training: simulated users, all splits together."""
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
    """serve, cache: exponent of the users' popularity; 0 asks all users alike."""
    concurrency: int = 32
    """Requests in flight. serve: in the closed loop that saturates the server. cache: in the trace.
    """
    requests: int = 100
    """cache: requests of the trace per round."""
    tier_users: tuple[int, int, int] = (4, 6, 20)
    """cache: users that device, host memory and disk hold during the trace."""
    clients: int = 1
    """serve: client processes; load is divided among them."""
    seconds: float = 5.0
    """serve: length of each phase."""
    deadline: float = 10.0
    """serve: seconds after its intended send time at which a request counts as incomplete."""
    budget_gib: tuple[float, ...] = (2.0,)
    """static: memory for keys and values."""
    max_users: int = 0
    """engine, with static buckets: fill memory with users, this many at most; 0: do not."""
    server: dict[str, int | float | bool] = msgspec.field(default_factory=dict)
    """ServerConfig fields to set, of servers and of engines alone."""
    full_repeats: int = 1
    """peers: repeats of the full passes, which take long."""
    batches: tuple[tuple[int, int], ...] = ((32, 0),)
    """training: users per batch and per piece of it; 0: in one piece."""
    at_most: dict[str, float] = msgspec.field(default_factory=dict)
    """Figures of the result that must not exceed this."""
    at_least: dict[str, float] = msgspec.field(default_factory=dict)
    """Figures of the result that must reach this."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether the graphs run on a GPU."""
        return self.engine in ("cuda", "tensorrt")

    def for_result(self) -> "BenchScenario":
        """As a result keeps it: only what its paths end in, as nobody else has the directories."""
        return msgspec.structs.replace(
            self,
            bundle=Path(self.bundle).name,
            checkpoint="/".join(Path(self.checkpoint).parts[-2:]),
            dataset=Path(self.dataset).name,
        )

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
        if self.is_on_gpu and self.precision == "int8":
            raise ConfigError("precision", "int8", "is for CPUs", "set float16 or bfloat16")
        if self.suite == "serve" and self.engine == "static":
            raise ConfigError(
                "engine", self.engine, "no server process has it", "set cpu, cuda or tensorrt"
            )


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
