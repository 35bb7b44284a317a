"""What a request and the database may hold. All else is refused.

A refused request gets a sentence on what was expected.
"""

import io
import json
import sqlite3
from contextlib import closing

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, STRANGER, post_environ, query, refused
from webtest import TestRequest

RAFFLE = {
    "name": "Fair",
    "total_tickets": 10,
    "prizes": [*ONE_PRIZE, {"name": "Book", "amount": 2}],
}
TICKET = {"ticket_number": 1, "verification_code": "x"}

# What reads a body: a valid one, the most bytes of one, and the status of the answer.
BODIES = {
    "/raffles/": (RAFFLE, 2**20, 201),
    f"{NO_RAFFLE}winners/": ({}, 2**20, 404),
    f"{NO_RAFFLE}verify-ticket/": (TICKET, 2**12, 404),
    f"{NO_RAFFLE}redeem/": (TICKET, 2**12, 404),
}
# The same of a raffle that exists.
TARGETS = ["/raffles/", "{path}winners/", "{path}verify-ticket/", "{path}redeem/"]

# What a refusal says was expected.
NAME = "a non-blank string of 1 to 200 characters"
INTEGER = "an integer from 1 to 9007199254740991"
PRINTABLE = "a string of 1 to 1000 printable characters, without a space at either end"
RANDOMNESS = "1 to 1000 visible ASCII characters with single spaces between"
PRIZES = "a non-empty list of objects with name and amount"
PRIZE = "an object with name and amount"

# Stands for a member that is left out.
MISSING = object()
# What a refusal calls the type of a value.
TYPES = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
    type(None): "null or missing",
    type(MISSING): "null or missing",
}

NO_NAMES = [
    MISSING, None, 1, True, [], {}, "", " ", "\t\n\u00a0\u2003", "x" * 201, "\ud800", "a\udfffb",
]  # fmt: skip
NO_INTEGERS = [
    MISSING, None, True, False, "1", 7.5, 1e300, [], {}, 0, -1, -(10**30),
    2**53, 2**63, 2**64, int("9" * 4000),
]  # fmt: skip
NO_SOURCES = [
    7, True, ["x"], {}, "", " ", "x ", " x", "a1b2c3\n", "a\u200bb", "a\u00a0b", "a\x1bb",
    "x" * 1001, "\ud800",
]  # fmt: skip
NO_RANDOMNESS = [
    ("a1b2c3\n", "has a line feed (U+000A) at the end"),
    ("a\r\nb", "has a carriage return (U+000D) at character 2"),
    ("a\tb", "has a tab (U+0009) at character 2"),
    ("a1\u200bb", "has U+200B at character 3"),
    ("a\xa0b", "has U+00A0 at character 2"),
    ("7 13\ufe0f", "has U+FE0F at the end"),
    ("\u3164", "has U+3164 at the end"),
    ("\U000e0100x", "has U+E0100 at character 1"),
    ("\ud800x", "has U+D800 at character 1"),
    ("7\x7f8", "has U+007F at character 2"),
    ("Zürich 1017", "has U+00FC at character 2"),
    (" x", "has a space at character 1"),
    ("x ", "has a space at the end"),
    (" ", "has a space at the end"),
    ("7  13", "has two spaces at character 2"),
    ("", "is empty"),
    ("x" * 1305, "has 1,305 characters"),
    (7, "is a number, not a string"),
    (7.5, "is a number, not a string"),
    (True, "is a boolean, not a string"),
    (["x"], "is a list, not a string"),
    ({}, "is an object, not a string"),
    (None, "is null or missing, not a string"),
]

