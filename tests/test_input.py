"""What a request and the database may hold. All else is refused, a request with a sentence on what was expected."""

import io
import json
import sqlite3
from contextlib import closing

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, query, refused
from webtest import TestRequest

RAFFLE = {
    "name": "Fair",
    "total_tickets": 10,
    "prizes": [*ONE_PRIZE, {"name": "Book", "amount": 2}],
}
TICKET = {"ticket_number": 1, "verification_code": "x"}
# What reads a body: a valid one, the most bytes of one, and the status of the answer.
BODIES = {"/raffles/": (RAFFLE, 2**20, 201), f"{NO_RAFFLE}winners/": ({}, 2**20, 404)}
BODIES.update(
    {f"{NO_RAFFLE}{action}/": (TICKET, 2**12, 404) for action in ("verify-ticket", "redeem")}
)
MISSING = object()
NO_NAMES = [
    MISSING,
    None,
    1,
    True,
    [],
    {},
    "",
    " ",
    "\t\n\u00a0\u2003",
    "x" * 201,
    "\ud800",
    "a\udfffb",
]
NO_INTEGERS = [MISSING, None, True, False, "1", 7.5, 1e300, [], {}, 0, -1, -(10**30)]
TOO_LARGE = [2**53, 2**63, 2**64, int("9" * 4000)]
NO_SOURCES = [
    "",
    " ",
    "x ",
    " x",
    "a1b2c3\n",
    "a\u200bb",
    "a\u00a0b",
    "x" * 1001,
    7,
    True,
    ["x"],
    {},
    "\ud800",
]
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
NAME = "a non-blank string of 1 to 200 characters"
INTEGER = "an integer from 1 to 9007199254740991"
PRINTABLE = "a string of 1 to 1000 printable characters, without a space at either end"
RANDOMNESS = "1 to 1000 visible ASCII characters with single spaces between"
# What a value is called whose type is wrong.
TYPES = {
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    list: "a list",
    dict: "an object",
}
# Numbers as clients write them, and their value: Gson, jsonlite, jq, Octave, and nobody.
WHOLE_NUMBERS = {
    "42": 42,
    "42.0": 42,
    "1e+05": 100_000,
    "1E+5": 100_000,
    "1000000.0": 1_000_000,
    "300e-2": 3,
    "0.3e1": 3,
    "4.2E+01": 42,
    "1.500e3": 1500,
    "1e00000000000000000001": 10,
    "9007199254740991.0": 2**53 - 1,
    "0.9007199254740991e16": 2**53 - 1,
    "90071992547409910000000e-7": 2**53 - 1,
    "1" + "0" * 500_000 + "e-499999": 10,
    "0." + "0" * 500_000 + "1e500002": 10,
}
NO_WHOLE_NUMBERS = [
    *(
        "42.5",
        "0.1",
        "1e-1",
        "0",
        "0.0",
        "0e9",
        "-0.0",
        "-1",
        "-42.0",
        "1e400",
        "1e-400",
        "1e16",
        "5e-324",
    ),
    *(
        "9007199254740992.0",
        "9007199254740991.5",
        "9007199254740991.0000000000000000000000000000001",
    ),
    *("1e9999999999999999999", "1e-9999999999999999999", "0e9999999999999999999", "9" * 500_000),
    *("0." + "9" * 500_000, "1e" + "9" * 500_000, "1." + "0" * 500_000 + "1"),
]


def replaced(body, value, *keys):
    """Return a copy of a body with the member at `keys` replaced, or left out."""
    (key, *inner), copy = keys, body.copy()
    copy[key] = replaced(copy[key], value, *inner) if inner else value
    if copy[key] is MISSING:
        del copy[key]
    return copy


def assert_refused(client, path, body, detail):
    """Check that a manager who posts the body gets 400 and the detail."""
    response = client.send("POST", path, body)
    found = response.status_int, response.json["type"], response.json["detail"]
    assert found == (400, "about:blank", detail), repr(body)[:200]


