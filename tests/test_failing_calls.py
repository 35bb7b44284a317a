"""System calls that fail: strace has one write or one sync of a server fail, each in its turn.

Whichever it is, every answer is right or 503, and what was answered with success is kept. strace
counts the calls of each thread on its own, so the fault is put either into the thread that opens
the database, at a first or a second start, or into the one that writes.
"""

import copy
import http.client
import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from helpers import FAULTS, ONE_PRIZE, Server, installed, query, wait_for

pytestmark = pytest.mark.long

# "all": each call of a short life fails in its turn, with either error. Otherwise two of them.
IS_EVERY_CALL = os.environ.get("RAFFLE_TEST_FAILING_CALLS") == "all"
ERRORS = [["EIO"], ["ENOSPC"]] if IS_EVERY_CALL else [["EIO", "ENOSPC"]]
CALLS = ["pwrite64", "fdatasync"]
LIVES_AT_ONCE = 3
LOST = "A commit has failed: the database is unavailable until a restart"

# The short life of a raffle


class Ended(Exception):
    """The server answers no more, or nothing but 503."""


class Life:
    """A raffle of three tickets, and what has been answered with success."""

    def __init__(self):
        self.raffle = None  # its path
        self.tickets = {}  # by participant: 1, 2, 3
        self.closed_at = None
        self.wins = None
        self.redeemed_at = None

    def play(self, server, is_restarted=False):
        """Take the steps that have not been answered with success. Raises Ended."""
        self.issue(server)
        if not self.closed_at:
            do(server, f"{self.raffle}close/", done="already-closed" if is_restarted else None)
            self.closed_at = see(server, self.raffle)["closed_at"]

        if not self.wins:
            # A draw takes several commits: once decided, it is completed by the next request.
            do(server, f"{self.raffle}winners/", done="already-drawn")
            self.wins = see(server, f"{self.raffle}winners/")
        if not self.redeemed_at:
            done = "already-redeemed" if is_restarted else None
            do(server, f"{self.raffle}redeem/", self.winner(), done=done)
            self.redeemed_at = see(server, f"{self.raffle}winners/")[0]["redeemed_at"]

    def issue(self, server):
        """Take the first of these steps: create the raffle, and participate."""
        if not self.raffle:
            body = {"name": "Fair", "total_tickets": 10, "prizes": ONE_PRIZE}
            self.raffle = f"/raffles/{do(server, '/raffles/', body)['id']}/"
        for n in (1, 2, 3):
            if n not in self.tickets:
                self.tickets[n] = self.participate(server, n)

    def participate(self, server, n):
        headers = {"Idempotency-Key": f"the-key-of-participant-{n}"}
        return do(server, f"{self.raffle}participate/", source=f"127.1.0.{n}", **headers)

    def winner(self):
        """Return the ticket that has won."""
        [number] = [win["ticket_number"] for win in self.wins]
        return next(t for t in self.tickets.values() if t["ticket_number"] == number)

    def assert_kept(self, server):
        """Check that a server has all that was answered with success."""
        if not self.raffle:
            return

        shown = see(server, self.raffle)
        wins = see(server, f"{self.raffle}winners/")
        assert shown["issued_tickets"] >= len(self.tickets)
        assert self.closed_at in (None, shown["closed_at"])
        assert self.wins is None or [{**win, "redeemed_at": None} for win in wins] == self.wins
        assert self.redeemed_at is None or wins[0]["redeemed_at"] == self.redeemed_at

        for n, ticket in self.tickets.items():
            if shown["drawn_at"]:
                do(server, f"{self.raffle}verify-ticket/", ticket)
            else:
                assert self.participate(server, n) == ticket


def do(server, path, body=None, done=None, source="127.0.0.1", **headers):
    """Send a request, again after a 503; return the answer. done: the refusal that says it is."""
    for _ in range(3):
        try:
            status, _, answer = server.request("POST", path, body, source, **headers)
        except (OSError, http.client.HTTPException) as error:
            raise Ended from error

        if status in (200, 201):
            return answer
        is_done = status == 403 and answer["type"] == f"urn:raffle:{done}"
        assert status == 503 or is_done, answer
        if is_done:
            return None
    raise Ended


def see(server, path):
    """Return what a server shows. Raises Ended."""
    try:
        status, _, answer = server.request("GET", path)
    except (OSError, http.client.HTTPException) as error:
        raise Ended from error

    assert status in (200, 503), answer
    if status == 503:
        raise Ended
    return answer


# A server with a fault


