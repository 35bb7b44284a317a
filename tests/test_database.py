"""The writing thread, the readers and the file, with a schema that is not a raffle's."""

import os
import shutil
import sqlite3
import stat
import subprocess
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import wait_for

from database import Database, DatabaseRefused, DatabaseUnavailable

SCHEMA = """
PRAGMA application_id = 7;
PRAGMA user_version = 3;
CREATE TABLE IF NOT EXISTS item (value INTEGER NOT NULL);
"""


def upgrade(db):
    db.execute("ALTER TABLE item RENAME COLUMN number TO value")


@pytest.fixture
def open_database(database):
    """Open the database with `open_database()`, as often as needed; all are closed with the test."""
    opened = []

    def open_it(path=database, schema=SCHEMA, upgrades=None):
        opened.append(Database(path, schema, upgrades or {2: upgrade}))
        return opened[-1]

    yield open_it
    for each in opened:
        each.close()


@pytest.fixture
def db(open_database):
    return open_database()


def add(connection, key, requests):
    """Insert each request as a value, and return it."""
    for value in requests:
        connection.execute("INSERT INTO item (value) VALUES (?)", (value,))
    return requests


def values(db):
    return [value for (value,) in db.read("SELECT value FROM item ORDER BY value")]


class Occupied:
    """Keeps the writing thread busy, so that what is written meanwhile is one batch."""

    def __init__(self, db):
        self.go_on = threading.Event()
        self.busy = threading.Event()
        self.db = db

    def __enter__(self):
        answer = self.db.write(lambda *_: [self.busy.set() or self.go_on.wait(30)], "occupy")
        assert self.busy.wait(30)
        return answer

    def __exit__(self, *_):
        self.go_on.set()


def outcomes_of(answers):
    return [answer.exception(30) or answer.result() for answer in answers]


def test_what_is_written_can_be_read(db):
    assert db.write(add, "key", 7).result() == 7
    assert values(db) == [7]


def test_requests_that_wait_for_the_same_action_and_key_are_run_together(db):
    groups = []

    def note(connection, key, requests):
        groups.append((key, requests))
        return requests

    with Occupied(db):
        answers = [db.write(note, key, n) for n, key in enumerate("aabab")]
    assert outcomes_of(answers) == [0, 1, 2, 3, 4]
    assert groups == [("a", [0, 1, 3]), ("b", [2, 4])]


def test_writes_that_wait_share_one_transaction_and_are_seen_once_it_is_committed(db):
    seen = []

    def look(connection, key, requests):
        seen.append((values(db), connection.execute("SELECT count(*) FROM item").fetchone()))
        return requests

    with Occupied(db):
        answers = [db.write(add, n, n) for n in range(20)]
        answers.append(db.write(look, "look"))
    outcomes_of(answers)
    assert seen == [([], (20,))]
    assert values(db) == list(range(20))


def test_an_action_that_fails_does_no_harm_to_its_neighbours(db):
    def fail(connection, key, requests):
        connection.execute("UPDATE item SET value = -1")
        raise RuntimeError("no")

    with Occupied(db):
        answers = [db.write(add, "a", 1), *[db.write(fail, "b", n) for n in range(2)], db.write(add, "c", 3)]
    first, *failures, last = outcomes_of(answers)
    assert (first, last, values(db)) == (1, 3, [1, 3])
    assert [str(failure) for failure in failures] == ["no", "no"]


def test_an_outcome_that_is_an_exception_is_raised_to_whom_it_belongs(db):
    def refuse_odd(connection, key, requests):
        return [KeyError(n) if n % 2 else n for n in requests]

    with Occupied(db):
        answers = [db.write(refuse_odd, "key", n) for n in range(4)]
    assert [repr(outcome) for outcome in outcomes_of(answers)] == ["0", "KeyError(1)", "2", "KeyError(3)"]


