"""The site for nginx that the README shows, with a real nginx in front of a real server."""

import http.client
import json
import random
import re
import shutil
import socket
import subprocess
from contextlib import closing

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
    {site}
}}
"""


@pytest.fixture
def nginx(tmp_path):
    """Start nginx with the README's site for a server, and return a function that sends it a request."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip("there is no nginx here")
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    running = []

    def start(server, listen):
        (site,) = re.findall(r"```nginx\n(.*?)```", README, re.DOTALL)
        # nginx cannot pick a free port by itself: so one of those that the system does not give to clients.
        port = next(filter(is_free, random.sample(range(20_000, 30_000), 100)))
        for old, new in (
            ("    listen 80;\n    listen [::]:80;\n", listen.format(port=port)),
            ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            ("/var/www/raffle", str(tmp_path)),
        ):
            assert old in site
            site = site.replace(old, new)
        (tmp_path / "nginx.conf").write_text(CONFIGURATION.format(directory=tmp_path, site=site))
        running.append(subprocess.Popen([program, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL))
        wait_for(lambda: listens(port))
        assert running[-1].poll() is None

        def request(method, path, body=None, source="127.0.0.1", **headers):
            headers = {"Host": "raffle.example.org", "Content-Type": "application/json", **headers}
            host = "::1" if source == "::1" else "127.0.0.1"
            connection = http.client.HTTPConnection(host, port, timeout=30, source_address=(source, 0))
            with closing(connection):
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, response.headers, response.read()

        return request

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


def is_free(port):
    try:
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError:
        return False
    return True


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "listen",
    [
        "listen 127.0.0.1:{port}; listen [::1]:{port};",
        # With one socket for both, addresses of IPv4 are mapped to IPv6.
        "listen [::]:{port} ipv6only=off;",
    ],
)
def test_behind_nginx_every_client_is_who_it_is(serve, nginx, tmp_path, listen):
    server = serve(MANAGER_IPS="127.0.0.5, ::1", RAFFLE_HOSTS="raffle.example.org", RAFFLE_TRUSTED_PROXY="127.0.0.1")
    (tmp_path / "index.html").write_text("The raffle's own page")
    request = nginx(server, listen)
    assert request("GET", "/index.html")[2] == b"The raffle's own page"
    body = json.dumps({"name": "Fair", "total_tickets": 5, "prizes": ONE_PRIZE})
    for forged in ({}, {"X-Forwarded-For": "127.0.0.5"}, {"X-Real-IP": "::1"}, {"Forwarded": "for=127.0.0.5"}):
        assert request("POST", "/raffles/", body, **forged)[0] == 403
    status, headers, _ = request("POST", "/raffles", body, "127.0.0.5")
    assert status == 201
    path = headers["Location"]

    def participate(source, **forged):
        return request("POST", f"{path}participate/", source=source, **forged)[0]

    for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3", "::1"):
        assert [participate(source, **{"X-Forwarded-For": "127.0.0.9"}) for _ in range(2)] == [201, 403]
    assert participate("127.0.0.9") == 201
    assert request("POST", f"{path}winners/", source="::1", Origin="https://evil.example")[0] == 403
    assert request("POST", f"{path}winners/", source="127.0.0.5", Host="evil.example")[0] == 421
    assert request("POST", f"{path}winners/", source="::1", Origin="http://raffle.example.org")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_a_long_body_passes_nginx(serve, nginx):
    request = nginx(serve(RAFFLE_TRUSTED_PROXY="127.0.0.1"), "listen 127.0.0.1:{port};")
    prizes = [{"name": f"{n:070}", "amount": 1} for n in range(10_000)]
    body = json.dumps({"name": "Fair", "total_tickets": 10_000, "prizes": prizes})
    assert request("POST", "/raffles/", body)[0] == 201
    status, headers, _ = request("POST", "/raffles/", body + " " * 2**20)
    assert (status, headers["Content-Type"]) == (413, "application/problem+json")
