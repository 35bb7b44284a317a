"""One SQLite file by `Database` alone, with a schema and actions of the tests' own."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from helpers import SCHEMA, add, at_once, query, wait_for

from database import Database, DatabaseRefused, DatabaseUnavailable


@pytest.fixture
def open_database(database):
    """Open a database, as often as needed; all are closed with the test."""
    with ExitStack() as stack:

        def open_path(path=database):
            return stack.enter_context(closing(Database(path, SCHEMA)))

        yield open_path


@pytest.fixture
def db(open_database):
    return open_database()


def values(db):
    return [value for (value,) in db.read("SELECT value FROM item ORDER BY value")]


def is_unavailable(call, *arguments):
    """Return whether a call raises DatabaseUnavailable."""
    try:
        call(*arguments)
    except DatabaseUnavailable:
        return True
    return False


def together(db, *writes, before=None):
    """Make writes that wait for the writing thread, in this order, while it is busy.

    before: what the thread does with its connection once all of them wait. Return what each write
    returned or raised, an error of `before` first.
    """
    is_busy, are_waiting = threading.Event(), threading.Event()

    def occupy(connection, group, requests):
        is_busy.set()
        assert are_waiting.wait(30)
        if before:
            before(connection)
        return requests

    with ThreadPoolExecutor(1 + len(writes)) as pool:
        answers = [pool.submit(db.write, occupy, None)]
        assert is_busy.wait(30)
        for number, write in enumerate(writes, 1):
            answers.append(pool.submit(db.write, *write))
            # The only private name here: nothing else tells that a write waits.
            wait_for(lambda number=number: db._writes.qsize() == number)
        are_waiting.set()

    outcomes = [answer.exception() or answer.result() for answer in answers]
    return outcomes if outcomes[0] else outcomes[1:]


# Writes


def test_a_statement_is_executed_and_its_rows_are_returned(db):
    rows = db.execute("INSERT INTO item (value) VALUES (?), (?) RETURNING value", (1, 2))
    assert [value for (value,) in rows] == [1, 2]
    assert values(db) == [1, 2]


def test_waiting_writes_share_a_transaction_by_action_and_group(db):
    """The refusal of one request undoes nothing, not even of its own group."""
    calls = []

    def refuse_3(connection, group, requests):
        # With what a reader sees: nothing, although the first group has run before the second.
        calls.append((group, requests, values(db)))
        add(connection, group, requests)
        return [KeyError(3) if value == 3 else value for value in requests]

    writes = [(refuse_3, group, value) for value, group in enumerate("aabab")]
    outcomes = together(db, *writes, (add, "a", 5))

    assert [repr(outcome) for outcome in outcomes] == ["0", "1", "2", "KeyError(3)", "4", "5"]
    assert calls == [("a", [0, 1, 3], []), ("b", [2, 4], [])]
    assert values(db) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (SystemExit(), SystemExit),
        (sqlite3.OperationalError("database or disk is full"), DatabaseUnavailable),
        (sqlite3.DatabaseError("database disk image is malformed"), DatabaseUnavailable),
        ("INSERT INTO item (value) VALUES (-1)", sqlite3.IntegrityError),
        ("SELECT ?", sqlite3.ProgrammingError),
    ],
    ids=repr,
)
def test_only_the_group_at_fault_gets_an_error_and_leaves_nothing(db, fault, expected):
    """fault: what an action raises, or the statement that it executes. Nothing is run twice."""
    calls = []

    def fail(connection, group, requests):
        calls.append(requests)
        add(connection, group, [-1])
        if isinstance(fault, BaseException):
            raise fault
        connection.execute(fault)
        return requests

    first, *failed, last = together(
        db, (add, "a", 0), (fail, "b", 1), (fail, "b", 2), (add, "c", 3)
    )
    assert (first, last) == (0, 3)
    assert all(isinstance(outcome, expected) for outcome in failed), failed
    assert calls == [[1, 2]]
    assert values(db) == [0, 3]


def test_a_lock_is_logged_and_waited_for_only_once(open_database, database, monkeypatch, caplog):
    """Until a write succeeds."""
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.5)
    caplog.set_level("INFO", "raffle")
    db = open_database()

    def busy_timeout():
        """Return for how many milliseconds the next write would wait."""
        [(milliseconds,)] = db.execute("PRAGMA busy_timeout")
        return milliseconds

    for number in range(2):
        assert busy_timeout() == 500
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                assert is_unavailable(db.write, add, None, 1)

        assert busy_timeout() == 0
        assert db.write(add, None, number) == number
        assert busy_timeout() == 500
    assert caplog.messages == ["Writes fail: database is locked", "Writes succeed again"] * 2


def test_what_waits_behind_a_failed_commit_is_not_run(db):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ran = []

    def fill_the_disk(connection):
        # The transaction that this is part of cannot be written to a file.
        add(connection, None, [1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))

    def empty_the_disk(connection, group, requests):
        ran.append(group)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return add(connection, group, requests)

    try:
        writes = [(empty_the_disk, "a", 2), (empty_the_disk, "b", 3)]
        outcomes = together(db, *writes, before=fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 3
    assert ran == []


def test_readers_cannot_write(db):
    assert is_unavailable(db.read, "INSERT INTO item (value) VALUES (1) RETURNING value")
    assert values(db) == []


# The close


def test_what_waits_at_a_close_is_finished_and_one_file_remains(db, database):
    assert values(db) == []
    writes = [(add, "a", 1), (add, "b", 2)]
    assert together(db, *writes, before=lambda connection: db.close()) == [1, 2]

    db.close()
    assert is_unavailable(db.write, add, "a", 3)
    assert is_unavailable(values, db)
    assert list(database.parent.iterdir()) == [database]
    assert query(database, "SELECT value FROM item") == [(1,), (2,)]


def test_a_write_after_a_close_is_refused_before_it_waits(db, monkeypatch):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 60)
    db.close()
    asking = threading.Thread(target=is_unavailable, args=(db.write, add, None, 1), daemon=True)
    asking.start()
    asking.join(30)
    assert not asking.is_alive()


@contextmanager
def closed_at_line(db, method, number):
    """Close a database when this thread comes to the n-th line of a method; yield the lines."""
    lines = []
    closing_thread = threading.Thread(target=db.close)

    def trace(frame, event, argument):
        if frame.f_code is method.__code__ and event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == number:
                closing_thread.start()
                closing_thread.join(0.05)  # it may have to wait for this thread
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(previous)
    if len(lines) >= number:
        closing_thread.join(30)
        assert not closing_thread.is_alive(), lines


@pytest.mark.parametrize("method", [Database.read, Database.write], ids=["read", "write"])
def test_a_request_is_answered_at_whichever_line_a_close_comes(open_database, method):
    """A request that hangs ends the run. What was not refused is stored."""
    stored = []

    def request(db, number):
        values(db)
        stored.append(db.write(add, None, number))

    for number in count(1):
        db = open_database()
        with closed_at_line(db, method, number) as lines:
            is_unavailable(request, db, number)
        if len(lines) < number:
            break  # the method has no more lines

    assert number > 5
    assert values(open_database()) == stored


def test_a_close_ends_while_many_ask_and_what_was_answered_is_stored(open_database):
    """Each asks until it is refused."""
    stored, numbers = [], count()

    def keep_writing(db):
        while True:
            stored.append(db.write(add, None, next(numbers)))

    def keep_reading(db):
        while True:
            values(db)

    def close_later(db, answers):
        wait_for(lambda: len(stored) > answers)
        db.close()
        return True

    for _ in range(10):
        db = open_database()
        asking = [partial(is_unavailable, keep, db) for keep in [keep_writing, keep_reading] * 4]
        assert at_once([*asking, partial(close_later, db, len(stored))]) == [True] * 9

    assert values(open_database()) == sorted(stored)


# The file


def test_a_file_that_was_moved_away_is_not_made_anew(open_database, database):
    """Its -wal file keeps the commits."""
    away = database.with_name("away")

    def move_at_commit(sql):
        if sql.startswith("COMMIT"):
            database.rename(away)

    def add_and_move(connection, group, requests):
        connection.set_trace_callback(move_at_commit)
        return add(connection, group, requests)

    db = open_database()
    # Too late for the transaction, but in time for the answer.
    assert is_unavailable(db.write, add_and_move, None, 1)
    assert is_unavailable(db.write, add, None, 2)
    db.close()
    assert not database.exists()

    away.rename(database)
    assert values(open_database()) == [1]


@pytest.mark.parametrize("name", ["a#b.db", "a?mode=memory.db", "100%20.db", " a b ", "ä.db"])
def test_a_path_may_have_any_character_and_is_resolved_once(
    open_database, tmp_path, monkeypatch, name
):
    """The files are private."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(name)
    db = open_database("link")
    monkeypatch.chdir("/")
    (tmp_path / "link").unlink()

    assert db.write(add, None, 1) == 1
    assert values(db) == [1]
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {name: 0o600, f"{name}-wal": 0o600, f"{name}-shm": 0o600}


