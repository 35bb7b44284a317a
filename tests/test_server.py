"""The program as it is deployed: a process of its own, real sockets, and clients that nobody would write."""

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
from helpers import ONE_PRIZE, ROOT, at_once, query, wait_for

MIB = 2**20
HALF_HEAD = b"POST /raffles/ HTTP/1.1\r\nHost: "
HALF_BODY = b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n{"

# More files are open than a shell allows, and than select() takes.
MANY_FILES = """
import os, resource
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(950)]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
"""
# Nothing takes too long until SIGUSR1, which also puts the clock back.
PATIENT = """
import database, server, signal, time
database.BUSY_TIMEOUT = server.STALL_TIMEOUT = 600
def lose_patience(*_):
    server.STALL_TIMEOUT = 1
    time.time = lambda now=time.time: now() - 3600
signal.signal(signal.SIGUSR1, lose_patience)
"""
# The system holds little of a response, so that most of it waits in the server.
MAIN = """
import raffle, socket, waitress.adjustments
waitress.adjustments.Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
raffle.main()
"""


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


def create_long(server, prizes):
    """Create a raffle with so many prizes, 220 bytes each; return a request for it."""
    return request_for(server.create(prizes=[{"name": "x" * 200, "amount": 1}] * prizes))


def dribble(clients):
    """Send a byte from each client that is still connected."""
    for client in clients:
        with suppress(OSError):
            client.send(b"x")


def sockets(server):
    """Return how many sockets the process of a server has, the one that listens among them."""
    return sum(
        descriptor.is_socket() for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir()
    )


def mebibytes(server):
    """Return how much memory the process of a server occupies."""
    return (
        int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        * os.sysconf("SC_PAGE_SIZE")
        / MIB
    )


def test_a_whole_raffle_among_many_clients_at_once(serve):
    participants = 200
    server = serve(MANAGER_IPS="127.0.0.1, 127.0.0.2")
    prizes = [
        {"name": "Bicycle", "amount": 1},
        {"name": "Book", "amount": 30},
        {"name": "Pen", "amount": 69},
    ]
    raffle = server.create(participants, prizes)

    def participate(n):
        return server.request("POST", f"{raffle}participate/", source=f"127.1.1.{n + 1}")

    # Everybody asks twice, at the same time.
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(participate, [n for n in range(participants) for _ in range(2)]))
    tickets = [ticket for status, _, ticket in answers if status == 201]
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, participants + 1))
    for first, second in zip(answers[::2], answers[1::2]):
        assert sorted([first[0], second[0]]) in ([201, 403], [201, 410])

    managers = ("127.0.0.1", "127.0.0.2")
    draws = at_once(
        [partial(server.request, "POST", f"{raffle}winners/", source=source) for source in managers]
    )
    (drawn, _, wins), (refused, _, problem) = sorted(draws, key=lambda answer: answer[0])
    assert (drawn, refused, problem["type"]) == (201, 403, "urn:raffle:already-drawn")
    assert server.list_wins(raffle) == wins
    assert [win["prize"] for win in wins] == ["Bicycle"] + ["Book"] * 30 + ["Pen"] * 69
    prize_of = {win["ticket_number"]: win["prize"] for win in wins}
    assert len(prize_of) == len(wins)

    verify = partial(server.request, "POST", f"{raffle}verify-ticket/")
    codes = [ticket["verification_code"] for ticket in tickets]
    mixed = [
        {**ticket, "verification_code": code}
        for ticket, code in zip(tickets, codes[1:] + codes[:1])
    ]
    with ThreadPoolExecutor(16) as pool:
        for ticket, (status, _, verdict) in zip(tickets, pool.map(verify, tickets)):
            prize = prize_of.get(ticket["ticket_number"])
            assert (status, verdict["has_won"], verdict["prize"]) == (200, prize is not None, prize)
        problems = {(status, problem["type"]) for status, _, problem in pool.map(verify, mixed)}
        assert problems == {(400, "urn:raffle:invalid-code")}


def test_hundreds_of_stalled_clients_keep_nobody_from_a_ticket(serve, stall, database):
    server = serve(program=("-c", MANY_FILES + PATIENT + MAIN), RAFFLE_THREADS="2")
    ask, raffle = create_long(server, 4_500), server.create()
    # The first long responses leave some memory with the threads, and with every connection that reads.
    assert {client.recv(8) for client in stall(server, 40, ask)} == {b"HTTP/1.1"}
    before = mebibytes(server)
    stall(server, 100)
    dribbling = stall(server, 100, HALF_HEAD) + stall(server, 100, HALF_BODY)
    # More of them than threads send pipelined requests, whose responses could fill any buffer.
    unreading = stall(server, 3, ask * 20) + stall(server, 37, ask)
    assert {client.recv(8) for client in unreading} == {b"HTTP/1.1"}
    for n in range(20):
        dribble(dribbling)
        assert server.request("POST", f"{raffle}participate/", source=f"127.1.1.{n + 1}")[0] == 201
    wait_for(lambda: sockets(server) == 381)
    # 40 mebibytes of responses wait, but in files.
    assert mebibytes(server) < before + 20
    # Nobody who reads keeps the -wal file from being used again.
    [(is_busy, length, checkpointed)] = query(database, "PRAGMA wal_checkpoint")
    assert (is_busy, checkpointed) == (0, length)


