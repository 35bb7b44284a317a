"""waitress, and the few things it leaves undone. This module knows nothing of raffles."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import time
from contextlib import suppress
from typing import Any, Callable, NamedTuple

import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

MAX_CONNECTIONS = 500
STALL_TIMEOUT = 30  # seconds without progress, or for a request to arrive
STOP_TIMEOUT = 5  # seconds to answer what has arrived
KILL_TIMEOUT = 15  # seconds after which a process that does not stop is killed
RESTART_INTERVAL = 1  # seconds at least between starts in place of processes that died
POLL_INTERVAL = 0.05  # seconds between looks at processes that start or stop
FAILED = 3  # exit status of a process after which none may go on
LISTENING = b"+"  # what a child reports

log = logging.getLogger("raffle")


class Request(HTTPRequestParser):
    """A request as it arrives."""

    expect_continue: bool

    def received(self, data: bytes) -> int:
        """Take in some bytes; return how many.

        waitress answers all pipelined requests, so a client that sends many and reads
        nothing fills the buffers and holds a thread. Pipelining is therefore not
        supported: the first request is answered, and the connection closed (RFC 9112,
        9.3.2, allows it).
        """
        consumed = super().received(data)
        # No 100 Continue for a request that is complete.
        self.expect_continue = self.expect_continue and not self.completed

        # Blank lines before a request are an empty one for waitress.
        if self.completed and not self.empty and data[consumed:].strip(b"\r\n"):
            self.headers["CONNECTION"] = "close"
        return consumed


class Channel(HTTPChannel):
    """A connection."""

    parser_class = Request
    # The last progress that _close_stalled() saw, and when it saw it first.
    progress: Any = None
    progress_since: float | None = None


def bind(listen: str) -> socket.socket:
    """Return a socket that listens at `listen`: 127.0.0.1:8080 or [::1]:8080. Raises OSError."""
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def address_of(listener: socket.socket) -> str:
    """Return the address of a socket of bind(), as it stands in a URL."""
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"{host}:{port}"


def serve(
    app: Callable[..., Any],
    listener: socket.socket,
    threads: int,
    max_body: int,
    is_over: Callable[[], bool],
    on_listening: Callable[[], None],
    parent_pipe: int | None = None,
) -> None:
    """Serve a WSGI application until SIGTERM, SIGINT or SIGHUP.

    listener: socket of bind(). threads: requests handled at once. max_body: bytes
    of the longest body that reaches the application. is_over: returns whether to stop
    as well; asked once a second or more often. on_listening: called when signals and
    requests are answered. parent_pipe: descriptor of a pipe whose end stops the server.
    """
    server = _create_server(app, listener, threads, max_body)
    is_stopping = False

    def stop(*_: Any) -> None:
        nonlocal is_stopping
        is_stopping = True
        server.pull_trigger()

    _stop_on_signals(stop)
    if parent_pipe is not None:
        _ParentPipe(parent_pipe, stop, server._map)
    on_listening()

    swept = time.monotonic()
    while not is_stopping and not is_over():
        # Not select(), which would end at the 1,024th descriptor.
        wasyncore.poll2(1, server._map)
        if time.monotonic() > swept + 1:
            _close_stalled(server, STALL_TIMEOUT)
            swept = time.monotonic()
    _finish(server)


def _stop_on_signals(stop: Callable[..., None]) -> None:
    """Call a function on each signal that asks the program to end, and receive them from now on."""
    signals = _stop_signals()
    for signum in signals:
        signal.signal(signum, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _stop_signals() -> set[signal.Signals]:
    """Return the signals that ask the program to end; nohup has SIGHUP ignored."""
    signals = {signal.SIGTERM, signal.SIGINT}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.add(signal.SIGHUP)
    return signals


class _ParentPipe(wasyncore.file_dispatcher):
    """The end of a pipe whose other end the parent holds open as long as it lives."""

    def __init__(self, descriptor: int, stop: Callable[[], None], sockets: dict[int, Any]) -> None:
        super().__init__(descriptor, map=sockets)
        self.stop = stop

    def writable(self) -> bool:
        return False

    def handle_read(self) -> None:
        self.handle_close()

    def handle_close(self) -> None:
        self.del_channel()  # or it would be reported again and again
        self.stop()


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
        progress = channel.request or channel.last_activity
        if channel.requests or channel.progress != progress or channel.progress_since is None:
            channel.progress = progress
            channel.progress_since = now
        elif channel.progress_since < now - timeout:
            channel.handle_close()


# Processes


class Child(NamedTuple):
    """What a child process has of its parent: ends of two pipes.

    report_pipe: to write to. parent_pipe: to read from; it ends with the parent.
    """

    report_pipe: int
    parent_pipe: int

    def report_listening(self) -> None:
        self._report(LISTENING)

    def report_refusal(self, sentence: str) -> None:
        self._report(sentence.encode())

    def _report(self, report: bytes) -> None:
        with suppress(BrokenPipeError):  # the parent is gone, and this process will be, too
            os.write(self.report_pipe, report)


def run_processes(
    number: int,
    run: Callable[[Child], int],
    listener: socket.socket,
    on_listening: Callable[[], None],
) -> str | int:
    """Serve in so many processes until a signal; return what to end the program with.

    run: serves in a child, and returns its exit status. listener: closed before the
    children are to stop. on_listening: called once all of them listen. No thread and no
    connection may exist yet, because a fork would copy it.

    Until all listen, one that fails stops all, with its sentence. Afterwards, one that
    dies is replaced, and one that ends with 0 is not. One that ends with FAILED stops
    all, with 1.
    """
    # A process that ignores it gets no exit statuses, and its children inherit that.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stop_signals = _stop_signals()
    # Blocked, and taken one at a time: one that comes between two steps is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*stop_signals, signal.SIGCHLD})
    pipes = os.pipe()
    starting: dict[int, int] = {}  # by process id: the pipe that it will report to
    listening: set[int] = set()
    has_greeted = False
    started = time.monotonic()
    missing = number
    outcome: str | int = 0

    while missing or starting or listening:
        if missing and (not has_greeted or time.monotonic() > started + RESTART_INTERVAL):
            started = time.monotonic()
            missing -= _start(run, pipes, starting, missing)
        interval = POLL_INTERVAL if starting or missing else 1
        received = signal.sigtimedwait({*stop_signals, signal.SIGCHLD}, interval)
        if received is not None and received.si_signo in stop_signals:
            break

        refusal = _take_reports(starting, listening)
        for pid, status in _reap(starting, listening):
            if status == FAILED:
                outcome = 1
            elif status != 0:
                missing += 1
                if has_greeted:
                    log.error("Process %d ended with status %d, and is replaced", pid, status)
        if not has_greeted and (refusal or missing):
            outcome = refusal or "A process could not be started, or ended before it listened"
        if outcome:
            break
        if not has_greeted and len(listening) == number:
            has_greeted = True
            on_listening()

    listener.close()
    statuses = _stop_children(starting, listening)
    return 1 if FAILED in statuses and not outcome else outcome


def _start(
    run: Callable[[Child], int], pipes: tuple[int, int], starting: dict[int, int], number: int
) -> int:
    """Start so many children; return how many could be started.

    pipes: the ends, to read and to write, of the pipe that ends with the parent.
    """
    for count in range(number):
        try:
            pid, report_pipe = _fork(run, *pipes)
        except OSError as error:
            log.error("A process cannot be started: %s", error)
            return count
        starting[pid] = report_pipe
    return number


def _fork(run: Callable[[Child], int], parent_pipe: int, keep_open: int) -> tuple[int, int]:
    """Start a child; return its process id, and the end of the pipe that it reports to."""
    report_pipe, child_pipe = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(report_pipe)
        os.close(child_pipe)
        raise
    if pid:
        os.close(child_pipe)
        os.set_blocking(report_pipe, False)
        return pid, report_pipe

    exit_status = 1
    try:
        os.close(report_pipe)
        os.close(keep_open)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        exit_status = run(Child(child_pipe, parent_pipe))
    except BaseException:
        log.exception("A process has failed")
    finally:
        os._exit(exit_status)  # what the parent has begun is not for the child to end


def _take_reports(starting: dict[int, int], listening: set[int]) -> str | None:
    """Move the children that listen by now; return the sentence of one that does not, if any."""
    for pid, report_pipe in list(starting.items()):
        try:
            report = os.read(report_pipe, 65536)
        except BlockingIOError:
            continue
        if report == LISTENING:
            os.close(starting.pop(pid))
            listening.add(pid)
        elif report:
            return report.decode()
    return None


def _reap(starting: dict[int, int], listening: set[int]) -> list[tuple[int, int]]:
    """Take out the children that have ended; return their ids and exit statuses.

    The status of one that was killed by a signal is the negative number of that.
    """
    ended = []
    for pid in [*starting, *listening]:
        reaped, wait_status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            if pid in starting:
                os.close(starting.pop(pid))
            listening.discard(pid)
            ended.append((pid, os.waitstatus_to_exitcode(wait_status)))
    return ended


def _stop_children(starting: dict[int, int], listening: set[int]) -> list[int]:
    """Ask the children to stop, kill those that do not, and return their exit statuses."""
    for pid in [*starting, *listening]:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)  # one that was stopped could not receive it

    statuses = []
    deadline = time.monotonic() + KILL_TIMEOUT
    while starting or listening:
        signal.sigtimedwait({signal.SIGCHLD}, POLL_INTERVAL)
        statuses += [status for _, status in _reap(starting, listening)]
        if time.monotonic() > deadline:
            for pid in [*starting, *listening]:
                log.error("Process %d does not stop, and is killed", pid)
                os.kill(pid, signal.SIGKILL)
    return statuses