def test_a_copy_gets_a_write_ahead_log_even_if_it_was_interrupted(open_database, database):
    """Without a write-ahead log, SQLite undoes what was interrupted with a journal."""
    killed = database.with_name("killed")
    with closing(sqlite3.connect(killed, isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        # With so small a cache, the half of a transaction is in the file.
        connection.executescript("PRAGMA cache_size = 1; BEGIN; CREATE TABLE half (value)")
        connection.execute("INSERT INTO half VALUES (zeroblob(50000))")
        shutil.copy(killed, database)
        shutil.copy(f"{killed}-journal", f"{database}-journal")

    assert values(open_database()) == []
    assert query(database, "SELECT name FROM sqlite_schema WHERE name = 'half'") == []
    assert query(database, "PRAGMA journal_mode") == [("wal",)]


# What is refused


@pytest.fixture
def good(open_database, database):
    """The path of a database that is served, with commits in its -wal file."""
    path = database.with_name("good")
    open_database(path).write(add, None, 1)
    return path


def execute(path, script):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def make_other_application(database, good):
    execute(database, "PRAGMA application_id = 8; CREATE TABLE item (value)")


def make_other_table(database, good):
    execute(database, "CREATE TABLE other (value)")


def make_loaded_dump(database, good):
    execute(database, "CREATE TABLE item (value)")
    execute(database, "CREATE TABLE other (value)")


def make_text(database, good):
    database.write_text("x")


def make_other_header(database, good):
    database.write_bytes(good.read_bytes().replace(b"S", b"s"))


def make_newer_version(database, good):
    execute(database, f"{SCHEMA} PRAGMA user_version = 4")


def make_older_version(database, good):
    execute(database, f"{SCHEMA} PRAGMA user_version = 2")


def make_wal_alone(database, good):
    shutil.copy(f"{good}-wal", f"{database}-wal")


def make_wal_of_an_empty_file(database, good):
    make_wal_alone(database, good)
    database.touch()


def make_directory(database, good):
    database.mkdir()


def make_pipe(database, good):
    os.mkfifo(database)


def contents(directory):
    """Return what all files hold, but for -shm files, which hold nothing of their own."""
    files = [file for file in directory.iterdir() if not file.name.endswith("-shm")]
    return {file: file.read_bytes() if file.is_file() else None for file in files}


OTHER_PROGRAM = "was made by another program"
NO_DATABASE = "(was made by another program|cannot be opened: file is not a database)"
REASONS = {
    make_other_application: OTHER_PROGRAM,
    make_other_table: OTHER_PROGRAM,
    make_loaded_dump: "looks like a loaded .dump, .+ with VACUUM INTO instead",
    make_text: NO_DATABASE,
    make_other_header: NO_DATABASE,
    make_newer_version: "has version 4, but this program needs version 3",
    make_older_version: "has version 2, but this program needs version 3",
    make_wal_alone: "is missing or empty: put it back",
    make_wal_of_an_empty_file: "is missing or empty: put it back",
    make_directory: "is not a regular file",
    make_pipe: "is not a regular file",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_what_cannot_be_served_is_refused_and_left_alone(open_database, database, good, make):
    make(database, good)
    before = contents(database.parent)

    with pytest.raises(DatabaseRefused, match=f"{database} {REASONS[make]}$"):
        open_database()
    assert contents(database.parent) == before


def test_an_older_version_is_read_from_the_wal_file_and_refused(open_database, database):
    killed = database.with_name("killed")
    open_database(killed).execute("PRAGMA user_version = 2")
    shutil.copy(killed, database)
    shutil.copy(f"{killed}-wal", f"{database}-wal")
    # The version of the file itself is the one that is needed.
    assert query_version(killed) == 3

    with pytest.raises(DatabaseRefused, match="has version 2, but"):
        open_database()
    assert query(database, "PRAGMA user_version") == [(2,)]


def query_version(path):
    """Return the version in the header of a file, without its -wal file."""
    return int.from_bytes(path.read_bytes()[60:64], "big")


def test_an_older_sqlite_is_refused(open_database, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    with pytest.raises(DatabaseRefused, match=r"^SQLite 3\.37 or newer is needed"):
        open_database()


@pytest.mark.parametrize("protected", ["raffle.db", "."])
def test_what_this_user_cannot_write_is_refused(protected):
    # Not in tmp_path, which other users cannot enter.
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory, "raffle.db")
        Database(database, SCHEMA).close()
        database.parent.chmod(0o777)
        database.chmod(0o666)
        path = database.parent / protected
        path.chmod(0o555)

        user = os.geteuid() or 65534  # root can write everything, but nobody cannot
        os.seteuid(user)
        try:
            message = f"^{path} cannot be written by user {user}: it belongs to"
            with pytest.raises(DatabaseRefused, match=message):
                Database(database, SCHEMA)
        finally:
            os.seteuid(os.getuid())


def test_a_read_only_file_system_is_called_by_its_name():
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        try:
            database = Path(directory, "raffle.db")
            Database(database, SCHEMA).close()
            subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
            for path in (database, database.with_name("new.db")):
                with pytest.raises(DatabaseRefused, match=r"written: Read-only file system$"):
                    Database(path, SCHEMA)
        finally:
            subprocess.run(["umount", directory], check=True)


def test_a_start_does_not_wait_for_who_writes(open_database, database):
    """Whatever another program does: an existing file is opened without a lock."""
    db = open_database()
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert open_database().read("SELECT count(*) FROM item")[0][0] == 0
        other.execute("ROLLBACK")
    assert db.write(add, None, 1) == 1


def test_a_long_wal_file_is_cut_once_its_readers_are_gone(open_database, database):
    """It grows for as long as one reads; without a limit it would keep its length."""
    db = open_database()
    wal = database.with_name("raffle.db-wal")
    with closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM item").fetchall()
        for number in range(30):
            db.execute("INSERT INTO item (value) VALUES (zeroblob(1000000 + ?))", (number,))
        assert wal.stat().st_size > 25_000_000
    for number in range(3):
        db.write(add, None, number)
    assert wal.stat().st_size <= 16 * 2**20
