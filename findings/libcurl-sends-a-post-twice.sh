#!/usr/bin/env bash
# Pinned: pycurl 7.49.0 (libcurl 8.23.0), curl_cffi 0.17.0, and for comparison requests
#   2.34.2, httpx 0.28.1, aiohttp 3.14.5. Seen with Python 3.11.
#
# Expected: no client repeats a POST by itself. RFC 9110 says that it should not, unless it
#   knows the request to be idempotent, and no retry option is set here.
# Seen: libcurl repeats it, body and all, if it went out on a kept connection that then closes
#   before a byte of the answer. Here the server has read the whole POST and only then closes.
#   The caller gets 200 and no error, and the log of the server has two POSTs. On a new
#   connection the same POST is an error and not repeated: a first request never shows it.
#   pycurl and curl_cffi do so; requests, httpx and aiohttp raise an error after one POST.
# For a raffle: a server that stops after the commit and before the answer has written, and
#   the client asks again. For a ticket or a redemption the caller is then told of the second
#   answer only, as "already participated" or "already redeemed", for a success. Answer a
#   repeat like the first, or set FRESH_CONNECT for POST, which leaves the repeat to the caller.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  pycurl==7.49.0 curl_cffi==0.17.0 requests==2.34.2 httpx==0.28.1 aiohttp==3.14.5

seen=$(timeout 60 "$folder/env/bin/python" - <<'PYTHON'
import asyncio
import io
import socket
import threading

import aiohttp
import curl_cffi.requests
import httpx
import pycurl
import requests

BODY = b'{"ticket_number": 42}'
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
            body = stream.read(length)
            if line.startswith(b"POST"):
                posts.append(body)
                if not dropped.is_set():
                    dropped.set()
                    connection.shutdown(socket.SHUT_RDWR)
                    return
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def accept(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, args=(listener,), daemon=True).start()
url = f"http://127.0.0.1:{listener.getsockname()[1]}/"


def with_pycurl(kept, **options):
    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.WRITEDATA, io.BytesIO())
    if kept:
        handle.perform()
    handle.setopt(pycurl.POSTFIELDS, BODY)
    for name, value in options.items():
        handle.setopt(getattr(pycurl, name), value)
    handle.perform()
    return handle.getinfo(pycurl.RESPONSE_CODE)


def with_session(session, body, kept):
    with session:
        if kept:
            session.get(url)
        return session.post(url, **{body: BODY}).status_code


def with_aiohttp(kept):
    async def run():
        async with aiohttp.ClientSession() as session:
            if kept:
                async with session.get(url) as response:
                    await response.read()
            async with session.post(url, data=BODY) as response:
                return response.status
    return asyncio.run(run())


def report(name, call):
    posts.clear()
    dropped.clear()
    try:
        outcome = call()
    except Exception:
        outcome = "error"
    assert set(posts) == {BODY}
    print(f"{name}: {len(posts)} POST, {outcome}")


print(pycurl.version.split()[1])
for name, client in (
        ("pycurl", with_pycurl),
        ("curl_cffi", lambda kept: with_session(curl_cffi.requests.Session(), "data", kept)),
        ("requests", lambda kept: with_session(requests.Session(), "data", kept)),
        ("httpx", lambda kept: with_session(httpx.Client(), "content", kept)),
        ("aiohttp", with_aiohttp)):
    report(f"{name}, kept connection", lambda: client(True))
    report(f"{name}, new connection", lambda: client(False))
report("pycurl, FRESH_CONNECT", lambda: with_pycurl(True, FRESH_CONNECT=1))
PYTHON
)
echo "$seen"

stated='libcurl/8.23.0
pycurl, kept connection: 2 POST, 200
pycurl, new connection: 1 POST, error
curl_cffi, kept connection: 2 POST, 200
curl_cffi, new connection: 1 POST, error
requests, kept connection: 1 POST, error
requests, new connection: 1 POST, error
httpx, kept connection: 1 POST, error
httpx, new connection: 1 POST, error
aiohttp, kept connection: 1 POST, error
aiohttp, new connection: 1 POST, error
pycurl, FRESH_CONNECT: 1 POST, error'
if [ "$seen" != "$stated" ]; then
  printf 'The behaviour has changed. It was:\n%s\n' "$stated" >&2
  exit 1
fi
