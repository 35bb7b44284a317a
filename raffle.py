"""The raffle as a REST service: the Bottle application with its settings, input rules and routes, and the command line.

The rules of a raffle and their SQL are in storage.py, the server is in server.py.
"""

import argparse
import difflib
import ipaddress
import json
import logging
import os
import pkgutil
import re
import sys
import weakref
from collections import Counter

from bottle import Bottle, HTTPError, request, response

import server
import storage

VERSION = "1.0"

MAX_BODY = 2**20  # bytes
MAX_TICKET_BODY = 4 * 2**10  # bytes
MAX_NAME = 200  # characters

# What storage refuses: the status, the rule's name and the detail of the response.
ERRORS = {
    storage.RaffleNotFound: (404, "no-such-raffle", "There is no raffle with this id"),
    storage.InvalidPage: (400, "invalid-page", "{}"),
    storage.TicketsNoLongerAvailable: (410, "no-tickets-left", "Tickets to this raffle are no longer available"),
    storage.RaffleAlreadyClosed: (403, "already-closed", "The raffle has already been closed"),
    storage.AlreadyParticipated: (
        403,
        "already-participated",
        "Your ip address has already participated in this raffle",
    ),
    storage.WinnersAlreadyDrawn: (403, "already-drawn", "Winners for the raffle have already been drawn"),
    storage.TicketsStillAvailable: (403, "tickets-left", "Winners can't be drawn when tickets are still available"),
    storage.ReceiptNotFound: (404, "not-drawn", "Winners for the raffle have not been drawn yet"),
    storage.PublicRandomnessRequired: (
        400,
        "randomness-required",
        "This raffle can only be drawn with public_randomness from its announced source: {}",
    ),
    storage.WinnersNotDrawn: (400, "not-drawn", "Winners for the raffle have not been drawn yet"),
    storage.InvalidVerificationCode: (400, "invalid-code", "Invalid verification code"),
    storage.TicketHasNotWon: (403, "no-prize", "This ticket has not won a prize"),
    storage.PrizeAlreadyRedeemed: (403, "already-redeemed", "The prize of this ticket was already redeemed at {}"),
    storage.DatabaseUnavailable: (503, None, "The database cannot be read or written at the moment"),
}

encode = json.JSONEncoder(ensure_ascii=False).encode
log = logging.getLogger("raffle")


class Refused(HTTPError):
    """A request is refused by the rule of this name, which the response's type repeats; None: the status says it all."""

    def __init__(self, status, rule, detail):
        super().__init__(status, detail)
        self.rule = rule


# Settings


class SettingError(ValueError):
    """A setting makes no sense; the message is one sentence that names it."""


def setting(name, value=None):
    """Return the setting `name`: from `value` if given, else from the environment, else its default.

    An empty environment variable counts as none. Raises SettingError.
    """
    parse, default, _ = SETTINGS[name]
    value = os.environ.get(name) if value is None else value
    try:
        return parse(value) if value else default
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from error


def require_known_settings():
    """Raise SettingError if the environment has an unknown RAFFLE_* or MANAGER_* variable."""
    # Kubernetes sets RAFFLE_SERVICE_..., RAFFLE_PORT_... and RAFFLE_PORT=tcp://... for a service of that name.
    foreign = ("RAFFLE_TEST_", "RAFFLE_SERVICE_", "RAFFLE_PORT_", "RAFFLE_PORT=tcp://")
    for name, value in os.environ.items():
        is_ours = name.startswith(("RAFFLE_", "MANAGER_")) and not f"{name}={value}".startswith(foreign)
        if is_ours and name not in SETTINGS:
            [nearest] = difflib.get_close_matches(name, SETTINGS, 1, cutoff=0)
            raise SettingError(f"{name}: there is no such setting; the nearest is {nearest}")


def _networks(text):
    entries = text.split(",") if isinstance(text, str) else text
    return [_network(entry.strip()) for entry in entries]


