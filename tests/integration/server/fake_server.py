"""A server process with the fake engine, for tests that kill or signal it.

python fake_server.py DATA_DIR PORT_FILE [NAME=VALUE ...]
"""

import asyncio
import logging
import sys
from pathlib import Path

from fake_engine import FakeEngine, fake_bundle

from qanchor.config import override
from qanchor_server.config import ServerConfig
from qanchor_server.main import run


def main(data_dir: str, port_file: str, *settings: str) -> int:
    """Serve until signalled; the setting step_seconds=X slows the engine."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    step_seconds = 0.0
    kept = []
    for setting in settings:
        if setting.startswith("step_seconds="):
            step_seconds = float(setting.partition("=")[2])
        else:
            kept.append(setting)
    config = override(ServerConfig(address="127.0.0.1:0", data_dir=data_dir), kept)
    engine = FakeEngine(step_seconds)
    return asyncio.run(run(config, fake_bundle(), lambda: engine, port_file=Path(port_file)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
