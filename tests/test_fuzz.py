"""Requests of every shape, many of which no client would send: never a failure, never a hang, never a traceback."""

import json
import os
import random
import socket
import sqlite3
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

REQUESTS = int(os.environ.get("RAFFLE_TEST_FUZZ", "2500"))
CLIENTS = 8

NASTY_VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    2**53,
    2**63,
    10**400,
    "",
    " ",
    "1",
    "\0",
    "\ud800",
    "x" * 201,
    "é" * 200,
    [],
    [[]],
    {},
    [None],
    [{"name": "x"}],
    [{"name": "x", "amount": 0}],
    [{"name": "\udfff", "amount": 1}],
    float("nan"),
    float("inf"),
]
NASTY_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"name": "\xff"}',
    b'{"a": 1, "a": 2}',
    b"{" + b"".join(b'"%d":0,' % n for n in range(50_000)) + b'"49999":0}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 10_000,
    b'{"total_tickets": ' + b"9" * 5_000 + b"}",
    b'{"total_tickets": -' + b"9" * 5_000 + b"}",
    b'{"total_tickets": 1e999}',
    b" " * (2**20 + 1),
]
NASTY_TEXTS = [
    b"",
    b" ",
    b"/",
    b"..",
    b"%",
    b"%00",
    b"%0a",
    b"%ff",
    b"%c3%a9",
    b"%ed%a0%80",
    b"\xff",
    b"\x00",
    b"\x7f",
    b"'; DROP TABLE raffle; --",
    b"[::1",
    b"http://[::1/",
    b"://",
    b"9" * 5000,
    b"x" * 70_000,
]
METHODS = [
    b"GET",
    b"POST",
    b"HEAD",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"BREW",
    b"get",
    b"",
]
HEADERS = {
    b"Host": [b"127.0.0.1", b"x:1:2", b"[::1]:80", b"\xff"],
    b"Content-Type": [
        b"application/json",
        b"application/json ; charset=utf-16",
        b"text/plain",
        b"application/json;",
        b";",
    ],
    b"Content-Length": [b"0", b"1", b"-1", b"+5", b"0x10", b"1, 1", b"1048577", b"99999999999", b"9" * 5000, b"\xb2"],
    b"Transfer-Encoding": [b"chunked", b"gzip, chunked", b"gzip", b"chunked, chunked", b"identity", b"\x0bchunked"],
    b"Expect": [b"100-continue", b"200-ok"],
    b"Connection": [b"close", b"keep-alive", b"upgrade"],
    b"X-Forwarded-For": [b"10.0.0.1", b"::ffff:10.0.0.2", b"", b",", b"unknown", b"2001:db8::1%eth0", b"\xff", b'"'],
    b"Forwarded": [b"for=10.0.0.1"],
    b"Origin": [b"null", b"http://127.0.0.1", b"http://[::1", b"\xff"],
    b"Sec-Fetch-Site": [b"none", b"cross-site", b"\xff"],
    b"Idempotency-Key": [b"x" * 16, b"x" * 15, b"x" * 256, b"\xff" * 16],
    b"Cookie": [b"a=b", b'a="\\777"; =', b"\xff"],
    b"Range": [b"bytes=0-"],
    b"\xff": [b"x"],
    b"": [b"x"],
}


