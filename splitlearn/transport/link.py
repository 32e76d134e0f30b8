"""What both ends of a gRPC connection agree on: the two streams, limits, heartbeats."""

import os
import re
from typing import Any

from splitlearn.frames import MAX_HEADER_NBYTES, MAX_NBYTES

__all__ = ["ANSWER", "ASK", "ATTACHED", "SERVICE", "grpc_module", "options", "place"]

SERVICE = "splitlearn.Parties"
ASK = "Ask"  # the client sends requests, the server replies
ANSWER = "Answer"  # the server sends requests, the client replies
ATTACHED = b""  # the first frame on Answer: the server is there, and has no request yet
PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[\w.-]+):([0-9]{1,5})", re.ASCII)  # host, or [IPv6], and port
HANDSHAKE = 10.0  # seconds from a connection to the first word over TLS
STREAMS = 8  # of one connection at once; a client needs two, and two more while it comes back
HEARTBEAT = 10.0  # seconds of silence after which each end asks whether the other is there


def grpc_module() -> Any:
    """Return grpc; ``ImportError`` with the command that installs it where it is not there."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes to stderr what our errors say in a line
    try:
        import grpc
    except ImportError as error:
        raise ImportError(
            "expected the package grpcio for parties on other machines; pip install 'splitlearn[net]'"
        ) from error
    return grpc


def place(address: str, *, least: int = 1) -> str:
    """Return the address if it is HOST:PORT, the port from ``least`` on; ``ValueError`` if not."""
    found = PLACE.fullmatch(address)
    if found is None or not least <= int(found[3]) < 1 << 16:
        raise ValueError(
            f"expected an address HOST:PORT, the port from {least} to 65535, got {address!r}; such as localhost:50051, "
            "192.0.2.7:50051 or [::1]:50051"
        )
    return address


def options(
    max_nbytes: int = MAX_NBYTES, heartbeat: float = HEARTBEAT, *, handshake: float = HANDSHAKE
) -> list[tuple[str, Any]]:
    """Return gRPC's settings: a frame's greatest size, and pings on a silent connection, answered within as long.

    A frame over the size is refused before memory is taken for it; a connection whose handshakes are not done within
    ``handshake`` seconds is dropped by the server.
    """
    most = max_nbytes + MAX_HEADER_NBYTES + 64
    return [
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", most),
        ("grpc.keepalive_time_ms", int(1000 * heartbeat)),
        ("grpc.keepalive_timeout_ms", int(1000 * heartbeat)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(500 * heartbeat)),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", int(1000 * handshake)),  # for whoever connects and says nothing, or half
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.enable_retries", 0),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
