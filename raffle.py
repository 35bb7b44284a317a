"""The raffle as a REST service: the Bottle application with its settings, input rules and routes, and the command line.

In this order: errors, settings, the client, the request, the response, routes, the application, the command line.
"""

import argparse
import ipaddress
import json
import logging
import math
import os
import pkgutil
import re
import sys
import weakref
from functools import partial

from bottle import Bottle, HTTPError, request, response

import server
import storage

VERSION = "1.0"
MAX_BODY = 2**20  # bytes
MAX_TICKET_BODY = 4 * 2**10  # bytes
MAX_NAME = 200  # characters
ADDRESS = r"(?:([0-9.]+)|\[([0-9a-fA-F.]*:[0-9a-fA-F:.]*)\])"  # before a port
# A proxy adds one of these to a request that it forwards. X-Forwarded-* is told by its beginning.
FORWARDING_HEADERS = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_CF_CONNECTING_IP")
MAX_WARNED_PEERS = 100  # so that nobody fills the log
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

# What storage refuses: status and detail of the response, and the rule that its type names.
ERRORS = {
    storage.RaffleNotFound: (404, "There is no raffle with this id", "no-such-raffle"),
    storage.InvalidPage: (400, "{}", "invalid-page"),
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

log = logging.getLogger("raffle")


class Refused(HTTPError):
    """A request is refused.

    rule: name that the response's type repeats, or None if the status says it
    all. members: what the problem has beside its usual members (RFC 9457, 3.2).
    """

    def __init__(self, status, detail, rule=None, **members):
        super().__init__(status, detail)
        self.kind = f"urn:raffle:{rule}" if rule else "about:blank"
        self.members = members


class SettingError(ValueError):
    """A setting makes no sense; the message is one sentence that names it."""


def read_settings(**given):
    """Return all settings: from `given`, else from the environment, else their defaults. Raises SettingError.

    None is not given, and an empty environment variable is not set.
    """
    settings = {}
    for name, (parse, default, _) in SETTINGS.items():
        value = os.environ.get(name) if given.get(name) is None else given[name]
        try:
            settings[name] = parse(value or default)
        except ValueError as error:
            raise SettingError(f"{name}: {error}") from error
    return settings


def _networks(text):
    entries = text.split(",") if isinstance(text, str) else text or ()
    networks = [ipaddress.ip_network(entry.strip()) for entry in entries]
    # Those of IPv4-mapped addresses as IPv4, as addresses are compared.
    mapped = [
        (network, getattr(network.network_address, "ipv4_mapped", None)) for network in networks
    ]
    return [
        ipaddress.ip_network((ipv4, net.prefixlen - 96)) if ipv4 else net for net, ipv4 in mapped
    ]


def _path(value):
    text = os.fspath(value)
    if not text.isprintable() or text != text.strip():
        raise ValueError(
            f"{text!r} has white space at an end, or characters that cannot be printed"
        )
    return text


def _listen(text):
    match = re.fullmatch(f"{ADDRESS}:([0-9]{{1,5}})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(
            f"{text!r} is not an address and port such as 127.0.0.1:8080 or [::1]:8080"
        )
    ipaddress.ip_address(match[1] or match[2])
    return text


def _hosts(text):
    # A final dot says that a name is complete.
    hosts = [host.strip().lower().rstrip(".") for host in text.split(",")] if text else []
    for host in hosts:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f.]*:[0-9a-f.:]*\]", host):
            raise ValueError(f"{host!r} is not a host name without its port")
    return hosts


def _integer(lowest, highest, text):
    if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        raise ValueError(f"{text!r} is not an integer from {lowest} to {highest}")
    return int(text)


