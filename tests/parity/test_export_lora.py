"""A model with LoRA adapters exports merged, stays as it was, and equals torch."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from qanchor.bundle.reader import open_bundle
from qanchor.decoder import LoraConfig, add_lora
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.runner import BundleRunner
from qanchor_export.source import ExportSource
from qanchor_export.verify import compare


@pytest.fixture
def lora_source(source: ExportSource) -> ExportSource:
    """The tiny model with adapters that do something on decoder, text encoder and new tokens."""
    model = copy.deepcopy(source.model)
    config = LoraConfig(rank=3, alpha=6)
    tokens = [source.tokens.user_emb, *source.tokens.modality_start]
    model.language_model = add_lora(model.language_model, config, config.decoder_targets, tokens)
    encoder = model.event_encoder
    encoder.model = add_lora(encoder.model, config, config.encoder_targets, [])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.1)
    return dataclasses.replace(source, model=model.eval(), recipe="tiny-lora")


# Said by peft to transformers, about neither of our doings.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_model_exports_merged_and_equal(
    lora_source: ExportSource, bundle_path: Path, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in lora_source.model.state_dict().items()}
    manifest = export_bundle(lora_source, tmp_path / "lora")
    after = lora_source.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = open_bundle(bundle_path)
    assert manifest.model_id != plain.manifest.model_id
    bundle = open_bundle(tmp_path / "lora")
    runner = BundleRunner(bundle, num_threads=1)
    for case, plain_case in zip(bundle.parity, plain.parity, strict=True):
        prefix = runner.encode_prefix(case.rendered)
        found = runner.suffix([(prefix, [runner.query(text) for text in case.queries])])
        check = compare("LoRA", found, np.array(case.embeddings, dtype=np.float32))
        assert check.is_ok, f"max {check.max_abs:.3e}, mean {check.mean_abs:.3e}"
        assert np.abs(found - np.array(plain_case.embeddings)).max() > 1e-2