class Fuzzer:
    """Makes requests, out of what it has learnt from the answers to those before."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.raffles = [str(uuid.UUID(int=seed + 1))]
        self.tickets = [{"ticket_number": 1, "verification_code": "7K3M-9QXD-04TZ-WHE8-5C1N-VRP6"}]

    def chance(self, probability):
        return self.random.random() < probability

    def valid(self):
        """Return method, path and body of a request that the service understands."""
        raffle = b"/raffles/" + self.random.choice(self.raffles[-3:]).encode() + b"/"
        amount = self.random.randrange(1, 3)
        prizes = [{"name": "Pen", "amount": amount}] * self.random.randrange(1, 3)
        fair = {"name": "Fair", "total_tickets": self.random.randrange(1, 5), "prizes": prizes}
        ticket = dict(self.random.choice(self.tickets[-3:]))
        return self.random.choice(
            [
                (b"POST", b"/raffles/", fair),
                (b"POST", b"/raffles/", fair),
                (b"GET", b"/raffles/", None),
                (b"GET", raffle, None),
                (b"POST", raffle + b"participate/", None),
                (b"POST", raffle + b"participate/", None),
                (b"POST", raffle + b"participate/", None),
                (b"POST", raffle + b"winners/", None),
                (b"POST", raffle + b"winners/", {"public_randomness": "7 13 21"}),
                (b"GET", raffle + b"winners/", None),
                (b"GET", raffle + b"draw/", None),
                (b"GET", raffle + b"tickets/", None),
                *[(b"POST", raffle + b"close/", None)] * self.chance(0.2),
                (b"POST", raffle + b"redeem/", ticket),
                (b"GET", self.random.choice([b"/", b"/health/", b"/openapi.json"]), None),
                (b"POST", raffle + b"verify-ticket/", ticket),
            ]
        )

    def query(self):
        if self.chance(0.8):
            return b""
        names, values = [b"limit", b"cursor", b"x"], [b"1", b"0", b"-1", b"1000", b"10000", b"10001", b"%00", b"x", b""]
        pairs = [self.random.choice(names) + b"=" + self.random.choice(values + NASTY_TEXTS) for _ in range(2)]
        return b"?" + b"&".join(pairs[: self.random.randrange(1, 3)])

    def body(self, value):
        if self.chance(0.1):
            return self.random.choice(NASTY_BODIES)
        if self.chance(0.05):
            return bytes(self.random.randrange(256) for _ in range(self.random.randrange(200)))
        if value is None:
            return b""
        if self.chance(0.3):
            value[self.random.choice(list(value))] = self.random.choice(NASTY_VALUES)
        encoding = "utf-16" if self.chance(0.03) else "utf-8"
        return json.dumps(value, ensure_ascii=self.chance(0.5)).encode(encoding, "surrogatepass")

    def request(self):
        """Return the bytes of a request, most often of one that is nearly right."""
        method, path, value = self.valid()
        path += self.query()
        if self.chance(0.1):
            path = path.replace(b"/", self.random.choice([b"", b"//", b"%2f", b"/x/"]))
        if self.chance(0.1):
            position = self.random.randrange(len(path) + 1)
            path = path[:position] + self.random.choice(NASTY_TEXTS) + path[position:]
        body = self.body(value)
        if self.chance(0.1):
            method = self.random.choice(METHODS)
        headers = [(b"Host", b"127.0.0.1"), (b"Content-Type", b"application/json"), (b"Connection", b"close")]
        if self.chance(0.2):
            name = self.random.choice(list(HEADERS))
            headers.append((name, self.random.choice(HEADERS[name] + NASTY_TEXTS)))
        if not any(name == b"Transfer-Encoding" for name, _ in headers) or self.chance(0.5):
            headers.append((b"Content-Length", b"%d" % len(body)))
        elif self.chance(0.8):
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        self.random.shuffle(headers)
        version = b"HTTP/1.1" if self.chance(0.95) else self.random.choice([b"HTTP/1.0", b"HTTP/2.0", b"", b"x"])
        lines = [method + b" " + path + b" " + version, *(b"%s: %s" % header for header in headers), b"", body]
        data = b"\r\n".join(lines)
        if self.chance(0.05):
            position = self.random.randrange(len(data))
            data = data[:position] + self.random.choice(NASTY_TEXTS) + data[position + self.random.randrange(3) :]
        return data

    def learn(self, answer):
        """Check an answer, and keep the raffle or the ticket that it may hold."""
        if not answer:
            return  # the request was not complete
        while answer.startswith(b"HTTP/1.1 100 "):
            answer = answer.partition(b"\r\n\r\n")[2]
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split(b" ")[1]
        # waitress knows no Transfer-Encoding but chunked.
        assert b"200" <= status < b"500" or status == b"501", answer[:300]
        assert b"X-Content-Type-Options: nosniff" in head, answer[:300]
        if body and b"json" in head:
            value = json.loads(body)
            if status == b"201" and "id" in value:
                self.raffles.append(value["id"])
            elif status == b"201" and "ticket_number" in value:
                self.tickets.append(value)


def exchange(server, source, data):
    """Send bytes from an address, and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", int(server.port)), 60, (source, 0)) as connection:
        # What keeps it from being sent shows in what is received.
        with suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
        return received


def test_no_request_brings_the_server_down(serve, database):
    server = serve(MANAGER_IPS="127.0.0.1, 127.0.0.2, 127.0.0.4, 10.0.0.1", RAFFLE_TRUSTED_PROXY="127.0.0.3")

    def run(seed):
        fuzzer = Fuzzer(seed)
        for _ in range(REQUESTS // CLIENTS):
            data = fuzzer.request()
            source = f"127.0.0.{fuzzer.random.randrange(1, 7)}"
            try:
                fuzzer.learn(exchange(server, source, data))
            except Exception as error:
                raise AssertionError(f"from {source}: {data[:500]!r}") from error
        return fuzzer

    with ThreadPoolExecutor(CLIENTS) as pool:
        fuzzers = list(pool.map(run, range(CLIENTS)))
    assert server.request("GET", "/raffles/")[0] == 200
    assert server.stop() == 0
    log = server.log.read_text()
    assert "Traceback" not in log
    assert " ERROR " not in log
    # Or else it has not come far.
    assert sum(len(fuzzer.raffles) for fuzzer in fuzzers) > REQUESTS / 100
    assert sum(len(fuzzer.tickets) for fuzzer in fuzzers) > REQUESTS / 100
    assert_invariants(database)


def assert_invariants(database):
    with closing(sqlite3.connect(database)) as connection:

        def rows(sql):
            return connection.execute(sql).fetchall()

        assert rows("PRAGMA integrity_check") == [("ok",)]
        assert rows("PRAGMA foreign_key_check") == []
        raffles = rows("SELECT sequence, total_tickets, issued_tickets, available_tickets, winners_drawn FROM raffle")
        for raffle, total, issued, available, drawn in raffles:
            numbers = [number for (number,) in rows(f"SELECT number FROM ticket WHERE raffle = {raffle}")]
            assert len(numbers) == issued
            assert available in (0, total - issued)
            assert all(1 <= number <= total for number in numbers)
            participants = rows(f"SELECT DISTINCT participant FROM ticket WHERE raffle = {raffle}")
            assert len(participants) == len(numbers)
            [(amounts,)] = rows(f"SELECT sum(amount) FROM prize WHERE raffle = {raffle}")
            assert amounts <= total
            wins = rows(f"SELECT DISTINCT ticket_number FROM win WHERE raffle = {raffle}")
            assert len(wins) == (min(amounts, issued) if drawn else 0)
            if not available:
                assert rows(f"SELECT * FROM displaced WHERE raffle = {raffle}") == []
        assert any(drawn for *_, drawn in raffles)
