"""What the tests share: a client, a server in a process of its own, a crowd, and checks."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import webtest

from draw import check_draw

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAULTS = "tests/faults.py"  # programs with other limits, or with a fault
MANAGER = "10.0.0.1"
STRANGER = "10.0.0.2"  # neither a manager nor a participant
ONE_PRIZE = [{"name": "Bicycle", "amount": 1}]
NO_RAFFLE = "/raffles/0b6e6d0e-3f0c-4c39-8b0e-6f7c2a9d5e14/"


MIB = 2**20
KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
RFC_4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
HALF_HEAD = b"POST /raffles/ HTTP/1.1\r\nHost: "
HALF_BODY = b"POST /raffles/ HTTP/1.1\r\nHost: x\r\nContent-Length: 30000\r\n\r\n{"

# Of a database that has nothing to do with raffles.
SCHEMA = """
BEGIN IMMEDIATE;
PRAGMA application_id = 7;
PRAGMA user_version = 3;
CREATE TABLE IF NOT EXISTS item (value UNIQUE);
COMMIT;
"""


def add(connection: sqlite3.Connection, group: object, requests: list) -> list:
    """Action: insert each request as a value, which is its outcome."""
    connection.executemany("INSERT INTO item (value) VALUES (?)", [(value,) for value in requests])
    return requests


def forms_of_code(code: str) -> list[bytes]:
    """Return the bytes that a code could be written as."""
    plain = code.replace("-", "")
    raw = base64.b32decode(plain.translate(str.maketrans(CROCKFORD, RFC_4648)))
    forms = [raw, raw[::-1], raw.hex().encode(), base64.b64encode(raw), base64.b32encode(raw)]
    for text in (code, plain, code.lower(), plain.lower()):
        forms += [text.encode(), text.encode("utf-16-le"), text.encode().hex().encode()]
    return forms


class Client(webtest.TestApp):
    """WebTest with the verbs of a raffle, each from the address of whoever acts.

    path: of a raffle, as `new_raffle` returns it. status: the one to expect, or "*" for any.
    """

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        status: int | str | None = None,
        address: str = MANAGER,
        **headers: str,
    ) -> webtest.TestResponse:
        """Send a request, its body as JSON unless it is bytes already, and return the response."""
        if body is not None:
            headers = {"Content_Type": "application/json", **headers}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()

        return self.request(
            path,
            method=method,
            body=body or b"",
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            environ={"REMOTE_ADDR": address},
            status=status or "*",
        )

    def create(
        self,
        total_tickets: object = 3,
        prizes: object = ONE_PRIZE,
        status: int | str = 201,
        **members: Any,
    ) -> webtest.TestResponse:
        body = {"name": "Summer fair", "total_tickets": total_tickets, "prizes": prizes, **members}
        return self.send("POST", "/raffles/", body, status)

    def new_raffle(
        self, total_tickets: object = 3, prizes: object = ONE_PRIZE, **members: Any
    ) -> str:
        """Create a raffle and return its path."""
        location = self.create(total_tickets, prizes, **members).headers["Location"]
        return urljoin("/raffles/", location)

    def participate(
        self, path: str, address: str = "10.1.0.1", status: int | str = 201, **headers: str
    ) -> webtest.TestResponse:
        return self.send("POST", f"{path}participate/", None, status, address, **headers)

    def new_sold_out(
        self, total_tickets: int = 1, prizes: object = ONE_PRIZE, **members: Any
    ) -> tuple[str, list[dict]]:
        """Create a raffle and take every ticket, each from an address of its own.

        Return its path and the tickets.
        """
        path = self.new_raffle(total_tickets, prizes, **members)
        addresses = [f"10.2.{n // 256}.{n % 256}" for n in range(total_tickets)]
        return path, [self.participate(path, address).json for address in addresses]

    def close(
        self, path: str, status: int | str = 200, address: str = MANAGER
    ) -> webtest.TestResponse:
        return self.send("POST", f"{path}close/", None, status, address)

    def draw(
        self, path: str, body: object = None, status: int | str = 201, address: str = MANAGER
    ) -> webtest.TestResponse:
        return self.send("POST", f"{path}winners/", body, status, address)

    def verify(self, path: str, ticket: object, status: int | str = 200) -> webtest.TestResponse:
        return self.send("POST", f"{path}verify-ticket/", ticket, status, "10.1.0.1")

    def redeem(
        self, path: str, ticket: object, status: int | str = 201, address: str = MANAGER
    ) -> webtest.TestResponse:
        return self.send("POST", f"{path}redeem/", ticket, status, address)

    def replace(
        self,
        path: str,
        ticket_number: int,
        prize: str,
        reason: str = "unclaimed",
        status: int | str = 201,
    ) -> webtest.TestResponse:
        body = {"ticket_number": ticket_number, "prize": prize, "reason": reason}
        return self.send("POST", f"{path}replacements/", body, status)

    def delete_raffle(
        self, path: str, status: int | str = 204, address: str = MANAGER
    ) -> webtest.TestResponse:
        return self.send("DELETE", path, None, status, address)

    def pages(self, path: str) -> list[list]:
        """Return all pages from a path on."""

        def page(path: str) -> tuple[Mapping[str, str], list]:
            response = self.get(path)
            return response.headers, response.json

        return list(all_pages(page, path))


class Trickle(io.BytesIO):
    """The body of a request whose reads return less than they are asked for."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 7))


