"""The service with other limits, or with a fault: a program that the tests start.

    python tests/faults.py [MODULE.LIMIT=VALUE ...] [SCENE [ARGUMENT ...]]

A scene is one of the functions below; without one, this is `python raffle.py`. A limit or a
function that the program does not have ends the scene, so that none runs without its fault.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import json
import os
import resource
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import bottle
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected

import database
import draw
import raffle
import server
import storage
from settings import read_settings


def set_limit(module: ModuleType, name: str, value: float) -> None:
    """Change a limit of a module. Raises AssertionError if the module has no such limit."""
    limit = getattr(module, name, None)
    assert isinstance(limit, (int, float)), f"{module.__name__} has no limit {name}"
    setattr(module, name, value)


def replace(owner: Any, name: str, function: Callable) -> Callable:
    """Put a function in the place of another one, which must exist, and return the other one."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    return original


def trace_statements(trace: Callable[[str], None]) -> Callable:
    """Call a function before each statement of each connection; return what connects without."""

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = original(*arguments, **options)
        connection.set_trace_callback(trace)
        return connection

    original = replace(sqlite3, "connect", connect)
    return original


# Scenes


def serve() -> None:
    """Serve the application as `python raffle.py` does."""
    del sys.argv[1:]
    raffle.main()


def keep_little_in_the_system() -> None:
    """Give sockets small send buffers, so that most of a response waits in the server."""
    Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
    serve()


def lose_patience() -> None:
    """As above; on SIGUSR1, let clients stall for a second only, and put the clock back an hour."""
    now = time.time

    def an_hour_ago() -> float:
        return now() - 3600

    def on_signal(signum: int, frame: object) -> None:
        set_limit(server, "STALL_TIMEOUT", 1)
        replace(time, "time", an_hour_ago)

    signal.signal(signal.SIGUSR1, on_signal)
    keep_little_in_the_system()


def put_clock_back() -> None:
    """Once it is noted since when a client stalls, put the clock back and lose patience."""

    def close_stalled(waitress_server: Any, timeout: float) -> None:
        original(waitress_server, timeout)
        channels = waitress_server.active_channels.values()
        if server.STALL_TIMEOUT > 1 and any(channel.progress_since for channel in channels):
            set_limit(server, "STALL_TIMEOUT", 1)
            replace(time, "time", lambda: now() - 3600)

    now = time.time
    original = replace(server, "_close_stalled", close_stalled)
    serve()


def open_many_files() -> None:
    """Lose patience, with more files open than a shell allows, and than select() takes."""
    for _ in range(950):
        os.open(os.devnull, os.O_RDONLY)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    lose_patience()


def fail_to_read() -> None:
    """Fail on each read of a raffle, with the id in the error.

    Who asks for a path with "lost" is gone before the answer.
    """

    def fail(self: storage.Storage, raffle_id: str) -> None:
        raise ValueError(raffle_id)

    def write_soon(channel: server.Channel, data: Any) -> int:
        if "lost" in channel.requests[0].path:
            raise ClientDisconnected
        return original(channel, data)

    replace(storage.Storage, "get_raffle", fail)
    original = replace(server.Channel, "write_soon", write_soon)
    serve()


def interrupt_draw(action: str, statement: str, number: str) -> None:
    """Do something before the n-th statement of a kind that follows the request for a draw.

    action: "kill" the process; "stop" it with SIGTERM, and hold the statement until it has given
    up on the draw; or "delete" the first win, as another program. statement: BEGIN or COMMIT.
    """
    is_drawing, is_served = threading.Event(), threading.Event()
    statements = []

    def draw_winners(*arguments: Any) -> Any:
        is_drawing.set()
        return original_draw(*arguments)

    def serve_and_tell(*arguments: Any, **options: Any) -> None:
        original_serve(*arguments, **options)
        is_served.set()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        is_served.wait(30)

    def delete() -> None:
        with closing(original_connect(os.environ["RAFFLE_DATABASE"])) as other, other:
            other.execute("DELETE FROM win WHERE position = 1")

    actions = {"kill": kill, "stop": stop, "delete": delete}

    def trace(sql: str) -> None:
        if is_drawing.is_set() and sql.startswith(statement):
            statements.append(sql)
            if len(statements) == int(number):
                actions[action]()

    original_draw = replace(storage.Storage, "draw_winners", draw_winners)
    original_serve = replace(server, "serve", serve_and_tell)
    original_connect = trace_statements(trace)
    serve()


def kill_in_replacement(statement: str) -> None:
    """Kill the process before the first statement of a kind after the request for a replacement."""
    is_replacing = threading.Event()

    def replace_winner(*arguments: Any) -> Any:
        is_replacing.set()
        return original_replace(*arguments)

    def trace(sql: str) -> None:
        if is_replacing.is_set() and " ".join(sql.split()).startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    original_replace = replace(storage.Storage, "replace_winner", replace_winner)
    trace_statements(trace)
    serve()


def replace_while_read() -> None:
    """Replace the first winner once, when the list of winners is read after the draw."""

    def list_winners(self: storage.Storage, raffle_id: str, *arguments: Any) -> storage.Page:
        page = original(self, raffle_id, *arguments)
        if page.items and not self.get_raffle(raffle_id)["replacements"]:
            win = page.items[0]
            self.replace_winner(raffle_id, win["ticket_number"], win["prize"], "unclaimed")
        return page

    original = replace(storage.Storage, "list_winners", list_winners)
    serve()