def _network(text):
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.ip_network((mapped, network.prefixlen - 96)) if mapped else network


def _address(text):
    address = ipaddress.ip_address(text)
    if address.packed == bytes(14) + b"\xff\xff":
        raise ValueError("'::ffff' is a truncated IPv4-mapped address")
    # Its bytes leave out the zone of fe80::1%eth0.
    return getattr(address, "ipv4_mapped", None) or ipaddress.ip_address(address.packed)


def _listen(text):
    match = re.fullmatch(r"(?:([0-9.]+)|\[([0-9a-fA-F:.]+)\]):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not an address and port such as 127.0.0.1:8080 or [::1]:8080")
    ipaddress.IPv4Address(match[1]) if match[1] else ipaddress.IPv6Address(match[2])
    return text


def _hosts(text):
    hosts = {host.strip().lower() for host in text.split(",")}
    for host in hosts:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f.]*:[0-9a-f.:]*\]", host):
            raise ValueError(f"{host!r} is not a host name without its port")
    return hosts


def _integer(lowest, highest):
    def parse(text):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"{text!r} is not an integer from {lowest} to {highest}")
        return int(text)

    return parse


# name: (how its text is read, default, meaning)
SETTINGS = {
    "MANAGER_IPS": (_networks, [], "Addresses or networks of managers, comma-separated. Unset: no managers."),
    "RAFFLE_DATABASE": (str, "raffle.db", "Path of the SQLite file. Created if missing, readable by its owner only."),
    "RAFFLE_LISTEN": (_listen, "127.0.0.1:8080", "Address and port; [::1]:8080 for IPv6. Port 0 picks a free one."),
    "RAFFLE_THREADS": (
        _integer(1, 200),
        64,
        "Requests handled at once. On a slow disk, more threads let more tickets share a commit.",
    ),
    "RAFFLE_TRUSTED_PROXY": (_address, None, "Address of the reverse proxy whose X-Forwarded-For is trusted."),
    "RAFFLE_TRUSTED_PROXY_COUNT": (_integer(1, 100), 1, "Number of proxies in a row."),
    "RAFFLE_HOSTS": (_hosts, None, "Host names this server answers to; any other gets 421. Unset: all."),
    "RAFFLE_IPV6_PREFIX": (
        _integer(1, 128),
        128,
        "Leading bits that identify an IPv6 participant. On the internet: 64.",
    ),
}


# The client


def client_address():
    """Return the address that the request comes from, an IPv4-mapped IPv6 address as its IPv4.

    It is REMOTE_ADDR, or what the trusted proxy says in X-Forwarded-For. waitress
    could read that header, but it cuts IPv4-mapped addresses and takes the proxy
    for the client when the header is empty. Raises HTTPError 400.
    """
    environ, settings = request.environ, request.app.settings
    proxy, forwarded = settings["RAFFLE_TRUSTED_PROXY"], environ.get("HTTP_X_FORWARDED_FOR")
    text = environ.get("REMOTE_ADDR", "")
    try:
        address = _address(text)
        if address == proxy and forwarded is not None:
            text = forwarded
            return _address(forwarded.split(",")[-settings["RAFFLE_TRUSTED_PROXY_COUNT"]].strip(" \t"))
    except (ValueError, IndexError):
        log.warning("No client address can be determined from %.100r", text)
        raise HTTPError(400, "The client's address cannot be determined") from None
    if address == proxy:
        warn_once("RAFFLE_TRUSTED_PROXY sent no X-Forwarded-For: its clients without one are one participant")
    elif forwarded is not None:
        warn_once("X-Forwarded-For was ignored: if a proxy sent it, set RAFFLE_TRUSTED_PROXY to the proxy's address")
    return address


def require_manager():
    """Return the manager's address that the request comes from. Raises HTTPError 403, 400."""
    address = client_address()
    if not any(address in network for network in request.app.settings["MANAGER_IPS"]):
        raise Refused(403, "not-a-manager", f"Your ip address {address} is not a manager's")
    return address


