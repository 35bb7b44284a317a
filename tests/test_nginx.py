"""The site for nginx that the README shows, with a real nginx in front of a real server."""

import gzip
import http.client
import json
import random
import re
import shlex
import shutil
import socket
import ssl
import subprocess
from contextlib import ExitStack, closing

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
    """Start nginx with the README's site for a server, and return a function that connects to it.

    `connect(source)` returns an http.client connection; `connect.plain()` one without TLS.
    """
    programs = [shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin") for name in ("nginx", "openssl")]
    if not all(programs):
        pytest.skip("nginx or openssl is not installed")
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    program, openssl = programs
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    new_certificate = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=raffle"
    command = shlex.split(f"{openssl} {new_certificate} -out {certificate} -keyout {key}")
    subprocess.run(command, check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=certificate)
    trusted.check_hostname = False
    running = []

    def start(server, listen="listen 127.0.0.1:{port} ssl;"):
        (site,) = re.findall(r"```nginx\n(.*?)```", README, re.DOTALL)
        # nginx cannot pick a free port by itself: so two of those that the system does not give to clients.
        free = filter(is_free, random.sample(range(20_000, 30_000), 100))
        plain, port = next(free), next(free)
        for old, new in (
            ("    listen 80;\n    listen [::]:80;\n", f"listen 127.0.0.1:{plain};"),
            ("    listen 443 ssl;\n    listen [::]:443 ssl;\n", listen.format(port=port)),
            ("/etc/ssl/raffle.pem", str(certificate)),
            ("/etc/ssl/raffle.key", str(key)),
            ("client_header_timeout 10s;", "client_header_timeout 1s;"),
            ("127.0.0.1:8080", f"127.0.0.1:{server.port}"),
            ("/var/www/raffle", str(tmp_path)),
        ):
            assert old in site
            site = site.replace(old, new)
        (tmp_path / "nginx.conf").write_text(CONFIGURATION.format(directory=tmp_path, site=site))
        running.append(subprocess.Popen([program, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL))
        wait_for(lambda: listens(port))
        assert running[-1].poll() is None

        def connect(source="127.0.0.1"):
            host = "::1" if source == "::1" else "127.0.0.1"
            return closing(
                http.client.HTTPSConnection(host, port, timeout=30, source_address=(source, 0), context=trusted)
            )

        connect.plain = lambda: closing(http.client.HTTPConnection("127.0.0.1", plain, timeout=30))
        return connect

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


def ask(connection, method, path, body=None, **headers):
    """Send a request with these headers besides the usual ones, and return status, headers and body of the answer."""
    headers = {"Host": "raffle.example.org", "Content-Type": "application/json", **headers}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


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
        "listen 127.0.0.1:{port} ssl; listen [::1]:{port} ssl;",
        # With one socket for both, addresses of IPv4 are mapped to IPv6.
        "listen [::]:{port} ssl ipv6only=off;",
    ],
)
def test_behind_nginx_every_client_is_who_it_is(serve, nginx, tmp_path, listen):
    server = serve(MANAGER_IPS="127.0.0.5, ::1", RAFFLE_HOSTS="raffle.example.org", RAFFLE_TRUSTED_PROXY="127.0.0.1")
    (tmp_path / "index.html").write_text("The raffle's own page")
    connect = nginx(server, listen)

    def request(method, path, body=None, source="127.0.0.1", **headers):
        with connect(source) as connection:
            return ask(connection, method, path, body, **headers)

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
    assert request("POST", f"{path}winners/", source="::1", Origin="https://raffle.example.org")[0] == 201
    assert "WARNING" not in server.log.read_text()


def test_a_long_body_passes_nginx_and_json_is_compressed(serve, nginx):
    connect = nginx(serve(RAFFLE_TRUSTED_PROXY="127.0.0.1"))
    prizes = [{"name": f"{n:070}", "amount": 1} for n in range(10_000)]
    body = json.dumps({"name": "Fair", "total_tickets": 10_000, "prizes": prizes})
    with connect() as connection:
        status, headers, raffle = ask(connection, "POST", "/raffles/", body)
        assert status == 201
        _, answered, compressed = ask(connection, "GET", headers["Location"], **{"Accept-Encoding": "gzip"})
        assert answered["Content-Encoding"] == "gzip"
        assert gzip.decompress(compressed) == raffle
        status, headers, _ = ask(connection, "POST", "/raffles/", body + " " * 2**20)
        assert (status, headers["Content-Type"]) == (413, "application/problem+json")


def test_without_tls_nginx_redirects(serve, nginx):
    with nginx(serve()).plain() as connection:
        status, headers, _ = ask(connection, "POST", "/raffles/?limit=1", "{}")
    assert (status, headers["Location"]) == (308, "https://raffle.example.org/raffles/?limit=1")


def test_half_sent_requests_of_one_client_do_not_keep_nginx_from_others(serve, nginx):
    connect = nginx(serve(RAFFLE_TRUSTED_PROXY="127.0.0.1"))
    with ExitStack() as opened:
        for _ in range(20):
            # A head that announces a body, and no body.
            connection = opened.enter_context(connect("127.0.0.7"))
            connection.putrequest("POST", "/raffles/")
            connection.putheader("Content-Length", "10")
            connection.endheaders()

        def status(source):
            with connect(source) as connection:
                return ask(connection, "GET", "/raffles/")[0]

        wait_for(lambda: status("127.0.0.7") == 429)
        assert status("127.0.0.8") == 200
        # Half a head.
        connection = opened.enter_context(connect("127.0.0.8"))
        connection.connect()
        connection.sock.sendall(b"GET /raffles/ HTTP/1.1\r\nHost:")
        assert connection.sock.recv(1) == b""
