"""vLLM as a peer: whether it is here, in words."""

from importlib.util import find_spec


def vllm_note() -> str:
    """Whether vLLM is installed; it is not timed yet."""
    if find_spec("vllm") is None:
        return "vLLM did not run: the package vllm is not installed"
    return "vLLM did not run: it is installed, but this suite does not time it yet"
