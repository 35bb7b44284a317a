"""What has been answered survives: crashes, full disks, locks, and the order to stop."""

import http.client
import os
import random
import resource
import signal
import socket
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from helpers import ONE_PRIZE, fill

from raffle import check_draw

CRASHES = int(os.environ.get("RAFFLE_TEST_CRASHES", "30"))


SMALL_BUFFERS = """
import socket, raffle
from waitress.adjustments import Adjustments
Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
raffle.main()
"""

# Is killed at a certain statement after the one that says of a raffle that its winners are drawn.
KILLED_IN_A_DRAW = """
import os, signal, sqlite3, raffle

def connect_traced(*arguments, **options):
    def trace(statement):
        if counted or "SET winners_drawn = 1" in statement:
            counted.append(statement)
        if len(counted) > {statements}:
            os.kill(os.getpid(), signal.SIGKILL)

    counted = []
    connection = connect(*arguments, **options)
    connection.set_trace_callback(trace)
    return connection

connect, sqlite3.connect = sqlite3.connect, connect_traced
raffle.main()
"""


def create(server, total_tickets, prizes=ONE_PRIZE):
    body = {"name": "Fair", "total_tickets": total_tickets, "prizes": prizes}
    status, headers, _ = server.request("POST", "/raffles/", body)
    assert status == 201
    return headers["Location"]


def address(n):
    return f"127.{n // 62500 + 1}.{n // 250 % 250}.{n % 250 + 1}"


class Crowd:
    """Participants, each with an address of its own, who ask for tickets many at a time until they are told to stop."""

    def __init__(self, size=8):
        self.tickets = []  # (address, ticket) of each that was answered
        self.statuses = Counter()
        self.numbers = count()
        self.size = size
        self.changed = threading.Condition()

    def start(self, server, raffle):
        self.over = False
        self.threads = [threading.Thread(target=self.ask, args=(server, raffle)) for _ in range(self.size)]
        for thread in self.threads:
            thread.start()

    def ask(self, server, raffle):
        while not self.over:
            source = address(next(self.numbers))
            try:
                status, _, ticket = server.request("POST", f"{raffle}participate/", source=source)
            except (OSError, http.client.HTTPException):
                status, ticket = None, None
            with self.changed:
                self.statuses[status] += 1
                if status == 201:
                    self.tickets.append((source, ticket))
                if status is None:
                    self.over = True
                self.changed.notify()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 60)

    def stop(self):
        self.over = True
        for thread in self.threads:
            thread.join()