# Whole numbers as clients write them: Gson, jsonlite, jq, Octave, and nobody.
WHOLE_NUMBERS = [
    ("42", 42),
    ("42.0", 42),
    ("1e+05", 100_000),
    ("1E+5", 100_000),
    ("1000000.0", 1_000_000),
    ("300e-2", 3),
    ("0.3e1", 3),
    ("4.2E+01", 42),
    ("1.500e3", 1500),
    ("1e00000000000000000001", 10),
    ("9007199254740991.0", 2**53 - 1),
    ("0.9007199254740991e16", 2**53 - 1),
    ("90071992547409910000000e-7", 2**53 - 1),
    ("1" + "0" * 500_000 + "e-499999", 10),
    ("0." + "0" * 500_000 + "1e500002", 10),
]
NO_WHOLE_NUMBERS = [
    "42.5", "0.1", "1e-1", "0", "0.0", "0e9", "-0.0", "-1", "-42.0", "1e400", "1e-400", "1e16",
    "5e-324", "9007199254740992.0", "9007199254740991.5",
    "9007199254740991.0000000000000000000000000000001", "1e9999999999999999999",
    "1e-9999999999999999999", "0e9999999999999999999", "9" * 500_000, "0." + "9" * 500_000,
    "1e" + "9" * 500_000, "1." + "0" * 500_000 + "1",
]  # fmt: skip

NOT_ONE_OBJECT = [
    b" ", b"null", b"true", b"0", b'"x"', b"[]", b"[{}]", b"{", b"{}{}", b"{'name': 1}",
    b"name=Fair&x=1", b"\x00", b"[" * 4096, b'{"a":' * 800,
    # JavaScript, and not JSON.
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 01}', b'{"a": 1,}',
    b'{"a": "\n"}',
    # A member that occurs twice.
    b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"\\ud800": 1, "\\ud800": 1}',
    # Other encodings than UTF-8.
    b'{"a": "\xff"}', b'{"a": "\xc0\x80"}', b'{"a": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"), "{}".encode("utf-32"),
]  # fmt: skip
# Longer than a ticket may be.
TOO_DEEP = [
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
]


def short(value):
    """Return a value as text that is short enough to name a test or to explain a failure."""
    return repr(value)[:60]


def replaced(body, value, keys):
    """Return a copy of a body with the member at `keys` replaced, or left out."""
    copy = json.loads(json.dumps(body))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]

    if value is MISSING:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return copy


def assert_refused(client, path, body, detail):
    """Check that a manager who posts the body gets 400 and the detail."""
    response = client.send("POST", path, body)

    assert response.status_int == 400, short(body)
    assert response.json["type"] == "about:blank", short(body)
    assert response.json["detail"] == detail, short(body)


def assert_values_refused(client, path, body, keys, values, expectation, expected_type):
    """Check that each value, at `keys` of a body, is refused.

    The detail says what was expected, and the type of the value if it is not `expected_type`.
    """
    for value in values:
        found_type = TYPES[type(value)]
        detail = expectation
        if found_type != expected_type:
            detail += f", not {found_type}"
        assert_refused(client, path, replaced(body, value, keys), detail)


# Members


@pytest.mark.parametrize(
    "name",
    ["x", "x" * 200, " x ", "Größe 🎟", "a\0b", "'; DROP TABLE raffle; --", "\u200b"],
    ids=short,
)
def test_a_name_is_kept_as_it_is_sent(client, name):
    created = client.create(prizes=[{"name": name, "amount": 1}], name=name).json

    assert created["name"] == name
    assert created["prizes"][0]["name"] == name
    assert client.get("/raffles/").json[0]["name"] == name


@pytest.mark.parametrize("source", ["x", "x" * 1000, "6 aus 49, Ziehung „Süd“ 🎟"], ids=short)
def test_a_randomness_source_is_kept_as_it_is_sent(client, source):
    assert client.create(randomness_source=source).json["randomness_source"] == source


