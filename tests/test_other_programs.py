"""What other programs may do to the database file while it is served.

They replicate it, edit it, share it, and take it away.
"""

import os
import shutil
import signal
import subprocess
from functools import partial

import pytest
from helpers import (
    FAULTS,
    Crowd,
    assert_drawn,
    assert_kept,
    at_once,
    installed,
    query,
    wait_for,
)

# Its intervals are shorter than the default of a second, so that it replicates many times while
# tickets are issued.
LITESTREAM = """
dbs:
  - path: {directory}/raffle.db
    monitor-interval: 50ms
    replica:
      type: file
      path: {directory}/replica
      sync-interval: 50ms
"""
ENDS = ("", "-wal", "-shm")  # of the names of a database's files


def issued(database):
    return {number for (number,) in query(database, "SELECT number FROM ticket")}


def numbers_of(crowd):
    return {ticket["ticket_number"] for _, ticket in crowd.tickets}


# Copies and corrections


def test_litestream_restores_every_ticket_that_it_has_replicated(serve, tmp_path, database):
    litestream = installed("litestream")
    config, restored = tmp_path / "litestream.yml", tmp_path / "restored.db"
    config.write_text(LITESTREAM.format(directory=tmp_path))
    server, crowd = serve(), Crowd()
    path = server.create(1_000)

    def restore():
        """Restore the replica to a fresh file, and return whether that has all answered tickets."""
        restored.unlink(missing_ok=True)
        command = [litestream, "restore", "-config", config, "-o", restored, database]
        is_restored = subprocess.run(command, check=False).returncode == 0
        return is_restored and issued(restored) >= numbers_of(crowd)

    replicating = subprocess.Popen([litestream, "replicate", "-config", config])
    try:
        wait_for(restore)
        with crowd.asking(server, path):
            crowd.wait_for_tickets(200)
        wait_for(restore)
        replicated = list(crowd.tickets)
        with crowd.asking(server, path):
            crowd.wait_for_tickets(50)
            server.stop(signal.SIGKILL)
    finally:
        replicating.kill()
        replicating.wait()
    assert set(crowd.statuses) == {201, None}

    restore()
    assert_kept(restored, replicated)

    # Nothing that was restored is issued again, and everything else is.
    left = set(range(1, 1_001)) - issued(restored)
    server, late = serve(RAFFLE_DATABASE=str(restored)), Crowd(first=10_000)
    with late.asking(server, path):
        late.wait_for(lambda: late.statuses[410])
    assert numbers_of(late) == left
    assert server.request("POST", f"{path}winners/")[0] == 201
    for _, ticket in replicated:
        assert server.request("POST", f"{path}verify-ticket/", ticket)[0] == 200


def test_the_sqlite3_shell_edits_and_copies_while_tickets_are_issued(serve, tmp_path, database):
    shell = [installed("sqlite3"), database, ".timeout 60000"]
    server, crowd = serve(), Crowd()
    path = server.create(prizes=[{"name": "Bycicle", "amount": 1}])

    commands = ["UPDATE prize SET name = 'Bicycle'", ".backup backup.db", "VACUUM INTO 'copy.db'"]
    with crowd.asking(server, path):
        crowd.wait_for_tickets(100)
        before = list(crowd.tickets)
        assert server.request("GET", path)[2]["prizes"][0]["name"] == "Bycicle"

        for command in commands:
            subprocess.run([*shell, command], cwd=tmp_path, check=True, timeout=90)
            crowd.wait_for_tickets(20)
        assert server.request("POST", f"{path}close/")[0] == 200
        crowd.wait_for(lambda: crowd.statuses[410])

    assert set(crowd.statuses) == {201, 410}
    assert_kept(database, crowd.tickets)
    assert server.request("GET", path)[2]["prizes"] == [{"name": "Bicycle", "amount": 1}]
    assert [win["prize"] for win in server.request("POST", f"{path}winners/")[2]] == ["Bicycle"]

    for copy in (tmp_path / "backup.db", tmp_path / "copy.db"):
        server = serve(RAFFLE_DATABASE=str(copy))
        ticket = server.request("POST", f"{path}participate/", source="127.9.0.1")[2]
        assert_kept(copy, [*before, (None, ticket)])


# Two servers on one file


@pytest.fixture
def servers(serve):
    """Two servers on one file, whose draws take many turns."""
    # SQLite's locks are not fair: under load, one may wait for longer than the usual five seconds.
    limits = ("database.BUSY_TIMEOUT=60", "storage.WINS_PER_COMMIT=20")
    return [serve(program=(FAULTS, *limits)) for _ in range(2)]


def test_two_servers_on_one_file_never_issue_a_number_twice(servers, database):
    path = servers[0].create(1_000)

    # Each of ten addresses asks both servers at once.
    addresses = [f"127.9.0.{n}" for n in range(1, 11)]
    calls = [
        partial(server.request, "POST", f"{path}participate/", source=address)
        for address in addresses
        for server in servers
    ]
    answers = at_once(calls)
    for both in zip(answers[::2], answers[1::2]):
        assert sorted(status for status, _, _ in both) == [201, 403]
    tickets = [(None, ticket) for status, _, ticket in answers if status == 201]

    one, two = Crowd(), Crowd(first=10_000)
    with one.asking(servers[0], path), two.asking(servers[1], path):
        one.wait_for(lambda: one.statuses[410])
    assert set(one.statuses + two.statuses) == {201, 410}
    assert one.tickets
    assert two.tickets
    assert_kept(database, tickets + one.tickets + two.tickets)
    assert issued(database) == set(range(1, 1_001))


