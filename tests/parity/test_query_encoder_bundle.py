"""A bundle whose questions a sentence encoder reads: torch = ONNX Runtime = the server."""

import asyncio
import copy
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import pytest_asyncio
import torch
from transformers import MPNetConfig, MPNetModel

from qanchor import config
from qanchor.bundle.manifest import (
    DEVICE_GRAPHS,
    QUERY_ENCODER,
    QUERY_TOKENIZER_FILE,
    QUERY_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Precision,
    QueryEncoderSpec,
    query_encoder_spec,
)
from qanchor.bundle.plans import graphs_hash
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.bundle.scenario_file import ScenarioFile
from qanchor.client import AsyncClient, ClientError
from qanchor.config import Scenario
from qanchor.data.profile import Event, Profile
from qanchor.encoder.query_encoder import QueryEncoder
from qanchor.errors import BundleError, ConfigError
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.random_source import TINY, random_source
from qanchor_export.reference import make_query
from qanchor_export.runner import BundleRunner
from qanchor_export.sample_users import SAMPLE_QUERIES
from qanchor_export.source import ExportSource
from qanchor_export.verify import verify
from qanchor_export.weights import Numbers
from qanchor_server.config import ServerConfig
from qanchor_server.engine.ort import OrtEngine, OrtOptions
from qanchor_server.failures import Overloaded, Retryable
from qanchor_server.main import Server
from qanchor_server.query_reader import QueryReader
from qanchor_server.resolve import Resolver
from tests.conftest import with_mpnet_ids
from tests.parity.conftest import SCHEMA

NOW_S = 1_000 * 86_400
NUM_ROWS = 3
MAX_READ_LEN = 40


@pytest.fixture(scope="module")
def reading(source: ExportSource) -> ExportSource:
    """The tiny model with a query encoder before it and three rows per question."""
    made = random_source(replace(TINY, num_query_rows=NUM_ROWS, max_query_len=MAX_READ_LEN), SCHEMA)
    return replace(made, scenarios=source.scenarios, checkpoint_id="of-a-checkpoint")


