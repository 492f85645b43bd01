"""The gRPC services: unpack, call the core, pack; failures become a status in one place.

Runs on the event loop; never calls the engine. The meaning of every call stands in the protos.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.rpc import status_pb2

from qanchor import __version__
from qanchor.config import ProfileSchema
from qanchor.errors import QAnchorError
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
from qanchor_server import wire
from qanchor_server.core import Core
from qanchor_server.status import abort, to_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Embeds users; one call or one stream."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """One user, N queries; on cancel or deadline the work leaves the queue."""
        response = embedding_pb2.EmbedResponse()
        try:
            await self._embed(request, response, context.time_remaining)
        except QAnchorError as error:
            await abort(context, error)
        return response

    async def StreamEmbed(
        self,
        request_iterator: AsyncIterator[embedding_pb2.StreamEmbedRequest],
        context: Context,
    ) -> AsyncIterator[embedding_pb2.StreamEmbedResponse]:
        """Any users; replies as they are ready, at most `max_stream_in_flight` not yet sent."""
        replies: asyncio.Queue[embedding_pb2.StreamEmbedResponse | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._core.config.max_stream_in_flight)

        async def answer(item: embedding_pb2.StreamEmbedRequest) -> None:
            replies.put_nowait(await self._stream_item(item, context.time_remaining))

        async def read() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    async for item in request_iterator:
                        await room.acquire()
                        tasks.create_task(answer(item))
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (reply := await replies.get()) is not None:
                yield reply
                room.release()
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _stream_item(
        self,
        item: embedding_pb2.StreamEmbedRequest,
        time_remaining: Callable[[], float | None],
    ) -> embedding_pb2.StreamEmbedResponse:
        response = embedding_pb2.StreamEmbedResponse(
            request_id=item.request_id, status=status_pb2.Status()
        )
        try:
            await self._embed(item, response, time_remaining)
        except QAnchorError as error:
            failure = error
        # One item's failure, whatever it is, must not end the stream of all others.
        except Exception as error:
            log.exception("item %r of a stream failed", item.request_id)
            failure = QAnchorError(f"unexpected {type(error).__name__}; see the server's log")
        else:
            return response
        return embedding_pb2.StreamEmbedResponse(
            request_id=item.request_id, status=to_status(failure)
        )

    async def _embed(
        self,
        request: embedding_pb2.EmbedRequest | embedding_pb2.StreamEmbedRequest,
        response: embedding_pb2.EmbedResponse | embedding_pb2.StreamEmbedResponse,
        time_remaining: Callable[[], float | None],
    ) -> None:
        core = self._core
        core.admission.check_open()
        core.admission.check_num_queries(len(request.queries))
        wire.check_encoding(request.encoding)
        queries = await wire.parse_queries(request.queries, core.resolver)
        suffixes = tuple(query.suffix for query in queries)
        # Not before: a question's first reading takes time, too.
        answer = await core.embed(request.user_id, suffixes, time_remaining())
        wire.write_results(response, answer, queries, request.encoding)
        wire.write_provenance(response.provenance, answer, core.bundle.manifest)


class ProfileService(profile_pb2_grpc.ProfileServiceServicer):
    """Stores, warms, describes and deletes profiles."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def PutProfile(
        self, request: profile_pb2.PutProfileRequest, context: Context
    ) -> profile_pb2.PutProfileResponse:
        """Durable when answered."""
        try:
            profile = wire.parse_profile(request, self._schema, **self._bounds())
            ref = (await self._core.put(profile)).ref
        except QAnchorError as error:
            await abort(context, error)
        return profile_pb2.PutProfileResponse(
            prefix_version=ref.version,
            digest=ref.digest,
            as_of=wire.timestamp(ref),
            num_prefix_tokens=ref.num_tokens,
        )

    async def AppendEvents(
        self, request: profile_pb2.AppendEventsRequest, context: Context
    ) -> profile_pb2.AppendEventsResponse:
        """Durable when answered; once per append_id."""
        try:
            append = wire.parse_append(request, self._schema, **self._bounds())
            prepared, is_duplicate = await self._core.append(append)
        except QAnchorError as error:
            await abort(context, error)
        ref = prepared.ref
        return profile_pb2.AppendEventsResponse(
            prefix_version=ref.version,
            digest=ref.digest,
            as_of=wire.timestamp(ref),
            num_prefix_tokens=ref.num_tokens,
            is_duplicate=is_duplicate,
        )

    async def WarmProfile(
        self, request: profile_pb2.WarmProfileRequest, context: Context
    ) -> profile_pb2.WarmProfileResponse:
        """Answers when the prefix is on the device."""
        try:
            answer = await self._core.warm(
                request.user_id, request.pin_seconds, context.time_remaining()
            )
        except QAnchorError as error:
            await abort(context, error)
        response = profile_pb2.WarmProfileResponse()
        wire.write_provenance(response.provenance, answer, self._core.bundle.manifest)
        return response

    async def GetProfileState(
        self, request: profile_pb2.GetProfileStateRequest, context: Context
    ) -> profile_pb2.GetProfileStateResponse:
        """Moves nothing, encodes nothing."""
        try:
            state = await self._core.state(request.user_id)
        except QAnchorError as error:
            await abort(context, error)
        ref = state.prepared.ref
        return profile_pb2.GetProfileStateResponse(
            prefix_version=ref.version,
            digest=ref.digest,
            as_of=wire.timestamp(ref),
            num_prefix_tokens=ref.num_tokens,
            num_prefix_events=sum(state.prepared.rendered.num_events),
            cache_state=wire.cache_state(state.found),
        )

    async def DeleteProfile(
        self, request: profile_pb2.DeleteProfileRequest, context: Context
    ) -> profile_pb2.DeleteProfileResponse:
        """Gone from store, device, host memory and disk when answered."""
        try:
            was_stored = await self._core.delete(request.user_id)
        except QAnchorError as error:
            await abort(context, error)
        return profile_pb2.DeleteProfileResponse(was_stored=was_stored)

    @property
    def _schema(self) -> ProfileSchema:
        return self._core.bundle.manifest.profile_schema

    def _bounds(self) -> dict[str, int]:
        return {
            "now_s": int(self._core.now_s()),
            "skew_s": self._core.config.clock_skew_seconds,
            "max_events": self._core.config.max_profile_events,
        }


