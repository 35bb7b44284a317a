"""waitress, and the few things it leaves undone. This module knows nothing of raffles."""

from __future__ import annotations

import resource
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, Callable

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

MAX_CONNECTIONS = 500
STALL_TIMEOUT = 30  # seconds without progress, or for a request to arrive
STOP_TIMEOUT = 5  # seconds to answer what has arrived


class Request(HTTPRequestParser):
    """A request as it arrives."""

    expect_continue: bool

    def received(self, data: bytes) -> int:
        """Take in some bytes; return how many.

        waitress answers all pipelined requests, so that a client that sends many and
        reads nothing fills the buffers and holds a thread. So they are dropped: RFC
        9112, 9.3.2, allows closing the connection.
        """
        consumed = super().received(data)
        # Nobody waits for a body that is not there.
        self.expect_continue = self.expect_continue and not self.completed

        # Blank lines before a request are an empty one for waitress.
        if self.completed and not self.empty and data[consumed:].strip(b"\r\n"):
            self.headers["CONNECTION"] = "close"
        return consumed


class Channel(HTTPChannel):
    """A connection."""

    parser_class = Request
    # What _close_stalled() saw the client send last, or begin to send, and since when.
    waiting_for: Any = None
    waiting_since: float | None = None


def bind(listen: str) -> socket.socket:
    """Return a socket that listens at `listen`: 127.0.0.1:8080 or [::1]:8080. Raises OSError."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def serve(
    app: Callable[..., Any],
    listener: socket.socket,
    threads: int,
    max_body: int,
    is_over: Callable[[], bool],
) -> None:
    """Serve a WSGI application until SIGTERM or SIGINT, and print its address.

    listener: socket of bind(). threads: requests handled at once. max_body: bytes
    of the longest body that reaches the application. is_over: returns whether to stop
    as well; asked once a second or more often.
    """
    # A thread that has hashed a code or written a row waits this long, in seconds, for one that
    # computes to let go of the interpreter. With the default of 0.005 the writing thread would
    # starve under load.
    sys.setswitchinterval(0.001)
    server = _create_server(app, listener, threads, max_body)
    is_stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        server.pull_trigger()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host = server.effective_host
    if ":" in host:
        host = f"[{host}]"
    print(f"Listening on http://{host}:{server.effective_port}", flush=True)

    swept = time.monotonic()
    while not is_stopping and not is_over():
        # Not select(), which would end at the 1,024th descriptor.
        wasyncore.poll2(1, server._map)
        if time.monotonic() > swept + 1:
            _close_stalled(server, STALL_TIMEOUT)
            swept = time.monotonic()
    _finish(server)


def _create_server(
    app: Callable[..., Any], listener: socket.socket, threads: int, max_body: int
) -> Any:
    """Return a waitress server that is ready to be polled."""
    files = _raise_file_limit()
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=threads,
        # Each may open three files: its socket, a long request and a long response. The rest is
        # the database's.
        connection_limit=min(MAX_CONNECTIONS, files // 4),
        channel_timeout=2**31,  # off, because _close_stalled() does more
        # A short response leaves in one piece, sent by the event loop. With the default of 1 the
        # thread sends head and body one after the other, and waits for the interpreter each time:
        # half the rate.
        send_bytes=18000,
        max_request_header_size=32 * 1024,  # bytes, as much as common proxies pass on
        # Longer answers and bodies wait in temporary files, so that hundreds take no memory.
        outbuf_overflow=2**16,
        inbuf_overflow=2**16,
        max_request_body_size=max_body,
        # The application reads them: waitress trusts one address and no network, and takes
        # ::ffff:192.0.2.1 in X-Forwarded-For for an address with a port.
        clear_untrusted_proxy_headers=False,
        ident=None,  # no Server header
    )
    server.channel_class = Channel
    return server


def _raise_file_limit() -> int:
    """Allow as many open files as the connections need, if the system does; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(4 * MAX_CONNECTIONS, soft)
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files


def _finish(server: Any) -> None:
    """Answer what has arrived, for up to STOP_TIMEOUT seconds.

    server.run() would end at once, with that unanswered and answers unsent.
    """
    for _ in range(server.adj.backlog):  # as many as may wait to be accepted
        server.handle_accept()
    # Only the listening socket: server.close() would also close the trigger that threads wake the
    # loop with.
    wasyncore.dispatcher.close(server)

    deadline = time.monotonic() + STOP_TIMEOUT
    while server.active_channels and time.monotonic() < deadline:
        last_activity = {
            channel: channel.last_activity for channel in server.active_channels.values()
        }
        wasyncore.poll2(0.01, server._map)
        for channel, activity in last_activity.items():
            # A thread adds to what is to be sent before it takes the request off the list: so
            # look at the list first, or an answer could be missed between the two looks. And what
            # had arrived unread has been read in this turn, which counts as activity.
            is_answered = not channel.requests and not channel.total_outbufs_len
            if is_answered and channel.last_activity == activity:
                channel.handle_close()
        # Nobody gets longer than a second to go on.
        _close_stalled(server, min(1, STALL_TIMEOUT))


def _close_stalled(server: Any, timeout: float) -> None:
    """Close the connections where nothing has moved for `timeout` seconds.

    Or where a request takes longer to arrive. The channel_timeout of waitress does
    not cover clients that do not read their response, nor those that send a byte
    now and then (slowloris).
    """
    now = time.monotonic()
    for channel in list(server.active_channels.values()):
        # Compared, not subtracted: last_activity is a time of the system's clock, which may be
        # put back.
        waiting_for = channel.request or channel.last_activity
        if channel.requests or channel.waiting_for != waiting_for or channel.waiting_since is None:
            channel.waiting_for = waiting_for
            channel.waiting_since = now
        elif channel.waiting_since < now - timeout:
            channel.handle_close()