def assert_members_refused(client, path, body, keys, values, sentence):
    """Check that each of the values, at `keys` of a body, is refused with the sentence and the type if it is wrong."""
    expected = TYPES[int if " integer " in sentence else str]
    expected = (
        TYPES[list] if " list " in sentence else TYPES[dict] if " object " in sentence else expected
    )
    for value in values:
        found = "null or missing" if value in (None, MISSING) else TYPES[type(value)]
        detail = sentence if found == expected else f"{sentence}, not {found}"
        assert_refused(client, path, replaced(body, value, *keys), detail)


def test_names_are_kept_as_they_are_sent(client):
    for name in ("x", "x" * 200, " x ", "Größe 🎟", "a\0b", "'; DROP TABLE raffle; --", "\u200b"):
        body = client.create(prizes=[{"name": name, "amount": 1}], name=name).json
        assert (
            body["name"]
            == body["prizes"][0]["name"]
            == client.get("/raffles/").json[0]["name"]
            == name
        )


def test_a_raffle_is_refused_with_the_member_and_what_was_expected(client):
    a_list, an_object = (
        "a non-empty list of objects with name and amount",
        "an object with name and amount",
    )
    for member, keys, values, expected in (
        ("name", ["name"], NO_NAMES, NAME),
        ("total_tickets", ["total_tickets"], NO_INTEGERS + TOO_LARGE, INTEGER),
        ("prizes", ["prizes"], [MISSING, None, [], {}, "x", 1, True], a_list),
        ("prizes[0]", ["prizes", 0], [None, [], "x", 1, True], an_object),
        ("prizes[1].name", ["prizes", 1, "name"], NO_NAMES, NAME),
        ("prizes[1].amount", ["prizes", 1, "amount"], NO_INTEGERS + TOO_LARGE, INTEGER),
        ("randomness_source", ["randomness_source"], NO_SOURCES, PRINTABLE),
    ):
        assert_members_refused(
            client, "/raffles/", RAFFLE, keys, values, f"{member} must be {expected}"
        )
    assert client.get("/raffles/").json == []


def test_a_whole_number_may_be_written_in_any_way(client):
    """By its exact value, as JSON Schema 2020-12, 6.1.1, counts integers."""
    for text, value in WHOLE_NUMBERS.items():
        body = b'{"name": "Fair", "total_tickets": %s, "prizes": [{"name": "Pen", "amount": %s}], "more": 1e999}'
        created = client.send("POST", "/raffles/", body % (text.encode(), text.encode()), 201).json
        assert (created["total_tickets"], created["prizes"][0]["amount"]) == (value, value), text[
            :40
        ]
        ticket = b'{"ticket_number": %s, "verification_code": "x"}' % text.encode()
        path = f"/raffles/{created['id']}/verify-ticket/"
        if len(ticket) <= 4096:
            refused(client.send("POST", path, ticket, 400), "not-drawn")


def test_any_other_number_is_refused_at_once(client):
    """Nothing is computed from a number that is out of range: see the time limit of a test."""
    for text in NO_WHOLE_NUMBERS:
        body = (
            b'{"name": "Fair", "total_tickets": %s, "prizes": [{"name": "Pen", "amount": 1}]}'
            % text.encode()
        )
        assert_refused(client, "/raffles/", body, f"total_tickets must be {INTEGER}")
        body = (
            b'{"name": "Fair", "total_tickets": 9, "prizes": [{"name": "Pen", "amount": %s}]}'
            % text.encode()
        )
        assert_refused(client, "/raffles/", body, f"prizes[0].amount must be {INTEGER}")
    assert client.get("/raffles/").json == []


def test_there_are_no_more_prizes_than_tickets(client):
    for amounts in ([4], [2, 2], [2**53 - 1], [2**53 - 1] * 3):
        prizes = [{"name": "Book", "amount": amount} for amount in amounts]
        refused(client.create(3, prizes, 400), "too-many-prizes", "Too many prizes")
    assert client.get("/raffles/").json == []


