"""What has been answered survives: crashes, full disks, locks, orders to stop, and draws that are cut off."""

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
from contextlib import closing, suppress
from itertools import count

import pytest
from helpers import MANAGER, ROOT, Crowd, assert_kept, at_once, query

from draw import check_draw

CRASHES = int(os.environ.get("RAFFLE_TEST_CRASHES", "10"))

# A server, started under strace, that writes down what it syncs and what it sends.
TRACED = """
import os
strace = "strace -D -f -y -e trace=fsync,fdatasync,sendto -e signal=none -o".split()
os.execvp("strace", [*strace, {trace!r}, {python!r}, "raffle.py"])
"""

# A server of which the n-th statement of this kind, counted from the decision of a draw, does something first.
INTERRUPTED = """
import os, signal, sqlite3, threading, raffle, server, storage

def connect_traced(*arguments, **options):
    def trace(sql):
        if "SET public_randomness" in sql or counted and sql == {statement!r}:
            counted.append(sql)
            if len(counted) == {n} + 1:
                {action}

    counted = []
    connection = connect(*arguments, **options)
    connection.set_trace_callback(trace)
    return connection

connect, sqlite3.connect = sqlite3.connect, connect_traced
serve, is_served = server.serve, threading.Event()
server.serve = lambda *arguments, **options: serve(*arguments, **options) or is_served.set()
server.STOP_TIMEOUT = 0
storage.WINS_PER_COMMIT = 2
raffle.main()
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# The commit waits until the server has given up on the draw.
STOP = "os.kill(os.getpid(), signal.SIGTERM) or is_served.wait(30)"
DELETE = "with connect(os.environ['RAFFLE_DATABASE']) as other: other.execute('DELETE FROM win WHERE position = 1')"


def test_no_answered_ticket_is_lost_or_doubled_when_the_process_is_killed(serve, database):
    crowd, raffle, total = Crowd(), None, 30 * CRASHES
    for _ in range(CRASHES):
        server = serve()
        raffle = raffle or server.create(total)
        assert_kept(database, crowd.tickets)
        with crowd.asking(server, raffle):
            wanted = len(crowd.tickets) + random.randrange(1, 20)
            crowd.wait_for(
                lambda wanted=wanted: len(crowd.tickets) >= wanted or crowd.statuses[410]
            )
            server.stop(signal.SIGKILL)
    server = serve()
    with crowd.asking(server, raffle):
        crowd.wait_for(lambda: crowd.statuses[410])
    assert_kept(database, crowd.tickets)
    assert query(database, "SELECT number FROM ticket ORDER BY number") == [
        (n + 1,) for n in range(total)
    ]


def test_a_ticket_is_on_the_disk_before_it_is_answered(serve, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("there is no strace here")
    trace = tmp_path / "trace"
    server = serve(program=("-c", TRACED.format(trace=str(trace), python=sys.executable)))
    raffle = server.create()
    assert server.request("POST", f"{raffle}participate/")[0] == 201
    server.stop()
    _, between, _ = re.split(r'sendto\(.*"HTTP/1.1 201 .*', trace.read_text())
    assert re.search(r"sync\(\d+<.*/raffle.db-wal>\) += 0", between)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", directory], check=False
    ).returncode:
        pytest.skip("only root can mount a small disk")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_is_told_and_survived(small_disk, serve):
    database, ballast = small_disk / "raffle.db", small_disk / "ballast"
    server = serve(RAFFLE_DATABASE=str(database))
    raffle, crowd = server.create(), Crowd()
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with crowd.asking(server, raffle):
        crowd.wait_for(lambda: crowd.statuses[503] >= 20)
        status, headers, _ = server.request("POST", f"{raffle}participate/", source="127.200.0.1")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert server.request("GET", raffle)[0] == 200
        # A write is tried, each time: a transaction that writes nothing would succeed.
        assert [server.request("GET", "/health")[0] for _ in range(3)] == [503] * 3
        crowd.close()
        ballast.unlink()
        assert server.request("GET", "/health")[0] == 200
    with crowd.asking(server, raffle):
        crowd.wait_for_tickets(20)
    assert set(crowd.statuses) == {201, 503}
    assert re.findall("Writes (fail|succeed)", server.log.read_text()) == ["fail", "succeed"]
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)


def test_health_writes_nothing_while_writes_succeed(client, database):
    client.new_raffle()
    wal = database.with_name("raffle.db-wal")
    before = wal.read_bytes()
    for _ in range(3):
        assert client.get("/health").json == {"status": "ok"}
    assert wal.read_bytes() == before


FORKED = """
import json, os
from helpers import MANAGER, Client
import raffle

