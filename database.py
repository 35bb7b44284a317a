"""One SQLite file: a thread that writes, with group commit, and a pool of connections that read.

Requests hand their writes to the thread, which runs all that wait in one
transaction: under load, one sync of the disk pays for many. Nothing that decides
is remembered between transactions, so other programs may use the file as well.
"""

import itertools
import logging
import os
import queue
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

BUSY_TIMEOUT = 5  # seconds to wait for another program's lock, as Litestream recommends
READERS = 16  # connections; a read waits until one is free
IDENTITY = "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version"
PRAGMAS = """
PRAGMA journal_mode = WAL; -- readers go on while a batch is written; a copy by VACUUM INTO has another mode
PRAGMA synchronous = FULL; -- an answered ticket survives a loss of power; NORMAL might undo the last commits
PRAGMA secure_delete = ON; -- what is deleted is overwritten, not just forgotten
PRAGMA foreign_keys = ON; -- SQLite does not enforce them by default
PRAGMA cache_size = -131072; -- KiB: tickets land all over the file, 100 MB for a million
PRAGMA temp_store = MEMORY; -- the directory for temporary files may be full
"""

log = logging.getLogger("raffle")


class DatabaseRefused(Exception):
    """The file cannot be served; the message is one sentence on why."""


class DatabaseUnavailable(Exception):
    """The file cannot be read or written now, or the database has been closed."""


class Database:
    """One SQLite file. Its methods may be called from any thread."""

    def __init__(self, path, schema):
        """Open the database at `path`, or create it, readable by its owner only. Raises DatabaseRefused.

        schema: SQL that creates the tables and sets application_id and user_version.
        """
        if sqlite3.sqlite_version_info < (3, 37):  # STRICT tables
            raise DatabaseRefused(
                f"SQLite 3.37 or newer is needed, and this Python has {sqlite3.sqlite_version}"
            )
        # Whatever becomes of the current directory or of a link, it stays the same file.
        self.path = Path(os.path.realpath(path))
        self.long_job = (
            threading.Lock()
        )  # for what takes several writes, such as a draw: one at a time
        self._writes = (
            queue.SimpleQueue()
        )  # (action and key, request, queue for the outcome), at last None
        self._readers = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing is put behind the None
        self._is_over = self._is_failing = self._own_files = False
        self._process = os.getpid()
        self._has_warned_of_fork = False
        self.has_lost_commit = False  # a commit failed for good: only a restart helps
        try:
            _prepare(self.path, schema)
            self._writer = _connect(self.path, "rw")
            self._writer.executescript(schema + PRAGMAS)
            for _ in range(READERS):
                self._readers.put(reader := _connect(self.path, "ro"))
                reader.execute(
                    IDENTITY
                )  # opens the -wal file now, so that it is not another one later
            self._require_own_files()
        except (OSError, sqlite3.Error) as error:
            raise DatabaseRefused(
                f"{self.path} cannot be opened: {getattr(error, 'strerror', error)}"
            ) from error
        self._thread = threading.Thread(
            target=self._write_batches, name="raffle-writer", daemon=True
        )
        self._thread.start()

    def read(self, sql, values=()):
        """Return the rows of a statement as a list of sqlite3.Row. Raises DatabaseUnavailable."""
        self._require_own_process()
        if self._is_over:  # else those who read could keep a connection from the close for ever
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

    def write(self, action, key, request=None):
        """Have the writing thread run an action, and return its outcome after the commit.

        action: function of the connection, the key, and the list of all requests
        that wait for the same action and key. It decides before it writes, and
        returns the list of their outcomes, with an exception for a refusal.
        Raises that exception, the one that the action raises, or DatabaseUnavailable.
        """
        self._require_own_process()
        reply = queue.SimpleQueue()
        with self._gate:
            if self._is_over:
                raise DatabaseUnavailable
            self._writes.put(((action, key), request, reply))
        outcome = reply.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def require_writable(self):
        """Raise DatabaseUnavailable unless a transaction commits: one that writes, if writes have failed.

        An empty transaction succeeds on a full disk, too.
        """
        self.write(_rewrite_version if self._is_failing else _write_nothing, None)

    def close(self):
        """Finish what is waiting, then end the thread and close every connection."""
        if os.getpid() != self._process:
            return
        with self._gate:
            self._is_over = True
            self._writes.put(None)
        if (
            threading.current_thread() is not self._thread
        ):  # where the garbage collector may close an application
            self._thread.join()

    def _require_own_process(self):
        """Raise DatabaseUnavailable in a process that was forked after the database was opened.

        It has no thread that writes, and SQLite forbids it to use the connections:
        https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_across_a_fork_.
        The process id is compared because uWSGI forks without telling Python.
        """
        if os.getpid() == self._process:
            return
        if not self._has_warned_of_fork:
            self._has_warned_of_fork = True
            log.error(
                "The database was opened before this process was forked: create the application in "
                "each worker (gunicorn without --preload, uWSGI with --lazy-apps)"
            )
        raise DatabaseUnavailable

    def _require_own_files(self):
        """Raise OSError or DatabaseUnavailable unless the files are those of the first call."""
        files = [
            Path(f"{self.path}{end}").stat()[1:3] for end in ("", "-wal", "-shm")
        ]  # inode, device
        self._own_files = self._own_files or files
        if files != self._own_files:
            raise DatabaseUnavailable(f"{self.path} or its -wal or -shm file was replaced")

    def _write_batches(self):
        while not (self._is_over and self._writes.empty()):
            batch = [self._writes.get() for _ in range(self._writes.qsize() or 1)]
            groups = {}
            for group, *write in filter(None, batch):
                groups.setdefault(group, []).append(write)
            self._write_groups(groups)
        for reader in [self._readers.get() for _ in range(READERS)]:
            reader.close()
            self._readers.put(reader)  # refuses those who wait for it
        # The last connection to close removes the -wal file: so not a reader.
        self._writer.close()

    def _write_groups(self, groups):
        """Run groups of requests with the same action and key in one transaction; if one fails, each in its own."""
        outcomes, is_committing = [], False
        try:
            changes = self._writer.total_changes
            self._writer.execute("BEGIN IMMEDIATE")
            for (action, key), group in groups.items():
                outcomes += action(self._writer, key, [request for request, _ in group])
            self._require_own_files()
            is_committing = True
            self._writer.execute("COMMIT")
            self._require_own_files()  # once more, before anything is acknowledged
            # A transaction that wrote nothing does not show that the disk has room again.
            if self._writer.total_changes > changes or (_rewrite_version, None) in groups:
                self._note(None)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            with suppress(sqlite3.Error):  # SQLite may have rolled back already
                self._writer.execute("ROLLBACK")
            is_lost = is_committing and str(error) == "disk I/O error"
            is_of_file = isinstance(error, (OSError, sqlite3.OperationalError, DatabaseUnavailable))
            # Other errors are those of a program, for the caller to log.
            if is_of_file or self._is_over or type(error) is sqlite3.DatabaseError:
                self._note(error)
                error = DatabaseUnavailable()
            outcomes = itertools.repeat(error)
            if is_lost:
                # The next sync may succeed without what this one lost: https://wiki.postgresql.org/wiki/Fsync_Errors
                log.error("A commit has failed: the database is unavailable until a restart")
                self._writer.close()
                self.close()
                self.has_lost_commit = True
            elif len(groups) > 1 and not (is_committing and is_of_file):
                while groups:
                    self._write_groups(dict([groups.popitem()]))
        for (_, reply), outcome in zip(itertools.chain(*groups.values()), outcomes):
            reply.put(outcome)

    def _note(self, failure):
        """Log that writes fail, once until one succeeds: then the failure is None."""
        if self._is_failing != bool(failure):
            self._is_failing = bool(failure)
            log.warning("Writes %s", f"fail: {failure}" if failure else "succeed again")
            # Only the first write waits for another program's lock: the next ones would occupy every thread.
            self._writer.execute(f"PRAGMA busy_timeout = {0 if failure else BUSY_TIMEOUT * 1000}")