class TracedServer(Server):
    """A server of which one thread is traced, and makes one call that fails.

    place: "opening" or "writing", for the thread. n: the call of this thread that fails, or None.
    """

    def __init__(self, directory, place, call, error=None, n=None):
        self.trace = directory / "trace"
        self.call = call
        self.strace = None
        self.greeting = None
        self.tracing = [installed("strace"), "-qq", "-o", str(self.trace), "-e", f"trace={call}"]
        if n:
            self.tracing += ["-e", f"inject={call}:error={error}:when={n}"]

        # Without -f, strace follows the first thread only, which opens the database.
        opening = {"wrapper": [*self.tracing, "-D"]}
        # One that checkpoints often, so that a short life has it all.
        writing = {"program": (FAULTS, "name_writing_thread", "wal_autocheckpoint = 8")}
        options = opening if place == "opening" else writing
        try:
            super().__init__(directory, processes=1, **options)
        except AssertionError:
            self.process.communicate(timeout=30)

    def attach(self):
        """Trace the thread that writes, from now on."""
        named = re.compile("^raffle-writer ([0-9]+)\n", re.MULTILINE)
        wait_for(lambda: named.search(self.log.read_text()))
        thread = named.search(self.log.read_text())[1]
        status = Path(f"/proc/{thread}/status")
        self.strace = subprocess.Popen([*self.tracing, "-p", thread])
        wait_for(lambda: self.strace.poll() or "TracerPid:\t0\n" not in status.read_text())
        if self.strace.poll():
            pytest.skip("strace may not attach to a process here")

    def calls(self):
        """Return the lines of the trace, one for each call. The server must have ended."""
        if self.strace:
            self.strace.wait(30)
        return [line for line in self.trace.read_text().splitlines() if self.call in line]


def live(directory, life, place, *fault):
    """Play a life on a server with a fault; return what became of it, and the calls it made."""
    server = TracedServer(directory, place, *fault)
    if not server.greeting:
        assert_refused(server)
        return "refused to start", server.calls()

    try:
        if place == "writing":
            server.attach()
        life.play(server)
    except Ended:
        outcome = "ended"
        assert_lost(server)
    else:
        outcome = "went on"
        assert server.stop() == 0
    finally:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)
    return outcome, server.calls()


def assert_refused(server):
    """Check that a start has failed with one sentence."""
    *_, last = server.log.read_text().splitlines()
    assert server.process.returncode == 1
    assert re.fullmatch("RAFFLE_DATABASE: .* cannot be opened: .*", last)
    assert "Traceback" not in server.log.read_text()


def assert_lost(server):
    """Check that a server ends by itself, as after a commit that has failed."""
    server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert server.log.read_text().count(LOST) == 1
    assert "Traceback" not in server.log.read_text()


def assert_survived(directory, life):
    """Check that a server without a fault has all that was answered, and plays to the end."""
    server = Server(directory)
    try:
        life.assert_kept(server)
        life.play(server, is_restarted=True)
        life.assert_kept(server)
    finally:
        assert server.stop() == 0

    database = directory / "raffle.db"
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(database, "PRAGMA foreign_key_check") == []
    issued = "SELECT count(*) FROM ticket WHERE raffle = sequence"
    assert query(database, f"SELECT * FROM raffle WHERE issued_tickets != ({issued})") == []
    drawn = "SELECT drawn_at IS NOT NULL, issued_tickets FROM raffle ORDER BY sequence DESC LIMIT 1"
    assert query(database, drawn) == [(True, 3)]


# Each call


def begin(directory, is_second):
    """Make a directory, for a second start with what a killed server leaves; return its life."""
    directory.mkdir()
    life = Life()
    if is_second:
        server = Server(directory)
        life.issue(server)
        server.stop(signal.SIGKILL)
    return life


def faults(number, errors):
    """Return which calls of so many are to fail, and with which error."""
    calls = range(1, number + 1)
    if IS_EVERY_CALL:
        return list(product(calls, errors))
    middle = (number + 1) // 2
    halves = [random.choice(calls[:middle]), random.choice(calls[middle:] or calls)]
    return list(zip(halves, random.sample(errors, 2)))


@pytest.mark.parametrize("errors", ERRORS, ids=" ".join)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", ["first start", "second start", "writing"])
def test_whatever_call_fails_nothing_that_was_answered_is_lost(tmp_path, when, call, errors):
    place = "writing" if when == "writing" else "opening"
    first = begin(tmp_path / "first", is_second=when == "second start")

    def live_again(name, *fault):
        directory, life = tmp_path / name, copy.deepcopy(first)
        shutil.copytree(tmp_path / "first", directory)
        outcome, calls = live(directory, life, place, call, *fault)
        if fault:
            assert_survived(directory, life)
        return outcome, calls

    def fail(fault):
        n, error = fault
        try:
            outcome, calls = live_again(f"{n} with {error}", error, n)
        except Exception as failure:
            raise AssertionError(f"{when}: {call} {n} fails with {error}") from failure
        return outcome if any("(INJECTED)" in line for line in calls) else "had no fault"

    outcome, calls = live_again("without a fault")
    assert outcome == "went on"
    with ThreadPoolExecutor(LIVES_AT_ONCE) as pool:
        outcomes = Counter(pool.map(fail, faults(len(calls), errors)))
    print(f"{when}, {len(calls)} calls of {call}: {dict(outcomes)}")
    assert {"refused to start", "ended", "went on"} & set(outcomes)