@pytest.fixture(scope="module")
def path(reading: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle; tests must not write to it."""
    path = tmp_path_factory.mktemp("reading") / "bundle"
    export_bundle(reading, path)
    return path


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return open_bundle(path)


def test_every_road_of_the_bundle_is_torchs(reading: ExportSource, bundle: Bundle) -> None:
    checks = verify(BundleRunner(bundle, num_threads=1), reading)
    names = [check.name for check in checks]
    assert "one full pass, the bundle's scenarios" in names
    for check in checks:
        assert check.is_ok, f"{check.name}: max {check.max_abs:.3e}, mean {check.mean_abs:.3e}"


def test_an_mpnet_reads_as_by_torch(reading: ExportSource, tmp_path: Path) -> None:
    assert reading.query_encoder is not None
    bert, tokenizer = reading.query_encoder.model.config, reading.query_encoder.tokenizer
    mpnet = MPNetConfig(
        vocab_size=bert.vocab_size, hidden_size=bert.hidden_size, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
        max_position_embeddings=bert.max_position_embeddings + 2,
    )  # fmt: skip
    torch.manual_seed(6)
    model = MPNetModel(mpnet, add_pooling_layer=False).eval()
    # It starts at nothing, and would not be missed.
    torch.nn.init.normal_(model.encoder.relative_attention_bias.weight)
    encoder = QueryEncoder(model, with_mpnet_ids(tokenizer))
    made = replace(reading, query_encoder=encoder)
    export_bundle(made, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    for check in verify(BundleRunner(bundle, num_threads=1), made, num_users=2):
        assert check.is_ok, f"{check.name}: max {check.max_abs:.3e}, mean {check.mean_abs:.3e}"
    runner = BundleRunner(bundle, num_threads=1)
    longest = SAMPLE_QUERIES[0]
    while len(encoder.tokens(longest + " too")) <= MAX_READ_LEN:
        longest += " too"
    for text in ("Why?", *SAMPLE_QUERIES, longest):
        found, wanted = runner.query(text).prompt_rows_KD, make_query(made, text).prompt_rows_KD
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_other_types_of_the_decoder_take_the_rows_too(
    reading: ExportSource, tmp_path: Path, precision: Precision
) -> None:
    export_bundle(reading, tmp_path / "bundle", numbers=Numbers(precision=precision))
    rounded = open_bundle(tmp_path / "bundle")
    for check in verify(BundleRunner(rounded, num_threads=1), reading, num_users=2):
        assert check.is_ok, f"{check.name}: max {check.max_abs:.3e}, mean {check.mean_abs:.3e}"


def test_a_question_of_any_length_is_read_as_by_torch(
    reading: ExportSource, bundle: Bundle
) -> None:
    runner, reader = BundleRunner(bundle, num_threads=1), QueryReader(bundle)
    texts = ["Why?", *SAMPLE_QUERIES, "Does it matter how long?" * 2]
    rows = []
    for text in texts:
        wanted = make_query(reading, text)
        for found in (runner.query(text), reader.query(text)):
            assert found.token_ids == ()
            assert found.suffix_len == NUM_ROWS + 1
            assert found.prompt_rows_KD is not None
            assert wanted.prompt_rows_KD is not None
            np.testing.assert_allclose(found.prompt_rows_KD, wanted.prompt_rows_KD, atol=2e-5)
        rows.append(wanted.prompt_rows_KD)
    assert np.abs(np.stack(rows)[1:] - rows[0]).max(axis=(1, 2)).min() > 1e-2


def test_the_query_encoder_lies_apart_from_what_engines_run(path: Path, bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.query_encoder == QueryEncoderSpec(num_rows=NUM_ROWS, max_text_len=MAX_READ_LEN)
    assert manifest.graphs[QUERY_ENCODER] == query_encoder_spec(manifest.dims, NUM_ROWS)
    assert {QUERY_TOKENIZER_FILE, QUERY_WEIGHTS_FILE} <= manifest.files.keys()
    for name in manifest.graphs:
        graph = onnx.load(str(path / f"{name}.onnx"), load_external_data=False).graph
        files = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert files == {WEIGHTS_FILE if name in DEVICE_GRAPHS else QUERY_WEIGHTS_FILE}
    # Plan files do not hold it, so another one does not make them useless.
    changed = {**manifest.files, QUERY_WEIGHTS_FILE: manifest.files[WEIGHTS_FILE]}
    other = msgspec.structs.replace(manifest, files=changed)
    assert graphs_hash(other) == graphs_hash(manifest)


def test_other_weights_of_the_query_encoder_are_another_model(
    reading: ExportSource, bundle: Bundle, tmp_path: Path
) -> None:
    assert reading.query_encoder is not None
    model = copy.deepcopy(reading.query_encoder.model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 0.5
    other = replace(reading, query_encoder=replace(reading.query_encoder, model=model))
    manifest = export_bundle(other, tmp_path / "other")
    assert manifest.model_id != bundle.manifest.model_id
    shutil.copytree(bundle.path, tmp_path / "mixed")
    shutil.copy(tmp_path / "other" / QUERY_WEIGHTS_FILE, tmp_path / "mixed")
    with pytest.raises(BundleError, match=QUERY_WEIGHTS_FILE):
        open_bundle(tmp_path / "mixed")


def test_a_question_too_long_to_read_is_refused_at_export(
    reading: ExportSource, tmp_path: Path
) -> None:
    long = Scenario(name="long", question="again and again " * MAX_READ_LEN)
    with pytest.raises(ConfigError, match=rf"long\.question.*takes {MAX_READ_LEN}"):
        export_bundle(replace(reading, scenarios=(long,)), tmp_path / "bundle")


def user(number: int) -> Profile:
    events = tuple(
        Event(
            time_s=NOW_S - 86_400 * (day + 1), modality="bill", event_type="buy",
            text=f"item {number * day}", value=None,
        )
        for day in range(number + 1)
    )  # fmt: skip
    return Profile(user_id=f"user-{number}", as_of_s=NOW_S, events=events, attributes={})


@pytest_asyncio.fixture
async def served(bundle: Bundle, tmp_path: Path) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """A server of the bundle with two users, and a client."""
    (tmp_path / "scenarios").mkdir()
    settings = ServerConfig(
        address="127.0.0.1:0", data_dir=str(tmp_path / "data"), intra_op_threads=1,
        kv_host_bytes=0, kv_disk_bytes=0, scenarios=str(tmp_path / "scenarios"), query_cache=4,
    )  # fmt: skip
    options = OrtOptions(intra_op_threads=1)
    server = Server(settings, bundle, lambda: OrtEngine(bundle, options), now_s=lambda: NOW_S)
    address = f"127.0.0.1:{await server.start()}"
    try:
        assert await server.wait_ready()
        async with AsyncClient(address) as client:
            for number in range(2):
                await client.put_profile(user(number))
            yield server, client
    finally:
        server.request_stop()
        await server.wait_closed()


async def test_the_server_reads_a_new_question_once_for_all_who_ask(
    served: tuple[Server, AsyncClient], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = served
    reader, texts = server.core.resolver.reader, ["Has nobody asked this?", "Or that, today?"]
    read, original = [], reader.query_of

    def counted(token_ids):  # type: ignore[no-untyped-def]
        read.append(tuple(token_ids))
        return original(token_ids)

    monkeypatch.setattr(reader, "query_of", counted)
    answers = await asyncio.gather(
        *(client.embed(f"user-{number % 2}", queries=texts) for number in range(12))
    )
    assert sorted(read) == sorted(tuple(bundle.encode_query(text)) for text in texts)
    runner = BundleRunner(bundle, num_threads=1)
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(answer.vectors, answers[number % 2].vectors, atol=1e-5)
    queries = [runner.query(text) for text in texts]
    prepared = await server.core.directory.current("user-1")
    wanted = runner.suffix([(runner.encode_prefix(prepared.rendered), queries)])
    np.testing.assert_allclose(answers[1].vectors, wanted, atol=2e-5)


async def test_scenarios_are_read_when_they_are_loaded(
    served: tuple[Server, AsyncClient], bundle: Bundle, tmp_path: Path
) -> None:
    _, client = served
    question = bundle.scenarios[0].question
    file = ScenarioFile(
        checkpoint_id="of-a-checkpoint", hidden_dim=bundle.manifest.dims.hidden_dim,
        scenarios=(Scenario(name="plain", question=question),),
    )  # fmt: skip
    config.save(file, tmp_path / "scenarios" / "new.json")
    await client.reload_scenarios()
    listed = {one.name: one for one in await client.list_scenarios()}
    assert (listed["plain"].num_prompt_rows, listed["plain"].num_suffix_tokens) == (0, NUM_ROWS + 1)
    assert listed["travel"].num_prompt_rows == 2
    assert listed["travel"].num_suffix_tokens == NUM_ROWS + 2 + 1
    assert listed["short"].num_suffix_tokens == 2 + 1
    by_name = await client.embed("user-1", scenarios=["plain"])
    by_text = await client.embed("user-1", queries=[question])
    np.testing.assert_allclose(by_name.vectors, by_text.vectors, atol=1e-5)


async def test_a_scenario_tuned_after_the_export_is_taken(
    served: tuple[Server, AsyncClient], bundle: Bundle, tmp_path: Path
) -> None:
    _, client = served
    width = bundle.manifest.dims.hidden_dim
    rows = tuple(tuple(0.01 * (row + column) for column in range(width)) for row in range(8))
    late = [
        Scenario(name="late", question="Will the user travel?", soft_prompt=rows),
        Scenario(name="flat", question="?", soft_prompt=rows, is_compiled=True),
    ]
    file = ScenarioFile(checkpoint_id="of-a-checkpoint", hidden_dim=width, scenarios=tuple(late))
    config.save(file, tmp_path / "scenarios" / "late.json")
    await client.reload_scenarios()
    runner = BundleRunner(bundle, num_threads=1)
    found = await client.embed("user-1", scenarios=["late", "flat"])
    prepared = await served[0].core.directory.current("user-1")
    wanted = runner.suffix(
        [(runner.encode_prefix(prepared.rendered), [runner.scenario(one) for one in late])]
    )
    np.testing.assert_allclose(found.vectors, wanted, atol=2e-5)


async def test_a_reading_that_fails_fails_for_all_who_wait_and_for_nobody_after(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(bundle, max_cached_queries=4)

    def failing(token_ids):  # type: ignore[no-untyped-def]
        raise Retryable("out of memory: here")

    with monkeypatch.context() as patch:
        patch.setattr(resolver.reader, "query_of", failing)
        asked = [resolver.text("Why now?", "q") for _ in range(3)]
        found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [Retryable] * 3
    assert (await resolver.text("Why now?", "q")).suffix.suffix_len == NUM_ROWS + 1


async def test_what_nobody_waits_for_is_not_read(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(bundle, max_cached_queries=4, max_unread=3)
    original, read = resolver.reader.query_of, []
    is_open = threading.Event()

    def slow(token_ids):  # type: ignore[no-untyped-def]
        read.append(tuple(token_ids))
        assert is_open.wait(30)
        return original(token_ids)

    monkeypatch.setattr(resolver.reader, "query_of", slow)
    asked = [asyncio.create_task(resolver.text(f"Number {n}?", "q")) for n in range(3)]
    while not read:
        await asyncio.sleep(0.001)
    for task in asked[1:]:
        task.cancel()
    await asyncio.gather(*asked[1:], return_exceptions=True)
    # Their places are free again, and a text that was given up can be asked anew.
    again = asyncio.create_task(resolver.text("Number 2?", "q"))
    await asyncio.sleep(0)
    is_open.set()
    await asyncio.gather(asked[0], again)
    assert read == [tuple(bundle.encode_query(f"Number {n}?")) for n in (0, 2)]


async def test_a_question_too_long_is_refused_with_the_encoders_count(
    served: tuple[Server, AsyncClient],
) -> None:
    _, client = served
    with pytest.raises(ClientError, match=f"at most {MAX_READ_LEN} are taken"):
        await client.embed("user-1", queries=["Why?", "again and again " * 40])


async def test_callers_who_leave_take_nothing_from_others(bundle: Bundle) -> None:
    resolver = Resolver(bundle, max_cached_queries=4)
    leaving = asyncio.create_task(resolver.text("Who asks first?", "q"))
    staying = asyncio.create_task(resolver.text("Who asks first?", "q"))
    await asyncio.sleep(0)
    leaving.cancel()
    found = await staying
    assert found.suffix.suffix_len == NUM_ROWS + 1
    assert await resolver.text("Who asks first?", "q") is found


async def test_new_questions_beyond_the_queue_are_refused(bundle: Bundle) -> None:
    resolver = Resolver(bundle, max_cached_queries=4, max_unread=2)
    asked = [asyncio.create_task(resolver.text(f"Number {n}?", "q")) for n in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 new texts wait"):
        await resolver.text("Number 3?", "q")
    known = await asyncio.gather(*asked)
    assert await resolver.text("Number 0?", "q") is known[0]
    assert (await resolver.text("Number 3?", "q")).suffix.suffix_len == NUM_ROWS + 1
