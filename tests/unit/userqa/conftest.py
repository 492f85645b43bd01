"""A small simulated wallet, a fake endpoint, and the run that joins the two."""

from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from qanchor.config import from_mapping
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.wallet import generate_wallet
from qanchor.userqa.config import UserQaConfig
from qanchor.userqa.endpoint import Address
from qanchor.userqa.outcomes import Report
from qanchor.userqa.synthesis import synthesise
from tests.unit.userqa.fake_endpoint import FakeEndpoint

KEY = "sk-secret-of-the-test"
Synthesise = Callable[..., Coroutine[Any, Any, Report]]


@pytest.fixture(scope="session")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A simulated wallet of 16 users."""
    return open_dataset(generate_wallet(tmp_path_factory.mktemp("data") / "wallet", 16, seed=3))


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    """A running server."""
    with FakeEndpoint() as server:
        yield server


@pytest.fixture
def synthesis(endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path) -> Synthesise:
    """Runs a synthesis against the server: synthesis(output name, **config fields)."""

    async def run(name: str = "out", **fields: Any) -> Report:
        config = from_mapping(UserQaConfig, fields)
        return await synthesise(wallet, tmp_path / name, config, Address(endpoint.url, "m", KEY))

    return run
