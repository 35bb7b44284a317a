"""Several processes serve one address and one file, in turns; a parent watches over them."""

import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest
from helpers import (
    FAULTS,
    ONE_PRIZE,
    ROOT,
    Crowd,
    assert_drawn,
    assert_kept,
    at_once,
    children,
    is_alive,
    query,
    wait_for,
)

pytestmark = pytest.mark.long

TWO = 2


def participate(server, path, number):
    return server.request("POST", f"{path}participate/", source=f"127.8.0.{number}")


def test_two_processes_sell_out_a_raffle_and_both_have_their_turns(serve, database):
    server = serve(processes=TWO)
    assert len(children(server)) == TWO
    path, crowd = server.create(600), Crowd(16)
    with crowd.asking(server, path):
        crowd.wait_for(lambda: crowd.statuses[410])
    assert set(crowd.statuses) == {201, 410}
    assert_kept(database, crowd.tickets)
    numbers = sorted(ticket["ticket_number"] for _, ticket in crowd.tickets)
    assert numbers == list(range(1, 601))

    # Each writes down what managers do, with its process id.
    def has_served_both():
        at_once([server.create] * 16)
        return (
            len(set(re.findall(r" (\d+) INFO Raffle \S+ created", server.log.read_text()))) == TWO
        )

    wait_for(has_served_both)
    assert server.log.read_text().count("INFO Settings: ") == 1
    server.process.send_signal(signal.SIGTERM)
    # The greeting has been read, and there is no second one.
    assert server.process.communicate(timeout=30)[0] == ""
    assert server.process.returncode == 0
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "log"}


def test_a_draw_asked_of_two_processes_has_one_outcome(serve):
    server = serve(program=(FAULTS, "storage.WINS_PER_COMMIT=5"), processes=TWO)
    path, _ = server.create_sold_out(100, [{"name": "Pen", "amount": 100}])
    bodies = [{"public_randomness": f"round {n}"} for n in range(8)]
    answers = at_once([partial(server.request, "POST", f"{path}winners/", b) for b in bodies])
    decided = [n for n, (status, _, _) in enumerate(answers) if status == 201]
    assert sorted(status for status, _, _ in answers) == [201] + [403] * 7
    assert_drawn(server, path, f"round {decided[0]}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_gracefully(serve, database, how):
    """It may reach parent and children together, as from a terminal, and twice."""
    server = serve(processes=TWO)
    path, crowd = server.create(), Crowd()
    pids = children(server)
    with crowd.asking(server, path):
        crowd.wait_for_tickets(20)
        for pid in [server.process.pid, *pids] * 2:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        assert server.process.wait(30) == 0
    assert not [pid for pid in pids if is_alive(pid)]
    assert set(crowd.statuses) <= {201, None}
    assert_kept(database, crowd.tickets)
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "log"}
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("processes", [1, TWO])
def test_a_server_started_by_nohup_outlives_its_terminal(serve, processes):
    server = serve(wrapper=["nohup"], processes=processes)
    for pid in [server.process.pid, *children(server)]:
        os.kill(pid, signal.SIGHUP)
    for _ in range(10):
        assert server.request("GET", "/health")[0] == 200
    assert server.stop() == 0


def test_a_process_that_dies_is_replaced(serve, database):
    server = serve(processes=TWO)
    path, crowd = server.create(), Crowd()
    with crowd.asking(server, path):
        crowd.wait_for_tickets(20)
        killed, other = children(server)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(set(children(server)) - {killed}) == TWO)
    late = Crowd(first=10_000)
    with late.asking(server, path):
        late.wait_for_tickets(50)
    assert set(late.statuses) == {201}
    assert other in children(server)
    assert server.log.read_text().count(f"Process {killed} ended with status -9") == 1
    assert server.stop() == 0
    assert_kept(database, crowd.tickets + late.tickets)


def wait_for_replacements(server, killed):
    """Wait until others serve in place of processes that were killed."""
    wait_for(lambda: len(set(children(server)) - set(killed)) == TWO)


