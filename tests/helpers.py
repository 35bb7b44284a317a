"""What the tests share: a client with the verbs of a raffle, and a server in a process of its own."""

import http.client
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import webtest
from description import assert_described

import storage

ROOT = Path(__file__).parent.parent
MANAGER = "10.0.0.1"
ONE_PRIZE = [{"name": "Bicycle", "amount": 1}]


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

    def draw(self, raffle, address=MANAGER, status=201):
        return self.request_from(address, "POST", f"{raffle}winners/", status=status)

    def verify(self, raffle, ticket, status=200):
        return self.request_from("10.1.0.1", "POST", f"{raffle}verify-ticket/", ticket, status)


def assert_problem(response, detail=None):
    """Check that a refusal has the one shape of RFC 9457, and says `detail` if that is given."""
    assert response.content_type == "application/problem+json"
    assert list(response.json) == ["type", "title", "status", "detail"]
    assert response.json["type"] == "about:blank"
    assert f"{response.json['status']} {response.json['title']}" == response.status
    assert isinstance(response.json["detail"], str)
    assert response.json["detail"]
    if detail is not None:
        assert response.json["detail"] == detail


def fill(database, total, prizes):
    """Make a sold-out raffle in the database without a server, and return its path."""
    with closing(storage.Storage(database)) as store:
        raffle_id = store.create_raffle("Fair", total, prizes)["id"]
        requests = [(n.to_bytes(4, "big"), b"", 1, b"") for n in range(total)]
        store._write(lambda db, _, __: [storage._issue_tickets(db, raffle_id, requests)], raffle_id)
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

    def stop(self, how=signal.SIGTERM):
        """End the process with a signal, and return its exit code."""
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode
