"""One SQLite file: a thread that writes, with group commit, and connections that read.

Requests hand their writes to the thread, which runs all that wait in one
transaction: under load, one sync of the disk pays for many. Processes that share the
file take turns. Nothing that decides is remembered between transactions, so other
programs may use the file as well.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple

# Seconds to wait for the turn and for another program's lock, as Litestream recommends.
BUSY_TIMEOUT = 5.0
CACHE_SIZE = 131072  # KiB: tickets land all over the file, 100 MB for a million
READERS = 16  # connections; a read waits until one is free
READ_IDENTITY = (
    "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version"
)
PRAGMAS = """
PRAGMA synchronous = FULL; -- what was answered survives a loss of power; NORMAL might undo it
PRAGMA secure_delete = ON; -- what is deleted is overwritten, not just forgotten
PRAGMA foreign_keys = ON; -- SQLite does not enforce them by default
PRAGMA journal_size_limit = 16777216; -- bytes: a reader left open lets -wal grow to hundreds of MB
PRAGMA temp_store = MEMORY; -- the directory for temporary files may be full
"""

# Gets the connection, what the requests of a group share, and the list of the requests. Writes
# nothing for a request that it refuses. Returns the list of their outcomes; an outcome that is an
# exception is raised to whoever made the request.
Action = Callable[[sqlite3.Connection, Any, "list[Any]"], "list[Any]"]

log = logging.getLogger("raffle")


class DatabaseRefused(Exception):
    """The file cannot be served; the message is one sentence on why."""


class DatabaseUnavailable(Exception):
    """The file cannot be read or written now, or the database has been closed."""


class Write(NamedTuple):
    """A request for the writing thread, and the queue that its outcome is put in.

    claim: a lock that is taken once: by the thread, to run the write, or by the caller,
    to give it up.
    """

    action: Action
    group: Any
    request: Any
    reply: queue.SimpleQueue[Any]
    claim: threading.Lock


class File(NamedTuple):
    """A file: its path, and the device and inode that identify it."""

    path: Path
    device: int
    inode: int


class Share(NamedTuple):
    """How many processes share the memory for the cache, and the file that they share, if any."""

    processes: int
    file: File | None


ALONE = Share(1, None)


class Database:
    """One SQLite file. Its methods may be called from any thread of the process that opened it."""

    def __init__(self, path: str | os.PathLike[str], schema: str, share: Share = ALONE) -> None:
        """Open the database at `path`, or create it, readable by its owner only.

        schema: SQL that creates the tables and sets application_id and user_version.
        share: with whom it is shared. Raises DatabaseRefused.
        """
        if sqlite3.sqlite_version_info < (3, 37):  # STRICT tables
            raise DatabaseRefused(
                f"SQLite 3.37 or newer is needed, and this Python has {sqlite3.sqlite_version}"
            )
        # Whatever becomes of the current directory or of a link, it stays the same file.
        self.path = share.file.path if share.file else Path(os.path.realpath(path))
        self.has_lost_commit = False  # a commit has failed for good: only a restart helps
        self._process = os.getpid()
        self._has_warned_of_fork = False
        self._is_failing = False  # the last transaction that should have written failed
        self._has_stalled = False  # writes were given up since the last batch
        self._is_closing = False
        self._turn_wanted_since: float | None = None  # while the thread waits for its turn
        # Held to set _is_closing and to put a write: so nothing follows the None of close().
        self._close_lock = threading.Lock()
        self._writes: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

        try:
            if share.file is None:
                _prepare(self.path, schema)
            elif _identify(self.path) != share.file:
                raise DatabaseRefused(f"{self.path} was replaced")
            with ExitStack() as opened:
                self._open(opened, share)
                opened.pop_all()  # nothing is refused any more
        except (OSError, sqlite3.Error) as error:
            raise DatabaseRefused(_reason_of(error, self.path)) from error

        self._thread = threading.Thread(target=self._run_writes, name="raffle-writer", daemon=True)
        self._thread.start()

    def _open(self, opened: ExitStack, share: Share) -> None:
        """Open the connections and the file of the turn. Raises OSError, sqlite3.Error.

        opened: closes what was opened, if the rest cannot be.
        """
        self._writer = opened.enter_context(closing(_connect(self.path, "rw")))
        _set_wal_mode(self._writer)
        self._writer.executescript(PRAGMAS)
        self._writer.executescript(f"PRAGMA cache_size = -{CACHE_SIZE // share.processes}")
        # The first read opens the -wal file: now, so that it is not another one later.
        self._writer.execute(READ_IDENTITY).fetchall()
        _require_writable(self._writer)

        for _ in range(READERS):
            reader = opened.enter_context(closing(_connect(self.path, "ro")))
            reader.execute(READ_IDENTITY).fetchall()
            self._readers.put(reader)

        # To write, because some file systems lock no other descriptors.
        self._turn_file = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, self._turn_file)
        _require_lockable(self._turn_file)
        self._files = self._identify_files()
        self.file = _identify(self.path)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return the rows of a statement. Raises DatabaseUnavailable."""
        self._require_own_process()
        if self._is_closing:
            # Readers that take turns could keep the writing thread from collecting them all.
            raise DatabaseUnavailable

        reader = self._readers.get()
        try:
            # To the end, because a cursor left open would hold back checkpoints.
            return reader.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            log.error("The database cannot be read: %s", error)
            raise DatabaseUnavailable from error
        finally:
            self._readers.put(reader)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Run one statement in a write transaction; return its rows after the commit.

        Raises DatabaseUnavailable, or the sqlite3.Error of the statement.
        """

        def run(connection: sqlite3.Connection, group: None, requests: list[None]) -> list[Any]:
            return [connection.execute(sql, values).fetchall()]

        return self.write(run, None, None)

    def write(self, action: Action, group: Any, request: Any = None) -> Any:
        """Have the writing thread run an action, and return its outcome after the commit.

        Requests for the same action and group that wait at the same time are run in
        one call. Raises what the action raises or has as the outcome, or
        DatabaseUnavailable.
        """
        self._require_own_process()
        if self._is_turn_overdue():
            raise DatabaseUnavailable
        write = Write(action, group, request, queue.SimpleQueue(), threading.Lock())
        with self._close_lock:
            if self._is_closing:
                raise DatabaseUnavailable
            self._writes.put(write)

        outcome = self._wait_for(write)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _wait_for(self, write: Write) -> Any:
        """Return the outcome of a write. Raises DatabaseUnavailable if it is not run in time."""
        try:
            return write.reply.get(timeout=BUSY_TIMEOUT)
        except queue.Empty:
            if write.claim.acquire(blocking=False):
                # It is left in the queue, and never run.
                if not self._has_stalled:
                    self._has_stalled = True
                    log.warning("Writes have waited for %g seconds, and are refused", BUSY_TIMEOUT)
                raise DatabaseUnavailable from None
            return write.reply.get()  # claimed by the thread: its answer is near

    def require_writable(self) -> None:
        """Raise DatabaseUnavailable unless a transaction commits.

        If writes have failed it must be one that writes: an empty one commits on a
        full disk, too.
        """
        self.write(_rewrite_version if self._is_failing else _write_nothing, None, None)

    def close(self) -> None:
        """Finish what is waiting, then end the thread and close every connection."""
        if os.getpid() != self._process:
            return
        with self._close_lock:
            self._is_closing = True
            self._writes.put(None)
        # The garbage collector may close an application in any thread, this one included.
        if threading.current_thread() is not self._thread:
            while self._thread.is_alive() and not self._is_turn_overdue():
                self._thread.join(0.1)

    def _require_own_process(self) -> None:
        """Raise DatabaseUnavailable in a process that was forked after the database was opened.

        It has no writing thread, and SQLite forbids it to use the connections:
        https://www.sqlite.org/howtocorrupt.html, section 2.6. The process id is
        compared because uWSGI forks without telling Python.
        """
        if os.getpid() == self._process:
            return
        if not self._has_warned_of_fork:
            self._has_warned_of_fork = True
            log.error(
                "The database was opened before this process was forked: create the application "
                "in each worker (gunicorn without --preload, uWSGI with --lazy-apps)"
            )
        raise DatabaseUnavailable

    def _identify_files(self) -> list[tuple[int, int]]:
        """Return device and inode of the database, its -wal and its -shm. Raises OSError."""
        stats = [Path(f"{self.path}{end}").stat() for end in ("", "-wal", "-shm")]
        return [(stat.st_dev, stat.st_ino) for stat in stats]

    def _require_same_files(self) -> None:
        """Raise OSError or DatabaseUnavailable unless the files are those that were opened.

        SQLite cannot know; it would go on with files that nobody else sees.
        """
        if self._identify_files() != self._files:
            raise DatabaseUnavailable(f"{self.path} or its -wal or -shm file was replaced")

    # The writing thread

    def _run_writes(self) -> None:
        while not (self._is_closing and self._writes.empty()):
            first = self._writes.get()
            if first is not None:
                self._write_batch(first)

        for reader in [self._readers.get() for _ in range(READERS)]:
            reader.close()
            self._readers.put(reader)  # refuses those who wait for it
        # The last connection to close removes the -wal file: so not a reader. And in turn: of two
        # processes that close at the same instant, neither would be the last.
        with suppress(OSError):
            self._take_turn()
        self._writer.close()
        os.close(self._turn_file)

    def _write_batch(self, first: Write) -> None:
        """Run all writes that wait in one transaction, then answer each of them."""
        groups: dict[tuple[Action, Any], list[Write]] = {}
        try:
            waited = self._take_turn()
            try:
                groups = self._collect_groups(first)
                outcomes = []
                if groups:  # not all were given up
                    self._begin(waited)
                    outcomes = self._commit(groups)
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back already
                    self._writer.execute("ROLLBACK")
                raise
            finally:
                fcntl.flock(self._turn_file, fcntl.LOCK_UN)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            groups = groups or self._collect_groups(first)
            outcomes = [self._failure(error)] * sum(map(len, groups.values()))

        self._has_stalled = False
        writes = [write for group in groups.values() for write in group]
        for write, outcome in zip(writes, outcomes):
            write.reply.put(outcome)

    def _take_turn(self) -> float:
        """Wait until no other of our processes writes; return the seconds that took.

        SQLite's lock is polled with growing pauses, so that of two busy processes one
        starves (p99 of 1 s). flock is fair, and the kernel releases it when a process
        dies. It is on the -wal file, on which SQLite has no locks: on the database,
        closing any descriptor would drop those of the whole process. Held until the
        checkpoint that may follow a COMMIT is over, because SQLite before 3.51.3 can
        damage a file that two processes checkpoint at once.
        """
        began = time.monotonic()
        self._turn_wanted_since = began
        try:
            fcntl.flock(self._turn_file, fcntl.LOCK_EX)
        finally:
            self._turn_wanted_since = None
        return time.monotonic() - began

    def _is_turn_overdue(self) -> bool:
        """Return whether another process has kept its turn for too long, as if it were stopped."""
        since = self._turn_wanted_since
        return since is not None and time.monotonic() > since + BUSY_TIMEOUT

    def _collect_groups(self, first: Write) -> dict[tuple[Action, Any], list[Write]]:
        """Return the first write and all that wait by now, except for those that were given up."""
        batch: list[Write | None] = [first]
        while not self._writes.empty():  # only this thread takes from it
            batch.append(self._writes.get())

        groups: dict[tuple[Action, Any], list[Write]] = {}
        for write in batch:
            if write is not None and write.claim.acquire(blocking=False):
                groups.setdefault((write.action, write.group), []).append(write)
        return groups

    def _commit(self, groups: dict[tuple[Action, Any], list[Write]]) -> list[Any]:
        """Run the groups in the transaction, and commit it; return the outcomes of all, in order.

        Each runs behind a savepoint, so that one that fails leaves nothing.
        """
        changes = self._writer.total_changes
        outcomes: list[Any] = []
        for (action, group), writes in groups.items():
            self._writer.execute("SAVEPOINT before_group")
            try:
                outcomes += action(self._writer, group, [write.request for write in writes])
            except BaseException as error:
                outcomes += [self._failure(error)] * len(writes)
                # Fails, and the batch with it, if SQLite has rolled back the whole transaction.
                self._writer.execute("ROLLBACK TO before_group")
            self._writer.execute("RELEASE before_group")

        self._require_same_files()
        try:
            self._writer.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if str(error) == "disk I/O error":
                self._lose_commit(error)
            raise
        self._require_same_files()  # once more, before anything is acknowledged

        if self._is_failing:
            self._set_busy_timeout(BUSY_TIMEOUT)
        # A transaction that wrote nothing does not show that the disk has room again.
        if self._writer.total_changes > changes or (_rewrite_version, None) in groups:
            self._end_failing()
        return outcomes

    def _begin(self, waited: float) -> None:
        """Begin a transaction. A lock of another program gets the rest of BUSY_TIMEOUT."""
        # After a short wait, two more statements are not worth it.
        is_shorter = waited > BUSY_TIMEOUT / 10 and not self._is_failing
        if is_shorter:
            self._set_busy_timeout(max(0, BUSY_TIMEOUT - waited))
        self._writer.execute("BEGIN IMMEDIATE")
        if is_shorter:
            self._set_busy_timeout(BUSY_TIMEOUT)

    def _lose_commit(self, error: sqlite3.Error) -> None:
        """Refuse everything from now on.

        The next sync may succeed without what this one lost:
        https://wiki.postgresql.org/wiki/Fsync_Errors.
        """
        self._begin_failing(error)
        log.error("A commit has failed: the database is unavailable until a restart")
        self._writer.close()
        self.close()
        self.has_lost_commit = True

    def _failure(self, error: BaseException) -> BaseException:
        """Return what callers get: DatabaseUnavailable if the error is the file's, else itself."""
        is_of_file = (
            isinstance(error, (OSError, sqlite3.OperationalError, DatabaseUnavailable))
            or type(error) is sqlite3.DatabaseError
        )
        if is_of_file:
            self._begin_failing(error)
        if is_of_file or self._is_closing:
            return DatabaseUnavailable()
        return error  # a program's, for the caller to log

    def _begin_failing(self, error: BaseException) -> None:
        """Log once that writes fail. Until a commit, no lock is waited for: all would wait."""
        if not self._is_failing:
            log.warning("Writes fail: %s", error)
        self._is_failing = True
        with suppress(sqlite3.Error):  # it may have been closed
            self._set_busy_timeout(0)

    def _end_failing(self) -> None:
        """Log once that writes succeed."""
        if self._is_failing:
            log.warning("Writes succeed again")
        self._is_failing = False

    def _set_busy_timeout(self, seconds: float) -> None:
        self._writer.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}").fetchall()


def _write_nothing(connection: sqlite3.Connection, group: None, requests: list[None]) -> list[None]:
    return requests


def _rewrite_version(
    connection: sqlite3.Connection, group: None, requests: list[None]
) -> list[None]:
    """Set a number in the header of the file to what it is, which writes one page."""
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    connection.execute(f"PRAGMA user_version = {version}").fetchall()
    return requests


def _identify(path: Path) -> File:
    """Return which file is at a path. Raises OSError."""
    stat = path.stat()
    return File(path, stat.st_dev, stat.st_ino)


def _require_lockable(descriptor: int) -> None:
    """Raise OSError if the file system has no locks for turns."""
    with suppress(BlockingIOError):  # somebody has it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _prepare(path: Path, schema: str) -> None:
    """Create the file if it is missing; refuse it unless it is empty or of the schema's version.

    Raises DatabaseRefused, OSError, sqlite3.Error.
    """
    wal = Path(f"{path}-wal")
    if path.exists() and not path.is_file():
        raise DatabaseRefused(f"{path} is not a regular file")
    # SQLite would delete the -wal file of a database that is missing, with all it holds.
    if wal.exists() and wal.stat().st_size and not (path.exists() and path.stat().st_size):
        raise DatabaseRefused(f"{wal} holds commits, but {path} is missing or empty: put it back")

    if not path.exists():
        path.touch(0o600)
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(schema)
        [(application, needed)] = model.execute(READ_IDENTITY).fetchall()
        tables = _tables(model)
    with closing(_connect(path, "rw")) as connection:
        [identity] = connection.execute(READ_IDENTITY).fetchall()
        if tuple(identity) == (application, needed):
            return  # without a lock: another process may be busy with it

        # In a write transaction, so that another start has either done nothing or all.
        connection.execute("BEGIN IMMEDIATE")
        [(found, version)] = connection.execute(READ_IDENTITY).fetchall()
        if not found and tables and tables <= _tables(connection):
            raise DatabaseRefused(
                f"{path} looks like a loaded .dump, which has lost its version: make copies with "
                "VACUUM INTO instead"
            )
        if path.stat().st_size and found != application:
            raise DatabaseRefused(f"{path} was made by another program")
        if found and version != needed:
            raise DatabaseRefused(
                f"{path} has version {version}, but this program needs version {needed}"
            )
        connection.execute("ROLLBACK")
        connection.executescript(schema)


def _tables(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    return {name for (name,) in rows}


def _require_writable(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.OperationalError if the file can only be read. A lock is no reason."""
    connection.execute("PRAGMA busy_timeout = 0").fetchall()
    try:
        # BEGIN IMMEDIATE alone succeeds on a file that can only be read.
        connection.execute("BEGIN IMMEDIATE")
        _rewrite_version(connection, None, [])
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if str(error) != "database is locked":
            raise
    connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}").fetchall()


def _reason_of(error: Exception, path: Path) -> str:
    """Return one sentence on why a database cannot be opened: the system's, if it has one.

    The system is asked only after SQLite has failed: closing a file that a process
    serves would drop SQLite's locks in that process. os.access() is not asked, because
    it says no in some containers where a write succeeds.
    """
    try:
        if path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        place = path.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as reason:
        place = path if reason.filename == os.fspath(path) else path.parent
        if isinstance(reason, PermissionError):
            user, owner = os.geteuid(), place.stat().st_uid
            return f"{place} cannot be written by user {user}: it belongs to user {owner}"
        return f"{place} cannot be written: {reason.strerror}"
    return f"{path} cannot be opened: {getattr(error, 'strerror', error)}"


def _set_wal_mode(connection: sqlite3.Connection) -> None:
    """Have SQLite keep a -wal file, so that readers go on while a batch is written.

    A new database and a copy made by VACUUM INTO have another mode. To change it,
    SQLite does not wait for a lock.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if str(error) != "database is locked" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Return a connection. mode: ro or rw, so that SQLite never makes a file."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,  # transactions begin where the code says so
        check_same_thread=False,  # one thread at a time uses it, but not always the same
    )
    connection.row_factory = sqlite3.Row
    return connection
