"""What stands around the service: Prometheus metrics over HTTP, and transport security."""

import shutil
import subprocess
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qanchor.client import AsyncClient, ClientError
from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig


def samples(port: int) -> dict[tuple[str, str], float]:
    """Values by metric name and tier or cache state."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    assert "ada" not in text, "a user id is shown"
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith("qanchor_")
            label = sample.labels.get("tier") or sample.labels.get("cache_state", "")
            found[sample.name, label] = sample.value
    return found


async def test_metrics_tell_what_happened_and_name_no_user(start_server, profile):
    running = await start_server(
        metrics_address="127.0.0.1:0", kv_pool_bytes=112, kv_host_bytes=256
    )
    for user in ("ada", "bob", "ada"):
        await running.client.put_profile(profile(user))
        await running.client.embed(user, scenarios=["tea_fan"])
    # The counts of the last step are shown after the next turn of the worker.
    await running.client.warm_profile("ada")
    found = samples(running.server.core.metrics.port)
    assert found["qanchor_prefixes_encoded_total", ""] == 2
    assert found["qanchor_tier_hits_total", "host"] == 1
    assert found["qanchor_tier_evictions_total", "device"] == 2
    assert found["qanchor_tier_budget_bytes", "device"] == 112
    assert found["qanchor_tier_users", "device"] == 1
    assert found["qanchor_suffix_seconds_count", "host"] == 1
    assert found["qanchor_prefill_seconds_count", "encoded"] == 2
    assert found["qanchor_requests_overloaded_total", ""] == 0
    running.server.request_stop()
    await running.server.wait_closed()
    with pytest.raises(OSError, match="refused"):
        samples(running.server.core.metrics.port)


async def test_an_address_that_is_taken_is_named(start_server):
    running = await start_server(metrics_address="127.0.0.1:0")
    taken = f"127.0.0.1:{running.server.core.metrics.port}"
    with pytest.raises(ConfigError, match="metrics_address"):
        await start_server(metrics_address=taken)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that is its own CA, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    folder = tmp_path_factory.mktemp("pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


async def test_a_server_with_a_certificate_is_spoken_to_in_secret(start_server, pem):
    files = {"tls_cert": str(pem / "cert.pem"), "tls_key": str(pem / "key.pem")}
    running = await start_server(**files)
    port = running.address.rpartition(":")[2]
    ca, key = (pem / "cert.pem").read_bytes(), (pem / "key.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca)
    async with AsyncClient(f"localhost:{port}", credentials=credentials) as client:
        assert (await client.server_info()).model_id == "fake-model"
    with pytest.raises(ClientError, match="UNAVAILABLE"):
        await running.client.server_info(timeout=2)
    running.server.request_stop()
    await running.server.wait_closed()
    running = await start_server(**files, tls_client_ca=str(pem / "cert.pem"))
    port = running.address.rpartition(":")[2]
    async with AsyncClient(f"localhost:{port}", credentials=credentials) as client:
        with pytest.raises(ClientError):
            await client.server_info(timeout=2)
    known = grpc.ssl_channel_credentials(ca, key, ca)
    async with AsyncClient(f"localhost:{port}", credentials=known) as client:
        assert (await client.server_info()).model_id == "fake-model"


async def test_half_a_certificate_is_refused(start_server):
    with pytest.raises(ConfigError, match="belong together"):
        ServerConfig(tls_cert="cert.pem")
    with pytest.raises(ConfigError, match="cannot be read"):
        await start_server(tls_cert="none.pem", tls_key="none.pem")