# name: (function that reads its text, default, meaning)
SETTINGS = {
    "MANAGER_IPS": (_networks, None, "Managers' addresses or networks, comma-separated."),
    "RAFFLE_DATABASE": (_path, "raffle.db", "Path of the SQLite file, created if missing."),
    "RAFFLE_LISTEN": (
        _listen,
        "127.0.0.1:8080",
        "Address and port; [::1]:8080 for IPv6. Port 0 picks one.",
    ),
    "RAFFLE_THREADS": (partial(_integer, 1, 200), "64", "Requests handled at once."),
    "RAFFLE_TRUSTED_PROXIES": (_networks, None, "Proxies whose X-Forwarded-For is trusted."),
    "RAFFLE_HOSTS": (
        _hosts,
        None,
        "Host names to answer to; others get 421 (not /health). Unset: all.",
    ),
    "RAFFLE_IPV6_PREFIX": (
        partial(_integer, 1, 128),
        "128",
        "Bits that identify an IPv6 client. On the internet: 64.",
    ),
}


def client_address():
    """Return the address that the request comes from. Raises Refused 400.

    It is REMOTE_ADDR, or what trusted proxies say in X-Forwarded-For: from its
    right end, the first address that is not a trusted proxy's; if all are
    proxies', the leftmost.
    """
    proxies = request.app.settings["RAFFLE_TRUSTED_PROXIES"]
    forwarded = request.environ.get("HTTP_X_FORWARDED_FOR")
    entries = [] if forwarded is None else forwarded.split(",")

    text = request.environ.get("REMOTE_ADDR", "")
    try:
        address = _address(text)
        while entries and _is_in(address, proxies):
            text = entries.pop().strip(" \t")
            # Azure's gateways add the port.
            match = re.fullmatch(f"{ADDRESS}(?::[0-9]{{1,5}})?", text)
            address = _address(match[1] or match[2] if match else text)
    except ValueError:
        log.warning("No client address can be determined from %.100r", text)
        raise Refused(400, "The client's address cannot be determined") from None

    fault = forwarding_fault()
    if fault:
        warn_once(_address(request.environ["REMOTE_ADDR"]), fault)
    return address


def forwarding_fault():
    """Return a sentence on why nobody can tell whether a manager sent the request, or None.

    Behind a proxy that is not trusted, or that does not say for whom it asks,
    everyone has the proxy's address: often 127.0.0.1, which is often a manager's.
    """
    environ = request.environ
    peer = _address(environ["REMOTE_ADDR"])
    if _is_in(peer, request.app.settings["RAFFLE_TRUSTED_PROXIES"]):
        if "HTTP_X_FORWARDED_FOR" in environ:
            return None
        return (
            f"{peer} is in RAFFLE_TRUSTED_PROXIES but sent no X-Forwarded-For, so this request is not "
            "taken for a manager's: send X-Forwarded-For, or connect from an address that is no proxy's"
        )

    is_forwarded = any(
        name in FORWARDING_HEADERS or name.startswith("HTTP_X_FORWARDED_") for name in environ
    )
    if not is_forwarded:
        return None
    return (
        f"This request was forwarded by {peer}, which is not in RAFFLE_TRUSTED_PROXIES, so it is not "
        "taken for a manager's"
    )


def warn_once(peer, sentence):
    """Log a sentence on the first request from a peer, for a limited number of peers."""
    warned_peers = request.app.warned_peers
    if peer not in warned_peers and len(warned_peers) < MAX_WARNED_PEERS:
        warned_peers.add(peer)
        log.warning("%s", sentence)


def _address(text):
    address = ipaddress.ip_address(text)
    # An IPv4-mapped IPv6 address is its IPv4, and the bytes leave out the zone of fe80::1%eth0.
    return getattr(address, "ipv4_mapped", None) or ipaddress.ip_address(address.packed)


def _is_in(address, networks):
    return any(address in network for network in networks)


def require_manager():
    """Return the manager's address that the request comes from. Raises Refused 403, 400."""
    address = client_address()
    fault = forwarding_fault()
    if fault:
        raise Refused(403, fault, "not-a-manager")
    if not _is_in(address, request.app.settings["MANAGER_IPS"]):
        raise Refused(403, f"Your ip address {address} is not a manager's", "not-a-manager")
    return address


def participant():
    """Return the bytes that stand for the participant who sends the request. Raises Refused 400."""
    address = client_address()
    host_bits = 0 if address.version == 4 else 128 - request.app.settings["RAFFLE_IPV6_PREFIX"]
    return (int(address) >> host_bits << host_bits).to_bytes(len(address.packed), "big")


