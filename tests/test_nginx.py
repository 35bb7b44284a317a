"""The site for nginx that the README shows, with a real nginx in front of a real server."""

import http.client
import json
import random
import re
import shutil
import socket
import subprocess
import threading
from contextlib import closing

import pytest
from helpers import ONE_PRIZE, ROOT

# The workers read pytest's directory, which is its owner's only; without root, nginx ignores the user.
HTTP = """
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


SITE, MAP = re.findall(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def request(host, port, method, path, body=None, source=None, **headers):
    """Send one request past Server, to nginx."""
    connection = http.client.HTTPConnection(host, port, timeout=30, source_address=(source, 0) if source else None)
    with closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


@pytest.fixture
def nginx(tmp_path):
    """Start nginx with what a function of its port returns, and return the port."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip("there is no nginx here")
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    running = []

    def start(configuration):
        # nginx cannot pick a free port by itself: so one of those that the system does not give to clients.
        port = next(filter(is_free, random.sample(range(20_000, 30_000), 100)))
        (tmp_path / "nginx.conf").write_text(HTTP.format(directory=tmp_path, site=configuration(port)))
        running.append(subprocess.Popen([program, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL))
        assert listens(running[-1], port)
        return port

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


def replaced(text, replacements):
    """Replace what the README's configuration has by what a test has."""
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    return text


def site_of_readme(directory, server, listen, port):
    """Return the README's site, for a server."""
    return replaced(
        SITE,
        {
            "    listen 80;\n    listen [::]:80;\n": "".join(f"listen {address}:{port};\n" for address in listen),
            "127.0.0.1:8080": f"127.0.0.1:{server.port}",
            "/var/www/raffle": str(directory),
        },
    )


def is_free(port):
    try:
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError:
        return False
    return True


def listens(process, port):
    """Wait until the process listens (true) or has ended (false)."""
    poll = threading.Event()
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=30).close()
        except OSError:
            poll.wait(0.05)
        else:
            return process.poll() is None
    return False


@pytest.mark.parametrize("listen", [["127.0.0.1", "[::1]"], ["[::]"]])
def test_behind_nginx_every_client_is_who_it_is(serve, nginx, tmp_path, listen):
    server = serve(MANAGER_IPS="127.0.0.5, ::1", RAFFLE_HOSTS="raffle.example.org", RAFFLE_TRUSTED_PROXY="127.0.0.1")
    (tmp_path / "index.html").write_text("The raffle's own page")

    def configuration(port):
        # With one socket for both, addresses of IPv4 are mapped to IPv6.
        dual = {f"listen [::]:{port};": f"listen [::]:{port} ipv6only=off;"} if listen == ["[::]"] else {}
        return replaced(site_of_readme(tmp_path, server, listen, port), dual)

    port = nginx(configuration)

    def ask(source, method, path, body=None, **headers):
        host = "::1" if source == "::1" else "127.0.0.1"
        headers = {"Host": "raffle.example.org", "Content-Type": "application/json", **headers}
        return request(host, port, method, path, body, source, **headers)

    assert ask("127.0.0.1", "GET", "/index.html")[2] == b"The raffle's own page"
    body = json.dumps({"name": "Fair", "total_tickets": 5, "prizes": ONE_PRIZE})
    for forged in ({}, {"X-Forwarded-For": "127.0.0.5"}, {"X-Real-IP": "::1"}, {"Forwarded": "for=127.0.0.5"}):
        assert ask("127.0.0.1", "POST", "/raffles/", body, **forged)[0] == 403
    status, headers, _ = ask("127.0.0.5", "POST", "/raffles", body)
    assert status == 201
    path = headers["Location"]
    for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3", "::1"):
        forged = {"X-Forwarded-For": "127.0.0.9"}
        assert [ask(source, "POST", f"{path}participate/", **forged)[0] for _ in range(2)] == [201, 403]
    assert ask("127.0.0.9", "POST", f"{path}participate/")[0] == 201
    origin = {"Origin": "https://evil.example"}
    assert ask("::1", "POST", f"{path}winners/", **origin)[0] == 403
    assert ask("127.0.0.5", "POST", f"{path}winners/", Host="evil.example")[0] == 421
    assert ask("::1", "POST", f"{path}winners/", Origin="http://raffle.example.org")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_a_long_body_passes_nginx(serve, nginx, tmp_path):
    server = serve(RAFFLE_TRUSTED_PROXY="127.0.0.1")
    port = nginx(lambda port: site_of_readme(tmp_path, server, ["127.0.0.1"], port))
    prizes = [{"name": f"{n:070}", "amount": 1} for n in range(10_000)]
    body = json.dumps({"name": "Fair", "total_tickets": 10_000, "prizes": prizes})
    headers = {"Host": "raffle.example.org", "Content-Type": "application/json"}
    assert request("127.0.0.1", port, "POST", "/raffles/", body, **headers)[0] == 201
    status, sent, _ = request("127.0.0.1", port, "POST", "/raffles/", body + " " * 2**20, **headers)
    assert (status, sent["Content-Type"]) == (413, "application/problem+json")


def test_one_nginx_serves_raffles_that_live_on_many_servers(serve, nginx, tmp_path):
    directories = [tmp_path / name for name in ("spring", "summer")]
    for directory in directories:
        directory.mkdir()
    spring, summer = (
        serve(RAFFLE_TRUSTED_PROXY="127.0.0.1", RAFFLE_DATABASE=str(directory / "raffle.db"))
        for directory in directories
    )

    def configuration(port):
        site = re.sub(
            r"upstream raffle \{.*?\n\}\n", MAP, site_of_readme(tmp_path, spring, ["127.0.0.1"], port), flags=re.DOTALL
        )
        return replaced(
            site,
            {
                "server_name raffle.": "server_name *.raffle.",
                "proxy_pass http://raffle;": "proxy_pass http://$raffle;",
                "192.0.2.21:8080": f"127.0.0.1:{spring.port}",
                "192.0.2.22:8080": f"127.0.0.1:{summer.port}",
            },
        )

    port = nginx(configuration)
    for name, server in (("spring", spring), ("summer", summer)):
        headers = {"Host": f"{name}.raffle.example.org", "Content-Type": "application/json"}
        body = json.dumps({"name": name, "total_tickets": 1, "prizes": ONE_PRIZE})
        status, sent, _ = request("127.0.0.1", port, "POST", "/raffles/", body, **headers)
        assert status == 201
        assert request("127.0.0.1", port, "POST", f"{sent['Location']}participate/", **headers)[0] == 201
        assert [raffle["name"] for raffle in server.request("GET", "/raffles/")[2]] == [name]
