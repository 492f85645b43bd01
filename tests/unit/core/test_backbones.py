"""Real loading code on small checkpoints made here: Hugging Face directories, LoRA, wrong ones."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM

from qanchor.checkpoint import Checkpoint, build_model, load_checkpoint
from qanchor.config import Config, override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.decoder import DecoderConfig, LoraConfig, add_lora, build_language_model
from qanchor.encoder.event_encoder import EventEncoderConfig, build_event_encoder, load_text_encoder
from qanchor.errors import ConfigError
from qanchor.tokenization import train_decoder_tokenizer, train_event_tokenizer
from qanchor.train.pretrain import UNTRAINED, pretrain
from qanchor.train.recipes import TrainConfig, qwen2_5_0_5b

TEXTS = ["12 days ago: takeout, Noodle House, 30 yuan", "Will the user order takeout food?"]


@pytest.fixture(scope="module")
def decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with its tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("qwen2")
    tokenizer = train_decoder_tokenizer(TEXTS, 300)
    qwen2 = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    Qwen2ForCausalLM(qwen2).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("bert")
    tokenizer = train_event_tokenizer(TEXTS, 300)
    bert = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(2)
    BertModel(bert).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_the_methods_recipe_trains_adapters_on_frozen_backbones(
    decoder_dir: Path, encoder_dir: Path, tmp_path: Path
) -> None:
    generate_wallet(tmp_path / "data", 40, seed=5)
    dataset = open_dataset(tmp_path / "data")
    write_triples(dataset, tmp_path / "triples.parquet")
    recipe = override(
        qwen2_5_0_5b(),
        [
            f"decoder.path={decoder_dir}", f"event_encoder.path={encoder_dir}", "lora.rank=4",
            "train.steps=3", "train.users_per_batch=4", "train.warmup_steps=1",
            "train.heldout_users=0", "train.num_threads=1", "train.users_per_piece=2",
            "train.gradient_checkpointing=true", "train.tensorboard=true",
        ],
    )  # fmt: skip
    latest = pretrain(recipe, dataset, tmp_path / "triples.parquet", tmp_path / "run")
    before = load_checkpoint(tmp_path / "run" / UNTRAINED)
    after = load_checkpoint(latest)
    moved = {
        name
        for (name, old), new in zip(
            before.model.named_parameters(), after.model.parameters(), strict=True
        )
        if not torch.equal(old, new)
    }
    assert any("lora_B" in name and "language_model" in name for name in moved)
    assert any("lora_B" in name and "event_encoder" in name for name in moved)
    assert any(name.startswith("encoder.event_adapters") for name in moved)
    assert any("trainable_tokens" in name for name in moved)
    assert not [name for name in moved if "base_layer" in name or "original_module" in name]
    pretrained = Qwen2ForCausalLM.from_pretrained(decoder_dir).model.layers[0].self_attn.q_proj
    kept = next(
        parameter
        for name, parameter in after.model.named_parameters()
        if name.endswith("layers.0.self_attn.q_proj.base_layer.weight")
    )
    assert torch.equal(kept, pretrained.weight)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_directory_without_a_model_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.path.*no config\.json"):
        build_language_model(DecoderConfig(path=str(tmp_path)), 10)
    with pytest.raises(ConfigError, match=r"event_encoder\.path.*no config\.json"):
        build_event_encoder(EventEncoderConfig(path=str(tmp_path)), 10, pad_id=0, cls_id=1)


def test_a_model_of_another_kind_is_refused(decoder_dir: Path, encoder_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.model_type='bert': must be qwen2"):
        build_language_model(DecoderConfig(path=str(encoder_dir)), 10)
    with pytest.raises(ConfigError, match=r"event_encoder\.model_type='qwen2': must be bert"):
        build_event_encoder(EventEncoderConfig(path=str(decoder_dir)), 10, pad_id=0, cls_id=1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type",
        ),
    ],
)
def test_a_decoder_the_graphs_cannot_compute_is_refused_before_training(
    decoder_dir: Path, tmp_path: Path, change: dict[str, object], field: str
) -> None:
    found = json.loads((decoder_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | change))
    with pytest.raises(ConfigError) as caught:
        build_language_model(DecoderConfig(path=str(tmp_path)), 10)
    assert caught.value.field == f"decoder.{field}"


@pytest.mark.parametrize("field", ["event_encoder.path", "query_encoder.path"])
def test_an_encoder_the_graph_cannot_compute_is_refused_before_training(
    encoder_dir: Path, tmp_path: Path, field: str
) -> None:
    found = json.loads((encoder_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"hidden_act": "relu"}))
    with pytest.raises(ConfigError) as caught:
        load_text_encoder(tmp_path, field)
    assert caught.value.field == f"{field.removesuffix('.path')}.hidden_act"


def test_a_lora_target_the_model_lacks_is_refused() -> None:
    model = build_language_model(DecoderConfig(hidden_dim=16, num_layers=1), 40)
    with pytest.raises(ConfigError, match=r"lora targets='w_proj'.*did you mean"):
        add_lora(model, LoraConfig(rank=2), ("q_proj", "w_proj"), [])


def test_limits_beyond_the_backbones_positions_are_refused(checkpoint: Checkpoint) -> None:
    for assignment, field in (
        ("event_encoder.max_text_len=8", r"shop\.max_event_tokens=12.*8 positions"),
        ("decoder.max_positions=150", r"decoder\.max_positions=150: .* need 1[0-9][0-9];"),
    ):
        recipe = override(checkpoint.meta.recipe, [assignment])
        meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
        with pytest.raises(ConfigError, match=field):
            build_model(meta, checkpoint.tokenizer, checkpoint.event_tokenizer)


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (LoraConfig, {"rank": 0}, r"lora\.rank"),
        (LoraConfig, {"dropout": 1.0}, r"lora\.dropout"),
        (DecoderConfig, {"num_heads": 3}, r"decoder\.hidden_dim=128"),
        (DecoderConfig, {"num_heads": 4, "num_kv_heads": 3}, r"decoder\.num_heads=4"),
        (TrainConfig, {"users_per_piece": -1}, r"train\.users_per_piece"),
        (TrainConfig, {"users_per_batch": 0}, r"train\.users_per_batch"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    kind: type[Config], values: dict[str, float], field: str
) -> None:
    with pytest.raises(ConfigError, match=field):
        kind(**values)


def test_an_untrained_small_encoder_tells_texts_apart() -> None:
    """Were CLS more than what it reads, all texts would start out nearly parallel."""
    torch.manual_seed(0)
    encoder = build_event_encoder(EventEncoderConfig(), 300, pad_id=0, cls_id=1).eval()
    texts = torch.randint(3, 300, (64, 12))
    texts[:, 0] = 1
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(encoder(texts), dim=-1)
    between = (vectors @ vectors.T)[~torch.eye(64, dtype=torch.bool)]
    assert between.mean() < 0.7
