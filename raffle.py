"""The raffle as a REST service: the Bottle application with its settings, input rules and routes, and the command line.

In this order: errors, settings, the client, the request, the response, routes, the application, the command line.
"""

import argparse
import ipaddress
import json
import logging
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
PRINTABLE = f"a string of 1 to {storage.MAX_RANDOMNESS} printable characters, without a space at either end"

# What storage refuses: status and detail of the response, and the rule that its type names.
ERRORS = {
    storage.RaffleNotFound: (404, "There is no raffle with this id", "no-such-raffle"),
    storage.InvalidPage: (400, "{}", "invalid-page"),
    storage.TicketsNoLongerAvailable: (410, "Tickets to this raffle are no longer available", "no-tickets-left"),
    storage.HasParticipated: (403, "Your ip address has already participated in this raffle", "already-participated"),
    storage.RaffleAlreadyClosed: (403, "The raffle has already been closed", "already-closed"),
    storage.WinnersAlreadyDrawn: (403, "Winners for the raffle have already been drawn", "already-drawn"),
    storage.TicketsStillAvailable: (403, "Winners can't be drawn when tickets are still available", "tickets-left"),
    storage.RandomnessRequired: (400, "The raffle is drawn with public_randomness from: {}", "randomness-required"),
    storage.WinnersNotDrawn: (400, "Winners for the raffle have not been drawn yet", "not-drawn"),
    storage.InvalidVerificationCode: (400, "Invalid verification code", "invalid-code"),
    storage.TicketHasNotWon: (403, "This ticket has not won a prize", "no-prize"),
    storage.PrizeAlreadyRedeemed: (403, "The prize of this ticket was already redeemed at {}", "already-redeemed"),
    storage.DatabaseUnavailable: (503, "The database cannot be read or written at the moment", None),
}

log = logging.getLogger("raffle")


class Refused(HTTPError):
    """A request is refused. rule: name that the response's type repeats, or None if the status says it all."""

    def __init__(self, status, detail, rule=None):
        super().__init__(status, detail)
        self.kind = f"urn:raffle:{rule}" if rule else "about:blank"


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
    mapped = [(network, getattr(network.network_address, "ipv4_mapped", None)) for network in networks]
    return [ipaddress.ip_network((ipv4, net.prefixlen - 96)) if ipv4 else net for net, ipv4 in mapped]


def _path(value):
    text = os.fspath(value)
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{text!r} has white space at an end, or characters that cannot be printed")
    return text


def _listen(text):
    match = re.fullmatch(f"{ADDRESS}:([0-9]{{1,5}})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not an address and port such as 127.0.0.1:8080 or [::1]:8080")
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
    "RAFFLE_LISTEN": (_listen, "127.0.0.1:8080", "Address and port; [::1]:8080 for IPv6. Port 0 picks one."),
    "RAFFLE_THREADS": (partial(_integer, 1, 200), "64", "Requests handled at once."),
    "RAFFLE_TRUSTED_PROXIES": (_networks, None, "Proxies whose X-Forwarded-For is trusted."),
    "RAFFLE_HOSTS": (_hosts, None, "Host names to answer to; others get 421 (not /health). Unset: all."),
    "RAFFLE_IPV6_PREFIX": (partial(_integer, 1, 128), "128", "Bits that identify an IPv6 client. On the internet: 64."),
}


def client_address():
    """Return the address that the request comes from. Raises Refused 400.

    It is REMOTE_ADDR, or what trusted proxies say in X-Forwarded-For: from its
    right end, the first address that is not a trusted proxy's, or the leftmost.
    """
    proxies, forwarded = request.app.settings["RAFFLE_TRUSTED_PROXIES"], request.environ.get("HTTP_X_FORWARDED_FOR")
    entries = [] if forwarded is None else forwarded.split(",")
    text = request.environ.get("REMOTE_ADDR", "")
    try:
        address = _address(text)
        if entries and not _is_in(address, proxies) and not request.app.warned:
            request.app.warned.append(address)
            log.warning("X-Forwarded-For was ignored: if %s is a proxy, add it to RAFFLE_TRUSTED_PROXIES", address)
        while entries and _is_in(address, proxies):
            text = entries.pop().strip(" \t")
            # Azure's gateways add the port.
            match = re.fullmatch(f"{ADDRESS}(?::[0-9]{{1,5}})?", text)
            address = _address(match[1] or match[2] if match else text)
    except ValueError:
        log.warning("No client address can be determined from %.100r", text)
        raise Refused(400, "The client's address cannot be determined") from None
    return address


