"""The raffle as a REST service: routes, input rules, settings and the server.

This module speaks HTTP and no SQL; the rules of a raffle are in storage.py.
"""

import argparse
import ipaddress
import json
import logging
import os
import pkgutil
import re
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from contextlib import closing, suppress
from hashlib import sha256
from pathlib import Path
from urllib.error import HTTPError as HTTPFailure
from urllib.parse import urljoin
from urllib.request import urlopen

import waitress
from bottle import Bottle, HTTPError, request, response
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError, TransferEncodingNotImplemented
from waitress.task import ErrorTask
from waitress.utilities import BadRequest

import storage

VERSION = "1.0"

MAX_BODY = 2**20  # bytes
MAX_NAME = 200  # characters
MAX_RANDOMNESS = 1_000  # characters
STALLED = 30  # seconds that a client may let a connection rest, or take to send a request
FORWARDING_HEADERS = ("HTTP_X_FORWARDED_FOR", "HTTP_FORWARDED", "HTTP_X_REAL_IP", "HTTP_CLIENT_IP")

REFUSALS = {
    storage.RaffleNotFound: (404, "There is no raffle with this id"),
    storage.InvalidPage: (
        400,
        f"limit must be an integer from 1 to the longest page ({storage.MAX_RAFFLES_PER_PAGE} raffles, "
        f"{storage.MAX_WINS_PER_PAGE} wins), and cursor one that a Link header gave",
    ),
    storage.TicketsNoLongerAvailable: (410, "Tickets to this raffle are no longer available"),
    storage.AlreadyParticipated: (403, "Your ip address has already participated in this raffle"),
    storage.WinnersAlreadyDrawn: (403, "Winners for the raffle have already been drawn"),
    storage.TicketsStillAvailable: (403, "Winners can't be drawn when tickets are still available"),
    storage.ReceiptNotFound: (404, "Winners for the raffle have not been drawn yet"),
    storage.WinnersNotDrawn: (400, "Winners for the raffle have not been drawn yet"),
    storage.InvalidVerificationCode: (400, "Invalid verification code"),
    storage.StorageUnavailable: (503, "The raffles cannot be stored or read at the moment"),
}

log = logging.getLogger("raffle")


# Settings


class SettingError(ValueError):
    """A setting makes no sense; the message is one sentence that names it."""


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
        raise ValueError("'::ffff' is what is left of an IPv4-mapped address that has been cut")
    # Its bytes leave out the zone of fe80::1%eth0.
    return getattr(address, "ipv4_mapped", None) or ipaddress.ip_address(address.packed)