# Of a raffle, by member: where it is, what it may not be, and what was expected.
MEMBERS = {
    "name": (["name"], NO_NAMES, NAME, "a string"),
    "total_tickets": (["total_tickets"], NO_INTEGERS, INTEGER, "a number"),
    "prizes": (["prizes"], [MISSING, None, [], {}, "x", 1, True], PRIZES, "a list"),
    "prizes[0]": (["prizes", 0], [None, [], "x", 1, True], PRIZE, "an object"),
    "prizes[1].name": (["prizes", 1, "name"], NO_NAMES, NAME, "a string"),
    "prizes[1].amount": (["prizes", 1, "amount"], NO_INTEGERS, INTEGER, "a number"),
    "randomness_source": (["randomness_source"], NO_SOURCES, PRINTABLE, "a string"),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_raffle_is_refused_with_the_member_and_what_was_expected(client, member):
    keys, values, expected, expected_type = MEMBERS[member]

    sentence = f"{member} must be {expected}"
    assert_values_refused(client, "/raffles/", RAFFLE, keys, values, sentence, expected_type)

    assert client.get("/raffles/").json == []


@pytest.mark.parametrize("action", ["verify-ticket", "redeem"])
def test_a_ticket_is_refused_with_the_member_and_what_was_expected(client, action):
    path = f"{NO_RAFFLE}{action}/"

    sentence = f"ticket_number must be {INTEGER}"
    keys = ["ticket_number"]
    assert_values_refused(client, path, TICKET, keys, NO_INTEGERS, sentence, "a number")

    sentence = "verification_code must be a string"
    keys = ["verification_code"]
    no_codes = [MISSING, None, 1, True, [], {}]
    assert_values_refused(client, path, TICKET, keys, no_codes, sentence, "a string")


@pytest.mark.parametrize("amounts", [[4], [2, 2], [2**53 - 1], [2**53 - 1] * 3], ids=short)
def test_there_are_no_more_prizes_than_tickets(client, amounts):
    prizes = [{"name": "Book", "amount": amount} for amount in amounts]

    refused(client.create(3, prizes, 400), "too-many-prizes", "Too many prizes")

    assert client.get("/raffles/").json == []


# Numbers


@pytest.mark.parametrize(("text", "value"), WHOLE_NUMBERS, ids=short)
def test_a_whole_number_may_be_written_in_any_way(client, text, value):
    """By its exact value, as JSON Schema 2020-12, 6.1.1, counts integers."""
    body = (
        b'{"name": "Fair", "total_tickets": %s, "prizes": [{"name": "Pen", "amount": %s}],'
        b' "more": 1e999}'
    )
    created = client.send("POST", "/raffles/", body % (text.encode(), text.encode()), 201).json

    assert created["total_tickets"] == value
    assert created["prizes"][0]["amount"] == value

    ticket = b'{"ticket_number": %s, "verification_code": "x"}' % text.encode()
    if len(ticket) <= 4096:
        path = f"/raffles/{created['id']}/"
        refused(client.send("POST", f"{path}verify-ticket/", ticket, 400), "not-drawn")


@pytest.mark.parametrize("text", NO_WHOLE_NUMBERS, ids=short)
def test_any_other_number_is_refused_at_once(client, text):
    """Nothing is computed from a number that is out of range: see the time limit of a test."""
    number = text.encode()

    body = b'{"name": "Fair", "total_tickets": %s, "prizes": [{"name": "Pen", "amount": 1}]}'
    assert_refused(client, "/raffles/", body % number, f"total_tickets must be {INTEGER}")

    body = b'{"name": "Fair", "total_tickets": 9, "prizes": [{"name": "Pen", "amount": %s}]}'
    assert_refused(client, "/raffles/", body % number, f"prizes[0].amount must be {INTEGER}")

    assert client.get("/raffles/").json == []


# What a draw is sent


@pytest.mark.parametrize(
    "value", ["x", "!~", "a1 b2 c3", "7 13 21 34 42 49", "x" * 1000], ids=short
)
def test_randomness_is_visible_ascii_with_single_spaces(client, value):
    path, _ = client.new_sold_out()
    client.draw(path, {"public_randomness": value})

    assert client.get(path).json["public_randomness"] == value


@pytest.mark.parametrize(("value", "fault"), NO_RANDOMNESS, ids=short)
def test_randomness_that_is_easily_misread_is_refused(client, value, fault):
    path, _ = client.new_sold_out()

    detail = f"public_randomness must be {RANDOMNESS}: it {fault}"
    assert_refused(client, f"{path}winners/", {"public_randomness": value}, detail)

    assert client.get(path).json["public_randomness"] is None


@pytest.mark.parametrize(
    ("body", "unknown"),
    [
        ({"public_randomness": "x", "more": 1}, "more"),
        ({"Public_Randomness": "x"}, "Public_Randomness"),
        ({"more": {}}, "more"),
    ],
    ids=short,
)
def test_a_draw_with_an_unknown_member_is_refused(client, body, unknown):
    path, _ = client.new_sold_out()

    detail = client.draw(path, body, 400).json["detail"]

    assert unknown in detail
    assert "public_randomness" in detail
    assert client.get(path).json["public_randomness"] is None


def test_a_draw_with_a_query_or_a_body_of_unknown_length_is_refused(client):
    """The randomness that was sent may be there."""
    path, _ = client.new_sold_out()

    client.send("POST", f"{path}winners/?public_randomness=x", None, 400)
    client.send("POST", f"{path}winners/", None, 411, Transfer_Encoding="chunked")

    assert client.get(path).json["public_randomness"] is None


# Bodies


# What servers pass on with such a body. Some mark its end.
HTTP_2 = {"SERVER_PROTOCOL": "HTTP/2"}
HTTP_3 = {"SERVER_PROTOCOL": "HTTP/3"}
CHUNKED = {"SERVER_PROTOCOL": "HTTP/1.1", "HTTP_TRANSFER_ENCODING": "chunked"}
TERMINATED = {
    "HTTP/2, end marked": {**HTTP_2, "wsgi.input_terminated": True},
    "chunked, end marked": {**CHUNKED, "wsgi.input_terminated": True},
}
UNTERMINATED = {
    "HTTP/2": HTTP_2,
    "HTTP/3": HTTP_3,
    "chunked": CHUNKED,
    "Chunked": {**CHUNKED, "HTTP_TRANSFER_ENCODING": "Chunked"},
    "chunked, empty length": {**CHUNKED, "CONTENT_LENGTH": ""},
}


@pytest.mark.parametrize("environ", TERMINATED.values(), ids=TERMINATED)
def test_a_body_without_a_length_is_read_to_its_end(client, environ):
    """Otherwise, on HTTP/2 servers, a draw would be made with other randomness than was sent."""
    path, [ticket] = client.new_sold_out()
    body = b'{"public_randomness": "round 7"}'

    assert post_environ(client, f"{path}winners/", body, environ).status_int == 201
    assert client.get(path).json["public_randomness"] == "round 7"

    body = json.dumps(ticket).encode()
    assert post_environ(client, f"{path}verify-ticket/", body, environ).status_int == 200


@pytest.mark.parametrize("target", BODIES)
@pytest.mark.parametrize("environ", TERMINATED.values(), ids=TERMINATED)
def test_a_body_without_a_length_is_limited_like_any_other(client, environ, target):
    body, longest, success = BODIES[target]
    text = json.dumps(body).encode()

    as_long = post_environ(client, target, text.ljust(longest), environ)
    too_long = post_environ(client, target, text.ljust(longest + 1), environ)

    assert as_long.status_int == success
    assert too_long.status_int == 413


@pytest.mark.parametrize("environ", UNTERMINATED.values(), ids=UNTERMINATED)
def test_a_body_whose_end_nobody_marks_is_refused(client, environ):
    path, [ticket] = client.new_sold_out()
    body = b'{"public_randomness": "round 7"}'

    response = post_environ(client, f"{path}winners/", body, environ)

    assert response.status_int == 411
    refused(response, None, "The request must have a Content-Length")
    assert client.get(path).json["public_randomness"] is None
    for target, (body, longest, _) in BODIES.items():
        for length in (longest, longest + 1):
            text = json.dumps(body).encode().ljust(length)
            response = post_environ(client, target, text, environ)
            assert response.status_int == 411, (target, length)
    # So is the ticket of a raffle that has been drawn.
    client.draw(path)
    body = json.dumps(ticket).encode()
    assert post_environ(client, f"{path}verify-ticket/", body, environ).status_int == 411


@pytest.mark.parametrize(
    "environ", [*TERMINATED.values(), *UNTERMINATED.values()], ids=[*TERMINATED, *UNTERMINATED]
)
def test_what_takes_no_body_does_not_ask_for_its_length(client, environ):
    path = client.new_raffle()

    assert post_environ(client, f"{path}participate/", b"", environ).status_int == 201
    assert post_environ(client, f"{path}close/", b"", environ).status_int == 200


@pytest.mark.parametrize("length", ["+2", "2_0", " 2", "\u0662", "2" * 19])
def test_a_length_that_is_no_number_of_bytes_is_refused(client, length):
    path, _ = client.new_sold_out()

    response = post_environ(client, f"{path}winners/", b"{}", {"CONTENT_LENGTH": length})

    assert response.status_int == 400
    refused(response, None, "Content-Length must be a number of bytes")
    assert client.get(path).json["public_randomness"] is None


def test_a_body_that_ends_before_its_length_is_refused(client):
    path, _ = client.new_sold_out()

    response = post_environ(client, f"{path}winners/", b"{}", {"CONTENT_LENGTH": "3"})

    assert response.status_int == 400
    refused(response, None, "The body is shorter than its Content-Length")
    assert client.get(path).json["public_randomness"] is None


class Lost(io.BytesIO):
    """The body of a request whose client is gone."""

    def read(self, size=-1):
        raise OSError("client disconnected")


def test_a_body_that_cannot_be_read_is_refused(client):
    path, _ = client.new_sold_out()
    environ = {"CONTENT_LENGTH": "2", "wsgi.input": Lost()}

    response = post_environ(client, f"{path}winners/", b"", environ)

    assert response.status_int == 400
    refused(response, None, "The body cannot be read: OSError")
    assert client.get(path).json["public_randomness"] is None


def test_on_http_1_a_post_without_length_and_chunks_has_no_body(client):
    path, _ = client.new_sold_out()
    request = TestRequest.blank(f"{path}winners/", method="POST")
    request.environ.pop("CONTENT_LENGTH", None)
    request.environ.update(REMOTE_ADDR=MANAGER, SERVER_PROTOCOL="HTTP/1.0")

    client.do_request(request, status=201)

    assert client.get(path).json["public_randomness"].startswith("made by the server: ")


def assert_no_object(client, target, body):
    response = client.send("POST", target, body)

    assert response.status_int == 400, short(body)
    detail = refused(response, None).json["detail"]
    assert detail.startswith("The body must be one JSON object"), (short(body), detail)


@pytest.mark.parametrize("target", TARGETS)
def test_a_body_is_one_json_object_in_utf_8(client, target):
    path, _ = client.new_sold_out()

    for body in NOT_ONE_OBJECT:
        assert_no_object(client, target.format(path=path), body)

    [raffle] = client.get("/raffles/").json
    assert raffle["public_randomness"] is None


@pytest.mark.parametrize("target", ["/raffles/", "{path}winners/"])
def test_a_body_that_is_nested_too_deeply_is_refused(client, target):
    path, _ = client.new_sold_out()

    for body in TOO_DEEP:
        assert_no_object(client, target.format(path=path), body)

    [raffle] = client.get("/raffles/").json
    assert raffle["public_randomness"] is None


@pytest.mark.parametrize("target", ["/raffles/", "{path}verify-ticket/", "{path}redeem/"])
def test_only_a_draw_may_have_an_empty_body(client, target):
    path, _ = client.new_sold_out()

    assert_no_object(client, target.format(path=path), b"")

    assert len(client.get("/raffles/").json) == 1


def test_a_member_that_occurs_twice_is_named(client):
    response = client.send("POST", "/raffles/", b'{"a": 1, "b": 1, "a": 1}', 400)

    assert "'a' occurs twice" in response.json["detail"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json;charset=utf-8",
        "Application/JSON ; charset=UTF-8",
        "application/json\t; a=b; c=d",
    ],
    ids=short,
)
def test_json_may_be_called_so_in_any_spelling_with_any_parameters(client, content_type):
    for target, (body, _, success) in BODIES.items():
        response = client.send("POST", target, body, Content_Type=content_type)

        assert response.status_int == success, target


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        ";",
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/x-www-form-urlencoded",
        "\xff",
    ],
    ids=short,
)
def test_a_body_of_another_type_is_refused(client, content_type):
    for target, (body, _, _) in BODIES.items():
        response = client.send("POST", target, body, Content_Type=content_type)

        assert response.status_int == 415, target
        media_type = content_type.partition(";")[0]
        found = f"not {media_type!r}" if media_type else "and it has no type"
        assert response.json["detail"].endswith(f"application/json, {found}"), target
    assert client.get("/raffles/").json == []