def _address(text):
    address = ipaddress.ip_address(text)
    # An IPv4-mapped IPv6 address is its IPv4, and the bytes leave out the zone of fe80::1%eth0.
    return getattr(address, "ipv4_mapped", None) or ipaddress.ip_address(address.packed)


def _is_in(address, networks):
    return any(address in network for network in networks)


def require_manager():
    """Return the manager's address that the request comes from. Raises Refused 403, 400."""
    address = client_address()
    if not _is_in(address, request.app.settings["MANAGER_IPS"]):
        raise Refused(403, f"Your ip address {address} is not a manager's", "not-a-manager")
    return address


def participant():
    """Return the bytes that stand for the participant who sends the request. Raises Refused 400."""
    address = client_address()
    host_bits = 0 if address.version == 4 else 128 - request.app.settings["RAFFLE_IPV6_PREFIX"]
    return (int(address) >> host_bits << host_bits).to_bytes(len(address.packed), "big")


def json_object(max_length=MAX_BODY):
    """Return the request's body, one JSON object of up to `max_length` bytes. Raises Refused 415, 413, 400."""
    if request.content_type.partition(";")[0].strip() != "application/json":
        raise Refused(415, "The body must be sent as Content-Type: application/json")
    if request.content_length > max_length:
        raise Refused(413, f"The body must not be longer than {max_length} bytes")
    body = request.environ["wsgi.input"].read(max(0, request.content_length))
    try:
        # NaN and Infinity are not JSON. Integers of 20 digits are past every bound, and longer ones are slow to read.
        hooks = {"parse_constant": int, "parse_int": lambda digits: int(digits[:20])}
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_members, **hooks)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body must be one JSON object in UTF-8: {error}") from None
    expect(isinstance(value, dict), "The body", "one JSON object")
    return value


def _unique_members(pairs):
    members = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"the member {name[:100]!r} occurs twice")
        members[name] = value
    return members


def expect(is_valid, member, expected):
    """Raise Refused 400 if the value of `member` is not valid."""
    if not is_valid:
        raise Refused(400, f"{member} must be {expected}")


def expect_name(value, member):
    """Raise Refused 400 if the value of `member` is not a name."""
    # Half a surrogate pair is no character, and cannot be stored.
    is_text = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    is_name = is_text and len(value) <= MAX_NAME and value.strip()
    expect(is_name, member, f"a string of 1 to {MAX_NAME} characters, not blank")


def expect_randomness(value, member):
    """Raise Refused 400 if the value of `member` is not text that people can copy and compare."""
    is_text = isinstance(value, str) and value.isprintable() and value == value.strip()
    expect(is_text and 1 <= len(value) <= storage.MAX_RANDOMNESS, member, PRINTABLE)


def expect_integer(value, member):
    """Raise Refused 400 if the value of `member` is not a number of tickets."""
    is_valid = type(value) is int and 1 <= value <= storage.MAX_TICKETS
    expect(is_valid, member, f"an integer from 1 to {storage.MAX_TICKETS}")


def expect_prizes(prizes, total_tickets):
    """Raise Refused 400 if `prizes` is not a list of prizes for at most `total_tickets` tickets."""
    expect(isinstance(prizes, list) and prizes, "prizes", "a non-empty list of objects with name and amount")
    for index, prize in enumerate(prizes):
        expect(isinstance(prize, dict), f"prizes[{index}]", "an object with name and amount")
        expect_name(prize.get("name"), f"prizes[{index}].name")
        amount = prize.get("amount")
        expect(type(amount) is int and amount >= 1, f"prizes[{index}].amount", "an integer of 1 or more")
    if sum(prize["amount"] for prize in prizes) > total_tickets:
        raise Refused(400, "Too many prizes", "too-many-prizes")


def number_and_code():
    """Return ticket number and verification code of the request's body. Raises Refused 415, 413, 400."""
    body = json_object(MAX_TICKET_BODY)
    number, code = body.get("ticket_number"), body.get("verification_code")
    expect_integer(number, "ticket_number")
    expect(isinstance(code, str), "verification_code", "a string")
    return number, code


