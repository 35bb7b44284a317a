"""What other programs may do to the database file while it is served: replicate it, edit it, share it, take it away."""

import os
import shutil
import signal
import subprocess
from functools import partial

import pytest
from helpers import Crowd, assert_kept, at_once, query, wait_for

from draw import check_draw

# Its intervals are shorter than the default of a second, so that it replicates many times while tickets are issued.
LITESTREAM = """
dbs:
  - path: {directory}/raffle.db
    monitor-interval: 50ms
    replica:
      type: file
      path: {directory}/replica
      sync-interval: 50ms
"""
# SQLite's locks are not fair: under load, one of two servers may wait for longer than the usual five seconds.
SHARING = "import database, storage, raffle; database.BUSY_TIMEOUT = 60; storage.WINS_PER_COMMIT = 20; raffle.main()"
# Is killed when two chunks of wins are stored.
KILLED_IN_THE_DRAW = """
import os, draw, raffle, storage
storage.WINS_PER_COMMIT, numbers = 10, draw.winning_numbers
draw.winning_numbers = lambda *inputs: (n if i < 25 else os._exit(9) for i, n in enumerate(numbers(*inputs)))
raffle.main()
"""
CHANGES = ("mv {0} elsewhere", "rm {0}", "cp {0} other && mv other {0}")


@pytest.fixture
def servers(serve):
    """Two servers on one file, where draws take many turns."""
    return [serve(program=("-c", SHARING)) for _ in range(2)]


def installed(program):
    """Return the path of a program, or skip the test."""
    return shutil.which(program) or pytest.skip(f"there is no {program} here")


def issued(database):
    return {number for (number,) in query(database, "SELECT number FROM ticket")}


def assert_drawn(server, raffle, randomness):
    """Check that the raffle was drawn with the randomness, and the wins follow from it."""
    body = server.request("GET", raffle)[2]
    assert body["public_randomness"] == randomness
    assert all(holds for _, holds in check_draw(body, server.list_wins(raffle)))


def test_litestream_restores_every_ticket_that_it_has_replicated(serve, tmp_path, database):
    litestream, config, restored = (
        installed("litestream"),
        tmp_path / "litestream.yml",
        tmp_path / "restored.db",
    )
    config.write_text(LITESTREAM.format(directory=tmp_path))

    def restore():
        """Restore the replica to a fresh file, and return whether that has all answered tickets."""
        restored.unlink(missing_ok=True)
        done = subprocess.run(
            [litestream, "restore", "-config", config, "-o", restored, database], check=False
        )
        return done.returncode == 0 and issued(restored) >= {
            ticket["ticket_number"] for _, ticket in crowd.tickets
        }

    server, crowd, late = serve(), Crowd(), Crowd(first=10_000)
    raffle = server.create(1_000)
    replicating = subprocess.Popen([litestream, "replicate", "-config", config])
    try:
        wait_for(restore)
        with crowd.asking(server, raffle):
            crowd.wait_for_tickets(200)
        wait_for(restore)
        replicated = list(crowd.tickets)
        with crowd.asking(server, raffle):
            crowd.wait_for_tickets(50)
            server.stop(signal.SIGKILL)
    finally:
        replicating.kill()
        replicating.wait()
    assert set(crowd.statuses) == {201, None}
    restore()
    assert_kept(restored, replicated)
    left = set(range(1, 1_001)) - issued(restored)
    server = serve(RAFFLE_DATABASE=str(restored))
    with late.asking(server, raffle):
        late.wait_for(lambda: late.statuses[410])
    assert {ticket["ticket_number"] for _, ticket in late.tickets} == left
    assert server.request("POST", f"{raffle}winners/")[0] == 201
    for _, ticket in replicated:
        assert server.request("POST", f"{raffle}verify-ticket/", ticket)[0] == 200


def test_the_sqlite3_shell_corrects_a_name_and_makes_copies_while_tickets_are_issued(
    serve, tmp_path, database
):
    shell, server, crowd = [installed("sqlite3"), database, ".timeout 60000"], serve(), Crowd()
    raffle = server.create(prizes=[{"name": "Bycicle", "amount": 1}])
    with crowd.asking(server, raffle):
        crowd.wait_for_tickets(100)
        before = list(crowd.tickets)
        assert server.request("GET", raffle)[2]["prizes"][0]["name"] == "Bycicle"
        for command in (
            "UPDATE prize SET name = 'Bicycle'",
            ".backup backup.db",
            "VACUUM INTO 'copy.db'",
        ):
            subprocess.run([*shell, command], cwd=tmp_path, check=True, timeout=90)
            crowd.wait_for_tickets(20)
        assert server.request("POST", f"{raffle}close/")[0] == 200
        crowd.wait_for(lambda: crowd.statuses[410])
    assert set(crowd.statuses) == {201, 410}
    assert_kept(database, crowd.tickets)
    assert server.request("GET", raffle)[2]["prizes"] == [{"name": "Bicycle", "amount": 1}]
    assert [win["prize"] for win in server.request("POST", f"{raffle}winners/")[2]] == ["Bicycle"]
    for copy in (tmp_path / "backup.db", tmp_path / "copy.db"):
        server = serve(RAFFLE_DATABASE=str(copy))
        ticket = server.request("POST", f"{raffle}participate/", source="127.9.0.1")[2]
        assert_kept(copy, [*before, (None, ticket)])


