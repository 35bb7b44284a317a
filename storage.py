"""The rules of a raffle, each with its SQL. The data model is schema.sql.

This module knows nothing of HTTP, and leaves threads and transactions to database.py.
"""

import base64
import hashlib
import hmac
import itertools
import json
import pkgutil
import secrets
import uuid
from array import array
from datetime import datetime, timezone

import draw
from database import Database, DatabaseRefused, DatabaseUnavailable, backup  # noqa: F401

MAX_TICKETS = draw.MAX_TICKETS
MAX_RANDOMNESS = draw.MAX_RANDOMNESS  # characters
MAX_RAFFLES_PER_PAGE = 1_000
MAX_WINS_PER_PAGE = 10_000
WINS_PER_COMMIT = 5_000  # about 25 ms, during which others wait

# Crockford's base32 (https://www.crockford.com/base32.html): no I, L, O or U.
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
FROM_RFC_4648 = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", ALPHABET)
CANONICAL = str.maketrans(ALPHABET.lower() + "OoIiLl", ALPHABET + "001111", "- ")
CODE_BYTES = 15  # 120 bits
CODE_LENGTH = 24  # characters of 5 bits
SALT_BYTES = 16  # NIST SP 800-132 asks for 128 bits or more
# NIST SP 800-132 asks for 1,000 or more. More would protect a password that can
# be guessed; a code of 120 random bits is past guessing at the first iteration.
ITERATIONS = 1_000


class RaffleNotFound(Exception):
    """There is no raffle with this id."""


class InvalidPage(Exception):
    """The limit or the cursor of a page is out of range."""


class TicketsNoLongerAvailable(Exception):
    """Every ticket of the raffle has been issued."""


class AlreadyParticipated(Exception):
    """The participant holds a ticket of the raffle."""


class WinnersAlreadyDrawn(Exception):
    """The winners of the raffle have been drawn."""


class TicketsStillAvailable(Exception):
    """Winners are drawn only when every ticket has been issued."""


class WinnersNotDrawn(Exception):
    """The winners of the raffle have not been drawn yet."""


class ReceiptNotFound(Exception):
    """There is no receipt, because the winners of the raffle have not been drawn yet."""


class InvalidVerificationCode(Exception):
    """No ticket of the raffle has this number and this verification code."""


