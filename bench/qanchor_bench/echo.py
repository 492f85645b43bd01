"""A grpc.aio server that answers nothing with nothing: what the wire itself costs here.

python -m qanchor_bench.echo PORT_FILE
"""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import grpc

SERVICE = "qanchor.bench.Echo"
METHOD = f"/{SERVICE}/Empty"


async def serve(port_file: Path) -> None:
    """Serve until SIGTERM; `port_file` gets the port."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(_empty)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"Empty": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    port_file.write_text(f"{port}\n", encoding="utf-8")
    await stop.wait()
    await server.stop(None)


async def _empty(request: bytes, context: Any) -> bytes:
    return request


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
