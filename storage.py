"""The rules of a raffle, each with its SQL. The data model is schema.sql.

This module knows nothing of HTTP, and leaves threads and transactions to database.py.
"""

import base64
import hashlib
import hmac
import itertools
import json
import pkgutil
import re
import secrets
import unicodedata
import uuid
from datetime import datetime, timezone

import draw
from database import Database, DatabaseRefused, DatabaseUnavailable  # noqa: F401

MAX_TICKETS = draw.MAX_TICKETS
MAX_RANDOMNESS = draw.MAX_RANDOMNESS  # characters
MAX_RAFFLES_PER_PAGE = 1_000
MAX_WINS_PER_PAGE = 10_000
WINS_PER_COMMIT = 5_000  # about 25 ms, during which others wait

# From the base32 of RFC 4648 to Crockford's, without I, L, O and U: see https://www.crockford.com/base32.html.
CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")
LOOK_ALIKES = str.maketrans("OIL", "011")
CODE_BYTES = 15  # 120 bits
SALT_BYTES = 16  # NIST SP 800-132 asks for 128 bits or more
# NIST SP 800-132 asks for 1,000 or more. More would protect a password that can
# be guessed; a code of 120 random bits is past guessing at the first iteration.
ITERATIONS = 1_000


class RaffleNotFound(Exception):
    """There is no raffle with this id."""


class InvalidPage(Exception):
    """The limit or the cursor of a page is out of range; the message is one sentence on which."""


class TicketsNoLongerAvailable(Exception):
    """The raffle is closed."""


class HasParticipated(Exception):
    """The participant holds a ticket of the raffle."""


class RaffleAlreadyClosed(Exception):
    """The raffle has been closed, or has closed by itself with its last ticket."""


class WinnersAlreadyDrawn(Exception):
    """The draw of the raffle has been decided."""


class TicketsStillAvailable(Exception):
    """Winners are drawn only once the raffle is closed."""


class RandomnessRequired(Exception):
    """The raffle has a randomness_source, which is the argument, and is drawn with nothing else."""


class WinnersNotDrawn(Exception):
    """The winners of the raffle have not been drawn yet."""


class InvalidVerificationCode(Exception):
    """No ticket of the raffle has this number and this verification code."""


class TicketHasNotWon(Exception):
    """The ticket has won no prize that could be redeemed."""


class PrizeAlreadyRedeemed(Exception):
    """The prize of the ticket has been redeemed; the argument says when."""


