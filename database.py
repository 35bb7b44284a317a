"""One SQLite file: a thread that writes, with group commit, and a pool of connections that read.

Requests hand their writes to the thread, which runs all that wait in one
transaction: under load, one sync of the disk pays for many. Nothing that decides
is remembered between transactions, so other programs may use the file as well.
"""

import fcntl
import itertools
import logging
import os
import queue
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

BUSY_TIMEOUT = 5  # seconds to wait for another program's lock, as Litestream recommends
IDENTITY = """
SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
FROM pragma_application_id, pragma_user_version
"""
PRAGMAS = """
PRAGMA synchronous = FULL; -- an answered ticket survives a loss of power; NORMAL might undo the last commits
PRAGMA secure_delete = ON; -- what is deleted is overwritten, not just forgotten
PRAGMA foreign_keys = ON; -- SQLite does not enforce them by default
PRAGMA cache_size = -131072; -- KiB: tickets land all over the file, 100 MB for a million
"""

log = logging.getLogger("raffle")


class DatabaseRefused(Exception):
    """The file cannot be served; the message is one sentence on why."""


class DatabaseUnavailable(Exception):
    """The file cannot be read or written now, or the database has been closed."""


class Database:
    """One SQLite file. Its methods may be called from any thread."""

    def __init__(self, path, schema):
        """Open the database at `path`, or create it, readable by its owner only.

        schema: SQL that creates the tables and sets application_id and
        user_version. Raises DatabaseRefused.
        """
        if sqlite3.sqlite_version_info < (3, 37):  # STRICT tables
            raise DatabaseRefused(f"SQLite 3.37 or newer is needed, and this Python has {sqlite3.sqlite_version}")
        # Whatever becomes of the current directory or of a link, it stays the same file.
        self.path = Path(os.path.realpath(path))
        try:
            # Servers that start at the same instant take turns, so that none reads a file that is half made.
            turn = os.open(self.path.parent, os.O_RDONLY)
            try:
                fcntl.flock(turn, fcntl.LOCK_EX)
                self._writer = self._open(schema)
            finally:
                os.close(turn)
            self._own_files = self._files()
        except (OSError, sqlite3.Error) as error:
            raise DatabaseRefused(f"{self.path} cannot be opened: {getattr(error, 'strerror', error)}") from error
        self.long_job = threading.Lock()  # for what takes several writes, such as a draw: one at a time
        self._writes = queue.SimpleQueue()  # (action and key, request, queue for the outcome), or None to close
        self._readers = queue.SimpleQueue()
        self._is_over = False
        self._failure = None
        self._thread = threading.Thread(target=self._write_batches, name="raffle-writer", daemon=True)
        self._thread.start()

    def read(self, sql, values=()):
        """Return the rows of a statement as a list of sqlite3.Row. Raises DatabaseUnavailable."""
        if self._is_over:
            raise DatabaseUnavailable
        reader = next(_taken(self._readers), None)
        try:
            if not reader:
                reader = _connect(self.path, "ro")
                self._require_own_files()
            # To the end, because a cursor left open would hold back checkpoints.
            return reader.execute(sql, values).fetchall()
        except (OSError, sqlite3.Error, DatabaseUnavailable) as error:
            if reader:
                reader.close()
                reader = None
            log.error("The database cannot be read: %s", error)
            raise DatabaseUnavailable from error
        finally:
            if reader:
                self._readers.put(reader)
            if self._is_over:
                self._end()

    def write(self, action, key, request=None):
        """Have the writing thread run an action, and return its outcome after the commit.

        action: function of the connection, the key, and the list of all requests
        that wait for the same action and key. It returns a list with the outcome
        of each, an exception for a refusal: so it decides before it writes. Raises
        that exception, or the one that the action raises; DatabaseUnavailable if
        the file cannot be written.
        """
        reply, group = queue.SimpleQueue(), (action, key)
        hash(group)  # raises here what would end the thread
        self._writes.put((group, request, reply))
        # It would wait for ever if the thread had ended before the put.
        if self._is_over:
            self._end()
        outcome = reply.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self):
        """Finish what is waiting, then end the thread and close every connection."""
        self._writes.put(None)
        # An application that nobody refers to any more may be collected, and closed, in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _open(self, schema):
        """Return the connection that writes, to a database of the schema's version."""
        path, wal = self.path, Path(f"{self.path}-wal")
        if path.exists() and not path.is_file():
            raise DatabaseRefused(f"{path} is not a regular file")
        # SQLite would delete the -wal file of a database that is missing, with all it holds.
        if wal.exists() and wal.stat().st_size and not (path.exists() and path.stat().st_size):
            raise DatabaseRefused(f"{wal} holds commits, but {path} is missing or empty: put it back")
        for place in (path.parent, path):
            if place.exists() and not os.access(place, os.W_OK, effective_ids=True):
                owner = place.stat().st_uid
                raise DatabaseRefused(f"{place} cannot be written by user {os.geteuid()}: it belongs to user {owner}")
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        with closing(sqlite3.connect(":memory:")) as model:
            model.executescript(schema)
            [(application, needed, _)] = model.execute(IDENTITY)
        # The file of another program must not change, nor get a -wal file.
        with closing(_connect(path, "ro" if wal.exists() else "ro&immutable=1")) as reader:
            [(found, version, tables)] = reader.execute(IDENTITY)
        # SQLite takes a file that is too short to be a database for an empty one.
        if found or tables or 0 < path.stat().st_size < 512:
            if found != application:
                raise DatabaseRefused(f"{path} was made by another program")
            if version != needed:
                raise DatabaseRefused(f"{path} has version {version}, but this program needs version {needed}")
        writer = _connect(path, "rw")
        try:
            writer.executescript(PRAGMAS)
            # First, so that the header of the file itself says whose it is.
            writer.executescript(schema)
            # Readers go on while a batch is written. A copy of a database may have another mode.
            if writer.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise DatabaseRefused(f"{path} cannot have a write-ahead log")
            # The -wal file is there from now on.
            writer.executescript("BEGIN IMMEDIATE; COMMIT")
        except BaseException:
            writer.close()
            raise
        return writer

    def _files(self):
        """Return inode and device of the database and of its -wal file. Raises OSError."""
        return [Path(f"{self.path}{suffix}").stat()[1:3] for suffix in ("", "-wal")]

    def _write_batches(self):
        while not self._is_over:
            batch = [self._writes.get(), *_taken(self._writes)]
            groups = {}
            for group, *write in filter(None, batch):
                groups.setdefault(group, []).append(write)
            self._write_groups(groups)
            self._is_over = self._is_over or None in batch
        self._end()
        # The last connection to close removes the -wal file: so not a reader.
        self._writer.close()

    def _write_groups(self, groups):
        """Run groups in one transaction and answer their requests; if that fails, in one transaction each."""
        try:
            outcomes = self._commit(groups)
            self._note(None)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            with suppress(sqlite3.Error):  # SQLite may have rolled back already
                self._writer.execute("ROLLBACK")
            outcomes = itertools.repeat(error)
            # Other errors are those of a program, for the caller to log.
            is_of_file = isinstance(error, (OSError, sqlite3.OperationalError, DatabaseUnavailable))
            if is_of_file or type(error) is sqlite3.DatabaseError:
                self._note(str(error))
                outcomes = itertools.repeat(DatabaseUnavailable())
            if len(groups) > 1 and not self._is_over:
                for group in groups.items():
                    self._write_groups(dict([group]))
                return
        for (_, reply), outcome in zip(itertools.chain(*groups.values()), outcomes):
            reply.put(outcome)

    def _commit(self, groups):
        """Run groups of requests with the same action and key in one transaction; return all outcomes."""
        self._writer.execute("BEGIN IMMEDIATE")
        outcomes = []
        for (action, key), group in groups.items():
            results = action(self._writer, key, [request for request, _ in group])
            if len(results) != len(group) or not self._writer.in_transaction:
                raise ValueError(f"{len(results)} outcomes for {len(group)} requests, or the transaction has ended")
            outcomes += results
        self._require_own_files()
        try:
            self._writer.execute("COMMIT")
        except sqlite3.OperationalError as error:
            # After a sync that failed, the next one may succeed without what was lost:
            # see https://wiki.postgresql.org/wiki/Fsync_Errors.
            self._is_over = str(error) == "disk I/O error"
            raise
        # Once more, before anything is acknowledged.
        self._require_own_files()
        return outcomes

    def _require_own_files(self):
        if self._files() != self._own_files:
            raise DatabaseUnavailable(f"{self.path} or its -wal file was replaced")

    def _note(self, failure):
        """Log why the file cannot be written, once until a write succeeds: then the failure is None."""
        if failure != self._failure:
            self._failure = failure
            if failure:
                log.error("Writes fail%s: %s", " until a restart" * self._is_over, failure)
            else:
                log.info("Writes succeed again")
            # Only the first write waits for another program's lock: the next ones would occupy every thread.
            self._writer.execute(f"PRAGMA busy_timeout = {0 if failure else BUSY_TIMEOUT * 1000}")

    def _end(self):
        """Refuse the writes that came too late, and close the connections that are not reading."""
        for write in filter(None, _taken(self._writes)):
            write[-1].put(DatabaseUnavailable())
        for reader in _taken(self._readers):
            reader.close()


def _taken(waiting):
    """Yield what is in a queue, without waiting for more."""
    with suppress(queue.Empty):
        while True:
            yield waiting.get_nowait()


def _connect(path, mode):
    # No isolation level: transactions begin and end where the code says so. A connection is used by one thread at
    # a time, but not always by the same.
    uri, options = f"{path.as_uri()}?mode={mode}", {"isolation_level": None, "check_same_thread": False}
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, **options)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA temp_store = MEMORY")  # the directory for temporary files may be full
    return connection