def test_two_servers_on_one_file_sell_out_a_raffle_without_issuing_a_number_twice(
    servers, database
):
    raffle, crowds = servers[0].create(1_000), [Crowd(), Crowd(first=10_000)]
    path, addresses = f"{raffle}participate/", [f"127.9.0.{n}" for n in range(1, 11)]
    answers = at_once(
        [partial(server.request, "POST", path, source=a) for a in addresses for server in servers]
    )
    for both in zip(answers[::2], answers[1::2]):
        assert sorted(status for status, _, _ in both) == [201, 403]
    with crowds[0].asking(servers[0], raffle), crowds[1].asking(servers[1], raffle):
        crowds[0].wait_for(lambda: crowds[0].statuses[410])
    assert set(crowds[0].statuses + crowds[1].statuses) == {201, 410}
    tickets = [(None, ticket) for status, _, ticket in answers if status == 201]
    assert_kept(database, tickets + crowds[0].tickets + crowds[1].tickets)
    assert issued(database) == set(range(1, 1_001))


def test_draws_asked_of_two_servers_at_once_have_one_outcome(servers):
    one, two = servers
    raffle, _ = one.create_sold_out(
        400, [{"name": "Pen", "amount": 300}, {"name": "Book", "amount": 100}]
    )
    path, bodies = f"{raffle}winners/", [{"public_randomness": f"round {n}"} for n in range(4)]
    answers = at_once(
        [partial(server.request, "POST", path, body) for server, body in zip(servers * 2, bodies)]
    )
    [decided] = [n for n, (status, _, _) in enumerate(answers) if status == 201]
    refusals = [problem["type"] for status, _, problem in answers if status == 403]
    assert refusals == ["urn:raffle:already-drawn"] * 3
    assert one.list_wins(raffle) == two.list_wins(raffle) == answers[decided][2]
    assert_drawn(two, raffle, f"round {decided}")


def test_a_draw_that_one_server_was_killed_in_is_completed_by_another(serve, database):
    killed, server = serve(program=("-c", KILLED_IN_THE_DRAW)), serve()
    raffle, _ = killed.create_sold_out(50, [{"name": "Pen", "amount": 50}])
    with pytest.raises(ConnectionError):
        killed.request("POST", f"{raffle}winners/", {"public_randomness": "round 1"})
    assert query(database, "SELECT count(*) FROM win") == [(20,)]
    body = server.request("GET", raffle)[2]
    assert (body["public_randomness"], body["winners_drawn"], server.list_wins(raffle)) == (
        "round 1",
        False,
        [],
    )
    assert server.request("POST", f"{raffle}winners/", {"public_randomness": "round 2"})[0] == 403
    assert_drawn(server, raffle, "round 1")


def test_a_server_knows_what_another_has_closed_and_goes_on_when_that_stops(servers):
    (one, two), source = servers, "127.1.0.2"
    closed, other = one.create(), one.create()
    assert two.request("POST", f"{closed}participate/")[0] == 201
    assert one.request("POST", f"{closed}close/")[0] == 200
    assert two.request("POST", f"{closed}participate/", source=source)[0] == 410
    assert one.stop() == 0
    assert two.request("POST", f"{other}participate/", source=source)[0] == 201


def test_no_ticket_is_issued_while_the_files_are_not_the_servers_own(serve, tmp_path, database):
    server, crowd = serve(), Crowd()
    raffle, files = (
        server.create(),
        [database.with_name(f"raffle.db{end}") for end in ("", "-wal", "-shm")],
    )
    for file in files:
        os.link(file, f"{file}.own")
    for number, change in enumerate(
        [change.format(file) for change in CHANGES for file in files], 1
    ):
        late = Crowd(first=10_000 * number)
        with crowd.asking(server, raffle):
            crowd.wait_for_tickets(20)
            subprocess.run(change, shell=True, cwd=tmp_path, check=True)
            with late.asking(server, raffle):
                late.wait_for(lambda late=late: sum(late.statuses.values()) >= 20)
        assert set(late.statuses) == {503}, change
        assert server.request("GET", "/health")[0] == 503, change
        assert server.log.read_text().count("WARNING Writes fail") == number, change
        for file in files:
            file.unlink(missing_ok=True)
            os.link(f"{file}.own", file)
        assert server.request("GET", "/health")[0] == 200, change
    assert set(crowd.statuses) == {201, 503}
    # The server still has it open.
    files[1].unlink()
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)


def test_what_replaced_the_database_is_not_read_once_the_database_is_back(client, tmp_path):
    shell = partial(subprocess.run, shell=True, cwd=tmp_path, check=True)
    shell("mkdir own other && cp raffle.db* other")
    raffle = client.new_raffle()
    shell("mv raffle.db* own && mv other/* .")
    client.get(raffle, status="*")
    shell("mv own/* .")
    client.get(raffle)


def test_a_server_leaves_the_wal_file_of_a_database_that_replaced_its_own(
    serve, tmp_path, database
):
    killed, server = serve(RAFFLE_DATABASE=str(tmp_path / "other.db")), serve()
    raffle, tickets = killed.create_sold_out(10)
    killed.stop(signal.SIGKILL)
    for end in ("", "-wal", "-shm"):
        (tmp_path / f"other.db{end}").replace(f"{database}{end}")
    commits = (tmp_path / "raffle.db-wal").read_bytes()
    server.request("GET", raffle)
    assert server.request("GET", "/health")[0] == 503
    assert server.stop() == 0
    assert commits and (tmp_path / "raffle.db-wal").read_bytes() == commits
    assert_kept(database, tickets)
