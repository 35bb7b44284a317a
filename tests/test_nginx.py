"""The lines for nginx that the README shows, with a real nginx in front of a real server."""

import json
import random
import re
import shutil
import socket
import subprocess
from contextlib import closing
from http.client import HTTPConnection

import pytest
from helpers import ONE_PRIZE, README, wait_for

# The workers read pytest's directory, which is its owner's only; without root, nginx ignores the user.
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
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip("nginx is not installed")
    running = []

    def start(server, listen="127.0.0.1:{port}"):
        (lines,) = re.findall(r"```nginx\n(.*?)```", README, re.DOTALL)
        assert "127.0.0.1:8080" in lines
        # nginx cannot pick a free port by itself. The system gives none of these to clients.
        port = next(port for port in random.sample(range(20_000, 30_000), 100) if not listens(port))
        configuration = CONFIGURATION.format(
            directory=tmp_path,
            listen=listen.format(port=port),
            lines=lines.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
        )
        (tmp_path / "nginx.conf").write_text(configuration)
        running.append(
            subprocess.Popen([program, "-c", tmp_path / "nginx.conf"], stderr=subprocess.PIPE)
        )
        wait_for(lambda: running[-1].poll() is not None or listens(port))
        assert running[-1].poll() is None, running[-1].stderr.read()
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
    with closing(
        HTTPConnection("127.0.0.1", port, timeout=30, source_address=(source, 0))
    ) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:{port}", "[::]:{port} ipv6only=off"],
)
def test_behind_nginx_every_client_is_who_it_is(serve, nginx, tmp_path, listen):
    if "::" in listen and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = serve(
        MANAGER_IPS="127.0.0.5",
        RAFFLE_HOSTS="raffle.example.org",
        RAFFLE_TRUSTED_PROXIES="127.0.0.1",
    )
    (tmp_path / "index.html").write_text("The raffle's own page")
    port = nginx(server, listen)
    assert ask(port, "GET", "/index.html")[2] == b"The raffle's own page"
    body = json.dumps({"name": "Fair", "total_tickets": 4, "prizes": ONE_PRIZE})
    for forged in (
        {},
        {"X-Forwarded-For": "127.0.0.5"},
        {"X-Real-IP": "127.0.0.5"},
        {"Forwarded": "for=127.0.0.5"},
    ):
        assert ask(port, "POST", "/raffles/", body, **forged)[0] == 403, forged
    status, headers, _ = ask(port, "POST", "/raffles", body, "127.0.0.5")
    assert status == 201
    raffle = headers["Location"]
    for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        forged = {"X-Forwarded-For": "127.0.0.9"}
        answers = [
            ask(port, "POST", f"{raffle}participate/", source=source, **forged)[0] for _ in range(2)
        ]
        assert answers == [201, 403], source
    assert ask(port, "POST", f"{raffle}participate/", source="127.0.0.9")[0] == 201
    winners, manager = f"{raffle}winners/", "127.0.0.5"
    assert ask(port, "POST", winners, source=manager, Origin="http://evil.example")[0] == 403
    assert ask(port, "POST", winners, source=manager, Host="evil.example")[0] == 421
    assert ask(port, "POST", winners, source=manager, Origin="http://raffle.example.org")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_behind_nginx_that_is_not_trusted_nobody_is_a_manager(serve, nginx):
    """Everybody has the address 127.0.0.1 there, which the README's first command makes a manager's."""
    server = serve(MANAGER_IPS="127.0.0.1")
    port, raffle = nginx(server), server.create()
    body = json.dumps({"name": "Fair", "total_tickets": 4, "prizes": ONE_PRIZE})
    for path in ("/raffles/", f"{raffle}close/", f"{raffle}winners/", f"{raffle}redeem/"):
        status, _, answer = ask(port, "POST", path, body, source="127.0.0.77")
        assert (status, json.loads(answer)["type"]) == (403, "urn:raffle:not-a-manager"), path
        assert b"127.0.0.1" in answer and b"RAFFLE_TRUSTED_PROXIES" in answer, path
    assert len(server.request("GET", "/raffles/")[2]) == 1
    assert server.log.read_text().count("WARNING") == 1


def test_a_long_body_passes_nginx(serve, nginx):
    port = nginx(serve(RAFFLE_TRUSTED_PROXIES="127.0.0.1"))
    prizes = [{"name": f"{n:070}", "amount": 1} for n in range(9_000)]
    body = json.dumps({"name": "Fair", "total_tickets": 10_000, "prizes": prizes})
    assert ask(port, "POST", "/raffles/", body)[0] == 201
    status, headers, _ = ask(port, "POST", "/raffles/", body + " " * 2**20)
    assert (status, headers["Content-Type"]) == (413, "application/problem+json")
