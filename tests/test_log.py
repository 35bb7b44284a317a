"""Every line of the log is one line of printable text, whoever has written it."""

import logging
import re

from raffle import LineFormatter

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [^\x00-\x1f\x7f-\x9f]+")


def test_a_message_is_one_printable_line():
    record = logging.makeLogRecord({"msg": "from %s", "args": ("a\n2026 INFO b\x1b[2J\u2028\u202e\udc80é",)})
    assert LineFormatter("%(message)s").format(record) == r"from a\n2026 INFO b\x1b[2J\u2028\u202e\udc80é"


def test_a_traceback_is_kept_and_indented():
    try:
        raise ValueError("first\n2026 INFO second")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "A request failed", "exc_info": (type(error), error, error.__traceback__)}
        )
    first, *lines = LineFormatter("%(message)s").format(record).split("\n")
    assert first == "A request failed"
    assert all(line.startswith("    ") for line in lines)
    assert lines[-2:] == ["    ValueError: first", "    2026 INFO second"]


def test_no_request_forges_a_line(serve):
    server = serve(program=("-c", FAILING))
    forged = b"%0A2026-01-01%2000:00:00,000%20INFO%20Winners%20drawn%1B[2J"
    server.send(b"GET /raffles/" + forged + b"/ HTTP/1.1\r\nHost: x\r\n\r\n")
    server.send(b"nonsense" + forged + b"\r\n\r\n")
    assert server.stop() == 0
    lines = server.log.read_text().splitlines()
    assert sum("Client disconnected while serving" in line for line in lines) == 2
    for line in lines:
        assert LINE.fullmatch(line) or line.startswith("    "), line


# Loses every client while it is served, as waitress logs it with the path.
FAILING = """
import raffle
from waitress.channel import HTTPChannel, ClientDisconnected

def write_soon(self, data):
    raise ClientDisconnected

HTTPChannel.write_soon = write_soon
raffle.main()
"""
