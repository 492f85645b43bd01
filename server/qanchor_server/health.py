"""What grpc.health.v1 says of the server: SERVING only between parity proof and drain."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class Health:
    """Health of the whole server and of each service; starts NOT_SERVING."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = ("", *service_names)
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined] # not in the stubs

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Register the health service, NOT_SERVING."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self.set_serving(False)

    async def set_serving(self, is_serving: bool) -> None:
        """Say SERVING or NOT_SERVING for every name."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in self._names:
            await self._servicer.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """Say NOT_SERVING for good."""
        await self._servicer.enter_graceful_shutdown()