def _write_nothing(connection, _, requests):
    return requests


def _rewrite_version(connection, _, requests):
    """Set a number in the header to what it is: one page is written."""
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    connection.execute(f"PRAGMA user_version = {version}")
    return requests


def _prepare(path, schema):
    """Create the file if it is missing. Raise DatabaseRefused unless it is empty, or of the schema's version."""
    wal = Path(f"{path}-wal")
    if path.exists() and not path.is_file():
        raise DatabaseRefused(f"{path} is not a regular file")
    # SQLite would delete the -wal file of a database that is missing, with all it holds.
    if wal.exists() and wal.stat().st_size and not (path.exists() and path.stat().st_size):
        raise DatabaseRefused(f"{wal} holds commits, but {path} is missing or empty: put it back")
    for place in filter(Path.exists, (path.parent, path)):
        if not os.access(place, os.W_OK, effective_ids=True):
            user, owner = os.geteuid(), place.stat().st_uid
            raise DatabaseRefused(
                f"{place} cannot be written by user {user}: it belongs to user {owner}"
            )
    path.touch(0o600)
    with closing(sqlite3.connect(":memory:")) as model:
        application, needed = model.executescript(schema).execute(IDENTITY).fetchone()
    with closing(_connect(path, "rw")) as connection:
        found, version = connection.executescript("BEGIN IMMEDIATE").execute(IDENTITY).fetchone()
        if path.stat().st_size and found != application:
            raise DatabaseRefused(f"{path} was made by another program")
    if found and version != needed:
        raise DatabaseRefused(
            f"{path} has version {version}, but this program needs version {needed}"
        )


def _connect(path, mode):
    uri = f"{path.as_uri()}?mode={mode}"
    # Transactions begin where the code says so. One thread at a time uses a connection, but not always the same.
    connection = sqlite3.connect(
        uri, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, uri=True
    )
    connection.row_factory = sqlite3.Row
    return connection