def undo_everything(connection, key, requests):
    connection.execute("ROLLBACK")  # as SQLite does by itself when the disk is full
    raise sqlite3.OperationalError("database or disk is full")


def owe_a_reference(connection, key, requests):
    connection.execute("PRAGMA defer_foreign_keys = ON")
    connection.execute("CREATE TABLE part (item REFERENCES whole)")
    connection.execute("CREATE TABLE whole (id INTEGER PRIMARY KEY)")
    connection.execute("INSERT INTO part VALUES (99)")
    return [None]


def end_the_interpreter(connection, key, requests):
    raise SystemExit


def answer_too_few(connection, key, requests):
    return []


def meet_damage(connection, key, requests):
    raise sqlite3.DatabaseError("database disk image is malformed")


@pytest.mark.parametrize("failing", [undo_everything, owe_a_reference, end_the_interpreter, meet_damage])
def test_nobody_is_told_success_if_the_transaction_is_not_committed_and_the_next_one_works(db, failing):
    with Occupied(db):
        answers = [db.write(add, "a", 1), db.write(failing, "b"), db.write(add, "c", 3)]
    assert [type(outcome) for outcome in outcomes_of(answers)] == [DatabaseUnavailable] * 3
    assert values(db) == []
    assert db.write(add, "a", 1).result(30) == 1


def test_an_action_that_gives_too_few_outcomes_fails_for_those_who_wait_for_it(db):
    with Occupied(db):
        answers = [db.write(add, "a", 1), db.write(answer_too_few, "b"), db.write(add, "c", 3)]
    assert [type(outcome) for outcome in outcomes_of(answers)] == [int, ValueError, int]


def test_whatever_ends_the_writing_thread_fails_all_who_wait_now_and_later(db, monkeypatch):
    def break_down(failure):
        raise MemoryError

    with Occupied(db) as occupied:
        answers = [db.write(add, n, n) for n in range(3)]
        monkeypatch.setattr(db, "_note", break_down)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
    occupied.exception(30)
    assert [type(outcome) for outcome in outcomes_of(answers)] == [DatabaseUnavailable] * 3
    wait_for(lambda: not any(thread.name == "raffle-writer" for thread in threading.enumerate()))
    for unavailable in (lambda: db.write(add, "a", 1), db.require_health, lambda: values(db)):
        with pytest.raises(DatabaseUnavailable):
            unavailable()


def test_readers_cannot_write(db):
    with pytest.raises(DatabaseUnavailable):
        db.read("DELETE FROM item RETURNING value")


def test_values_are_read_by_as_many_threads_as_ask_and_connections_are_used_again(db, database):
    db.write(add, "a", 1).result()
    for _ in range(50):
        thread = threading.Thread(target=values, args=(db,))
        thread.start()
        thread.join()
    opened = [descriptor.resolve() for descriptor in Path("/proc/self/fd").iterdir()]
    assert opened.count(database) == 3  # the lock, the writer and one reader


# Health


def test_a_database_that_can_be_read_and_written_is_healthy(db):
    db.require_health()


def test_a_healthy_database_that_has_just_been_written_is_not_written_again(db, database):
    db.write(add, "a", 1).result()
    before = database.with_name("raffle.db-wal").stat().st_size
    db.require_health()
    assert database.with_name("raffle.db-wal").stat().st_size == before


def test_a_database_that_could_not_store_anything_now_is_not_healthy(open_database, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(range(0, 10_000, 10)).__next__)
    db = open_database()

    def pragma(text):
        db.write(lambda connection, *_: [connection.execute(f"PRAGMA {text}").fetchall()], "pragma").result()

    db.require_health()
    # As on a disk that has become read-only.
    pragma("query_only = ON")
    with pytest.raises(DatabaseUnavailable):
        db.require_health()


def test_a_full_directory_for_temporary_files_holds_nobody_up(open_database):
    db = open_database()
    write = db.write(lambda connection, *_: [connection.execute("PRAGMA temp_store").fetchone()], "pragma")
    in_memory = (2,)
    assert write.result() == tuple(db.read("PRAGMA temp_store")[0]) == in_memory


