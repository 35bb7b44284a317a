"""The log of a real server: nothing that a client sends looks like a line of its own, or controls a terminal."""

import re

LINE = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) .+")
FORGED = "\n1999-12-31 00:00:00,000 INFO Winners drawn\r\x1b[2J\x9b2J\x7f\x85\u2028\u202e\u200b"

# Every read of a raffle fails with what the client sent, and who asked for a path with "lost" is gone by then.
FAILING = """
import raffle, server, storage, waitress.channel

def write_soon(channel, data):
    if "lost" in channel.requests[0].path:
        raise waitress.channel.ClientDisconnected
    return send(channel, data)

def fail(self, raffle_id):
    raise ValueError(raffle_id)

send, server.Channel.write_soon, storage.Storage.get_raffle = server.Channel.write_soon, write_soon, fail
raffle.main()
"""


def test_no_client_forges_a_log_line_or_controls_a_terminal(serve):
    server = serve(program=("-c", FAILING), RAFFLE_TRUSTED_PROXIES="127.0.0.1")
    quoted = "".join(f"%{byte:02x}" for byte in FORGED.encode()).encode()
    # waitress accepts these bytes in a header, but no control characters of ASCII.
    header = FORGED.encode().translate(None, b"\n\r\x1b\x7f")
    for line, status in (
        (b"GET /raffles/" + quoted + b"/ HTTP/1.1\r\n", b"HTTP/1.1 500"),
        (b"GET /raffles/lost" + quoted + b"/ HTTP/1.1\r\n", b""),
        (b"POST /raffles/ HTTP/1.1\r\nX-Forwarded-For: " + header + b"\r\n", b"HTTP/1.1 400"),
    ):
        assert server.send(line + b"Host: localhost\r\nConnection: close\r\n\r\n")[:12] == status
    assert server.stop() == 0
    log = server.log.read_bytes().decode()
    for event in (
        "Client disconnected while serving /raffles/lost",
        "ValueError: \n",
        "No client address",
    ):
        assert event in log
    for line in log.splitlines():
        assert line.isprintable(), line
        assert line.startswith("    ") or LINE.fullmatch(line), line