def json_object(max_length=MAX_BODY, is_optional=False):
    """Return the request's body, one JSON object of up to `max_length` bytes.

    is_optional: an empty body, of any type, is an empty object. Raises Refused
    411, 415, 413, 400.
    """
    body = read_body(max_length)
    if is_optional and not body:
        return {}
    if request.content_type.partition(";")[0].strip() != "application/json":
        raise Refused(415, "The body must be sent as Content-Type: application/json")
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


def read_body(max_length):
    """Return the bytes of the request's body, or its first `max_length` + 1 if it is longer.

    Without a Content-Length, a body is read only from a server that marks its end
    (wsgi.input_terminated): others would wait for more. Raises Refused 411 if there
    may be such a body, for otherwise it would be ignored. HTTP/1.x says so with
    Transfer-Encoding (RFC 9112, 6.3), later versions do not.
    """
    environ = request.environ
    wanted = min(request.content_length, max_length + 1)
    # Both: the transfer coding counts (RFC 9112, 6.3).
    if request.content_length < 0 or request.chunked:
        is_http_1 = environ.get("SERVER_PROTOCOL", "HTTP/1.1").startswith("HTTP/1.")
        if environ.get("wsgi.input_terminated"):
            wanted = max_length + 1
        elif request.chunked or not is_http_1:
            raise Refused(411, "The request must have a Content-Length")

    pieces = []
    while wanted > 0:
        # A read may return less than it was asked for, and the rest with the next one.
        piece = environ["wsgi.input"].read(wanted)
        if not piece:
            break
        pieces.append(piece)
        wanted -= len(piece)
    return b"".join(pieces)


def read_number(text):
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
    # No body has 10 million digits, which such an exponent could make up for.
    if text.startswith("-") or len(magnitude) > 7:
        return math.nan
    scale = int(magnitude or 0) * (-1 if exponent.startswith("-") else 1)
    zeros = scale - len(fraction) + len(digits) - len(significant)

    if not significant:
        return 0
    if zeros < 0 or len(significant) + zeros > 16:
        return math.nan
    return int(significant) * 10**zeros


def _refuse_constant(text):
    raise ValueError(f"{text} is not JSON")


def _unique_members(pairs):
    members = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the member {name[:100]!r} occurs twice")
        members[name] = value
    return members


def require(is_valid, member, expected, value, expected_type):
    """Raise Refused 400 if the value of `member` is not valid.

    expected: what it must be. expected_type: a value of JSON_TYPES; a value of
    another type is called by that.
    """
    if not is_valid:
        found_type = JSON_TYPES[type(value)]
        found = "" if found_type == expected_type else f", not {found_type}"
        raise Refused(400, f"{member} must be {expected}{found}")


def require_name(value, member):
    """Raise Refused 400 if the value of `member` is not a name."""
    # Half a surrogate pair is no character, and cannot be stored.
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    is_name = is_text and len(value) <= MAX_NAME and value.strip()
    require(is_name, member, f"a non-blank string of 1 to {MAX_NAME} characters", value, "a string")


def require_source(value, member):
    """Raise Refused 400 if the value of `member` is not text that people can copy and compare."""
    is_text = isinstance(value, str) and value.isprintable() and value == value.strip()
    is_source = is_text and 1 <= len(value) <= storage.MAX_RANDOMNESS
    length = f"1 to {storage.MAX_RANDOMNESS} printable characters"
    expected = f"a string of {length}, without a space at either end"
    require(is_source, member, expected, value, "a string")


