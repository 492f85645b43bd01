"""A running server with the fake engine, and channels to it."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine, fake_bundle

from qanchor.bundle.reader import Bundle
from qanchor.client import AsyncClient
from qanchor.data.profile import Event, Profile
from qanchor_server.config import ServerConfig
from qanchor_server.main import Server

NOW_S = 1_000 * 86_400
"""The server's clock in these tests, Unix seconds."""


@dataclass
class Running:
    """A server, its engine and an open client."""

    server: Server
    engine: FakeEngine
    client: AsyncClient
    channel: grpc.aio.Channel
    address: str


StartServer = Callable[..., Awaitable[Running]]


@pytest_asyncio.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Starts servers with settings as keywords; all are drained at the end of the test."""
    started: list[Running] = []

    async def start(
        engine: FakeEngine | None = None,
        bundle: Bundle | None = None,
        wait: bool = True,
        **settings: object,
    ) -> Running:
        engine = engine or FakeEngine()
        config = ServerConfig(
            **{  # type: ignore[arg-type] - any setting by keyword
                "address": "127.0.0.1:0",
                "data_dir": str(tmp_path / "data"),
                "slab_ladder": (),
                # One tier, unless a test asks for more.
                "kv_host_bytes": 0,
                "kv_disk_bytes": 0,
                "max_step_tokens": 64,
                "grace_seconds": 5.0,
                **settings,
            }
        )
        server = Server(config, bundle or fake_bundle(), lambda: engine, now_s=lambda: NOW_S)
        address = f"127.0.0.1:{await server.start()}"
        running = Running(
            server, engine, AsyncClient(address), grpc.aio.insecure_channel(address), address
        )
        started.append(running)
        if wait:
            assert await server.wait_ready()
            engine.num_encode_calls = engine.num_prefill_calls = 0
            engine.suffix_steps.clear()
        return running

    yield start
    for running in started:
        running.engine.gate.set()
        if running.engine.side_by_side is not None:
            running.engine.side_by_side.gate.set()
        await running.client.close()
        await running.channel.close()
        running.server.request_stop()
        await running.server.wait_closed()


@pytest_asyncio.fixture
async def running(start_server: StartServer) -> Running:
    """One server with default settings."""
    return await start_server()


def coffee_profile(user_id: str = "ada", days_ago: int = 0) -> Profile:
    """One "buy" event "coffee"; as of NOW_S its prefix sums to 540 (see fake_engine)."""
    event = Event(time_s=NOW_S - days_ago * 86_400, modality="buy", event_type="", text="coffee")
    return Profile(user_id=user_id, as_of_s=NOW_S, events=(event,))


@pytest.fixture
def profile() -> Callable[..., Profile]:
    """Makes the profile of one coffee."""
    return coffee_profile
