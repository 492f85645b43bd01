"""Which matrices of a decoder become int8: measured on real users, within a stated budget.

1 the float answers; 2 the smoothing that serves all-int8 best;
3 each projection's error when it alone is int8; 4 the most harmful go back to float32 until the
mean cosine to the float answers is within the budget; 5 scales for int8 keys and values.

Legend: G KV heads, P prefix length, K head_dim, Q queries, Z embedding_dim, T rows, O outputs.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from qanchor.config import Config
from qanchor_export.calibration import (
    CalibrationUsers,
    Sample,
    TorchGraphs,
    make_samples,
    recorded_peaks,
)
from qanchor_export.graphs_decoder import PrefixGraph, suffix_graph
from qanchor_export.int8 import Int8Projection
from qanchor_export.kv_store import INT8_PEAK, KvStore
from qanchor_export.projection import Projection
from qanchor_export.smoothing import LayerScales, fold, layer_scales
from qanchor_export.source import ExportSource
from qanchor_export.weights import AdapterWeights, DecoderWeights, HeadWeights, Numbers

logger = logging.getLogger(__name__)

PROJECTIONS = ("qkv", "kv", "o", "gate", "up", "down")
ALPHAS = (0.0, 0.3, 0.5, 0.7)
"""Smoothing strengths tried; 0 stands for none at all."""
DEFAULT_MIN_COSINE = 0.998
_SENSITIVITY_FLOPS = 2e13
"""Of all one-by-one passes, of which a large model has some hundred; at least one user is used."""
_KV_MARGIN = 1.1
"""Users may exceed the calibrated peak of a key or value channel a little without being cut."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What quantisation is decided by."""

    users: CalibrationUsers
    min_cosine: float = DEFAULT_MIN_COSINE
    """Least mean cosine to the float32 answers over the calibration users."""


class SiteReport(Config, frozen=True, kw_only=True):
    """One projection."""

    layer: int
    projection: str
    output_error: float
    """Relative root mean square error of its output, its input being exact."""
    cosine_loss: float
    """1 - mean cosine of the final embeddings when it alone is int8."""
    is_int8: bool


class QuantizationReport(Config, frozen=True, kw_only=True):
    """How a bundle was quantised and how well."""

    users: str
    num_users: int
    num_queries: int
    min_cosine: float
    """The budget."""
    alphas: dict[str, float]
    """Mean cosine with all projections int8, by smoothing strength."""
    alpha: float
    mean_cosine: float
    """With the bundle's choice of projections, and of keys and values."""
    least_cosine: float
    sites: tuple[SiteReport, ...]


def quantize(
    source: ExportSource, decoder: DecoderWeights, numbers: Numbers, calibration: Calibration
) -> QuantizationReport:
    """Make a float32 decoder int8 in place, its stores too where `numbers` says so."""
    graphs = TorchGraphs(
        PrefixGraph(decoder, AdapterWeights(source.model.encoder.adapters)),
        suffix_graph(decoder, HeadWeights(source.model.head)),
    )
    work = _Work(decoder, graphs, make_samples(source, calibration.users))
    exact_QZ = work.exact()
    alphas: dict[str, float] = {}
    alpha: float = 0.0
    sites: tuple[SiteReport, ...] = ()
    if numbers.precision == "int8":
        alphas = work.try_alphas(exact_QZ)
        alpha = float(max(alphas, key=lambda name: alphas[name]))
        work.smooth(alpha, work.samples)
        sites = work.choose(exact_QZ, calibration.min_cosine)
    if numbers.stored == "int8":
        work.scale_stores()
    cosines_Q = work.cosines(exact_QZ)
    logger.info("int8: mean cosine %.5f, least %.5f", cosines_Q.mean(), cosines_Q.min())
    return QuantizationReport(
        users=calibration.users.origin,
        num_users=len(calibration.users.users),
        num_queries=len(calibration.users.questions),
        min_cosine=calibration.min_cosine,
        alphas=alphas,
        alpha=alpha,
        mean_cosine=float(cosines_Q.mean()),
        least_cosine=float(cosines_Q.min()),
        sites=sites,
    )


