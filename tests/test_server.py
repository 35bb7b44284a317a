"""The program as it is deployed: a process of its own, and real sockets."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from helpers import ROOT
from waitress.adjustments import Adjustments

import raffle

PARTICIPANTS = 500
PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 30}, {"name": "Pen", "amount": 69}]


def at_once(calls):
    """Make all the calls at the same instant, each in a thread of its own, and return their results."""
    ready = threading.Barrier(len(calls))

    def run(call):
        ready.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize(
    ("length", "body"),
    [(b"Content-Length: 4", b"null"), (b"Transfer-Encoding: chunked", b"4\r\nnull\r\n0\r\n\r\n")],
)
def test_a_client_that_asks_before_it_sends_its_body_is_told_to_go_on(serve, length, body):
    server = serve()
    head = b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Type: application/json\r\n" + length
    with socket.create_connection(("127.0.0.1", int(server.port)), 30) as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = connection.makefile("rb")
        assert [answer.readline(), answer.readline()] == [b"HTTP/1.1 100 Continue\r\n", b"\r\n"]
        connection.sendall(body)
        assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"


# Whatever is sent takes its time, so that two threads that send at once would be seen.
SLOW_TO_SEND = """
import threading, waitress.channel, raffle
send = waitress.channel.HTTPChannel.send

def send_slowly(*arguments, **options):
    try:
        return send(*arguments, **options)
    finally:
        threading.Event().wait(0.1)

