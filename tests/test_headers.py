"""What every answer says besides its body."""

import json
import re

from description import fits


def test_no_answer_of_the_server_says_what_serves(serve):
    server = serve()
    expect = b"POST /raffles/ HTTP/1.1\r\nExpect: 100-continue\r\n"
    for request, status in (
        (b"GET /raffles/ HTTP/1.1\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET /nothing/ HTTP/1.1\r\nConnection: close\r\n\r\n", b"404"),
        (b"nonsense\r\n\r\n", b"400"),
        # Not a byte more than is read: the server would reset the connection.
        ((b"GET / HTTP/1.1\r\nX: " + b"x" * 2**15)[: 2**15 - 4] + b"\r\n\r\n", b"431"),
        (b"POST /raffles/ HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"POST /raffles/ HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
        (b"POST /raffles/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"POST /raffles/ HTTP/2.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (b"GET http://[::1/ HTTP/1.1\r\n\r\n", b"400"),
        # Nobody is told to go on with a body that is refused, or that there is none of.
        (expect + b"Content-Length: 99999999\r\n\r\n", b"413"),
        (expect + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (expect + b"Connection: close\r\n\r\n", b"415"),
    ):
        head, _, body = server.send(request).partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == status, request
        assert b"\r\nX-Content-Type-Options: nosniff" in head
        assert b"\r\nCache-Control: no-store" in head
        if status != b"200":
            assert b"\r\nContent-Type: application/problem+json" in head
            assert fits(json.loads(body), {"$ref": "#/components/schemas/Problem"})
            assert json.loads(body)["status"] == int(status)
        assert not re.search(b"(?i)waitress|bottle|python|\r\nserver:", head + body)
    assert " ERROR " not in server.log.read_text()