def post_environ(
    client: Client, path: str, data: bytes, environ: Mapping[str, object]
) -> webtest.TestResponse:
    """Send bytes as a server passes them on, with no Content-Length but that of `environ`."""
    request = webtest.TestRequest.blank(path, method="POST", content_type="application/json")
    request.environ.pop("CONTENT_LENGTH", None)
    request.environ["REMOTE_ADDR"] = MANAGER
    request.environ["wsgi.input"] = Trickle(data)
    request.environ.update(environ)
    return client.do_request(request, status="*", expect_errors=True)


def refused(
    response: webtest.TestResponse, rule: str | None, detail: str | None = None
) -> webtest.TestResponse:
    """Check that a response is a problem (RFC 9457), and return the response.

    rule: what its type must name, or None for about:blank. detail: None for any.
    """
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


def all_pages(
    get: Callable[[str], tuple[Mapping[str, str], list]], path: str | None
) -> Iterator[list]:
    """Yield the pages from a path on, where `get(path)` returns headers and page."""
    seen: set[str] = set()
    while path:
        assert path not in seen, path
        seen.add(path)
        headers, page = get(path)
        yield page
        link = re.fullmatch(r'<([^>]+)>; rel="next"', headers.get("Link", ""))
        path = urljoin(path, link[1]) if link else None


# How many processes the servers of the tests have that do not need a certain number.
PROCESSES = int(os.environ.get("RAFFLE_TEST_PROCESSES", "1"))


class Server:
    """`python raffle.py`, or another program, in processes of its own, on a free port.

    Its log is the file `log` of its directory.
    """

    def __init__(
        self,
        directory: Path,
        program: Sequence[str] = ("raffle.py",),
        wrapper: Sequence[str] = (),
        processes: int = PROCESSES,
        **environment: str,
    ) -> None:
        """Start it. program: arguments of Python. wrapper: a command that runs the command."""
        self.log = directory / "log"
        settings = {
            "MANAGER_IPS": "127.0.0.1",
            "RAFFLE_LISTEN": "127.0.0.1:0",
            "RAFFLE_DATABASE": str(directory / "raffle.db"),
            "RAFFLE_PROCESSES": str(processes),
            **environment,
        }
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, *program],
                cwd=ROOT,
                env={**os.environ, **settings},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        is_ready, _, _ = select.select([self.process.stdout], [], [], 30)
        if not is_ready:
            self.process.kill()  # it would wait, and so would this
        self.greeting = self.process.stdout.readline()
        assert self.greeting, self.log.read_text()
        self.host, _, self.port = self.greeting.strip().rpartition("//")[2].rpartition(":")

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        source: str = "127.0.0.1",
        **headers: str,
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        """Send a request from the address `source`; return status, headers and JSON of the body."""
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(body)

        host, port = self.host.strip("[]"), int(self.port)
        connection = http.client.HTTPConnection(host, port, timeout=60, source_address=(source, 0))
        with closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            # A deletion has no body.
            return response.status, response.headers, json.loads(response.read() or b"null")

    def create(
        self, total_tickets: int = 100_000, prizes: object = ONE_PRIZE, source: str = "127.0.0.1"
    ) -> str:
        """Create a raffle and return its path."""
        body = {"name": "Fair", "total_tickets": total_tickets, "prizes": prizes}
        status, headers, answer = self.request("POST", "/raffles/", body, source)
        assert status == 201, answer
        return urljoin("/raffles/", headers["Location"])

    def create_sold_out(
        self, total_tickets: int, prizes: object = ONE_PRIZE
    ) -> tuple[str, list[tuple[str, dict]]]:
        """Create a raffle and have a crowd take every ticket; return its path and crowd.tickets."""
        path, crowd = self.create(total_tickets, prizes), Crowd(16)
        with crowd.asking(self, path):
            crowd.wait_for(lambda: crowd.statuses[410])
        return path, crowd.tickets

    def list_wins(self, path: str) -> list[dict]:
        """Return all wins of a raffle, page by page."""
        pages = all_pages(lambda page: self.request("GET", page)[1:], f"{path}winners/")
        return [win for page in pages for win in page]

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """Return a socket that is connected to the server."""
        address = (self.host.strip("[]"), int(self.port))
        return socket.create_connection(address, 30, source_address=(source, 0))

    def send(self, data: bytes) -> bytes:
        """Send bytes as they are, and return all that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End the process with a signal, and return its exit status."""
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode


