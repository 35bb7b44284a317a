"""What has been answered survives: crashes, full disks, locks, other programs, and the order to stop."""

import http.client
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count

import pytest
from helpers import Crowd, assert_kept, fill, wait_for

from draw import check_draw, digest_of_tickets
from storage import Storage

CRASHES = int(os.environ.get("RAFFLE_TEST_CRASHES", "10"))

# Is killed at a certain one of the statements that close a raffle or draw its winners, and of their commits.
KILLED = """
import os, re, signal, sqlite3, raffle, storage

def connect_traced(*arguments, **options):
    def trace(statement):
        if re.search({start!r}, statement) or counted:
            counted.extend(re.findall("DELETE FROM|INSERT INTO|UPDATE|COMMIT", statement))
        if len(counted) > {statements}:
            os.kill(os.getpid(), signal.SIGKILL)

    counted = []
    connection = connect(*arguments, **options)
    connection.set_trace_callback(trace)
    return connection

connect, sqlite3.connect = sqlite3.connect, connect_traced
storage.ROWS_PER_COMMIT = 400
raffle.main()
"""

# A checkpoint syncs and changes the file as well.
NO_CHECKPOINTS = "import database, raffle; database.CHECKPOINT_INTERVAL = 600; raffle.main()"
# Writes down what it syncs and what it sends.
TRACED = """
import os
strace = "strace -D -f -y -e trace=fsync,fdatasync,sendto -e signal=none -o".split()
os.execvp("strace", [*strace, {trace!r}, {python!r}, "-c", {program!r}])
"""


def test_no_answered_ticket_is_lost_when_the_process_is_killed(serve, database):
    total = CRASHES * 40 + 100
    crowd = Crowd()
    raffle = None
    for _ in range(CRASHES):
        server = serve()
        raffle = raffle or server.create(total)
        crowd.start(server, raffle)
        crowd.wait_for_tickets(random.randrange(1, 40))
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


