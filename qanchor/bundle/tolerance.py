"""How far a bundle's answers may lie from torch's, and from each other, by its types.

Read by `qanchor verify` and by the server's start-up proof. float32 sums in another order over some
thousand terms; every other type rounds, so its answers differ from torch's by design, and by less
from each other: all ways of running a bundle round alike.
"""

from dataclasses import dataclass

from qanchor.bundle.manifest import KvDType, Manifest, Precision


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on the components of unit vectors, and on the cosine of vectors that should agree."""

    max_abs: float
    """Largest difference of two components."""
    mean_cosine: float
    """Least mean cosine."""


EXACT = Tolerance(1e-4, 0.999999)
"""float32 in another order of sums."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Bounds for a bundle."""

    torch: Tolerance
    """Between the bundle and the float32 model it came from."""
    ways: Tolerance
    """Between two ways of running the bundle: alone or packed, in chunks or in one piece."""


def tolerances(manifest: Manifest) -> Tolerances:
    """What is allowed for the bundle: the wider of what its precision and its KV type need."""
    parts = (_of_precision(manifest.precision), _of_kv(manifest.dims.kv_dtype))
    return Tolerances(
        torch=_wider([part.torch for part in parts]), ways=_wider([part.ways for part in parts])
    )


def _of_precision(precision: Precision) -> Tolerances:
    return {
        "float32": Tolerances(EXACT, EXACT),
        "float16": Tolerances(Tolerance(1e-2, 0.9995), Tolerance(5e-3, 0.9999)),
        "bfloat16": Tolerances(Tolerance(8e-2, 0.995), Tolerance(4e-2, 0.999)),
        # A number that lies between two levels may fall to either side by its last float32 bit.
        "int8": Tolerances(Tolerance(0.1, 0.995), Tolerance(1e-2, 0.9999)),
    }[precision]


def _of_kv(kv_dtype: KvDType) -> Tolerances:
    return {
        "float32": Tolerances(EXACT, EXACT),
        "float16": Tolerances(Tolerance(1e-3, 0.99999), EXACT),
        "bfloat16": Tolerances(Tolerance(1e-2, 0.9995), Tolerance(1e-3, 0.99999)),
        "int8": Tolerances(Tolerance(6e-2, 0.998), Tolerance(5e-3, 0.9999)),
    }[kv_dtype]


def _wider(parts: list[Tolerance]) -> Tolerance:
    return Tolerance(max(p.max_abs for p in parts), min(p.mean_cosine for p in parts))