def test_a_ticket_is_refused_with_the_member_and_what_was_expected(client):
    for action in ("verify-ticket", "redeem"):
        for member, values, expected in (
            ("ticket_number", NO_INTEGERS + TOO_LARGE, INTEGER),
            ("verification_code", (MISSING, None, 1, True, [], {}), "a string"),
        ):
            path, sentence = f"{NO_RAFFLE}{action}/", f"{member} must be {expected}"
            assert_members_refused(client, path, TICKET, [member], values, sentence)


def test_no_draw_is_made_by_a_request_that_may_have_meant_another(client):
    raffle, _ = client.new_sold_out()
    for value, fault in NO_RANDOMNESS:
        detail = f"public_randomness must be {RANDOMNESS}: it {fault}"
        assert_refused(client, f"{raffle}winners/", {"public_randomness": value}, detail)
    for body in ({"public_randomness": "x", "more": 1}, {"Public_Randomness": "x"}, {"more": {}}):
        detail = client.draw(raffle, body, 400).json["detail"]
        assert ([*body][-1] in detail, "public_randomness" in detail) == (True, True), body
    client.send("POST", f"{raffle}winners/?public_randomness=x", None, 400)
    client.send("POST", f"{raffle}winners/", None, 411, Transfer_Encoding="chunked")
    assert client.get(raffle).json["public_randomness"] is None


def test_randomness_is_visible_ascii_with_single_spaces(client):
    for value in ("x", "!~", "a1 b2 c3", "7 13 21 34 42 49", "x" * 1000):
        raffle, _ = client.new_sold_out()
        client.draw(raffle, {"public_randomness": value})
        assert client.get(raffle).json["public_randomness"] == value


class Trickle(io.BytesIO):
    """The body of a request whose reads return less than they are asked for."""

    def read(self, size=-1):
        return super().read(min(size, 7))


