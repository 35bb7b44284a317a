"""What was answered survives crashes, full disks, locks, orders to stop, and draws cut short."""

import http.client
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from functools import partial
from itertools import count

import pytest
from helpers import FAULTS, ROOT, Crowd, assert_drawn, assert_kept, at_once, installed, query

CRASHES = int(os.environ.get("RAFFLE_TEST_CRASHES", "10"))


# Tickets


def test_a_kill_neither_loses_nor_doubles_an_answered_ticket(serve, database):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    total = 60 * CRASHES
    crowd, path = Crowd(), None

    for _ in range(CRASHES):
        server = serve()
        path = path or server.create(total)
        assert_kept(database, crowd.tickets)
        with crowd.asking(server, path):
            crowd.wait_for_tickets(chance.randrange(1, 20))
            server.stop(signal.SIGKILL)

    assert crowd.statuses[None] >= CRASHES  # they were still asking, each time

    server = serve()
    with crowd.asking(server, path):
        crowd.wait_for(lambda: crowd.statuses[410])
    assert_kept(database, crowd.tickets)
    numbers = query(database, "SELECT number FROM ticket ORDER BY number")
    assert numbers == [(number,) for number in range(1, total + 1)]


def test_a_ticket_is_synced_to_disk_before_it_is_answered(serve, tmp_path):
    trace = tmp_path / "trace"
    # -D: the server is the process that is started, and strace is its child.
    strace = [installed("strace"), "-D", "-f", "-y", "-o", str(trace)]
    strace += ["-e", "trace=fsync,fdatasync,sendto", "-e", "signal=none"]
    server = serve(wrapper=strace, processes=1)

    path = server.create()
    assert server.request("POST", f"{path}participate/")[0] == 201
    server.stop()

    # Between the answer with the raffle and the answer with the ticket.
    _, between, _ = re.split(r'sendto\(.*"HTTP/1.1 201 .*', trace.read_text())
    assert re.search(r"sync\(\d+<.*/raffle.db-wal>\) += 0", between)


# Disks, locks and processes


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", directory]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("only root can mount a small disk")

    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_answers_503_and_recovers(small_disk, serve):
    database, ballast = small_disk / "raffle.db", small_disk / "ballast"
    server = serve(RAFFLE_DATABASE=str(database), processes=1)
    path, crowd = server.create(), Crowd()

    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass

    with crowd.asking(server, path):
        crowd.wait_for(lambda: crowd.statuses[503] >= 20)
        status, headers, _ = server.request("POST", f"{path}participate/", source="127.200.0.1")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert server.request("GET", path)[0] == 200
        # A write is tried, each time: a transaction that writes nothing would succeed.
        assert [server.request("GET", "/health")[0] for _ in range(3)] == [503] * 3

        crowd.close()
        ballast.unlink()
        assert server.request("GET", "/health")[0] == 200

    with crowd.asking(server, path):
        crowd.wait_for_tickets(20)
    assert set(crowd.statuses) == {201, 503}
    assert re.findall("Writes (fail|succeed)", server.log.read_text()) == ["fail", "succeed"]
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)


def test_health_writes_nothing_while_writes_succeed(client, database):
    client.new_raffle()
    wal = database.with_name("raffle.db-wal")
    before = wal.read_bytes()
    assert before

    for _ in range(3):
        assert client.get("/health").json == {"status": "ok"}
    assert wal.read_bytes() == before


def test_a_lock_of_another_process_answers_503_and_is_survived(serve, database):
    server = serve(program=(FAULTS, "database.BUSY_TIMEOUT=0.2"))
    path, crowd = server.create(), Crowd()

    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with crowd.asking(server, path):
            crowd.wait_for(lambda: crowd.statuses[503] >= 100)
            assert crowd.tickets == []
            assert server.request("GET", path)[2]["issued_tickets"] == 0

            other.execute("ROLLBACK")
            crowd.wait_for_tickets(20)

    assert set(crowd.statuses) == {201, 503}
    assert_kept(database, crowd.tickets)