app = raffle.create_app()
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
"""


def test_a_process_forked_after_the_application_was_opened_gets_503_at_once(tmp_path, database):
    """As with gunicorn --preload. A hang ends the run of the program."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MANAGER_IPS": MANAGER}
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "[503, 503, 503, 503, 503]\n"
    assert done.stderr.count("create the application in each worker") == 1
    # Closed by the one that opened it, with both tickets.
    assert [file.name for file in tmp_path.iterdir()] == ["raffle.db"]
    assert query(database, "SELECT count(*) FROM ticket") == [(2,)]


def fail_a_commit(server):
    """Have a crowd ask for tickets until a commit fails with an I/O error; return the raffle and the crowd."""
    raffle, crowd = server.create(), Crowd()
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
    with crowd.asking(server, raffle):
        crowd.wait_for(lambda: crowd.statuses[503] or crowd.statuses[None])
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
    return raffle, crowd


def test_after_a_commit_that_has_failed_the_program_ends_with_1(serve, database):
    server = serve()
    raffle, crowd = fail_a_commit(server)
    assert server.process.wait(30) == 1
    # What waited for that commit has been answered.
    assert crowd.statuses[503] >= 1
    assert server.log.read_text().count("unavailable until a restart") == 1
    with crowd.asking(serve(), raffle):
        crowd.wait_for_tickets(20)
    assert_kept(database, crowd.tickets)


# As another WSGI server would, it goes on whatever the application has met.
OTHER_SERVER = """
import raffle, server
app = raffle.create_app()
server.serve(app, server.bind("127.0.0.1:0"), 8, max_body=2**21, is_over=lambda: False)
app.close()
"""


def test_in_another_server_nothing_is_answered_after_a_commit_that_has_failed(serve, database):
    server = serve(program=("-c", OTHER_SERVER))
    raffle, crowd = fail_a_commit(server)
    for method, path in (("POST", f"{raffle}participate/"), ("GET", raffle), ("GET", "/health")):
        assert server.request(method, path, source="127.200.0.1")[0] == 503, path
    assert server.log.read_text().count("unavailable until a restart") == 1
    assert server.stop() == 0
    with crowd.asking(serve(), raffle):
        crowd.wait_for_tickets(20)
    assert_kept(database, crowd.tickets)


def test_a_lock_of_another_process_is_told_and_survived(serve, database):
    server = serve(
        program=("-c", "import database, raffle; database.BUSY_TIMEOUT = 0.2; raffle.main()")
    )
    raffle, crowd = server.create(), Crowd()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with crowd.asking(server, raffle):
            crowd.wait_for(lambda: crowd.statuses[503] >= 100)
            assert crowd.tickets == []
            assert server.request("GET", raffle)[2]["issued_tickets"] == 0
            other.execute("ROLLBACK")
            crowd.wait_for_tickets(20)
    assert set(crowd.statuses) == {201, 503}
    assert_kept(database, crowd.tickets)


