"""The raffle as a REST service: the Bottle application and the program that serves it.

In this order: what is refused and how, what a request may hold, what is answered,
the routes, the application, the program.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pkgutil
import re
import socket
import sys
import weakref
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Callable

from bottle import Bottle, HTTPError, request, response

import client
import server
import storage
from settings import SETTINGS, SettingError, read_settings

VERSION = "1.0"
MAX_BODY = 2**20  # bytes
MAX_TICKET_BODY = 4 * 2**10  # bytes
MAX_NAME = 200  # characters
MAX_WARNED_PEERS = 100  # so that nobody fills the log

log = logging.getLogger("raffle")


# What is refused


# What storage.py and client.py refuse: the status, the detail, and the rule that the type names.
ERRORS = {
    client.UnknownAddress: (400, "The client's address cannot be determined", None),
    client.NotAManager: (403, "{}", "not-a-manager"),
    storage.RaffleNotFound: (404, "There is no raffle with this id", "no-such-raffle"),
    storage.ClosingTimeOutOfRange: (
        400,
        f"closes_at must be later than {{}}, and at most {storage.MAX_DAYS_OPEN} days later",
        None,
    ),
    storage.HasParticipants: (
        403,
        "Tickets of the raffle have been issued, so it cannot be deleted",
        "has-participants",
    ),
    storage.TicketsNoLongerAvailable: (
        410,
        "Tickets to this raffle are no longer available",
        "no-tickets-left",
    ),
    storage.HasParticipated: (
        403,
        "Your ip address has already participated in this raffle",
        "already-participated",
    ),
    storage.RaffleAlreadyClosed: (403, "The raffle has already been closed", "already-closed"),
    storage.ClosesByItself: (403, "The raffle closes by itself at {}", "closes-by-itself"),
    storage.WinnersAlreadyDrawn: (
        403,
        "Winners for the raffle have already been drawn",
        "already-drawn",
    ),
    storage.TicketsStillAvailable: (
        403,
        "Winners can't be drawn when tickets are still available",
        "tickets-left",
    ),
    storage.RandomnessRequired: (
        400,
        "The raffle is drawn with public_randomness from: {}",
        "randomness-required",
    ),
    storage.WinnersNotDrawn: (400, "Winners for the raffle have not been drawn yet", "not-drawn"),
    storage.InvalidVerificationCode: (400, "Invalid verification code", "invalid-code"),
    storage.TicketHasNotWon: (403, "This ticket has not won a prize", "no-prize"),
    storage.TicketHasOtherPrize: (403, "This ticket has won another prize: {}", "no-prize"),
    storage.TicketReplaced: (
        403,
        "The prize of this ticket went to ticket {} at {}",
        "no-prize",
    ),
    storage.NoTicketsLeftToDraw: (
        403,
        "Every ticket of the raffle has been drawn",
        "no-tickets-left-to-draw",
    ),
    storage.PrizeAlreadyRedeemed: (
        403,
        "The prize of this ticket was already redeemed at {}",
        "already-redeemed",
    ),
    storage.DatabaseUnavailable: (
        503,
        "The database cannot be read or written at the moment",
        None,
    ),
}


class Refused(HTTPError):
    """A request is refused.

    rule: name that the type of the problem repeats, or None if the status says it
    all. members: what the problem has beside its usual members (RFC 9457, 3.2).
    """

    def __init__(
        self,
        status: int,
        detail: str,
        rule: str | None = None,
        members: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(status, detail)
        self.problem_type = f"urn:raffle:{rule}" if rule else "about:blank"
        self.members = members or {}


def refusal_of(error: Exception) -> Refused:
    """Return how an exception is answered: by the table of errors, or as a 500 that is logged."""
    if type(error) not in ERRORS:
        # Bottle would print the traceback to stderr, not to the log.
        log.exception("%s %s failed", request.method, request.path)
        return Refused(500, "Internal Server Error")

    if isinstance(error, client.UnknownAddress):
        log.warning("No client address can be determined from %.100r", error.args[0])
    members = {}
    if isinstance(error, storage.HasParticipated):
        # Where a proxy or a container hides everyone behind its own address, this shows it.
        members["address"] = str(read_sender().address)
    status, detail, rule = ERRORS[type(error)]
    return Refused(status, detail.format(*error.args), rule, members)


# What a request may hold


JSON_TYPES = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    type(None): "null or missing",
}
CHARACTER_NAMES = {
    " ": "a space",
    "  ": "two spaces",
    "\t": "a tab (U+0009)",
    "\n": "a line feed (U+000A)",
    "\r": "a carriage return (U+000D)",
}


def read_sender() -> client.Sender:
    """Return who sent the request; log once of each proxy that hides whom it asks for.

    Raises client.UnknownAddress.
    """
    trusted_proxies = request.app.settings["RAFFLE_TRUSTED_PROXIES"]
    sender = client.find_sender(request.environ, trusted_proxies)
    if sender.fault:
        warned_peers = request.app.warned_peers
        if sender.peer not in warned_peers and len(warned_peers) < MAX_WARNED_PEERS:
            warned_peers.add(sender.peer)
            log.warning("%s", sender.fault)
    return sender


def require_manager() -> client.Address:
    """Return the address of the manager who sent the request.

    Raises client.UnknownAddress, client.NotAManager.
    """
    return client.require_manager(read_sender(), request.app.settings["MANAGER_IPS"])


def read_participant() -> bytes:
    """Return the bytes that identify who participates. Raises client.UnknownAddress."""
    prefix = request.app.settings["RAFFLE_IPV6_PREFIX"]
    return client.participant_bytes(read_sender().address, prefix)


def read_idempotency_key() -> str | None:
    """Return the Idempotency-Key of the request, or None. Raises Refused 400.

    After draft-ietf-httpapi-idempotency-key-header, but a key needs no quotes.
    """
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not re.fullmatch("[!-~]{16,255}", key):
        raise Refused(400, "Idempotency-Key must be 16 to 255 visible ASCII characters")
    return key


def read_page(maximum: int) -> tuple[int, int | None]:
    """Return the limit of the page that the query asks for, and its cursor or None.

    maximum: the highest limit, and the default. Raises Refused 400.
    """
    limit = request.query.get("limit", str(maximum))
    if not re.fullmatch("[1-9][0-9]{0,8}", limit) or int(limit) > maximum:
        raise Refused(400, f"limit must be an integer from 1 to {maximum}", "invalid-page")

    cursor = request.query.get("cursor")
    if cursor is None:
        return int(limit), None
    if not re.fullmatch("[1-9][0-9]{0,17}", cursor):
        raise Refused(400, "cursor must be one from a Link header", "invalid-page")
    return int(limit), int(cursor)


def read_object(max_length: int = MAX_BODY) -> dict[str, Any]:
    """Return the request's body, one JSON object of up to `max_length` bytes.

    Raises Refused 411, 400, 415, 413.
    """
    return parse_object(read_body(max_length) or b"", max_length)


def parse_object(body: bytes, max_length: int) -> dict[str, Any]:
    """Return the JSON object of a body that may be too long. Raises Refused 415, 413, 400."""
    media_type = request.content_type.partition(";")[0].strip()
    if media_type != "application/json":
        found = f"not {media_type[:100]!r}" if media_type else "and it has no type"
        raise Refused(415, f"The body must be sent as Content-Type: application/json, {found}")
    if len(body) > max_length:
        raise Refused(413, f"The body must not be longer than {max_length} bytes")

    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_members,
            parse_constant=_refuse_constant,
            parse_int=read_number,
            parse_float=read_number,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body must be one JSON object in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"The body must be one JSON object, not {JSON_TYPES[type(value)]}")
    return value


def read_body(max_length: int) -> bytes | None:
    """Return the bytes of the request's body, or None if it has none.

    Of a longer one, return the first `max_length` + 1. A body that may have been sent
    and cannot be read to its end is never taken for none. Raises Refused 411, 400.
    """
    environ = request.environ
    length = environ.get("CONTENT_LENGTH")
    # If both are sent, Transfer-Encoding counts (RFC 9112, 6.3).
    is_coded = "HTTP_TRANSFER_ENCODING" in environ
    if length and not is_coded:
        return _read_body_of_length(length, max_length)

    # In HTTP/1.x, a request with neither has no body. Later versions need neither.
    protocol = environ.get("SERVER_PROTOCOL", "HTTP/1.1")
    if protocol.startswith("HTTP/1.") and not is_coded:
        return None
    # Not all servers mark where such a body ends. HTTP/1.0 has no transfer codings.
    if protocol == "HTTP/1.0" or not environ.get("wsgi.input_terminated"):
        raise Refused(411, "The request must have a Content-Length")
    body = _read_input(max_length + 1)
    return body if body or is_coded else None


def _read_body_of_length(length: str, max_length: int) -> bytes | None:
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refused(400, "Content-Length must be a number of bytes")
    if int(length) == 0:
        return None
    wanted = min(int(length), max_length + 1)
    body = _read_input(wanted)
    if len(body) < wanted:
        raise Refused(400, "The body is shorter than its Content-Length")
    return body


def _read_input(wanted: int) -> bytes:
    """Return up to so many bytes of the body. Raises Refused 400."""
    pieces = []
    while wanted > 0:
        try:
            # May return less than it is asked for, and the rest with the next call.
            piece = request.environ["wsgi.input"].read(wanted)
        except Exception as error:  # each server has its own for malformed chunks and lost clients
            raise Refused(400, f"The body cannot be read: {type(error).__name__}") from error
        if not piece:
            break
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)


def read_number(text: str) -> int | float:
    """Return the value of a JSON number if it is an integer from 0 to 10^16, else NaN.

    However it is written: 300.0 and 3e2 are 300 (JSON Schema 2020-12, 6.1.1). The
    digits decide, because a float would round 9007199254740991.5, and because
    nothing may be computed from 1e999999999.
    """
    mantissa, _, exponent = text.lower().partition("e")
    integer, _, fraction = mantissa.partition(".")
    digits = (integer + fraction).lstrip("0")
    significant = digits.rstrip("0")

    magnitude = exponent.lstrip("+-0")
    # No body has the 10 million digits that could make up for a longer exponent.
    if text.startswith("-") or len(magnitude) > 7:
        return math.nan
    if not significant:
        return 0

    scale = -int(magnitude or 0) if exponent.startswith("-") else int(magnitude or 0)
    zeros = scale - len(fraction) + len(digits) - len(significant)
    if zeros < 0 or len(significant) + zeros > 16:
        return math.nan
    return int(significant) * 10**zeros


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the member {name[:100]!r} occurs twice")
        members[name] = value
    return members


def require(is_valid: Any, member: str, expected: str, value: Any, expected_type: str) -> None:
    """Raise Refused 400 if the value of `member` is not valid.

    expected: what it must be. expected_type: one of JSON_TYPES; a value of another
    type is called by that.
    """
    if not is_valid:
        found_type = JSON_TYPES[type(value)]
        found = "" if found_type == expected_type else f", not {found_type}"
        raise Refused(400, f"{member} must be {expected}{found}")


def require_name(value: Any, member: str) -> str:
    """Return the value of `member`, a name. Raises Refused 400."""
    # Half a surrogate pair is no character, and cannot be stored.
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    is_name = is_text and len(value) <= MAX_NAME and value.strip()
    expected = f"a non-blank string of 1 to {MAX_NAME} characters"
    require(is_name, member, expected, value, "a string")
    return value


def require_time(value: Any, member: str) -> str:
    """Return the value of `member`, a time in the form of all times here. Raises Refused 400.

    Zeros after the point, as JavaScript's toISOString writes them, are left out.
    """
    form = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.0+)?Z"
    text = f"{value[:19]}Z" if isinstance(value, str) and re.fullmatch(form, value) else ""
    expected = "a time in UTC such as 2026-12-24T18:00:00Z"
    require(_is_time(text), member, expected, value, "a string")
    return text


def _is_time(text: str) -> bool:
    try:
        datetime.strptime(text, storage.TIME_FORMAT)
    except ValueError:  # such as 30 February
        return False
    return True


def require_source(value: Any, member: str) -> str:
    """Return the value of `member`, text that people can read and copy. Raises Refused 400."""
    is_text = isinstance(value, str) and value.isprintable() and value == value.strip()
    is_source = is_text and 1 <= len(value) <= storage.MAX_RANDOMNESS
    length = f"1 to {storage.MAX_RANDOMNESS} printable characters"
    expected = f"a string of {length}, without a space at either end"
    require(is_source, member, expected, value, "a string")
    return value


def require_randomness(value: Any, member: str) -> str:
    """Return the value of `member`, public randomness. Raises Refused 400.

    That is visible ASCII: each character that cannot be seen, or looks like
    another one, would be a way to make other winners of the same randomness.
    """
    fault = _randomness_fault(value)
    if fault:
        length = f"1 to {storage.MAX_RANDOMNESS} visible ASCII characters"
        raise Refused(400, f"{member} must be {length} with single spaces between: it {fault}")
    return value


def _randomness_fault(value: Any) -> str | None:
    """Return what is wrong with a value as public randomness, and where; None if nothing is."""
    if not isinstance(value, str):
        return f"is {JSON_TYPES[type(value)]}, not a string"
    if not value:
        return "is empty"
    if len(value) > storage.MAX_RANDOMNESS:
        return f"has {len(value):,} characters"

    found = re.search(r"[^ -~]|\A |  | \Z", value)
    if not found:
        return None
    what = CHARACTER_NAMES.get(found[0], f"U+{ord(found[0][0]):04X}")
    if found.end() == len(value):
        return f"has {what} at the end"
    return f"has {what} at character {found.start() + 1}"


def require_integer(value: Any, member: str) -> int:
    """Return the value of `member`, an integer from 1 to MAX_TICKETS. Raises Refused 400."""
    is_valid = type(value) is int and 1 <= value <= storage.MAX_TICKETS
    require(is_valid, member, f"an integer from 1 to {storage.MAX_TICKETS}", value, "a number")
    return value


def require_prizes(prizes: Any, total_tickets: int) -> list[dict[str, Any]]:
    """Return the prizes, if they are a list for at most `total_tickets` tickets.

    Raises Refused 400.
    """
    expected = "a non-empty list of objects with name and amount"
    require(isinstance(prizes, list) and prizes, "prizes", expected, prizes, "a list")

    for index, prize in enumerate(prizes):
        member = f"prizes[{index}]"
        expected = "an object with name and amount"
        require(isinstance(prize, dict), member, expected, prize, "an object")
        require_name(prize.get("name"), f"{member}.name")
        require_integer(prize.get("amount"), f"{member}.amount")

    if sum(prize["amount"] for prize in prizes) > total_tickets:
        raise Refused(400, "Too many prizes", "too-many-prizes")
    return prizes


def read_ticket() -> tuple[int, str]:
    """Return ticket number and verification code of the request's body.

    Raises Refused 411, 415, 413, 400.
    """
    body = read_object(MAX_TICKET_BODY)
    number = require_integer(body.get("ticket_number"), "ticket_number")
    code: Any = body.get("verification_code")
    require(isinstance(code, str), "verification_code", "a string", code, "a string")
    return number, code


def read_replacement() -> tuple[int, str, str]:
    """Return ticket number, prize and reason of the request's body.

    A replacement cannot be undone, so one that may have been meant otherwise is
    refused. Raises Refused 411, 415, 413, 400.
    """
    body = read_object(MAX_TICKET_BODY)
    number = require_integer(body.pop("ticket_number", None), "ticket_number")
    prize = require_name(body.pop("prize", None), "prize")
    reason: Any = body.pop("reason", None)
    expected = f"one of {', '.join(storage.REASONS)}"
    require(reason in storage.REASONS, "reason", expected, reason, "a string")
    for name in body:
        members = "ticket_number, prize and reason"
        raise Refused(400, f"The only members of the body must be {members}, not {name[:100]!r}")
    return number, prize, reason


def read_randomness() -> str | None:
    """Return the public randomness of the request's body, or None.

    A draw cannot be undone, so one that may have been meant otherwise is refused.
    Raises Refused 411, 415, 413, 400.
    """
    if request.query_string:
        raise Refused(
            400, "public_randomness must be sent in the body, and this request takes no query"
        )
    body = read_body(MAX_BODY)
    if body is None:
        return None
    members = parse_object(body, MAX_BODY)
    for name, value in members.items():
        if name != "public_randomness":
            detail = f"The only member of the body must be public_randomness, not {name[:100]!r}"
            raise Refused(400, detail)
        require_randomness(value, name)
    return members.get("public_randomness")


# What is answered


def with_next_link(page: storage.Page) -> list[dict[str, Any]]:
    """Return the items of a page; add a Link header (RFC 8288) to the page after it, if any."""
    if page.next_cursor is not None:
        limit = request.query.get("limit")
        query = f"cursor={page.next_cursor}"
        if limit:
            query = f"limit={limit}&{query}"
        # A reference to the same path, whatever prefix a proxy has put before it.
        response.set_header("Link", f'<?{query}>; rel="next"')
    return page.items


def reference_to(raffle_id: str) -> str:
    """Return a reference (RFC 3986) from the list of raffles to one, behind any prefix."""
    # Relative to what was asked for, which may have no last slash.
    directory = "../" if request.environ["bottle.raw_path"].endswith("/") else ""
    return f"{directory}raffles/{raffle_id}/"


def answer_json(route: Callable[..., Any]) -> Callable[..., str]:
    """Bottle plugin: send what a route returns as JSON.

    What it raises is answered by the table of errors. A raffle_id is passed on in
    lower case, because UUIDs are read in any case (RFC 9562).
    """

    def answer(**arguments: str) -> str:
        if "raffle_id" in arguments:
            arguments["raffle_id"] = arguments["raffle_id"].lower()
        try:
            return send_json(route(**arguments))
        except HTTPError:
            raise
        except Exception as error:
            raise refusal_of(error) from error

    return answer


def problem(error: HTTPError) -> str:
    """Bottle error handler: send any HTTPError as a problem (RFC 9457)."""
    if error.status_code == 405:
        # Bottle serves HEAD wherever it serves GET, but does not say so.
        allowed = response.get_header("Allow").replace("GET", "GET,HEAD")
        response.set_header("Allow", allowed.replace(",", ", "))
    if error.status_code == 503:
        response.set_header("Retry-After", "5")

    status, _, title = error.status_line.partition(" ")
    body = {
        "type": getattr(error, "problem_type", "about:blank"),
        "title": title,
        "status": int(status),
        "detail": error.body,
        **getattr(error, "members", {}),
    }
    return send_json(body, "application/problem+json")


def send_json(value: Any, content_type: str = "application/json") -> str:
    """Set the headers of every response; return `value` as JSON that ends a line, for terminals.

    None has no body.
    """
    response.content_type = content_type
    response.set_header("X-Content-Type-Options", "nosniff")
    # Nearly everything changes with the next ticket, and a ticket is for its holder only.
    response.set_header("Cache-Control", "no-store")
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) + "\n"


# The routes


routes = Bottle()
routes.install(answer_json)


@routes.get("/")
def show_index() -> dict[str, str]:
    return {"raffles": "/raffles/", "description": "/openapi.json", "health": "/health"}


@routes.get("/openapi.json/")
def show_description() -> dict[str, Any]:
    return request.app.description


@routes.get("/health/")
def show_health() -> dict[str, str]:
    request.app.storage.require_writable()
    return {"status": "ok"}


@routes.post("/raffles/")
def create_raffle() -> dict[str, Any]:
    manager = require_manager()
    body = read_object()
    name = require_name(body.get("name"), "name")
    total_tickets = require_integer(body.get("total_tickets"), "total_tickets")
    prizes = require_prizes(body.get("prizes"), total_tickets)
    closes_at = body.get("closes_at")
    if closes_at is not None:
        closes_at = require_time(closes_at, "closes_at")
    source = body.get("randomness_source")
    if source is not None:
        require_source(source, "randomness_source")

    raffle = request.app.storage.create_raffle(name, total_tickets, prizes, closes_at, source)
    log.info("Raffle %s created by %s", raffle["id"], manager)
    response.status = 201
    response.set_header("Location", reference_to(raffle["id"]))
    return raffle


@routes.get("/raffles/")
def list_raffles() -> list[dict[str, Any]]:
    limit, before = read_page(storage.MAX_RAFFLES_PER_PAGE)
    return with_next_link(request.app.storage.list_raffles(limit, before))


@routes.get("/raffles/<raffle_id>/")
def show_raffle(raffle_id: str) -> dict[str, Any]:
    return request.app.storage.get_raffle(raffle_id)


@routes.delete("/raffles/<raffle_id>/")
def delete_raffle(raffle_id: str) -> None:
    manager = require_manager()
    request.app.storage.delete_raffle(raffle_id)
    log.info("Raffle %s deleted by %s", raffle_id, manager)
    response.status = 204


@routes.post("/raffles/<raffle_id>/participate/")
def participate(raffle_id: str) -> dict[str, Any]:
    key = read_idempotency_key()
    ticket = request.app.storage.issue_ticket(raffle_id, read_participant(), key)
    response.status = 201
    return ticket


@routes.post("/raffles/<raffle_id>/close/")
def close_raffle(raffle_id: str) -> dict[str, Any]:
    manager = require_manager()
    raffle = request.app.storage.close_raffle(raffle_id)
    log.info("Raffle %s closed by %s", raffle_id, manager)
    return raffle


@routes.post("/raffles/<raffle_id>/winners/")
def draw_winners(raffle_id: str) -> list[dict[str, Any]]:
    manager = require_manager()
    wins = request.app.storage.draw_winners(raffle_id, read_randomness())
    log.info("Winners of raffle %s drawn by %s", raffle_id, manager)
    response.status = 201
    return with_next_link(wins)


@routes.get("/raffles/<raffle_id>/winners/")
def list_winners(raffle_id: str) -> list[dict[str, Any]]:
    request.app.storage.require_raffle(raffle_id)
    limit, after = read_page(storage.MAX_WINS_PER_PAGE)
    return with_next_link(request.app.storage.list_winners(raffle_id, limit, after))


@routes.post("/raffles/<raffle_id>/verify-ticket/")
def verify_ticket(raffle_id: str) -> dict[str, Any]:
    number, code = read_ticket()
    return request.app.storage.verify_ticket(raffle_id, number, code)


@routes.post("/raffles/<raffle_id>/redeem/")
def redeem_prize(raffle_id: str) -> dict[str, Any]:
    manager = require_manager()
    number, code = read_ticket()
    redemption = request.app.storage.redeem_prize(raffle_id, number, code)
    log.info("The prize of ticket %d of raffle %s redeemed by %s", number, raffle_id, manager)
    response.status = 201
    return redemption


@routes.post("/raffles/<raffle_id>/replacements/")
def replace_winner(raffle_id: str) -> dict[str, Any]:
    manager = require_manager()
    number, prize, reason = read_replacement()
    replacement = request.app.storage.replace_winner(raffle_id, number, prize, reason)
    log.info(
        "Ticket %d of raffle %s replaced by ticket %d (%s) by %s",
        number,
        raffle_id,
        replacement["ticket_number"],
        reason,
        manager,
    )
    response.status = 201
    return replacement


@routes.get("/raffles/<raffle_id>/replacements/")
def list_replacements(raffle_id: str) -> list[dict[str, Any]]:
    request.app.storage.require_raffle(raffle_id)
    limit, after = read_page(storage.MAX_REPLACEMENTS_PER_PAGE)
    return with_next_link(request.app.storage.list_replacements(raffle_id, limit, after))


# The application


def create_app(
    database: str | os.PathLike[str] | None = None,
    manager_ips: str | Iterable[str] | None = None,
) -> Bottle:
    """Return the WSGI application. What is left out comes from the environment.

    database: path of the SQLite file. manager_ips: addresses and networks, a
    string as in MANAGER_IPS or a list of strings. `app.close()` ends its thread
    and its connections; so does the end of the process, or of the application.
    Raises settings.SettingError.
    """
    settings = read_settings(RAFFLE_DATABASE=database, MANAGER_IPS=manager_ips)
    log_settings(settings)
    return build_app(settings, open_storage(settings))


def log_settings(settings: dict[str, Any]) -> None:
    log.info("Settings: %s", json.dumps(settings, default=str))


def open_storage(settings: dict[str, Any], share: storage.Share = storage.ALONE) -> storage.Storage:
    """Return the storage of the database. Raises SettingError."""
    try:
        return storage.Storage(settings["RAFFLE_DATABASE"], share)
    except storage.DatabaseRefused as error:
        raise SettingError(f"RAFFLE_DATABASE: {error}") from error


def build_app(settings: dict[str, Any], opened: storage.Storage) -> Bottle:
    """Return the application with its settings and storage."""
    app = Bottle()
    app.settings = settings
    app.storage = opened
    # Beside storage.py, or with it in a zip file; this module may be called __main__.
    app.description = json.loads(pkgutil.get_data(storage.__name__, "openapi.json") or b"")
    # In place of Bottle's own close(), which does nothing here.
    app.close = weakref.finalize(app, opened.close)
    # A set to add to, because Bottle refuses to set an attribute twice.
    app.warned_peers = set()
    app.default_error_handler = problem
    app.add_hook("before_request", check_request)
    app.merge(routes)
    return app


def check_request() -> None:
    """Bottle hook: refuse what no route should see, and complete the path with its last slash."""
    require_utf8_path()
    if not request.environ["PATH_INFO"].endswith("/"):
        request.environ["PATH_INFO"] += "/"
    require_served_host()
    require_same_origin()


def require_utf8_path() -> None:
    """Raise Refused 404 if Bottle has dropped bytes of the path, so that it may match another."""
    path = request.environ["PATH_INFO"].encode()
    if path != request.environ["bottle.raw_path"].encode("latin1"):
        raise Refused(404, "The path is not UTF-8")


def require_served_host() -> None:
    """Raise Refused 421 if the Host of the request is not one of the setting."""
    # Health probes send an IP address as Host.
    is_probe = request.environ["PATH_INFO"] == "/health/"
    if not is_probe and not client.is_served_host(
        request.environ, request.app.settings["RAFFLE_HOSTS"]
    ):
        raise Refused(421, "This host name is not served here")


def require_same_origin() -> None:
    """Raise Refused 403 if a browser sent the request for a page of another site."""
    if not client.is_same_origin(request.environ):
        raise Refused(403, "Cross-origin requests are not allowed", "cross-origin")


# The program


def main() -> None:
    """Serve the application, as the environment says, or answer --help or --version."""
    parse_arguments()
    try:
        settings = read_settings()
        processes = settings["RAFFLE_PROCESSES"]
        set_up_log(processes)
        # Before the database is opened, so that a start that fails leaves no file.
        listener = open_listener(settings["RAFFLE_LISTEN"])
        log_settings(settings)
        with listener:
            if processes == 1:
                sys.exit(serve_alone(settings, listener))
            sys.exit(serve_together(settings, listener, processes))
    except SettingError as error:
        sys.exit(str(error))


def open_listener(listen: str) -> socket.socket:
    """Return a socket that listens at the address of the setting. Raises SettingError."""
    try:
        return server.bind(listen)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SettingError(f"RAFFLE_LISTEN: {listen}: {reason}") from error


def serve_alone(settings: dict[str, Any], listener: socket.socket) -> int:
    """Serve in this process; return the exit status. Raises SettingError."""

    def greet() -> None:
        print_address(listener)

    app = build_app(settings, open_storage(settings))
    return 1 if serve_app(app, listener, greet) == server.FAILED else 0


def serve_together(settings: dict[str, Any], listener: socket.socket, processes: int) -> str | int:
    """Serve in several processes; return what to end the program with. Raises SettingError."""
    # Once for all: what is refused, the creation of the file, and which file a path leads to.
    opened = open_storage(settings)
    share = storage.Share(processes, opened.file)
    opened.close()

    def run(child: server.Child) -> int:
        try:
            app = build_app(settings, open_storage(settings, share))
        except SettingError as error:
            child.report_refusal(str(error))
            return 1
        return serve_app(app, listener, child.report_listening, child.parent_pipe)

    def greet() -> None:
        print_address(listener)

    return server.run_processes(processes, run, listener, greet)


def serve_app(
    app: Bottle,
    listener: socket.socket,
    on_listening: Callable[[], None],
    parent_pipe: int | None = None,
) -> int:
    """Serve an application until a signal or the end of its parent; return the exit status.

    After a lost commit that is server.FAILED. The program then ends with 1, so that a
    service manager starts it again.
    """
    server.serve(
        app,
        listener,
        app.settings["RAFFLE_THREADS"],
        # Longer than the application reads, so that it can say what is wrong.
        max_body=2 * MAX_BODY,
        is_over=lambda: app.storage.has_lost_commit,
        on_listening=on_listening,
        parent_pipe=parent_pipe,
    )
    app.close()
    return server.FAILED if app.storage.has_lost_commit else 0


def print_address(listener: socket.socket) -> None:
    print(f"Listening on http://{server.address_of(listener)}", flush=True)


def parse_arguments() -> None:
    """Answer --help or --version, or refuse any other argument, and end the program."""
    lines = [
        f"  {name} ({setting.default or 'none'})\n      {setting.meaning}\n"
        for name, setting in SETTINGS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="raffle",
        description=f"Raffle {VERSION}: serve raffles over HTTP.",
        epilog="settings, read once at start from the environment (default):\n" + "".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raffle {VERSION}")
    parser.parse_args()


def set_up_log(processes: int) -> None:
    """Log to stderr; if there are several processes, with the id of each."""
    logging.basicConfig(level=logging.INFO)
    process = "" if processes == 1 else "%(process)d "
    formatter = LineFormatter(f"%(asctime)s {process}%(levelname)s %(message)s")
    logging.root.handlers[0].setFormatter(formatter)
    # Requests that wait for a thread are normal under load.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


class LineFormatter(logging.Formatter):
    """Formats a record so that nothing a client sent can look like a line of its own.

    Nor can it control a terminal.
    """

    def formatTime(  # noqa: N802, the name is logging's
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:
        # With the offset from UTC, in which the API has its times.
        local = datetime.fromtimestamp(record.created).astimezone()
        return local.isoformat(sep=" ", timespec="milliseconds")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n    ")
        return "".join(
            char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
        )


if __name__ == "__main__":
    main()
