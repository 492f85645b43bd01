"""The verb `qanchor serve`. Imports the server only when it runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qanchor import config
from qanchor_server.config import ServerConfig

FLAGS = (
    "address", "data_dir", "kv_pool_bytes", "engine", "kv_host_bytes", "kv_disk_bytes",
    "scenarios", "metrics_address", "tls_cert", "tls_key", "tls_client_ca",
)  # fmt: skip
"""Settings that have a flag of their own."""
_DESCRIPTION = """\
Serve a bundle over gRPC. Health (grpc.health.v1) says SERVING once the engine has reproduced the
bundle's stored embeddings; then one line with the address appears on stderr. SIGTERM or SIGINT
drains: no new requests, those in flight get grace_seconds, exit code 0. SIGHUP reads the scenario
files again. Reflection is on. docs/operations.md tells what to set and what to watch.
"""


def add_parser(subparsers: Any) -> None:
    """Add `serve` to the program's verbs."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a bundle over gRPC",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = ServerConfig()
    parser.add_argument("bundle", type=Path, help="bundle directory written by `qanchor export`")
    parser.add_argument("--config", type=Path, help="settings file (JSON or TOML) of ServerConfig")
    parser.add_argument(
        "--address",
        help=f"host:port to listen on, port 0 for a free one (default {defaults.address})",
    )
    parser.add_argument(
        "--data-dir",
        help=f"profile store; acknowledged profiles survive a kill (default ./{defaults.data_dir})",
    )
    parser.add_argument(
        "--kv-pool-bytes",
        type=int,
        help="memory for encoded users; more keeps more users warm, evicted ones are encoded "
        f"again from the store (default {defaults.kv_pool_bytes})",
    )
    parser.add_argument(
        "--engine",
        choices=("cpu", "cuda", "tensorrt"),
        help="what runs the graphs; cuda and tensorrt need an NVIDIA GPU, tensorrt also "
        f"--set plans_dir=DIR (default {defaults.engine})",
    )
    parser.add_argument(
        "--kv-host-bytes",
        type=int,
        help="host memory for users evicted from there: they come back by a copy "
        f"(default {defaults.kv_host_bytes})",
    )
    parser.add_argument(
        "--kv-disk-bytes",
        type=int,
        help="disk for the same, kept across restarts; 0 writes none "
        f"(default {defaults.kv_disk_bytes}, in DATA_DIR/kv)",
    )
    parser.add_argument(
        "--scenarios",
        help="scenario file of `qanchor tune` or `compile`, or a directory of them; read again on "
        "SIGHUP and by `qanchor scenarios reload`",
    )
    parser.add_argument("--metrics-address", help="host:port for Prometheus (default: none)")
    parser.add_argument("--tls-cert", help="PEM certificate chain (default: no TLS)")
    parser.add_argument("--tls-key", help="PEM private key of the certificate")
    parser.add_argument("--tls-client-ca", help="PEM CA; only callers with its certificates get in")
    config.add_set_argument(parser, "--set max_queue=256 (all: server/qanchor_server/config.py)")
    parser.add_argument("--port-file", type=Path, help="file that gets the bound port when ready")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until stopped; 0 after a drain, 1 after a failure.

    Raises ConfigError, BundleError, StoreError for what the caller can correct.
    """
    from qanchor_server.main import serve

    try:
        return serve(args.bundle, settings_of(args), port_file=args.port_file)
    except RuntimeError as error:
        # gRPC reports an address it cannot bind this way.
        print(f"qanchor serve: {error}", file=sys.stderr)
        return 1


def settings_of(args: argparse.Namespace) -> ServerConfig:
    """Settings file, then flags, then --set. Raises ConfigError."""
    settings = config.load(ServerConfig, args.config) if args.config else ServerConfig()
    flags = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    assignments = [f"{name}={value}" for name, value in flags.items()]
    return config.override(settings, assignments + args.assignments)
