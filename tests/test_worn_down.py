"""Clients that rest, send slowly or never read take nothing from the others, and are closed in the end."""

import resource
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from helpers import SMALL_BUFFERS, Crowd, Stalling, fill, wait_for

PATIENT = "import server; server.STALL_TIMEOUT = 600" + SMALL_BUFFERS
# Waits for a lock longer than for a client that stalls.
IMPATIENT = "import database, server; server.STALL_TIMEOUT = 1; database.BUSY_TIMEOUT = 2" + SMALL_BUFFERS


@pytest.fixture
def stall(database):
    """Draw the winners of a raffle, and let clients stall, some of them before they have read who has won."""
    sold_out = fill(database, 2_500, [{"name": "x" * 200, "amount": 2_500}])
    stalling = []

    def start(server, **clients):
        server.request("POST", f"{sold_out}winners/")
        stalling.append(Stalling(server, f"{sold_out}winners/", **clients))
        return stalling[-1]

    yield start
    for clients in stalling:
        clients.stop()


def test_hundreds_of_stalling_clients_do_not_keep_others_from_their_tickets(serve, stall):
    server = serve(program=("-c", PATIENT))
    raffle = server.create()
    stalling = stall(server, resting=200, dribbling=200, unreading=50)
    assert stalling.count_open() == 450
    for n in range(100):
        assert server.request("POST", f"{raffle}participate/", source=f"127.1.1.{n + 1}")[0] == 201
    assert stalling.count_open() == 450
    assert "WARNING" not in server.log.read_text()


def test_clients_that_never_read_hold_neither_threads_nor_memory_nor_the_wal(serve, stall, database):
    # Every thread keeps some of the memory that its first long answer has taken.
    server = serve(program=("-c", PATIENT), RAFFLE_THREADS="2")
    raffle = server.create()

    def resident():
        statm = Path(f"/proc/{server.process.pid}/statm").read_text()
        return int(statm.split()[1]) * resource.getpagesize()

    for client in stall(server, resting=0, dribbling=0, unreading=10).unreading:
        assert client.recv(8) == b"HTTP/1.1"
    before = resident()
    for client in stall(server, resting=0, dribbling=0, unreading=60).unreading:
        # The first bytes of its answer have come, the rest is waiting.
        assert client.recv(8) == b"HTTP/1.1"
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for_tickets(100)
    crowd.stop()
    assert resident() - before < 60 * 2**17  # a fifth of the answers
    with closing(sqlite3.connect(database)) as connection:
        # No reader is in the way of a checkpoint, so the WAL stays as short as it should be.
        busy, length, checkpointed = connection.execute("PRAGMA wal_checkpoint").fetchone()
    assert (busy, checkpointed) == (0, length)


def test_who_stalls_is_closed_and_who_is_served_is_not(serve, stall, database):
    server = serve(program=("-c", IMPATIENT))
    raffle = server.create()
    descriptors = Path(f"/proc/{server.process.pid}/fd")

    def only_listens():
        return sum(descriptor.is_socket() for descriptor in descriptors.iterdir()) == 1

    stalling = stall(server, resting=3, dribbling=3, unreading=3)
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert server.request("POST", f"{raffle}participate/")[0] == 503
        # In this order, because to see which are open is to read.
        wait_for(lambda: only_listens() and stalling.count_open() == 0)


def test_who_stalls_is_closed_even_if_the_clock_is_put_back(serve):
    put_back = "import signal, time; now = time.time; late = lambda: now() - 3600\n"
    put_back += "signal.signal(signal.SIGUSR1, lambda *_: setattr(time, 'time', late))\n"
    server = serve(program=("-c", put_back + IMPATIENT))
    with server.connect() as client:
        client.sendall(b"GET /nothing/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        server.process.send_signal(signal.SIGUSR1)
        while client.recv(65536):
            pass


def test_of_requests_that_come_at_once_on_a_connection_only_the_first_is_answered(serve):
    # The answers to the others would fill the buffers of a client that does not read, and hold a thread for ever.
    server = serve()
    with server.connect() as client:
        client.sendall(b"GET /raffles/ HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        answered = b"".join(iter(lambda: client.recv(65536), b""))
    assert answered.count(b"HTTP/1.1 200 OK") == 1
    assert b"Connection: close" in answered
    assert server.request("GET", "/raffles/")[0] == 200
