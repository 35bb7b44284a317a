"""One SQLite file: a thread that writes, with group commit, and a pool of read-only connections.

Requests hand their writes to the thread, which runs all that are waiting in one
transaction: under load, one sync of the disk pays for many. One writing
connection also avoids a bug in SQLite before 3.51.3, which can lose
commits when two connections write or checkpoint a WAL database at the same
instant. So a file that is served is locked.
"""

import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

OLDEST_SQLITE = (3, 37)  # STRICT tables
BUSY_TIMEOUT = 2  # seconds to wait for another program's lock on the file
CHECKPOINT_INTERVAL = 2  # seconds
CLOSE_TIMEOUT = 5  # seconds to wait for reads in progress

log = logging.getLogger("raffle")


class DatabaseRefused(Exception):
    """The file cannot be served or copied; the message is one sentence on why."""


class DatabaseUnavailable(Exception):
    """The file cannot be read or written now, or the database has been closed."""


class Database:
    """One SQLite file. Its methods may be called from any thread.

    long_job: a lock for work that takes several writes, such as a draw, to be
    done one at a time.
    """

    def __init__(self, path, schema, upgrades):
        """Open the database at `path`, or create it, readable by its owner only.

        schema: SQL that creates the tables and sets application_id and
        user_version. upgrades: {version: function of a connection that changes
        this version into the next}; an older file is copied before it is
        upgraded. Raises DatabaseRefused.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DatabaseRefused(f"SQLite 3.37 or newer is needed, and this Python has {sqlite3.sqlite_version}")
        self.path = Path(os.path.realpath(path))
        self._wal_path = Path(f"{self.path}-wal")
        if self.path != Path(path).absolute():
            log.info("%s leads to %s", path, self.path)
        with ExitStack() as on_failure:
            try:
                self._writer = self._open(schema, upgrades, on_failure)
            except OSError as error:
                raise DatabaseRefused(f"{self.path} cannot be opened: {error.strerror}") from error
            except sqlite3.Error as error:
                # SQLite often reports a full disk as an I/O error.
                cause = "the disk is full" if shutil.disk_usage(self.path.parent).free < 2**16 else error
                raise DatabaseRefused(f"{self.path} cannot be opened: {cause}") from error
            on_failure.pop_all()
        self.long_job = threading.Lock()
        self._condition = threading.Condition()
        self._waiting = {}
        self._reading = 0
        self._readers = []
        self._closing = False
        self._failures = set()
        self._lost = None
        self._is_complete = False
        self._committed = self._checkpointed = time.monotonic()
        self._thread = threading.Thread(target=self._write_batches, name="raffle-writer", daemon=True)
        self._thread.start()

    def read(self, sql, *values):
        """Return the rows of a statement as a list of sqlite3.Row. Raises DatabaseUnavailable."""
        with self._condition:
            # The files of a lost database may be two databases' by now.
            if self._closing or self._lost:
                raise DatabaseUnavailable
            self._reading += 1
            reader = self._readers.pop() if self._readers else None
        try:
            if not reader:
                reader = _connect(self.path, "ro")
                reader.row_factory = sqlite3.Row
            # To the end, because a cursor left open would hold back checkpoints.
            return reader.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            log.error("The database cannot be read: %s", error)
            raise DatabaseUnavailable from error
        finally:
            with self._condition:
                if reader:
                    self._readers.append(reader)
                self._reading -= 1
                if self._closing:
                    self._condition.notify()

    def write(self, action, key, request=None):
        """Have the writing thread run an action; return a Future that has its outcome after the commit.

        action: function of the connection, the key, and the list of all requests
        that wait for the same action and key. It returns a list with the outcome
        of each, an exception for a refusal, or raises one for all of them. The
        Future raises DatabaseUnavailable if the commit fails; so does this method
        once the database is closed or refuses until a restart.
        """
        future = Future()
        with self._condition:
            if self._closing or self._lost:
                raise DatabaseUnavailable
            self._waiting.setdefault((action, key), []).append((request, future))
            self._condition.notify()
        return future

    def require_health(self):
        """Raise DatabaseUnavailable unless every table can be read, and something written."""
        for (table,) in self.read("SELECT name FROM sqlite_schema WHERE type = 'table'"):
            self.read(f"SELECT * FROM {table} LIMIT 1")
        if self._lost or time.monotonic() > self._committed + 1:
            self.write(_rewrite_version, None).result()

    def close(self):
        """Finish what is waiting, then end the thread and close every connection.

        Return whether all that was committed is in the file itself, with nothing
        left in a -wal file beside it.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        # An application that nobody refers to any more may be collected, and closed, in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()
        return self._is_complete

    def _open(self, schema, upgrades, on_failure):
        """Lock the file; return the connection that writes, to a database of the schema's version."""
        if self.path.exists() and not self.path.is_file():
            raise DatabaseRefused(f"{self.path} is not a regular file")
        # SQLite would delete the -wal file of a database that is missing, with all it holds.
        if _state(self.path).size == 0 and _state(self._wal_path).size > 0:
            raise DatabaseRefused(
                f"{self._wal_path} holds commits, but {self.path} is missing or empty: put it back, or move both away"
            )
        with closing(sqlite3.connect(":memory:")) as model:
            model.executescript(schema)
            application_id, newest = _identify(model)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        self._lock = _lock(self.path)
        on_failure.callback(os.close, self._lock)
        # Read-only at first, because the file of another program must not change.
        with closing(_connect(self.path, "ro")) as reader:
            found, version = _identify(reader)
            is_new = not (found or reader.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
            # SQLite takes a file that is too short to be a database for an empty one.
            if is_new and self.path.stat().st_size and not reader.execute("PRAGMA page_count").fetchone()[0]:
                raise DatabaseRefused(f"{self.path} is not a database")
        if not is_new:
            if found != application_id or version < 1:
                raise DatabaseRefused(f"{self.path} was made by another program")
            if version > newest:
                raise DatabaseRefused(f"{self.path} was made by a newer version of this program")
            if version < min(upgrades):
                raise DatabaseRefused(f"{self.path} was made by a version of this program that is too old")
            if version < newest:
                copy = self.path.with_name(f"{self.path.name}.version-{version}")
                if not copy.is_file():
                    backup(self.path, copy)
        writer = on_failure.enter_context(closing(_connect(self.path, "rw")))
        # Readers go on while a batch is written.
        writer.execute("PRAGMA journal_mode = WAL")
        # A ticket that has been answered survives a loss of power: NORMAL might
        # undo the last commits, and the same number would be issued twice.
        writer.execute("PRAGMA synchronous = FULL")
        # Tickets land all over the file, 90 MB for a million: cache it in memory (KiB).
        writer.execute("PRAGMA cache_size = -131072")
        # The file changes at checkpoints only. Running them explicitly makes any other change noticeable.
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        if is_new:
            writer.executescript(schema)
        else:
            writer.execute("BEGIN IMMEDIATE")
            for step in range(version, newest):
                upgrades[step](writer)
                writer.execute(f"PRAGMA user_version = {step + 1}")
            writer.execute("COMMIT")
            if version < newest:
                log.info("Upgraded %s from version %d to %d", self.path, version, newest)
        self._data_version = writer.execute("PRAGMA data_version").fetchone()
        self._file_state, self._wal_state = _state(self.path), _state(self._wal_path)
        return writer

    def _write_batches(self):
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._waiting or self._closing)
                    batch, self._waiting = self._waiting, {}
                if not batch:
                    break
                self._write_batch(batch)
                del batch  # do not hold it while waiting
                if time.monotonic() > self._checkpointed + CHECKPOINT_INTERVAL:
                    self._checkpoint()
        finally:
            self._end()

    def _write_batch(self, batch):
        futures = [future for group in batch.values() for _, future in group]
        failure = None
        try:
            outcomes = self._commit(batch)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            failure = error
            outcomes = [DatabaseUnavailable() for _ in futures]
        for future, outcome in zip(futures, outcomes):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._note(failure)

    def _commit(self, batch):
        """Run a batch of {(action, key): [(request, future)]} in one transaction; return all outcomes in its order."""
        if self._lost:
            raise self._lost
        db = self._writer
        outcomes = []
        db.execute("BEGIN IMMEDIATE")
        # It changes with every commit of another connection, and with no other. The lock stops only servers.
        if db.execute("PRAGMA data_version").fetchone() != self._data_version:
            self._lose(f"{self.path} was written by another program")
        for (action, key), group in batch.items():
            db.execute("SAVEPOINT action")
            try:
                results = action(db, key, [request for request, _ in group])
                if len(results) != len(group):
                    raise ValueError(f"{len(results)} outcomes for {len(group)} requests")
                outcomes += results
            except Exception as error:
                # A full disk, an I/O error or a damaged file concerns all, and may have undone the whole transaction.
                if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
                    raise
                db.execute("ROLLBACK TO action")
                outcomes += [error] * len(group)
            db.execute("RELEASE action")
        # Before the commit, which would extend a shortened -wal file and hide the cut; and after it, before
        # anything is acknowledged.
        self._require_own_files()
        try:
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            # After a sync that failed, the next one may succeed without what was lost:
            # see https://wiki.postgresql.org/wiki/Fsync_Errors.
            if str(error) == "disk I/O error":
                self._lose(f"{self.path}: {error}")
            raise
        self._require_own_files()
        self._committed = time.monotonic()
        return outcomes

    def _require_own_files(self):
        """Raise DatabaseUnavailable, until a restart, unless the files are what this process has made of them."""
        if _state(self.path) != self._file_state:
            self._lose(f"{self.path} was changed, moved or deleted by another program")
        wal = _state(self._wal_path)
        if wal[:2] != self._wal_state[:2] or wal.size < self._wal_state.size:
            self._lose(f"{self._wal_path} was changed, moved or deleted by another program")
        self._wal_state = wal

    def _lose(self, cause):
        """Raise DatabaseUnavailable from now on: what is written until a restart could be lost."""
        self._lost = DatabaseUnavailable(cause)
        raise self._lost

    def _checkpoint(self):
        self._checkpointed = time.monotonic()
        try:
            self._require_own_files()
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except (sqlite3.Error, DatabaseUnavailable) as error:
            self._note(error)
        if not self._lost:
            # Keep device and inode: another file that was moved here meanwhile must be noticed.
            self._file_state = _State(*self._file_state[:2], *_state(self.path)[2:])

    def _note(self, failure):
        """Log each cause of failure once, until a write succeeds; a programming error with its traceback."""
        with suppress(sqlite3.Error):
            if failure and self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        if failure and repr(failure) not in self._failures:
            self._failures.add(repr(failure))
            expected = isinstance(failure, (sqlite3.Error, DatabaseUnavailable))
            until = " until a restart" if self._lost else ""
            log.error("Writes fail%s: %s", until, failure, exc_info=None if expected else failure)
            # Only the first write waits for another program's lock: the others would occupy every thread.
            self._writer.execute("PRAGMA busy_timeout = 0")
        elif self._failures and not failure:
            log.info("Writes succeed again")
            self._failures.clear()
            self._writer.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000}")

    def _end(self):
        with self._condition:
            self._closing = True
            batch, self._waiting = self._waiting, {}
            self._condition.wait_for(lambda: not self._reading, CLOSE_TIMEOUT)
        for group in batch.values():
            for _, future in group:
                future.set_exception(DatabaseUnavailable())
        # The last connection to close leaves one file: so not a reader.
        while self._readers:
            self._readers.pop().close()
        if _state(self.path) == self._file_state:
            # Closing would leave the -wal file as it is while another program reads, a backup for instance.
            with suppress(sqlite3.Error):
                _, frames, checkpointed = self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                self._is_complete = frames == checkpointed
            if not self._is_complete:
                log.error("%s holds commits that %s needs: keep both files together", self._wal_path, self.path.name)
            self._writer.close()
        else:
            # SQLite would write its -wal file over what another program has put there: so keep it from closing.
            log.error("%s was changed, moved or deleted by another program, and is left as it is", self.path)
            threading.Thread(target=lambda _: threading.Event().wait(), args=[self._writer], daemon=True).start()
        os.close(self._lock)


