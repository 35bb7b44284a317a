"""What the tests share: a client with the verbs of a raffle, servers in processes of their own, and their clients."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from pathlib import Path

import webtest
from description import assert_described

import storage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANAGER = "10.0.0.1"
ONE_PRIZE = [{"name": "Bicycle", "amount": 1}]

# `python -c` with this starts a server whose system takes little of what it sends: the rest stays with it.
SMALL_BUFFERS = """
import socket, raffle
from waitress.adjustments import Adjustments
Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
raffle.main()
"""


class Client(webtest.TestApp):
    """WebTest with the verbs of a raffle, each from the address of whoever acts.

    Every answer is held to openapi.json.
    """

    def do_request(self, req, status=None, expect_errors=None):
        """Send a request as WebTest does."""
        method, path = req.method, req.environ["PATH_INFO"]  # as it is now: the application changes it
        response = super().do_request(req, status, expect_errors)
        assert_described(method, path, response.status_int, response.headers, response.body)
        return response

    def request_from(self, address, method, path, body=None, status=None, **headers):
        """Send a request, its body as JSON unless it is bytes already."""
        if body is not None:
            headers = {"Content_Type": "application/json", **headers}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request(
            path,
            method=method,
            body=body or b"",
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            environ={"REMOTE_ADDR": address},
            status=status,
            expect_errors=status == 500,
        )

    def create(self, total_tickets=3, prizes=ONE_PRIZE, name="Summer fair", status=201):
        body = {"name": name, "total_tickets": total_tickets, "prizes": prizes}
        return self.request_from(MANAGER, "POST", "/raffles/", body, status)

    def new_raffle(self, total_tickets=3, prizes=ONE_PRIZE):
        """Create a raffle and return its path."""
        return f"/raffles/{self.create(total_tickets, prizes).json['id']}/"

    def participate(self, raffle, address="10.1.0.1", status=201, **headers):
        return self.request_from(address, "POST", f"{raffle}participate/", status=status, **headers)

    def sell_out(self, raffle):
        """Take every ticket, each from an address of its own, and return them in that order."""
        total = self.get(raffle).json["available_tickets"]
        return [self.participate(raffle, f"10.2.{n // 256}.{n % 256}").json for n in range(total)]

    def new_sold_out(self, total_tickets=1, prizes=ONE_PRIZE):
        """Create a raffle, take every ticket, and return its path."""
        raffle = self.new_raffle(total_tickets, prizes)
        self.sell_out(raffle)
        return raffle

    def close(self, raffle, address=MANAGER, status=200):
        return self.request_from(address, "POST", f"{raffle}close/", status=status)

    def draw(self, raffle, address=MANAGER, status=201, body=None):
        return self.request_from(address, "POST", f"{raffle}winners/", body, status)

    def verify(self, raffle, ticket, status=200):
        return self.request_from("10.1.0.1", "POST", f"{raffle}verify-ticket/", ticket, status)

    def redeem(self, raffle, ticket, status=201, address=MANAGER):
        return self.request_from(address, "POST", f"{raffle}redeem/", ticket, status)

    def pages(self, path):
        """Return all pages from a path on."""
        return list(all_pages(self.page, path))

    def page(self, path):
        response = self.get(path)
        return response.headers, response.json


def call(app, body=b"", **environ):
    """Call a WSGI application with a request that no client would send; return the status code and the body."""
    said = []
    server = {"SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.0", "wsgi.url_scheme": "http"}
    request = {"REQUEST_METHOD": "POST", "PATH_INFO": "/raffles/", "REMOTE_ADDR": MANAGER, "wsgi.errors": sys.stderr}
    environ = {**server, **request, "wsgi.input": io.BytesIO(body), **environ}
    answer = b"".join(app(environ, lambda status, headers, *_: said.append(int(status[:3]))))
    return said[0], json.loads(answer)


def assert_problem(response, detail=None):
    """Check that a refusal has the one shape of RFC 9457, and says `detail` if that is given."""
    assert response.content_type == "application/problem+json"
    assert list(response.json) == ["type", "title", "status", "detail"]
    assert f"{response.json['status']} {response.json['title']}" == response.status
    assert isinstance(response.json["detail"], str)
    assert response.json["detail"]
    if detail is not None:
        assert response.json["detail"] == detail


def spellings(code):
    """Return the bytes of a verification code in every encoding that could be read back."""
    text = code.replace("-", "")
    number = 0
    for character in text:
        number = number * 32 + storage.ALPHABET.index(character)
    raw = number.to_bytes(15, "big")
    texts = [
        code,
        text,
        text[::-1],
        raw.hex(),
        str(number),
        base64.b64encode(raw).decode(),
        base64.b85encode(raw).decode(),
    ]
    texts += [base64.b32encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()]
    for spelled in (code, text):
        texts += [base64.b64encode(spelled.encode()).decode().rstrip("="), spelled.encode().hex()]
    encoded = [form.encode(encoding) for form in texts for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
    encoded += [form.upper().encode() for form in texts] + [form.lower().encode() for form in texts]
    return {*encoded, raw, raw[::-1], json.dumps(code).encode()}


def all_pages(get, path):
    """Yield the pages from a path on, where `get(path)` returns headers and page."""
    seen = set()
    while path:
        assert path not in seen
        seen.add(path)
        headers, page = get(path)
        yield page
        link = re.fullmatch(r'<([^>]+)>; rel="next"', headers.get("Link", ""))
        path = link and link[1]


def fill(database, total, prizes):
    """Make a sold-out raffle in the database without a server, its codes not hashed, and return its path."""
    store = storage.Storage(database)
    with closing(store.database):
        raffle_id = store.create_raffle("Fair", total, prizes)["id"]
        requests = [(n.to_bytes(4, "big"), b"", 1, b"") for n in range(total)]
        store.database.write(lambda db, *_: [storage.issue_tickets(db, raffle_id, requests)], raffle_id).result()
    return f"/raffles/{raffle_id}/"


class Server:
    """`python raffle.py`, or another program, in a process of its own, on a free port, its log in a file."""

    def __init__(self, directory, program=("raffle.py",), **environment):
        self.log = directory / "log"
        settings = {"RAFFLE_LISTEN": "127.0.0.1:0", "RAFFLE_DATABASE": str(directory / "raffle.db"), **environment}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program],
                cwd=ROOT,
                env={**os.environ, "MANAGER_IPS": "127.0.0.1", **settings},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.greeting = self.process.stdout.readline()
        assert self.greeting, self.log.read_text()
        self.host, _, self.port = self.greeting.strip().rpartition("//")[2].rpartition(":")

    def request(self, method, path, body=None, source="127.0.0.1", **headers):
        """Send one request from the address `source`; return its status, its headers and its body from JSON."""
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(body)
        host = self.host.strip("[]")
        connection = http.client.HTTPConnection(host, int(self.port), timeout=60, source_address=(source, 0))
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())
        finally:
            connection.close()

    def create(self, total_tickets=100_000, prizes=ONE_PRIZE, source="127.0.0.1"):
        """Create a raffle and return its path."""
        body = {"name": "Fair", "total_tickets": total_tickets, "prizes": prizes}
        status, headers, answer = self.request("POST", "/raffles/", body, source)
        assert status == 201, answer
        return headers["Location"]

    def list_wins(self, raffle):
        """Return all wins of a raffle, page by page."""
        pages = all_pages(lambda path: self.request("GET", path)[1:], f"{raffle}winners/")
        return [win for page in pages for win in page]

    def connect(self, timeout=30):
        """Return a socket that is connected to the server."""
        return socket.create_connection((self.host.strip("[]"), int(self.port)), timeout)

    def send(self, data):
        """Send bytes as they are, and return all that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def stop(self, how=signal.SIGTERM):
        """End the process with a signal, and return its exit code."""
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode


def at_once(calls):
    """Make all the calls at the same instant, each in a thread of its own, and return their results."""
    ready = threading.Barrier(len(calls))

    def run(call):
        ready.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def wait_for(condition):
    """Wait until a condition holds, for up to 30 seconds."""
    poll = threading.Event()
    for _ in range(600):
        if condition():
            return
        poll.wait(0.05)
    raise AssertionError("the condition was not met within 30 seconds")


class Crowd:
    """Participants, each with an address of its own, who ask for tickets many at a time until they are told to stop."""

    def __init__(self, size=8, first=0):
        self.tickets = []  # (address, ticket) of each that was answered
        self.statuses = Counter()
        self.numbers = count(first)
        self.size = size
        self.changed = threading.Condition()

    def start(self, server, raffle):
        self.over = False
        self.threads = [threading.Thread(target=self.ask, args=(server, raffle)) for _ in range(self.size)]
        for thread in self.threads:
            thread.start()

    def ask(self, server, raffle):
        while not self.over:
            n = next(self.numbers)
            source = f"127.{n // 62500 + 1}.{n // 250 % 250}.{n % 250 + 1}"
            try:
                status, _, ticket = server.request("POST", f"{raffle}participate/", source=source)
            except (OSError, http.client.HTTPException):
                status, ticket = None, None
            with self.changed:
                self.statuses[status] += 1
                if status == 201:
                    self.tickets.append((source, ticket))
                if status is None:
                    self.over = True
                self.changed.notify()

    def wait_for(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, 60)

    def wait_for_tickets(self, number):
        """Wait until so many more tickets have been answered."""
        wanted = len(self.tickets) + number
        self.wait_for(lambda: len(self.tickets) >= wanted)

    def stop(self):
        self.over = True
        for thread in self.threads:
            thread.join()


def assert_kept(database, tickets):
    """Check that every answered ticket is in the database as it was answered, and that the database is sound."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        rows = connection.execute("SELECT number, participant FROM ticket").fetchall()
        [(total, available)] = connection.execute("SELECT total_tickets, available_tickets FROM raffle").fetchall()
    assert len(rows) == total - available
    assert len({number for number, _ in rows}) == len({participant for _, participant in rows}) == len(rows)
    kept = set(rows)
    for source, ticket in tickets:
        assert (ticket["ticket_number"], socket.inet_aton(source)) in kept


class Stalling:
    """Connections to a server: some at rest, some that send a byte now and then, some that never read."""

    def __init__(self, server, path, resting, dribbling, unreading):
        self.sockets = []
        for _ in range(resting):
            self.connect(server)
        self.unreading = [self.connect(server) for _ in range(unreading)]
        for client in self.unreading:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        self.dribbling = [self.connect(server) for _ in range(dribbling)]
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.dribble)
        self.thread.start()

    def connect(self, server):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((server.host, int(server.port)))
        self.sockets.append(client)
        return client

    def dribble(self):
        while not self.over.wait(0.5):
            for client in self.dribbling:
                with suppress(OSError):
                    client.send(b"x")

    def count_open(self):
        """Return how many of the connections the server has not closed."""
        closed = 0
        for client in self.sockets:
            client.setblocking(False)
            with suppress(BlockingIOError):
                while piece := client.recv(65536):
                    assert piece
                closed += 1
        return len(self.sockets) - closed

    def stop(self):
        self.over.set()
        self.thread.join()
        for client in self.sockets:
            client.close()
