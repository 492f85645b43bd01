"""A study as data: named variants of one recipe, and the curves that join some of them. Torch-free.

`ablation` and `scaling` stand beside this file; any TOML file of the same shape will do.
"""

from pathlib import Path

from qanchor.config import Config, load, nearest
from qanchor.errors import ConfigError

BUILT_IN = ("ablation", "scaling")


class Variant(Config, frozen=True, kw_only=True):
    """What differs from the recipe the study is run with."""

    name: str
    about: str = ""
    """For people, in a sentence."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, as with `qanchor pretrain --set`."""
    schema: tuple[str, ...] = ()
    """Overrides of the data set's profile schema, e.g. `has_user_token=false`."""
    steps_share: float = 1.0
    """Training steps, as a share of the recipe's."""
    users_share: float = 1.0
    """Train users of pre-training, as a share of all; smaller sets lie within larger ones."""
    users_factor: int = 1
    """Users per training step, times the recipe's."""
    is_pretrained: bool = True
    """False takes the model as it was before its first step."""
    prompt_rows: int = 0
    """Rows of the soft prompt that is then tuned; 0 tunes none."""
    paper_auc: float | None = None
    """What the paper reports for its own data, for comparison."""


class CurvePoint(Config, frozen=True, kw_only=True):
    """A variant's place on a curve."""

    variant: str
    x: float


class Curve(Config, frozen=True, kw_only=True):
    """Variants that differ in one quantity."""

    name: str
    x_label: str
    points: tuple[CurvePoint, ...]
    is_log: bool = True


class Study(Config, frozen=True, kw_only=True):
    """Variants in the order they are run; the first is what the others are compared with."""

    title: str
    text: str = ""
    variants: tuple[Variant, ...]
    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) != len(names):
            raise ConfigError("variants.name", names, "must be unique, and at least one", "rename")
        for curve in self.curves:
            for point in curve.points:
                if point.variant not in names:
                    raise ConfigError(
                        f"curves.{curve.name}",
                        point.variant,
                        "no such variant",
                        nearest(point.variant, names),
                    )

    def only(self, names: list[str]) -> "Study":
        """The first variant and those named, by variant or by curve; all for no name.

        Raises ConfigError for an unknown name.
        """
        if not names:
            return self
        of_curve = {curve.name: {p.variant for p in curve.points} for curve in self.curves}
        known = [*(variant.name for variant in self.variants), *of_curve]
        wanted = {self.variants[0].name}
        for name in names:
            if name not in known:
                raise ConfigError("--only", name, "no such variant", nearest(name, known))
            wanted |= of_curve.get(name, {name})
        return Study(
            title=self.title,
            text=self.text,
            variants=tuple(variant for variant in self.variants if variant.name in wanted),
            curves=tuple(
                curve
                for curve in self.curves
                if all(point.variant in wanted for point in curve.points)
            ),
        )


def read_study(name: str) -> Study:
    """A built-in study, or the TOML file of that path. Raises ConfigError."""
    if name in BUILT_IN:
        return load(Study, Path(__file__).parent / f"{name}.toml")
    path = Path(name)
    if not path.is_file():
        raise ConfigError("STUDY", name, "neither a built-in study nor a file", _known())
    return load(Study, path)


def _known() -> str:
    return f"built in: {', '.join(BUILT_IN)}"