class Storage:
    """All raffles of one database file. Its methods may be called from any thread.

    Each method also raises database.DatabaseUnavailable, if the file cannot be
    read or written. The id of a raffle is a UUID in lower case.
    """

    def __init__(self, path):
        """Open the database at `path`, or create it. Raises database.DatabaseRefused."""
        # Beside this module, or with it in a zip file.
        self.database = Database(path, pkgutil.get_data(__name__, "schema.sql").decode())
        self._open_raffles = set()

    def require_health(self):
        """Raise DatabaseUnavailable if the database cannot be written."""
        self.database.require_writable()

    def _execute(self, sql, values=()):
        """Run one statement in a write transaction, perhaps with others; return its rows after the commit."""
        return self.database.write(lambda db, *_: [db.execute(sql, values).fetchall()], None)

    def create_raffle(self, name, total_tickets, prizes, randomness_source=None):
        """Create a raffle and return it as `get_raffle` does.

        name: text. total_tickets: 1 to MAX_TICKETS. prizes: non-empty list of
        {"name", "amount"}, amounts of 1 or more, together at most total_tickets.
        randomness_source: text that says which public randomness the draw will
        use, or None.
        """
        return self.database.write(
            _insert_raffles, None, (name, total_tickets, prizes, randomness_source)
        )

    def list_raffles(self, limit=None, cursor=None):
        """Return a page of raffles without their prizes, latest first, and the cursor of the next page or None.

        limit: text of an integer from 1 to MAX_RAFFLES_PER_PAGE, the default.
        cursor: text of the cursor of this page. Raises InvalidPage.
        """
        limit, before = _page(limit, cursor, MAX_RAFFLES_PER_PAGE)
        latest = "sequence < ? ORDER BY sequence DESC LIMIT ?"
        rows = _rows(self.database.read, latest, before or 2**63 - 1, limit + 1)
        return [_body(row) for row in rows[:limit]], rows[limit - 1]["sequence"] if len(
            rows
        ) > limit else None

    def get_raffle(self, raffle_id):
        """Return a raffle as a dict, its prizes in the manager's order. Raises RaffleNotFound."""
        raffle = _find(self.database.read, raffle_id)
        return _body(raffle, prizes=_prizes(self.database.read, raffle))

    def issue_ticket(self, raffle_id, address, key=None):
        """Issue the next ticket of the deck, and return as a dict its number and its verification code.

        address: the 4 or 16 bytes that stand for one participant. key: the
        participant's Idempotency-Key or None. With a key, the code is derived from
        it and the ticket's salt (HMAC-SHA256, RFC 2104, cut to 120 bits), so that
        the same participant with the same key gets the same ticket again, until
        the draw. Raises RaffleNotFound, TicketsNoLongerAvailable, HasParticipated.
        """
        try:
            # In a popular raffle nearly every request is refused: so early, before a code is hashed. The raffles known
            # to be open are remembered, because a read for every ticket would cost a fifth of the rate.
            if raffle_id not in self._open_raffles:
                if _find(self.database.read, raffle_id)["closed_at"]:
                    raise TicketsNoLongerAvailable
                self._open_raffles.add(raffle_id)
            # One system call instead of two: under load each costs a wait for the interpreter lock.
            randomness = secrets.token_bytes(CODE_BYTES + SALT_BYTES)
            secret, salt = randomness[:CODE_BYTES], randomness[CODE_BYTES:]
            code = _code(_derive(key, salt) if key else secret)
            ticket = (address, salt, ITERATIONS, _hash_code(code, salt, ITERATIONS))
            number = self.database.write(_issue_tickets, raffle_id, ticket)
        except (RaffleNotFound, TicketsNoLongerAvailable, HasParticipated) as refusal:
            if not isinstance(refusal, HasParticipated):
                self._open_raffles.discard(raffle_id)
            issued = self._issued_ticket(raffle_id, address, key) if key else None
            if not issued:
                raise
            number, code = issued
        return {"raffle_id": raffle_id, "ticket_number": number, "verification_code": code}

    def _issued_ticket(self, raffle_id, address, key):
        """Return number and code of the ticket that the participant was issued with the key, or None."""
        raffle = _find(self.database.read, raffle_id)
        if raffle["drawn_at"]:
            return None
        for number, salt, iterations, code_hash in self.database.read(
            """
            SELECT number, salt, iterations, code_hash
            FROM ticket
            WHERE raffle = ? AND participant = ?
            """,
            (raffle["sequence"], _participant(raffle, address)),
        ):
            code = _code(_derive(key, salt))
            if hmac.compare_digest(_hash_code(code, salt, iterations), code_hash):
                return number, code
        return None

    def close_raffle(self, raffle_id):
        """Withdraw the tickets that are left, and return the raffle. Raises RaffleNotFound, RaffleAlreadyClosed."""
        raffle = _find(self.database.read, raffle_id)
        prizes = _prizes(self.database.read, raffle)
        closed = self._execute(
            """
            UPDATE raffle
            SET closed_at = max(created_at, ?)
            WHERE id = ? AND closed_at IS NULL
            RETURNING issued_tickets, closed_at
            """,
            (_now(), raffle_id),
        )
        if not closed:
            raise RaffleAlreadyClosed
        return _body({**raffle, **closed[0]}, prizes=prizes)

    def draw_winners(self, raffle_id, public_randomness=None):
        """Decide the draw of a closed raffle, complete it, and return the first page of `list_winners`.

        public_randomness: text of 1 to MAX_RANDOMNESS characters that nobody
        could know before the raffle was closed; None for 32 random bytes made
        here. A draw that has been decided but was interrupted is completed before
        it is refused. Raises RaffleNotFound, WinnersAlreadyDrawn,
        TicketsStillAvailable, RandomnessRequired.
        """
        raffle = _find(self.database.read, raffle_id)
        if raffle["drawn_at"]:
            raise WinnersAlreadyDrawn
        if not raffle["closed_at"]:
            raise TicketsStillAvailable
        if raffle["randomness_source"] and not (public_randomness or raffle["public_randomness"]):
            raise RandomnessRequired(raffle["randomness_source"])
        decided = self._execute(
            """
            UPDATE raffle
            SET public_randomness = ?
            WHERE id = ? AND public_randomness IS NULL
            RETURNING id
            """,
            (public_randomness or draw.MADE_BY_SERVER + secrets.token_hex(32), raffle_id),
        )
        with self.database.long_job:
            raffle = _find(self.database.read, raffle_id)
            if decided or not raffle["drawn_at"]:
                page = self._complete_draw(raffle)
        if not decided:
            raise WinnersAlreadyDrawn
        return page

    def _complete_draw(self, raffle):
        """Store the wins that are missing, mark the raffle as drawn, and return the first page of wins.

        Everything follows from the decision, so several processes may do this, at any time and at once.
        """
        sequence, prizes = raffle["sequence"], _prizes(self.database.read, raffle)
        amount = draw.amount_of_wins(prizes, raffle["issued_tickets"])
        inputs = [
            raffle[name]
            for name in ("id", "secret", "public_randomness", "total_tickets", "issued_tickets")
        ]
        # Computed outside the writing thread, so that nobody waits for it.
        positions = (
            position for position, prize in enumerate(prizes, 1) for _ in range(prize["amount"])
        )
        wins = zip(draw.winning_numbers(*inputs, amount), positions)
        for first in range(1, amount + 1, WINS_PER_COMMIT):
            # In one statement (measured: under load, plain rows take half as long again).
            chunk = json.dumps(list(itertools.islice(wins, WINS_PER_COMMIT)))
            self._execute(
                """
                INSERT INTO win (raffle, position, ticket_number, prize)
                SELECT ?, ? + key, json_extract(value, '$[0]'), json_extract(value, '$[1]')
                FROM json_each(?)
                WHERE NOT EXISTS (SELECT 1 FROM win WHERE raffle = ? AND position = ? + key)
                """,
                (sequence, first, chunk, sequence, first),
            )
        # Read before the commit: what is stored must not be answered as a failure.
        page = _wins(self.database, sequence, MAX_WINS_PER_PAGE, 0)
        drawn = self._execute(
            """
            UPDATE raffle
            SET drawn_at = coalesce(drawn_at, max(closed_at, ?)), address_key = NULL
            WHERE sequence = ? AND (SELECT count(*) FROM win WHERE raffle = sequence) = ?
            RETURNING id
            """,
            (_now(), sequence, amount),
        )
        if not drawn:
            raise RuntimeError(f"Raffle {raffle['id']} does not have {amount} wins")
        return page

    def list_winners(self, raffle_id, limit=None, cursor=None):
        """Return a page of wins in the order of the prizes, and the cursor of the next page or None.

        limit: text of an integer from 1 to MAX_WINS_PER_PAGE, the default.
        cursor: text of the cursor of this page. Raises RaffleNotFound, InvalidPage.
        """
        raffle = _find(self.database.read, raffle_id)
        limit, after = _page(limit, cursor, MAX_WINS_PER_PAGE)
        return (
            _wins(self.database, raffle["sequence"], limit, after)
            if raffle["drawn_at"]
            else ([], None)
        )

    def verify_ticket(self, raffle_id, ticket_number, verification_code):
        """Return as a dict whether the ticket has won, its prize, and when that was redeemed.

        ticket_number: 1 to MAX_TICKETS. verification_code: as `issue_ticket`
        returned it, or as people type, paste and scan it: see `_hash_code`.
        Raises RaffleNotFound, WinnersNotDrawn, InvalidVerificationCode.
        """
        raffle = _find(self.database.read, raffle_id)
        if not raffle["drawn_at"]:
            raise WinnersNotDrawn
        for salt, iterations, code_hash, prize, redeemed_at in self.database.read(
            """
            SELECT ticket.salt, ticket.iterations, ticket.code_hash, prize.name, win.redeemed_at
            FROM ticket
            LEFT JOIN win ON win.raffle = ticket.raffle AND win.ticket_number = ticket.number
            LEFT JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize
            WHERE ticket.raffle = ? AND ticket.number = ?
            """,
            (raffle["sequence"], ticket_number),
        ):
            if hmac.compare_digest(_hash_code(verification_code, salt, iterations), code_hash):
                return {"has_won": prize is not None, "prize": prize, "redeemed_at": redeemed_at}
        raise InvalidVerificationCode

    def redeem_prize(self, raffle_id, ticket_number, verification_code):
        """Record that the prize of a ticket is handed out, once, and return as a dict ticket, prize and time.

        Arguments as for `verify_ticket`. Raises what that raises, TicketHasNotWon, PrizeAlreadyRedeemed.
        """
        verdict = self.verify_ticket(raffle_id, ticket_number, verification_code)
        if not verdict["has_won"]:
            raise TicketHasNotWon
        now = _now()
        redeemed = self._execute(
            """
            UPDATE win
            SET redeemed_at = ?
            WHERE raffle = (SELECT sequence FROM raffle WHERE id = ?) AND ticket_number = ? AND redeemed_at IS NULL
            RETURNING position
            """,
            (now, raffle_id, ticket_number),
        )
        if not redeemed:
            raise PrizeAlreadyRedeemed(
                self.verify_ticket(raffle_id, ticket_number, verification_code)["redeemed_at"]
            )
        return {"ticket_number": ticket_number, "prize": verdict["prize"], "redeemed_at": now}


