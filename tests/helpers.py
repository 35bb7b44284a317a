"""What the tests share: a client with the verbs of a raffle, a server in a process of its own, and a crowd."""

import http.client
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
from contextlib import closing
from itertools import count
from pathlib import Path

import webtest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MANAGER = "10.0.0.1"
ONE_PRIZE = [{"name": "Bicycle", "amount": 1}]
NO_RAFFLE = "/raffles/0b6e6d0e-3f0c-4c39-8b0e-6f7c2a9d5e14/"


class Client(webtest.TestApp):
    """WebTest with the verbs of a raffle, each from the address of whoever acts."""

    def send(self, method, path, body=None, status=None, address=MANAGER, **headers):
        """Send a request, its body as JSON unless it is bytes already, and return the response."""
        if body is not None:
            headers = {"Content_Type": "application/json", **headers}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        environ = {"REMOTE_ADDR": address}
        return self.request(
            path,
            method=method,
            body=body or b"",
            headers=headers,
            environ=environ,
            status=status or "*",
        )

    def create(self, total_tickets=3, prizes=ONE_PRIZE, status=201, **members):
        body = {"name": "Summer fair", "total_tickets": total_tickets, "prizes": prizes, **members}
        return self.send("POST", "/raffles/", body, status)

    def new_raffle(self, total_tickets=3, prizes=ONE_PRIZE, **members):
        """Create a raffle and return its path."""
        return self.create(total_tickets, prizes, **members).headers["Location"]

    def participate(self, raffle, address="10.1.0.1", status=201, **headers):
        return self.send("POST", f"{raffle}participate/", None, status, address, **headers)

    def new_sold_out(self, total_tickets=1, prizes=ONE_PRIZE, **members):
        """Create a raffle and take every ticket, each from an address of its own; return its path and the tickets."""
        raffle = self.new_raffle(total_tickets, prizes, **members)
        return raffle, [
            self.participate(raffle, f"10.2.{n // 256}.{n % 256}").json
            for n in range(total_tickets)
        ]

    def close(self, raffle, status=200, address=MANAGER):
        return self.send("POST", f"{raffle}close/", None, status, address)

    def draw(self, raffle, body=None, status=201, address=MANAGER):
        return self.send("POST", f"{raffle}winners/", body, status, address)

    def verify(self, raffle, ticket, status=200):
        return self.send("POST", f"{raffle}verify-ticket/", ticket, status, "10.1.0.1")

    def redeem(self, raffle, ticket, status=201, address=MANAGER):
        return self.send("POST", f"{raffle}redeem/", ticket, status, address)

    def pages(self, path):
        """Return all pages from a path on."""

        def page(path):
            response = self.get(path)
            return response.headers, response.json

        return list(all_pages(page, path))


def refused(response, rule, detail=None):
    """Check that a response is a problem (RFC 9457) with the type of a rule, or of none; return the response."""
    problem = dict(response.json)
    assert ("address" in problem) == (rule == "already-participated"), problem
    problem.pop("address", None)
    assert response.content_type == "application/problem+json", response
    assert list(problem) == ["type", "title", "status", "detail"], problem
    assert problem["type"] == (f"urn:raffle:{rule}" if rule else "about:blank"), problem
    assert f"{problem['status']} {problem['title']}" == response.status, problem
    assert problem["detail"], problem
    assert detail in (None, problem["detail"]), problem
    return response


def all_pages(get, path):
    """Yield the pages from a path on, where `get(path)` returns headers and page."""
    while path:
        headers, page = get(path)
        yield page
        link = re.fullmatch(r'<([^>]+)>; rel="next"', headers.get("Link", ""))
        path = link and link[1]


class Server:
    """`python raffle.py`, or another program, in a process of its own, on a free port, its log in a file."""

    def __init__(self, directory, program=("raffle.py",), **environment):
        self.log = directory / "log"
        settings = {"MANAGER_IPS": "127.0.0.1", "RAFFLE_LISTEN": "127.0.0.1:0"}
        settings.update({"RAFFLE_DATABASE": str(directory / "raffle.db"), **environment})
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program],
                cwd=ROOT,
                env={**os.environ, **settings},
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
        connection = http.client.HTTPConnection(
            host, int(self.port), timeout=60, source_address=(source, 0)
        )
        with closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())

    def create(self, total_tickets=100_000, prizes=ONE_PRIZE, source="127.0.0.1"):
        """Create a raffle and return its path."""
        body = {"name": "Fair", "total_tickets": total_tickets, "prizes": prizes}
        status, headers, answer = self.request("POST", "/raffles/", body, source)
        assert status == 201, answer
        return headers["Location"]

    def create_sold_out(self, total_tickets, prizes=ONE_PRIZE):
        """Create a raffle and have a crowd take every ticket; return its path and (address, ticket) of each."""
        raffle, crowd = self.create(total_tickets, prizes), Crowd(16)
        with crowd.asking(self, raffle):
            crowd.wait_for(lambda: crowd.statuses[410])
        return raffle, crowd.tickets

    def list_wins(self, raffle):
        """Return all wins of a raffle, page by page."""
        pages = all_pages(lambda path: self.request("GET", path)[1:], f"{raffle}winners/")
        return [win for page in pages for win in page]

    def connect(self, source="127.0.0.1"):
        """Return a socket that is connected to the server."""
        return socket.create_connection(
            (self.host.strip("[]"), int(self.port)), 30, source_address=(source, 0)
        )

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


class Crowd:
    """Participants, each with an address of its own, who ask for tickets many at a time until they are told to stop."""

    def __init__(self, size=8, first=0):
        self.tickets = []  # (address, ticket) of each that was answered
        self.statuses = Counter()  # of the answers; None: of no answer
        self.numbers = count(first)
        self.size = size
        self.changed = threading.Condition()
        self.is_over = False
        self.threads = []

    def asking(self, server, raffle):
        """Ask for tickets; in a with statement, until its end."""
        self.is_over = False
        self.threads = [
            threading.Thread(target=self._ask, args=(server, raffle)) for _ in range(self.size)
        ]
        for thread in self.threads:
            thread.start()
        return closing(self)

    def _ask(self, server, raffle):
        while not self.is_over:
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
                # Nobody answers any more, or everything is taken.
                self.is_over = self.is_over or status in (None, 410)
                self.changed.notify_all()

    def wait_for(self, condition):
        """Wait until a condition holds, for up to 60 seconds."""
        with self.changed:
            assert self.changed.wait_for(condition, 60), self.statuses

    def wait_for_tickets(self, number):
        """Wait until so many more tickets have been answered."""
        wanted = len(self.tickets) + number
        self.wait_for(lambda: len(self.tickets) >= wanted)

    def close(self):
        """Stop asking."""
        self.is_over = True
        for thread in self.threads:
            thread.join()


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
    for _ in range(1500):
        if condition():
            return
        poll.wait(0.02)
    raise AssertionError("the condition was not met within 30 seconds")


def query(database, sql):
    """Return the rows of a statement, read past the program as the sqlite3 shell would."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def assert_kept(database, tickets):
    """Check that every answered ticket is in the database, no number twice, and that the database is sound."""
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(database, "PRAGMA foreign_key_check") == []
    numbers = [number for (number,) in query(database, "SELECT number FROM ticket")]
    assert query(database, "SELECT issued_tickets FROM raffle") == [(len(numbers),)]
    answered = [ticket["ticket_number"] for _, ticket in tickets]
    assert len(set(answered)) == len(answered)
    assert set(answered) <= set(numbers)
