"""The server from its first request to its last."""

import ipaddress
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from steerscale.errors import SteerscaleError
from steerscale.language_model import LanguageModel
from steerscale.serve.app import make_app
from steerscale.serve.catalogue import Catalogue

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
GRACE_SECONDS = 10
"""What runs may take so long to end after Ctrl-C or SIGTERM; then it is cancelled."""
MOST_CONNECTIONS = 1024


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises SteerscaleError if that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SteerscaleError(
            f"--host {host} --port {port} cannot be used: {error}; choose another, port 0 for a free one"
        ) from error


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def hosts_of(listening: socket.socket) -> frozenset[str] | None:
    """Names the server answers to: loopback ones and its own address, of which there are more than 127.0.0.1; None: any."""
    return LOOPBACK_NAMES | {listening.getsockname()[0]} if is_loopback(listening) else None


def serve(
    lm: LanguageModel, catalogue: Catalogue, listening: socket.socket, *, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Answer requests until Ctrl-C or SIGTERM; then let what runs come to its end. In the main thread."""
    config = uvicorn.Config(
        make_app(lm, catalogue, hosts=hosts_of(listening)),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=MOST_CONNECTIONS,
    )

    def ignore(number: int, frame: FrameType | None) -> None:
        """The server has acted on it, and raises it once more at its end for whoever is around it."""

    before = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        on_ready()
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