def children(server: Server) -> list[int]:
    """Return the ids of the processes that serve, if there are several."""
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def is_alive(pid: int) -> bool:
    """Return whether a process runs: it is neither gone nor waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def mebibytes(server: Server) -> float:
    """Return how much memory the process of a server occupies."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


class Crowd:
    """Participants, each with an address of its own, who ask for tickets until they are stopped."""

    def __init__(self, size: int = 8, first: int = 0) -> None:
        """size: how many ask at the same time. first: number of the first participant."""
        self.tickets: list[tuple[str, dict]] = []  # (address, ticket) of each that was answered
        self.statuses: Counter = Counter()  # of the answers; None: of no answer
        self.numbers = count(first)
        self.size = size
        self.changed = threading.Condition()
        self.is_over = False
        self.threads: list[threading.Thread] = []

    def asking(self, server: Server, path: str) -> closing[Crowd]:
        """Ask for tickets; in a with statement, until its end."""
        self.is_over = False
        self.threads = [
            threading.Thread(target=self._ask, args=(server, path)) for _ in range(self.size)
        ]
        for thread in self.threads:
            thread.start()
        return closing(self)

    def _ask(self, server: Server, path: str) -> None:
        while not self.is_over:
            n = next(self.numbers)
            source = f"127.{n // 62500 + 1}.{n // 250 % 250}.{n % 250 + 1}"
            try:
                status, _, ticket = server.request("POST", f"{path}participate/", source=source)
            except (OSError, http.client.HTTPException):
                status, ticket = None, None
            with self.changed:
                self.statuses[status] += 1
                if status == 201:
                    self.tickets.append((source, ticket))
                # Nobody answers any more, or everything is taken.
                self.is_over = self.is_over or status in (None, 410)
                self.changed.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, for up to 60 seconds."""
        with self.changed:
            assert self.changed.wait_for(condition, 60), self.statuses

    def wait_for_tickets(self, number: int) -> None:
        """Wait until so many more tickets have been answered."""
        wanted = len(self.tickets) + number
        self.wait_for(lambda: len(self.tickets) >= wanted)

    def close(self) -> None:
        """Stop asking."""
        self.is_over = True
        for thread in self.threads:
            thread.join()


def at_once(calls: Sequence[Callable[[], Any]]) -> list:
    """Make all calls at the same instant, each in its own thread, and return their results."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        ready.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for up to 30 seconds."""
    poll = threading.Event()
    for _ in range(1500):
        if condition():
            return
        poll.wait(0.02)
    raise AssertionError("the condition was not met within 30 seconds")


def installed(program: str) -> str:
    """Return the path of a program, or skip the test where it is missing."""
    # Some shells leave out /usr/sbin, where nginx is.
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if not found:
        pytest.skip(f"{program} is not installed")
    return found


def query(database: Path, sql: str) -> list[tuple]:
    """Return the rows of a statement, read past the program as the sqlite3 shell would."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def assert_kept(database: Path, tickets: Sequence[tuple[str | None, dict]]) -> None:
    """Check that a sound database has every answered ticket of its only raffle, no number twice.

    tickets: (address, ticket) of each.
    """
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(database, "PRAGMA foreign_key_check") == []

    numbers = [number for (number,) in query(database, "SELECT number FROM ticket")]
    assert query(database, "SELECT issued_tickets FROM raffle") == [(len(numbers),)]

    answered = [ticket["ticket_number"] for _, ticket in tickets]
    assert len(set(answered)) == len(answered)
    assert set(answered) <= set(numbers)


def assert_drawn(server: Server, path: str, randomness: str) -> None:
    """Check that all wins of a raffle are shown, and follow from certain public randomness."""
    raffle = server.request("GET", path)[2]
    assert raffle["public_randomness"] == randomness

    results = check_draw(raffle, server.list_wins(path))
    assert all(holds for _, holds in results), results
