"""Clients that rest, send slowly or never read take nothing from the others, and are closed in the end."""

import signal
import socket
import sqlite3
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from helpers import ONE_PRIZE, fill

# A server whose system takes little of what it sends, so that what is not read stays with it; it bears
# stalling clients for 3 seconds only, but waits for a lock longer than that.
IMPATIENT = """
import socket, raffle, storage
from waitress.adjustments import Adjustments
Adjustments.socket_options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, 4096))
raffle.STALLED = 3
storage.BUSY_TIMEOUT = 5
raffle.main()
"""


class Stalling:
    """Connections to a server: some at rest, some that send a byte now and then, some that never read."""

    def __init__(self, server, raffle, resting, dribbling, unreading):
        self.sockets = []
        for _ in range(resting):
            self.connect(server)
        for _ in range(unreading):
            self.connect(server).sendall(f"GET {raffle}winners/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
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

    def stop(self):
        self.over.set()
        self.thread.join()
        for client in self.sockets:
            client.close()


@pytest.fixture
def sold_out(database):
    return fill(database, 10_000, [{"name": "x" * 20, "amount": 10_000}])


def test_hundreds_of_stalling_clients_do_not_keep_others_from_their_tickets(serve, sold_out):
    server = serve()
    server.request("POST", f"{sold_out}winners/")
    body = {"name": "Fair", "total_tickets": 1000, "prizes": ONE_PRIZE}
    raffle = server.request("POST", "/raffles/", body)[1]["Location"]
    with ExitStack() as stack:
        stalling = Stalling(server, sold_out, resting=200, dribbling=200, unreading=50)
        stack.callback(stalling.stop)
        for n in range(100):
            assert server.request("POST", f"{raffle}participate/", source=f"127.1.1.{n + 1}")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_who_stalls_is_closed_and_who_is_served_is_not(serve, sold_out, database):
    server = serve(program=("-c", IMPATIENT))
    server.request("POST", f"{sold_out}winners/")
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    poll = threading.Event()

    def sockets():
        return sum(descriptor.is_socket() for descriptor in descriptors.iterdir())

    def wait_for(condition):
        for _ in range(600):
            if condition():
                return
            poll.wait(0.05)
        pytest.fail("nothing has come of it in 30 seconds")

    wait_for(lambda: sockets() == 1)
    with ExitStack() as stack:
        other = stack.enter_context(closing(sqlite3.connect(database)))
        other.execute("BEGIN IMMEDIATE")
        answers = []
        body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}
        served = threading.Thread(target=lambda: answers.append(server.request("POST", "/raffles/", body)[0]))
        served.start()
        stalling = Stalling(server, sold_out, resting=3, dribbling=3, unreading=3)
        stack.callback(stalling.stop)
        wait_for(lambda: sockets() >= 9)
        wait_for(lambda: sockets() == 1)
        served.join()
        assert answers == [503]


def test_who_stalls_is_closed_even_if_the_clock_is_put_back(serve):
    put_back = "import signal, time; now = time.time; late = lambda: now() - 3600\n"
    put_back += "signal.signal(signal.SIGUSR1, lambda *_: setattr(time, 'time', late))"
    server = serve(program=("-c", put_back + IMPATIENT))
    with socket.create_connection((server.host, int(server.port)), 30) as client:
        client.sendall(b"GET /nothing/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        server.process.send_signal(signal.SIGUSR1)
        while client.recv(65536):
            pass