def test_a_process_forked_after_the_start_gets_503_at_once(tmp_path, database):
    """As with gunicorn --preload. A request that hangs ends the program, by its timeout."""
    done = subprocess.run(
        [sys.executable, ROOT / FAULTS, "fork"],
        cwd=tmp_path,
        env={**os.environ, "RAFFLE_DATABASE": str(database)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "[503, 503, 503, 503, 503]\n"
    assert done.stderr.count("create the application in each worker") == 1

    # Closed by the process that opened it, with both tickets.
    assert list(tmp_path.iterdir()) == [database]
    assert query(database, "SELECT count(*) FROM ticket") == [(2,)]


def fail_a_commit(server):
    """Have a crowd ask until a commit fails with an I/O error; return the path and the crowd."""
    path, crowd = server.create(), Crowd()
    process = server.process.pid
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)

    resource.prlimit(process, resource.RLIMIT_FSIZE, (300_000, hard))
    with crowd.asking(server, path):
        crowd.wait_for(lambda: crowd.statuses[503] or crowd.statuses[None])
    resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))
    return path, crowd


def test_after_a_failed_commit_the_program_ends_with_1(serve, database):
    server = serve(processes=1)
    path, crowd = fail_a_commit(server)
    assert server.process.wait(30) == 1

    # What waited for that commit has been answered.
    assert crowd.statuses[503] >= 1
    assert server.log.read_text().count("unavailable until a restart") == 1

    with crowd.asking(serve(), path):
        crowd.wait_for_tickets(20)
    assert_kept(database, crowd.tickets)


def test_after_a_failed_commit_another_server_answers_503_only(serve, database):
    server = serve(program=(FAULTS, "serve_whatever_fails"), processes=1)
    path, crowd = fail_a_commit(server)

    for method, target in (("POST", f"{path}participate/"), ("GET", path), ("GET", "/health")):
        assert server.request(method, target, source="127.200.0.1")[0] == 503, target
    assert server.log.read_text().count("unavailable until a restart") == 1
    assert server.stop() == 0

    with crowd.asking(serve(), path):
        crowd.wait_for_tickets(20)
    assert_kept(database, crowd.tickets)


# The order to stop


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_has_arrived_and_waits_for_nothing_else(serve, database, how):
    server = serve(program=(FAULTS, "server.STOP_TIMEOUT=600"), processes=1)
    path = server.create()

    with server.connect() as idle, server.connect() as half:
        half.sendall(b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        server.request("GET", "/health")

        server.process.send_signal(signal.SIGSTOP)
        clients = [server.connect(f"127.0.1.{n}") for n in range(1, 11)]
        for n, client in enumerate(clients):
            # Every second one takes several turns of the event loop to read.
            body = bytes(30_000 * (n % 2))
            head = f"POST {path}participate HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)

        for _ in range(2):
            server.process.send_signal(how)
        assert server.stop(signal.SIGCONT) == 0
        assert idle.recv(1) == b""
        assert half.recv(1) == b""

    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 201"
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "log"}
    assert query(database, "SELECT issued_tickets FROM raffle") == [(10,)]
    assert "Traceback" not in server.log.read_text()


def test_a_stop_does_not_wait_for_a_client_that_does_not_read(serve):
    program = (FAULTS, "server.STOP_TIMEOUT=600", "keep_little_in_the_system")
    server = serve(program=program, processes=1)
    path = server.create(prizes=[{"name": "x" * 200, "amount": 1}] * 4_000)

    with server.connect() as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        # The rest of almost a megabyte is still with the server.
        assert client.recv(8) == b"HTTP/1.1"
        assert server.stop() == 0


# Draws that are interrupted


def start_draw(serve, amount, action, statement, number):
    """Draw so many prizes with the randomness "decided", and interrupt the draw.

    The draw commits the decision, then two wins at a time, then that it is complete. Return the
    server, the path, a ticket, and the status of the answer, or None if there was none.
    """
    limits = ("storage.WINS_PER_COMMIT=2", "server.STOP_TIMEOUT=0")
    interruption = ("interrupt_draw", action, statement, str(number))
    server = serve(program=(FAULTS, *limits, *interruption), processes=1)
    prizes = [{"name": "Pen", "amount": amount - 1}, {"name": "Book", "amount": 1}]
    path, [(_, ticket), *_] = server.create_sold_out(amount, prizes)

    status = None
    with suppress(OSError, http.client.HTTPException):
        status, _, _ = server.request("POST", f"{path}winners/", {"public_randomness": "decided"})
    return server, path, ticket, status


