"""The lines for nginx that the README shows, with a real nginx in front of a real server."""

import json
import random
import re
import socket
import subprocess
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urljoin

import pytest
from helpers import ONE_PRIZE, README, installed, wait_for

# The workers read pytest's directory, which is its owner's only. Without root, nginx ignores the
# user.
CONFIGURATION = """
user root;
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {listen};
        root {directory};
        {lines}
    }}
}}
"""


@pytest.fixture
def nginx(tmp_path):
    """Start nginx with the README's lines in front of a server, and return its port."""
    program = installed("nginx")
    configuration = tmp_path / "nginx.conf"
    running = []

    def start(server, listen="127.0.0.1:{port}"):
        [lines] = re.findall(r"```nginx\n(.*?)```", README, re.DOTALL)
        assert "127.0.0.1:8080" in lines
        # nginx cannot pick a free port by itself. The system gives none of these to clients.
        port = next(port for port in random.sample(range(20_000, 30_000), 100) if not listens(port))
        configuration.write_text(
            CONFIGURATION.format(
                directory=tmp_path,
                listen=listen.format(port=port),
                lines=lines.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            )
        )

        process = subprocess.Popen([program, "-c", configuration], stderr=subprocess.PIPE)
        running.append(process)
        wait_for(lambda: process.poll() is not None or listens(port))
        assert process.poll() is None, process.stderr.read()
        return port

    yield start
    for process in running:
        process.terminate()
        process.communicate(timeout=30)


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ask(port, method, path, body=None, source="127.0.0.1", **headers):
    """Send a request from an address, and return status, headers and body of the answer."""
    headers = {"Host": "raffle.example.org", "Content-Type": "application/json", **headers}
    connection = HTTPConnection("127.0.0.1", port, timeout=30, source_address=(source, 0))
    with closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


BODY = json.dumps({"name": "Fair", "total_tickets": 4, "prizes": ONE_PRIZE})
PARTICIPANT, MANAGER = "127.0.0.1", "127.0.0.5"


@pytest.fixture(params=["127.0.0.1:{port}", "[::]:{port} ipv6only=off"], ids=["IPv4", "both"])
def trusted_nginx(serve, nginx, request):
    """The server and the port of an nginx that it trusts."""
    if "::" in request.param and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = serve(
        MANAGER_IPS=MANAGER,
        RAFFLE_HOSTS="raffle.example.org",
        RAFFLE_TRUSTED_PROXIES="127.0.0.1",
    )
    return server, nginx(server, request.param)


def test_behind_nginx_every_client_is_who_it_is(trusted_nginx):
    server, port = trusted_nginx
    assert ask(port, "POST", "/raffles/", BODY, PARTICIPANT)[0] == 403
    for header, value in (
        ("X-Forwarded-For", MANAGER),
        ("X-Real-IP", MANAGER),
        ("Forwarded", f"for={MANAGER}"),
    ):
        forged = {header: value}
        assert ask(port, "POST", "/raffles/", BODY, PARTICIPANT, **forged)[0] == 403, header

    status, headers, _ = ask(port, "POST", "/raffles", BODY, MANAGER)
    assert status == 201
    path = urljoin("/raffles", headers["Location"])

    # Each gets one ticket, whoever they say that they ask for.
    forged = {"X-Forwarded-For": "127.0.0.9"}
    for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        for expected in (201, 403):
            status, _, _ = ask(port, "POST", f"{path}participate/", source=source, **forged)
            assert status == expected, source
    assert ask(port, "POST", f"{path}participate/", source="127.0.0.9")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_behind_nginx_the_host_and_the_origin_count(trusted_nginx):
    server, port = trusted_nginx
    _, headers, _ = ask(port, "POST", "/raffles/", BODY, MANAGER)
    path = urljoin("/raffles/", headers["Location"])
    winners = f"{path}winners/"
    for n in range(4):
        ask(port, "POST", f"{path}participate/", source=f"127.0.1.{n}")

    def draw(**headers):
        return ask(port, "POST", winners, source=MANAGER, **headers)[0]

    assert draw(Origin="http://evil.example") == 403
    assert draw(Host="evil.example") == 421
    assert draw(Origin="http://raffle.example.org") == 201
    assert "WARNING" not in server.log.read_text()


def test_nginx_serves_the_pages_beside_the_raffle(trusted_nginx, tmp_path):
    _, port = trusted_nginx
    (tmp_path / "index.html").write_text("The raffle's own page")
    assert ask(port, "GET", "/index.html")[2] == b"The raffle's own page"


def test_behind_nginx_that_is_not_trusted_nobody_is_a_manager(serve, nginx):
    """Everybody has the address 127.0.0.1 there: a manager's, in the README's first command."""
    server = serve(MANAGER_IPS="127.0.0.1", processes=1)
    port, path = nginx(server), server.create()

    for target in ("/raffles/", f"{path}close/", f"{path}winners/", f"{path}redeem/"):
        status, _, answer = ask(port, "POST", target, BODY, source="127.0.0.77")
        assert (status, json.loads(answer)["type"]) == (403, "urn:raffle:not-a-manager"), target
        assert b"127.0.0.1" in answer, target
        assert b"RAFFLE_TRUSTED_PROXIES" in answer, target
    assert len(server.request("GET", "/raffles/")[2]) == 1
    assert server.log.read_text().count("WARNING") == 1


def test_a_long_body_passes_nginx(serve, nginx):
    """And one that is too long gets an answer of the server, not of nginx."""
    port = nginx(serve(RAFFLE_TRUSTED_PROXIES="127.0.0.1"))
    prizes = [{"name": f"{n:070}", "amount": 1} for n in range(9_000)]
    body = json.dumps({"name": "Fair", "total_tickets": 10_000, "prizes": prizes})
    assert ask(port, "POST", "/raffles/", body)[0] == 201

    status, headers, _ = ask(port, "POST", "/raffles/", body + " " * 2**20)
    assert (status, headers["Content-Type"]) == (413, "application/problem+json")
