"""One SQLite file by `Database` alone, with a schema and actions of the tests' own."""

import itertools
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import at_once, query, wait_for

from database import Database, DatabaseRefused, DatabaseUnavailable

SCHEMA = """
BEGIN IMMEDIATE; PRAGMA application_id = 7; PRAGMA user_version = 3;
CREATE TABLE IF NOT EXISTS item (value UNIQUE, parent REFERENCES item (value) DEFERRABLE INITIALLY DEFERRED);
COMMIT;
"""


@pytest.fixture
def open_database(database):
    """Open a database, as often as needed; all are closed with the test."""
    with ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        yield lambda path=database: stack.enter_context(closing(Database(path, SCHEMA)))


@pytest.fixture
def db(open_database):
    return open_database()


def add(connection, key, requests):
    """Action: insert each request as a value, which is its outcome."""
    connection.executemany("INSERT INTO item (value) VALUES (?)", [(value,) for value in requests])
    return requests


def values(db):
    return [value for (value,) in db.read("SELECT value FROM item ORDER BY value")]


def is_unavailable(call, *arguments):
    """Return whether a call raises DatabaseUnavailable."""
    with suppress(DatabaseUnavailable):
        call(*arguments)
        return False
    return True


def together(db, *writes, last=lambda: None):
    """Make writes that wait at once; return what each returned or raised. last: what their thread calls before them."""
    begun = []

    def occupy(connection, key, requests):
        begun.append(key)
        wait_for(lambda: len(begun) > len(writes))
        return [last()]

    # With this interval a thread runs until it waits: what has begun is in the queue.
    sys.setswitchinterval(60)
    with ThreadPoolExecutor(1 + len(writes)) as pool:
        occupied = pool.submit(db.write, occupy, None)
        wait_for(lambda: begun)
        answers = [
            pool.submit(lambda *write: begun.append(write) or db.write(*write), *write)
            for write in writes
        ]
    assert occupied.exception() or occupied.result() is None
    return [answer.exception() or answer.result() for answer in answers]


def test_writes_that_wait_share_a_transaction_by_action_and_key_and_a_refusal_undoes_nothing(db):
    groups = []

    def refuse_3(connection, key, requests):
        # With what a reader sees: nothing, although the first group has been run when the second one is.
        groups.append((key, sorted(requests), values(db)))
        return [KeyError(3) if value == 3 else value for value in add(connection, key, requests)]

    writes = [(refuse_3, key, value) for value, key in enumerate("aabab")]
    outcomes = together(db, *writes, (add, "a", 5))
    assert [repr(outcome) for outcome in outcomes] == ["0", "1", "2", "KeyError(3)", "4", "5"]
    assert sorted(groups) == [("a", [0, 1, 3], []), ("b", [2, 4], [])]
    assert values(db) == [0, 1, 2, 3, 4, 5]


def test_only_the_group_at_fault_gets_an_error_and_leaves_nothing(db):
    def fail(connection, key, faults):
        add(connection, key, [-1])
        if isinstance(faults[0], BaseException):
            raise faults[0]
        return connection.execute(faults[0]) and faults

    # What the action raises, executes or returns, and what its callers get.
    faults = [
        (SystemExit(), SystemExit),
        (sqlite3.OperationalError("database or disk is full"), DatabaseUnavailable),
        (sqlite3.DatabaseError("database disk image is malformed"), DatabaseUnavailable),
        ("INSERT INTO item (value) VALUES (-1)", sqlite3.IntegrityError),
        ("SELECT ?", sqlite3.ProgrammingError),
    ]
    for number, (fault, error) in enumerate(faults):
        outcomes = together(
            db, (add, "a", 2 * number), *[(fail, "b", fault)] * 2, (add, "c", 2 * number + 1)
        )
        assert outcomes[::3] == [2 * number, 2 * number + 1], (fault, outcomes)
        assert all(isinstance(outcome, error) for outcome in outcomes[1:3]), (fault, outcomes)
    assert values(db) == list(range(2 * len(faults)))