class Storage:
    """All raffles of one database file. Its methods may be called from any thread.

    Each method raises database.DatabaseUnavailable, besides what it names
    itself, if the file cannot be read or written.
    """

    def __init__(self, path):
        """Open the database at `path`, create it, or upgrade it from an older version.

        Raises database.DatabaseRefused.
        """
        try:
            # Beside this module, or with it in a zip file.
            schema = pkgutil.get_data(__name__, "schema.sql").decode()
        except OSError as error:
            raise DatabaseRefused(f"schema.sql cannot be read: {error.strerror}") from error
        self.database = Database(path, schema, upgrades={2: _add_draw_commitment})
        self._stopping = False
        self._open_raffles = set()

    def stop_draw(self):
        """End a draw in progress, and those that wait, at their next commit with database.DatabaseUnavailable."""
        self._stopping = True

    def create_raffle(self, name, total_tickets, prizes):
        """Create a raffle and return it as `get_raffle` does.

        name: text. total_tickets: 1 to MAX_TICKETS. prizes: non-empty list of
        {"name", "amount"}, amounts of 1 or more, together at most total_tickets.
        """
        raffle_id = str(uuid.uuid4())
        secret = secrets.token_bytes(32)
        columns = (name, total_tickets, total_tickets, _now(), hashlib.sha256(secret).hexdigest())
        self.database.write(_insert_raffle, raffle_id, (columns, secret, prizes)).result()
        prizes = [{"name": prize["name"], "amount": prize["amount"]} for prize in prizes]
        return {**_raffle(raffle_id, *columns, winners_drawn=0), "prizes": prizes}

    def list_raffles(self, limit, cursor=None):
        """Return a page of raffles without their prizes, latest first, and the cursor of the next page or None.

        limit: 1 to MAX_RAFFLES_PER_PAGE. cursor: as returned with the page before.
        Raises InvalidPage.
        """
        _require_page(limit, cursor, MAX_RAFFLES_PER_PAGE)
        rows = self.database.read(
            """
            SELECT sequence, id, name, total_tickets, available_tickets, created_at, draw_commitment, winners_drawn
            FROM raffle
            WHERE sequence < ?
            ORDER BY sequence DESC
            LIMIT ?
            """,
            2**63 - 1 if cursor is None else cursor,
            limit + 1,
        )
        return _page([(sequence, _raffle(*columns)) for sequence, *columns in rows], limit)

    def get_raffle(self, raffle_id):
        """Return a raffle as a dict, its prizes in the manager's order. Raises RaffleNotFound."""
        sequence, *columns = _first(
            self.database.read(
                """
                SELECT sequence, id, name, total_tickets, available_tickets, created_at, draw_commitment, winners_drawn
                FROM raffle
                WHERE id = ?
                """,
                raffle_id,
            )
        )
        prizes = self.database.read(
            """
            SELECT name, amount
            FROM prize
            WHERE raffle = ?
            ORDER BY position
            """,
            sequence,
        )
        return {**_raffle(*columns), "prizes": [{"name": name, "amount": amount} for name, amount in prizes]}

    def issue_ticket(self, raffle_id, participant, key=None):
        """Issue a ticket: a number, uniform among those left, and its verification code.

        participant: the 4 or 16 bytes that stand for one participant. key: the
        participant's Idempotency-Key or None. With a key, the code is derived from
        it and the ticket's salt (HMAC-SHA256, RFC 2104, cut to 120 bits), so that
        the same participant with the same key gets the same ticket again. A key
        should be as hard to guess as a random UUID: a thief of the database can try keys.
        Raises RaffleNotFound, TicketsNoLongerAvailable, AlreadyParticipated.
        """
        try:
            self._require_tickets(raffle_id)
            # One system call instead of two: under load each costs a wait for the interpreter lock.
            randomness = secrets.token_bytes(CODE_BYTES + SALT_BYTES)
            secret, salt = randomness[:CODE_BYTES], randomness[CODE_BYTES:]
            code = _code(_derive(key, salt) if key else secret)
            code_hash = _hash_code(code.translate(CANONICAL), salt, ITERATIONS)
            request = (participant, salt, ITERATIONS, code_hash)
            number = self.database.write(issue_tickets, raffle_id, request).result()
        except (AlreadyParticipated, TicketsNoLongerAvailable) as refusal:
            if isinstance(refusal, TicketsNoLongerAvailable):
                self._open_raffles.discard(raffle_id)
            issued = self._issued_ticket(raffle_id, participant, key) if key else None
            if not issued:
                raise
            number, code = issued
        return {"raffle_id": raffle_id, "ticket_number": number, "verification_code": code}

    def _require_tickets(self, raffle_id):
        """Refuse early, after one read, what the writing thread would refuse.

        In a popular raffle nearly every request is refused. The raffles known to
        be open are remembered, because a read for every ticket would cost a fifth
        of the rate. If one has been sold out meanwhile, the writing thread refuses.
        """
        if raffle_id not in self._open_raffles:
            (available,) = _first(
                self.database.read(
                    """
                    SELECT available_tickets
                    FROM raffle
                    WHERE id = ?
                    """,
                    raffle_id,
                )
            )
            if not available:
                raise TicketsNoLongerAvailable
            self._open_raffles.add(raffle_id)

    def _issued_ticket(self, raffle_id, participant, key):
        """Return number and code of the ticket that the participant was issued with the key, or None."""
        for number, salt, iterations, code_hash in self.database.read(
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
        """Draw a ticket for every prize, as draw.py says, and store what is needed to check it.

        public_randomness: text of 1 to MAX_RANDOMNESS characters that nobody
        could know before the last ticket was issued; None for 32 random bytes in
        hexadecimal. Returns the first page of `list_winners`, of full length.
        Raises RaffleNotFound, WinnersAlreadyDrawn, TicketsStillAvailable.
        """

        def write(action, request=None):
            if self._stopping:
                raise DatabaseUnavailable
            return self.database.write(action, raffle_id, request).result()

        # Of two draws of a raffle, the second finds it drawn before it computes anything.
        with self.database.long_job:
            raffle = self.get_raffle(raffle_id)
            if raffle["winners_drawn"]:
                raise WinnersAlreadyDrawn
            if raffle["available_tickets"]:
                raise TicketsStillAvailable
            if public_randomness is None:
                public_randomness = secrets.token_hex(32)
            secret, data_version = write(_begin_draw)
            prizes = [(prize["name"], prize["amount"]) for prize in raffle["prizes"]]
            amount = sum(amount for _, amount in prizes)
            # Computed outside the writing thread, so that nobody waits for it.
            numbers = array(
                "Q", draw.winning_numbers(raffle_id, secret, public_randomness, raffle["total_tickets"], amount)
            )
            digest = draw.digest_of_wins(zip(numbers, draw.prize_of_each_win(prizes)))
            # In transactions of WINS_PER_COMMIT, between which everyone else has a turn. Nobody sees
            # the wins before the last one, which marks the raffle as drawn. What an interrupted draw left goes first.
            while write(_delete_wins):
                pass
            positions = draw.prize_of_each_win((position, amount) for position, (_, amount) in enumerate(prizes, 1))
            wins = zip(numbers, positions)
            for first in range(1, amount + 1, WINS_PER_COMMIT):
                write(_insert_wins, (first, list(itertools.islice(wins, WINS_PER_COMMIT))))
            write(_mark_drawn, (public_randomness, digest, data_version))
        # Not read again: a draw that is stored must not be answered as a failure.
        wins = zip(itertools.count(1), numbers, draw.prize_of_each_win(prizes))
        return _page_of_wins(list(itertools.islice(wins, MAX_WINS_PER_PAGE + 1)), MAX_WINS_PER_PAGE)

    def get_receipt(self, raffle_id):
        """Return as a dict what is needed to check the draw. Raises RaffleNotFound, ReceiptNotFound."""
        raffle = self.get_raffle(raffle_id)
        if not raffle["winners_drawn"]:
            raise ReceiptNotFound
        [(secret, public_randomness, sold_out_at, drawn_at, wins_sha256)] = self.database.read(
            """
            SELECT secret, public_randomness, sold_out_at, drawn_at, wins_sha256
            FROM raffle
            WHERE id = ?
            """,
            raffle_id,
        )
        return {
            "algorithm": draw.ALGORITHM,
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

        limit: 1 to MAX_WINS_PER_PAGE. cursor: as returned with the page before.
        Raises RaffleNotFound, InvalidPage.
        """
        sequence, winners_drawn = _first(
            self.database.read(
                """
                SELECT sequence, winners_drawn
                FROM raffle
                WHERE id = ?
                """,
                raffle_id,
            )
        )
        _require_page(limit, cursor, MAX_WINS_PER_PAGE)
        if not winners_drawn:
            return [], None
        rows = self.database.read(
            """
            SELECT win.position, win.ticket_number, prize.name
            FROM win
            JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize
            WHERE win.raffle = ? AND win.position > ?
            ORDER BY win.position
            LIMIT ?
            """,
            sequence,
            0 if cursor is None else cursor,
            limit + 1,
        )
        return _page_of_wins(rows, limit)

    def verify_ticket(self, raffle_id, ticket_number, verification_code):
        """Return the name of the prize that the ticket has won, or None if it has won nothing.

        ticket_number: 1 to MAX_TICKETS. verification_code: as `issue_ticket`
        returned it, in any case, with or without hyphens and spaces, O for 0 and
        I or L for 1 (Crockford's base32). Its hash is compared in constant time.
        Raises RaffleNotFound, WinnersNotDrawn, InvalidVerificationCode.
        """
        winners_drawn, salt, iterations, code_hash, prize = _first(
            self.database.read(
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
        if not winners_drawn:
            raise WinnersNotDrawn
        code = verification_code.translate(CANONICAL)
        # PBKDF2 hashes a code and the same code padded with NULs alike.
        if salt is None or len(code) != CODE_LENGTH:
            raise InvalidVerificationCode
        if not hmac.compare_digest(_hash_code(code, salt, iterations), code_hash):
            raise InvalidVerificationCode
        return prize


def _insert_raffle(db, raffle_id, requests):
    [(columns, secret, prizes)] = requests
    sequence = db.execute(
        """
        INSERT INTO raffle (id, name, total_tickets, available_tickets, created_at, draw_commitment, secret)
        VALUES (?, ?, ?, ?, ?, ?, ?)
        """,
        (raffle_id, *columns, secret),
    ).lastrowid
    db.executemany(
        """
        INSERT INTO prize (raffle, position, name, amount)
        VALUES (?, ?, ?, ?)
        """,
        ((sequence, position, prize["name"], prize["amount"]) for position, prize in enumerate(prizes, 1)),
    )
    return [None]


def issue_tickets(db, raffle_id, requests):
    """Issue a ticket for each request: (participant, salt, iterations, hash of the code).

    This is a Fisher-Yates shuffle (Durstenfeld, CACM 7(7), 1964, algorithm 235)
    of the numbers 1 to total_tickets, one step per ticket. A cell of the array is
    stored only while it has been displaced, so that a raffle of any size costs
    nothing before its tickets are issued.

    Under load every row that passes between SQLite and Python costs the writing
    thread a wait for the interpreter lock. So the cells are read and written as
    one piece of JSON (measured: 8 % more tickets than with plain rows).
    """
    sequence, available = _first(
        db.execute(
            """
            SELECT sequence, available_tickets
            FROM raffle
            WHERE id = ?
            """,
            (raffle_id,),
        ).fetchall()
    )
    participants = {participant for participant, *_ in requests}
    marks = ", ".join("?" * len(participants))
    holders = {
        participant
        for (participant,) in db.execute(
            f"""
            SELECT participant
            FROM ticket
            WHERE raffle = ? AND participant IN ({marks})
            """,
            (sequence, *participants),
        ).fetchall()
    }
    # First who is admitted, as if they came one after the other, then a number for each.
    outcomes, admitted = [], []
    for index, (participant, *_) in enumerate(requests):
        if len(admitted) == available:
            outcomes.append(TicketsNoLongerAvailable())
        elif participant in holders:
            outcomes.append(AlreadyParticipated())
        else:
            holders.add(participant)
            admitted.append(index)
            outcomes.append(None)
    if not admitted:
        return outcomes
    left = available - len(admitted)
    lasts = range(available, left, -1)
    words = _random_words(len(admitted))
    drawn = [draw.uniform(words, last) for last in lasts]
    (displaced,) = db.execute(
        """
        SELECT json_group_object(position, ticket_number)
        FROM displaced
        WHERE raffle = ? AND position IN (SELECT value FROM json_each(?))
        """,
        (sequence, json.dumps([*drawn, *lasts])),
    ).fetchone()
    cells = {int(position): number for position, number in json.loads(displaced).items()}
    for index, cell, last in zip(admitted, drawn, lasts):
        outcomes[index] = cells.get(cell, cell)
        cells[cell] = cells.get(last, last)
    db.executemany(
        """
        INSERT INTO ticket (raffle, number, participant, salt, iterations, code_hash)
        VALUES (?, ?, ?, ?, ?, ?)
        """,
        ((sequence, outcomes[index], *requests[index]) for index in admitted),
    )
    db.execute(
        """
        DELETE FROM displaced
        WHERE raffle = ? AND position > ?
        """,
        (sequence, left),
    )
    db.execute(
        """
        INSERT INTO displaced (raffle, position, ticket_number)
        SELECT ?, CAST(key AS INTEGER), value
        FROM json_each(?)
        WHERE true
        ON CONFLICT (raffle, position) DO UPDATE SET ticket_number = excluded.ticket_number
        """,
        (sequence, json.dumps({cell: number for cell, number in cells.items() if cell <= left})),
    )
    db.execute(
        """
        UPDATE raffle
        SET available_tickets = ?, sold_out_at = ?
        WHERE sequence = ?
        """,
        (left, None if left else _now(), sequence),
    )
    return outcomes


def _random_words(block):
    """Yield random integers of 64 bits without end, fetched from the system `block` at a time."""
    while True:
        yield from array("Q", secrets.token_bytes(8 * block))


def _begin_draw(db, raffle_id, requests):
    """Return the secret of the raffle, and SQLite's data_version."""
    (secret,) = db.execute(
        """
        SELECT secret
        FROM raffle
        WHERE id = ?
        """,
        (raffle_id,),
    ).fetchone()
    (data_version,) = db.execute("PRAGMA data_version").fetchone()
    return [(secret, data_version)]


def _delete_wins(db, raffle_id, requests):
    """Delete up to WINS_PER_COMMIT wins of a raffle that has not been drawn; return how many."""
    deleted = db.execute(
        """
        DELETE FROM win
        WHERE (raffle, position) IN (
            SELECT win.raffle, win.position
            FROM raffle
            JOIN win ON win.raffle = raffle.sequence
            WHERE raffle.id = ? AND raffle.winners_drawn = 0
            LIMIT ?
        )
        """,
        (raffle_id, WINS_PER_COMMIT),
    )
    return [deleted.rowcount]


def _insert_wins(db, raffle_id, requests):
    [(first, wins)] = requests
    # As JSON, in one statement (measured: under load, plain rows take half as long again).
    db.execute(
        """
        INSERT INTO win (raffle, position, ticket_number, prize)
        SELECT raffle.sequence, ? + key, json_extract(value, '$[0]'), json_extract(value, '$[1]')
        FROM json_each(?)
        JOIN raffle ON raffle.id = ?
        """,
        (first, json.dumps(wins), raffle_id),
    )
    return [None]


def _mark_drawn(db, raffle_id, requests):
    [(public_randomness, digest, data_version)] = requests
    # A second server on this file (unsupported) may have stored wins of its own draw.
    if db.execute("PRAGMA data_version").fetchone() != (data_version,):
        raise DatabaseUnavailable
    # A draw comes after the last ticket, even if the clock is put back.
    db.execute(
        """
        UPDATE raffle
        SET winners_drawn = 1, drawn_at = max(?, sold_out_at), public_randomness = ?, wins_sha256 = ?
        WHERE id = ?
        """,
        (_now(), public_randomness, digest, raffle_id),
    )
    return [None]


def _add_draw_commitment(db):
    """Version 3: the commitment has a column of its own, so that nothing public reads a secret."""
    db.execute("ALTER TABLE raffle ADD COLUMN draw_commitment TEXT CHECK (length(draw_commitment) = 64)")
    for sequence, secret in db.execute("SELECT sequence, secret FROM raffle").fetchall():
        db.execute(
            """
            UPDATE raffle
            SET draw_commitment = ?
            WHERE sequence = ?
            """,
            (hashlib.sha256(secret).hexdigest(), sequence),
        )


def _first(rows):
    if not rows:
        raise RaffleNotFound
    return rows[0]


def _now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _raffle(raffle_id, name, total_tickets, available_tickets, created_at, draw_commitment, winners_drawn):
    return {
        "id": raffle_id,
        "name": name,
        "total_tickets": total_tickets,
        "available_tickets": available_tickets,
        "winners_drawn": bool(winners_drawn),
        "created_at": created_at,
        "draw_commitment": draw_commitment,
    }


def _require_page(limit, cursor, maximum):
    if not 1 <= limit <= maximum or cursor == 0:
        raise InvalidPage


def _page(keyed, limit):
    """Split (key, item) pairs, one more than fit if there is another page, into the page and the next cursor."""
    page = keyed[:limit]
    return [item for _, item in page], page[-1][0] if len(keyed) > limit else None


def _page_of_wins(rows, limit):
    return _page([(position, {"ticket_number": number, "prize": name}) for position, number, name in rows], limit)


def _code(secret):
    text = base64.b32encode(secret).decode().translate(FROM_RFC_4648)
    return "-".join(text[start : start + 4] for start in range(0, CODE_LENGTH, 4))


def _derive(key, salt):
    return hmac.digest(key.encode(), b"verification code" + salt, "sha256")[:CODE_BYTES]


def _hash_code(code, salt, iterations):
    return hashlib.pbkdf2_hmac("sha256", code.encode("utf-8", "replace"), salt, iterations)