waitress.channel.HTTPChannel.send = send_slowly
raffle.main()
"""


def test_a_client_that_asks_while_another_answer_is_on_its_way_gets_everything_once(serve):
    server = serve(program=("-c", SLOW_TO_SEND))
    head = b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    address = "127.0.0.1", int(server.port)
    for _ in range(4):
        with socket.create_connection(address, 0.01) as connection, socket.create_connection(address) as other:
            connection.sendall(b"GET /nothing/ HTTP/1.1\r\n\r\n" + head)
            received = b""
            while not received.endswith(b"100 Continue\r\n\r\n"):
                other.sendall(b"x")  # has the server look at all its connections
                with suppress(socket.timeout):
                    piece = connection.recv(65536)
                    assert piece
                    received += piece
            connection.settimeout(30)
            connection.sendall(b"null")
            while piece := connection.recv(65536):
                received += piece
        assert re.findall(b"HTTP/1.1 [0-9]+", received) == [b"HTTP/1.1 404", b"HTTP/1.1 100", b"HTTP/1.1 415"]
    assert "Traceback" not in server.log.read_text()


def test_a_whole_raffle(serve):
    server = serve(MANAGER_IPS="127.0.0.1, 127.0.0.2")
    addresses = [f"127.{n % 7 + 1}.{n // 250}.{n % 250 + 1}" for n in range(PARTICIPANTS)]
    body = {"name": "Summer fair", "total_tickets": PARTICIPANTS, "prizes": PRIZES}
    status, headers, _ = server.request("POST", "/raffles/", body)
    assert status == 201
    raffle = headers["Location"]

    def participate(address):
        return server.request("POST", f"{raffle}participate/", source=address)

    # Everybody asks twice, many at once, and one half of the requests races the other.
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(participate, [address for address in addresses for _ in range(2)]))
    tickets = [ticket for status, _, ticket in answers if status == 201]
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, PARTICIPANTS + 1))
    for first, second in zip(answers[::2], answers[1::2]):
        statuses = sorted([first[0], second[0]])
        assert statuses in ([201, 403], [201, 410])
    status, _, refusal = participate("127.9.9.9")
    assert (status, refusal["detail"]) == (410, "Tickets to this raffle are no longer available")

    draws = at_once(
        [
            lambda source=source: server.request("POST", f"{raffle}winners/", source=source)
            for source in ("127.0.0.1", "127.0.0.2")
        ]
    )
    assert sorted(status for status, _, _ in draws) == [201, 403]
    refused = next(answer for status, _, answer in draws if status == 403)
    assert refused["detail"] == "Winners for the raffle have already been drawn"
    wins = server.request("GET", f"{raffle}winners/")[2]
    assert wins == next(answer for status, _, answer in draws if status == 201)
    assert [win["prize"] for win in wins] == ["Bicycle"] + ["Book"] * 30 + ["Pen"] * 69
    prizes = {win["ticket_number"]: win["prize"] for win in wins}
    assert len(prizes) == 100

    def verify(ticket):
        status, _, verdict = server.request("POST", f"{raffle}verify-ticket/", ticket)
        return status, verdict

    with ThreadPoolExecutor(16) as pool:
        for ticket, (status, verdict) in zip(tickets, pool.map(verify, tickets)):
            prize = prizes.get(ticket["ticket_number"])
            assert (status, verdict) == (200, {"has_won": prize is not None, "prize": prize})
        mixed = [
            {**ticket, "verification_code": other["verification_code"]}
            for ticket, other in zip(tickets, tickets[1:] + tickets[:1])
        ]
        for status, refusal in pool.map(verify, mixed):
            assert (status, refusal["detail"]) == (400, "Invalid verification code")

    log = server.log.read_text().splitlines()
    assert len(log) == 2
    raffle_id = raffle.split("/")[2]
    assert log[0].endswith(f"INFO Raffle {raffle_id} created by 127.0.0.1")
    assert f"INFO Winners of raffle {raffle_id} drawn by 127.0.0." in log[1]


def test_the_greeting_says_which_port_was_picked(serve):
    server = serve()
    assert server.greeting == f"Listening on http://127.0.0.1:{server.port}\n"
    assert server.request("GET", "/raffles/")[0] == 200


def test_it_listens_on_ipv6(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server = serve(RAFFLE_LISTEN="[::1]:0", MANAGER_IPS="::1")
    assert server.greeting == f"Listening on http://[::1]:{server.port}\n"
    body = {"name": "Fair", "total_tickets": 1, "prizes": PRIZES[:1]}
    status, headers, _ = server.request("POST", "/raffles/", body, source="::1")
    assert status == 201
    assert server.request("POST", f"{headers['Location']}participate/", source="::1")[0] == 201


def raw(server, data):
    """Send bytes as they are, and return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", int(server.port)), timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_server_goes_on_after_requests_that_no_client_library_would_send(serve):
    server = serve()
    head = b"Host: x\r\nConnection: close\r\n"
    answers = [
        (b"BREW /raffles/ HTTP/1.1\r\n" + head + b"\r\n", b"405"),
        (b"ANY /raffles/ HTTP/1.1\r\n" + head + b"\r\n", b"405"),
        (b"GET /raffles/%0A HTTP/1.1\r\n" + head + b"\r\n", b"404"),
        (b"GET /raffles/%FF/ HTTP/1.1\r\n" + head + b"\r\n", b"404"),
        (b"GET /raffles/%00/ HTTP/1.0\r\n\r\n", b"404"),
        (b"GET /raffles/../raffles/ HTTP/1.1\r\n" + head + b"\r\n", b"404"),
        (b"GET /raffles/?limit=%FF&cursor=\xff HTTP/1.1\r\n" + head + b"\r\n", b"400"),
        (b"GET http://x/raffles/ HTTP/1.1\r\n" + head + b"\r\n", b"200"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
    ]
    for request, status in answers:
        assert raw(server, request).split(b" ")[1] == status, request
    # Chunks, an empty one first, and a body beyond what the application reads.
    chunked = (
        b"POST /raffles/ HTTP/1.1\r\n" + head + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    body = json.dumps({"name": "Fair", "total_tickets": 1, "prizes": PRIZES[:1]}).encode()
    assert raw(server, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)).startswith(b"HTTP/1.1 201")
    long = b" " * (2**21 - 100)
    assert raw(server, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(long), long)).startswith(b"HTTP/1.1 413")
    both = chunked.replace(b"Host: x", b"Content-Length: 5")
    assert raw(server, both + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)).startswith(b"HTTP/1.1 400")
    assert server.request("POST", "/raffles/", {"name": "x" * (2**21 - 100)})[0] == 413
    assert len(server.request("GET", "/raffles/")[2]) == 1
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("piece", [b"1\r\nx\r\n", b"1;" + b"x" * 100 + b"\r\nx\r\n", b"1;" + b"x" * 2**17])
def test_a_body_that_is_mostly_chunk_headers_is_refused_before_it_wears_the_server_down(piece):
    request = raffle.Request(Adjustments())
    request.received(b"POST /raffles/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    data = piece * (2**18 // len(piece) + 1)
    while not request.completed:
        assert request.received(data[:8192])
        data = data[8192:]
    assert request.error.code == 400
    assert request.body_bytes_received < 2**17
    request.close()


def test_a_body_in_chunks_of_a_usual_size_is_not_refused():
    request = raffle.Request(Adjustments())
    request.received(b"POST /raffles/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(2**14):
        request.received(b"40\r\n" + b"x" * 64 + b"\r\n")
    request.received(b"0\r\n\r\n")
    assert request.completed
    assert not request.error
    request.close()


def test_waitress_serve_can_call_the_application_factory(tmp_path):
    command = [sys.executable, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "raffle:create_app"]
    environment = {**os.environ, "RAFFLE_DATABASE": str(tmp_path / "raffle.db"), "MANAGER_IPS": "127.0.0.1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = process.stderr.readline().rpartition(":")[2]
            with closing(http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)) as connection:
                connection.request("GET", "/raffles/")
                assert connection.getresponse().read() == b"[]\n"
        finally:
            process.terminate()
