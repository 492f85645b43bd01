"""Typed client of a Q-Anchor server: `Client` (blocking) and `AsyncClient` (asyncio). Torch-free.

with Client("127.0.0.1:50051") as client:
    client.put_profile(profile)
    result = client.embed("ada", scenarios=["coffee_fan"], queries=["Does she like tea?"])
    result.vectors  # float32 [2, embedding_dim], scenarios first
"""

from qanchor.client.aio import AsyncClient
from qanchor.client.errors import ClientError, FieldViolation
from qanchor.client.sync import Client
from qanchor.client.values import (
    AppendResult,
    CacheState,
    EmbedRequestItem,
    EmbedResult,
    ItemResult,
    ProfileState,
    Provenance,
    PutResult,
    ReloadResult,
    ScenarioInfo,
    ServerInfo,
    TierUse,
)

__all__ = [
    "AppendResult",
    "AsyncClient",
    "CacheState",
    "Client",
    "ClientError",
    "EmbedRequestItem",
    "EmbedResult",
    "FieldViolation",
    "ItemResult",
    "ProfileState",
    "Provenance",
    "PutResult",
    "ReloadResult",
    "ScenarioInfo",
    "ServerInfo",
    "TierUse",
]