def _rows(execute, condition, *values):
    """Return rows of raffles. execute: Database.read, or that of a connection. condition: SQL that selects them."""
    return execute(
        f"""
        SELECT sequence, id, name, total_tickets, issued_tickets, randomness_source, secret, draw_commitment,
            address_key, created_at, closed_at, public_randomness, drawn_at
        FROM raffle
        WHERE {condition}
        """,
        values,
    )


def _find(execute, raffle_id):
    """Return the row of a raffle. Raises RaffleNotFound."""
    for row in _rows(execute, "id = ?", raffle_id):
        return row
    raise RaffleNotFound


def _prizes(execute, row):
    prizes = execute(
        """
        SELECT name, amount
        FROM prize
        WHERE raffle = ?
        ORDER BY position
        """,
        (row["sequence"],),
    )
    return [dict(prize) for prize in prizes]


def _body(row, **prizes):
    """Return what anyone may know of a raffle now."""
    is_drawn = row["drawn_at"] is not None
    return {
        **{name: row[name] for name in ("id", "name", "total_tickets", "issued_tickets")},
        "available_tickets": 0
        if row["closed_at"]
        else row["total_tickets"] - row["issued_tickets"],
        "winners_drawn": is_drawn,
        **prizes,
        **{name: row[name] for name in ("created_at", "closed_at", "drawn_at")},
        "algorithm": draw.ALGORITHM,
        **{
            name: row[name]
            for name in ("draw_commitment", "randomness_source", "public_randomness")
        },
        "secret": row["secret"].hex() if is_drawn else None,
    }


