"""The log of a real server: nothing a client sends looks like a line of its own in it."""

import re

from helpers import FAULTS

LINE = re.compile(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\+14:00 (INFO|WARNING|ERROR) .+")
# A line of its own, and what controls or confuses a terminal.
FORGED = "\n1999-12-31 00:00:00,000 INFO Winners drawn\r\x1b[2J\x9b2J\x7f\x85\u2028\u202e\u200b"


def test_no_client_forges_a_log_line_or_controls_a_terminal(serve, monkeypatch):
    # Its lines say by how much its time differs from that of the API.
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    server = serve(
        program=(FAULTS, "fail_to_read"), RAFFLE_TRUSTED_PROXIES="127.0.0.1", processes=1
    )
    end = b"Host: localhost\r\nConnection: close\r\n\r\n"
    quoted = "".join(f"%{byte:02x}" for byte in FORGED.encode()).encode()
    # waitress accepts these bytes in a header, but no control characters of ASCII.
    header = FORGED.encode().translate(None, b"\n\r\x1b\x7f")

    failed = server.send(b"GET /raffles/" + quoted + b"/ HTTP/1.1\r\n" + end)
    assert failed.startswith(b"HTTP/1.1 500")
    gone = server.send(b"GET /raffles/lost" + quoted + b"/ HTTP/1.1\r\n" + end)
    assert gone == b""
    forwarded = b"POST /raffles/ HTTP/1.1\r\nX-Forwarded-For: " + header + b"\r\n"
    assert server.send(forwarded + end).startswith(b"HTTP/1.1 400")
    assert server.stop() == 0

    log = server.log.read_bytes().decode()
    assert "Client disconnected while serving /raffles/lost" in log
    assert "ValueError: \n" in log
    assert "No client address" in log
    for line in log.splitlines():
        assert line.isprintable(), line
        assert line.startswith("    ") or LINE.fullmatch(line), line