def assert_kept(database, tickets):
    """Check that every answered ticket is in the database as it was answered, and that the database is sound."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = connection.execute("SELECT number, participant FROM ticket").fetchall()
        [(total, available)] = connection.execute("SELECT total_tickets, available_tickets FROM raffle").fetchall()
    assert len(rows) == total - available
    assert len({number for number, _ in rows}) == len({participant for _, participant in rows}) == len(rows)
    kept = set(rows)
    for source, ticket in tickets:
        assert (ticket["ticket_number"], socket.inet_aton(source)) in kept


def test_no_answered_ticket_is_lost_when_the_process_is_killed(serve, database):
    total = CRASHES * 40 + 100
    crowd = Crowd()
    raffle = None
    for _ in range(CRASHES):
        server = serve()
        raffle = raffle or create(server, total)
        answered = len(crowd.tickets) + random.randrange(1, 40)
        crowd.start(server, raffle)
        crowd.wait_for(lambda answered=answered: len(crowd.tickets) >= answered)
        server.stop(signal.SIGKILL)
        crowd.stop()
        assert_kept(database, crowd.tickets)
    server = serve()
    crowd.start(server, raffle)
    crowd.wait_for(lambda: crowd.statuses[410])
    crowd.stop()
    assert_kept(database, crowd.tickets)
    assert server.request("POST", f"{raffle}winners/")[0] == 201
    with ThreadPoolExecutor(8) as pool:
        verified = pool.map(lambda item: server.request("POST", f"{raffle}verify-ticket/", item[1]), crowd.tickets)
        assert {status for status, _, _ in verified} == {200}


def test_a_draw_is_kept_whole_or_not_at_all_whichever_statement_the_process_is_killed_at(serve, database):
    raffle = fill(database, 30_000, [{"name": "Pen", "amount": 30_000}])

    def kept():
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return connection.execute("SELECT winners_drawn, (SELECT count(*) FROM win) FROM raffle").fetchone()

    for statements in count(1):
        server = serve(program=("-c", KILLED_IN_A_DRAW.format(statements=statements)))
        try:
            status, _, _ = server.request("POST", f"{raffle}winners/")
        except (OSError, http.client.HTTPException):
            assert kept() == (0, 0)
        else:
            break
    assert statements > 4  # or else it was never killed with some of the wins written
    server.stop(signal.SIGKILL)
    assert (status, kept()) == (201, (1, 30_000))
    # What is there then can be checked.
    server = serve()
    receipt, wins, page = server.request("GET", f"{raffle}draw/")[2], [], f"{raffle}winners/"
    while page:
        _, headers, more = server.request("GET", page)
        wins += more
        page = headers.get("Link", "").partition(">")[0][1:]
    assert all(holds for _, holds in check_draw(receipt, wins))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_order_to_stop_is_followed_once_what_has_arrived_is_answered(serve, tmp_path, database, how):
    server = serve()
    raffle = create(server, 100_000)
    crowd = Crowd(size=32)
    listening = (server.host, int(server.port))
    with closing(socket.create_connection(listening)) as idle, closing(socket.create_connection(listening)) as stalled:
        stalled.sendall(b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        crowd.start(server, raffle)
        crowd.wait_for(lambda: len(crowd.tickets) > 100)
        assert server.stop(how) == 0
        crowd.stop()
        assert idle.recv(1) == stalled.recv(1) == b""
    assert {file.name for file in tmp_path.iterdir()} == {"raffle.db", "log"}
    assert_kept(database, crowd.tickets)
    with closing(sqlite3.connect(database)) as connection:
        [(issued,)] = connection.execute("SELECT count(*) FROM ticket").fetchall()
    assert issued == len(crowd.tickets)
    assert "Traceback" not in server.log.read_text()


def test_a_full_disk_is_told_and_survived(serve, database):
    server = serve()
    raffle = create(server, 100_000)
    _, unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, unlimited))
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for(lambda: crowd.statuses[503] >= 20)
    status, _, left = server.request("GET", raffle)
    assert status == 200
    status, headers, _ = server.request("POST", f"{raffle}participate/", source="127.200.0.1")
    assert (status, headers["Retry-After"]) == (503, "5")
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    answered = len(crowd.tickets)
    crowd.wait_for(lambda: len(crowd.tickets) > answered + 20)
    crowd.stop()
    assert set(crowd.statuses) == {201, 503}
    assert server.request("GET", raffle)[2]["available_tickets"] == 100_000 - len(crowd.tickets)
    assert left["available_tickets"] > 100_000 - len(crowd.tickets)
    assert_kept(database, crowd.tickets)


def test_a_file_that_another_process_locks_is_told_and_survived(serve, database):
    server = serve()
    raffle = create(server, 100_000)
    crowd = Crowd()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        crowd.start(server, raffle)
        crowd.wait_for(lambda: crowd.statuses[503] >= 100)
        assert crowd.tickets == []
        assert server.request("GET", raffle)[2]["available_tickets"] == 100_000
        other.execute("ROLLBACK")
        crowd.wait_for(lambda: len(crowd.tickets) > 20)
        crowd.stop()
    assert set(crowd.statuses) == {201, 503}
    assert_kept(database, crowd.tickets)
    log = server.log.read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in log[1:]] == ["Writes fail: database is locked", "Writes go on"]


def test_requests_that_arrived_before_the_order_to_stop_are_answered(serve):
    server = serve()
    request = b"GET /raffles/ HTTP/1.1\r\nHost: x\r\n\r\n"
    server.process.send_signal(signal.SIGSTOP)
    clients = [socket.create_connection((server.host, int(server.port))) for _ in range(10)]
    for client in clients:
        client.sendall(request)
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
    assert server.stop(signal.SIGCONT) == 0
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 200"
        client.close()


def test_of_requests_that_come_at_once_on_a_connection_only_the_first_is_answered(serve):
    # The answers to the others would fill the buffers of a client that does not read, and hold a thread for ever.
    server = serve()
    with socket.create_connection((server.host, int(server.port)), timeout=30) as client:
        client.sendall(b"GET /raffles/ HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        answered = b"".join(iter(lambda: client.recv(65536), b""))
    assert answered.count(b"HTTP/1.1 200 OK") == 1
    assert b"Connection: close" in answered
    assert server.request("GET", "/raffles/")[0] == 200


def test_clients_that_never_read_hold_neither_threads_nor_memory_nor_the_wal(serve, database):
    raffle = fill(database, 10_000, [{"name": "x" * 20, "amount": 10_000}])
    # The system would take two megabytes for each of them.
    server = serve(program=("-c", SMALL_BUFFERS))
    assert len(server.request("POST", f"{raffle}winners/")[2]) == 10_000

    def resident():
        statm = Path(f"/proc/{server.process.pid}/statm").read_text()
        return int(statm.split()[1]) * resource.getpagesize()

    before = resident()
    clients = []
    for _ in range(50):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((server.host, int(server.port)))
        client.sendall(f"GET {raffle}winners/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        clients.append(client)
    # Each of them has its answer waiting: the first bytes of it have come.
    for client in clients:
        assert client.recv(8) == b"HTTP/1.1"
    crowd = Crowd()
    other = create(server, 100_000)
    crowd.start(server, other)
    crowd.wait_for(lambda: len(crowd.tickets) >= 100)
    crowd.stop()
    assert resident() - before < 50 * 4 * 2**20
    with closing(sqlite3.connect(database)) as connection:
        # Everything can be checkpointed: no reader is in the way, so the WAL stays as short as it should be.
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    for client in clients:
        client.close()