def test_a_client_that_stalls_is_closed_and_one_that_waits_is_not(serve, stall, database):
    server = serve(program=("-c", PATIENT + MAIN))
    ask, raffle = create_long(server, 500), server.create()
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        [waiting] = stall(server, 1, request_for(f"{raffle}participate/", "POST"))
        dribbling = stall(server, 2, HALF_HEAD) + stall(server, 2, HALF_BODY)
        answered = stall(server, 2, ask) + stall(server, 2, request_for("/nothing/"))
        assert {client.recv(8) for client in answered} == {b"HTTP/1.1"}
        stall(server, 2)
        wait_for(lambda: sockets(server) == 12)
        server.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: dribble(dribbling) or sockets(server) == 2)
        other.execute("ROLLBACK")
        assert waiting.recv(12) == b"HTTP/1.1 201"


def test_pipelined_requests_are_dropped_after_the_first(serve):
    with serve().connect() as client:
        client.sendall(request_for("/health") * 20)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert (
        answer.count(b"HTTP/1.1 ")
        == answer.count(b"HTTP/1.1 200")
        == answer.count(b"Connection: close")
        == 1
    )


def test_blank_lines_around_a_request_are_not_a_request(serve):
    server = serve()
    for blank in (b"\r\n", b"\r\n\r\n", b"\r\n" * 5):
        for is_apart in (False, True):
            with server.connect() as client:
                client.sendall(blank)
                if is_apart:
                    # When this is answered, the server has read the blank lines.
                    server.request("GET", "/health")
                client.sendall(request_for("/health") + blank)
                answer = client.recv(65536)
                assert (answer[9:12], b"Connection: close" in answer) == (b"200", False), (
                    blank,
                    is_apart,
                )


def test_a_body_may_come_in_chunks_and_not_be_longer_than_the_limits(serve):
    server = serve()
    head = b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    body = json.dumps({"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}).encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    too_long, endless = b" " * (MIB + 1), b"fffffff\r\n".ljust(2 * MIB)
    for request, status, kind in (
        (
            chunked + b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:]),
            b"201",
            b"json",
        ),
        (head + b"Content-Length: %d\r\n\r\n%s" % (MIB + 1, too_long), b"413", b"problem+json"),
        (chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (MIB + 1, too_long), b"413", b"problem+json"),
        # Past the hard limit the server does not read on, so nothing more is sent.
        (head + b"Content-Length: %d\r\n\r\n" % (2 * MIB), b"413", None),
        (chunked + endless, b"413", None),
    ):
        answer = server.send(request)
        found = re.search(rb"Content-Type: application/(\S+)", answer)
        assert (answer[9:12], found and found[1]) == (status, kind), request[:200]
    assert len(server.request("GET", "/raffles/")[2]) == 1


def test_the_greeting_names_the_port_and_as_many_threads_run_as_the_setting_says(serve):
    server = serve(RAFFLE_THREADS="7")
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
    assert (
        server.request("POST", f"{server.create(source='::1')}participate/", source="::1")[0] == 201
    )


def test_waitress_serve_can_call_the_application_factory(database):
    command = [
        sys.executable,
        "-m",
        "waitress",
        "--listen=127.0.0.1:0",
        "--call",
        "raffle:create_app",
    ]
    environment = {**os.environ, "RAFFLE_DATABASE": str(database)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            port = int(process.stderr.readline().rpartition(":")[2])
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
                connection.request("GET", "/raffles/")
                assert connection.getresponse().read() == b"[]\n"
        finally:
            process.terminate()


def test_a_server_survives_what_no_client_library_sends_and_never_says_what_it_is(serve):
    server = serve()
    head = b"Host: x\r\nConnection: close\r\n\r\n"
    for request, status in (
        (b"GET http://x/raffles/ HTTP/1.1\r\n", b"200"),
        (b"BREW /raffles/ HTTP/1.1\r\n", b"405"),
        (
            b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\n",
            b"415",
        ),  # there is no body to wait for
        (b"GET /raffles/%0A HTTP/1.1\r\n", b"404"),
        (b"GET /raffles/?limit=%FF&cursor=\xff HTTP/1.1\r\n", b"400"),
        (b"POST /raffles/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n", b"411"),
        (b"\x00\x01\x02\r\n", b"400"),
        (b"GET http://[::1/ HTTP/1.1\r\n", b""),  # closed without an answer
        (b"POST /raffles/ HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n", b""),
    ):
        answer = server.send(request + head)
        assert answer[9:12] == status, request[:100]
        assert not re.search(b"(?i)waitress|bottle|python|\r\nserver:", answer), request[:100]
    assert server.request("GET", "/raffles/")[2] == []