def complete_draw(server, path, ticket, is_decided=True):
    """Draw again, with the randomness "other"; check that the first decision counts.

    Check also that nothing of the draw was shown before.
    """
    assert server.request("GET", f"{path}winners/")[2] == []
    for action in ("verify-ticket", "redeem"):
        status, _, problem = server.request("POST", f"{path}{action}/", ticket)
        assert (status, problem["type"]) == (400, "urn:raffle:not-drawn"), action

    status, _, answer = server.request("POST", f"{path}winners/", {"public_randomness": "other"})
    assert status == (403 if is_decided else 201), answer
    assert_drawn(server, path, "decided" if is_decided else "other")
    assert server.request("POST", f"{path}verify-ticket/", ticket)[2]["has_won"]


def test_a_draw_killed_at_any_commit_is_completed_as_decided(serve, database):
    killed = []
    for number in count(1):
        server, path, ticket, status = start_draw(serve, 3, "kill", "COMMIT", number)
        if status:
            break
        killed.append((path, ticket))
        server.process.wait(30)
    assert status == 201
    server.stop()

    # Before each of the four commits.
    states = query(
        database,
        """
        SELECT public_randomness, count(position)
        FROM raffle LEFT JOIN win ON raffle = sequence
        WHERE drawn_at IS NULL
        GROUP BY sequence
        """,
    )
    assert states == [(None, 0), ("decided", 0), ("decided", 2), ("decided", 3)]

    server = serve()
    for (path, ticket), (randomness, _) in zip(killed, states):
        complete_draw(server, path, ticket, is_decided=randomness is not None)


def test_a_draw_cut_off_by_a_stop_is_completed_as_decided(serve, database):
    # At the second commit of wins: the first one is stored.
    server, path, ticket, _ = start_draw(serve, 300, "stop", "COMMIT", 3)
    assert server.process.wait(30) == 0

    [(wins,)] = query(database, "SELECT count(*) FROM win")
    assert 2 <= wins < 300
    complete_draw(serve(), path, ticket)


def assert_draw_failed(server, path):
    """Check that the last error in the log names the raffle, and that no wins are shown."""
    errors = re.findall(" ERROR .*", server.log.read_text())
    assert path.split("/")[2] in errors[-1]
    assert server.request("GET", f"{path}winners/")[2] == []


def test_a_draw_that_another_program_takes_a_win_from_fails(serve):
    # The last transaction, after the decision and two of wins: all have been stored.
    server, path, _, status = start_draw(serve, 3, "delete", "BEGIN", 4)
    assert status == 500
    assert_draw_failed(server, path)


@pytest.mark.parametrize(
    "ticket_number",
    [9, 1],
    ids=["of a ticket that does not exist", "of a ticket that has won"],
)
def test_a_draw_that_another_program_adds_a_win_to_fails(serve, database, ticket_number):
    server = serve()
    path, _ = server.create_sold_out(1)
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute(
            """
            INSERT INTO win (raffle, position, ticket_number, prize_position)
            VALUES (1, 2, ?, 1)
            """,
            (ticket_number,),
        )

    assert server.request("POST", f"{path}winners/")[0] == 500
    assert_draw_failed(server, path)


def test_of_draws_at_once_one_decides_and_all_wait_for_it(serve):
    server = serve(program=(FAULTS, "storage.WINS_PER_COMMIT=1"))
    path, _ = server.create_sold_out(20, [{"name": "Pen", "amount": 20}])

    def draw(randomness):
        body = {"public_randomness": randomness}
        status, _, _ = server.request("POST", f"{path}winners/", body)
        assert len(server.list_wins(path)) == 20
        return status, randomness

    answers = sorted(at_once([partial(draw, f"draw {n}") for n in range(4)]))
    assert [status for status, _ in answers] == [201, 403, 403, 403]
    assert_drawn(server, path, answers[0][1])