def signal_in_turn(name: str) -> None:
    """On SIGUSR1, send the process a signal as soon as it has its next turn to write."""
    is_told = threading.Event()

    def flock(descriptor: int, operation: int) -> None:
        original(descriptor, operation)
        if operation == fcntl.LOCK_EX and is_told.is_set():
            is_told.clear()
            os.kill(os.getpid(), signal.Signals[name])

    signal.signal(signal.SIGUSR1, lambda *_: is_told.set())
    original = replace(fcntl, "flock", flock)
    serve()


def never_stop() -> None:
    """Hang instead of answering what has arrived at a stop."""
    replace(server, "_finish", lambda _: threading.Event().wait())
    serve()


def fail_to_lock() -> None:
    """Have the file system refuse each turn, but for the first look at whether it can."""

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        original(descriptor, operation)

    original = replace(fcntl, "flock", flock)
    serve()


def refuse_in_children() -> None:
    """Refuse the database in every process but the first."""
    parent = os.getpid()

    def open_database(self: storage.Storage, *arguments: Any) -> None:
        if os.getpid() != parent:
            raise storage.DatabaseRefused("the file is on fire")
        original(self, *arguments)

    original = replace(storage.Storage, "__init__", open_database)
    serve()


def serve_with_pragma(pragma: str) -> None:
    """Have the writing connection run one more pragma, such as `synchronous = NORMAL`."""
    pragmas = database.PRAGMAS
    assert isinstance(pragmas, str)
    database.PRAGMAS = f"{pragmas}PRAGMA {pragma};"
    serve()


def name_writing_thread(pragma: str) -> None:
    """Say on standard error which thread writes; its connection runs one more pragma."""

    def run(thread: threading.Thread) -> None:
        if thread.name == "raffle-writer":
            print(f"raffle-writer {threading.get_native_id()}", file=sys.stderr, flush=True)
        original(thread)

    original = replace(threading.Thread, "run", run)
    serve_with_pragma(pragma)


def serve_whatever_fails() -> None:
    """Serve the application as other WSGI servers do: they do not end when a commit fails."""
    app = raffle.create_app()
    with server.bind(os.environ["RAFFLE_LISTEN"]) as listener:
        serve_without_end(app, listener, partial(raffle.print_address, listener))
    app.close()


def serve_without_end(
    app: Callable,
    listener: socket.socket,
    on_listening: Callable[[], None],
    parent_pipe: int | None = None,
) -> None:
    server.serve(
        app,
        listener,
        64,
        max_body=2 * raffle.MAX_BODY,
        is_over=lambda: False,
        on_listening=on_listening,
        parent_pipe=parent_pipe,
    )


def fork() -> None:
    """Open the application, ask a forked process, which prints the statuses, and then this one."""
    from helpers import MANAGER, Client

    app = raffle.create_app(manager_ips=MANAGER)
    client = Client(app)
    path = client.new_raffle()
    client.participate(path, "10.1.0.1")

    if os.fork() == 0:
        answers = [client.create(status="*"), client.participate(path, "10.1.0.2", "*")]
        answers += [client.send("GET", each) for each in ("/health", "/raffles/", path)]
        print([answer.status_int for answer in answers], flush=True)
        app.close()
        os._exit(0)

    os.wait()
    client.participate(path, "10.1.0.2")
    app.close()


def check(*arguments: str) -> None:
    """Check a draw as `python draw.py` does."""
    sys.argv[1:] = arguments
    sys.exit(draw.main())


def serve_floor() -> None:
    """Serve two routes that only return a ticket, for the benchmark to compare with."""
    ticket = (
        '{"raffle_id": "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21", "ticket_number": 2, '
        '"verification_code": "7K3M-9QXD-04TZ-WHE8-5C1N-VRP6"}\n'
    )
    app = bottle.Bottle()

    @app.post("/ticket/")
    def answer() -> str:
        return ticket

    @app.post("/hash/")
    def hash_and_answer() -> str:
        code, salt = b"7K3M9QXD04TZWHE85C1NVRP6", bytes(16)
        hashlib.pbkdf2_hmac("sha256", code, salt, storage.ITERATIONS)
        return ticket

    settings = read_settings()
    processes = settings["RAFFLE_PROCESSES"]
    with server.bind(settings["RAFFLE_LISTEN"]) as listener:
        greet = partial(raffle.print_address, listener)
        if processes == 1:
            serve_without_end(app, listener, greet)
            return

        def run(child: server.Child) -> int:
            serve_without_end(app, listener, child.report_listening, child.parent_pipe)
            return 0

        server.run_processes(processes, run, listener, greet)


SCENES = {
    scene.__name__: scene
    for scene in (
        serve,
        keep_little_in_the_system,
        lose_patience,
        put_clock_back,
        open_many_files,
        fail_to_read,
        interrupt_draw,
        kill_in_replacement,
        replace_while_read,
        signal_in_turn,
        never_stop,
        fail_to_lock,
        refuse_in_children,
        serve_with_pragma,
        name_writing_thread,
        serve_whatever_fails,
        fork,
        check,
        serve_floor,
    )
}


def main() -> None:
    arguments = sys.argv[1:]
    while arguments and "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        module, _, limit = name.partition(".")
        set_limit(importlib.import_module(module), limit, json.loads(value))

    scene, *arguments = arguments or ["serve"]
    SCENES[scene](*arguments)


if __name__ == "__main__":
    main()