def require_randomness(value, member):
    """Raise Refused 400 if the value of `member` is not public randomness.

    That is visible ASCII, because each character that cannot be seen, or looks
    like another one, would be a way to make other winners of the same randomness.
    """
    rule = f"1 to {storage.MAX_RANDOMNESS} visible ASCII characters with single spaces between"
    if not isinstance(value, str):
        raise Refused(
            400, f"{member} must be {rule}: it is {JSON_TYPES[type(value)]}, not a string"
        )
    if not value:
        raise Refused(400, f"{member} must be {rule}: it is empty")
    if len(value) > storage.MAX_RANDOMNESS:
        raise Refused(400, f"{member} must be {rule}: it has {len(value):,} characters")

    fault = re.search(r"[^ -~]|\A |  | \Z", value)
    if fault:
        what = CHARACTER_NAMES.get(fault[0], f"U+{ord(fault[0][0]):04X}")
        where = f"at character {fault.start() + 1}"
        if fault.end() == len(value):
            where = "at the end"
        raise Refused(400, f"{member} must be {rule}: it has {what} {where}")


def require_ticket_number(value, member):
    """Raise Refused 400 if the value of `member` is not from 1 to MAX_TICKETS."""
    is_valid = type(value) is int and 1 <= value <= storage.MAX_TICKETS
    expected = f"an integer from 1 to {storage.MAX_TICKETS}"
    require(is_valid, member, expected, value, "a number")


def require_prizes(prizes, total_tickets):
    """Raise Refused 400 if `prizes` is not a list of prizes for at most `total_tickets` tickets."""
    expected = "a non-empty list of objects with name and amount"
    require(isinstance(prizes, list) and prizes, "prizes", expected, prizes, "a list")
    for index, prize in enumerate(prizes):
        member = f"prizes[{index}]"
        expected = "an object with name and amount"
        require(isinstance(prize, dict), member, expected, prize, "an object")
        require_name(prize.get("name"), f"{member}.name")
        require_ticket_number(prize.get("amount"), f"{member}.amount")
    if sum(prize["amount"] for prize in prizes) > total_tickets:
        raise Refused(400, "Too many prizes", "too-many-prizes")


def read_ticket():
    """Return ticket number and verification code of the request's body. Raises Refused 411, 415, 413, 400."""
    body = json_object(MAX_TICKET_BODY)
    number, code = body.get("ticket_number"), body.get("verification_code")
    require_ticket_number(number, "ticket_number")
    require(isinstance(code, str), "verification_code", "a string", code, "a string")
    return number, code


def read_randomness():
    """Return the public randomness of the request's body, or None. Raises Refused 411, 415, 413, 400."""
    # A draw cannot be undone, so one that may have been meant otherwise is refused.
    if request.query_string:
        raise Refused(
            400, "public_randomness must be sent in the body, and this request takes no query"
        )
    body = json_object(is_optional=True)
    for name, value in body.items():
        if name != "public_randomness":
            raise Refused(
                400, f"The only member of the body must be public_randomness, not {name[:100]!r}"
            )
        require_randomness(value, name)
    return body.get("public_randomness")


def linked(page, cursor):
    """Return a page, with a Link header (RFC 8288) to the one that begins at `cursor`, if that is not None."""
    if cursor is not None:
        limit = request.query.get("limit")
        query = f"limit={limit}&cursor={cursor}" if limit else f"cursor={cursor}"
        response.set_header("Link", f'<{request.path.lower()}?{query}>; rel="next"')
    return page


def answer_json(callback):
    """Bottle plugin: send what a route returns as JSON, what storage refuses as the table of errors says, and log."""

    def answer(**arguments):
        try:
            # UUIDs are read in any case (RFC 9562), and there are no other arguments.
            value = callback(**{name: text.lower() for name, text in arguments.items()})
        except HTTPError:
            raise
        except Exception as error:
            if type(error) not in ERRORS:
                # Bottle would print the traceback to stderr, not to the log.
                log.exception("%s %s failed", request.method, request.path)
            status, detail, rule = ERRORS.get(type(error), (500, "Internal Server Error", None))
            refused = Refused(status, detail.format(*error.args), rule)
            if isinstance(error, storage.HasParticipated):
                # Shows whose address counts, as where a proxy or a container hides everyone behind its own.
                refused.members["address"] = str(client_address())
            raise refused from error
        return send_json(value)

    return answer