def _lock(path):
    """Lock a file against other servers, until the descriptor that is returned is closed. Raises DatabaseRefused."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Unlike the locks of SQLite, this one does not keep a backup from reading.
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Left open: if this process serves the file, closing it would release the locks of SQLite (POSIX).
        raise DatabaseRefused(f"{path} is already in use by another server") from None
    return descriptor


def backup(path, copy):
    """Copy the database at `path`, which may be in use, to a new file `copy`, readable by its owner only.

    Raises DatabaseRefused if it cannot be copied, or there is such a file.
    """
    copy = Path(copy)
    # Opening an empty file would have SQLite delete the -wal file beside it, with all it holds.
    if not _state(path).size:
        raise DatabaseRefused(f"{path} is missing or empty")
    try:
        if copy.exists():
            raise DatabaseRefused(f"{copy} already exists")
        # Under another name until it is whole.
        handle, name = tempfile.mkstemp(prefix=f"{copy.name}.", dir=copy.parent)
        os.close(handle)
        try:
            with closing(_connect(path, "ro")) as source, closing(sqlite3.connect(name)) as target:
                source.backup(target)
                # One file, without a -wal beside it.
                target.execute("PRAGMA journal_mode = DELETE")
                [(found,)] = target.execute("PRAGMA quick_check(1)").fetchall()
                if found != "ok":
                    raise DatabaseRefused(f"{path} is damaged: {found}")
            # Unlike rename(), it does not overwrite.
            os.link(name, copy)
        finally:
            Path(name).unlink(missing_ok=True)
    except FileExistsError as error:
        raise DatabaseRefused(f"{copy} already exists") from error
    except OSError as error:
        raise DatabaseRefused(f"{copy} cannot be written: {error.strerror}") from error
    except sqlite3.Error as error:
        raise DatabaseRefused(f"{path} cannot be copied to {copy}: {error}") from error


def _connect(path, mode):
    # Used by one thread at a time, but not always by the same: hence check_same_thread.
    # No isolation level: transactions begin and end where the code says so.
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )
    # SQLite does not enforce foreign keys by default.
    connection.execute("PRAGMA foreign_keys = ON")
    # The directory for temporary files may be full.
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def _identify(connection):
    """Return the application_id and the user_version."""
    return tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))


class _State(NamedTuple):
    device: int
    inode: int
    size: int  # bytes
    changed: int  # nanoseconds


def _state(path):
    """Return the _State of a file, all zeros if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return _State(0, 0, 0, 0)
    return _State(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _rewrite_version(db, key, requests):
    [(version,)] = db.execute("PRAGMA user_version").fetchall()
    db.execute(f"PRAGMA user_version = {version}")
    return [None] * len(requests)
