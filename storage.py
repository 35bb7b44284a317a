"""The rules of a raffle, each with its SQL. The data model is schema.sql.

The writing thread and its transactions are database.py's, deck and draw are draw.py's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import os
import pkgutil
import re
import secrets
import sqlite3
import threading
import unicodedata
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, Callable, NamedTuple

import draw
from database import (
    ALONE,
    Database,
    DatabaseRefused,  # noqa: F401, for those who open a storage
    DatabaseUnavailable,  # noqa: F401, for those who use one
    File,
    Share,
)

MAX_TICKETS = draw.MAX_TICKETS
MAX_RANDOMNESS = draw.MAX_RANDOMNESS  # characters
MAX_RAFFLES_PER_PAGE = 1_000
MAX_WINS_PER_PAGE = 10_000
MAX_REPLACEMENTS_PER_PAGE = 10_000
MAX_DAYS_OPEN = 366
REASONS = ("unclaimed", "declined", "ineligible")  # to replace a winner
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
WINS_PER_COMMIT = 5_000  # about 25 ms, during which others wait

Execute = Callable[..., Any]  # Database.read, or execute() of a connection


class RaffleNotFound(Exception):
    """There is no raffle with this id."""


class TicketsNoLongerAvailable(Exception):
    """The raffle is closed."""


class HasParticipated(Exception):
    """The participant holds a ticket of the raffle."""


class ClosingTimeOutOfRange(Exception):
    """closes_at is not between the time of creation, which is the argument, and the latest time."""


class ClosesByItself(Exception):
    """The raffle is not closed by hand; the argument says when it closes."""


class HasParticipants(Exception):
    """A raffle is deleted only before its first ticket is issued."""


class RaffleAlreadyClosed(Exception):
    """The raffle has been closed, by hand, by its last ticket or by the clock."""


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


class TicketHasOtherPrize(Exception):
    """The ticket has won another prize than was named; the argument is its name."""


class TicketReplaced(Exception):
    """The prize of the ticket went to another; the arguments are that ticket's number and when."""


class NoTicketsLeftToDraw(Exception):
    """Every issued ticket has been drawn."""


class PrizeAlreadyRedeemed(Exception):
    """The prize of the ticket has been redeemed; the argument says when."""


class Page(NamedTuple):
    """Some items of a list, and the cursor of the page after them, or None if there is none."""

    items: list[dict[str, Any]]
    next_cursor: int | None


class NewRaffle(NamedTuple):
    """What a raffle is created with."""

    name: str
    total_tickets: int
    prizes: list[dict[str, Any]]
    closes_at: str | None
    randomness_source: str | None


class NewReplacement(NamedTuple):
    """A winner to replace. prize: its name. number_of_replacements: those before this one."""

    raffle_id: str
    replaced_ticket_number: int
    prize: str
    reason: str
    ticket_number: int
    number_of_replacements: int


class TicketRequest(NamedTuple):
    """What a ticket is stored with, beside its number. participant: 4 or 16 bytes."""

    participant: bytes
    salt: bytes
    iterations: int
    code_hash: bytes


