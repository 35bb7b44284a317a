"""The program as it is deployed: a process, real sockets, and clients that nobody would write."""

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import (
    FAULTS,
    HALF_BODY,
    HALF_HEAD,
    MIB,
    ONE_PRIZE,
    ROOT,
    at_once,
    mebibytes,
    query,
    wait_for,
)

# Nothing takes too long, until SIGUSR1 says otherwise.
PATIENT = (FAULTS, "database.BUSY_TIMEOUT=600", "server.STALL_TIMEOUT=600")


@pytest.fixture
def stall():
    """Connect clients that send some bytes and then stall; they are closed with the test."""
    with ExitStack() as opened:

        def connect(server, number, data=b""):
            clients = [opened.enter_context(socket.socket()) for _ in range(number)]
            for client in clients:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.settimeout(30)
                client.connect((server.host, int(server.port)))
                client.sendall(data)
            return clients

        yield connect


def request_for(path, method="GET"):
    """Return the bytes of a request."""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def request_for_long_raffle(server, prizes):
    """Create a raffle with so many prizes, 220 bytes each; return the bytes of a request for it."""
    return request_for(server.create(prizes=[{"name": "x" * 200, "amount": 1}] * prizes))


def assert_being_answered(clients):
    """Check that each client gets the begin of a response; the rest stays where it is."""
    assert {client.recv(8) for client in clients} == {b"HTTP/1.1"}


def dribble(clients):
    """Send a byte from each client that is still connected."""
    for client in clients:
        with suppress(OSError):
            client.send(b"x")


def sockets(server):
    """Return how many sockets the process of a server has, the one that listens among them."""
    descriptors = Path(f"/proc/{server.process.pid}/fd").iterdir()
    return sum(descriptor.is_socket() for descriptor in descriptors)


# A crowd


def test_a_whole_raffle_among_many_clients_at_once(serve):
    participants = 200
    server = serve(MANAGER_IPS="127.0.0.1, 127.0.0.2")
    amounts = {"Bicycle": 1, "Book": 30, "Pen": 69}
    prizes = [{"name": name, "amount": amount} for name, amount in amounts.items()]
    path = server.create(participants, prizes)

    def participate(n):
        return server.request("POST", f"{path}participate/", source=f"127.1.1.{n + 1}")

    # Everybody asks twice, at the same time.
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(participate, [n // 2 for n in range(2 * participants)]))
    tickets = [ticket for status, _, ticket in answers if status == 201]
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, participants + 1))
    for first, second in zip(answers[::2], answers[1::2]):
        assert sorted([first[0], second[0]]) in ([201, 403], [201, 410])

    # Both managers draw at the same time.
    draw = partial(server.request, "POST", f"{path}winners/")
    draws = at_once([partial(draw, source=manager) for manager in ("127.0.0.1", "127.0.0.2")])
    (drawn, _, wins), (refused, _, problem) = sorted(draws, key=lambda answer: answer[0])
    assert (drawn, refused, problem["type"]) == (201, 403, "urn:raffle:already-drawn")
    assert server.list_wins(path) == wins
    assert [win["prize"] for win in wins] == ["Bicycle"] + ["Book"] * 30 + ["Pen"] * 69
    prize_of = {win["ticket_number"]: win["prize"] for win in wins}
    assert len(prize_of) == len(wins)

    # All verify their ticket at the same time, and then with the code of another one.
    verify = partial(server.request, "POST", f"{path}verify-ticket/")
    codes = [ticket["verification_code"] for ticket in tickets]
    others = codes[1:] + codes[:1]
    mixed = [{**ticket, "verification_code": code} for ticket, code in zip(tickets, others)]
    with ThreadPoolExecutor(16) as pool:
        for ticket, (status, _, verdict) in zip(tickets, pool.map(verify, tickets)):
            prize = prize_of.get(ticket["ticket_number"])
            assert status == 200
            assert (verdict["has_won"], verdict["prize"]) == (prize is not None, prize)
        for status, _, problem in pool.map(verify, mixed):
            assert (status, problem["type"]) == (400, "urn:raffle:invalid-code")


# Clients that stall


def test_hundreds_of_stalled_clients_keep_nobody_from_a_ticket(serve, stall, database):
    server = serve(program=(*PATIENT, "open_many_files"), RAFFLE_THREADS="2", processes=1)
    ask = request_for_long_raffle(server, 4_500)
    path = server.create()

    # The first long responses leave some memory with the threads, and with every connection.
    reading = stall(server, 40, ask)
    assert_being_answered(reading)
    before = mebibytes(server)

    idle = stall(server, 100)
    dribbling = stall(server, 100, HALF_HEAD) + stall(server, 100, HALF_BODY)
    # More clients than threads send pipelined requests, whose responses could fill any buffer.
    unreading = stall(server, 3, ask * 20) + stall(server, 37, ask)
    assert_being_answered(unreading)

    for n in range(20):
        dribble(dribbling)
        assert server.request("POST", f"{path}participate/", source=f"127.1.1.{n + 1}")[0] == 201

    clients = [*reading, *idle, *dribbling, *unreading]
    wait_for(lambda: sockets(server) == len(clients) + 1)
    # 40 of them wait for a mebibyte each, but in files.
    assert mebibytes(server) - before < len(unreading) / 2
    # Nobody who reads keeps the -wal file from being used again.
    [(is_busy, length, checkpointed)] = query(database, "PRAGMA wal_checkpoint")
    assert (is_busy, checkpointed) == (0, length)