def test_a_lock_is_logged_once_and_waited_for_once_until_a_write_succeeds(
    open_database, database, monkeypatch, caplog
):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.05)
    caplog.set_level("INFO", "raffle")
    db = open_database()
    timeout = partial(
        db.write,
        lambda connection, *_: list(connection.execute("PRAGMA busy_timeout").fetchone()),
        None,
    )
    for number in range(2):
        assert timeout() == 50
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert all(is_unavailable(db.write, add, None, 1) for _ in range(3))
        assert [timeout(), db.write(add, None, number), timeout()] == [0, number, 50]
    assert caplog.messages == ["Writes fail: database is locked", "Writes succeed again"] * 2


def test_what_waits_behind_a_commit_that_fails_is_not_run(db):
    connection, limits = (
        db.write(lambda connection, *_: [connection], None),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )

    def set_limit(*limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (*limit, limits[1])[:2])
        return connection.execute("INSERT INTO item (value) VALUES (?)", (str(limit),)) and [None]

    outcomes = together(
        db,
        *[(lambda *_: set_limit(*limits), key) for key in "ab"],
        last=lambda: set_limit(1) and None,
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 2


def test_readers_cannot_write(db):
    assert is_unavailable(db.read, "INSERT INTO item (value) VALUES (1) RETURNING value")
    assert values(db) == []


def test_what_waits_at_a_close_is_finished_and_one_file_remains(db, database):
    assert values(db) == []
    assert together(db, (add, "a", 1), (add, "b", 2), last=db.close) == [1, 2]
    db.close()
    assert is_unavailable(db.write, add, "a", 3)
    assert is_unavailable(values, db)
    assert list(database.parent.iterdir()) == [database]
    assert query(database, "SELECT value FROM item") == [(1,), (2,)]


def test_requests_at_a_close_are_answered_and_exactly_the_successes_are_stored(open_database):
    stored, numbers = [], iter(range(10**9))
    requests = {
        Database.read: values,
        Database.write: lambda db: stored.append(db.write(add, None, next(numbers))),
    }
    # Whichever line they have come to.
    for (method, request), n in itertools.product(requests.items(), range(20)):
        db, lines = open_database(), []
        closing_thread = threading.Thread(target=db.close)

        def close_at_line(
            frame, *_, code=method.__code__, n=n, closing_thread=closing_thread, lines=lines
        ):
            lines.append(frame.f_code is code)
            if lines[-1] and sum(lines) == n:
                closing_thread.start()
            return close_at_line

        sys.settrace(close_at_line)
        is_unavailable(request, db)
        sys.settrace(None)
    # Of many threads that take turns as often as they can, and ask until they are refused.
    sys.setswitchinterval(1e-6)
    for _ in range(20):
        db = open_database()
        asking = [partial(is_unavailable, request, db) for request in requests.values()] * 4
        at_once([partial(list, iter(ask, True)) for ask in asking] + [db.close])
    assert values(open_database()) == sorted(stored)


def test_a_file_that_was_moved_away_is_not_made_anew_and_its_wal_keeps_the_commits(
    open_database, database
):
    def add_and_move(connection, key, requests):
        connection.set_trace_callback(lambda sql: sql == "COMMIT" and database.rename(away))
        return add(connection, key, requests)

    db, away = open_database(), database.with_name("away")
    # Too late for the transaction, but in time for the answer.
    assert is_unavailable(db.write, add_and_move, None, 1)
    assert is_unavailable(db.write, add, None, 2)
    db.close()
    assert not database.exists()
    away.rename(database)
    assert values(open_database()) == [1]


def test_a_path_is_resolved_once_may_have_any_character_and_is_private(
    open_database, tmp_path, monkeypatch
):
    for name in ("a#b.db", "a?mode=memory.db", "100%20.db", " a b ", "ä.db"):
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        (directory / "link").symlink_to(name)
        monkeypatch.chdir(directory)
        db = open_database("link")
        monkeypatch.chdir("/")
        (directory / "link").unlink()
        assert [db.write(add, None, 1)] == values(db)
        modes = {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
        assert modes == {name: 0o600, f"{name}-wal": 0o600, f"{name}-shm": 0o600}


def test_a_copy_gets_a_write_ahead_log_even_if_that_was_interrupted(open_database, database):
    # Without a write-ahead log, SQLite undoes what was interrupted by a journal.
    with closing(sqlite3.connect(database.with_name("killed"), isolation_level=None)) as connection:
        connection.executescript(
            f"{SCHEMA} PRAGMA cache_size = 1; BEGIN; CREATE TABLE half AS SELECT zeroblob(50000)"
        )
        subprocess.run(
            "cp killed raffle.db; cp killed-journal raffle.db-journal",
            shell=True,
            cwd=database.parent,
        )
    assert (
        values(open_database())
        == query(database, "SELECT name FROM sqlite_schema WHERE name = 'half'")
        == []
    )
    assert query(database, "PRAGMA journal_mode") == [("wal",)]


def test_what_cannot_be_served_is_refused_in_a_sentence_and_left_alone(
    open_database, database, monkeypatch
):
    def run(command):
        subprocess.run(command, shell=True, check=True, cwd=database.parent)
        files = set(database.parent.iterdir()) - {
            database.with_name("raffle.db-shm")
        }  # which holds nothing of its own
        return {file: file.is_file() and file.read_bytes() for file in files}

    with closing(open_database(database.with_name("good"))) as good:
        good.write(
            lambda connection, *_: [connection.execute("PRAGMA user_version = 2") and None], None
        )
        run("cp good old; cp good-wal old-wal")
    for command, sentence in {
        "sqlite3 raffle.db 'PRAGMA application_id = 8; CREATE TABLE item (value)'": "was made by another program",
        "sqlite3 raffle.db 'CREATE TABLE item (value)'": "was made by another program",
        "printf x > raffle.db": "was made by another program",
        "tr S s < good > raffle.db": "(was made by another program|cannot be opened: file is not a database)",
        "sqlite3 good 'PRAGMA user_version = 4'; cp good raffle.db": "has version 4, but this program needs version 3",
        "cp old-wal raffle.db-wal": "is missing or empty: put it back",
        "cp old-wal raffle.db-wal; : > raffle.db": "is missing or empty: put it back",
        "mkdir raffle.db": "is not a regular file",
        "mkfifo raffle.db": "is not a regular file",
    }.items():
        before = run(f"rm -rf raffle.db*; {command}")
        with pytest.raises(DatabaseRefused, match=f"{database} {sentence}$"):
            open_database()
        assert run("true") == before, command
    run("rm -rf raffle.db*; cp old raffle.db; cp old-wal raffle.db-wal")
    with pytest.raises(
        DatabaseRefused, match=f"{database} has version 2, but this program needs version 3$"
    ):
        open_database()
    assert query(database, "PRAGMA user_version") == [(2,)]
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    with pytest.raises(DatabaseRefused, match=r"^SQLite 3\.37 or newer is needed"):
        open_database()


def test_what_this_user_cannot_write_is_refused():
    # Not in tmp_path, which other users cannot enter.
    with tempfile.TemporaryDirectory() as name:
        database, user = Path(name, "raffle.db"), os.geteuid() or 65534
        Database(database, SCHEMA).close()
        database.parent.chmod(0o777)
        for path in (database, database.parent):
            path.chmod(0o555)
            os.seteuid(user)
            try:
                with pytest.raises(
                    DatabaseRefused,
                    match=f"^{path} cannot be written by user {user}: it belongs to",
                ):
                    Database(database, SCHEMA)
            finally:
                os.seteuid(os.getuid())
