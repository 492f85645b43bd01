"""Opening a bundle's graphs with ONNX Runtime, and telling its failures apart.

Shared by the CPU engine and the CUDA engine.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnxruntime as ort

from qanchor.bundle.exact_int8 import exact_int8_entry
from qanchor.bundle.reader import Bundle
from qanchor.config import nearest
from qanchor.errors import BundleError, ConfigError
from qanchor_server.failures import Retryable

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_UNFIT_FOR_BFLOAT16 = "SimplifiedLayerNormFusion"
"""On CUDA it makes an RMSNorm from float32 to bfloat16, for which there is no kernel (1.31)."""
_OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "out of memory", "alloc_failed")


def open_session(
    bundle: Bundle,
    graph: str,
    options: ort.SessionOptions,
    provider: str = CPU,
    provider_options: Mapping[str, str] | None = None,
) -> Any:
    """An InferenceSession of one graph of the bundle; nodes the provider lacks run on the CPU.

    Raises BundleError when the graph is of another export or takes other tensors than the manifest
    says, ConfigError for an execution provider this installation lacks.
    """
    available = ort.get_available_providers()
    if provider not in available:
        raise ConfigError(
            "engine",
            provider,
            f"this ONNX Runtime has {', '.join(available)} only",
            "install qanchor[gpu] in place of qanchor[serve], or serve with engine=cpu"
            if provider == CUDA
            else nearest(provider, available),
        )
    options.log_severity_level = 3
    options.add_session_config_entry(*exact_int8_entry())
    spec = bundle.manifest.graphs[graph]
    providers: list[Any] = [(provider, dict(provider_options or {}))]
    if provider != CPU:
        providers.append(CPU)
    unfit = provider == CUDA and bundle.manifest.precision == "bfloat16"
    # Opened by path: ONNX Runtime then maps the weights file instead of reading it.
    session = ort.InferenceSession(
        str(bundle.path / spec.file),
        options,
        providers=providers,
        disabled_optimizers=[_UNFIT_FOR_BFLOAT16] if unfit else [],
    )
    if session.get_providers()[0] != provider:
        # ONNX Runtime falls back silently where the provider's libraries do not load.
        raise ConfigError(
            "engine",
            provider,
            "its libraries did not load",
            "check driver, CUDA and cuDNN against the versions this onnxruntime-gpu was built with",
        )
    bundle.check_export_id(graph, session.get_modelmeta().custom_metadata_map)
    for what, found, wanted in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        differing = {tensor.name for tensor in wanted} ^ {tensor.name for tensor in found}
        if differing:
            raise BundleError(
                f"{bundle.path / spec.file}: {what} differ from the manifest's in "
                f"{', '.join(sorted(differing))}; export again"
            )
    return session


@contextmanager
def memory_is_retryable() -> Iterator[None]:
    """Turn a failed allocation into Retryable: the step can be rolled back and tried later."""
    try:
        yield
    except MemoryError as error:
        raise Retryable(f"out of memory: {error}") from error
    except Exception as error:
        # ONNX Runtime has one exception class for all that goes wrong while a graph runs.
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise Retryable(f"out of memory: {error}") from error
        raise