def test_a_client_that_stalls_is_closed_and_one_that_waits_is_not(serve, stall, database):
    """The system's clock is put back meanwhile, which must not count."""
    server = serve(program=(*PATIENT, "lose_patience"), processes=1)
    ask = request_for_long_raffle(server, 500)
    path = server.create()

    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        [waiting] = stall(server, 1, request_for(f"{path}participate/", "POST"))
        dribbling = stall(server, 2, HALF_HEAD) + stall(server, 2, HALF_BODY)
        answered = stall(server, 2, ask) + stall(server, 2, request_for("/nothing/"))
        assert_being_answered(answered)
        idle = stall(server, 2)
        clients = [waiting, *dribbling, *answered, *idle]
        wait_for(lambda: sockets(server) == len(clients) + 1)

        server.process.send_signal(signal.SIGUSR1)

        def are_closed():
            dribble(dribbling)
            return sockets(server) == 2  # the one that listens, and the one that waits

        wait_for(are_closed)
        other.execute("ROLLBACK")
        assert waiting.recv(12) == b"HTTP/1.1 201"


# What HTTP allows


def test_pipelined_requests_are_dropped_after_the_first(serve):
    with serve().connect() as client:
        client.sendall(request_for("/health") * 20)
        answer = b"".join(iter(lambda: client.recv(65536), b""))

    assert re.findall(rb"HTTP/1.1 \d+", answer) == [b"HTTP/1.1 200"]
    assert answer.count(b"Connection: close") == 1


@pytest.mark.parametrize("lines", [1, 2, 5])
@pytest.mark.parametrize("is_apart", [False, True], ids=["in one piece", "apart"])
def test_blank_lines_around_a_request_are_not_a_request(serve, lines, is_apart):
    server = serve()
    blank = b"\r\n" * lines

    with server.connect() as client:
        client.sendall(blank)
        if is_apart:
            # When this is answered, the server has read the blank lines.
            server.request("GET", "/health")
        client.sendall(request_for("/health") + blank)
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
    assert b"Connection: close" not in answer


BODY_HEAD = (
    b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
)
CHUNKED = BODY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_a_body_may_come_in_chunks(serve):
    body = json.dumps({"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}).encode()
    chunks = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    server = serve(processes=1)

    answer = server.send(CHUNKED + chunks)
    assert answer.startswith(b"HTTP/1.1 201")
    assert b"\r\nContent-Type: application/json\r\n" in answer
    assert len(server.request("GET", "/raffles/")[2]) == 1


TOO_LONG = b" " * (MIB + 1)


@pytest.mark.parametrize(
    ("request_bytes", "is_problem"),
    [
        (BODY_HEAD + b"Content-Length: %d\r\n\r\n%s" % (MIB + 1, TOO_LONG), True),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (MIB + 1, TOO_LONG), True),
        # Past the hard limit the server does not read on, so nothing more is sent.
        (BODY_HEAD + b"Content-Length: %d\r\n\r\n" % (2 * MIB), False),
        (CHUNKED + b"fffffff\r\n".ljust(2 * MIB), False),
    ],
    ids=["long", "long in chunks", "very long", "endless in chunks"],
)
def test_a_body_longer_than_a_limit_gets_413(serve, request_bytes, is_problem):
    server = serve()
    answer = server.send(request_bytes)
    assert answer.startswith(b"HTTP/1.1 413")
    assert (b"\r\nContent-Type: application/problem+json\r\n" in answer) == is_problem
    assert server.request("GET", "/raffles/")[2] == []


END = b"Host: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"GET http://x/raffles/ HTTP/1.1\r\n", b"200"),
        (b"BREW /raffles/ HTTP/1.1\r\n", b"405"),
        # There is no body to wait for.
        (b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\n", b"415"),
        (b"GET /raffles/%0A HTTP/1.1\r\n", b"404"),
        (b"GET /raffles/?limit=%FF&cursor=\xff HTTP/1.1\r\n", b"400"),
        (b"POST /raffles/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", b"411"),
        (b"\x00\x01\x02\r\n", b"400"),
        # Closed without an answer.
        (b"GET http://[::1/ HTTP/1.1\r\n", b""),
        (b"POST /raffles/ HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n", b""),
    ],
    ids=[
        "absolute URL",
        "unknown method",
        "Expect without a body",
        "line feed in the path",
        "invalid UTF-8",
        "chunks in HTTP/1.0",
        "no HTTP",
        "malformed URL",
        "endless Content-Length",
    ],
)
def test_a_server_survives_what_no_client_library_sends(serve, start, status):
    """It never says what it is."""
    server = serve()
    answer = server.send(start + END)
    assert answer[9:12] == status
    assert not re.search(b"(?i)waitress|bottle|python|\r\nserver:", answer)
    assert server.request("GET", "/raffles/")[2] == []


# The start


def test_the_port_is_greeted_with_and_the_threads_are_as_set(serve):
    server = serve(RAFFLE_THREADS="7", processes=1)
    assert server.greeting == f"Listening on http://127.0.0.1:{server.port}\n"
    # Those that handle requests, the one that writes, and the event loop.
    assert len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) == 7 + 2


def test_it_listens_on_ipv6(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")

    server = serve(RAFFLE_LISTEN="[::1]:0", MANAGER_IPS="::1")
    assert server.greeting == f"Listening on http://[::1]:{server.port}\n"
    path = server.create(source="::1")
    assert server.request("POST", f"{path}participate/", source="::1")[0] == 201


def test_waitress_serve_can_call_the_application_factory(database):
    command = [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0"]
    environment = {**os.environ, "RAFFLE_DATABASE": str(database)}
    with subprocess.Popen(
        [*command, "--call", "raffle:create_app"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            port = int(process.stderr.readline().rpartition(":")[2])
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/raffles/")
                assert connection.getresponse().read() == b"[]\n"
        finally:
            process.terminate()
