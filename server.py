"""waitress, and the few things it leaves undone. This module knows nothing of raffles."""

import json
import signal
import socket
import sys
import time

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask

STALL_TIMEOUT = 30  # seconds without progress, or for a request to arrive
STOP_TIMEOUT = 5  # seconds to answer what has arrived
MAX_CONNECTIONS = 500
MAX_HEAD = 32 * 1024  # bytes, as much as common proxies pass on


class Request(HTTPRequestParser):
    """A request as it arrives."""

    path = ""  # waitress logs it, also of a request that could not be parsed

    def __init__(self, adj):
        super().__init__(adj)
        self.began = time.monotonic()

    def received(self, data):
        """Take in some bytes; return how many.

        Without this, Expect: 100-continue makes waitress wait for a body that it
        has refused or that does not exist. Of pipelined requests, waitress answers
        all, so that a client that sends many and reads nothing fills the buffers
        and holds a thread: drop them (RFC 9112, 9.3.2, allows closing the connection).
        """
        consumed = super().received(data)
        self.expect_continue = self.expect_continue and not self.completed
        if self.completed and data[consumed:].strip(b"\r\n"):
            self.headers["CONNECTION"] = "close"
            return len(data)
        return consumed

    def parse_header(self, header_plus):
        """Parse the head of the request. Raises ParsingError, which is answered with 400.

        waitress answers nothing and logs an error for an incomplete IPv6
        host and for a Content-Length of thousands of digits. It accepts
        Content-Length beside Transfer-Encoding, which is how a request is smuggled
        past a proxy (RFC 9112, 6.1); it could carry any X-Forwarded-For.
        """
        try:
            super().parse_header(header_plus)
        except ValueError:
            raise ParsingError("Malformed request") from None
        # waitress takes Transfer-Encoding off the headers of HTTP/1.1 only, and ignores it in others.
        if "TRANSFER_ENCODING" in self.headers or (self.chunked and "CONTENT_LENGTH" in self.headers):
            raise ParsingError("Transfer-Encoding beside Content-Length, or without HTTP/1.1")


class OwnAnswer(ErrorTask):
    """What waitress refuses by itself, as a problem (RFC 9457) with the headers that every response has."""

    def execute(self):
        error = self.request.error
        problem = {"type": "about:blank", "title": error.reason, "status": error.code, "detail": error.body}
        headers = [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]
        headers += [("Content-Type", "application/problem+json")]
        answer = (f"{error.code} {error.reason}", headers, f"{json.dumps(problem)}\n".encode())
        error.to_response = lambda ident: answer
        super().execute()


class Channel(HTTPChannel):
    """A connection."""

    parser_class = Request
    error_task_class = OwnAnswer
    # For _close_stalled(): last_activity when it last looked, and when it last saw progress.
    seen = moved = None


def bind(listen):
    """Return a socket that listens at `listen`, such as 127.0.0.1:8080 or [::1]:8080. Raises OSError."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def serve(app, listener, threads, max_body, on_stop):
    """Serve a WSGI application until SIGTERM or SIGINT, and print its address.

    listener: socket of bind(). threads: requests handled at once. max_body: bytes
    of the longest body that reaches the application. on_stop: called when the
    signal arrives.
    """
    # A thread that has hashed a code or written a row waits this long, in seconds, for one that computes
    # to let go of the interpreter. With the default of 0.005 the writing thread would starve under load.
    sys.setswitchinterval(0.001)
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=threads,
        # Each costs memory and polling time, and up to three files: a long request and a long response have
        # one each. The rest is the database's.
        connection_limit=min(MAX_CONNECTIONS, _raise_file_limit() // 4),
        # Off, because _close_stalled() does more.
        channel_timeout=2**31,
        # A short response leaves in one piece, sent by the event loop. With the default of 1 the thread sends
        # head and body one after the other, and waits for the interpreter each time: half the rate.
        send_bytes=18000,
        max_request_header_size=MAX_HEAD,
        # Longer answers and bodies wait in temporary files, so that hundreds of them take no memory.
        outbuf_overflow=2**16,
        inbuf_overflow=2**16,
        max_request_body_size=max_body,
        # The application reads them itself.
        clear_untrusted_proxy_headers=False,
        # Send no Server header.
        ident=None,
    )
    server.channel_class = Channel
    _run(server, on_stop)


def _raise_file_limit():
    """Let this process open 2,048 files, or as many as the system allows; return how many."""
    import resource  # not on Windows, where the application can be imported all the same

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 2048 if hard == resource.RLIM_INFINITY else min(2048, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files


def _run(server, on_stop):
    """Run the event loop until a signal, then answer what has arrived.

    server.run() would leave the loop at once, with what is still to be sent.
    """
    stopping = []

    def stop(signum, frame):
        stopping.append(signum)
        server.pull_trigger()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    print(f"Listening on http://{host}:{server.effective_port}", flush=True)
    swept = time.monotonic()
    while not stopping:
        _poll(server, 1)
        if time.monotonic() > swept + 1:
            _close_stalled(server)
            swept = time.monotonic()
    on_stop()
    for _ in range(server.adj.backlog):  # as many as may wait to be accepted
        server.handle_accept()
    # Only the listening socket: server.close() would also close the trigger that threads wake the loop with.
    wasyncore.dispatcher.close(server)
    deadline = time.monotonic() + STOP_TIMEOUT
    while server.active_channels and time.monotonic() < deadline:
        for channel in list(server.active_channels.values()):
            # In this order: a thread adds to what is to be sent before it takes the request off the list.
            if not channel.requests and not channel.total_outbufs_len and not _has_unread(channel):
                channel.handle_close()
        _poll(server, 0.1)
    server.task_dispatcher.shutdown(timeout=1)


def _has_unread(channel):
    try:
        return bool(channel.socket.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _poll(server, timeout):
    # select() would end at the 1,024th descriptor.
    wasyncore.loop(timeout=timeout, use_poll=True, map=server._map, count=1)


def _close_stalled(server):
    """Close the connections where nothing has moved for STALL_TIMEOUT, or a request takes longer to arrive.

    The channel_timeout of waitress does not cover clients that do not read their
    response, nor those that send a byte now and then (slowloris).
    """
    now = time.monotonic()
    for channel in list(server.active_channels.values()):
        # Compared, not subtracted: it is a time of the system's clock, which may be put back.
        if channel.requests or channel.last_activity != channel.seen:
            channel.seen, channel.moved = channel.last_activity, now
        since = min(channel.moved, channel.request.began) if channel.request else channel.moved
        if since < now - STALL_TIMEOUT:
            channel.handle_close()