def participant():
    """Return the bytes that stand for the participant who sends the request. Raises HTTPError 400."""
    address = client_address()
    if address.version == 4:
        return address.packed
    host_bits = 128 - request.app.settings["RAFFLE_IPV6_PREFIX"]
    return (int(address) >> host_bits << host_bits).to_bytes(16, "big")


def warn_once(message):
    """Log a warning, unless the application has logged it before."""
    if message not in request.app.warned:
        request.app.warned.add(message)
        log.warning(message)


def refuse_cross_site():
    """Raise HTTPError 403 if a browser sends this request on behalf of another site's page (CSRF).

    An address is the only credential there is, and any page that its owner visits
    can send requests from it. The rule is that of Go 1.25's
    net/http.CrossOriginProtection; clients other than browsers send neither header.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    # Not request.get_header(), which fails at a header that is not UTF-8.
    site, origin = request.environ.get("HTTP_SEC_FETCH_SITE"), request.environ.get("HTTP_ORIGIN")
    if site:
        allowed = site in ("same-origin", "none")
    else:
        host = request.environ.get("HTTP_HOST", "")
        allowed = not origin or origin.partition("://")[2].lower() == host.lower()
    if not allowed:
        raise Refused(403, "cross-origin", "Cross-origin requests are not allowed")


# The request


def has_body():
    """Return whether the request has a body. A chunked body counts even without a Content-Length."""
    environ = request.environ
    return bool(environ.get("CONTENT_LENGTH", "").strip("0")) or "HTTP_TRANSFER_ENCODING" in environ


def json_object(max_length=MAX_BODY):
    """Return the request's body, one JSON object of up to `max_length` bytes, as a dict.

    Raises HTTPError 415, 413, 400.
    """
    if request.content_type.partition(";")[0].strip() != "application/json":
        raise HTTPError(415, "The body must be sent as Content-Type: application/json")
    if request.environ.get("HTTP_CONTENT_ENCODING", "identity") != "identity":
        raise HTTPError(415, "The body must not be compressed")
    length = request.environ.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPError(400, "Content-Length must be a number of bytes")
    if int(length) > max_length:
        raise HTTPError(413, f"The body must not be longer than {max_length} bytes")
    body = request.environ["wsgi.input"].read(int(length))
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_no_constant,
            # 20 digits are past every bound here, and turning a million of them into an integer takes long.
            parse_int=lambda digits: int(digits[:20]),
            object_pairs_hook=_unique_members,
        )
    except RecursionError:
        raise HTTPError(400, "The body must not be nested too deeply") from None
    except ValueError as error:
        raise HTTPError(400, f"The body must be one JSON object in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise HTTPError(400, "The body must be one JSON object")
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _unique_members(pairs):
    members = dict(pairs)
    if len(members) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the member {twice[:100]!r} occurs twice")
    return members


def _require(valid, member, expected):
    if not valid:
        raise HTTPError(400, f"{member} must be {expected}")


def require_text(value, member, longest):
    """Raise HTTPError 400 if the value of `member` is not text of 1 to `longest` characters that can be stored."""
    # Half a surrogate pair is no character.
    valid = (
        isinstance(value, str) and len(value) <= longest and value.strip() and not re.search("[\ud800-\udfff]", value)
    )
    _require(valid, member, f"a string of 1 to {longest} characters, not blank")


def require_integer(value, member):
    """Raise HTTPError 400 if the value of `member` is not a number of tickets."""
    valid = type(value) is int and 1 <= value <= storage.MAX_TICKETS
    _require(valid, member, f"an integer from 1 to {storage.MAX_TICKETS}")


def require_prizes(prizes, total_tickets):
    """Raise HTTPError 400 if `prizes` is not a list of prizes for at most `total_tickets` tickets."""
    _require(isinstance(prizes, list) and prizes, "prizes", "a non-empty list of objects with name and amount")
    for index, prize in enumerate(prizes):
        _require(isinstance(prize, dict), f"prizes[{index}]", "an object with name and amount")
        require_text(prize.get("name"), f"prizes[{index}].name", MAX_NAME)
        amount = prize.get("amount")
        _require(type(amount) is int and amount >= 1, f"prizes[{index}].amount", "an integer of 1 or more")
    if sum(prize["amount"] for prize in prizes) > total_tickets:
        raise Refused(400, "too-many-prizes", "Too many prizes")


def number_and_code():
    """Return ticket number and verification code of the request's body. Raises HTTPError 415, 413, 400."""
    body = json_object(MAX_TICKET_BODY)
    ticket_number, verification_code = body.get("ticket_number"), body.get("verification_code")
    require_integer(ticket_number, "ticket_number")
    _require(isinstance(verification_code, str), "verification_code", "a string")
    return ticket_number, verification_code


