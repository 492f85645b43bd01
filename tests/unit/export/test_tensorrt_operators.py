"""Every operator of the exported graphs is in TensorRT's documented list, with its types.

The list (`tensorrt_operators.json`) says where it comes from. TensorRT itself was not at hand.
"""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import msgspec
import onnx
import pytest

from qanchor.bundle.buckets import BucketLimits, make_ladders
from qanchor.bundle.manifest import EVENT_ENCODER, PREFIX, SUFFIX
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.errors import BundleError, ConfigError
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.cli import add_parser
from qanchor_export.random_source import method_schema, random_source, shape_named
from qanchor_export.to_tensorrt import check_operators, profile_shapes
from qanchor_export.weights import Numbers

GRAPHS = (EVENT_ENCODER, PREFIX, SUFFIX)
_TYPE = onnx.TensorProto
NAMES = {
    _TYPE.FLOAT: "FP32",
    _TYPE.FLOAT16: "FP16",
    _TYPE.BFLOAT16: "BF16",
    _TYPE.INT64: "INT64",
    _TYPE.INT32: "INT32",
    _TYPE.INT8: "INT8",
    _TYPE.BOOL: "BOOL",
}


@pytest.fixture(scope="module")
def listed() -> dict:
    return json.loads((Path(__file__).parent / "tensorrt_operators.json").read_text())


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def bundle(request, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("trt") / request.param
    numbers = Numbers(precision=request.param)
    export_bundle(random_source(shape_named("tiny"), method_schema()), path, numbers=numbers)
    return open_bundle(path)


def graph_of(bundle: Bundle, name: str) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A model and the element type of each of its tensors."""
    file = bundle.path / bundle.manifest.graphs[name].file
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file), load_external_data=False))
    graph = model.graph
    types = {x.name: x.data_type for x in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return model, types


def typed_tensors(node: onnx.NodeProto) -> list[str]:
    """The tensors whose type the list speaks of: not a condition, an index, a shape, a mask."""
    if node.op_type == "Cast":
        return [node.input[0], node.output[0]]
    if node.op_type == "Where":
        return [node.input[1], node.input[2]]
    return [node.input[0]]


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operator_is_listed_with_its_types(bundle, listed, name):
    model, types = graph_of(bundle, name)
    for node in model.graph.node:
        assert node.domain in ("", "ai.onnx"), f"{node.domain}::{node.op_type}"
        assert node.op_type in listed["types"], node.op_type
        for tensor in typed_tensors(node):
            found = NAMES[types[tensor]]
            assert found in listed["types"][node.op_type], f"{node.op_type} of {found}"


@pytest.mark.parametrize("name", GRAPHS)
def test_axes_are_constants_and_no_unsupported_output_is_read(bundle, listed, name):
    model, _ = graph_of(bundle, name)
    constants = {x.name for x in model.graph.initializer}
    constants |= {n.output[0] for n in model.graph.node if n.op_type == "Constant"}
    for node in model.graph.node:
        if node.op_type in listed["constant_axes"] and len(node.input) > 1:
            assert node.input[1] in constants, f"{node.op_type} {node.name}"
        if node.op_type in listed["first_output_only"]:
            assert len([output for output in node.output if output]) == 1, node.name


@pytest.mark.parametrize("name", GRAPHS)
def test_the_opset_is_within_the_parsers(bundle, listed, name):
    model, _ = graph_of(bundle, name)
    low, high = listed["opset"]
    assert [low <= one.version <= high for one in model.opset_import] == [True]


@pytest.mark.parametrize("name", GRAPHS)
def test_the_files_inputs_are_the_manifests_and_each_has_a_profile(bundle, name):
    model, types = graph_of(bundle, name)
    spec = bundle.manifest.graphs[name]
    numbers = {"int64": _TYPE.INT64, "float32": _TYPE.FLOAT, "float16": _TYPE.FLOAT16}
    numbers |= {"bfloat16": _TYPE.BFLOAT16, "int8": _TYPE.INT8}
    for tensor in (*spec.inputs, *spec.outputs):
        assert types[tensor.name] == numbers[tensor.dtype], tensor.name
    in_file = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    assert in_file == {tensor.name: tensor.dims for tensor in spec.inputs}
    manifest = bundle.manifest
    ladders = make_ladders(BucketLimits(), manifest.limits, manifest.profile_schema)
    for ranges in ladders.profiles()[name]:
        shapes = profile_shapes(spec, ranges)
        dynamic = {n for n, dims in in_file.items() if any(isinstance(d, str) for d in dims)}
        assert set(shapes) == dynamic
        for least, usual, greatest in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(least, usual, greatest, strict=True))


def test_an_operator_of_onnx_runtimes_own_is_refused(bundle, tmp_path):
    name = bundle.manifest.graphs[SUFFIX].file
    model = onnx.load(str(bundle.path / name), load_external_data=False)
    model.graph.node[0].domain = "com.microsoft"
    altered = tmp_path / "altered"
    altered.mkdir()
    for spec in bundle.manifest.graphs.values():
        (altered / spec.file).write_bytes((bundle.path / spec.file).read_bytes())
    (altered / name).write_bytes(model.SerializeToString())
    moved = dataclasses.replace(bundle, path=altered)
    with pytest.raises(BundleError, match=r"TensorRT has no com\.microsoft::"):
        check_operators(moved)


def test_int8_slots_are_refused_with_the_remedy(bundle):
    dims = msgspec.structs.replace(bundle.manifest.dims, kv_dtype="int8")
    manifest = msgspec.structs.replace(bundle.manifest, dims=dims)
    with pytest.raises(BundleError, match="--kv-dtype float16 or bfloat16"):
        check_operators(dataclasses.replace(bundle, manifest=manifest))


def run_verb(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["export", *words, "--target", "tensorrt"])
    code: int = args.run(args)
    return code


def test_the_verb_says_what_is_missing(bundle, tmp_path, capsys):
    with pytest.raises(ConfigError, match="takes a finished BUNDLE and PLANS"):
        run_verb(str(bundle.path))
    with pytest.raises(ConfigError, match="did you mean"):
        run_verb(str(bundle.path), str(tmp_path), "--set", "max_step_token=3")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)
def test_without_tensorrt_the_verb_says_what_to_install(bundle, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"install qanchor\[tensorrt\]"):
        run_verb(str(bundle.path), str(tmp_path), "--precision", "float16")
    assert "--precision has no effect" in capsys.readouterr().err