@pytest.mark.parametrize("target", BODIES)
def test_a_request_is_refused_by_sender_then_type_then_length_then_text(client, target):
    """Verification is not only for managers: it does not ask who sends it."""
    body, longest, success = BODIES[target]
    valid = json.dumps(body).encode().ljust(longest)
    malformed = b"x" * longest
    too_long = b"x" * (longest + 1)

    def status(address, content_type, sent):
        response = client.send("POST", target, sent, address=address, Content_Type=content_type)
        if response.status_int == 413:
            assert f" {longest} bytes" in response.json["detail"]
        return response.status_int

    if target != f"{NO_RAFFLE}verify-ticket/":
        assert status(STRANGER, "text/plain", too_long) == 403
    else:
        assert status(STRANGER, "text/plain", too_long) == 415
    assert status(MANAGER, "text/plain", too_long) == 415
    assert status(MANAGER, "application/json", too_long) == 413
    assert status(MANAGER, "application/json", malformed) == 400
    assert client.get("/raffles/").json == []
    assert status(MANAGER, "application/json", valid) == success


# Headers and queries


@pytest.mark.parametrize(
    "key", ["x" * 16, "x" * 255, '"8e03978e-40d5-43dd-bc93"', "!~" * 8], ids=short
)
def test_an_idempotency_key_has_16_to_255_visible_ascii_characters(client, key):
    client.participate(client.new_raffle(), Idempotency_Key=key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "x" * 15,
        "x" * 256,
        "x" * 8 + " " + "x" * 8,
        "\xe9" * 16,
        "x" * 16 + "\t",
        "x" * 16 + "\x7f",
    ],
    ids=short,
)
def test_another_idempotency_key_is_refused_and_takes_no_ticket(client, key):
    path = client.new_raffle()

    response = client.participate(path, status=400, Idempotency_Key=key)

    detail = "Idempotency-Key must be 16 to 255 visible ASCII characters"
    assert response.json["detail"] == detail
    assert client.get(path).json["issued_tickets"] == 0