def problem(error):
    """Bottle error handler: send any HTTPError as a problem (RFC 9457)."""
    status, _, title = error.status_line.partition(" ")
    if error.status_code == 405:
        # Bottle serves HEAD wherever it serves GET, but does not say so.
        response.set_header(
            "Allow", response.get_header("Allow").replace("GET", "GET,HEAD").replace(",", ", ")
        )
    if error.status_code == 503:
        response.set_header("Retry-After", "5")
    kind = getattr(error, "kind", "about:blank")
    body = {"type": kind, "title": title, "status": int(status), "detail": error.body}
    body.update(getattr(error, "members", {}))
    return send_json(body, "application/problem+json")


def send_json(value, content_type="application/json"):
    """Set the headers that every response has, and return `value` as JSON text that ends a line, for terminals."""
    response.content_type = content_type
    response.set_header("X-Content-Type-Options", "nosniff")
    # Nearly everything changes with the next ticket, and a ticket is for its holder only.
    response.set_header("Cache-Control", "no-store")
    return json.dumps(value, ensure_ascii=False) + "\n"


routes = Bottle()
routes.install(answer_json)
routes.get(
    "/",
    callback=lambda: {"raffles": "/raffles/", "description": "/openapi.json", "health": "/health"},
)
routes.get("/openapi.json/", callback=lambda: request.app.description)
routes.get(
    "/raffles/<raffle_id>/", callback=lambda raffle_id: request.app.storage.get_raffle(raffle_id)
)


@routes.get("/health/")
def health():
    request.app.storage.require_health()
    return {"status": "ok"}


@routes.post("/raffles/")
def create_raffle():
    manager = require_manager()
    body = json_object()
    name, total_tickets, prizes, source = map(
        body.get, ("name", "total_tickets", "prizes", "randomness_source")
    )
    require_name(name, "name")
    require_ticket_number(total_tickets, "total_tickets")
    require_prizes(prizes, total_tickets)
    if source is not None:
        require_source(source, "randomness_source")
    raffle = request.app.storage.create_raffle(name, total_tickets, prizes, source)
    log.info("Raffle %s created by %s", raffle["id"], manager)
    response.status = 201
    response.set_header("Location", f"/raffles/{raffle['id']}/")
    return raffle


@routes.get("/raffles/")
def list_raffles():
    return linked(
        *request.app.storage.list_raffles(request.query.get("limit"), request.query.get("cursor"))
    )


@routes.post("/raffles/<raffle_id>/participate/")
def participate(raffle_id):
    # As draft-ietf-httpapi-idempotency-key-header says.
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not re.fullmatch("[!-~]{16,255}", key):
        raise Refused(400, "Idempotency-Key must be 16 to 255 visible ASCII characters")
    ticket = request.app.storage.issue_ticket(raffle_id, participant(), key)
    response.status = 201
    return ticket


@routes.post("/raffles/<raffle_id>/close/")
def close_raffle(raffle_id):
    manager = require_manager()
    raffle = request.app.storage.close_raffle(raffle_id)
    log.info("Raffle %s closed by %s", raffle_id, manager)
    return raffle


@routes.post("/raffles/<raffle_id>/winners/")
def draw_winners(raffle_id):
    manager = require_manager()
    wins = request.app.storage.draw_winners(raffle_id, read_randomness())
    log.info("Winners of raffle %s drawn by %s", raffle_id, manager)
    response.status = 201
    return linked(*wins)


@routes.get("/raffles/<raffle_id>/winners/")
def list_winners(raffle_id):
    limit, cursor = request.query.get("limit"), request.query.get("cursor")
    return linked(*request.app.storage.list_winners(raffle_id, limit, cursor))


@routes.post("/raffles/<raffle_id>/verify-ticket/")
def verify_ticket(raffle_id):
    return request.app.storage.verify_ticket(raffle_id, *read_ticket())


@routes.post("/raffles/<raffle_id>/redeem/")
def redeem_prize(raffle_id):
    manager = require_manager()
    redeemed = request.app.storage.redeem_prize(raffle_id, *read_ticket())
    log.info(
        "The prize of ticket %d of raffle %s redeemed by %s",
        redeemed["ticket_number"],
        raffle_id,
        manager,
    )
    response.status = 201
    return redeemed