@pytest.mark.parametrize(
    ("environ", "is_read"),
    [
        ({"wsgi.input_terminated": True, "SERVER_PROTOCOL": "HTTP/2"}, True),
        (
            {
                "wsgi.input_terminated": True,
                "HTTP_TRANSFER_ENCODING": "chunked",
                "SERVER_PROTOCOL": "HTTP/1.1",
            },
            True,
        ),
        ({"SERVER_PROTOCOL": "HTTP/2"}, False),
        ({"SERVER_PROTOCOL": "HTTP/3"}, False),
        ({"HTTP_TRANSFER_ENCODING": "Chunked"}, False),
        ({"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}, False),
    ],
)
def test_a_body_without_a_length_is_read_to_its_end_or_refused(client, environ, is_read):
    """Never ignored: on HTTP/2 servers a draw would be made with other randomness than was sent."""

    def post(path, data):
        request = TestRequest.blank(path, method="POST", content_type="application/json")
        request.environ.pop("CONTENT_LENGTH", None)
        request.environ.update(REMOTE_ADDR=MANAGER, **{"wsgi.input": Trickle(data), **environ})
        return client.do_request(request, status="*", expect_errors=True)

    raffle, [ticket] = client.new_sold_out()
    drawn = post(f"{raffle}winners/", b'{"public_randomness": "round 7"}')
    assert drawn.status_int == (201 if is_read else 411)
    assert client.get(raffle).json["public_randomness"] == ("round 7" if is_read else None)
    if not is_read:
        refused(drawn, None, "The request must have a Content-Length")
        client.draw(raffle)

    for path, (body, longest, success) in BODIES.items():
        text = json.dumps(body).encode()
        assert post(path, text.ljust(longest)).status_int == (success if is_read else 411), path
        assert post(path, text.ljust(longest + 1)).status_int == (413 if is_read else 411), path
    assert post(f"{raffle}verify-ticket/", json.dumps(ticket).encode()).status_int == (
        200 if is_read else 411
    )
    # Neither takes a body, so neither asks.
    other = client.new_raffle()
    assert post(f"{other}participate/", b"").status_int == 201
    assert post(f"{other}close/", b"").status_int == 200


def test_on_http_1_a_post_without_length_and_chunks_has_no_body(client):
    raffle, _ = client.new_sold_out()
    request = TestRequest.blank(f"{raffle}winners/", method="POST")
    request.environ.pop("CONTENT_LENGTH", None)
    request.environ.update(REMOTE_ADDR=MANAGER, SERVER_PROTOCOL="HTTP/1.0")
    assert client.do_request(request, status=201)
    assert client.get(raffle).json["public_randomness"].startswith("made by the server: ")


NOT_AN_OBJECT = [
    b" ",
    b"null",
    b"true",
    b"0",
    b'"x"',
    b"[]",
    b"[{}]",
    b"{",
    b"{}{}",
    b"{'name': 1}",
    b"name=Fair&x=1",
]
NOT_AN_OBJECT += [
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 01}',
    b'{"a": 1,}',
    b'{"a": "\n"}',
]
NOT_AN_OBJECT += [
    b'{"a": 1, "a": 1}',
    b'{"a": {"b": 1, "b": 2}}',
    b'{"\\ud800": 1, "\\ud800": 1}',
    b"\x00",
]
NOT_AN_OBJECT += [
    b'{"a": "\xff"}',
    b'{"a": "\xc0\x80"}',
    b'{"a": "\xed\xa0\x80"}',
    b"\xef\xbb\xbf{}",
]
NOT_AN_OBJECT += ["{}".encode("utf-16"), "{}".encode("utf-32"), b"[" * 4096, b'{"a":' * 800]
DEEP = [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000]


def test_a_body_is_one_json_object_in_utf_8(client):
    sold_out, _ = client.new_sold_out()
    paths = ("/raffles/", f"{sold_out}winners/", f"{sold_out}verify-ticket/", f"{sold_out}redeem/")
    cases = [(path, body) for path in paths for body in NOT_AN_OBJECT]
    cases += [(path, body) for path in paths[:2] for body in DEEP] + [
        (path, b"") for path in paths if path != paths[1]
    ]
    for path, body in cases:
        response = client.send("POST", path, body)
        assert response.status_int == 400, (path, body[:20])
        assert (
            refused(response, None).json["detail"].startswith("The body must be one JSON object")
        ), (path, body[:20])
    assert (
        "'a' occurs twice"
        in client.send("POST", "/raffles/", b'{"a": 1, "b": 1, "a": 1}').json["detail"]
    )
    assert [raffle["public_randomness"] for raffle in client.get("/raffles/").json] == [None]


def test_a_body_is_called_json_in_any_spelling_of_its_type_and_parameters(client):
    for kind in (
        "",
        ";",
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/x-www-form-urlencoded",
        "\xff",
    ):
        for path, (body, *_) in BODIES.items():
            assert client.send("POST", path, body, Content_Type=kind).status_int == 415, (
                path,
                kind,
            )
    for kind in (
        "application/json;charset=utf-8",
        "Application/JSON ; charset=UTF-8",
        "application/json\t; a=b; c=d",
    ):
        for path, (body, _, success) in BODIES.items():
            assert client.send("POST", path, body, Content_Type=kind).status_int == success, (
                path,
                kind,
            )


def test_a_request_is_refused_by_who_sends_it_then_by_the_type_the_length_and_the_text_of_its_body(
    client,
):
    for path, (body, longest, success) in BODIES.items():
        too_long, text = b"x" * (longest + 1), json.dumps(body).encode().ljust(longest)
        for status, address, kind, sent in (
            (415 if path.endswith("/verify-ticket/") else 403, "10.0.0.2", "text/plain", too_long),
            (415, MANAGER, "text/plain", too_long),
            (413, MANAGER, "application/json", too_long),
            (400, MANAGER, "application/json", b"x" * longest),
            (success, MANAGER, "application/json", text),
        ):
            response = client.send("POST", path, sent, address=address, Content_Type=kind)
            assert response.status_int == status, (path, status)
            assert status != 413 or f" {longest} bytes" in response.json["detail"], path
    assert len(client.get("/raffles/").json) == 1


def test_an_idempotency_key_is_16_to_255_visible_ascii_characters(client):
    raffle, detail = (
        client.new_raffle(9),
        "Idempotency-Key must be 16 to 255 visible ASCII characters",
    )
    for n, key in enumerate(("x" * 16, "x" * 255, '"8e03978e-40d5-43dd-bc93"', "!~" * 8)):
        client.participate(raffle, f"10.1.0.{n}", Idempotency_Key=key)
    for key in (
        "",
        "x" * 15,
        "x" * 256,
        "x" * 8 + " " + "x" * 8,
        "\xe9" * 16,
        "x" * 16 + "\t",
        "x" * 16 + "\x7f",
    ):
        response = client.participate(raffle, "10.1.1.1", "*", Idempotency_Key=key)
        assert (response.status_int, response.json["detail"]) == (400, detail), key
    assert client.get(raffle).json["issued_tickets"] == 4


def test_a_limit_is_an_integer_up_to_the_longest_page_and_a_cursor_one_from_a_link(client):
    limits = (
        "",
        "0",
        "-1",
        "10001",
        "x",
        "1.0",
        "1e2",
        "+1",
        "01",
        "%201",
        "1%0A",
        "1%D9%A3",
        "9" * 5000,
    )
    cursors = ("", "0", "-1", "x", "1.5", "1%0A", "9" * 30, "%FF")
    for path, longest in (("/raffles/", 1000), (f"{client.new_raffle()}winners/", 10_000)):
        for text in ("limit=1", f"limit={longest}", "cursor=1"):
            client.get(f"{path}?{text}", status=200)
        malformed = [
            (f"limit={limit}", f"limit must be an integer from 1 to {longest}") for limit in limits
        ]
        malformed += [
            (f"cursor={cursor}", "cursor must be one from a Link header") for cursor in cursors
        ]
        for text, detail in (*malformed, (f"limit={longest + 1}", malformed[0][1])):
            response = client.get(f"{path}?{text}", status="*")
            assert (response.status_int, response.json["detail"]) == (400, detail), text
    client.get(f"{NO_RAFFLE}winners/?limit=0", status=404)


NULLABLE = {
    "sequence",
    "randomness_source",
    "address_key",
    "closed_at",
    "public_randomness",
    "drawn_at",
    "redeemed_at",
}
# Each changes one thing of a raffle that is open (1), closed (2), or drawn (3).
IMPOSSIBLE = """
raffle SET id = 'x'; raffle SET name = x'00'; raffle SET total_tickets = 9007199254740992;
raffle SET total_tickets = 0 WHERE sequence = 2; raffle SET issued_tickets = -1 WHERE sequence = 2;
raffle SET issued_tickets = 4 WHERE sequence = 2; raffle SET issued_tickets = 3 WHERE sequence = 1;
raffle SET secret = x'00'; raffle SET draw_commitment = 'x'; raffle SET address_key = x'00' WHERE sequence = 1;
raffle SET address_key = NULL WHERE sequence = 2; raffle SET address_key = zeroblob(32) WHERE sequence = 3;
raffle SET closed_at = '2000' WHERE sequence = 2; raffle SET public_randomness = 'x' WHERE sequence = 1;
raffle SET public_randomness = NULL WHERE sequence = 3; raffle SET drawn_at = '2000' WHERE sequence = 3;
prize SET amount = 0; prize SET position = -position; win SET position = -position;
win SET ticket_number = -ticket_number; ticket SET number = -number; ticket SET number = 1;
ticket SET participant_hash = substr(participant_hash, 2); ticket SET participant_hash = zeroblob(16); ticket SET salt = x'00';
ticket SET iterations = 999; ticket SET code_hash = x'00'; win SET ticket_number = 1
"""


def test_the_database_refuses_what_no_raffle_can_be(client, database):
    client.new_raffle()
    client.close(client.new_raffle())
    client.draw(client.new_sold_out(2, [{"name": "Pen", "amount": 2}])[0])
    nullable = query(
        database,
        "SELECT c.name FROM sqlite_schema t, pragma_table_info(t.name) c WHERE NOT [notnull]",
    )
    assert {name for (name,) in nullable} == NULLABLE
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        for change in IMPOSSIBLE.split(";"):
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(f"UPDATE {change}")
                pytest.fail(change)