# Pages of raffles, and of the wins of one: how many there may be on each.
PAGES = {"/raffles/": 1_000, "{path}winners/": 10_000}
NO_LIMITS = [
    "", "0", "-1", "10001", "x", "1.0", "1e2", "+1", "01", "%201", "1%0A", "1%D9%A3", "9" * 5000,
]  # fmt: skip
NO_CURSORS = ["", "0", "-1", "x", "1.5", "1%0A", "9" * 30, "%FF"]


@pytest.mark.parametrize("page", PAGES)
def test_a_limit_is_an_integer_up_to_the_longest_page(client, page):
    longest = PAGES[page]
    target = page.format(path=client.new_raffle())

    for limit in (1, longest):
        client.get(f"{target}?limit={limit}", status=200)

    for limit in (*NO_LIMITS, longest + 1):
        response = client.get(f"{target}?limit={limit}", status="*")
        assert response.status_int == 400, limit
        detail = f"limit must be an integer from 1 to {longest}"
        assert response.json["detail"] == detail, limit


@pytest.mark.parametrize("page", PAGES)
def test_a_cursor_is_one_from_a_link(client, page):
    target = page.format(path=client.new_raffle())

    client.get(f"{target}?cursor=1", status=200)

    for cursor in NO_CURSORS:
        response = client.get(f"{target}?cursor={cursor}", status="*")
        assert response.status_int == 400, cursor
        assert response.json["detail"] == "cursor must be one from a Link header", cursor


