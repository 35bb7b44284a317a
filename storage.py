"""The raffle's rules, kept in one SQLite file whose data model is schema.sql.

This module speaks SQL and no HTTP. One thread owns the only connection that
writes: requests hand it their writes and wait, and all that are waiting share
one transaction. Reads go through a pool of read-only connections.
"""

import base64
import hashlib
import hmac
import itertools
import json
import logging
import os
import pkgutil
import secrets
import sqlite3
import struct
import threading
import uuid
from array import array
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timezone
from pathlib import Path

MAX_TICKETS = 2**53 - 1  # the largest integer a JavaScript client reads exactly
MAX_RAFFLES_PER_PAGE = 1_000
MAX_WINS_PER_PAGE = 10_000

# NIST SP 800-132 asks for 1,000 or more. More would protect a password that can
# be guessed; a code of 120 random bits is past guessing at the first iteration.
ITERATIONS = 1_000

APPLICATION_ID = 0x5261666C
SCHEMA_VERSION = 2
OLDEST_SQLITE = (3, 37)  # STRICT tables
WINS_PER_STATEMENT = 10_000
ALGORITHM = "raffle-draw-1"  # name and version
BUSY_TIMEOUT = 2  # seconds to wait for another program's lock on the file
CLOSE_TIMEOUT = 1  # seconds to wait for writes when the storage is closed

log = logging.getLogger("raffle")


class DatabaseRefused(Exception):
    """The file cannot serve as a raffle database; the message is one sentence on why."""


class StorageUnavailable(Exception):
    """The file cannot be read or written now; nothing of the write was kept."""


class SQLiteTooOld(Exception):
    """The SQLite of this Python cannot serve; the message is one sentence on why."""


class RaffleNotFound(Exception):
    """There is no raffle with this id."""


class InvalidPage(Exception):
    """The limit or the cursor of a page is out of range."""


class TicketsNoLongerAvailable(Exception):
    """Every ticket of the raffle has been given out."""


class AlreadyParticipated(Exception):
    """The participant holds a ticket of the raffle."""


class WinnersAlreadyDrawn(Exception):
    """The draw of the raffle has taken place."""


class TicketsStillAvailable(Exception):
    """The draw has to wait until every ticket has been given out."""


class WinnersNotDrawn(Exception):
    """The draw of the raffle has not taken place yet."""


class ReceiptNotFound(Exception):
    """The draw of the raffle has not taken place yet, so there is no receipt of it."""


class InvalidVerificationCode(Exception):
    """No ticket of the raffle has this number and this verification code."""