def test_a_table_that_is_damaged_is_not_healthy(open_database, database):
    open_database().close()
    with closing(sqlite3.connect(database)) as connection:
        [(page,)] = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'item'").fetchall()
        [(size,)] = connection.execute("PRAGMA page_size").fetchall()
        connection.execute("PRAGMA journal_mode = DELETE")
    with database.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(DatabaseUnavailable):
        open_database(database).require_health()


# Close


def test_closing_leaves_one_file_and_no_way_to_write_or_read(db, database):
    db.write(add, "a", 1).result()
    values(db)
    db.close()
    db.close()
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]
    for unavailable in (lambda: db.write(add, "a", 1), lambda: values(db), db.require_health):
        with pytest.raises(DatabaseUnavailable):
            unavailable()
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]


def test_closing_finishes_what_waits(open_database):
    db = open_database()
    occupied = Occupied(db)
    with occupied:
        answers = [db.write(add, "a", n) for n in range(3)]
        closer = threading.Thread(target=db.close)
        closer.start()
    closer.join(30)
    assert outcomes_of(answers) == [0, 1, 2]
    assert values(open_database()) == [0, 1, 2]


def is_closing(db):
    try:
        values(db)
    except DatabaseUnavailable:
        return True
    return False


def test_closing_waits_for_a_read_in_progress(db, database):
    reading, closing_began = threading.Event(), threading.Event()
    connect = sqlite3.connect

    def wait(_):
        reading.set()
        return closing_began.wait(30)

    def connect_with_wait(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.create_function("wait", 1, wait)
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_with_wait)
        rows = []
        reader = threading.Thread(target=lambda: rows.extend(db.read("SELECT wait(1) FROM sqlite_schema LIMIT 1")))
        reader.start()
        assert reading.wait(30)
    closer = threading.Thread(target=db.close)
    closer.start()
    # It does not read any more, but goes on with what it reads.
    wait_for(lambda: is_closing(db))
    closing_began.set()
    closer.join(30)
    reader.join(30)
    assert [tuple(row) for row in rows] == [(True,)]
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]


def test_a_database_can_be_closed_by_its_own_writing_thread(db, database):
    db.write(lambda *_: [db.close()], "close").result()
    wait_for(lambda: [file.name for file in database.parent.iterdir()] == ["raffle.db"])


# Files


def test_a_new_database_is_readable_by_its_owner_only(db, database):
    db.write(add, "a", 1).result()
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in database.parent.iterdir()}
    assert modes == {"raffle.db": 0o600, "raffle.db-wal": 0o600, "raffle.db-shm": 0o600}


@pytest.mark.parametrize("name", ["a#b.db", "a?mode=memory.db", "100%20.db", "a b.db", "ä.db"])
def test_a_path_may_have_any_character(open_database, tmp_path, name):
    db = open_database(tmp_path / name)
    db.write(add, "a", 1).result()
    db.close()
    assert values(open_database(tmp_path / name)) == [1]
    assert {file.name.partition(".db")[0] for file in tmp_path.iterdir()} == {name.partition(".db")[0]}