@dataclass(slots=True)
class _Work:
    decoder: DecoderWeights
    graphs: TorchGraphs
    samples: list[Sample]

    def sites(self) -> Iterator[tuple[int, str, Projection]]:
        """Layer, name and module of every projection."""
        for index, layer in enumerate(self.decoder.stack):
            for name in PROJECTIONS:
                found = getattr(layer, name)
                if found is not None:
                    yield index, name, found

    def exact(self) -> Tensor:
        """The float answers [Q, Z]."""
        return self.graphs.embeddings(self.samples)

    def cosines(self, exact_QZ: Tensor, samples: Sequence[Sample] | None = None) -> Tensor:
        """Cosine of every answer [Q] of the graphs as they are now to the float answers."""
        chosen = self.samples if samples is None else samples
        found_QZ = self.graphs.embeddings(chosen)
        return torch.nn.functional.cosine_similarity(found_QZ, exact_QZ, dim=-1)

    def try_alphas(self, exact_QZ: Tensor) -> dict[str, float]:
        """Mean cosine of all-int8 by smoothing strength; leaves the decoder as it was.

        Divisors come from every other user and are judged on the rest: strong ones fit the users
        they were made from.
        """
        found = {}
        seen, judges = self.samples[::2], self.samples[1::2] or self.samples
        parts = exact_QZ.split([len(sample.packed.emb_index_Q) for sample in self.samples])
        wanted_QZ = torch.cat(parts[1::2] or parts)
        for alpha in tqdm(ALPHAS, desc="smoothing", unit="alpha"):
            scales = self.smooth(alpha, seen)
            floats = self._swap([(index, name) for index, name, _ in self.sites()])
            found[f"{alpha:g}"] = float(self.cosines(wanted_QZ, judges).mean())
            self._restore(floats)
            if scales:
                fold(self.decoder, scales, is_undone=True)
        return found

    def smooth(self, alpha: float, samples: Sequence[Sample]) -> list[LayerScales]:
        """Fold in smoothing of that strength by the input peaks of `samples`; 0 does nothing."""
        decoder = self.decoder
        heads = (decoder.num_kv_heads, decoder.heads_per_kv, decoder.head_dim)
        if alpha == 0.0:
            return []
        modules = {f"{index}.{name}": module for index, name, module in self.sites()}
        with recorded_peaks(modules) as peaks:
            self.graphs.embeddings(samples)
        scales = []
        for index, layer in enumerate(decoder.stack):
            own = {name: peaks[f"{index}.{name}"] for name in PROJECTIONS if name != "kv"}
            if layer.kv is not None:
                own["qkv"] = torch.maximum(own["qkv"], peaks[f"{index}.kv"])
            scales.append(layer_scales(layer, own, heads, alpha))
        fold(decoder, scales)
        return scales

    def choose(self, exact_QZ: Tensor, min_cosine: float) -> tuple[SiteReport, ...]:
        """Make all projections int8 but the most harmful, as few of these as the budget needs."""
        errors = self._output_errors()
        losses = self._losses_alone(exact_QZ)
        floats = self._swap(list(losses))
        harmful = sorted(losses, key=lambda site: losses[site], reverse=True)
        kept: set[tuple[int, str]] = set()
        while harmful and float(self.cosines(exact_QZ).mean()) < min_cosine:
            site = harmful.pop(0)
            kept.add(site)
            self._restore({site: floats[site]})
            logger.info("layer %d %s stays float32", *site)
        return tuple(
            SiteReport(
                layer=site[0],
                projection=site[1],
                output_error=errors[site],
                cosine_loss=losses[site],
                is_int8=site not in kept,
            )
            for site in losses
        )

    def scale_stores(self) -> None:
        """Give every layer an int8 store with scales from the float keys and values."""
        for layer in self.decoder.stack:
            layer.store = KvStore(torch.float32)
        peaks: list[Tensor] = []
        for sample in self.samples:
            present = self.graphs.keys_values(sample)
            found = [part[0].abs().amax(1, keepdim=True) for part in present]
            before = peaks or found
            peaks = [torch.maximum(a, b) for a, b in zip(before, found, strict=True)]
        for index, layer in enumerate(self.decoder.stack):
            peaks_2G1K = torch.stack(peaks[2 * index : 2 * index + 2])
            scales_2G1K = (peaks_2G1K * (_KV_MARGIN / INT8_PEAK)).clamp(min=1e-12)
            layer.store = KvStore(torch.int8, scales_2G1K.clone())

    def _output_errors(self) -> dict[tuple[int, str], float]:
        """Relative error of each projection's output on exact inputs, in one pass."""
        sums: dict[tuple[int, str], list[float]] = {}
        handles = []
        for index, name, module in self.sites():
            twin, total = Int8Projection(module), sums.setdefault((index, name), [0.0, 0.0])

            def hook(
                _: object, args: tuple[Tensor], out_TO: Tensor, twin: Int8Projection = twin,
                total: list[float] = total,
            ) -> None:  # fmt: skip
                total[0] += float((twin(args[0]) - out_TO).square().sum())
                total[1] += float(out_TO.square().sum())

            handles.append(module.register_forward_hook(hook))
        self.graphs.embeddings(self._few())
        for handle in handles:
            handle.remove()
        return {site: (wrong / max(all_, 1e-30)) ** 0.5 for site, (wrong, all_) in sums.items()}

    def _losses_alone(self, exact_QZ: Tensor) -> dict[tuple[int, str], float]:
        """1 - mean cosine with one projection int8 at a time."""
        few = self._few()
        wanted_QZ = exact_QZ[: sum(len(sample.packed.emb_index_Q) for sample in few)]
        losses = {}
        for index, name, _ in tqdm(list(self.sites()), desc="sensitivity", unit="projection"):
            floats = self._swap([(index, name)])
            losses[index, name] = 1.0 - float(self.cosines(wanted_QZ, few).mean())
            self._restore(floats)
        return losses

    def _few(self) -> list[Sample]:
        """The samples that one-by-one passes run over."""
        sizes = [module.weight.numel() for _, _, module in self.sites()]
        flops_per_token = 2.0 * sum(sizes) * len(sizes)
        few: list[Sample] = []
        num_tokens = 0
        for sample in self.samples:
            num_tokens += len(sample.layout) + len(sample.packed.token_ids_S)
            if few and num_tokens * flops_per_token > _SENSITIVITY_FLOPS:
                break
            few.append(sample)
        return few

    def _swap(self, sites: list[tuple[int, str]]) -> dict[tuple[int, str], Projection]:
        """Make projections int8; the float ones come back."""
        floats = {}
        for index, name in sites:
            layer = self.decoder.stack[index]
            floats[index, name] = getattr(layer, name)
            setattr(layer, name, Int8Projection(floats[index, name]))
        return floats

    def _restore(self, floats: dict[tuple[int, str], Projection]) -> None:
        for (index, name), module in floats.items():
            setattr(self.decoder.stack[index], name, module)
