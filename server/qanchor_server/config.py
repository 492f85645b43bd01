"""Settings of a server process. Must not know grpc or an engine."""

from qanchor.config import Config
from qanchor.errors import ConfigError


class ServerConfig(Config, frozen=True, kw_only=True):
    """How one server process serves one bundle."""

    address: str = "127.0.0.1:50051"
    """host:port to listen on; port 0 lets the system choose. No transport security: bind to a
    trusted network or put a TLS proxy in front."""
    data_dir: str = "qanchor-data"
    """Directory of the profile store; created when missing, used by one server at a time."""
    execution_provider: str = "CPUExecutionProvider"
    """ONNX Runtime execution provider that runs the graphs."""
    intra_op_threads: int = 0
    """Threads of one graph operator; 0: as many as physical cores."""
    allow_spinning: bool = False
    """Let idle ONNX Runtime threads spin: a little lower latency for whole cores of idle load."""
    kv_pool_bytes: int = 2 << 30
    """Most bytes of prefix keys and values held. More users stay encoded with more."""
    slab_ladder: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 1536, 2048)
    """Slot lengths in tokens; steps above the model's longest prefix are dropped and the longest
    prefix is added. Finer: less waste per slot, less reuse between users."""
    chunk_len: int = 128
    """Prefix positions per prefill step. Smaller: a waiting query is served sooner, the encoding
    takes longer."""
    max_event_tokens_per_step: int = 1024
    """Padded event-text tokens per prefill step, for the same trade."""
    max_step_tokens: int = 512
    """Most packed suffix tokens of one suffix step; at least the model's max_query_len."""
    max_step_users: int = 16
    """Most users in one suffix step; several cost a copy of their keys and values."""
    max_suffix_run: int = 8
    """Suffix steps in a row while a prefill waits; then one prefill step runs."""
    max_queue: int = 1024
    """Queries waiting or running; beyond, requests are refused with RESOURCE_EXHAUSTED."""
    max_queries_per_request: int = 64
    """Queries of one request."""
    max_stream_in_flight: int = 256
    """Items of one stream worked on at a time; then the server reads no further."""
    max_profile_events: int = 20_000
    """Events stored per user."""
    max_message_bytes: int = 8 << 20
    """Largest request message; gRPC refuses larger ones with RESOURCE_EXHAUSTED."""
    event_vector_cache: int = 65_536
    """Event texts whose vectors are kept (event_dim * 4 bytes each)."""
    prepared_prefix_cache: int = 4096
    """Users whose rendered profile is kept in host memory; others are read from the store."""
    query_cache: int = 4096
    """Free-text queries whose token ids are kept."""
    grace_seconds: float = 10.0
    """Time for requests in flight after SIGTERM or SIGINT."""
    clock_skew_seconds: int = 300
    """How far an as-of time may lie ahead of the server's clock."""

    def __post_init__(self) -> None:
        positive = (
            "kv_pool_bytes", "chunk_len", "max_event_tokens_per_step", "max_step_tokens",
            "max_step_users", "max_suffix_run", "max_queue", "max_queries_per_request",
            "max_stream_in_flight", "max_profile_events", "max_message_bytes",
            "event_vector_cache", "prepared_prefix_cache", "query_cache",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1", "raise it")
        for name in ("intra_op_threads", "grace_seconds", "clock_skew_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative", "use 0")
        if any(step < 1 for step in self.slab_ladder):
            raise ConfigError(
                "slab_ladder", self.slab_ladder, "lengths must be at least 1", "remove it"
            )


def slab_capacities(ladder: tuple[int, ...], max_prefix_len: int) -> tuple[int, ...]:
    """Slot lengths in tokens, ascending, the last one holding the model's longest prefix."""
    return (*sorted({step for step in ladder if step < max_prefix_len}), max_prefix_len)


def check_against_model(
    config: ServerConfig, *, max_prefix_len: int, max_query_len: int, kv_bytes_per_token: int
) -> None:
    """Raise ConfigError where the settings cannot serve the bundle's model at all."""
    if config.max_step_tokens < max_query_len:
        raise ConfigError(
            "max_step_tokens",
            config.max_step_tokens,
            f"must hold one query of max_query_len={max_query_len} tokens",
            f"set at least {max_query_len}",
        )
    needed = max_prefix_len * kv_bytes_per_token
    if config.kv_pool_bytes < needed:
        raise ConfigError(
            "kv_pool_bytes",
            config.kv_pool_bytes,
            f"must hold one prefix of {max_prefix_len} tokens ({needed} bytes)",
            f"set at least {needed}",
        )