def test_a_replacement_serves_the_same_file_wherever_the_path_leads(serve, tmp_path, database):
    link, other = tmp_path / "link.db", tmp_path / "other.db"
    link.symlink_to(database)
    server = serve(processes=TWO, RAFFLE_DATABASE=str(link))
    path, crowd = server.create(), Crowd()
    query(database, "VACUUM INTO 'other.db'".replace("other.db", str(other)))
    link.unlink()
    link.symlink_to(other)

    killed = children(server)[:1]
    os.kill(*killed, signal.SIGKILL)
    wait_for_replacements(server, killed)
    with crowd.asking(server, path):
        crowd.wait_for_tickets(60)
    assert set(crowd.statuses) == {201}
    assert_kept(database, crowd.tickets)


def test_a_replacement_makes_no_new_file_and_waits_for_the_old_one(serve, tmp_path, database):
    server = serve(processes=TWO)
    path = server.create()
    away = tmp_path / "away"
    away.mkdir()
    files = list(tmp_path.glob("raffle.db*"))
    for file in files:
        file.rename(away / file.name)
    killed = children(server)[:1]
    os.kill(*killed, signal.SIGKILL)
    # Tried again and again.
    wait_for(lambda: server.log.read_text().count("ended with status 1") >= 2)
    assert not database.exists()

    for file in files:
        (away / file.name).rename(file)
    wait_for_replacements(server, killed)
    wait_for(lambda: {server.request("GET", path)[0] for _ in range(20)} == {200})
    assert server.stop() == 0


def test_replacements_that_are_killed_are_replaced(serve):
    server = serve(processes=TWO)
    path, killed = server.create(), []
    for _ in range(4):
        for pid in children(server):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        wait_for(lambda: set(children(server)) - set(killed))
    wait_for_replacements(server, killed)
    wait_for(lambda: server.request("GET", path)[0] == 200)
    assert server.stop() == 0


def test_it_does_not_matter_that_the_starter_ignores_its_children(serve):
    server = serve(wrapper=["env", "--ignore-signal=CHLD"], processes=TWO)
    killed = children(server)[:1]
    os.kill(*killed, signal.SIGKILL)
    wait_for_replacements(server, killed)
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_process_that_is_told_to_end_is_not_replaced(serve):
    server = serve(processes=TWO)
    first, second = children(server)
    os.kill(first, signal.SIGTERM)
    wait_for(lambda: children(server) == [second])
    assert server.request("GET", "/health")[0] == 200
    os.kill(second, signal.SIGTERM)
    assert server.process.wait(30) == 0


def test_the_children_end_with_their_parent(serve, database):
    server = serve(processes=TWO)
    path, crowd = server.create(), Crowd()
    pids = children(server)
    with crowd.asking(server, path):
        crowd.wait_for_tickets(20)
        server.stop(signal.SIGKILL)
        wait_for(lambda: not [pid for pid in pids if is_alive(pid)])
    assert_kept(database, crowd.tickets)
    assert "Traceback" not in server.log.read_text()
    # And leave the file closed.
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "log"}


def test_a_commit_that_fails_in_one_process_ends_all_with_1(serve, database):
    server = serve(processes=TWO)
    path, crowd = server.create(), Crowd()
    failing, other = children(server)
    _, hard = resource.prlimit(failing, resource.RLIMIT_FSIZE)
    resource.prlimit(failing, resource.RLIMIT_FSIZE, (300_000, hard))
    with crowd.asking(server, path):
        assert server.process.wait(60) == 1
    assert not is_alive(other)
    assert server.log.read_text().count("unavailable until a restart") == 1
    assert_kept(database, crowd.tickets)


def start_and_end(*program, **environment):
    """Run a program with two processes to its end; return status, output and what it said."""
    settings = {"RAFFLE_PROCESSES": "2", "RAFFLE_LISTEN": "127.0.0.1:0", **environment}
    done = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if " Settings: " not in line]
    return done.returncode, done.stdout, said


def test_a_database_that_is_refused_is_refused_once(database):
    database.write_text("nothing of SQLite's")
    status, output, said = start_and_end("raffle.py", RAFFLE_DATABASE=str(database))
    assert (status, output) == (1, "")
    assert said == [f"RAFFLE_DATABASE: {database} cannot be opened: file is not a database"]


