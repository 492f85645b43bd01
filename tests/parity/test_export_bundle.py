"""What lies in a bundle directory, and what refuses to be opened."""

import shutil
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from qanchor.bundle.manifest import (
    PREFIX,
    SUFFIX,
    WEIGHTS_FILE,
    GraphSpec,
    TensorSpec,
    event_encoder_spec,
    prefix_spec,
    suffix_spec,
)
from qanchor.bundle.reader import open_bundle
from qanchor.errors import BundleError
from qanchor_export import bundle_writer
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.runner import BundleRunner
from qanchor_export.source import ExportSource

ALIGNMENT = 4096
MIN_EXTERNAL_BYTES = 1024
# What an engine must know. A new operator here is a decision: TensorRT and the quantisers have to
# take it.
OPERATORS = {
    "Add", "And", "Cast", "Clip", "Concat", "Cos", "Div", "Equal", "Expand", "Gather", "Gelu",
    "Greater", "GreaterOrEqual", "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul",
    "Max", "Mul", "Not", "Pow", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape",
    "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip


def graph_of(bundle_path: Path, name: str) -> onnx.ModelProto:
    """A graph without its weights."""
    return onnx.load(str(bundle_path / f"{name}.onnx"), load_external_data=False)


def external(graph: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of each initializer that lies outside of the graph."""
    found = {}
    for tensor in graph.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = (entries["location"], int(entries["offset"]), int(entries["length"]))
            found[tensor.name] = place
    return found


def test_shared_weights_lie_once_in_one_aligned_file(bundle_path: Path) -> None:
    prefix, suffix = (external(graph_of(bundle_path, name)) for name in (PREFIX, SUFFIX))
    events = external(graph_of(bundle_path, "event_encoder"))
    shared = [name for name in prefix if name in suffix]
    assert any("down.weight" in name for name in shared)
    assert all(prefix[name] == suffix[name] for name in shared)
    places = {*prefix.values(), *suffix.values(), *events.values()}
    assert {file for file, _, _ in places} == {WEIGHTS_FILE}
    assert all(offset % ALIGNMENT == 0 for _, offset, _ in places)
    written = sum(-(-length // ALIGNMENT) * ALIGNMENT for _, _, length in places)
    size = (bundle_path / WEIGHTS_FILE).stat().st_size
    assert written - ALIGNMENT < size <= written


def test_no_large_initializer_stays_inside_a_graph(bundle_path: Path) -> None:
    for name in (PREFIX, SUFFIX, "event_encoder"):
        for tensor in graph_of(bundle_path, name).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(tensor.SerializeToString()) < MIN_EXTERNAL_BYTES + 100, tensor.name


def test_graph_tensors_are_the_manifest_s(bundle_path: Path) -> None:
    manifest = open_bundle(bundle_path).manifest
    dims = manifest.dims
    assert manifest.graphs == {
        "event_encoder": event_encoder_spec(dims),
        "prefix": prefix_spec(dims),
        "suffix": suffix_spec(dims, "float32"),
    }
    for name, spec in manifest.graphs.items():
        graph = graph_of(bundle_path, name).graph
        found = GraphSpec(
            file=spec.file,
            inputs=tuple(map(_tensor_spec, graph.input)),
            outputs=tuple(map(_tensor_spec, graph.output)),
        )
        assert found == spec


def test_graphs_use_documented_operators_only(bundle_path: Path) -> None:
    for name in (PREFIX, SUFFIX, "event_encoder"):
        model = graph_of(bundle_path, name)
        assert {node.domain for node in model.graph.node} == {""}
        assert {node.op_type for node in model.graph.node} <= OPERATORS
        assert not model.functions


def test_graphs_hold_no_trace_of_the_machine_they_were_made_on(bundle_path: Path) -> None:
    for name in (PREFIX, SUFFIX, "event_encoder"):
        model = graph_of(bundle_path, name)
        assert [entry.key for entry in model.metadata_props] == ["qanchor.export_id"]
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert b".py" not in (bundle_path / f"{name}.onnx").read_bytes()


def test_past_keys_and_values_feed_matrix_products_where_they_lie(
    bundle_path: Path, tmp_path: Path
) -> None:
    """In ONNX Runtime's optimised graphs no Transpose, Expand or Concat touches the past."""
    for name in (PREFIX, SUFFIX):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(
            str(bundle_path / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        touching = {
            node.op_type
            for node in graph.node
            if any(tensor.startswith("past_key_values.") for tensor in node.input)
        }
        assert touching & {"MatMul", "FusedMatMul"}
        # The capacity is read from the first keys; Shape moves no data.
        assert touching <= {"MatMul", "FusedMatMul", "Shape"}


def test_an_altered_file_refuses_to_open(bundle_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle_path, copy)
    weights = bytearray((copy / WEIGHTS_FILE).read_bytes())
    weights[5000] ^= 1
    (copy / WEIGHTS_FILE).write_bytes(weights)
    with pytest.raises(BundleError, match=r"weights\.bin: sha256 .* differs"):
        open_bundle(copy)


def test_a_graph_of_another_export_refuses_to_load(bundle_path: Path, tmp_path: Path) -> None:
    """Even when the hashes are right: the stamp inside the graph is compared as well."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle_path, copy)
    bundle = open_bundle(copy)
    model = graph_of(copy, SUFFIX)
    model.metadata_props[0].value = "another export"
    (copy / "suffix.onnx").write_bytes(model.SerializeToString())
    runner = BundleRunner(bundle, num_threads=1)
    runner.session(PREFIX)
    with pytest.raises(BundleError, match="different exports do not fit"):
        runner.session(SUFFIX)


def test_a_bundle_is_not_overwritten_without_force(source: ExportSource, bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="--force"):
        export_bundle(source, bundle_path)


def test_a_failed_export_leaves_the_old_bundle_and_nothing_else(
    source: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bundle"
    old.mkdir()
    (old / "mark").write_text("old")

    def fail(*_: object) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setattr(bundle_writer, "to_onnx", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        export_bundle(source, old, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (old / "mark").read_text() == "old"


def test_scenarios_and_limits_reach_the_reader(source: ExportSource, bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    assert bundle.scenarios == source.scenarios
    assert bundle.manifest.limits.max_query_len == source.max_query_len
    header = len(source.tokens.header)
    assert bundle.manifest.limits.max_prefix_len == header + 1 + 3 * 3 + 53 + 17 + 5
    assert bundle.manifest.recipe == "random-tiny"


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    names = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
    dims = tuple(d.dim_param if d.dim_param else d.dim_value for d in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=names[tensor.elem_type], dims=dims)  # type: ignore[arg-type]