# The order to stop


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_has_arrived_and_waits_for_nothing_else(serve, database, how):
    server = serve(
        program=("-c", "import server, raffle; server.STOP_TIMEOUT = 600; raffle.main()")
    )
    raffle = server.create()
    with server.connect() as idle, server.connect() as half:
        half.sendall(b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        server.request("GET", "/health")
        server.process.send_signal(signal.SIGSTOP)
        clients = [server.connect(f"127.0.1.{n}") for n in range(1, 11)]
        for n, client in enumerate(clients):
            # Every second one takes several turns of the event loop to read.
            body = bytes(30_000 * (n % 2))
            client.sendall(
                f"POST {raffle}participate HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
        for signum in (how, how):
            server.process.send_signal(signum)
        assert server.stop(signal.SIGCONT) == 0
        assert idle.recv(1) == half.recv(1) == b""
    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 201"
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "log"}
    assert query(database, "SELECT issued_tickets FROM raffle") == [(10,)]
    assert "Traceback" not in server.log.read_text()


def test_a_stop_does_not_wait_for_a_client_that_does_not_read(serve):
    program = """
import socket, raffle, server
from waitress.adjustments import Adjustments
Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
server.STOP_TIMEOUT = 600
raffle.main()
"""
    server = serve(program=("-c", program))
    raffle = server.create(prizes=[{"name": "x" * 200, "amount": 1}] * 4_000)
    with server.connect() as client:
        client.sendall(f"GET {raffle} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        # The rest of almost a megabyte is still with the server.
        assert client.recv(8) == b"HTTP/1.1"
        assert server.stop() == 0


# Draws that are interrupted


def start_draw(serve, amount, statement, n, action):
    """Have a draw do something at its n-th statement of a kind; return server, raffle, a ticket and status or None."""
    server = serve(program=("-c", INTERRUPTED.format(statement=statement, n=n, action=action)))
    prizes = [{"name": "Pen", "amount": amount - 1}, {"name": "Book", "amount": 1}]
    raffle, [(_, ticket), *_] = server.create_sold_out(amount, prizes)
    status = None
    with suppress(OSError, http.client.HTTPException):
        status, _, _ = server.request("POST", f"{raffle}winners/", {"public_randomness": "decided"})
    return server, raffle, ticket, status


def assert_drawn(server, raffle, randomness):
    """Check that the wins of a raffle are all shown and follow from certain randomness."""
    shown = server.request("GET", raffle)[2]
    assert shown["public_randomness"] == randomness
    results = check_draw(shown, server.list_wins(raffle))
    assert all(holds for _, holds in results), results


def complete(server, raffle, ticket, is_decided=True):
    """Ask for a draw with other randomness, and check that nothing was shown before and that the first one decides."""
    assert server.request("GET", f"{raffle}winners/")[2] == []
    for path in ("verify-ticket/", "redeem/"):
        status, _, problem = server.request("POST", raffle + path, ticket)
        assert (status, problem["type"]) == (400, "urn:raffle:not-drawn")
    status, _, answer = server.request("POST", f"{raffle}winners/", {"public_randomness": "other"})
    assert status == (403 if is_decided else 201), answer
    assert_drawn(server, raffle, "decided" if is_decided else "other")
    assert server.request("POST", f"{raffle}verify-ticket/", ticket)[2]["has_won"]


def test_a_draw_that_is_killed_at_any_commit_is_completed_as_it_was_decided(serve, database):
    killed = []
    for n in count(1):
        server, raffle, ticket, status = start_draw(serve, 3, "COMMIT", n, KILL)
        if status:
            break
        killed.append((raffle, ticket))
        server.process.wait(30)
    assert status == 201
    server.stop()
    assert query(
        database,
        "SELECT public_randomness, count(position) FROM raffle LEFT JOIN win ON raffle = sequence "
        "WHERE drawn_at IS NULL GROUP BY sequence",
    ) == [(None, 0), ("decided", 0), ("decided", 2), ("decided", 3)]
    server = serve()
    for n, (raffle, ticket) in enumerate(killed):
        complete(server, raffle, ticket, is_decided=n > 0)


def test_a_draw_that_is_cut_off_by_a_stop_is_completed_as_it_was_decided(serve, database):
    server, raffle, ticket, _ = start_draw(serve, 300, "COMMIT", 3, STOP)
    assert server.process.wait(30) == 0
    [(wins,)] = query(database, "SELECT count(*) FROM win")
    assert 2 <= wins < 300
    complete(serve(), raffle, ticket)


def test_a_draw_that_another_program_writes_to_fails_and_is_named_in_the_log(serve, database):
    def assert_named(raffle):
        assert raffle.split("/")[2] in server.log.read_text().rpartition("A request failed")[2]
        assert server.request("GET", f"{raffle}winners/")[2] == []

    # The second transaction after the decision stores the last win, the third one counts them.
    server, raffle, _, status = start_draw(serve, 3, "BEGIN IMMEDIATE", 3, DELETE)
    assert status == 500
    assert_named(raffle)
    # One win too many: of a ticket that does not exist, and of one that has won.
    for values in ("(2, 2, 9, 1, NULL)", "(3, 2, 1, 1, NULL)"):
        raffle, _ = server.create_sold_out(1)
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute(f"INSERT INTO win VALUES {values}")
        assert server.request("POST", f"{raffle}winners/")[0] == 500
        assert_named(raffle)


def test_of_draws_at_once_one_decides_and_each_is_answered_after_the_draw(serve):
    server = serve(
        program=("-c", "import storage, raffle; storage.WINS_PER_COMMIT = 1; raffle.main()")
    )
    raffle, _ = server.create_sold_out(20, [{"name": "Pen", "amount": 20}])

    def draw(n):
        status, _, _ = server.request(
            "POST", f"{raffle}winners/", {"public_randomness": f"draw {n}"}
        )
        assert len(server.list_wins(raffle)) == 20
        return status, f"draw {n}"

    answers = sorted(at_once([lambda n=n: draw(n) for n in range(4)]))
    assert [status for status, _ in answers] == [201, 403, 403, 403]
    assert_drawn(server, raffle, answers[0][1])