def test_a_relative_path_stays_what_it_was_after_a_change_of_directory(open_database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    db = open_database("relative.db")
    monkeypatch.chdir("/")
    db.write(add, "a", 1).result()
    assert values(db) == [1]
    assert (tmp_path / "relative.db").exists()


def test_the_file_that_a_link_leads_to_is_the_database(open_database, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere" / "real.db")
    db = open_database(tmp_path / "link.db")
    assert caplog.messages == [f"{tmp_path / 'link.db'} leads to {db.path}"]
    db.write(add, "a", 1).result()
    assert db.path == tmp_path / "elsewhere" / "real.db"
    assert {file.name for file in tmp_path.iterdir()} == {"elsewhere", "link.db"}


def test_a_file_that_is_not_a_regular_one_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(DatabaseRefused, match="is not a regular file"):
            Database(path, SCHEMA, {2: upgrade})


def damage(database, how):
    wal = database.with_name("raffle.db-wal")
    if how == "moved away":
        database.rename(database.with_name("moved.db"))
    elif how == "replaced":
        shutil.copy(database, database.with_name("new.db"))
        database.with_name("new.db").replace(database)
    elif how == "written over":
        database.write_bytes(database.read_bytes())
    elif how == "-wal deleted":
        wal.unlink()
    else:
        os.truncate(wal, 32)


class Connection(sqlite3.Connection):
    """A connection that calls `after_commit` once it has committed."""

    after_commit = None

    def execute(self, sql, *arguments):
        result = super().execute(sql, *arguments)
        if sql == "COMMIT" and self.after_commit:
            self.after_commit()
        return result


CHANGES = ["moved away", "replaced", "written over", "-wal deleted"]


@pytest.mark.parametrize(
    ("how", "after_commit"),
    # A -wal that is cut after a commit is noticed at the next one.
    [*[(how, after_commit) for how in CHANGES for after_commit in (False, True)], ("-wal cut", False)],
)
def test_nothing_is_acknowledged_once_another_program_has_changed_the_files(
    open_database, database, caplog, monkeypatch, how, after_commit
):
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    db = open_database()
    db.write(add, "a", 1).result()
    if after_commit:
        monkeypatch.setattr(Connection, "after_commit", lambda _: damage(database, how))
    else:
        damage(database, how)
    assert isinstance(db.write(add, "a", 2).exception(30), DatabaseUnavailable)
    monkeypatch.setattr(Connection, "after_commit", None)
    for unavailable in (lambda: db.write(add, "a", 3), db.require_health):
        with pytest.raises(DatabaseUnavailable):
            unavailable()
    db.close()
    [told, *_] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told.startswith(f"Writes fail until a restart: {database}")


def test_what_another_program_has_put_in_place_is_left_as_it_is(open_database, database):
    db = open_database()
    db.write(add, "a", 1).result()
    other = open_database(database.with_name("other.db"))
    other.write(add, "a", 9).result()
    other.close()
    copy = database.with_name("other.db").read_bytes()
    database.write_bytes(copy)
    db.close()
    assert database.read_bytes() == copy


def test_a_wal_that_another_program_has_deleted_is_rescued_by_closing(open_database, database):
    db = open_database()
    db.write(add, "a", 1).result()
    damage(database, "-wal deleted")
    assert isinstance(db.write(add, "a", 2).exception(30), DatabaseUnavailable)
    db.close()
    assert 1 in values(open_database())


def test_checkpoints_keep_the_wal_short_and_are_not_taken_for_a_change_by_others(open_database, database, monkeypatch):
    monkeypatch.setattr("database.CHECKPOINT_INTERVAL", 0)
    db = open_database()
    size = database.stat().st_size
    for n in range(600):
        db.write(add, "a", n).result()
    assert database.stat().st_size > size
    assert database.with_name("raffle.db-wal").stat().st_size < 200_000
    assert values(db) == list(range(600))


def test_a_long_transaction_is_not_taken_for_a_change_by_others(db):
    # Longer than what SQLite would checkpoint by itself.
    db.write(
        lambda connection, *_: [connection.execute("INSERT INTO item VALUES (zeroblob(5000000))")], "long"
    ).result()
    for n in range(2):
        assert db.write(add, "a", n).result() == n


@pytest.mark.parametrize("database_left", ["nothing", "an empty file"])
def test_a_wal_without_its_database_is_refused_and_kept(open_database, database, database_left):
    db = open_database()
    db.write(add, "a", 1).result()
    wal = database.with_name("raffle.db-wal")
    kept = wal.read_bytes()
    db.close()
    wal.write_bytes(kept)
    database.rename(database.with_name("kept.db"))
    if database_left == "an empty file":
        database.touch()
    with pytest.raises(DatabaseRefused, match=r"holds commits, but .* is missing or empty"):
        open_database()
    assert wal.read_bytes() == kept


def test_closing_beside_a_reader_leaves_everything_in_the_database(open_database, database):
    db = open_database()
    db.write(add, "a", 1).result()
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as other:
        assert other.execute("SELECT value FROM item").fetchall() == [(1,)]
        assert db.close() is True
        shutil.copy(database, database.with_name("alone.db"))
    assert values(open_database(database.with_name("alone.db"))) == [1]


def test_closing_says_if_a_reader_keeps_something_from_the_database(open_database, database, caplog):
    db = open_database()
    db.write(add, "a", 1).result()
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT value FROM item").fetchall()
        db.write(add, "a", 2).result()
        assert db.close() is False
    assert caplog.messages == [f"{database}-wal holds commits that raffle.db needs: keep both files together"]
    assert values(open_database()) == [1, 2]


def test_nothing_is_acknowledged_any_more_once_a_commit_has_failed_to_reach_the_disk(
    open_database, database, monkeypatch, caplog
):
    class Failing(sqlite3.Connection):
        fails = False

        def execute(self, sql, *arguments):
            if sql == "COMMIT" and self.fails:
                Failing.fails = False
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *arguments)

    def fail_while_others_wait(connection, key, requests):
        waiting.extend(db.write(add, "b", n) for n in range(3))
        Failing.fails = True
        return requests

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    db = open_database()
    db.write(add, "a", 1).result()
    waiting = []
    failed = db.write(fail_while_others_wait, "a")
    assert isinstance(failed.exception(30), DatabaseUnavailable)
    # They make up the next batch, whose commit would succeed.
    assert [type(outcome) for outcome in outcomes_of(waiting)] == [DatabaseUnavailable] * 3
    with pytest.raises(DatabaseUnavailable):
        db.write(add, "a", 3)
    with pytest.raises(DatabaseUnavailable):
        db.require_health()
    with pytest.raises(DatabaseUnavailable):
        values(db)
    assert caplog.messages == [f"Writes fail until a restart: {database}: disk I/O error"]
    db.close()
    assert values(open_database()) == [1]


def test_each_cause_of_a_failure_is_logged_once_and_a_programming_error_with_its_traceback(db, caplog):
    def fail(connection, key, requests):
        connection.execute("ROLLBACK")
        raise sqlite3.OperationalError(key)

    def err(connection, key, requests):
        raise SystemExit("a mistake")

    for action, key in ((fail, "one"), (fail, "two"), (fail, "one"), (err, "a"), (err, "b")):
        assert isinstance(db.write(action, key).exception(30), DatabaseUnavailable)
    assert [record.getMessage() for record in caplog.records] == [
        "Writes fail: one",
        "Writes fail: two",
        "Writes fail: a mistake",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [False, False, True]


@pytest.fixture
def full_disk(tmp_path):
    """A small file system that is full."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory], check=False)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    with suppress(OSError), (directory / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(1024)):
            pass
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_start_on_a_full_disk_names_the_cause(full_disk):
    with pytest.raises(DatabaseRefused, match=r"cannot be opened: (the disk is full|No space left on device)"):
        Database(full_disk / "raffle.db", SCHEMA, {2: upgrade})


# Other programs and other versions


def test_another_program_that_locks_the_file_for_a_moment_is_waited_for(open_database, database, monkeypatch):
    begun = threading.Event()

    class Watched(sqlite3.Connection):
        def execute(self, sql, *arguments):
            if sql == "BEGIN IMMEDIATE":
                begun.set()
            return super().execute(sql, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
        db = open_database()
    begun.clear()
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = db.write(add, "a", 1)
        assert begun.wait(30)
        # For as long as it holds the lock, nothing comes of it.
        with pytest.raises(FutureTimeout):
            answer.result(0.05)
        other.execute("ROLLBACK")
        assert answer.result(30) == 1


def test_nothing_is_acknowledged_once_another_program_has_written(open_database, database, caplog):
    db = open_database()
    db.write(add, "a", 1).result()
    with closing(sqlite3.connect(database)) as other:
        other.execute("INSERT INTO item VALUES (2)")
        other.commit()
        assert isinstance(db.write(add, "a", 3).exception(30), DatabaseUnavailable)
        with pytest.raises(DatabaseUnavailable):
            db.write(add, "a", 3)
    db.close()
    assert caplog.messages == [f"Writes fail until a restart: {database} was written by another program"]
    assert values(open_database()) == [1, 2]


def test_another_program_that_locks_the_file_is_waited_for_only_once(open_database, database, monkeypatch, caplog):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.01)
    timeouts = []

    class Watched(sqlite3.Connection):
        def execute(self, sql, *arguments):
            if sql == "BEGIN IMMEDIATE":
                timeouts.append(super().execute("PRAGMA busy_timeout").fetchone()[0])
            return super().execute(sql, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
        db = open_database()
    del timeouts[:]
    with closing(sqlite3.connect(database)) as other:
        for statement in ("BEGIN IMMEDIATE", "SELECT 1", "ROLLBACK", "SELECT 1"):
            other.execute(statement)
            outcomes_of([db.write(add, "a", 1)])
    assert timeouts == [10, 0, 0, 10]
    assert values(db) == [1, 1]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told == ["Writes fail: database is locked"]


def test_a_database_that_is_served_is_not_opened_again(db, open_database, database):
    db.write(add, "a", 1).result()
    before = {file: file.read_bytes() for file in database.parent.iterdir()}
    for _ in range(2):
        with pytest.raises(DatabaseRefused, match=r"raffle\.db is already in use by another server"):
            open_database()
    assert {file: file.read_bytes() for file in database.parent.iterdir()} == before
    db.write(add, "a", 2).result()
    assert db.close() is True
    again = open_database()
    assert values(again) == [1, 2]
    assert again.write(add, "a", 3).result() == 3


@pytest.fixture
def old(database):
    """A database of version 2, with a value in it that is still in the -wal file."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA application_id = 7; PRAGMA user_version = 2")
        connection.executescript("CREATE TABLE item (number INTEGER NOT NULL); INSERT INTO item VALUES (5)")
        yield database


def test_an_older_database_is_upgraded_after_a_copy_of_it_has_been_made(open_database, old, caplog):
    caplog.set_level("INFO")
    for _ in range(2):
        db = open_database()
        assert values(db) == [5]
        db.close()
    with closing(sqlite3.connect(old.with_name("raffle.db.version-2"))) as copy:
        assert copy.execute("SELECT number FROM item").fetchall() == [(5,)]
        assert copy.execute("PRAGMA user_version").fetchone() == (2,)
    assert caplog.messages == [f"Upgraded {old} from version 2 to 3"]


def test_a_copy_of_an_older_database_that_is_there_already_is_kept(open_database, old):
    copy = old.with_name("raffle.db.version-2")
    copy.write_bytes(b"kept")
    assert values(open_database()) == [5]
    assert copy.read_bytes() == b"kept"


def test_an_upgrade_that_fails_leaves_the_older_database(open_database, old):
    def fail(connection):
        upgrade(connection)
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(DatabaseRefused, match="disk is full"):
        open_database(upgrades={2: fail})
    assert values(open_database()) == [5]


def test_several_versions_are_upgraded_step_by_step(open_database, old):
    schema = SCHEMA.replace("user_version = 3", "user_version = 4").replace("value", "amount")
    db = open_database(
        schema=schema,
        upgrades={2: upgrade, 3: lambda connection: connection.execute("ALTER TABLE item RENAME value TO amount")},
    )
    assert [tuple(row) for row in db.read("SELECT amount, user_version FROM item, pragma_user_version")] == [(5, 4)]