def test_a_raffle_that_does_not_exist_is_refused_before_its_page(client):
    client.get(f"{NO_RAFFLE}winners/?limit=0", status=404)


# The database


NULLABLE = {
    "sequence",
    "randomness_source",
    "address_key",
    "closes_at",
    "closed_at",
    "public_randomness",
    "drawn_at",
    "redeemed_at",
}
# Each changes one thing of a raffle that is open (1), closed (2), or drawn (3).
IMPOSSIBLE = [
    "raffle SET id = 'x'",
    "raffle SET name = x'00'",
    "raffle SET total_tickets = 9007199254740992",
    "raffle SET total_tickets = 0 WHERE sequence = 2",
    "raffle SET issued_tickets = -1 WHERE sequence = 2",
    "raffle SET issued_tickets = 4 WHERE sequence = 2",
    "raffle SET issued_tickets = 3 WHERE sequence = 1",
    "raffle SET secret = x'00'",
    "raffle SET draw_commitment = 'x'",
    "raffle SET address_key = x'00' WHERE sequence = 1",
    "raffle SET address_key = NULL WHERE sequence = 2",
    "raffle SET address_key = zeroblob(32) WHERE sequence = 3",
    "raffle SET closed_at = '2000' WHERE sequence = 2",
    "raffle SET closes_at = created_at",
    "raffle SET closes_at = '2999' WHERE sequence = 1",
    "raffle SET closes_at = datetime(created_at, '+1 days'), closed_at = '2999' WHERE sequence = 1",
    "raffle SET public_randomness = 'x' WHERE sequence = 1",
    "raffle SET public_randomness = NULL WHERE sequence = 3",
    "raffle SET drawn_at = '2000' WHERE sequence = 3",
    "prize SET amount = 0",
    "prize SET position = -position",
    "win SET position = -position",
    "win SET ticket_number = -ticket_number",
    "win SET ticket_number = 1",
    "ticket SET number = -number",
    "ticket SET number = 1",
    "ticket SET participant_hash = substr(participant_hash, 2)",
    "ticket SET participant_hash = zeroblob(16)",
    "ticket SET salt = x'00'",
    "ticket SET iterations = 999",
    "ticket SET code_hash = x'00'",
    "replacement SET reason = 'ill'",
    "replacement SET sequence = 0",
    "replacement SET position = 9",
    "replacement SET ticket_number = replaced_ticket_number",
    "replacement SET ticket_number = 1, replaced_ticket_number = 2",
]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_the_database_refuses_what_no_raffle_can_be(client, database, change):
    client.new_raffle()
    client.close(client.new_raffle())
    drawn, _ = client.new_sold_out(4, [{"name": "Pen", "amount": 2}])
    for win in client.draw(drawn).json:
        client.replace(drawn, win["ticket_number"], "Pen")

    with closing(sqlite3.connect(database)) as other, pytest.raises(sqlite3.IntegrityError):
        other.execute("PRAGMA foreign_keys = ON")
        other.execute(f"UPDATE {change}")


def test_only_these_columns_may_be_null(client, database):
    columns = query(
        database,
        """
        SELECT col.name
        FROM sqlite_schema AS tab, pragma_table_info(tab.name) AS col
        WHERE tab.type = 'table' AND tab.name NOT LIKE 'sqlite_%' AND NOT col."notnull"
        """,
    )

    assert {name for (name,) in columns} == NULLABLE
