"""Graph modules to ONNX models with the manifest's names and dimensions. Knows no files.

Legend: as in graphs_decoder.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    PREFIX,
    QUERY_ENCODER,
    SUFFIX,
    GraphSpec,
    TensorSpec,
)
from qanchor.encoder.query_encoder import QueryEncoder
from qanchor.towers import QAnchorModel
from qanchor_export.graphs_decoder import PrefixGraph, suffix_graph
from qanchor_export.graphs_text import EventEncoderGraph, QueryEncoderGraph
from qanchor_export.kv_store import TORCH_DTYPES
from qanchor_export.weights import AdapterWeights, DecoderWeights, HeadWeights

logger = logging.getLogger(__name__)

OPSET = 20
"""Taken by ONNX Runtime's CPU provider and by TensorRT 10; has Gelu as one operator."""
PAST_PREFIX = "past_key_values."
_CHATTY_LOGGERS = (
    "onnx_ir",
    "onnxscript",
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
)

# Tracing sizes: none is 0 or 1, which the tracer would take for constants, and no two are equal,
# so that no two dimensions are taken for one.
_TRACE_SIZES = {
    "num_texts": 3,
    "text_len": 5,
    "query_text_len": 10,
    "chunk_len": 7,
    "prefix_capacity": 11,
    "packed_len": 13,
    "num_prompt_rows": 2,
    "batch": 4,
    "row_len": 6,
    "num_queries": 9,
    "query_len": 8,
}


def to_onnx(
    model: QAnchorModel,
    query_encoder: QueryEncoder | None,
    decoder: DecoderWeights,
    specs: dict[str, GraphSpec],
) -> dict[str, ir.Model]:
    """The graphs of `specs` by name; their initializers share the torch weights' memory.

    `decoder` is the model's, in the bundle's precision; the text encoders are float32 in all.
    Raises ConfigError when the model's maths is not what the graphs compute.
    """
    adapters = AdapterWeights(model.encoder.adapters)
    modules: dict[str, nn.Module] = {
        EVENT_ENCODER: EventEncoderGraph(model.event_encoder),
        PREFIX: PrefixGraph(decoder, adapters),
        SUFFIX: suffix_graph(decoder, HeadWeights(model.head)),
    }
    if query_encoder is not None and model.query_map is not None:
        modules[QUERY_ENCODER] = QueryEncoderGraph(query_encoder, model.query_map)
    graphs = {}
    for name, spec in specs.items():
        logger.info("tracing %s", spec.file)
        graphs[name] = trace(modules[name].eval(), spec)
    return graphs


def trace(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """Export one module; inputs and outputs carry the names and dimensions of `spec`."""
    plain = [tensor for tensor in spec.inputs if not tensor.name.startswith(PAST_PREFIX)]
    past = [tensor for tensor in spec.inputs if tensor.name.startswith(PAST_PREFIX)]
    symbols = {name: Dim(name) for name in _TRACE_SIZES}
    args: list[object] = [_example(tensor) for tensor in plain]
    shapes: list[object] = [_dynamic(tensor, symbols) for tensor in plain]
    if past:
        args.append(tuple(_example(tensor) for tensor in past))
        shapes.append(tuple(_dynamic(tensor, symbols) for tensor in past))
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    assert program is not None
    graph: ir.Model = program.model
    _strip_traces(graph)
    return graph


def _example(tensor: TensorSpec) -> Tensor:
    sizes = [_TRACE_SIZES[d] if isinstance(d, str) else d for d in tensor.dims]
    return torch.zeros(sizes, dtype=TORCH_DTYPES[tensor.dtype])


def _dynamic(tensor: TensorSpec, symbols: dict[str, Dim]) -> dict[int, Dim]:
    return {axis: symbols[d] for axis, d in enumerate(tensor.dims) if isinstance(d, str)}


def _strip_traces(graph: ir.Model) -> None:
    """Drop what the tracer notes about its own machine: stack traces, file names, module paths."""
    graph.doc_string = None
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.graph.doc_string = None
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress off stdout, which belongs to results, and off the log."""
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [chatty.level for chatty in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for chatty in loggers:
            chatty.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for chatty, level in zip(loggers, levels, strict=True):
                chatty.setLevel(level)
