"""Every precision and every type of keys and values, on the tiny model with its odd sizes."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from qanchor import config
from qanchor.bundle.manifest import INT8_REPORT_FILE, SUFFIX, Precision
from qanchor.bundle.reader import open_bundle
from qanchor.bundle.slot import storage_dtype
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.calibration import TorchGraphs, calibration_users, make_samples
from qanchor_export.graphs_decoder import PrefixGraph, suffix_graph
from qanchor_export.int8 import Int8Projection
from qanchor_export.projection import Projection
from qanchor_export.quantize import Calibration, QuantizationReport
from qanchor_export.runner import BundleRunner
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.smoothing import LayerScales, fold
from qanchor_export.source import ExportSource
from qanchor_export.verify import verify
from qanchor_export.weights import AdapterWeights, HeadWeights, Numbers, decoder_weights

CASES = [
    Numbers(precision="float32", kv_dtype="float16"),
    Numbers(precision="float32", kv_dtype="bfloat16"),
    Numbers(precision="float32", kv_dtype="int8"),
    Numbers(precision="float16"),
    Numbers(precision="int8"),
    Numbers(precision="int8", kv_dtype="float16"),
    Numbers(precision="int8", kv_dtype="int8"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda one: f"{one.precision}-{one.stored}")
def numbers(request: pytest.FixtureRequest) -> Numbers:
    """The types of one bundle."""
    found: Numbers = request.param
    return found


@pytest.fixture(scope="module")
def made(
    numbers: Numbers, source: ExportSource, tmp_path_factory: pytest.TempPathFactory
) -> BundleRunner:
    """The bundle in these types."""
    path = tmp_path_factory.mktemp("precisions") / "bundle"
    export_bundle(source, path, numbers=numbers)
    return BundleRunner(open_bundle(path), num_threads=1)


def test_every_equality_of_verify_holds_within_the_types_tolerance(
    made: BundleRunner, source: ExportSource
) -> None:
    for check in verify(made, source, num_users=3):
        assert check.is_ok, f"{check.name}: {check.max_abs:.2e}, cosine {check.mean_cosine:.6f}"


def test_the_manifest_says_the_types_and_a_slot_has_them(
    made: BundleRunner, numbers: Numbers, source: ExportSource
) -> None:
    manifest = made.bundle.manifest
    assert manifest.precision == numbers.precision
    assert manifest.dims.kv_dtype == numbers.stored
    (user,) = sample_users(source.schema, 1, seed=3, fill=0.4)
    prefix = made.encode_prefix(user)
    assert prefix.kv_L2GCK.dtype == np.dtype(storage_dtype(numbers.stored))
    assert prefix.kv_L2GCK.nbytes == prefix.length * manifest.dims.kv_bytes_per_token


def test_a_slot_longer_than_its_prefix_changes_nothing(
    made: BundleRunner, source: ExportSource
) -> None:
    """Rounding is by row: padding and neighbours must not reach another token's scale."""
    (user,) = sample_users(source.schema, 1, seed=3, fill=0.4)
    queries = [made.query(text) for text in SAMPLE_QUERIES]
    exact, wide = made.encode_prefix(user), made.encode_prefix(user, 7, spare=131)
    found = [made.suffix([(prefix, queries)]) for prefix in (exact, wide)]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_graphs_equal_torch_in_torch(precision: Precision, source: ExportSource) -> None:
    """The CPU provider has no bfloat16 kernels; the traced modules themselves run in torch."""
    samples = make_samples(source, calibration_users(source, None))
    adapters, head = AdapterWeights(source.model.encoder.adapters), HeadWeights(source.model.head)

    def embeddings(numbers: Numbers) -> torch.Tensor:
        decoder = decoder_weights(source.model, numbers)
        graphs = TorchGraphs(PrefixGraph(decoder, adapters), suffix_graph(decoder, head))
        return graphs.embeddings(samples)

    exact, rounded = embeddings(Numbers()), embeddings(Numbers(precision=precision))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    cosine = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)
    assert float(cosine.min()) > (0.9999 if precision == "float16" else 0.998)


def test_exporting_in_int8_leaves_the_model_as_it_was(source: ExportSource, tmp_path: Path) -> None:
    before = copy.deepcopy(source.model.state_dict())
    export_bundle(source, tmp_path / "bundle", numbers=Numbers(precision="int8"))
    after = source.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_smoothing_computes_the_same_and_can_be_undone(source: ExportSource) -> None:
    samples = make_samples(source, calibration_users(source, None))
    decoder = decoder_weights(source.model)
    adapters, head = AdapterWeights(source.model.encoder.adapters), HeadWeights(source.model.head)
    graphs = TorchGraphs(PrefixGraph(decoder, adapters), suffix_graph(decoder, head))
    exact = graphs.embeddings(samples)
    gain = decoder.stack[0].mlp_norm_D.clone()
    torch.manual_seed(0)
    scales = [
        LayerScales(*(torch.rand(shape) * 4 + 0.2 for shape in ((36,), (36,), (52,), (2, 10))))
        for _ in decoder.stack
    ]
    fold(decoder, scales)
    assert not torch.allclose(decoder.stack[0].mlp_norm_D, gain)
    torch.testing.assert_close(graphs.embeddings(samples), exact, rtol=0, atol=1e-5)
    fold(decoder, scales, is_undone=True)
    torch.testing.assert_close(decoder.stack[0].mlp_norm_D.data, gain, rtol=0, atol=1e-6)


def test_int8_rows_do_not_share_a_scale() -> None:
    """A row beside a million times larger one stays what it is; so does a row of zeros."""
    torch.manual_seed(0)
    projection = Int8Projection(Projection(torch.randn(52, 36), torch.randn(36)))
    rows = torch.randn(3, 52)
    rows[1] *= 1e6
    rows[2] = 0
    found = projection(rows)
    torch.testing.assert_close(found[:1], projection(rows[:1]), rtol=0, atol=0)
    torch.testing.assert_close(found[2], projection.bias, rtol=0, atol=0)


def test_int8_products_run_on_the_fast_operator_and_share_their_input(
    source: ExportSource, tmp_path: Path
) -> None:
    """Per layer qkv, o, gate, up, down; gate and up read one quantised input."""
    export_bundle(source, tmp_path / "bundle", numbers=Numbers(precision="int8"))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    path = tmp_path / "bundle" / f"{SUFFIX}.onnx"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["MatMulIntegerToFloat"] == 3 * 5
    assert counts["QuantizeLinear"] == 3 * 4


def test_a_tight_budget_keeps_the_most_harmful_matrices_float32(
    source: ExportSource, tmp_path: Path
) -> None:
    calibration = Calibration(calibration_users(source, None), min_cosine=0.9999)
    export_bundle(
        source, tmp_path / "bundle", numbers=Numbers(precision="int8"), calibration=calibration
    )
    report = config.load(QuantizationReport, tmp_path / "bundle" / INT8_REPORT_FILE)
    assert report.mean_cosine >= 0.9999
    kept = [site.cosine_loss for site in report.sites if not site.is_int8]
    rounded = [site.cosine_loss for site in report.sites if site.is_int8]
    assert kept
    assert rounded
    assert min(kept) >= max(rounded)
    assert {site.projection for site in report.sites} == {"qkv", "kv", "o", "gate", "up", "down"}