def idempotency_key():
    """Return the Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None. Raises HTTPError 400."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    _require(key is None or re.fullmatch("[!-~]{16,255}", key), "Idempotency-Key", "16 to 255 visible ASCII characters")
    return key


def page_query(longest):
    """Return limit and cursor of the query as integers; anything else becomes 0, which storage refuses."""

    def integer(name, default):
        texts = request.query.getall(name)
        if not texts:
            return default
        return int(texts[0]) if len(texts) == 1 and re.fullmatch("[1-9][0-9]{0,17}", texts[0]) else 0

    return integer("limit", longest), integer("cursor", None)


# The response


def link_next(path, cursor):
    """Add the Link header (RFC 8288) to the page at `path` that begins at `cursor`, if there is one."""
    if cursor is not None:
        limit = request.query.get("limit") if request.method != "POST" else None
        query = f"limit={limit}&cursor={cursor}" if limit else f"cursor={cursor}"
        response.set_header("Link", f'<{path}?{query}>; rel="next"')


def answer_json(callback):
    """Bottle plugin: send what a route returns as JSON, what storage refuses as the table of errors says, and log."""

    def answer(**arguments):
        try:
            value = callback(**arguments)
        except tuple(ERRORS) as error:
            status, rule, detail = ERRORS[type(error)]
            raise Refused(status, rule, detail.format(*error.args)) from error
        except HTTPError:
            raise
        except Exception as error:
            # Bottle would print the traceback to stderr, not to the log.
            log.exception("A request failed")
            raise HTTPError(500, "Internal Server Error") from error
        return send_json(value)

    return answer


def problem(error):
    """Bottle error handler: send any HTTPError as a problem (RFC 9457)."""
    status, _, title = error.status_line.partition(" ")
    if error.status_code == 405:
        # Bottle serves HEAD wherever it serves GET, but does not say so.
        methods = set(response.get_header("Allow").split(","))
        response.set_header("Allow", ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set()))))
    if error.status_code == 503:
        response.set_header("Retry-After", "5")
    rule = getattr(error, "rule", None)
    body = {
        "type": f"urn:raffle:{rule}" if rule else "about:blank",
        "title": title,
        "status": int(status),
        "detail": error.body,
    }
    return send_json(body, "application/problem+json")


def send_json(value, content_type="application/json"):
    """Set the headers that every response has, and return `value` as JSON text that ends a line, for terminals."""
    response.content_type = content_type
    response.set_header("X-Content-Type-Options", "nosniff")
    # Nearly everything changes with the next ticket, and a ticket is for its holder only.
    response.set_header("Cache-Control", "no-store")
    return encode(value) + "\n"


# Routes


routes = Bottle()
routes.install(answer_json)


@routes.get("/")
def index():
    return {"raffles": "/raffles/", "description": "/openapi.json", "health": "/health"}


@routes.get("/openapi.json/")
def openapi():
    return request.app.description


@routes.get("/health/")
def health():
    request.app.storage.database.require_health()
    return {"status": "ok"}


@routes.post("/raffles/")
def create_raffle():
    manager = require_manager()
    body = json_object()
    name, total_tickets, prizes = body.get("name"), body.get("total_tickets"), body.get("prizes")
    source = body.get("randomness_source")
    require_text(name, "name", MAX_NAME)
    require_integer(total_tickets, "total_tickets")
    require_prizes(prizes, total_tickets)
    if source is not None:
        require_text(source, "randomness_source", storage.MAX_RANDOMNESS)
    raffle = request.app.storage.create_raffle(name, total_tickets, prizes, source)
    log.info("Raffle %s created by %s", raffle["id"], manager)
    response.status = 201
    response.set_header("Location", f"/raffles/{raffle['id']}/")
    return raffle


@routes.get("/raffles/")
def list_raffles():
    page, cursor = request.app.storage.list_raffles(*page_query(storage.MAX_RAFFLES_PER_PAGE))
    link_next("/raffles/", cursor)
    return page


@routes.get("/raffles/<raffle_id>/")
def get_raffle(raffle_id):
    return request.app.storage.get_raffle(raffle_id)


@routes.post("/raffles/<raffle_id>/participate/")
def participate(raffle_id):
    ticket = request.app.storage.issue_ticket(raffle_id, participant(), idempotency_key())
    response.status = 201
    return ticket


@routes.post("/raffles/<raffle_id>/close/")
def close_raffle(raffle_id):
    manager = require_manager()
    raffle = request.app.storage.close_raffle(raffle_id)
    log.info("Raffle %s closed by %s", raffle_id, manager)
    return raffle


@routes.get("/raffles/<raffle_id>/tickets/")
def list_tickets(raffle_id):
    page, cursor = request.app.storage.list_tickets(raffle_id, *page_query(storage.MAX_TICKETS_PER_PAGE))
    link_next(f"/raffles/{raffle_id}/tickets/", cursor)
    return page


@routes.post("/raffles/<raffle_id>/winners/")
def draw_winners(raffle_id):
    manager = require_manager()
    # A draw cannot be undone, so one that may have been meant otherwise is refused.
    if request.query_string:
        raise HTTPError(400, "public_randomness must be sent in the body, and this request takes no query")
    randomness = None
    if has_body():
        randomness = json_object().get("public_randomness")
        require_text(randomness, "public_randomness", storage.MAX_RANDOMNESS)
    page, cursor = request.app.storage.draw_winners(raffle_id, randomness)
    log.info("Winners of raffle %s drawn by %s", raffle_id, manager)
    response.status = 201
    link_next(f"/raffles/{raffle_id}/winners/", cursor)
    return page


@routes.get("/raffles/<raffle_id>/winners/")
def list_winners(raffle_id):
    page, cursor = request.app.storage.list_winners(raffle_id, *page_query(storage.MAX_WINS_PER_PAGE))
    link_next(f"/raffles/{raffle_id}/winners/", cursor)
    return page


@routes.get("/raffles/<raffle_id>/draw/")
def get_receipt(raffle_id):
    return request.app.storage.get_receipt(raffle_id)


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


# The application


def create_app(database=None, manager_ips=None):
    """Return the WSGI application. What is left out comes from the environment.

    database: path of the SQLite file. manager_ips: addresses and networks, a
    string as in MANAGER_IPS or a list of strings. `app.close()` ends its thread
    and its connections; so does the end of the process, or of the application.
    Raises SettingError.
    """
    log.setLevel(logging.INFO)
    # Requests that wait for a thread are normal under load.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    app = Bottle()
    given = {"RAFFLE_DATABASE": database, "MANAGER_IPS": manager_ips}
    app.settings = {name: setting(name, given.get(name)) for name in SETTINGS}
    managers, proxy = app.settings["MANAGER_IPS"], app.settings["RAFFLE_TRUSTED_PROXY"]
    if app.settings["RAFFLE_TRUSTED_PROXY_COUNT"] > 1 and not proxy:
        raise SettingError("RAFFLE_TRUSTED_PROXY_COUNT: it has no effect without RAFFLE_TRUSTED_PROXY")
    # Beside storage.py, or with it in a zip file; this module may be called __main__.
    app.description = json.loads(pkgutil.get_data(storage.__name__, "openapi.json"))
    try:
        app.storage = storage.Storage(app.settings["RAFFLE_DATABASE"])
    except storage.DatabaseRefused as error:
        raise SettingError(f"RAFFLE_DATABASE: {error}") from error
    if not managers:
        log.warning("MANAGER_IPS is empty: there are no managers")
    if proxy and any(proxy in network for network in managers):
        log.warning("MANAGER_IPS lists RAFFLE_TRUSTED_PROXY: its requests without X-Forwarded-For have manager rights")
    # In place of Bottle's own close(), which does nothing here.
    app.close = weakref.finalize(app, app.storage.database.close)
    app.warned = set()
    app.default_error_handler = problem
    app.add_hook("before_request", prepare)
    app.merge(routes)
    return app


def prepare():
    """Bottle hook: refuse what no route should see, and complete the path with its last slash."""
    environ = request.environ
    hosts = request.app.settings["RAFFLE_HOSTS"]
    if hosts and re.sub(r":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower() not in hosts:
        raise HTTPError(421, "This host name is not served here")
    refuse_cross_site()
    # Bottle drops invalid UTF-8, so one path could match another.
    if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin1"):
        raise HTTPError(404, "The path is not UTF-8")
    if not environ["PATH_INFO"].endswith("/"):
        environ["PATH_INFO"] += "/"


# The command line


def main():
    """Serve the application, as the environment says, or copy its database."""
    copy = parse_arguments()
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    try:
        require_known_settings()
        if copy is not None:
            database = setting("RAFFLE_DATABASE")
            storage.backup(database, copy)
            print(f"{database} was copied to {copy}")
            return
        listen, threads = setting("RAFFLE_LISTEN"), setting("RAFFLE_THREADS")
        # Before the database is opened: a second server, started by mistake, must not touch it.
        try:
            listener = server.bind(listen)
        except OSError as error:
            raise SettingError(f"RAFFLE_LISTEN: {listen}: {os.strerror(error.errno)}") from error
        with listener:
            app = create_app()
            # Longer bodies than the application reads, so that it can say what is wrong with them.
            server.serve(app, listener, threads, max_body=2 * MAX_BODY, on_stop=app.storage.stop_draws)
    except (SettingError, storage.DatabaseRefused) as error:
        sys.exit(str(error))
    # Exit with 1 if commits remain in the -wal file.
    sys.exit(not app.close())


class LineFormatter(logging.Formatter):
    """Formats a record as one line of printable text, so that no request can forge a line; indents tracebacks."""

    def formatMessage(self, record):  # noqa: N802
        return _printable(super().formatMessage(record))

    def formatException(self, exc_info):  # noqa: N802
        lines = super().formatException(exc_info).splitlines()
        return "\n".join(f"    {_printable(line)}" for line in lines)


def _printable(text):
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def parse_arguments():
    """Return the path of the backup to make, or None to serve; --help and --version end the program."""
    settings = "".join(
        f"  {name} (default: {default or 'none'})\n      {meaning}\n"
        for name, (_, default, meaning) in SETTINGS.items()
    )
    parser = argparse.ArgumentParser(
        prog="raffle",
        usage="raffle [--help | --version | backup COPY]",
        description=f"Raffle {VERSION}: serve raffles over HTTP, or copy their database.",
        epilog=f"settings, read once at start from the environment (empty: default):\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raffle {VERSION}")
    parser.add_argument(
        "command", nargs="*", metavar="backup COPY", help="copy the database to a new file, even while it is served"
    )
    command = parser.parse_args().command
    if command and (command[0] != "backup" or len(command) != 2):
        parser.error("expected no arguments, to serve, or backup COPY")
    return command[1] if command else None


if __name__ == "__main__":
    main()