def test_a_process_that_ends_before_it_listens_stops_all(database):
    status, output, said = start_and_end(
        FAULTS, "refuse_in_children", RAFFLE_DATABASE=str(database)
    )
    assert (status, output, said) == (1, "", ["RAFFLE_DATABASE: the file is on fire"])


# The turn


def test_a_process_that_is_killed_in_its_turn_gives_it_up(serve, database):
    killed = serve(program=(FAULTS, "signal_in_turn", "SIGKILL"), processes=1)
    server = serve(processes=1)
    path = server.create(9)
    killed.process.send_signal(signal.SIGUSR1)
    with pytest.raises(OSError):
        participate(killed, path, 1)
    assert killed.process.wait(30) == -signal.SIGKILL
    answers = [participate(server, path, number) for number in (1, 2)]
    assert [status for status, _, _ in answers] == [201, 201]
    assert_kept(database, [(None, ticket) for _, _, ticket in answers])


def test_a_process_that_is_stopped_in_its_turn_costs_others_503(serve, database):
    """Not a wait without end; and what got 503 left nothing behind."""
    short = "database.BUSY_TIMEOUT=0.5"
    stopped = serve(program=(FAULTS, short, "signal_in_turn", "SIGSTOP"), processes=1)
    server = serve(program=(FAULTS, short), processes=1)
    path, crowd = server.create(), Crowd(1)
    stopped.process.send_signal(signal.SIGUSR1)
    with crowd.asking(stopped, path):
        # The crowd waits until the process goes on, and so does the other server at last.
        issued = 0
        while participate(server, path, issued + 1)[0] == 201:
            issued += 1
        answers = at_once([partial(participate, server, path, n) for n in range(100, 120)])
        assert {status for status, _, _ in answers} == {503}
        assert server.request("GET", "/health")[0] == 503
        assert server.request("GET", path)[0] == 200
        shown = server.request("GET", path)[2]["issued_tickets"]
        assert shown == issued + len(crowd.tickets)

        stopped.process.send_signal(signal.SIGCONT)
        wait_for(lambda: server.request("GET", "/health")[0] == 200)
        crowd.wait_for_tickets(1)
    assert [participate(server, path, n)[0] for n in range(100, 120)] == [201] * 20
    assert set(crowd.statuses) == {201}
    tickets = query(database, "SELECT count(*) FROM ticket")
    assert tickets == [(issued + len(crowd.tickets) + 20,)]


def test_a_stop_while_another_process_keeps_its_turn_ends(serve, database):
    stopped = serve(program=(FAULTS, "signal_in_turn", "SIGSTOP"), processes=1)
    server = serve(program=(FAULTS, "database.BUSY_TIMEOUT=0.5"), processes=1)
    path = server.create()
    stopped.process.send_signal(signal.SIGUSR1)
    with stopped.connect() as waiting:
        waiting.sendall(f"POST {path}participate/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_for(lambda: participate(server, path, 1)[0] in (503, 403))
        wait_for(lambda: participate(server, path, 2)[0] in (503, 403))
        assert server.stop() == 0
        stopped.process.send_signal(signal.SIGCONT)
        assert waiting.recv(12) == b"HTTP/1.1 201"


def test_a_file_system_that_refuses_the_turn_answers_503(serve):
    server = serve(program=(FAULTS, "fail_to_lock"), processes=1)
    for _ in range(3):
        assert server.request("POST", "/raffles/", {"name": "Fair"})[0] == 400
        body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}
        assert server.request("POST", "/raffles/", body)[0] == 503
    assert server.request("GET", "/raffles/")[2] == []
    assert server.log.read_text().count("Writes fail: ") == 1
    assert server.stop() == 0


def test_servers_that_start_at_the_same_instant_all_start(tmp_path, serve):
    for number in range(4):
        settings = {"RAFFLE_DATABASE": str(tmp_path / f"{number}.db"), "processes": 1}
        servers = at_once([partial(serve, **settings)] * 4)
        path = servers[0].create(8, ONE_PRIZE)
        answers = at_once([partial(participate, s, path, n) for n, s in enumerate(servers * 2, 1)])
        assert sorted(ticket["ticket_number"] for _, _, ticket in answers) == list(range(1, 9))
        for server in servers:
            assert server.stop() == 0
