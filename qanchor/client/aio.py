"""The asyncio client; belongs to the event loop it is made on."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from qanchor.client import messages
from qanchor.client.errors import from_rpc_error
from qanchor.client.sync import CHANNEL_OPTIONS, DEFAULT_TIMEOUT_S
from qanchor.client.values import (
    AppendResult,
    EmbedRequestItem,
    EmbedResult,
    ItemResult,
    ProfileState,
    Provenance,
    PutResult,
    ReloadResult,
    ScenarioInfo,
    ServerInfo,
)
from qanchor.data.profile import Event, Profile
from qanchor.v1 import (
    embedding_pb2,
    embedding_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
    server_info_pb2,
    server_info_pb2_grpc,
)


class AsyncClient:
    """Calls one server; every call has a deadline and raises ClientError when it fails."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`timeout_s`: deadline of calls that name none. `credentials`: None sends in the clear."""
        self._timeout_s = timeout_s
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self._embedding = embedding_pb2_grpc.EmbeddingServiceStub(self._channel)
        self._profiles = profile_pb2_grpc.ProfileServiceStub(self._channel)
        self._scenarios = scenario_pb2_grpc.ScenarioServiceStub(self._channel)
        self._info = server_info_pb2_grpc.ServerInfoServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; calls in flight are cancelled."""
        await self._channel.close(None)

    async def embed(
        self,
        user_id: str,
        *,
        scenarios: Sequence[str] = (),
        queries: Sequence[str] = (),
        dtype: str = "float32",
        timeout: float | None = None,
    ) -> EmbedResult:
        """Embed a user: one row per scenario, then one per free-text query.

        `dtype` is the wire form, `float32` or `float16`; rows are float32 either way. `timeout`
        in seconds. Raises ClientError, InvalidInput.
        """
        request = messages.embed_request(user_id, scenarios, queries, dtype)
        return messages.embed_result(await self._call(self._embedding.Embed, request, timeout))

    async def stream_embed(
        self,
        items: Iterable[EmbedRequestItem] | AsyncIterable[EmbedRequestItem],
        *,
        dtype: str = "float32",
        timeout: float | None = None,
    ) -> AsyncIterator[ItemResult]:
        """Embed many users over one stream; results come as they are ready, in any order.

        The stream begins with the first step of the iteration and ends when it is left.
        `timeout` covers the whole stream. A failed item is an ItemResult with its error; raises
        ClientError only when the stream itself fails.
        """
        call = self._embedding.StreamEmbed(_requests(items, dtype), timeout=self._seconds(timeout))
        try:
            async for response in call:
                yield messages.item_result(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def put_profile(self, profile: Profile, *, timeout: float | None = None) -> PutResult:
        """Store a profile; durable on return. Raises ClientError."""
        request = messages.put_request(profile)
        return messages.put_result(await self._call(self._profiles.PutProfile, request, timeout))

    async def append_events(
        self,
        user_id: str,
        events: Sequence[Event],
        *,
        as_of_s: int | None = None,
        append_id: str = "",
        timeout: float | None = None,
    ) -> AppendResult:
        """Add events; with `append_id` a repeated call stores them once. Raises ClientError."""
        request = messages.append_request(user_id, events, as_of_s, append_id)
        return messages.append_result(
            await self._call(self._profiles.AppendEvents, request, timeout)
        )

    async def warm_profile(
        self, user_id: str, *, pin_seconds: int = 0, timeout: float | None = None
    ) -> Provenance:
        """Bring a prefix to the device now, for `pin_seconds` at least. Raises ClientError."""
        request = profile_pb2.WarmProfileRequest(user_id=user_id, pin_seconds=pin_seconds)
        response = await self._call(self._profiles.WarmProfile, request, timeout)
        return messages.provenance(response.provenance)

    async def profile_state(self, user_id: str, *, timeout: float | None = None) -> ProfileState:
        """What the server knows of a user. Raises ClientError."""
        request = profile_pb2.GetProfileStateRequest(user_id=user_id)
        return messages.profile_state(
            await self._call(self._profiles.GetProfileState, request, timeout)
        )

    async def delete_profile(self, user_id: str, *, timeout: float | None = None) -> bool:
        """Delete a user everywhere; True when one was stored. Raises ClientError."""
        request = profile_pb2.DeleteProfileRequest(user_id=user_id)
        response = await self._call(self._profiles.DeleteProfile, request, timeout)
        return bool(response.was_stored)

    async def list_scenarios(self, *, timeout: float | None = None) -> list[ScenarioInfo]:
        """The server's scenarios, by name. Raises ClientError."""
        request = scenario_pb2.ListScenariosRequest()
        response = await self._call(self._scenarios.ListScenarios, request, timeout)
        return messages.scenario_infos(response.scenarios)

    async def reload_scenarios(self, *, timeout: float | None = None) -> ReloadResult:
        """Have the server read its scenario files again, all or none. Raises ClientError."""
        request = scenario_pb2.ReloadScenariosRequest()
        response = await self._call(self._scenarios.ReloadScenarios, request, timeout)
        return messages.reload_result(response)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server runs and how it is doing. Raises ClientError."""
        request = server_info_pb2.GetServerInfoRequest()
        return messages.server_info(await self._call(self._info.GetServerInfo, request, timeout))

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=self._seconds(timeout))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    def _seconds(self, timeout: float | None) -> float:
        return self._timeout_s if timeout is None else timeout


async def _requests(
    items: Iterable[EmbedRequestItem] | AsyncIterable[EmbedRequestItem], dtype: str
) -> AsyncIterator[embedding_pb2.StreamEmbedRequest]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield messages.stream_request(item, dtype)
    else:
        for item in items:
            yield messages.stream_request(item, dtype)