def public_randomness():
    """Return the public randomness of the request's body, or None. Raises Refused 415, 413, 400."""
    # A draw cannot be undone, so one that may have been meant otherwise is refused.
    if request.query_string:
        raise Refused(400, "public_randomness must be sent in the body, and this request takes no query")
    body = json_object() if request.content_length > 0 or request.chunked else {}
    for name, value in body.items():
        expect(name == "public_randomness", "The only member of the body", f"public_randomness, not {name[:100]!r}")
        expect_randomness(value, name)
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
            raise Refused(status, detail.format(*error.args), rule) from error
        return send_json(value)

    return answer


def problem(error):
    """Bottle error handler: send any HTTPError as a problem (RFC 9457)."""
    status, _, title = error.status_line.partition(" ")
    if error.status_code == 405:
        # Bottle serves HEAD wherever it serves GET, but does not say so.
        response.set_header("Allow", response.get_header("Allow").replace("GET", "GET,HEAD").replace(",", ", "))
    if error.status_code == 503:
        response.set_header("Retry-After", "5")
    kind = getattr(error, "kind", "about:blank")
    body = {"type": kind, "title": title, "status": int(status), "detail": error.body}
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
routes.get("/", callback=lambda: {"raffles": "/raffles/", "description": "/openapi.json", "health": "/health"})
routes.get("/openapi.json/", callback=lambda: request.app.description)
routes.get("/raffles/<raffle_id>/", callback=lambda raffle_id: request.app.storage.get_raffle(raffle_id))


@routes.get("/health/")
def health():
    request.app.storage.require_health()
    return {"status": "ok"}


@routes.post("/raffles/")
def create_raffle():
    manager = require_manager()
    body = json_object()
    name, total_tickets, prizes, source = map(body.get, ("name", "total_tickets", "prizes", "randomness_source"))
    expect_name(name, "name")
    expect_integer(total_tickets, "total_tickets")
    expect_prizes(prizes, total_tickets)
    if source is not None:
        expect_randomness(source, "randomness_source")
    raffle = request.app.storage.create_raffle(name, total_tickets, prizes, source)
    log.info("Raffle %s created by %s", raffle["id"], manager)
    response.status = 201
    response.set_header("Location", f"/raffles/{raffle['id']}/")
    return raffle


@routes.get("/raffles/")
def list_raffles():
    return linked(*request.app.storage.list_raffles(request.query.get("limit"), request.query.get("cursor")))


@routes.post("/raffles/<raffle_id>/participate/")
def participate(raffle_id):
    # As draft-ietf-httpapi-idempotency-key-header says.
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    expect(key is None or re.fullmatch("[!-~]{16,255}", key), "Idempotency-Key", "16 to 255 visible ASCII characters")
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
    wins = request.app.storage.draw_winners(raffle_id, public_randomness())
    log.info("Winners of raffle %s drawn by %s", raffle_id, manager)
    response.status = 201
    return linked(*wins)


@routes.get("/raffles/<raffle_id>/winners/")
def list_winners(raffle_id):
    limit, cursor = request.query.get("limit"), request.query.get("cursor")
    return linked(*request.app.storage.list_winners(raffle_id, limit, cursor))


@routes.post("/raffles/<raffle_id>/verify-ticket/")
def verify_ticket(raffle_id):
    return request.app.storage.verify_ticket(raffle_id, *number_and_code())


@routes.post("/raffles/<raffle_id>/redeem/")
def redeem_prize(raffle_id):
    manager = require_manager()
    redeemed = request.app.storage.redeem_prize(raffle_id, *number_and_code())
    log.info("The prize of ticket %d of raffle %s redeemed by %s", redeemed["ticket_number"], raffle_id, manager)
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
    app.warned = []
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
    lines = (f"  {name} ({default or 'none'})\n      {text}\n" for name, (_, default, text) in SETTINGS.items())
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


class LineFormatter(logging.Formatter):
    """Formats a record so that nothing a client sent can look like a line of its own, or control a terminal."""

    def format(self, record):
        text = super().format(record).replace("\n", "\n    ")
        return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


if __name__ == "__main__":
    main()
    if app.storage.database.has_lost_commit:
        sys.exit(1)  # so that a service manager starts it again