def create_app(database=None, manager_ips=None):
    """Return the WSGI application. What is left out comes from the environment. Raises SettingError.

    database: path of the SQLite file. manager_ips: addresses and networks, a
    string as in MANAGER_IPS or a list of strings. `app.close()` ends its thread
    and its connections; so does the end of the process, or of the application.
    """
    app = Bottle()
    app.settings = read_settings(RAFFLE_DATABASE=database, MANAGER_IPS=manager_ips)
    log.info("Settings: %s", json.dumps(app.settings, default=str))
    # Beside storage.py, or with it in a zip file; this module may be called __main__.
    app.description = json.loads(pkgutil.get_data(storage.__name__, "openapi.json"))
    try:
        app.storage = storage.Storage(app.settings["RAFFLE_DATABASE"])
    except storage.DatabaseRefused as error:
        raise SettingError(f"RAFFLE_DATABASE: {error}") from error
    # In place of Bottle's own close(), which does nothing here.
    app.close = weakref.finalize(app, app.storage.database.close)
    app.warned_peers = set()
    app.default_error_handler = problem
    app.add_hook("before_request", prepare)
    app.merge(routes)
    return app


def prepare():
    """Bottle hook: refuse what no route should see, and complete the path with its last slash."""
    environ, hosts = request.environ, request.app.settings["RAFFLE_HOSTS"]
    # Bottle drops invalid UTF-8, so one path could match another.
    if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin1"):
        raise Refused(404, "The path is not UTF-8")
    if not environ["PATH_INFO"].endswith("/"):
        environ["PATH_INFO"] += "/"
    host = re.sub(":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower().rstrip(".")
    # Probes of /health send an address.
    if hosts and host not in hosts and environ["PATH_INFO"] != "/health/":
        raise Refused(421, "This host name is not served here")
    # What a browser sends for another site's page (CSRF): the rule is that of Go 1.25's net/http.CrossOriginProtection.
    # Other clients send neither header.
    site, origin = environ.get("HTTP_SEC_FETCH_SITE", ""), environ.get("HTTP_ORIGIN", "")
    same_origin = origin.partition("://")[2].lower() == environ.get("HTTP_HOST", "").lower()
    allowed = site in ("same-origin", "none") if site else same_origin or not origin
    if request.method not in ("GET", "HEAD", "OPTIONS") and not allowed:
        raise Refused(403, "Cross-origin requests are not allowed", "cross-origin")


def main():
    """Serve the application, as the environment says, or answer --help or --version."""
    lines = (
        f"  {name} ({default or 'none'})\n      {text}\n"
        for name, (_, default, text) in SETTINGS.items()
    )
    parser = argparse.ArgumentParser(
        prog="raffle",
        description=f"Raffle {VERSION}: serve raffles over HTTP.",
        epilog="settings, read once at start from the environment (default):\n" + "".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raffle {VERSION}")
    parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    logging.root.handlers[0].setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    # Requests that wait for a thread are normal under load.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        listen = read_settings()["RAFFLE_LISTEN"]
        try:
            # Before the database is opened, so that a start that fails leaves no file.
            listener = server.bind(listen)
        except OSError as error:
            raise SettingError(f"RAFFLE_LISTEN: {listen}: {os.strerror(error.errno)}") from error
        with listener:
            app = create_app()
            # Longer bodies than the application reads, so that it can say what is wrong with them.
            server.serve(
                app,
                listener,
                app.settings["RAFFLE_THREADS"],
                max_body=2 * MAX_BODY,
                is_over=lambda: app.storage.database.has_lost_commit,
            )
    except SettingError as error:
        sys.exit(str(error))
    app.close()
    if app.storage.database.has_lost_commit:
        sys.exit(1)  # so that a service manager starts it again


class LineFormatter(logging.Formatter):
    """Formats a record so that nothing a client sent can look like a line of its own, or control a terminal."""

    def format(self, record):
        text = super().format(record).replace("\n", "\n    ")
        return "".join(
            char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
        )


if __name__ == "__main__":
    main()
