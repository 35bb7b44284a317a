"""waitress, and the few things it leaves undone. This module knows nothing of raffles."""

import resource
import signal
import socket
import sys
import time

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

MAX_CONNECTIONS = 500
STALL_TIMEOUT = 30  # seconds without progress, or for a request to arrive; 1 once the server stops
STOP_TIMEOUT = 5  # seconds to answer what has arrived


class Request(HTTPRequestParser):
    """A request as it arrives."""

    def received(self, data):
        """Take in some bytes; return how many.

        waitress answers all of pipelined requests, so that a client that sends many
        and reads nothing fills the buffers and holds a thread. So they are dropped:
        RFC 9112, 9.3.2, allows closing the connection.
        """
        consumed = super().received(data)
        self.expect_continue = (
            self.expect_continue and not self.completed
        )  # nobody waits for a body that is not there
        # Blank lines before a request are an empty one for waitress.
        if self.completed and not self.empty and data[consumed:].strip(b"\r\n"):
            self.headers["CONNECTION"] = "close"
        return consumed


class Channel(HTTPChannel):
    """A connection."""

    parser_class = Request
    # What _close_stalled() found when it last looked, and since when.
    found = since = None


def bind(listen):
    """Return a socket that listens at `listen`, such as 127.0.0.1:8080 or [::1]:8080. Raises OSError."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def serve(app, listener, threads, max_body, is_over):
    """Serve a WSGI application until SIGTERM or SIGINT, and print its address.

    listener: socket of bind(). threads: requests handled at once. max_body: bytes
    of the longest body that reaches the application. is_over: function that returns
    whether to stop as well, asked once a second or more often.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(4 * MAX_CONNECTIONS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    # A thread that has hashed a code or written a row waits this long, in seconds, for one that computes
    # to let go of the interpreter. With the default of 0.005 the writing thread would starve under load.
    sys.setswitchinterval(0.001)
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=threads,
        # Each may open three files: its socket, a long request and a long response. The rest is the database's.
        connection_limit=min(MAX_CONNECTIONS, files // 4),
        channel_timeout=2**31,  # off, because _close_stalled() does more
        # A short response leaves in one piece, sent by the event loop. With the default of 1 the thread sends
        # head and body one after the other, and waits for the interpreter each time: half the rate.
        send_bytes=18000,
        max_request_header_size=32 * 1024,  # bytes, as much as common proxies pass on
        # Longer answers and bodies wait in temporary files, so that hundreds of them take no memory.
        outbuf_overflow=2**16,
        inbuf_overflow=2**16,
        max_request_body_size=max_body,
        clear_untrusted_proxy_headers=False,  # the application reads them itself
        ident=None,  # no Server header
    )
    server.channel_class = Channel
    stopping = []

    def stop(signum, frame):
        stopping.append(signum)
        server.pull_trigger()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    print(f"Listening on http://{host}:{server.effective_port}", flush=True)
    swept = time.monotonic()
    while not stopping and not is_over():
        # Not select(), which would end at the 1,024th descriptor.
        wasyncore.poll2(1, server._map)
        if time.monotonic() > swept + 1:
            _close_stalled(server, STALL_TIMEOUT)
            swept = time.monotonic()
    # server.run() would end here, with what has arrived unanswered and what is still to be sent unsent.
    for _ in range(server.adj.backlog):  # as many as may wait to be accepted
        server.handle_accept()
    # Only the listening socket: server.close() would also close the trigger that threads wake the loop with.
    wasyncore.dispatcher.close(server)
    deadline = time.monotonic() + STOP_TIMEOUT
    while server.active_channels and time.monotonic() < deadline:
        before = {channel: channel.last_activity for channel in server.active_channels.values()}
        wasyncore.poll2(0.01, server._map)
        for channel, activity in before.items():
            # In this order: a thread adds to what is to be sent before it takes the request off the list. What has
            # arrived unread would have been read in this turn.
            if (
                not channel.requests
                and not channel.total_outbufs_len
                and channel.last_activity == activity
            ):
                channel.handle_close()
        _close_stalled(server, min(1, STALL_TIMEOUT))


def _close_stalled(server, timeout):
    """Close the connections where nothing has moved for `timeout` seconds, or a request takes longer to arrive.

    The channel_timeout of waitress does not cover clients that do not read their
    response, nor those that send a byte now and then (slowloris).
    """
    now = time.monotonic()
    for channel in list(server.active_channels.values()):
        # Compared, not subtracted: the second is a time of the system's clock, which may be put back.
        found = channel.request or channel.last_activity
        if channel.requests or channel.since is None or channel.found != found:
            channel.found, channel.since = found, now
        elif channel.since < now - timeout:
            channel.handle_close()
