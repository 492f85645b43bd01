"""Server credentials from PEM files."""

from pathlib import Path

import grpc

from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Credentials of the settings' certificate; None where transport is in the clear.

    With a client CA only callers with a certificate of it are let in. Raises ConfigError.
    """
    if not config.tls_cert:
        return None
    pair = (_read("tls_key", config.tls_key), _read("tls_cert", config.tls_cert))
    client_ca = _read("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [pair], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _read(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(field, path, f"cannot be read: {error}", "name a PEM file") from None
