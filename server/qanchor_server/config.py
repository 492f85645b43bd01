"""Settings of a server process. Must not know grpc or an engine."""

from pathlib import Path
from typing import Literal

from qanchor.bundle.buckets import BucketLimits
from qanchor.config import Config
from qanchor.errors import ConfigError


class ServerConfig(Config, frozen=True, kw_only=True):
    """How one server process serves one bundle."""

    address: str = "127.0.0.1:50051"
    """host:port to listen on; port 0 lets the system choose. Without tls_cert in the clear: bind to
    a trusted network then."""
    tls_cert: str = ""
    """PEM file of the server's certificate chain; empty: no transport security."""
    tls_key: str = ""
    """PEM file of its private key."""
    tls_client_ca: str = ""
    """PEM file of a CA; callers must show a certificate of it. Empty: anybody may call."""
    metrics_address: str = ""
    """host:port of Prometheus metrics over HTTP (in the clear); empty: none."""
    data_dir: str = "qanchor-data"
    """Directory of the profile store; created when missing, used by one server at a time."""
    scenarios: str = ""
    """Scenario file, or directory whose *.json are: made with this bundle's checkpoint, their
    scenarios replace or join the bundle's. Read again on SIGHUP and ReloadScenarios. Empty: none.
    """
    engine: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """What runs the graphs: ONNX Runtime on the CPU, ONNX Runtime on an NVIDIA GPU (qanchor[gpu]),
    or TensorRT with plan files of `qanchor export --target tensorrt` (qanchor[tensorrt])."""
    intra_op_threads: int = 0
    """engine=cpu: threads of one graph operator; 0: as many as physical cores."""
    allow_spinning: bool = True
    """engine=cpu: ONNX Runtime's threads spin between the operators of a step, never between steps:
    steps of small models take some 15 % less. Switch it off where other work shares the cores."""
    side_by_side_bytes: int = 64 << 20
    """engine=cpu: requests in one suffix step run side by side, a thread each, where the bundle's
    weights take no more than this; a second copy of them is held for it. Operators of larger models
    use all threads well by themselves. 0: never."""
    device_id: int = 0
    """Number of the GPU."""
    cuda_graphs: bool = True
    """Capture one CUDA graph per bucket: launches alone cost more than a small model's work. Each
    bucket's first step takes some runs longer; those of one user are captured at start."""
    gpu_arena_bytes: int = 0
    """engine=cuda: most bytes ONNX Runtime takes per graph, weights included; 0: no bound. What
    kv_pool_bytes, weights and arenas leave is free."""
    plans_dir: str = ""
    """engine=tensorrt: directory of plan sets; the one of this GPU, TensorRT and bundle is run."""
    kv_pool_bytes: int = 2 << 30
    """Most bytes of prefix keys and values held. More users stay encoded with more."""
    kv_host_bytes: int = 512 << 20
    """Host memory for users that the pool evicts, without their slots' padding; 0: none. Coming
    back from it costs a copy instead of an encoding. Taken as it is needed, then kept."""
    kv_disk_bytes: int = 4 << 30
    """Disk for the same, also across restarts; 0: none, and files of an earlier run are deleted.
    Goes through kv_host_bytes, which must hold two of the longest prefixes."""
    kv_disk_dir: str = ""
    """Directory of those files, for one server alone, not data_dir itself; files of other models
    in it are deleted. Empty: `kv` in data_dir."""
    kv_ttl_seconds: float = 7 * 86_400
    """Keys and values not used for so long are dropped from every tier; 0: never."""
    kv_flush_seconds: float = 10.0
    """After a drain, most time to put on disk what only the device holds."""
    max_disk_read_seconds: float = 1.0
    """When the disk has given nothing for so long, users that wait for it are encoded instead."""
    max_pin_seconds: int = 86_400
    """Longest that WarmProfile may keep a user on the device."""
    slab_ladder: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 1536, 2048)
    """Slot lengths in tokens; steps above the model's longest prefix are dropped and the longest
    prefix is added. Finer: less waste per slot, less reuse between users."""
    chunk_len: int = 128
    """Prefix positions per prefill step. Smaller: a waiting query is served sooner, the encoding
    takes longer."""
    max_event_tokens_per_step: int = 1024
    """Padded event-text tokens per prefill step, for the same trade."""
    max_step_tokens: int = 512
    """Most packed suffix tokens of one suffix step, for each thread where users run side by side;
    at least the model's max_query_len."""
    max_step_users: int = 16
    """Most users in one suffix step, for each thread where they run side by side; where they do
    not, users of few tokens cost a CPU a copy of keys and values."""
    max_suffix_run: int = 8
    """Suffix steps in a row while a prefill waits; then one prefill step runs."""
    prefill_patience: float = 4.0
    """How many times its own encoding time a prefix may be overtaken by shorter ones. 0: first in,
    first out. More: shorter waits on average, longer ones for long profiles."""
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
    """Free-text queries kept as the model reads them: tokenised, or read by the query encoder."""
    grace_seconds: float = 10.0
    """Time for requests in flight after SIGTERM or SIGINT."""
    clock_skew_seconds: int = 300
    """How far an as-of time may lie ahead of the server's clock."""

    def __post_init__(self) -> None:
        positive = (
            "kv_pool_bytes", "chunk_len", "max_event_tokens_per_step", "max_step_tokens",
            "max_step_users", "max_suffix_run", "max_queue", "max_queries_per_request",
            "max_stream_in_flight", "max_profile_events", "max_message_bytes",
            "event_vector_cache", "prepared_prefix_cache", "query_cache", "max_pin_seconds",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1", "raise it")
        not_negative = (
            "intra_op_threads", "side_by_side_bytes", "device_id", "gpu_arena_bytes",
            "grace_seconds", "clock_skew_seconds", "kv_host_bytes", "kv_disk_bytes",
            "kv_ttl_seconds", "kv_flush_seconds", "prefill_patience", "max_disk_read_seconds",
        )  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must not be negative", "use 0")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ConfigError(
                "tls_key", self.tls_key, "certificate and key belong together", "set both or none"
            )
        if any(step < 1 for step in self.slab_ladder):
            raise ConfigError(
                "slab_ladder", self.slab_ladder, "lengths must be at least 1", "remove it"
            )
        if self.kv_disk_dir and Path(self.kv_disk_dir).resolve() == Path(self.data_dir).resolve():
            raise ConfigError(
                "kv_disk_dir",
                self.kv_disk_dir,
                "is data_dir, where the profiles are",
                "name another directory, or leave it empty for `kv` in data_dir",
            )
        if self.engine == "tensorrt" and not self.plans_dir:
            raise ConfigError(
                "plans_dir",
                self.plans_dir,
                "engine=tensorrt runs plan files",
                "build them with `qanchor export BUNDLE PLANS --target tensorrt`",
            )

    def bucket_limits(self) -> BucketLimits:
        """What the buckets of a GPU engine must hold."""
        return BucketLimits(
            max_step_users=self.max_step_users,
            max_step_tokens=self.max_step_tokens,
            chunk_len=self.chunk_len,
            max_event_tokens_per_step=self.max_event_tokens_per_step,
            slab_ladder=self.slab_ladder,
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
    if config.kv_disk_bytes and config.kv_host_bytes < 2 * needed:
        raise ConfigError(
            "kv_host_bytes",
            config.kv_host_bytes,
            f"the disk tier needs two prefixes of {max_prefix_len} tokens ({2 * needed} bytes)",
            f"set at least {2 * needed}, or kv_disk_bytes=0",
        )