def test_a_ticket_is_on_the_disk_before_it_is_answered(serve, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("there is no strace here")
    trace = tmp_path / "trace"
    program = TRACED.format(trace=str(trace), python=sys.executable, program=NO_CHECKPOINTS)
    server = serve(program=("-c", program))
    raffle = server.create()
    assert server.request("POST", f"{raffle}participate/")[0] == 201
    server.stop()
    _, between, _ = re.split(r'sendto\(.*"HTTP/1.1 201 .*', trace.read_text())
    assert re.search(r"sync\(\d+<.*/raffle.db-wal>\) += 0", between)


def test_a_draw_is_kept_whole_or_not_at_all_whichever_statement_the_process_is_killed_at(serve, look, database):
    raffle = fill(database, 1_000, [{"name": "Pen", "amount": 700}, {"name": "Book", "amount": 300}])
    left_over = set()
    for statements in count(1):
        # As another draw has left them that was interrupted.
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("DELETE FROM win")
            connection.executemany("INSERT INTO win VALUES (1, ?, ?, 1, NULL)", ((n, n) for n in range(1, 1_001)))
            connection.commit()
        server = serve(program=("-c", KILLED.format(statements=statements, start="DELETE FROM win")))
        assert server.request("GET", f"{raffle}winners/")[2] == []
        try:
            status, _, wins = server.request("POST", f"{raffle}winners/")
        except (OSError, http.client.HTTPException):
            server.process.wait(30)
            assert look("PRAGMA integrity_check") == [("ok",)]
            assert look("SELECT winners_drawn FROM raffle") == [(0,)]
            left_over.update(look("SELECT count(*) FROM win"))
        else:
            break
    # It was killed with some of the others' wins deleted, with some of its own stored, and with all.
    assert left_over == {(1_000,), (600,), (200,), (0,), (400,), (800,)}
    assert (status, len(wins)) == (201, 1_000)
    server.stop(signal.SIGKILL)
    # What is there then can be checked.
    server = serve()
    receipt = server.request("GET", f"{raffle}draw/")[2]
    assert all(holds for _, holds in check_draw(receipt, server.list_wins(raffle)))


def test_a_close_is_finished_later_whichever_statement_the_process_is_killed_at(serve, look, database):
    states = []
    for statements in count(1):
        server = serve(program=("-c", KILLED.format(statements=statements, start="SET available_tickets = 0")))
        raffle = server.create(50)
        numbers = [server.request("POST", f"{raffle}participate/", source=f"127.0.1.{n}")[2] for n in range(1, 9)]
        with suppress(OSError, http.client.HTTPException):
            assert server.request("POST", f"{raffle}close/")[0] == 200
            break
        # Only then is the file no longer locked.
        server.process.wait(30)
        store = Storage(database)
        with closing(store.database):
            raffle_id = raffle.split("/")[2]
            left = store.get_raffle(raffle_id)
            states.append((left["closed_at"] is not None, left["tickets_sha256"] is not None))
            # After the last commit there is nothing to finish.
            closed = left if left["tickets_sha256"] else store.close_raffle(raffle_id)
            listed = sorted(ticket["ticket_number"] for ticket in numbers)
            assert store.list_tickets(raffle_id, 10) == (listed, None)
            assert (closed["issued_tickets"], closed["tickets_sha256"]) == (8, digest_of_tickets(listed))
        assert look("SELECT * FROM displaced") == []
    # Killed before the first commit, between the first and the last, and after the last.
    assert set(states) >= {(False, False), (True, False)}


def test_the_order_to_stop_ends_a_draw_at_its_next_commit(serve, database):
    raffle = fill(database, 1_000, [{"name": "Pen", "amount": 1_000}])
    server = serve(program=("-c", "import storage, raffle; storage.ROWS_PER_COMMIT = 1; raffle.main()"))
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(server.request, "POST", f"{raffle}winners/")
        with closing(sqlite3.connect(database)) as connection:
            wait_for(lambda: connection.execute("SELECT count(*) FROM win").fetchone()[0] > 10)
        assert server.stop() == 0
        assert drawing.result()[0] == 503
    server = serve()
    assert server.request("GET", f"{raffle}winners/")[2] == []
    assert server.request("POST", f"{raffle}winners/")[0] == 201
    assert len(server.list_wins(raffle)) == 1_000


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_order_to_stop_is_followed_once_what_has_arrived_is_answered(serve, tmp_path, database, how):
    server = serve()
    raffle = server.create()
    crowd = Crowd(size=32)
    with server.connect() as idle, server.connect() as stalled:
        stalled.sendall(b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        crowd.start(server, raffle)
        crowd.wait_for_tickets(100)
        assert server.stop(how) == 0
        crowd.stop()
        assert idle.recv(1) == stalled.recv(1) == b""
    assert {file.name for file in tmp_path.iterdir()} == {"raffle.db", "log"}
    assert_kept(database, crowd.tickets)
    with closing(sqlite3.connect(database)) as connection:
        [(issued,)] = connection.execute("SELECT count(*) FROM ticket").fetchall()
    assert issued == len(crowd.tickets)
    assert "Traceback" not in server.log.read_text()


def test_requests_that_arrived_before_the_order_to_stop_are_answered(serve):
    short = b"GET /raffles/ HTTP/1.1\r\nHost: x\r\n\r\n"
    # Takes several turns of the event loop to read.
    long = b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n" + bytes(30_000)
    server = serve()
    server.process.send_signal(signal.SIGSTOP)
    clients = [(server.connect(), *kind) for kind in ((short, b"HTTP/1.1 200"), (long, b"HTTP/1.1 415")) * 5]
    for client, request, _ in clients:
        client.sendall(request)
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
    assert server.stop(signal.SIGCONT) == 0
    for client, _, answer in clients:
        assert client.recv(12) == answer
        client.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", directory], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_is_told_and_survived(small_disk, serve):
    database, ballast = small_disk / "raffle.db", small_disk / "ballast"
    server = serve(RAFFLE_DATABASE=str(database))
    raffle = server.create()
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for(lambda: crowd.statuses[503] >= 20)
    status, headers, _ = server.request("POST", f"{raffle}participate/", source="127.200.0.1")
    assert (status, headers["Retry-After"]) == (503, "5")
    assert server.request("GET", raffle)[0] == 200
    ballast.unlink()
    crowd.wait_for_tickets(20)
    crowd.stop()
    assert set(crowd.statuses) == {201, 503}
    assert server.request("GET", raffle)[2]["available_tickets"] == 100_000 - len(crowd.tickets)
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)


def test_after_a_write_that_has_failed_no_ticket_is_answered_until_a_restart(serve, database):
    server = serve()
    raffle = server.create()
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for(lambda: crowd.statuses[503])
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
    late = Crowd(first=50_000)
    late.start(server, raffle)
    late.wait_for(lambda: late.statuses[503] >= 20)
    late.stop()
    crowd.stop()
    assert set(late.statuses) == {503}
    assert server.log.read_text().count("until a restart") == 1
    server.stop(signal.SIGKILL)
    server = serve()
    crowd.start(server, raffle)
    crowd.wait_for_tickets(20)
    crowd.stop()
    assert_kept(database, crowd.tickets)


def test_a_file_that_another_process_locks_is_told_and_survived(serve, database):
    server = serve(program=("-c", "import database, raffle; database.BUSY_TIMEOUT = 0.5; raffle.main()"))
    raffle = server.create()
    crowd = Crowd()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        crowd.start(server, raffle)
        crowd.wait_for(lambda: crowd.statuses[503] >= 100)
        assert crowd.tickets == []
        assert server.request("GET", raffle)[2]["available_tickets"] == 100_000
        other.execute("ROLLBACK")
        crowd.wait_for_tickets(20)
        crowd.stop()
    assert set(crowd.statuses) == {201, 503}
    assert_kept(database, crowd.tickets)
    log = server.log.read_text().splitlines()
    assert [line.split(" ", 3)[3] for line in log[1:]] == ["Writes fail: database is locked", "Writes succeed again"]


@pytest.mark.parametrize(
    "change", ["cp other.db raffle.db", "mv other.db raffle.db", "rm raffle.db-wal", "truncate -s 0 raffle.db-wal"]
)
def test_no_ticket_is_answered_once_another_program_has_changed_the_files(serve, tmp_path, database, change):
    server = serve(program=("-c", NO_CHECKPOINTS))
    raffle = server.create()
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(tmp_path / "other.db")) as other:
        source.backup(other)
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for_tickets(100)
    if "truncate" in change:
        # In the middle of a commit it would not be noticed.
        crowd.stop()
    subprocess.run(change.split(), cwd=tmp_path, check=True)
    late = Crowd(first=50_000)
    late.start(server, raffle)
    late.wait_for(lambda: late.statuses[503] >= 20)
    late.stop()
    crowd.stop()
    assert set(late.statuses) == {503}
    assert server.request("GET", "/health")[0] == 503
    assert server.log.read_text().count("Writes fail until a restart") == 1
    changed = database.read_bytes()
    if change == "rm raffle.db-wal":
        # The server has it still, and puts into the database what is in it.
        assert server.stop() == 0
        assert_kept(database, crowd.tickets)
    else:
        assert server.stop() == 1
        assert database.read_bytes() == changed
