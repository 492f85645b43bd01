"""A tiny random model with odd sizes, its bundle and its proof, made once per session."""

from pathlib import Path

import pytest

from qanchor.bundle.reader import open_bundle
from qanchor.config import ModalitySpec, ProfileSchema, Scenario
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.random_source import TINY, random_source
from qanchor_export.runner import BundleRunner
from qanchor_export.source import ExportSource
from qanchor_export.verify import Check, verify

SCHEMA = ProfileSchema(
    modalities=(
        ModalitySpec(name="bill", max_events=53, max_event_tokens=11),
        ModalitySpec(
            name="app",
            max_events=17,
            max_event_tokens=9,
            group_by="day",
            template="{days_ago} days ago: {items}",
            measured_types=("pays", "opens"),
        ),
        ModalitySpec(name="tabular", kind="attributes", max_events=5, max_event_tokens=8),
    ),
    has_measures=True,
)


@pytest.fixture(scope="session")
def source() -> ExportSource:
    """3 layers, 4 query heads over 2 KV heads of width 10, hidden width 36."""
    made = random_source(TINY, SCHEMA)
    prompt = tuple(tuple(0.1 * (row + column) for column in range(36)) for row in range(2))
    question = "Will the user travel?"
    tuned = Scenario(name="travel", question=question, soft_prompt=prompt)
    compiled = Scenario(name="short", question=question, soft_prompt=prompt, is_compiled=True)
    return ExportSource(
        model=made.model,
        recipe=made.recipe,
        schema=made.schema,
        tokens=made.tokens,
        tokenizer=made.tokenizer,
        event_tokenizer=made.event_tokenizer,
        scenarios=(tuned, compiled),
        max_query_len=made.max_query_len,
    )


@pytest.fixture(scope="session")
def bundle_path(source: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source's bundle; tests must not write to it."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(source, path)
    return path


@pytest.fixture(scope="session")
def runner(bundle_path: Path) -> BundleRunner:
    """An ONNX Runtime runner of the bundle."""
    return BundleRunner(open_bundle(bundle_path), num_threads=1)


@pytest.fixture(scope="session")
def checks(runner: BundleRunner, source: ExportSource) -> dict[str, Check]:
    """Every check of `qanchor verify --checkpoint`, by name."""
    return {check.name: check for check in verify(runner, source, num_users=4)}
