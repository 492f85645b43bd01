"""Int8 products of ONNX Runtime on x86 that are exact on every CPU. Must not know ONNX Runtime.

Its kernels for uint8 x int8 add pairs of products in 16 bits where the CPU lacks VNNI; a pair can
reach 2 x 255 x 127 = 64,770 and is then cut to 32,767. With PRECISE the weights become uint8 when
the session opens and slower kernels run that add in 32 bits. On a CPU with VNNI the fast kernels
are exact, so PRECISE would only cost time there; on other processors it has no effect.
"""

from qanchor.environment import cpu_flags

PRECISE = "session.x64quantprecision"
_VNNI = {"avx512_vnni", "avx_vnni"}


def exact_int8_entry() -> tuple[str, str]:
    """Key and value of the config entry that every session over a bundle's graphs needs."""
    return PRECISE, "0" if _VNNI & cpu_flags() else "1"
