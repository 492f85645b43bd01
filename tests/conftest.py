"""Fixtures and settings shared by all tests; what is missing is named in the skip reason."""

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Before torch is imported: tiny models gain nothing from threads, and on a busy machine two
# waiting thread pools slow each other down thirtyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data sets, from QANCHOR_DATA."""
    directory = os.environ.get("QANCHOR_DATA")
    if not directory:
        pytest.skip("real data: set QANCHOR_DATA to a directory that holds oulad/")
    if not Path(directory).is_dir():
        # A misspelt path must not pass for "no data here".
        pytest.fail(f"QANCHOR_DATA={directory!r} is no directory")
    return Path(directory)


@pytest.fixture(scope="session")
def sentence_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, as a Hugging Face directory; its weights are random."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    from qanchor.tokenization import train_event_tokenizer

    directory = tmp_path_factory.mktemp("sentence_encoder")
    words = ["Will the user travel soon?", "How often does the user buy food and read books?"]
    tokenizer = train_event_tokenizer(words, 320)
    bert = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=80,
        # At the usual 0.02 all texts of so small a model look alike.
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(4)
    BertModel(bert).save_pretrained(directory)
    # As those of real sentence encoders do, it pads and cuts unless it is told not to.
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(6)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def with_mpnet_ids(tokenizer: "Tokenizer") -> "Tokenizer":
    """The same with [CLS] at 0 and [PAD] at 1: MPNet takes 1 for padding wherever it stands."""
    from tokenizers import Tokenizer

    found = json.loads(tokenizer.to_str())
    found["model"]["vocab"] |= {"[CLS]": 0, "[PAD]": 1}
    found["added_tokens"][0]["id"], found["added_tokens"][1]["id"] = 1, 0
    found["added_tokens"].sort(key=lambda token: token["id"])
    found["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [0]
    found["truncation"] = found["padding"] = None
    return Tokenizer.from_str(json.dumps(found))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where something is missing; with QANCHOR_REQUIRE_GPU=1 fail instead."""
    for mark, find in (("gpu", _missing_for_cuda), ("tensorrt", _missing_for_tensorrt)):
        if item.get_closest_marker(mark) is None:
            continue
        missing = find()
        if missing and os.environ.get("QANCHOR_REQUIRE_GPU") == "1":
            pytest.fail(f"{mark}: {missing}, and QANCHOR_REQUIRE_GPU=1", pytrace=False)
        if missing:
            pytest.skip(f"{mark}: {missing}")


def _missing_for_cuda() -> str:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA execution provider (install qanchor[gpu])"
    return _missing_gpu()


def _missing_for_tensorrt() -> str:
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed (install qanchor[tensorrt])"
    return _missing_gpu()


def _missing_gpu() -> str:
    if importlib.util.find_spec("cuda") is None:
        return "cuda-bindings is not installed"
    from cuda.bindings import runtime

    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or count < 1:
        return f"no NVIDIA GPU ({status.name})"
    return ""