def _wins(database, sequence, limit, after):
    rows = database.read(
        """
        SELECT win.position, win.ticket_number, prize.name AS prize, win.redeemed_at
        FROM win
        JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize
        WHERE win.raffle = ? AND win.position > ?
        ORDER BY win.position
        LIMIT ?
        """,
        (sequence, after, limit + 1),
    )
    wins = [dict(row) for row in rows]
    positions = [win.pop("position") for win in wins]
    return wins[:limit], positions[limit - 1] if len(wins) > limit else None


def _insert_raffles(db, _, requests):
    """Store a raffle for each request: (name, total_tickets, prizes, randomness_source); its outcome is the raffle."""
    raffles = []
    for name, total_tickets, prizes, source in requests:
        raffle_id, secret, address_key = (
            str(uuid.uuid4()),
            secrets.token_bytes(32),
            secrets.token_bytes(32),
        )
        commitment = hashlib.sha256(secret).hexdigest()
        sequence = db.execute(
            """
            INSERT INTO raffle
                (id, name, total_tickets, randomness_source, secret, draw_commitment, address_key, created_at)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (raffle_id, name, total_tickets, source, secret, commitment, address_key, _now()),
        ).lastrowid
        db.executemany(
            """
            INSERT INTO prize (raffle, position, name, amount)
            VALUES (?, ?, ?, ?)
            """,
            (
                (sequence, position, prize["name"], prize["amount"])
                for position, prize in enumerate(prizes, 1)
            ),
        )
        # Read before the commit: what is stored must not be answered as a failure.
        raffle = _find(db.execute, raffle_id)
        raffles.append(_body(raffle, prizes=_prizes(db.execute, raffle)))
    return raffles


def _issue_tickets(db, raffle_id, requests):
    """Issue a ticket for each request: (address, salt, iterations, hash of the code); its outcome is the number.

    All in few statements: under load, each costs the writing thread a wait for the interpreter lock.
    """
    raffle = _find(db.execute, raffle_id)
    if raffle["closed_at"]:
        return [TicketsNoLongerAvailable() for _ in requests]
    sequence, total, place = raffle["sequence"], raffle["total_tickets"], raffle["issued_tickets"]
    participants = [_participant(raffle, address) for address, *_ in requests]
    marks = ", ".join("?" * len(participants))
    rows = db.execute(
        f"""
        SELECT participant
        FROM ticket
        WHERE raffle = ? AND participant IN ({marks})
        """,
        (sequence, *participants),
    )
    holders = {participant for (participant,) in rows}
    key, outcomes, tickets = draw.deal_key(raffle_id, raffle["secret"]), [], []
    for participant, (_, *code) in zip(participants, requests):
        if place == total:
            outcomes.append(TicketsNoLongerAvailable())
        elif participant in holders:
            outcomes.append(HasParticipated())
        else:
            holders.add(participant)
            place += 1
            outcomes.append(draw.deck(key, total, place))
            tickets.append((sequence, outcomes[-1], participant, *code))
    if tickets:
        db.executemany(
            """
            INSERT INTO ticket (raffle, number, participant, salt, iterations, code_hash)
            VALUES (?, ?, ?, ?, ?, ?)
            """,
            tickets,
        )
        db.execute(
            """
            UPDATE raffle
            SET issued_tickets = ?, closed_at = max(created_at, ?)
            WHERE sequence = ?
            """,
            (place, _now() if place == total else None, sequence),
        )
    return outcomes


def _now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _page(limit, cursor, maximum):
    """Return as integers the limit of a page, `maximum` if it is None, and its cursor, 0 if it is None."""
    if limit is not None and not (re.fullmatch("[1-9][0-9]{0,8}", limit) and int(limit) <= maximum):
        raise InvalidPage(f"limit must be an integer from 1 to {maximum}")
    if cursor is not None and not re.fullmatch("[1-9][0-9]{0,17}", cursor):
        raise InvalidPage("cursor must be one from a Link header")
    return int(limit or maximum), int(cursor or 0)


def _participant(raffle, address):
    """Return the 16 bytes that stand for an address in one raffle."""
    return hmac.digest(raffle["address_key"], address, "sha256")[:16]


def _code(secret):
    text = base64.b32encode(secret).decode().translate(CROCKFORD)
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def _derive(key, salt):
    return hmac.digest(key.encode(), b"verification code" + salt, "sha256")[:CODE_BYTES]


def _hash_code(code, salt, iterations):
    """Return the hash of a code as people type, paste and scan it.

    Only letters and digits count, in any case and width, with O read as 0, and I
    and L as 1: scanners on other keyboard layouts turn the hyphens into anything.
    """
    # In this order: in upper case, a letter that is not of ASCII may become two that are.
    kept = re.sub("[^0-9A-Za-z]", "", unicodedata.normalize("NFKC", code))
    canonical = kept.upper().translate(LOOK_ALIKES)
    return hashlib.pbkdf2_hmac("sha256", canonical.encode(), salt, iterations)
