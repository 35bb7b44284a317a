"""The program as it is deployed: a process of its own, and real sockets."""

import http.client
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from helpers import ONE_PRIZE, ROOT, at_once

PARTICIPANTS = 500
PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 30}, {"name": "Pen", "amount": 69}]


def test_a_whole_raffle(serve):
    server = serve(MANAGER_IPS="127.0.0.1, 127.0.0.2")
    raffle = server.create(PARTICIPANTS, PRIZES)

    def participate(n):
        return server.request("POST", f"{raffle}participate/", source=f"127.{n % 7 + 1}.{n // 250}.{n % 250 + 1}")

    # Everybody asks twice, many at once, and one half of the requests races the other.
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(participate, [n for n in range(PARTICIPANTS) for _ in range(2)]))
    tickets = [ticket for status, _, ticket in answers if status == 201]
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, PARTICIPANTS + 1))
    for first, second in zip(answers[::2], answers[1::2]):
        assert sorted([first[0], second[0]]) in ([201, 403], [201, 410])
    status, _, refusal = participate(PARTICIPANTS)
    assert (status, refusal["detail"]) == (410, "Tickets to this raffle are no longer available")

    def draw(source):
        return lambda: server.request("POST", f"{raffle}winners/", source=source)

    draws = at_once([draw("127.0.0.1"), draw("127.0.0.2")])
    (drawn, _, wins), (refused, _, refusal) = sorted(draws, key=lambda answer: answer[0])
    assert (drawn, refused) == (201, 403)
    assert refusal["detail"] == "Winners for the raffle have already been drawn"
    assert server.list_wins(raffle) == wins
    assert [win["prize"] for win in wins] == ["Bicycle"] + ["Book"] * 30 + ["Pen"] * 69
    prizes = {win["ticket_number"]: win["prize"] for win in wins}
    assert len(prizes) == 100

    def verify(ticket):
        return server.request("POST", f"{raffle}verify-ticket/", ticket)

    with ThreadPoolExecutor(16) as pool:
        for ticket, (status, _, verdict) in zip(tickets, pool.map(verify, tickets)):
            prize = prizes.get(ticket["ticket_number"])
            assert (status, verdict) == (200, {"has_won": prize is not None, "prize": prize, "redeemed_at": None})
        mixed = [
            {**ticket, "verification_code": other["verification_code"]}
            for ticket, other in zip(tickets, tickets[1:] + tickets[:1])
        ]
        for status, _, refusal in pool.map(verify, mixed):
            assert (status, refusal["detail"]) == (400, "Invalid verification code")

    created, drawn = server.log.read_text().splitlines()
    raffle_id = raffle.split("/")[2]
    assert created.endswith(f"INFO Raffle {raffle_id} created by 127.0.0.1")
    assert f"INFO Winners of raffle {raffle_id} drawn by 127.0.0." in drawn


def test_the_greeting_says_which_port_was_picked_and_as_many_threads_run_as_the_setting_says(serve):
    server = serve(RAFFLE_THREADS="7")
    assert server.greeting == f"Listening on http://127.0.0.1:{server.port}\n"
    # Those that handle requests, the one that writes, and the event loop.
    assert len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) == 7 + 2
    assert server.request("GET", "/raffles/")[0] == 200


def test_it_listens_on_ipv6(serve):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    server = serve(RAFFLE_LISTEN="[::1]:0", MANAGER_IPS="::1")
    assert server.greeting == f"Listening on http://[::1]:{server.port}\n"
    raffle = server.create(1, source="::1")
    assert server.request("POST", f"{raffle}participate/", source="::1")[0] == 201


@pytest.mark.parametrize(
    ("length", "body"),
    [(b"Content-Length: 4", b"null"), (b"Transfer-Encoding: chunked", b"4\r\nnull\r\n0\r\n\r\n")],
)
def test_a_client_that_asks_before_it_sends_its_body_is_told_to_go_on(serve, length, body):
    head = b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Type: application/json\r\n" + length
    with serve().connect() as connection, connection.makefile("rb") as answer:
        connection.sendall(head + b"\r\n\r\n")
        assert [answer.readline(), answer.readline()] == [b"HTTP/1.1 100 Continue\r\n", b"\r\n"]
        connection.sendall(body)
        assert answer.readline() == b"HTTP/1.1 400 Bad Request\r\n"


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
        (b"GET http://[::1/ HTTP/1.1\r\n" + head + b"\r\n", b"400"),
        (b"POST /raffles/ HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n" + head + b"\r\n", b"400"),
        (b"\x00\x01\x02\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
    ]
    # In chunks; with two lengths; and with a body beyond what the application reads.
    chunked = b"POST /raffles/ HTTP/1.1\r\n%sContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n" % head
    body = json.dumps({"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}).encode()
    body, long = (b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) for body in (body, b" " * (2**21 - 100)))
    answers += [(chunked + body, b"201"), (chunked + b"Content-Length: 5\r\n" + body, b"400"), (chunked + long, b"413")]
    for request, status in answers:
        assert server.send(request).split(b" ")[1] == status, request[:100]
    assert server.request("POST", "/raffles/", {"name": "x" * (2**21 - 100)})[0] == 413
    assert len(server.request("GET", "/raffles/")[2]) == 1
    assert " ERROR " not in server.log.read_text()


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