class Storage:
    """All raffles of one database file. Its methods may be called from any thread.

    Each method also raises database.DatabaseUnavailable, if the file cannot be
    read or written. The id of a raffle is a UUID in lower case.
    """

    def __init__(self, path: str | os.PathLike[str], share: Share = ALONE) -> None:
        """Open the database at `path`, or create it. Raises database.DatabaseRefused."""
        # Beside this module, or with it in a zip file.
        schema = pkgutil.get_data(__name__, "schema.sql") or b""
        self._database = Database(path, schema.decode(), share)
        # Held while a draw is completed or a winner replaced: one thread at a time computes.
        self._draw_lock = threading.Lock()
        # Ids of raffles that were open when last read. A stale id is harmless: the transaction
        # decides.
        self._open_raffles: set[str] = set()

    def close(self) -> None:
        """Finish what is waiting, and close the database."""
        self._database.close()

    @property
    def file(self) -> File:
        """Which file the database is."""
        return self._database.file

    @property
    def has_lost_commit(self) -> bool:
        """Whether a commit has failed for good, so that only a restart helps."""
        return self._database.has_lost_commit

    def require_writable(self) -> None:
        """Raise DatabaseUnavailable if the database cannot be written."""
        self._database.require_writable()

    def create_raffle(
        self,
        name: str,
        total_tickets: int,
        prizes: list[dict[str, Any]],
        closes_at: str | None = None,
        randomness_source: str | None = None,
    ) -> dict[str, Any]:
        """Create a raffle and return it as `get_raffle` does.

        total_tickets: 1 to MAX_TICKETS. prizes: non-empty list of {"name", "amount"},
        amounts of 1 or more, together at most total_tickets. closes_at: when the
        raffle closes by itself, as `now` writes times, up to MAX_DAYS_OPEN ahead, or
        None. randomness_source: text that says which public randomness the draw will
        use, or None. Raises ClosingTimeOutOfRange.
        """
        request = NewRaffle(name, total_tickets, prizes, closes_at, randomness_source)
        return self._database.write(_insert_raffles, None, request)

    def list_raffles(self, limit: int, before: int | None = None) -> Page:
        """Return a page of raffles without their prizes, latest first.

        limit: 1 to MAX_RAFFLES_PER_PAGE. before: the cursor of this page.
        """
        rows = self._read_raffles(before or 2**63 - 1, limit + 1)
        instant = now()
        if any(_is_due(row, instant) for row in rows):
            self._close_due_raffles()
            rows = self._read_raffles(before or 2**63 - 1, limit + 1)
        raffles = [_public_members(row) for row in rows[:limit]]
        next_cursor = rows[limit - 1]["sequence"] if len(rows) > limit else None
        return Page(raffles, next_cursor)

    def _read_raffles(self, before: int, limit: int) -> list[sqlite3.Row]:
        return _select_raffles(
            self._database.read,
            """
            WHERE sequence < ?
            ORDER BY sequence DESC
            LIMIT ?
            """,
            (before, limit),
        )

    def _read_or_close_raffle(self, raffle_id: str) -> sqlite3.Row:
        """Return the row of a raffle, which is closed if it is due. Raises RaffleNotFound."""
        raffle = _find_raffle(self._database.read, raffle_id)
        if _is_due(raffle, now()):
            self._close_due_raffles()
            raffle = _find_raffle(self._database.read, raffle_id)
        return raffle

    def _close_due_raffles(self) -> None:
        """Store that the raffles are closed whose time has come.

        Whoever finds one due does so before showing it: a batch that issues its last
        tickets may still be on its way, and they count.
        """
        self._database.write(_close_due, None)

    def require_raffle(self, raffle_id: str) -> None:
        """Raise RaffleNotFound unless there is a raffle with this id."""
        _find_raffle(self._database.read, raffle_id)

    def get_raffle(self, raffle_id: str) -> dict[str, Any]:
        """Return a raffle as a dict, its prizes in the manager's order. Raises RaffleNotFound."""
        raffle = self._read_or_close_raffle(raffle_id)
        return _public_members(raffle, _read_prizes(self._database.read, raffle))

    def delete_raffle(self, raffle_id: str) -> None:
        """Delete a raffle that has no tickets. Raises RaffleNotFound, HasParticipants."""
        self._database.write(_delete_raffles, None, raffle_id)
        self._open_raffles.discard(raffle_id)

    def issue_ticket(
        self, raffle_id: str, participant: bytes, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """Issue the next ticket of the deck; return as a dict its number and verification code.

        participant: 4 or 16 bytes. With an Idempotency-Key, the code is derived from
        it and the ticket's salt, so that the same participant with the same key gets
        the same ticket again, until the draw. Raises RaffleNotFound,
        TicketsNoLongerAvailable, HasParticipated.
        """
        try:
            number, code = self._issue_new_ticket(raffle_id, participant, idempotency_key)
        except (TicketsNoLongerAvailable, HasParticipated):
            if idempotency_key is None:
                raise
            ticket = self._find_issued_ticket(raffle_id, participant, idempotency_key)
            if ticket is None:
                raise
            number, code = ticket
        return {"raffle_id": raffle_id, "ticket_number": number, "verification_code": code}

    def _issue_new_ticket(
        self, raffle_id: str, participant: bytes, idempotency_key: str | None
    ) -> tuple[int, str]:
        """Return number and code of a new ticket. Raises as `issue_ticket`."""
        self._require_open(raffle_id)

        # One system call instead of two: under load each costs a wait for the interpreter lock.
        randomness = secrets.token_bytes(CODE_BYTES + SALT_BYTES)
        code_bytes = randomness[:CODE_BYTES]
        salt = randomness[CODE_BYTES:]
        if idempotency_key is not None:
            code_bytes = _derive_code(idempotency_key, salt)
        code = _format_code(code_bytes)
        code_hash = _hash_code(code, salt, ITERATIONS)

        request = TicketRequest(participant, salt, ITERATIONS, code_hash)
        try:
            number = self._database.write(_issue_tickets, raffle_id, request)
        except (RaffleNotFound, TicketsNoLongerAvailable):
            self._open_raffles.discard(raffle_id)
            raise
        return number, code

    def _require_open(self, raffle_id: str) -> None:
        """Raise RaffleNotFound or TicketsNoLongerAvailable, before a code is hashed.

        In a popular raffle nearly every request is refused. Raffles known to be open
        are remembered: a read for every ticket would cost a fifth of the rate.
        """
        if raffle_id in self._open_raffles:
            return
        if self._read_or_close_raffle(raffle_id)["closed_at"]:
            raise TicketsNoLongerAvailable
        self._open_raffles.add(raffle_id)

    def _find_issued_ticket(
        self, raffle_id: str, participant: bytes, idempotency_key: str
    ) -> tuple[int, str] | None:
        """Return number and code of the ticket that the participant got with the key, or None."""
        raffle = _find_raffle(self._database.read, raffle_id)
        if raffle["drawn_at"]:
            return None
        ticket = _first(
            self._database.read(
                """
                SELECT number, salt, iterations, code_hash
                FROM ticket
                WHERE raffle = ? AND participant_hash = ?
                """,
                (raffle["sequence"], _hash_participant(raffle, participant)),
            )
        )
        if ticket is None:
            return None
        code = _format_code(_derive_code(idempotency_key, ticket["salt"]))
        if not _is_code_of(ticket, code):
            return None
        return ticket["number"], code

    def close_raffle(self, raffle_id: str) -> dict[str, Any]:
        """Withdraw the tickets that are left, and return the raffle.

        Raises RaffleNotFound, RaffleAlreadyClosed, ClosesByItself.
        """
        raffle = self._read_or_close_raffle(raffle_id)
        if raffle["closes_at"] and not raffle["closed_at"]:
            raise ClosesByItself(raffle["closes_at"])
        prizes = _read_prizes(self._database.read, raffle)
        closed = _first(
            self._database.execute(
                """
                UPDATE raffle
                SET closed_at = max(created_at, ?)
                WHERE id = ? AND closed_at IS NULL
                RETURNING issued_tickets, closed_at
                """,
                (now(), raffle_id),
            )
        )
        if closed is None:
            self.require_raffle(raffle_id)  # it may have been deleted meanwhile
            raise RaffleAlreadyClosed
        # Not read again: if that failed, a close that was stored would get 503.
        return _public_members({**raffle, **closed}, prizes)

    def draw_winners(self, raffle_id: str, public_randomness: str | None = None) -> Page:
        """Decide the draw of a closed raffle, complete it, and return its first page of wins.

        public_randomness: text of 1 to MAX_RANDOMNESS characters that nobody
        could know before the raffle was closed; None for 32 random bytes made
        here. A draw that has been decided but was interrupted is completed before
        it is refused. Raises RaffleNotFound, WinnersAlreadyDrawn,
        TicketsStillAvailable, RandomnessRequired.
        """
        raffle = self._read_or_close_raffle(raffle_id)
        if raffle["drawn_at"]:
            raise WinnersAlreadyDrawn
        if not raffle["closed_at"]:
            raise TicketsStillAvailable
        is_announced = raffle["randomness_source"] and not raffle["public_randomness"]
        if is_announced and public_randomness is None:
            raise RandomnessRequired(raffle["randomness_source"])

        if public_randomness is None:
            public_randomness = draw.MADE_BY_SERVER + secrets.token_hex(32)
        has_decided = self._decide_draw(raffle_id, public_randomness)
        with self._draw_lock:
            raffle = _find_raffle(self._database.read, raffle_id)
            if has_decided:
                return self._complete_draw(raffle)
            if not raffle["drawn_at"]:
                self._complete_draw(raffle)
        raise WinnersAlreadyDrawn

    def _decide_draw(self, raffle_id: str, public_randomness: str) -> bool:
        """Store the public randomness, unless there is one; return whether it was stored."""
        decided = self._database.execute(
            """
            UPDATE raffle
            SET public_randomness = ?
            WHERE id = ? AND public_randomness IS NULL
            RETURNING id
            """,
            (public_randomness, raffle_id),
        )
        return bool(decided)

    def _complete_draw(self, raffle: sqlite3.Row) -> Page:
        """Store the wins that are missing, mark the raffle as drawn, and return the first page.

        Everything follows from the decision, so several processes may do this, at any
        time and at once.
        """
        sequence = raffle["sequence"]
        prizes = _read_prizes(self._database.read, raffle)
        amount = draw.amount_of_wins(prizes, raffle["issued_tickets"])
        # Computed here, outside the writing thread, so that nobody waits for it.
        wins = zip(itertools.islice(_drawn_places(raffle), amount), _prize_positions(prizes))
        for first in range(1, amount + 1, WINS_PER_COMMIT):
            chunk = list(itertools.islice(wins, WINS_PER_COMMIT))
            # A draw that was cut off goes on where it was.
            if self._count_wins(sequence, first, len(chunk)) < len(chunk):
                self._store_wins(raffle, first, chunk)

        # Read before the commit: if that failed afterwards, a draw would get 503.
        page = _read_wins(self._database.read, sequence, MAX_WINS_PER_PAGE)
        drawn = self._database.execute(
            """
            UPDATE raffle
            SET drawn_at = coalesce(drawn_at, max(closed_at, ?)), address_key = NULL
            WHERE id = ?
                AND (SELECT count(*) FROM win WHERE win.raffle = raffle.sequence) = ?
            RETURNING id
            """,
            (now(), raffle["id"], amount),
        )
        if not drawn:
            self.require_raffle(raffle["id"])
            raise RuntimeError(f"Raffle {raffle['id']} does not have {amount} wins")
        return page

    def _count_wins(self, sequence: int, first: int, amount: int) -> int:
        """Return how many wins are stored of so many from the position `first` on."""
        [(count,)] = self._database.read(
            """
            SELECT count(*)
            FROM win
            WHERE raffle = ? AND position BETWEEN ? AND ?
            """,
            (sequence, first, first + amount - 1),
        )
        return count

    def _store_wins(self, raffle: sqlite3.Row, first: int, wins: list[tuple[int, int]]) -> None:
        """Store wins from the position `first` on, except for those that are stored.

        wins: place of the ticket, and position of the prize.
        """
        deal_key = draw.derive_deal_key(raffle["id"], raffle["secret"])
        numbered = [
            (draw.number_at(deal_key, raffle["total_tickets"], place), prize_position)
            for place, prize_position in wins
        ]
        sequence = raffle["sequence"]
        # As JSON in one statement: under load, plain rows take half as long again.
        self._database.execute(
            """
            INSERT INTO win (raffle, position, ticket_number, prize_position)
            SELECT ?, ? + key, json_extract(value, '$[0]'), json_extract(value, '$[1]')
            FROM json_each(?)
            WHERE NOT EXISTS (SELECT 1 FROM win WHERE raffle = ? AND position = ? + key)
            """,
            (sequence, first, json.dumps(numbered), sequence, first),
        )

    def list_winners(self, raffle_id: str, limit: int, after: int | None = None) -> Page:
        """Return a page of wins in the order of the prizes; an empty one before the draw.

        limit: 1 to MAX_WINS_PER_PAGE. after: the cursor of this page. Raises
        RaffleNotFound.
        """
        raffle = self._read_or_close_raffle(raffle_id)
        if not raffle["drawn_at"]:
            return Page([], None)
        return _read_wins(self._database.read, raffle["sequence"], limit, after or 0)

    def verify_ticket(
        self, raffle_id: str, ticket_number: int, verification_code: str
    ) -> dict[str, Any]:
        """Return as a dict whether the ticket has won, its prize, when redeemed, when replaced.

        ticket_number: 1 to MAX_TICKETS. verification_code: as `issue_ticket`
        returned it, or as people type, paste and scan it. Raises RaffleNotFound,
        WinnersNotDrawn, InvalidVerificationCode.
        """
        ticket = self._find_verified_ticket(raffle_id, ticket_number, verification_code)
        return {
            "has_won": ticket["prize"] is not None,
            "prize": ticket["prize"],
            "redeemed_at": ticket["redeemed_at"],
            "replaced_at": ticket["replaced_at"],
        }

    def _find_verified_ticket(
        self, raffle_id: str, ticket_number: int, verification_code: str
    ) -> sqlite3.Row:
        """Return the ticket, its win and its replacement. Raises as `verify_ticket`."""
        raffle = self._read_or_close_raffle(raffle_id)
        if not raffle["drawn_at"]:
            raise WinnersNotDrawn
        ticket = _first(
            self._database.read(
                """
                SELECT ticket.salt, ticket.iterations, ticket.code_hash,
                    prize.name AS prize, win.redeemed_at,
                    replacement.ticket_number AS replaced_by, replacement.replaced_at
                FROM ticket
                LEFT JOIN win
                    ON win.raffle = ticket.raffle AND win.ticket_number = ticket.number
                LEFT JOIN prize
                    ON prize.raffle = win.raffle AND prize.position = win.prize_position
                LEFT JOIN replacement
                    ON replacement.raffle = ticket.raffle
                    AND replacement.replaced_ticket_number = ticket.number
                WHERE ticket.raffle = ? AND ticket.number = ?
                """,
                (raffle["sequence"], ticket_number),
            )
        )
        if ticket is None or not _is_code_of(ticket, verification_code):
            raise InvalidVerificationCode
        return ticket

    def redeem_prize(
        self, raffle_id: str, ticket_number: int, verification_code: str
    ) -> dict[str, Any]:
        """Record that the prize of a ticket is handed out, once; return ticket, prize and time.

        Arguments as for `verify_ticket`. Raises what that raises, TicketHasNotWon,
        TicketReplaced, PrizeAlreadyRedeemed.
        """
        ticket = self._find_verified_ticket(raffle_id, ticket_number, verification_code)
        _require_redeemable(ticket)
        redeemed_at = now()
        redeemed = self._database.execute(
            """
            UPDATE win
            SET redeemed_at = ?
            WHERE raffle = (SELECT sequence FROM raffle WHERE id = ?)
                AND ticket_number = ?
                AND redeemed_at IS NULL
            RETURNING position
            """,
            (redeemed_at, raffle_id, ticket_number),
        )
        if not redeemed:
            # Somebody else was faster: they have redeemed it, or replaced the winner.
            _require_redeemable(
                self._find_verified_ticket(raffle_id, ticket_number, verification_code)
            )
            raise RuntimeError(f"Ticket {ticket_number} of raffle {raffle_id} cannot be redeemed")
        return {
            "ticket_number": ticket_number,
            "prize": ticket["prize"],
            "redeemed_at": redeemed_at,
        }

    def replace_winner(
        self, raffle_id: str, ticket_number: int, prize: str, reason: str
    ) -> dict[str, Any]:
        """Give the prize of a ticket to the next ticket of the draw; return the replacement.

        ticket_number: of the winner who is replaced. prize: the name of what it has
        won, so that a mistyped number does nothing. reason: one of REASONS. Raises
        RaffleNotFound, WinnersNotDrawn, TicketHasNotWon, TicketHasOtherPrize,
        TicketReplaced, PrizeAlreadyRedeemed, NoTicketsLeftToDraw.
        """
        raffle = self._read_or_close_raffle(raffle_id)
        # Once before the lock, so that a refusal does not wait for somebody's draw.
        _require_replaceable(self._database.read, raffle, ticket_number, prize)
        # One at a time in this process: for a million wins, each takes a second.
        with self._draw_lock:
            replacement = None
            while replacement is None:
                raffle = _find_raffle(self._database.read, raffle_id)
                _require_replaceable(self._database.read, raffle, ticket_number, prize)
                number = self._next_number(raffle)
                # Returns None if another process has made one meanwhile.
                replacement = self._database.write(
                    _insert_replacements,
                    None,
                    NewReplacement(
                        raffle_id, ticket_number, prize, reason, number, raffle["replacements"]
                    ),
                )
        return replacement

    def _next_number(self, raffle: sqlite3.Row) -> int:
        """Return the number of the next ticket of the draw. Raises NoTicketsLeftToDraw."""
        prizes = _read_prizes(self._database.read, raffle)
        wins = draw.amount_of_wins(prizes, raffle["issued_tickets"])
        numbers = draw.winning_numbers(
            raffle["id"],
            raffle["secret"],
            raffle["public_randomness"],
            raffle["total_tickets"],
            raffle["issued_tickets"],
            amount=1,
            first=wins + raffle["replacements"] + 1,
        )
        for number in numbers:
            return number
        raise NoTicketsLeftToDraw

    def list_replacements(self, raffle_id: str, limit: int, after: int | None = None) -> Page:
        """Return a page of replacements, oldest first.

        limit: 1 to MAX_REPLACEMENTS_PER_PAGE. after: the cursor of this page. Raises
        RaffleNotFound.
        """
        raffle = self._read_or_close_raffle(raffle_id)
        rows = self._database.read(
            """
            SELECT replacement.sequence, replacement.ticket_number, prize.name AS prize,
                replacement.replaced_ticket_number, replacement.reason, replacement.replaced_at
            FROM replacement
            JOIN win ON win.raffle = replacement.raffle AND win.position = replacement.position
            JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize_position
            WHERE replacement.raffle = ? AND replacement.sequence > ?
            ORDER BY replacement.sequence
            LIMIT ?
            """,
            (raffle["sequence"], after or 0, limit + 1),
        )
        replacements = [_replacement_members(row) for row in rows[:limit]]
        next_cursor = rows[limit - 1]["sequence"] if len(rows) > limit else None
        return Page(replacements, next_cursor)


# Reading


def _first(rows: list[sqlite3.Row]) -> sqlite3.Row | None:
    return rows[0] if rows else None


def _select_raffles(execute: Execute, clauses: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
    """Return rows of raffles. clauses: SQL from WHERE on."""
    rows = execute(
        f"""
        SELECT sequence, id, name, total_tickets, issued_tickets, randomness_source, secret,
            draw_commitment, address_key, created_at, closes_at, closed_at, public_randomness,
            drawn_at,
            coalesce(
                (
                    SELECT max(replacement.sequence)
                    FROM replacement
                    WHERE replacement.raffle = raffle.sequence
                ),
                0
            ) AS replacements
        FROM raffle
        {clauses}
        """,
        values,
    )
    return list(rows)


def _find_raffle(execute: Execute, raffle_id: str) -> sqlite3.Row:
    """Return the row of a raffle. Raises RaffleNotFound."""
    raffle = _first(_select_raffles(execute, "WHERE id = ?", (raffle_id,)))
    if raffle is None:
        raise RaffleNotFound
    return raffle


def _is_due(raffle: sqlite3.Row, instant: str) -> bool:
    """Return whether a raffle that is stored as open has closed by itself at an instant."""
    return (
        raffle["closed_at"] is None
        and raffle["closes_at"] is not None
        and raffle["closes_at"] <= instant
    )


def _read_prizes(execute: Execute, raffle: sqlite3.Row) -> list[dict[str, Any]]:
    """Return the prizes of a raffle in their order. Raises RaffleNotFound."""
    rows = execute(
        """
        SELECT name, amount
        FROM prize
        WHERE raffle = ?
        ORDER BY position
        """,
        (raffle["sequence"],),
    )
    prizes = [{"name": row["name"], "amount": row["amount"]} for row in rows]
    if not prizes:
        raise RaffleNotFound  # there are always some: it was deleted after it was found
    return prizes


def _read_wins(execute: Execute, sequence: int, limit: int, after: int = 0) -> Page:
    rows = execute(
        """
        SELECT win.position, win.ticket_number, prize.name AS prize, win.redeemed_at
        FROM win
        JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize_position
        WHERE win.raffle = ? AND win.position > ?
        ORDER BY win.position
        LIMIT ?
        """,
        (sequence, after, limit + 1),
    )
    wins = [
        {
            "ticket_number": row["ticket_number"],
            "prize": row["prize"],
            "redeemed_at": row["redeemed_at"],
        }
        for row in rows[:limit]
    ]
    next_cursor = rows[limit - 1]["position"] if len(rows) > limit else None
    return Page(wins, next_cursor)


def _public_members(
    row: sqlite3.Row | dict[str, Any], prizes: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return what anyone may know of a raffle now; without prizes in a list."""
    is_drawn = row["drawn_at"] is not None
    available_tickets = 0 if row["closed_at"] else row["total_tickets"] - row["issued_tickets"]
    return {
        "id": row["id"],
        "name": row["name"],
        "total_tickets": row["total_tickets"],
        "issued_tickets": row["issued_tickets"],
        "available_tickets": available_tickets,
        "winners_drawn": is_drawn,
        "replacements": row["replacements"],
        **({} if prizes is None else {"prizes": prizes}),
        "created_at": row["created_at"],
        "closes_at": row["closes_at"],
        "closed_at": row["closed_at"],
        "drawn_at": row["drawn_at"],
        "algorithm": draw.ALGORITHM,
        "draw_commitment": row["draw_commitment"],
        "randomness_source": row["randomness_source"],
        "public_randomness": row["public_randomness"],
        "secret": row["secret"].hex() if is_drawn else None,
    }


# Actions of the writing thread


def _close_due(connection: sqlite3.Connection, group: None, requests: list[None]) -> list[None]:
    """Close all raffles whose time has come."""
    _close_due_at(connection, now())
    return requests


def _close_due_at(connection: sqlite3.Connection, instant: str) -> None:
    connection.execute(
        """
        UPDATE raffle
        SET closed_at = closes_at
        WHERE closed_at IS NULL AND closes_at <= ?
        """,
        (instant,),
    )


def _insert_raffles(
    connection: sqlite3.Connection, group: None, requests: list[NewRaffle]
) -> list[Any]:
    """Store a raffle for each request; its outcome is the raffle, or why there is none."""
    return [_insert_raffle(connection, request) for request in requests]


def _insert_raffle(connection: sqlite3.Connection, request: NewRaffle) -> Any:
    created_at = now()
    if request.closes_at is not None:
        latest = datetime.strptime(created_at, TIME_FORMAT) + timedelta(days=MAX_DAYS_OPEN)
        if not created_at < request.closes_at <= latest.strftime(TIME_FORMAT):
            return ClosingTimeOutOfRange(created_at)

    raffle_id = str(uuid.uuid4())
    secret = secrets.token_bytes(32)
    sequence = connection.execute(
        """
        INSERT INTO raffle (
            id, name, total_tickets, randomness_source, secret, draw_commitment, address_key,
            created_at, closes_at
        )
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            raffle_id,
            request.name,
            request.total_tickets,
            request.randomness_source,
            secret,
            hashlib.sha256(secret).hexdigest(),
            secrets.token_bytes(32),
            created_at,
            request.closes_at,
        ),
    ).lastrowid
    connection.executemany(
        """
        INSERT INTO prize (raffle, position, name, amount)
        VALUES (?, ?, ?, ?)
        """,
        [
            (sequence, position, prize["name"], prize["amount"])
            for position, prize in enumerate(request.prizes, 1)
        ],
    )
    # Read before the commit: if that failed afterwards, what is stored would get 503.
    raffle = _find_raffle(connection.execute, raffle_id)
    return _public_members(raffle, _read_prizes(connection.execute, raffle))


def _delete_raffles(
    connection: sqlite3.Connection, group: None, requests: list[str]
) -> list[Exception | None]:
    """Delete the raffles with these ids; the outcome of one that is not deleted says why."""
    return [_delete_raffle(connection, raffle_id) for raffle_id in requests]


def _delete_raffle(connection: sqlite3.Connection, raffle_id: str) -> Exception | None:
    raffle = _first(_select_raffles(connection.execute, "WHERE id = ?", (raffle_id,)))
    if raffle is None:
        return RaffleNotFound()
    if raffle["issued_tickets"] > 0:
        return HasParticipants()
    connection.execute("DELETE FROM prize WHERE raffle = ?", (raffle["sequence"],))
    connection.execute("DELETE FROM raffle WHERE sequence = ?", (raffle["sequence"],))
    return None


def _issue_tickets(
    connection: sqlite3.Connection, raffle_id: str, requests: list[TicketRequest]
) -> list[Any]:
    """Issue a ticket for each request; its outcome is the number, or why there is none.

    All in few statements: under load, each costs the writing thread a wait for the
    interpreter lock.
    """
    instant = now()  # one for all of them
    raffle = _find_raffle(connection.execute, raffle_id)
    if _is_due(raffle, instant):
        _close_due_at(connection, instant)
        return [TicketsNoLongerAvailable() for _ in requests]
    if raffle["closed_at"]:
        return [TicketsNoLongerAvailable() for _ in requests]

    deal_key = draw.derive_deal_key(raffle_id, raffle["secret"])
    total_tickets = raffle["total_tickets"]
    place = raffle["issued_tickets"]
    hashes = [_hash_participant(raffle, request.participant) for request in requests]
    holders = _find_holders(connection, raffle, hashes)
    outcomes: list[Any] = []
    tickets = []
    for participant_hash, request in zip(hashes, requests):
        if place == total_tickets:
            outcomes.append(TicketsNoLongerAvailable())
        elif participant_hash in holders:
            outcomes.append(HasParticipated())
        else:
            place += 1
            number = draw.number_at(deal_key, total_tickets, place)
            holders.add(participant_hash)
            outcomes.append(number)
            code = (request.salt, request.iterations, request.code_hash)
            tickets.append((raffle["sequence"], number, participant_hash, *code))

    if tickets:
        _insert_tickets(connection, raffle, tickets, place, instant)
    return outcomes


def _find_holders(
    connection: sqlite3.Connection, raffle: sqlite3.Row, hashes: list[bytes]
) -> set[bytes]:
    """Return which of the participants have a ticket of the raffle."""
    marks = ", ".join("?" * len(hashes))
    rows = connection.execute(
        f"""
        SELECT participant_hash
        FROM ticket
        WHERE raffle = ? AND participant_hash IN ({marks})
        """,
        (raffle["sequence"], *hashes),
    ).fetchall()
    return {row["participant_hash"] for row in rows}


def _insert_tickets(
    connection: sqlite3.Connection,
    raffle: sqlite3.Row,
    tickets: list[tuple[Any, ...]],
    last_place: int,
    instant: str,
) -> None:
    """Store tickets; close the raffle, at an instant, if its last ticket is among them."""
    connection.executemany(
        """
        INSERT INTO ticket (raffle, number, participant_hash, salt, iterations, code_hash)
        VALUES (?, ?, ?, ?, ?, ?)
        """,
        tickets,
    )
    closed_at = None
    if last_place == raffle["total_tickets"]:
        closed_at = max(raffle["created_at"], instant)
    connection.execute(
        """
        UPDATE raffle
        SET issued_tickets = ?, closed_at = ?
        WHERE sequence = ?
        """,
        (last_place, closed_at, raffle["sequence"]),
    )


def _insert_replacements(
    connection: sqlite3.Connection, group: None, requests: list[NewReplacement]
) -> list[Any]:
    """Store a replacement for each request; its outcome is the replacement, or why there is none.

    It is None if the next ticket of the draw is no longer the one that was computed.
    """
    outcomes: list[Any] = []
    for request in requests:
        try:
            outcomes.append(_insert_replacement(connection, request))
        except REFUSALS_OF_REPLACEMENT as refusal:
            outcomes.append(refusal)
    return outcomes


def _insert_replacement(
    connection: sqlite3.Connection, request: NewReplacement
) -> dict[str, Any] | None:
    raffle = _find_raffle(connection.execute, request.raffle_id)
    _require_replaceable(connection.execute, raffle, request.replaced_ticket_number, request.prize)
    if raffle["replacements"] != request.number_of_replacements:
        return None

    [(position,)] = connection.execute(
        """
        UPDATE win
        SET ticket_number = ?
        WHERE raffle = ? AND ticket_number = ?
        RETURNING position
        """,
        (request.ticket_number, raffle["sequence"], request.replaced_ticket_number),
    ).fetchall()
    [(last_replaced_at,)] = connection.execute(
        """
        SELECT max(replaced_at)
        FROM replacement
        WHERE raffle = ?
        """,
        (raffle["sequence"],),
    ).fetchall()
    replaced_at = max(raffle["drawn_at"], last_replaced_at or "", now())
    connection.execute(
        """
        INSERT INTO replacement (
            raffle, sequence, position, replaced_ticket_number, ticket_number, reason,
            replaced_at
        )
        VALUES (?, ?, ?, ?, ?, ?, ?)
        """,
        (
            raffle["sequence"],
            raffle["replacements"] + 1,
            position,
            request.replaced_ticket_number,
            request.ticket_number,
            request.reason,
            replaced_at,
        ),
    )
    return {
        "ticket_number": request.ticket_number,
        "prize": request.prize,
        "replaced_ticket_number": request.replaced_ticket_number,
        "reason": request.reason,
        "replaced_at": replaced_at,
    }


# The draw, redemptions and replacements


REFUSALS_OF_REPLACEMENT = (
    RaffleNotFound,
    WinnersNotDrawn,
    TicketHasNotWon,
    TicketHasOtherPrize,
    TicketReplaced,
    PrizeAlreadyRedeemed,
    NoTicketsLeftToDraw,
)


def _drawn_places(raffle: sqlite3.Row) -> Iterator[int]:
    """Yield the places of a raffle in the order in which they are drawn."""
    return draw.drawn_places(
        raffle["id"], raffle["secret"], raffle["public_randomness"], raffle["issued_tickets"]
    )


def _prize_positions(prizes: list[dict[str, Any]]) -> Iterator[int]:
    """Yield the position of the prize of each win."""
    for position, prize in enumerate(prizes, 1):
        yield from itertools.repeat(position, prize["amount"])


def _require_redeemable(ticket: sqlite3.Row) -> None:
    """Raise TicketReplaced, TicketHasNotWon or PrizeAlreadyRedeemed unless a prize can be redeemed.

    ticket: row with replaced_by, replaced_at, prize and redeemed_at.
    """
    if ticket["replaced_by"] is not None:
        raise TicketReplaced(ticket["replaced_by"], ticket["replaced_at"])
    if ticket["prize"] is None:
        raise TicketHasNotWon
    if ticket["redeemed_at"] is not None:
        raise PrizeAlreadyRedeemed(ticket["redeemed_at"])


def _require_replaceable(
    execute: Execute, raffle: sqlite3.Row, ticket_number: int, prize: str
) -> None:
    """Raise one of REFUSALS_OF_REPLACEMENT unless the ticket can be replaced as winner of a prize.

    prize: its name.
    """
    if not raffle["drawn_at"]:
        raise WinnersNotDrawn
    ticket = _find_ticket_state(execute, raffle, ticket_number)
    if ticket["prize"] not in (None, prize):
        raise TicketHasOtherPrize(ticket["prize"])
    _require_redeemable(ticket)

    wins = draw.amount_of_wins(_read_prizes(execute, raffle), raffle["issued_tickets"])
    if wins + raffle["replacements"] >= raffle["issued_tickets"]:
        raise NoTicketsLeftToDraw


def _find_ticket_state(execute: Execute, raffle: sqlite3.Row, ticket_number: int) -> sqlite3.Row:
    """Return prize, redeemed_at, replaced_by and replaced_at of a ticket, or null for each.

    ticket_number: of any ticket, issued or not.
    """
    rows = execute(
        """
        SELECT prize.name AS prize, win.redeemed_at,
            replacement.ticket_number AS replaced_by, replacement.replaced_at
        FROM raffle
        LEFT JOIN win ON win.raffle = raffle.sequence AND win.ticket_number = ?
        LEFT JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize_position
        LEFT JOIN replacement
            ON replacement.raffle = raffle.sequence AND replacement.replaced_ticket_number = ?
        WHERE raffle.sequence = ?
        """,
        (ticket_number, ticket_number, raffle["sequence"]),
    )
    [row] = list(rows)
    return row


def _replacement_members(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "ticket_number": row["ticket_number"],
        "prize": row["prize"],
        "replaced_ticket_number": row["replaced_ticket_number"],
        "reason": row["reason"],
        "replaced_at": row["replaced_at"],
    }


# Participants and verification codes


CODE_BYTES = 15  # 120 bits
SALT_BYTES = 16  # NIST SP 800-132 asks for 128 bits or more
# NIST SP 800-132 asks for 1,000 or more. More would protect a password that can
# be guessed; a code of 120 random bits is past guessing at the first iteration.
ITERATIONS = 1_000
# From the base32 of RFC 4648 to Crockford's, without I, L, O and U:
# https://www.crockford.com/base32.html.
CROCKFORD = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "0123456789ABCDEFGHJKMNPQRSTVWXYZ")
LOOK_ALIKES = str.maketrans("OIL", "011")


