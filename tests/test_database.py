"""One SQLite file by `Database` alone, with a schema and actions that know nothing of raffles."""

import itertools
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from helpers import at_once, query, wait_for

from database import Database, DatabaseRefused, DatabaseUnavailable

SCHEMA = """
BEGIN IMMEDIATE;
PRAGMA application_id = 7;
PRAGMA user_version = 3;
CREATE TABLE IF NOT EXISTS item (
    value INTEGER UNIQUE,
    parent INTEGER REFERENCES item (value) DEFERRABLE INITIALLY DEFERRED
);
COMMIT;
"""
NOBODY = 65534


@pytest.fixture
def open_database(database):
    """Open a database, as often as needed; all are closed with the test."""
    opened = []

    def open_it(path=database):
        opened.append(Database(path, SCHEMA))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()


@pytest.fixture
def db(open_database):
    return open_database()


def add(connection, key, requests):
    """Action: insert each request as a value, which is its outcome."""
    connection.executemany("INSERT INTO item (value) VALUES (?)", [(value,) for value in requests])
    return requests


def values(db):
    return [value for (value,) in db.read("SELECT value FROM item ORDER BY value")]


def files(directory):
    """Return the bytes of every file in a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def together(db, *writes, last=lambda: None):
    """Make writes that wait at the same time; return what each returned or raised. last: called once all wait."""
    begun, busy, interval = [], threading.Event(), sys.getswitchinterval()

    def occupy(connection, key, requests):
        busy.set()
        wait_for(lambda: len(begun) == len(writes))
        last()
        return requests

    def write(arguments):
        begun.append(arguments)
        try:
            return db.write(*arguments)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(writes) + 1) as pool:
        pool.submit(db.write, occupy, None)
        assert busy.wait(30)
        # With this interval a thread runs until it waits: whatever has begun is in the queue.
        sys.setswitchinterval(60)
        try:
            return list(pool.map(write, writes))
        finally:
            sys.setswitchinterval(interval)


def test_writes_that_wait_are_grouped_by_action_and_key_in_one_transaction(db):
    groups = []

    def note(connection, key, requests):
        groups.append((key, sorted(requests), values(db)))
        return add(connection, key, requests)

    writes = [(note, key, value) for value, key in enumerate("aabab")]
    assert together(db, *writes, (add, "a", 5)) == [0, 1, 2, 3, 4, 5]
    # Nothing of the first group is committed while the second one runs.
    assert sorted(groups) == [("a", [0, 1, 3], []), ("b", [2, 4], [])]
    assert values(db) == [0, 1, 2, 3, 4, 5]


def test_a_refusal_is_raised_to_whom_it_belongs_and_undoes_nothing(db):
    def refuse_odd(connection, key, requests):
        add(connection, key, [value for value in requests if value % 2 == 0])
        return [KeyError(value) if value % 2 else value for value in requests]

    outcomes = together(db, *((refuse_odd, "key", value) for value in range(4)))
    assert [repr(outcome) for outcome in outcomes] == ["0", "KeyError(1)", "2", "KeyError(3)"]
    assert values(db) == [0, 2]


def raises(error):
    """Return a fault that raises an error."""

    def fault(connection, requests):
        raise error

    return fault


def executes(sql, *parameters):
    """Return a fault that executes SQL and otherwise behaves."""
    return lambda connection, requests: connection.execute(sql, parameters) and requests


# What an action may do wrong, and what its callers get.
FAULTS = [
    (raises(RuntimeError("no")), RuntimeError),
    (raises(SystemExit()), SystemExit),
    (raises(sqlite3.OperationalError("database or disk is full")), DatabaseUnavailable),
    (raises(sqlite3.DatabaseError("database disk image is malformed")), DatabaseUnavailable),
    (executes("INSERT INTO item (value) VALUES (-1), (-1)"), sqlite3.IntegrityError),
    # A deferred constraint fails at COMMIT.
    (executes("INSERT INTO item (parent) VALUES (-1)"), sqlite3.IntegrityError),
    (executes("SELECT ?"), sqlite3.ProgrammingError),
    (executes("ROLLBACK"), Exception),
    (lambda connection, requests: requests[1:], ValueError),
    (lambda connection, requests: None, TypeError),
]


def test_only_the_group_at_fault_gets_an_error_and_leaves_nothing(db):
    for number, (fault, error) in enumerate(FAULTS):

        def fail(connection, key, requests, fault=fault):
            connection.execute("INSERT INTO item (value) VALUES (1000)")
            return fault(connection, requests)

        neighbours = [(add, "a", 2 * number), (add, "c", 2 * number + 1)]
        first, *failures, last = together(db, neighbours[0], (fail, "b", 0), (fail, "b", 1), neighbours[1])
        assert all(isinstance(failure, error) for failure in failures), (number, failures)
        assert (first, last) == (2 * number, 2 * number + 1), number
    assert values(db) == list(range(2 * len(FAULTS)))


def test_a_failure_is_logged_once_and_waited_for_once_until_a_write_succeeds(
    open_database, database, monkeypatch, caplog
):
    def timeout(connection, key, requests):
        return [connection.execute("PRAGMA busy_timeout").fetchone()[0]]

    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.05)
    caplog.set_level("INFO", "raffle")
    db = open_database()
    for _ in range(2):
        assert db.write(timeout, None) == 50
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                with pytest.raises(DatabaseUnavailable):
                    db.write(add, None, 1)
        # A caller logs a programming error itself, and this is no success.
        with pytest.raises(TypeError):
            db.write(lambda *_: None, None)
        assert [db.write(timeout, None) for _ in range(2)] == [0, 50]
    assert caplog.messages == ["Writes fail: database is locked", "Writes succeed again"] * 2


def test_readers_cannot_write(db):
    db.write(add, None, 1)
    for sql in ("DELETE FROM item RETURNING value", "PRAGMA user_version = 4", "CREATE TABLE other (value)"):
        with pytest.raises(DatabaseUnavailable):
            db.read(sql)
    assert values(db) == [1]


def test_connections_that_read_are_used_again(db):
    values(db)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        values(db)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


# Close


def test_what_waits_at_a_close_is_finished_and_one_file_remains(db, database):
    values(db)
    assert together(db, (add, "a", 1), (add, "b", 2), last=db.close) == [1, 2]
    db.close()
    for refused in (partial(db.write, add, "a", 3), partial(values, db)):
        with pytest.raises(DatabaseUnavailable):
            refused()
    assert list(files(database.parent)) == ["raffle.db"]
    assert query(database, "SELECT value FROM item") == [(1,), (2,)]


def test_requests_at_a_close_are_answered_and_exactly_the_successes_are_stored(open_database, database, monkeypatch):
    # As many changes of the thread as possible.
    interval, stored = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-6)
    numbers = itertools.count()

    def use(db, request):
        with pytest.raises(DatabaseUnavailable):
            while True:
                request(db)

    def write(db):
        stored.append(db.write(add, None, next(numbers)))

    try:
        for _ in range(30):
            db = open_database()
            at_once([partial(use, db, request) for request in [write] * 6 + [values] * 2] + [db.close])
    finally:
        sys.setswitchinterval(interval)
    assert values(open_database()) == sorted(stored)


class SlowlyBound:
    """A parameter that is bound once the database refuses to be read."""

    def __init__(self, db):
        self.db, self.is_read = db, threading.Event()

    def __conform__(self, protocol):
        self.is_read.set()
        wait_for(self.is_refused)
        return 7

    def is_refused(self):
        try:
            return not self.db.read("SELECT 1")
        except DatabaseUnavailable:
            return True


def test_a_read_that_a_close_overtakes_is_answered(db):
    slow = SlowlyBound(db)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(db.read, "SELECT ?", (slow,))
        assert slow.is_read.wait(30)
        db.close()
        assert [tuple(row) for row in reading.result(30)] == [(7,)]


# The file


def test_a_file_that_was_moved_away_is_not_made_anew_and_its_wal_keeps_the_commits(open_database, database):
    db = open_database()
    db.write(add, None, 1)
    database.rename(database.with_name("away.db"))
    for refused in (partial(values, db), partial(db.write, add, None, 2), db.close):
        try:
            refused()
        except DatabaseUnavailable:
            continue
        finally:
            assert not database.exists()
    database.with_name("away.db").rename(database)
    assert values(open_database()) == [1]


MOMENTS = {
    "before the transaction": lambda change, connection: change(),
    "in it": lambda change, connection: change(),
    # SQLite calls back when it begins to execute a statement.
    "at its commit": lambda change, connection: connection.set_trace_callback(lambda sql: sql == "COMMIT" and change()),
}
CHANGES = ["mv raffle.db away.db", "cp raffle.db copy.db; mv copy.db raffle.db", "rm raffle.db-wal", ": > copy; mv copy raffle.db-wal"]


def test_nothing_is_acknowledged_once_a_file_was_moved_or_replaced(open_database, tmp_path):
    for change, moment in itertools.product(CHANGES, ("before the transaction", "in it", "at its commit")):
        directory = tmp_path / f"{change} {moment}".replace("/", "")