def test_draws_asked_of_two_servers_at_once_have_one_outcome(servers):
    one, two = servers
    prizes = [{"name": "Pen", "amount": 300}, {"name": "Book", "amount": 100}]
    path, _ = one.create_sold_out(400, prizes)

    calls = [
        partial(server.request, "POST", f"{path}winners/", {"public_randomness": f"round {n}"})
        for n, server in enumerate(servers * 2)
    ]
    answers = at_once(calls)
    refusals = [problem["type"] for status, _, problem in answers if status == 403]
    assert refusals == ["urn:raffle:already-drawn"] * 3

    [decided] = [n for n, (status, _, _) in enumerate(answers) if status == 201]
    wins = answers[decided][2]
    assert one.list_wins(path) == wins
    assert two.list_wins(path) == wins
    assert_drawn(two, path, f"round {decided}")


def test_a_draw_in_which_a_server_was_killed_is_completed_by_another(serve, database):
    # At the third commit of wins, after the one of the decision.
    interruption = ("interrupt_draw", "kill", "COMMIT", "4")
    killed = serve(program=(FAULTS, "storage.WINS_PER_COMMIT=10", *interruption), processes=1)
    server = serve()
    path, _ = killed.create_sold_out(50, [{"name": "Pen", "amount": 50}])

    with pytest.raises(ConnectionError):
        killed.request("POST", f"{path}winners/", {"public_randomness": "round 1"})
    assert query(database, "SELECT count(*) FROM win") == [(20,)]
    body = server.request("GET", path)[2]
    assert body["public_randomness"] == "round 1"
    assert body["winners_drawn"] is False
    assert server.list_wins(path) == []

    status, _, _ = server.request("POST", f"{path}winners/", {"public_randomness": "round 2"})
    assert status == 403
    assert_drawn(server, path, "round 1")


def test_a_server_sees_what_another_has_closed_and_outlives_it(servers):
    one, two = servers
    closed, other = one.create(), one.create()

    def participate(path, source):
        return two.request("POST", f"{path}participate/", source=source)[0]

    assert participate(closed, "127.1.0.1") == 201
    assert one.request("POST", f"{closed}close/")[0] == 200
    assert participate(closed, "127.1.0.2") == 410

    assert one.stop() == 0
    assert participate(other, "127.1.0.2") == 201


# Files that are replaced


def remove(file):
    file.unlink()


def move_away(file):
    file.rename(file.with_name("elsewhere"))


def replace_by_a_copy(file):
    copy = file.with_name("copy")
    shutil.copy(file, copy)
    copy.replace(file)


def test_no_ticket_is_issued_while_a_file_is_not_the_servers_own(serve, database):
    server, crowd = serve(processes=1), Crowd()
    path = server.create()
    files = [database.with_name(f"raffle.db{end}") for end in ENDS]
    for file in files:
        os.link(file, f"{file}.own")

    changes = [
        (change, file) for change in (move_away, remove, replace_by_a_copy) for file in files
    ]
    for number, (change, changed) in enumerate(changes, 1):
        message = f"{change.__name__} {changed.name}"
        late = Crowd(first=10_000 * number)
        with crowd.asking(server, path):
            crowd.wait_for_tickets(20)
            change(changed)
            with late.asking(server, path):
                late.wait_for(lambda late=late: sum(late.statuses.values()) >= 20)

        assert set(late.statuses) == {503}, message
        assert server.request("GET", "/health")[0] == 503, message
        assert server.log.read_text().count("WARNING Writes fail") == number, message

        for file in files:
            file.unlink(missing_ok=True)
            os.link(f"{file}.own", file)
        assert server.request("GET", "/health")[0] == 200, message

    assert set(crowd.statuses) == {201, 503}
    # The server still has it open.
    database.with_name("raffle.db-wal").unlink()
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)


def test_what_replaced_the_database_is_not_read_once_it_is_back(client, tmp_path):
    def move_files(directory, target):
        target.mkdir(exist_ok=True)
        for end in ENDS:
            (directory / f"raffle.db{end}").rename(target / f"raffle.db{end}")

    other, own = tmp_path / "other", tmp_path / "own"
    other.mkdir()
    for end in ENDS:
        shutil.copy(tmp_path / f"raffle.db{end}", other)
    path = client.new_raffle()

    move_files(tmp_path, own)
    move_files(other, tmp_path)
    client.get(path, status="*")

    move_files(own, tmp_path)
    client.get(path)


def test_a_server_leaves_the_wal_file_of_another_database(serve, tmp_path, database):
    """Of one that has taken the place of its own."""
    killed = serve(processes=1, RAFFLE_DATABASE=str(tmp_path / "other.db"))
    server = serve()
    path, tickets = killed.create_sold_out(10)
    killed.stop(signal.SIGKILL)
    for end in ENDS:
        (tmp_path / f"other.db{end}").replace(f"{database}{end}")
    wal = tmp_path / "raffle.db-wal"
    commits = wal.read_bytes()
    assert commits

    server.request("GET", path)
    assert server.request("GET", "/health")[0] == 503
    assert server.stop() == 0
    assert wal.read_bytes() == commits
    assert_kept(database, tickets)