def _hash_participant(raffle: sqlite3.Row, participant: bytes) -> bytes:
    """Return the 16 bytes that stand for a participant in one raffle."""
    return hmac.digest(raffle["address_key"], participant, "sha256")[:16]


def _derive_code(idempotency_key: str, salt: bytes) -> bytes:
    """Return the code that a key has with a salt: HMAC-SHA256 (RFC 2104), cut to 120 bits."""
    return hmac.digest(idempotency_key.encode(), b"verification code" + salt, "sha256")[:CODE_BYTES]


def _format_code(code_bytes: bytes) -> str:
    """Return the text of a code: six groups of four characters."""
    text = base64.b32encode(code_bytes).decode().translate(CROCKFORD)
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def _hash_code(code: str, salt: bytes, iterations: int) -> bytes:
    """Return the hash of a code (PBKDF2, RFC 8018) as people type, paste and scan it.

    Only letters and digits count, in any case and width, with O read as 0, and I
    and L as 1: scanners on other keyboard layouts turn the hyphens into anything.
    """
    # Filtered before upper(), because "ß".upper() is "SS".
    kept = re.sub("[^0-9A-Za-z]", "", unicodedata.normalize("NFKC", code))
    canonical = kept.upper().translate(LOOK_ALIKES)
    return hashlib.pbkdf2_hmac("sha256", canonical.encode(), salt, iterations)


def _is_code_of(ticket: sqlite3.Row, code: str) -> bool:
    """Return whether a code is that of a ticket, compared in constant time."""
    code_hash = _hash_code(code, ticket["salt"], ticket["iterations"])
    return hmac.compare_digest(code_hash, ticket["code_hash"])


# Time


def now() -> str:
    """Return the present time as all times here are written: RFC 3339, UTC, whole seconds."""
    return datetime.now(timezone.utc).strftime(TIME_FORMAT)
