"""What grpc.health.v1 says of the server: SERVING only between parity proof and drain."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_Status = health_pb2.HealthCheckResponse.ServingStatus


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # no stubs
    """Health of the whole server and of each service; starts NOT_SERVING.

    Watchers are let go when the drain begins: an idle one must not hold it up.
    """

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = {"", *service_names}
        self._is_serving = False
        self._is_draining = False
        self._changed = asyncio.Condition()

    async def set_serving(self) -> None:
        """Say SERVING for every name, unless the drain has begun."""
        await self._change(is_serving=not self._is_draining)

    async def drain(self) -> None:
        """Say NOT_SERVING for good and end all watches."""
        self._is_draining = True
        await self._change(is_serving=False)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes, until the drain."""
        while True:
            sent = self._status(request.service)
            yield health_pb2.HealthCheckResponse(status=sent)
            async with self._changed:
                while self._status(request.service) == sent:
                    if self._is_draining:
                        return
                    await self._changed.wait()

    async def _change(self, *, is_serving: bool) -> None:
        async with self._changed:
            self._is_serving = is_serving
            self._changed.notify_all()

    def _status(self, service: str) -> int:
        if service not in self._names:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._is_serving else _Status.NOT_SERVING)