class Storage:
    """All raffles of one database file. Its methods may be called from any thread.

    Each of them raises StorageUnavailable, besides what it says itself, when the
    file cannot be read or written or the storage has been closed.
    """

    def __init__(self, path):
        """Open the database at `path` (str or path-like), or create it, readable by its owner only.

        Raises SQLiteTooOld, or DatabaseRefused if the file cannot be opened, is
        not a raffle's or was made by another version of this program.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise SQLiteTooOld(f"SQLite 3.37 or newer is needed, and this Python has {sqlite3.sqlite_version}")
        self._path = Path(path).absolute()
        try:
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
            # Looked at first through a connection that cannot change the file of another program.
            with closing(self._connect("ro")) as reader:
                is_new = self._identify(reader)
            self._writer = self._connect("rw")
            with ExitStack() as on_failure:
                on_failure.callback(self._writer.close)
                # Readers go on while a batch is written.
                self._writer.execute("PRAGMA journal_mode = WAL")
                # A ticket that has been answered survives a loss of power: NORMAL might
                # undo the last commits, and the same number would be given out twice.
                self._writer.execute("PRAGMA synchronous = FULL")
                # A raffle of a million tickets has 90 MB, and every ticket another place in it. So keep it
                # in memory (in KiB), and let 10,000 pages gather (40 MB) before they are written to their places.
                self._writer.execute("PRAGMA cache_size = -131072")
                self._writer.execute("PRAGMA wal_autocheckpoint = 10000")
                if is_new:
                    # Beside this module, or with it in a zip file.
                    self._writer.executescript(pkgutil.get_data("storage", "schema.sql").decode())
                self._file = self._path.stat()
                on_failure.pop_all()
        except OSError as error:
            raise DatabaseRefused(f"{path} cannot be created: {error.strerror}") from error
        except sqlite3.Error as error:
            raise DatabaseRefused(f"{path} cannot be opened: {error}") from error
        # Asked now and then by a statement that takes long: whether to give up.
        self._writer.set_progress_handler(lambda: self._overdue, 100_000)
        self._readers = []
        self._waiting = {}
        self._failing = False
        self._drawing = threading.Lock()
        self._closing = False
        self._overdue = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_batches, name="raffle-writer", daemon=True)
        self._thread.start()

    def close(self):
        """Finish the writes that are waiting, then end the writing thread and close every connection.

        What takes longer than CLOSE_TIMEOUT, as a draw of millions may, is undone instead.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        # An application that nobody refers to any more may be collected, and closed, in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT)
            self._overdue = True
            self._thread.join()

    def check_health(self):
        """Raise StorageUnavailable if the file cannot be read or is gone, or the writing thread has ended."""
        self._read("SELECT sequence FROM raffle LIMIT 1")
        if not self._is_in_place() or not self._thread.is_alive():
            raise StorageUnavailable

    def create_raffle(self, name, total_tickets, prizes):
        """Create a raffle and return it as `get_raffle` does.

        name: what to call it. total_tickets: 1 to MAX_TICKETS. prizes: list of
        {"name", "amount"}, amounts of 1 or more, together at most total_tickets.
        """
        raffle_id = str(uuid.uuid4())
        created_at, secret = _now(), secrets.token_bytes(32)
        self._write(_insert_raffle, raffle_id, (name, total_tickets, prizes, created_at, secret))
        raffle = _raffle(raffle_id, name, total_tickets, total_tickets, False, created_at, secret.hex())
        return {**raffle, "prizes": [{"name": prize["name"], "amount": prize["amount"]} for prize in prizes]}

    def list_raffles(self, limit, cursor=None):
        """Return a page of raffles without their prizes, latest first, and the cursor of the next page or None.

        limit: 1 to MAX_RAFFLES_PER_PAGE. cursor: as the page before gave it.
        Raises InvalidPage.
        """
        _check_page(limit, cursor, MAX_RAFFLES_PER_PAGE)
        [(raffles,)] = self._read(
            """
            SELECT json_group_array(
                json_array(
                    sequence, id, name, total_tickets, available_tickets, winners_drawn, created_at, hex(secret)
                )
            )
            FROM (
                SELECT sequence, id, name, total_tickets, available_tickets, winners_drawn, created_at, secret
                FROM raffle
                WHERE sequence < ?
                ORDER BY sequence DESC
                LIMIT ?
            )
            """,
            2**63 - 1 if cursor is None else cursor,
            limit + 1,
        )
        rows = json.loads(raffles)
        return _page([(sequence, _raffle(*columns)) for sequence, *columns in rows], limit)

    def get_raffle(self, raffle_id):
        """Return the raffle as a dict, its prizes in the manager's order. Raises RaffleNotFound."""
        *columns, prizes = _only(
            self._read(
                """
                SELECT id, name, total_tickets, available_tickets, winners_drawn, created_at, hex(secret), (
                    SELECT json_group_array(json_object('name', name, 'amount', amount))
                    FROM (
                        SELECT name, amount
                        FROM prize
                        WHERE prize.raffle = raffle.sequence
                        ORDER BY position
                    )
                )
                FROM raffle
                WHERE id = ?
                """,
                raffle_id,
            )
        )
        return {**_raffle(*columns), "prizes": json.loads(prizes)}

    def issue_ticket(self, raffle_id, participant, key=None):
        """Give the participant a ticket: its number, uniform among those left, and its verification code.

        participant: the 4 or 16 bytes that stand for one participant. key: what
        the participant alone knows, 16 characters or more, or None. The code is
        returned here, and again only to the same participant with the same key:
        then it is made of the key (HMAC-SHA256, RFC 2104, cut to 120 bits) and the
        ticket's salt. A thief of the database can try keys, at PBKDF2's cost for
        each, and so learn the code of one who has chosen a key that can be
        guessed; a random UUID (122 bits) is as good as a random code.
        Raises RaffleNotFound, TicketsNoLongerAvailable, AlreadyParticipated.
        """
        # One call of the system instead of two: under load each costs a wait for the interpreter lock.
        randomness = secrets.token_bytes(CODE_BYTES + SALT_BYTES)
        secret, salt = randomness[:CODE_BYTES], randomness[CODE_BYTES:]
        code = _code(_derive(key, salt) if key else secret)
        code_hash = _hash_code(code.translate(CANONICAL), salt, ITERATIONS)
        try:
            number = self._write(_issue_tickets, raffle_id, (participant, salt, ITERATIONS, code_hash))
        except (AlreadyParticipated, TicketsNoLongerAvailable):
            repeated = self._ticket_of(raffle_id, participant, key) if key else None
            if not repeated:
                raise
            number, code = repeated
        return {"raffle_id": raffle_id, "ticket_number": number, "verification_code": code}

    def _ticket_of(self, raffle_id, participant, key):
        """Return number and code of the ticket that the participant was given for the key, or None."""
        for number, salt, iterations, code_hash in self._read(
            """
            SELECT ticket.number, ticket.salt, ticket.iterations, ticket.code_hash
            FROM ticket
            JOIN raffle ON raffle.sequence = ticket.raffle
            WHERE raffle.id = ? AND ticket.participant = ?
            """,
            raffle_id,
            participant,
        ):
            code = _code(_derive(key, salt))
            if hmac.compare_digest(_hash_code(code.translate(CANONICAL), salt, iterations), code_hash):
                return number, code
        return None

    def draw_winners(self, raffle_id, public_randomness=None):
        """Draw a ticket for every prize, as `winning_numbers` says, and keep what is needed to check it.

        public_randomness: 1 to 1,000 characters that nobody could know before the
        last ticket went out; None for 32 random bytes in hexadecimal. Returns the
        longest first page that `list_winners` would return.
        Raises RaffleNotFound, WinnersAlreadyDrawn, TicketsStillAvailable.
        """
        # One at a time, of whatever raffle: a large one takes memory, and keeps the others' requests from the
        # interpreter. And of two for the same raffle the second finds it done before it has worked for nothing.
        with self._drawing:
            raffle, total, available, drawn, secret = _only(
                self._read(
                    """
                    SELECT sequence, total_tickets, available_tickets, winners_drawn, secret
                    FROM raffle
                    WHERE id = ?
                    """,
                    raffle_id,
                )
            )
            if drawn:
                raise WinnersAlreadyDrawn
            if available:
                raise TicketsStillAvailable
            prizes = self._read(
                """
                SELECT position, name, amount
                FROM prize
                WHERE raffle = ?
                ORDER BY position
                """,
                raffle,
            )
            if public_randomness is None:
                public_randomness = secrets.token_hex(32)
            named = [(name, amount) for _, name, amount in prizes]
            # Not in the writing thread, which others wait for meanwhile.
            numbers = winning_numbers(raffle_id, secret, public_randomness, total, sum(amount for _, amount in named))
            digest = digest_of_wins(zip(numbers, names_of_wins(named)))
            self._write(_record_wins, raffle_id, (raffle, prizes, numbers, public_randomness, digest))
            wins = zip(itertools.count(1), numbers, names_of_wins(named))
            return _page_of_wins(itertools.islice(wins, MAX_WINS_PER_PAGE + 1), MAX_WINS_PER_PAGE)

    def get_receipt(self, raffle_id):
        """Return as a dict what is needed to check the draw. Raises RaffleNotFound, ReceiptNotFound."""
        raffle = self.get_raffle(raffle_id)
        secret, public_randomness, sold_out_at, drawn_at, wins_sha256 = _only(
            self._read(
                """
                SELECT secret, public_randomness, sold_out_at, drawn_at, wins_sha256
                FROM raffle
                WHERE id = ?
                """,
                raffle_id,
            )
        )
        if drawn_at is None:
            raise ReceiptNotFound
        return {
            "algorithm": ALGORITHM,
            "raffle_id": raffle_id,
            "total_tickets": raffle["total_tickets"],
            "prizes": raffle["prizes"],
            "draw_commitment": raffle["draw_commitment"],
            "secret": secret.hex(),
            "public_randomness": public_randomness,
            "sold_out_at": sold_out_at,
            "drawn_at": drawn_at,
            "wins_sha256": wins_sha256,
        }

    def list_winners(self, raffle_id, limit, cursor=None):
        """Return a page of wins in the order of the prizes, and the cursor of the next page or None.

        limit: 1 to MAX_WINS_PER_PAGE. cursor: as the page before gave it.
        Raises RaffleNotFound, InvalidPage.
        """
        (raffle,) = _only(
            self._read(
                """
                SELECT sequence
                FROM raffle
                WHERE id = ?
                """,
                raffle_id,
            )
        )
        _check_page(limit, cursor, MAX_WINS_PER_PAGE)
        [(wins,)] = self._read(
            """
            SELECT json_group_array(json_array(position, ticket_number, name))
            FROM (
                SELECT win.position, win.ticket_number, prize.name
                FROM win
                JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize
                WHERE win.raffle = ? AND win.position > ?
                ORDER BY win.position
                LIMIT ?
            )
            """,
            raffle,
            0 if cursor is None else cursor,
            limit + 1,
        )
        rows = json.loads(wins)
        return _page_of_wins(rows, limit)

    def verify_ticket(self, raffle_id, ticket_number, verification_code):
        """Return the name of the prize that the ticket has won, or None if it has won nothing.

        ticket_number: 1 to MAX_TICKETS. verification_code: as `issue_ticket`
        gave it, in any case, with or without hyphens and spaces, O for 0 and I or
        L for 1 (Crockford's base32). Its hash is compared in constant time.
        Raises RaffleNotFound, WinnersNotDrawn, InvalidVerificationCode.
        """
        drawn, salt, iterations, code_hash, prize = _only(
            self._read(
                """
            SELECT raffle.winners_drawn, ticket.salt, ticket.iterations, ticket.code_hash, prize.name
            FROM raffle
            LEFT JOIN ticket ON ticket.raffle = raffle.sequence AND ticket.number = ?
            LEFT JOIN win ON win.raffle = ticket.raffle AND win.ticket_number = ticket.number
            LEFT JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize
            WHERE raffle.id = ?
            """,
                ticket_number,
                raffle_id,
            )
        )
        if not drawn:
            raise WinnersNotDrawn
        code = verification_code.translate(CANONICAL)
        # PBKDF2 takes a code and the same with NULs behind it for one.
        if salt is None or len(code) != CODE_LENGTH:
            raise InvalidVerificationCode
        if not hmac.compare_digest(_hash_code(code, salt, iterations), code_hash):
            raise InvalidVerificationCode
        return prize

    def _connect(self, mode):
        # Used by one thread at a time, but not always by the same: hence check_same_thread.
        # No isolation level: transactions begin and end where the code says so.
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
        # SQLite leaves references unchecked unless told otherwise, for the sake of old programs.
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _identify(self, reader):
        """Return whether the file is new and empty. Raises DatabaseRefused if it is not a raffle's."""

        def value(sql):
            return reader.execute(sql).fetchone()[0]

        application_id, version = value("PRAGMA application_id"), value("PRAGMA user_version")
        if not value("SELECT count(*) FROM sqlite_schema") and application_id == 0:
            # SQLite takes a file that is too short to be a database for an empty one.
            if self._path.stat().st_size and not value("PRAGMA page_count"):
                raise DatabaseRefused(f"{self._path} is not a database")
            return True
        if application_id != APPLICATION_ID or version < 1:
            raise DatabaseRefused(f"{self._path} was made by another program")
        if version > SCHEMA_VERSION:
            raise DatabaseRefused(f"{self._path} was made by a newer version of this program")
        if version < SCHEMA_VERSION:
            raise DatabaseRefused(f"{self._path} was made by an older version of this program")
        return False

    def _read(self, sql, *values):
        if self._closing:
            raise StorageUnavailable
        try:
            try:
                reader = self._readers.pop()
            except IndexError:
                reader = self._connect("ro")
            try:
                # Fetched to the end: a cursor left open would hold back checkpoints. A long list is best one
                # row of JSON: every row gives the interpreter away, and dozens of lists at once would fight for it.
                return reader.execute(sql, values).fetchall()
            finally:
                self._readers.append(reader)
                if self._closing:
                    self._close_readers()
        except sqlite3.DatabaseError as error:
            log.error("The database cannot be read: %s", error)
            raise StorageUnavailable from error

    def _close_readers(self):
        with suppress(IndexError):
            while True:
                self._readers.pop().close()

    def _write(self, action, raffle_id, request=None):
        """Have the writing thread run `action`, and return or raise its outcome once that is committed.

        action: function of the connection, the raffle's id and a list of the
        requests that wait for it together; it returns a list of their outcomes,
        an exception for a refusal, or raises one for all of them.
        """
        answer = Future()
        with self._changed:
            if self._closing:
                raise StorageUnavailable
            self._waiting.setdefault((action, raffle_id), []).append((request, answer))
            self._changed.notify()
        return answer.result()

    def _write_batches(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                batch, self._waiting = self._waiting, {}
                if not batch:
                    break
            self._write_batch(batch)
            del batch  # not to be kept until the next one comes
        self._close_readers()
        self._writer.close()

    def _write_batch(self, batch):
        answers = [answer for group in batch.values() for _, answer in group]
        try:
            outcomes = self._commit(batch)
            failure = None
        except Exception as error:
            failure = error
            with suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            outcomes = [StorageUnavailable() for _ in answers]
        with suppress(sqlite3.Error):
            self._note(failure)
        for answer, outcome in zip(answers, outcomes):
            if isinstance(outcome, Exception):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

    def _commit(self, batch):
        db = self._writer
        outcomes = []
        db.execute("BEGIN IMMEDIATE")
        for (action, raffle_id), group in batch.items():
            db.execute("SAVEPOINT action")
            try:
                outcomes += action(db, raffle_id, [request for request, _ in group])
            except sqlite3.OperationalError:
                # A full disk or an I/O error is everybody's, and may have undone the whole transaction.
                raise
            except Exception as error:
                db.execute("ROLLBACK TO action")
                outcomes += [error] * len(group)
            db.execute("RELEASE action")
        if not self._is_in_place():
            raise FileNotFoundError(f"{self._path} is no longer the file that was opened")
        db.execute("COMMIT")
        return outcomes

    def _is_in_place(self):
        # Or else what is written is lost: a file that has been deleted or replaced lives on for those who have it open.
        try:
            return os.path.samestat(self._path.stat(), self._file)
        except OSError:
            return False

    def _note(self, failure):
        if failure and not self._failing:
            log.error("Writes fail: %s", failure)
            # Who finds the file locked waits for it, but not everybody in turn: reads need the threads.
            self._writer.execute("PRAGMA busy_timeout = 0")
        elif self._failing and not failure:
            log.info("Writes go on")
            self._writer.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")
        self._failing = bool(failure)


def _insert_raffle(db, raffle_id, requests):
    [(name, total_tickets, prizes, created_at, secret)] = requests
    raffle = db.execute(
        """
        INSERT INTO raffle (id, name, total_tickets, available_tickets, created_at, secret)
        VALUES (?, ?, ?, ?, ?, ?)
        """,
        (raffle_id, name, total_tickets, total_tickets, created_at, secret),
    ).lastrowid
    db.executemany(
        """
        INSERT INTO prize (raffle, position, name, amount)
        VALUES (?, ?, ?, ?)
        """,
        ((raffle, position, prize["name"], prize["amount"]) for position, prize in enumerate(prizes, 1)),
    )
    return [None]


def _issue_tickets(db, raffle_id, requests):
    """Issue a ticket for each request: (participant, salt, iterations, hash of the code).

    This is a Fisher-Yates shuffle (Durstenfeld, CACM 7(7), 1964, algorithm 235)
    of the numbers 1 to total_tickets, one step per ticket. A cell of the array is
    stored only while it has been displaced, so that a raffle of any size costs
    nothing before its tickets are given out.

    Under load every statement costs the writing thread a wait for the interpreter
    lock: so the cells are read and written once for all requests, not once each.
    """
    raffle, available = _only(
        db.execute(
            """
            SELECT sequence, available_tickets
            FROM raffle
            WHERE id = ?
            """,
            (raffle_id,),
        ).fetchall()
    )
    outcomes = [TicketsNoLongerAvailable() for _ in requests]
    waiting = list(range(len(requests)))
    while available and waiting:
        asking = waiting[:available]
        lasts = range(available, available - len(asking), -1)
        words = _random_words(len(asking))
        draws = [_draw(words, last) for last in lasts]
        (displaced,) = db.execute(
            """
            SELECT json_group_object(position, ticket_number)
            FROM displaced
            WHERE raffle = ? AND position IN (SELECT value FROM json_each(?))
            """,
            (raffle, json.dumps([*draws, *lasts])),
        ).fetchone()
        cells = {int(position): number for position, number in json.loads(displaced).items()}
        numbers = []
        for drawn, last in zip(draws, lasts):
            numbers.append(cells.get(drawn, drawn))
            cells[drawn] = cells.get(last, last)
        inserted = db.executemany(
            """
            INSERT INTO ticket (raffle, number, participant, salt, iterations, code_hash)
            VALUES (?, ?, ?, ?, ?, ?)
            ON CONFLICT (raffle, participant) DO NOTHING
            """,
            ((raffle, number, *requests[index]) for index, number in zip(asking, numbers)),
        ).rowcount
        if inserted < len(asking):
            # Some have participated before: deal again, to the others.
            issued = db.execute(
                """
                DELETE FROM ticket
                WHERE raffle = ? AND number IN (SELECT value FROM json_each(?))
                RETURNING number
                """,
                (raffle, json.dumps(numbers)),
            ).fetchall()
            refused = {index for index, number in zip(asking, numbers) if (number,) not in issued}
            waiting = [index for index in waiting if index not in refused]
            for index in refused:
                outcomes[index] = AlreadyParticipated()
            continue
        available -= inserted
        waiting = waiting[inserted:]
        for index, number in zip(asking, numbers):
            outcomes[index] = number
        db.execute(
            """
            DELETE FROM displaced
            WHERE raffle = ? AND position > ?
            """,
            (raffle, available),
        )
        db.execute(
            """
            INSERT INTO displaced (raffle, position, ticket_number)
            SELECT ?, CAST(key AS INTEGER), value
            FROM json_each(?)
            WHERE true
            ON CONFLICT (raffle, position) DO UPDATE SET ticket_number = excluded.ticket_number
            """,
            (raffle, json.dumps({position: number for position, number in cells.items() if position <= available})),
        )
        db.execute(
            """
            UPDATE raffle
            SET available_tickets = ?, sold_out_at = ?
            WHERE sequence = ?
            """,
            (available, None if available else _now(), raffle),
        )
    return outcomes


def winning_numbers(raffle_id, secret, public_randomness, total_tickets, amount):
    """Return the numbers that win, in the order of the prizes: the draw, which anyone can repeat.

    raffle_id: as it is written. secret: 32 bytes, committed to by their SHA-256
    when the raffle was created. public_randomness: text that nobody knew before
    the last ticket went out. total_tickets: 1 to MAX_TICKETS. amount: how many
    prizes there are, at most total_tickets.

    After RFC 3797: inputs and algorithm fixed beforehand, except for one input
    that nobody can foresee. The same shuffle as that of the tickets, carried
    out as far as there are prizes. The README says it in steps.
    """
    key = hashlib.sha256(ALGORITHM.encode() + raffle_id.encode() + secret + public_randomness.encode()).digest()
    words = _hashed_words(key)
    displaced = {}
    numbers = []
    for last in range(total_tickets, total_tickets - amount, -1):
        drawn = _draw(words, last)
        numbers.append(displaced.get(drawn, drawn))
        displaced[drawn] = displaced.pop(last, last)
    return numbers


def names_of_wins(prizes):
    """Yield the name of the prize of each win, of pairs of name and amount."""
    return (name for name, amount in prizes for _ in range(amount))


def digest_of_wins(wins):
    """Return the SHA-256 of wins, pairs of ticket number and name of the prize, in hexadecimal.

    For each: the number, a space, the bytes of the name in UTF-8 and how many they are before it, a line feed.
    """
    digest = hashlib.sha256()
    for number, name in wins:
        encoded = name.encode()
        digest.update(b"%d %d %s\n" % (number, len(encoded), encoded))
    return digest.hexdigest()


def _hashed_words(key):
    """Yield integers of 64 bits without end: SHA-256 of the key and a counter, four big-endian ones of each."""
    for counter in itertools.count():
        yield from struct.unpack(">4Q", hashlib.sha256(key + counter.to_bytes(8, "big")).digest())


def _random_words(block):
    """Yield random integers of 64 bits without end, fetched from the system `block` at a time."""
    while True:
        yield from array("Q", secrets.token_bytes(8 * block))


def _draw(words, last):
    """Return an integer from 1 to `last`, all as likely: words past the last multiple of `last` are rejected."""
    word = next(words)
    while word >= 2**64 - 2**64 % last:
        word = next(words)
    return word % last + 1


def _record_wins(db, raffle_id, requests):
    [(raffle, prizes, numbers, public_randomness, digest)] = requests
    # A draw comes after the last ticket, be the clock put back.
    drawn = db.execute(
        """
        UPDATE raffle
        SET winners_drawn = 1, drawn_at = max(?, sold_out_at), public_randomness = ?, wins_sha256 = ?
        WHERE sequence = ? AND winners_drawn = 0
        """,
        (_now(), public_randomness, digest, raffle),
    ).rowcount
    if not drawn:
        raise WinnersAlreadyDrawn
    start = 0
    for prize, _, amount in prizes:
        end = start + amount
        for first in range(start, end, WINS_PER_STATEMENT):
            db.execute(
                """
                INSERT INTO win (raffle, position, ticket_number, prize)
                SELECT ?, ? + key, value, ?
                FROM json_each(?)
                """,
                (raffle, first + 1, prize, json.dumps(numbers[first : min(first + WINS_PER_STATEMENT, end)])),
            )
        start = end
    return [None]


def _only(rows):
    if not rows:
        raise RaffleNotFound
    return rows[0]


def _now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _raffle(raffle_id, name, total_tickets, available_tickets, winners_drawn, created_at, secret):
    return {
        "id": raffle_id,
        "name": name,
        "total_tickets": total_tickets,
        "available_tickets": available_tickets,
        "winners_drawn": bool(winners_drawn),
        "created_at": created_at,
        "draw_commitment": hashlib.sha256(bytes.fromhex(secret)).hexdigest(),
    }


def _check_page(limit, cursor, maximum):
    if not 1 <= limit <= maximum or cursor == 0:
        raise InvalidPage


def _page(keyed, limit):
    """Split what was read, one more than the page holds if there is more, into the page and the next cursor."""
    page = keyed[:limit]
    return [item for _, item in page], page[-1][0] if len(keyed) > limit else None


def _page_of_wins(rows, limit):
    return _page([(place, {"ticket_number": number, "prize": prize}) for place, number, prize in rows], limit)


# Crockford's base32 (https://www.crockford.com/base32.html): no I, L, O or U.
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
FROM_RFC_4648 = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", ALPHABET)
CANONICAL = str.maketrans(ALPHABET.lower() + "OoIiLl", ALPHABET + "001111", "- ")
CODE_BYTES = 15  # 120 bits
CODE_LENGTH = 24  # characters of 5 bits
SALT_BYTES = 16  # NIST SP 800-132 asks for 128 bits or more


def _code(secret):
    text = base64.b32encode(secret).decode().translate(FROM_RFC_4648)
    return "-".join(text[start : start + 4] for start in range(0, CODE_LENGTH, 4))


def _derive(key, salt):
    return hmac.digest(key.encode(), b"verification code" + salt, "sha256")[:CODE_BYTES]


def _hash_code(code, salt, iterations):
    return hashlib.pbkdf2_hmac("sha256", code.encode("utf-8", "replace"), salt, iterations)