def _listen(text):
    match = re.fullmatch(r"(\[[^][%]+\]|[^][:]+):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ValueError(f"{text!r} is not an address and port such as 127.0.0.1:8080 or [::1]:8080")
    address = ipaddress.ip_address(match[1].strip("[]"))
    if (address.version == 6) != text.startswith("["):
        raise ValueError(f"{text!r} needs brackets around IPv6 and none around IPv4")
    return text


def _hosts(text):
    hosts = {host.strip().lower() for host in text.split(",")}
    for host in hosts:
        if not re.fullmatch(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?", host) and not _is_ipv6(host):
            raise ValueError(f"{host!r} is not a host name without its port")
    return hosts


def _is_ipv6(host):
    return host.startswith("[") and host.endswith("]") and ipaddress.IPv6Address(host[1:-1])


def _integer(lowest, highest):
    def parse(text):
        if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"{text!r} is not an integer from {lowest} to {highest}")
        return int(text)

    return parse


# name: (how its text is read, default, meaning)
SETTINGS = {
    "MANAGER_IPS": (
        _networks,
        [],
        "comma-separated addresses or networks (10.0.0.1, 10.1.0.0/16, ::1) that may create raffles and draw winners; "
        "none: nobody",
    ),
    "RAFFLE_DATABASE": (str, "raffle.db", "path of the SQLite file; created, readable by its owner only"),
    "RAFFLE_LISTEN": (
        _listen,
        "127.0.0.1:8080",
        "address and port ([::1]:8080 for IPv6); port 0 picks a free one, and the start line says which",
    ),
    # Measured: from 12 to 48 threads issue as many tickets, and on a slow disk more threads share a commit.
    "RAFFLE_THREADS": (
        _integer(1, 200),
        32,
        "requests that are worked on at the same time; more of them share a commit on a slow disk",
    ),
    "RAFFLE_TRUSTED_PROXY": (_address, None, "address of the one reverse proxy whose X-Forwarded-For is believed"),
    "RAFFLE_TRUSTED_PROXY_COUNT": (_integer(1, 100), 1, "how many proxies stand in a row"),
    "RAFFLE_HOSTS": (
        _hosts,
        None,
        "comma-separated host names that are answered, another Host is 421; none: all are answered",
    ),
    "RAFFLE_IPV6_PREFIX": (
        _integer(1, 128),
        128,
        "how many leading bits of an IPv6 address make one participant; 64 for the internet",
    ),
}


def setting(name, value=None):
    """Return the setting `name`: from `value` if given, else the environment, else its default.

    An empty environment variable counts as none. Raises SettingError.
    """
    parse, default, _ = SETTINGS[name]
    value = os.environ.get(name) if value is None else value
    try:
        return parse(value) if value else default
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from error


# What a request says


def refuse_cross_site():
    """Raise HTTPError 403 if a browser sends this request for a page of another site.

    An address is the only credential there is, and any page that its owner visits can send requests from it.
    The rule is that of Go 1.25's net/http.CrossOriginProtection; other clients than browsers send neither header.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    # Not request.get_header(), which fails at a header that is no UTF-8.
    site, origin = request.environ.get("HTTP_SEC_FETCH_SITE"), request.environ.get("HTTP_ORIGIN")
    if site:
        allowed = site in ("same-origin", "none")
    else:
        host = request.environ.get("HTTP_HOST", "")
        allowed = not origin or origin.partition("://")[2].lower() == host.lower()
    if not allowed:
        raise HTTPError(403, "A page of another site must not send this request")


def has_body():
    """Return whether the request has a body. One in chunks counts, whatever the server makes of it."""
    environ = request.environ
    return bool(environ.get("CONTENT_LENGTH", "").strip("0")) or "HTTP_TRANSFER_ENCODING" in environ


def json_object():
    """Return the request's body, one JSON object, as a dict. Raises HTTPError 415, 413, 400."""
    if request.content_type.partition(";")[0].strip() != "application/json":
        raise HTTPError(415, "The body must be sent as Content-Type: application/json")
    length = request.environ.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPError(400, "Content-Length must be a number of bytes")
    if int(length) > MAX_BODY:
        raise HTTPError(413, f"The body must not be longer than {MAX_BODY} bytes")
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
        raise HTTPError(400, "The body must not be nested so deep") from None
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
        raise ValueError(f"the member {twice!r} is there twice")
    return members


def _require(valid, member, expected):
    if not valid:
        raise HTTPError(400, f"{member} must be {expected}")


def _is_text(value, longest):
    # Half a surrogate pair is no character.
    return isinstance(value, str) and 1 <= len(value) <= longest and not re.search("[\ud800-\udfff]", value)


def require_name(value, member):
    """Raise HTTPError 400 if the value of `member` is not a name that can be stored."""
    valid = _is_text(value, MAX_NAME) and not value.isspace()
    _require(valid, member, f"a string of 1 to {MAX_NAME} characters, not blank")


def require_randomness(value, member):
    """Raise HTTPError 400 if the value of `member` is not text that can be stored and looked up."""
    _require(_is_text(value, MAX_RANDOMNESS), member, f"a string of 1 to {MAX_RANDOMNESS} characters")


def require_integer(value, member, highest=storage.MAX_TICKETS):
    """Raise HTTPError 400 if the value of `member` is not an integer from 1 to `highest`."""
    _require(type(value) is int and 1 <= value <= highest, member, f"an integer from 1 to {highest}")


def require_prizes(prizes, total_tickets):
    """Raise HTTPError 400 if `prizes` is not a list of prizes for at most `total_tickets` tickets."""
    _require(isinstance(prizes, list) and prizes, "prizes", "a non-empty list of objects with name and amount")
    for index, prize in enumerate(prizes):
        _require(isinstance(prize, dict), f"prizes[{index}]", "an object with name and amount")
        require_name(prize.get("name"), f"prizes[{index}].name")
        amount = prize.get("amount")
        _require(type(amount) is int and amount >= 1, f"prizes[{index}].amount", "an integer of 1 or more")
    if sum(prize["amount"] for prize in prizes) > total_tickets:
        raise HTTPError(400, "Too many prizes")


def idempotency_key():
    """Return the Idempotency-Key (draft-ietf-httpapi-idempotency-key-header), or None. Raises HTTPError 400."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    _require(key is None or re.fullmatch("[!-~]{16,255}", key), "Idempotency-Key", "16 to 255 visible ASCII characters")
    return key


def page_query(longest):
    """Return limit and cursor of the query as integers; 0, which storage refuses, for what is none."""

    def integer(name, default):
        texts = request.query.getall(name)
        if not texts:
            return default
        return int(texts[0]) if len(texts) == 1 and re.fullmatch("[1-9][0-9]{0,17}", texts[0]) else 0

    return integer("limit", longest), integer("cursor", None)


# What a response says


def link_next(path, cursor):
    """Add the Link header (RFC 8288) to the page at `path` that begins at `cursor`, if there is one."""
    if cursor is not None:
        limit = request.query.get("limit") if request.method != "POST" else None
        query = f"limit={limit}&cursor={cursor}" if limit else f"cursor={cursor}"
        response.set_header("Link", f'<{path}?{query}>; rel="next"')


def send_json(value, content_type="application/json"):
    """Set the headers that every response has, and return `value` as JSON text that ends a line, for terminals."""
    response.content_type = content_type
    response.set_header("X-Content-Type-Options", "nosniff")
    # Nearly everything changes with the next ticket, and a ticket is for its holder only.
    response.set_header("Cache-Control", "no-store")
    return json.dumps(value, ensure_ascii=False) + "\n"


def answer_json(callback):
    """Bottle plugin: send what a route returns as JSON, and what storage refuses as the table of refusals says."""

    def answer(**arguments):
        try:
            value = callback(**arguments)
        except tuple(REFUSALS) as refusal:
            raise HTTPError(*REFUSALS[type(refusal)]) from refusal
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
    body = {"type": "about:blank", "title": title, "status": int(status), "detail": error.body}
    return send_json(body, "application/problem+json")


# The application


def create_app(database=None, manager_ips=None):
    """Return the WSGI application. What is left out comes from the environment.

    database: path of the SQLite file. manager_ips: addresses and networks, a
    string as in MANAGER_IPS or a list of strings. `app.close()` ends its thread
    and its connections; so does the end of the process, or of the application.
    Raises SettingError, storage.SQLiteTooOld.
    """
    log.setLevel(logging.INFO)
    # Requests that wait for a thread are daily life, not worth a line each.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    managers = setting("MANAGER_IPS", manager_ips)
    hosts = setting("RAFFLE_HOSTS")
    ipv6_prefix = setting("RAFFLE_IPV6_PREFIX")
    proxy, proxy_count = setting("RAFFLE_TRUSTED_PROXY"), setting("RAFFLE_TRUSTED_PROXY_COUNT")
    if proxy_count > 1 and not proxy:
        raise SettingError("RAFFLE_TRUSTED_PROXY_COUNT: it means nothing without RAFFLE_TRUSTED_PROXY")
    try:
        raffles = storage.Storage(setting("RAFFLE_DATABASE", database))
    except storage.DatabaseRefused as error:
        raise SettingError(f"RAFFLE_DATABASE: {error}") from error
    if not managers:
        log.warning("MANAGER_IPS is empty: nobody can create raffles or draw winners")
    if proxy and any(proxy in network for network in managers):
        log.warning("MANAGER_IPS lists RAFFLE_TRUSTED_PROXY: what it sends without X-Forwarded-For is a manager's")

    app = Bottle()
    # In place of Bottle's own close(), which does nothing here.
    app.close = weakref.finalize(app, raffles.close)
    app.default_error_handler = problem
    app.install(answer_json)

    warned = set()
    warning = threading.Lock()

    def warn_once(message, *values):
        with warning:
            if message not in warned:
                warned.add(message)
                log.warning(message, *values)

    def client_address():
        """Return the ipaddress object the request comes from, an IPv4-mapped IPv6 address as its IPv4.

        REMOTE_ADDR, or what a trusted proxy says in X-Forwarded-For. waitress could read that, but it
        cuts IPv4-mapped addresses and takes the proxy for the client when the header is empty. Raises HTTPError 400.
        """
        environ = request.environ
        text = environ.get("REMOTE_ADDR", "")
        try:
            address = _address(text)
            if address == proxy and "HTTP_X_FORWARDED_FOR" in environ:
                text = environ["HTTP_X_FORWARDED_FOR"]
                text = text.split(",")[-proxy_count].strip(" \t")
                return _address(text)
        except (ValueError, IndexError):
            log.warning("A request came from %.100r, which is no address", text)
            raise HTTPError(400, "The address that the request comes from is not known") from None
        if address == proxy:
            warn_once(
                "A request from RAFFLE_TRUSTED_PROXY had no X-Forwarded-For, and counts as the proxy's own. "
                "If it was a client's, then all clients are one participant: have the proxy set the header"
            )
        return address

    def require_manager():
        address = client_address()
        if not any(address in network for network in managers):
            raise HTTPError(403, "Your ip address is not a manager's")
        return address

    def notice_proxy():
        if any(header in request.environ for header in FORWARDING_HEADERS):
            with suppress(ValueError):
                peer = _address(request.environ.get("REMOTE_ADDR", ""))
                if peer != proxy:
                    warn_once(
                        "A request from %s says who it was forwarded for, and is not believed. If a reverse proxy "
                        "is there, all its clients are one participant until RAFFLE_TRUSTED_PROXY names it",
                        peer,
                    )

    @app.hook("before_request")
    def prepare():
        environ = request.environ
        notice_proxy()
        if hosts and re.sub(r":[0-9]*$", "", environ.get("HTTP_HOST", "")).lower() not in hosts:
            raise HTTPError(421, "This host name is not served here")
        refuse_cross_site()
        # Bottle leaves out what is no UTF-8, and would take one path for another.
        if environ["PATH_INFO"].encode() != environ["bottle.raw_path"].encode("latin1"):
            raise HTTPError(404, "The path is not UTF-8")
        if not environ["PATH_INFO"].endswith("/"):
            environ["PATH_INFO"] += "/"

    @app.get("/")
    def index():
        return {"raffles": "/raffles/", "description": "/openapi.json", "health": "/health"}

    # Beside this module, which may be called __main__, or with it in a zip file.
    description = json.loads(pkgutil.get_data(storage.__name__, "openapi.json"))

    @app.get("/openapi.json/")
    def openapi():
        return description

    @app.get("/health/")
    def health():
        raffles.check_health()
        return {"status": "ok"}

    @app.post("/raffles/")
    def create_raffle():
        manager = require_manager()
        body = json_object()
        name, total_tickets, prizes = body.get("name"), body.get("total_tickets"), body.get("prizes")
        require_name(name, "name")
        require_integer(total_tickets, "total_tickets")
        require_prizes(prizes, total_tickets)
        raffle = raffles.create_raffle(name, total_tickets, prizes)
        log.info("Raffle %s created by %s", raffle["id"], manager)
        response.status = 201
        response.set_header("Location", f"/raffles/{raffle['id']}/")
        return raffle

    @app.get("/raffles/")
    def list_raffles():
        page, cursor = raffles.list_raffles(*page_query(storage.MAX_RAFFLES_PER_PAGE))
        link_next("/raffles/", cursor)
        return page

    @app.get("/raffles/<raffle_id>/")
    def get_raffle(raffle_id):
        return raffles.get_raffle(raffle_id)

    @app.post("/raffles/<raffle_id>/participate/")
    def participate(raffle_id):
        address, key = client_address(), idempotency_key()
        participant = address.packed
        if address.version == 6:
            host_bits = 128 - ipv6_prefix
            participant = (int(address) >> host_bits << host_bits).to_bytes(16, "big")
        ticket = raffles.issue_ticket(raffle_id, participant, key)
        response.status = 201
        return ticket

    @app.post("/raffles/<raffle_id>/winners/")
    def draw_winners(raffle_id):
        manager = require_manager()
        randomness = None
        if has_body():
            # A draw is for ever: so what looks as if it should have been public_randomness is no draw without it.
            randomness = json_object().get("public_randomness")
            require_randomness(randomness, "public_randomness")
        page, cursor = raffles.draw_winners(raffle_id, randomness)
        log.info("Winners of raffle %s drawn by %s", raffle_id, manager)
        response.status = 201
        link_next(f"/raffles/{raffle_id}/winners/", cursor)
        return page

    @app.get("/raffles/<raffle_id>/winners/")
    def list_winners(raffle_id):
        page, cursor = raffles.list_winners(raffle_id, *page_query(storage.MAX_WINS_PER_PAGE))
        link_next(f"/raffles/{raffle_id}/winners/", cursor)
        return page

    @app.get("/raffles/<raffle_id>/draw/")
    def get_receipt(raffle_id):
        return raffles.get_receipt(raffle_id)

    @app.post("/raffles/<raffle_id>/verify-ticket/")
    def verify_ticket(raffle_id):
        body = json_object()
        ticket_number, verification_code = body.get("ticket_number"), body.get("verification_code")
        require_integer(ticket_number, "ticket_number")
        _require(isinstance(verification_code, str), "verification_code", "a string")
        prize = raffles.verify_ticket(raffle_id, ticket_number, verification_code)
        return {"has_won": prize is not None, "prize": prize}

    return app


class Request(HTTPRequestParser):
    """A request that waitress receives, with the time at which it began."""

    def __init__(self, adj):
        super().__init__(adj)
        self.began = time.time()

    def parse_header(self, header_plus):
        """Parse the head of the request. Raises ParsingError, which is answered with 400."""
        goes_on = False
        try:
            super().parse_header(header_plus)
            # Two lengths are how a request is smuggled past a proxy (RFC 9112, 6.1).
            if self.chunked and "CONTENT_LENGTH" in self.headers:
                raise ParsingError("Both Content-Length and Transfer-Encoding")
            goes_on = self.body_rcv is not None and self.content_length < self.adj.max_request_body_size
        except (ValueError, TransferEncodingNotImplemented):
            # Half an IPv6 address as the host, or a Content-Length of thousands of digits: waitress would log
            # a traceback. Or an unknown transfer coding, which is no failure of the server.
            raise ParsingError("Malformed request") from None
        finally:
            # waitress would send 100 Continue to what is refused or has no body, and then wait for one for ever.
            self.expect_continue = self.expect_continue and goes_on

    def received(self, data):
        """Take in some bytes, and return how many of them."""
        consumed = super().received(data)
        # Every chunk costs the loop of waitress, which is everybody's, some microseconds, be it of a byte only.
        if self.chunked and self.body_bytes_received > max(2**16, 2 * len(self.body_rcv)):
            self.error = BadRequest("More than half of the body is chunk headers")
            self.completed = True
        return consumed


class Refusal(ErrorTask):
    """What waitress answers to malformed HTTP."""

    def execute(self):
        self.response_headers += [("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store")]
        super().execute()


class Channel(HTTPChannel):
    """A connection to waitress that answers the first of the requests it has got at once, and closes.

    Those who send many and read no answer would else fill the buffers and hold
    a thread for ever. HTTP allows it (RFC 9112, 9.3.2), and clients send the rest again.
    """

    parser_class = Request
    error_task_class = Refusal
    serving = False

    def service(self):
        self.serving = True
        with self.requests_lock:
            if len(self.requests) > 1:
                self.requests[0].headers["CONNECTION"] = "close"
        try:
            super().service()
        finally:
            self.serving = False

    # At the end of service() a worker may send 100 Continue while the loop sends the answer before it,
    # or has closed the connection: waitress does not lock there, and would send both twice.

    def send_continue(self):
        with self.outbuf_lock:
            if self.connected:
                super().send_continue()

    def _flush_some(self, do_close=True):
        with self.outbuf_lock:
            return super()._flush_some(do_close)


def close_stalled(server):
    """Close the connections where nothing has moved for STALLED seconds, or a request takes longer to arrive.

    The channel_timeout of waitress waits for those who do not read what was sent to them, and for those who
    send a byte now and then.
    """
    now = time.time()

    def is_stale(moment):
        return abs(now - moment) > STALLED  # either way, for the clock may have been put back

    for channel in list(server.active_channels.values()):
        # In this order: a thread adds to what is to be sent before it takes the request off the list.
        busy = channel.requests or channel.serving
        if not busy and (is_stale(channel.last_activity) or (channel.request and is_stale(channel.request.began))):
            channel.handle_close()


def run(server):
    """Say where the waitress server listens, and run it until SIGTERM or SIGINT.

    Then what has arrived is answered, for up to 5 seconds.

    server.run() would leave its loop at once, and with it what is still to be sent.
    """
    stopping = []

    def stop(signum, frame):
        if not stopping:
            stopping.append(signum)
            server.pull_trigger()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host = f"[{server.effective_host}]" if ":" in server.effective_host else server.effective_host
    print(f"Listening on http://{host}:{server.effective_port}", flush=True)
    swept = time.monotonic()
    while not stopping:
        wasyncore.loop(timeout=1, use_poll=True, map=server._map, count=1)
        if time.monotonic() > swept + 1:
            close_stalled(server)
            swept = time.monotonic()
    accepted = None
    while accepted != len(server.active_channels):
        accepted = len(server.active_channels)
        server.handle_accept()
    # The socket alone: the server's own close() would take the workers' way to wake the loop with it.
    wasyncore.dispatcher.close(server)
    wasyncore.loop(timeout=0, use_poll=True, map=server._map, count=1)
    deadline = time.monotonic() + 5
    while server.active_channels and time.monotonic() < deadline:
        for channel in list(server.active_channels.values()):
            if not channel.requests and not channel.total_outbufs_len:
                channel.handle_close()
        wasyncore.loop(timeout=0.1, use_poll=True, map=server._map, count=1)
    server.task_dispatcher.shutdown(timeout=1)
    wasyncore.close_all(server._map)


# What anyone can check


def fetch(source):
    """Return what a file or an address holds, from JSON, and the address of its next page or None.

    Raises OSError, ValueError.
    """
    if not re.match("https?://", source):
        return json.loads(Path(source).read_text(encoding="utf-8")), None
    with urlopen(source, timeout=60) as answer:
        link = re.match(r'<(.*)>; rel="next"', answer.headers.get("Link", ""))
        return json.load(answer), link and urljoin(source, link[1])


def require_receipt(receipt):
    """Raise ValueError if `receipt` is not of the form that GET /raffles/<id>/draw/ gives.

    The key of the draw is unambiguous only for an id and a secret of their fixed lengths.
    """
    time_form = "[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}Z"
    forms = {
        "raffle_id": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "draw_commitment": "[0-9a-f]{64}",
        "secret": "[0-9a-f]{64}",
        "public_randomness": f"(?s).{{1,{MAX_RANDOMNESS}}}",
        "sold_out_at": time_form,
        "drawn_at": time_form,
    }
    for name, form in forms.items():
        if not re.fullmatch(form, receipt[name]):
            raise ValueError(f"its {name} is not of the form that it should be")
    integers = [receipt["total_tickets"], *(prize["amount"] for prize in receipt["prizes"])]
    if len(integers) < 2 or not all(type(n) is int and 1 <= n <= storage.MAX_TICKETS for n in integers):
        raise ValueError("its total_tickets or its prizes are not of the form that they should be")


def check_draw(receipt, wins):
    """Yield a sentence on each thing that can be checked of a draw, and whether it holds.

    receipt: as GET /raffles/<id>/draw/ gives it. wins: all that GET
    /raffles/<id>/winners/ lists. Raises KeyError, TypeError, ValueError if they
    are not of that form.
    """
    require_receipt(receipt)
    secret, total = bytes.fromhex(receipt["secret"]), receipt["total_tickets"]
    prizes = [(prize["name"], prize["amount"]) for prize in receipt["prizes"]]
    listed = [(win["ticket_number"], win["prize"]) for win in wins]
    if not all(type(number) is int for number, _ in listed):
        raise ValueError("a ticket_number is not an integer")
    amount = sum(amount for _, amount in prizes)
    yield f"The draw was made by {storage.ALGORITHM}", receipt["algorithm"] == storage.ALGORITHM
    yield "The secret is the one of the commitment", sha256(secret).hexdigest() == receipt["draw_commitment"]
    counted = len(listed) == amount <= total
    yield f"There are {amount} wins, as many as prizes, for {total} tickets", counted
    yield "No ticket wins twice", len({number for number, _ in listed}) == len(listed)
    # Amounts without end are not drawn: they have no wins.
    drawn = counted and zip(
        storage.winning_numbers(receipt["raffle_id"], secret, receipt["public_randomness"], total, amount),
        storage.names_of_wins(prizes),
    )
    yield "The winners follow from the secret and the public randomness", counted and list(drawn) == listed
    yield "The list of wins is the one of the receipt", storage.digest_of_wins(listed) == receipt["wins_sha256"]
    yield "The last ticket went out before the draw", receipt["sold_out_at"] <= receipt["drawn_at"]


def check(sources):
    """Print what holds of the draw at a raffle's address, or of a saved receipt and list of wins; return 0 or 1."""
    try:
        results = []
        if len(sources) == 1:
            address = f"{sources[0].rstrip('/')}/"
            raffle, _ = fetch(address)
            receipt, _ = fetch(urljoin(address, "draw/"))
            require_receipt(receipt)
            wins, page = fetch(urljoin(address, "winners/"))
            amount = sum(prize["amount"] for prize in receipt["prizes"])
            while page and len(wins) <= amount:  # one win too many is enough to see that it is not right
                more, page = fetch(page)
                wins += more or [None]  # a page without wins ends the list, as one that cannot be right
            ids = {address.split("/")[-2], raffle["id"], receipt["raffle_id"]}
            same = all(raffle[name] == receipt[name] for name in ("total_tickets", "prizes", "draw_commitment"))
            results.append(("The receipt is of this raffle, its tickets and its prizes", len(ids) == 1 and same))
        else:
            (receipt, _), (wins, _) = map(fetch, sources)
        results += check_draw(receipt, wins)
    except Exception as error:  # there is no end to what a server that cheats may send
        said = str(error)
        if isinstance(error, HTTPFailure):
            with suppress(Exception):
                said += f": {error.read(1000).decode('utf-8', 'replace').strip()}"
        # As ASCII, or a server that cheats could write what it likes to the terminal.
        print(f"NOT CHECKED  There is no receipt and list of wins: {said!a}")
        return 1
    for sentence, holds in results:
        print(f"{'holds' if holds else 'FAILS'}  {sentence}")
    print("What no program can check for you:")
    print(f"- that the raffle showed this commitment before the draw: {receipt['draw_commitment']}")
    print(f"- that this is what had been announced, and known to nobody by {receipt['sold_out_at']}:")
    print(f"  {receipt['public_randomness']!a}")
    return 0 if all(holds for _, holds in results) else 1


# The program


def parse_arguments():
    """Return the sources to check, or none to serve; --help and --version end the program.

    Everything else is set in the environment.
    """
    settings = "".join(
        f"  {name} (default: {default or 'none'})\n      {meaning}\n"
        for name, (_, default, meaning) in SETTINGS.items()
    )
    parser = argparse.ArgumentParser(
        prog="raffle",
        description=f"Raffle {VERSION}: serve raffles over HTTP, or check a draw.",
        epilog=f"settings, read once at start from the environment:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raffle {VERSION}")
    command = parser.add_subparsers(metavar="").add_parser("check", help="check a draw, and exit with 0 if it holds")
    command.add_argument("sources", nargs="+", help="the raffle's address, or a saved receipt and a saved list of wins")
    arguments = parser.parse_args()
    sources = getattr(arguments, "sources", [])
    if len(sources) > 2:
        command.error("one address, or two files")
    return sources


def main():
    """Serve the application with waitress, as the environment says, or check a draw."""
    sources = parse_arguments()
    if sources:
        sys.exit(check(sources))

    import resource  # POSIX only, unlike the rest

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    # A thread that has hashed a code or written a row waits this long, in seconds, for one that computes
    # to let go of the interpreter. With the default of 0.005 the writing thread would starve under load.
    sys.setswitchinterval(0.001)
    # 1,024 are usual, but each connection has a file descriptor, and two more while long bodies are on the way.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 2048 if hard == resource.RLIM_INFINITY else min(2048, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        listen, threads = setting("RAFFLE_LISTEN"), setting("RAFFLE_THREADS")
        app = create_app()
    except (SettingError, storage.SQLiteTooOld) as error:
        sys.exit(str(error))
    with closing(app):
        try:
            server = waitress.create_server(
                app,
                listen=listen,
                threads=threads,
                # Each rests in memory and is looked at whenever another one moves: so not without end. Where few
                # files may be open, half of them are left to the database and to long bodies.
                connection_limit=min(500, files // 2),
                # select() would end at the 1,024th descriptor.
                asyncore_use_poll=True,
                # A short response leaves in one piece, sent by the loop of waitress. With the default of 1 the
                # worker sends head and body by itself, and the loop spins meanwhile: a tenth of the tickets.
                send_bytes=18000,
                # As much as common proxies pass on.
                max_request_header_size=32 * 1024,
                # Larger bodies than the application reads, so that it can say what is wrong with them.
                max_request_body_size=2 * MAX_BODY,
                # The application reads them itself: see client_address.
                clear_untrusted_proxy_headers=False,
                # Nobody needs to know what serves.
                ident=None,
            )
        except OSError as error:
            sys.exit(f"RAFFLE_LISTEN: {listen}: {error.strerror}")
        server.channel_class = Channel
        run(server)


if __name__ == "__main__":
    main()
