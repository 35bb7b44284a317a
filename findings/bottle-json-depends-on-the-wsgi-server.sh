#!/usr/bin/env bash
# Pinned: bottle 0.13.4; servers waitress 3.0.2, gunicorn 27.0.1, cheroot 11.1.2, granian
#   2.8.9, hypercorn 0.18.0; client httpx 0.28.1 with h2 4.4.1. Seen with Python 3.11.
#
# Expected: any WSGI server gives the same Bottle application the same JSON, as each of
#   these servers takes the chunks of a request apart before it calls the application.
# Seen: Bottle takes a body apart as chunks whenever the request says that it is chunked. Of
#   the five servers, only waitress takes that header away and sets a length. With the others
#   the JSON is read as chunks for a second time, and the client gets 400. Over HTTP/2 a body
#   without a length has no such header: with Hypercorn, request.json is then None, as for
#   no body, and the answer is 200. The same JSON with a length is right with all.
# For a raffle: a client that streams its JSON, or a proxy that passes it on so, works with
#   waitress, and gets 400 after a change of server. Over HTTP/2 an optional body, as one
#   with the public randomness of a draw, is lost in silence, and a draw cannot be repeated.
#   Require the body, or let the proxy in front collect it and set Content-Length.
set -euo pipefail

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check bottle==0.13.4 \
  waitress==3.0.2 gunicorn==27.0.1 cheroot==11.1.2 granian==2.8.9 hypercorn==0.18.0 \
  httpx==0.28.1 h2==4.4.1

cat > "$folder/service.py" <<'PYTHON'
import bottle

application = bottle.Bottle()


@application.post("/")
def show():
    return {"json": bottle.request.json}
PYTHON

cat > "$folder/client.py" <<'PYTHON'
import sys
import time

import httpx

name, port, versions = sys.argv[1], sys.argv[2], sys.argv[3:]
url = f"http://127.0.0.1:{port}/"
body = b'{"ticket_number": 42}'
for _ in range(200):
    try:
        httpx.get(url)
        break
    except httpx.TransportError:
        time.sleep(0.1)
for version in versions:
    with httpx.Client(http1=version == "1.1", http2=version == "2") as client:
        for what, content in (("length", body), ("no length", iter([body]))):
            response = client.post(
                url, content=content, headers={"Content-Type": "application/json"})
            assert response.http_version.startswith("HTTP/" + version)
            shown = " " + response.text if response.status_code == 200 else ""
            print(f"{name}, HTTP/{version}, {what}: {response.status_code}{shown}")
PYTHON

free_port() {
  # Below the ports that the system gives out by itself.
  "$folder/env/bin/python" - <<'PYTHON'
import random
import socket

while True:
    port = random.randrange(10000, 30000)
    try:
        socket.create_server(("127.0.0.1", port)).close()
        break
    except OSError:
        pass
print(port)
PYTHON
}

# Arguments: a name, the HTTP versions, the server's command with PORT for its port.
run() {
  local name=$1 versions command port
  read -ra versions <<< "$2"
  port=$(free_port)
  command=("${@:3}")
  command=("${command[@]//PORT/$port}")
  HOME=$folder PYTHONPATH=$folder "$folder/env/bin/${command[0]}" "${command[@]:1}" \
    > "$folder/$name.log" 2>&1 &
  server=$!
  timeout 20 "$folder/env/bin/python" "$folder/client.py" "$name" "$port" "${versions[@]}" \
    >> "$folder/seen"
  kill "$server"
  wait "$server" || true
  server=
}
run waitress 1.1 waitress-serve --listen 127.0.0.1:PORT service:application
run gunicorn 1.1 gunicorn --bind 127.0.0.1:PORT service:application
run cheroot 1.1 cheroot --bind 127.0.0.1:PORT service:application
run granian 1.1 granian --interface wsgi --host 127.0.0.1 --port PORT service:application
run hypercorn "1.1 2" hypercorn --bind 127.0.0.1:PORT wsgi:service:application
seen=$(cat "$folder/seen")
echo "$seen"

stated='waitress, HTTP/1.1, length: 200 {"json": {"ticket_number": 42}}
waitress, HTTP/1.1, no length: 200 {"json": {"ticket_number": 42}}
gunicorn, HTTP/1.1, length: 200 {"json": {"ticket_number": 42}}
gunicorn, HTTP/1.1, no length: 400
cheroot, HTTP/1.1, length: 200 {"json": {"ticket_number": 42}}
cheroot, HTTP/1.1, no length: 400
granian, HTTP/1.1, length: 200 {"json": {"ticket_number": 42}}
granian, HTTP/1.1, no length: 400
hypercorn, HTTP/1.1, length: 200 {"json": {"ticket_number": 42}}
hypercorn, HTTP/1.1, no length: 400
hypercorn, HTTP/2, length: 200 {"json": {"ticket_number": 42}}
hypercorn, HTTP/2, no length: 200 {"json": null}'
if [ "$seen" != "$stated" ]; then
  printf 'The behaviour has changed. It was:\n%s\n' "$stated" >&2
  exit 1
fi