class ScenarioService(scenario_pb2_grpc.ScenarioServiceServicer):
    """Lists the scenarios and has their files read again."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def ListScenarios(
        self, request: scenario_pb2.ListScenariosRequest, context: Context
    ) -> scenario_pb2.ListScenariosResponse:
        """All of them, by name."""
        return scenario_pb2.ListScenariosResponse(scenarios=wire.scenarios(self._core.resolver))

    async def ReloadScenarios(
        self, request: scenario_pb2.ReloadScenariosRequest, context: Context
    ) -> scenario_pb2.ReloadScenariosResponse:
        """All files or none."""
        try:
            reloaded = await self._core.reload_scenarios()
        except QAnchorError as error:
            await abort(context, error)
        return scenario_pb2.ReloadScenariosResponse(
            changed=reloaded.changed,
            removed=reloaded.removed,
            scenarios=wire.scenarios(self._core.resolver),
        )


class ServerInfoService(server_info_pb2_grpc.ServerInfoServiceServicer):
    """Describes model, limits, tiers and counters."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._start_s = time.monotonic()

    async def GetServerInfo(
        self, request: server_info_pb2.GetServerInfoRequest, context: Context
    ) -> server_info_pb2.GetServerInfoResponse:
        """Answered in every state of the server, also while it starts and drains."""
        core = self._core
        manifest, config = core.bundle.manifest, core.config
        schema = manifest.profile_schema
        kinds = {
            "events": server_info_pb2.MODALITY_KIND_EVENTS,
            "attributes": server_info_pb2.MODALITY_KIND_ATTRIBUTES,
        }
        return server_info_pb2.GetServerInfoResponse(
            server_version=__version__,
            model_id=manifest.model_id,
            export_id=manifest.export_id,
            recipe=manifest.recipe,
            embedding_dim=manifest.dims.embedding_dim,
            max_prefix_len=manifest.limits.max_prefix_len,
            max_query_len=manifest.limits.max_query_len,
            max_queries_per_request=config.max_queries_per_request,
            max_message_bytes=config.max_message_bytes,
            window_days=schema.window_days,
            modalities=[
                server_info_pb2.Modality(
                    name=spec.name, kind=kinds[spec.kind], max_events=spec.max_events
                )
                for spec in schema.modalities
            ],
            tiers=self._tiers(),
            counters=self._counters(),
            uptime_seconds=time.monotonic() - self._start_s,
        )

    def _tiers(self) -> list[server_info_pb2.TierUse]:
        return [
            server_info_pb2.TierUse(
                tier=wire.cache_state(found),
                budget_bytes=use.budget_bytes,
                used_bytes=use.used_bytes,
                num_users=use.num_users,
                num_hits=use.num_hits,
                num_evicted=use.num_evicted,
                num_failed=use.num_failed,
            )
            for found, use in self._core.worker.stats.tiers.items()
        ]

    def _counters(self) -> server_info_pb2.Counters:
        stats = self._core.worker.stats
        return server_info_pb2.Counters(
            num_answered=stats.num_answered,
            num_encoded=stats.num_encoded,
            num_suffix_steps=stats.num_suffix_steps,
            num_prefill_steps=stats.num_prefill_steps,
            num_restore_steps=stats.num_restore_steps,
            num_expired=stats.num_expired,
            num_cancelled=stats.num_cancelled,
            num_overloaded=self._core.admission.num_overloaded,
        )


def add_services(server: grpc.aio.Server, core: Core) -> list[str]:
    """Register the four services; returns their full names."""
    embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(EmbeddingService(core), server)
    profile_pb2_grpc.add_ProfileServiceServicer_to_server(ProfileService(core), server)
    scenario_pb2_grpc.add_ScenarioServiceServicer_to_server(ScenarioService(core), server)
    server_info_pb2_grpc.add_ServerInfoServiceServicer_to_server(ServerInfoService(core), server)
    files = (embedding_pb2, profile_pb2, scenario_pb2, server_info_pb2)
    return [
        service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()
    ]
