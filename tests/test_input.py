"""What a request and the database may hold. All else is refused, a request with a sentence on what was expected."""

import json
import sqlite3
from contextlib import closing

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, query, refused

RAFFLE = {"name": "Fair", "total_tickets": 10, "prizes": [*ONE_PRIZE, {"name": "Book", "amount": 2}]}
TICKET = {"ticket_number": 1, "verification_code": "x"}
# What reads a body: a valid one, the most bytes of one, and the status of the answer.
BODIES = {"/raffles/": (RAFFLE, 2**20, 201), f"{NO_RAFFLE}winners/": ({}, 2**20, 404)}
BODIES.update({f"{NO_RAFFLE}{action}/": (TICKET, 2**12, 404) for action in ("verify-ticket", "redeem")})
MISSING = object()
NO_NAMES = [MISSING, None, 1, True, [], {}, "", " ", "\t\n\u00a0\u2003", "x" * 201, "\ud800", "a\udfffb"]
NO_INTEGERS = [MISSING, None, True, False, "1", 1.0, 1e300, [], {}, 0, -1, -(10**30)]
TOO_LARGE = [2**53, 2**63, 2**64, int("9" * 4000)]
NO_RANDOMNESS = ["", " ", "x ", " x", "a1b2c3\n", "a\u200bb", "a\u00a0b", "x" * 1001, 7, True, ["x"], {}, "\ud800"]
NAME = "a string of 1 to 200 characters, not blank"
INTEGER = "an integer from 1 to 9007199254740991"
PRINTABLE = "a string of 1 to 1000 printable characters, without a space at either end"


def replaced(body, value, *keys):
    """Return a copy of a body with the member at `keys` replaced, or left out."""
    (key, *inner), copy = keys, body.copy()
    copy[key] = replaced(copy[key], value, *inner) if inner else value
    if copy[key] is MISSING:
        del copy[key]
    return copy


def assert_refused(client, path, bodies, detail):
    """Check that a manager who posts one of the bodies gets 400 and the detail."""
    for body in bodies:
        response = client.send("POST", path, body)
        found = response.status_int, response.json["type"], response.json["detail"]
        assert found == (400, "about:blank", detail), repr(body)[:200]


def test_names_are_kept_as_they_are_sent(client):
    for name in ("x", "x" * 200, " x ", "Größe 🎟", "a\0b", "'; DROP TABLE raffle; --", "\u200b"):
        body = client.create(prizes=[{"name": name, "amount": 1}], name=name).json
        assert body["name"] == body["prizes"][0]["name"] == client.get("/raffles/").json[0]["name"] == name


def test_a_raffle_is_refused_with_the_member_and_what_was_expected(client):
    a_list, an_object = "a non-empty list of objects with name and amount", "an object with name and amount"
    for member, keys, values, expected in (
        ("name", ["name"], NO_NAMES, NAME),
        ("total_tickets", ["total_tickets"], NO_INTEGERS + TOO_LARGE, INTEGER),
        ("prizes", ["prizes"], [MISSING, None, [], {}, "x", 1, True], a_list),
        ("prizes[0]", ["prizes", 0], [None, [], "x", 1, True], an_object),
        ("prizes[1].name", ["prizes", 1, "name"], NO_NAMES, NAME),
        ("prizes[1].amount", ["prizes", 1, "amount"], NO_INTEGERS, "an integer of 1 or more"),
        ("randomness_source", ["randomness_source"], NO_RANDOMNESS, PRINTABLE),
    ):
        bodies = [replaced(RAFFLE, value, *keys) for value in values]
        assert_refused(client, "/raffles/", bodies, f"{member} must be {expected}")
    huge = [b'{"name": "x", "total_tickets": %s}' % number for number in (b"1e999", b"9" * 1_000_000)]
    assert_refused(client, "/raffles/", huge, f"total_tickets must be {INTEGER}")
    assert client.get("/raffles/").json == []


def test_there_are_no_more_prizes_than_tickets(client):
    for amounts in ([4], [2, 2], TOO_LARGE[:1], TOO_LARGE[-1:]):
        prizes = [{"name": "Book", "amount": amount} for amount in amounts]
        refused(client.create(3, prizes, 400), "too-many-prizes", "Too many prizes")
    assert client.get("/raffles/").json == []


def test_a_ticket_is_refused_with_the_member_and_what_was_expected(client):
    for action in ("verify-ticket", "redeem"):
        bodies = [replaced(TICKET, value, "ticket_number") for value in NO_INTEGERS + TOO_LARGE]
        assert_refused(client, f"{NO_RAFFLE}{action}/", bodies, f"ticket_number must be {INTEGER}")
        bodies = [replaced(TICKET, value, "verification_code") for value in (MISSING, None, 1, True, [], {})]
        assert_refused(client, f"{NO_RAFFLE}{action}/", bodies, "verification_code must be a string")


def test_no_draw_is_made_by_a_request_that_may_have_meant_another(client):
    raffle, _ = client.new_sold_out()
    bodies = [{"public_randomness": value} for value in [None, *NO_RANDOMNESS]]
    assert_refused(client, f"{raffle}winners/", bodies, f"public_randomness must be {PRINTABLE}")
    for body in ({"public_randomness": "x", "more": 1}, {"Public_Randomness": "x"}, {"more": {}}):
        detail = client.draw(raffle, body, 400).json["detail"]
        assert ([*body][-1] in detail, "public_randomness" in detail) == (True, True), body
    client.send("POST", f"{raffle}winners/?public_randomness=x", None, 400)
    client.send("POST", f"{raffle}winners/", None, 415, Transfer_Encoding="chunked")
    assert client.get(raffle).json["public_randomness"] is None


NOT_AN_OBJECT = [b" ", b"null", b"true", b"0", b'"x"', b"[]", b"[{}]", b"{", b"{}{}", b"{'name': 1}", b"name=Fair&x=1"]
NOT_AN_OBJECT += [b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 01}', b'{"a": 1,}', b'{"a": "\n"}']
NOT_AN_OBJECT += [b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}', b'{"\\ud800": 1, "\\ud800": 1}', b"\x00"]
NOT_AN_OBJECT += [b'{"a": "\xff"}', b'{"a": "\xc0\x80"}', b'{"a": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}"]
NOT_AN_OBJECT += ["{}".encode("utf-16"), "{}".encode("utf-32"), b"[" * 4096, b'{"a":' * 800]
DEEP = [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000]


def test_a_body_is_one_json_object_in_utf_8(client):
    sold_out, _ = client.new_sold_out()
    paths = ("/raffles/", f"{sold_out}winners/", f"{sold_out}verify-ticket/", f"{sold_out}redeem/")
    cases = [(path, body) for path in paths for body in NOT_AN_OBJECT]
    cases += [(path, body) for path in paths[:2] for body in DEEP] + [(path, b"") for path in paths if path != paths[1]]
    for path, body in cases:
        response = client.send("POST", path, body)
        assert response.status_int == 400, (path, body[:20])
        assert refused(response, None).json["detail"].startswith("The body must be one JSON object"), (path, body[:20])
    assert "'a' occurs twice" in client.send("POST", "/raffles/", b'{"a": 1, "b": 1, "a": 1}').json["detail"]
    assert [raffle["public_randomness"] for raffle in client.get("/raffles/").json] == [None]


def test_a_body_is_called_json_in_any_spelling_of_its_type_and_parameters(client):
    for kind in ("", ";", "text/plain", "text/json", "application/jsonx", "application/x-www-form-urlencoded", "\xff"):
        for path, (body, *_) in BODIES.items():
            assert client.send("POST", path, body, Content_Type=kind).status_int == 415, (path, kind)
    for kind in ("application/json;charset=utf-8", "Application/JSON ; charset=UTF-8", "application/json\t; a=b; c=d"):
        for path, (body, _, success) in BODIES.items():
            assert client.send("POST", path, body, Content_Type=kind).status_int == success, (path, kind)


def test_a_request_is_refused_by_who_sends_it_then_by_the_type_the_length_and_the_text_of_its_body(client):
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
    raffle, detail = client.new_raffle(9), "Idempotency-Key must be 16 to 255 visible ASCII characters"
    for n, key in enumerate(("x" * 16, "x" * 255, '"8e03978e-40d5-43dd-bc93"', "!~" * 8)):
        client.participate(raffle, f"10.1.0.{n}", Idempotency_Key=key)
    for key in ("", "x" * 15, "x" * 256, "x" * 8 + " " + "x" * 8, "\xe9" * 16, "x" * 16 + "\t", "x" * 16 + "\x7f"):
        response = client.participate(raffle, "10.1.1.1", "*", Idempotency_Key=key)
        assert (response.status_int, response.json["detail"]) == (400, detail), key
    assert client.get(raffle).json["issued_tickets"] == 4


def test_a_limit_is_an_integer_up_to_the_longest_page_and_a_cursor_one_from_a_link(client):
    limits = ("", "0", "-1", "10001", "x", "1.0", "1e2", "+1", "01", "%201", "1%0A", "1%D9%A3", "9" * 5000)
    cursors = ("", "0", "-1", "x", "1.5", "1%0A", "9" * 30, "%FF")
    for path, longest in (("/raffles/", 1000), (f"{client.new_raffle()}winners/", 10_000)):
        for text in ("limit=1", f"limit={longest}", "cursor=1"):
            client.get(f"{path}?{text}", status=200)
        malformed = [(f"limit={limit}", f"limit must be an integer from 1 to {longest}") for limit in limits]
        malformed += [(f"cursor={cursor}", "cursor must be one from a Link header") for cursor in cursors]
        for text, detail in (*malformed, (f"limit={longest + 1}", malformed[0][1])):
            response = client.get(f"{path}?{text}", status="*")
            assert (response.status_int, response.json["detail"]) == (400, detail), text
    client.get(f"{NO_RAFFLE}winners/?limit=0", status=404)


NULLABLE = {"sequence", "randomness_source", "address_key", "closed_at", "public_randomness", "drawn_at", "redeemed_at"}
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
ticket SET participant = substr(participant, 2); ticket SET participant = zeroblob(16); ticket SET salt = x'00';
ticket SET iterations = 999; ticket SET code_hash = x'00'; win SET ticket_number = 1
"""


def test_the_database_refuses_what_no_raffle_can_be(client, database):
    client.new_raffle()
    client.close(client.new_raffle())
    client.draw(client.new_sold_out(2, [{"name": "Pen", "amount": 2}])[0])
    nullable = query(database, "SELECT c.name FROM sqlite_schema t, pragma_table_info(t.name) c WHERE NOT [notnull]")
    assert {name for (name,) in nullable} == NULLABLE
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        for change in IMPOSSIBLE.split(";"):
            with pytest.raises(sqlite3.IntegrityError):
                other.execute(f"UPDATE {change}")
                pytest.fail(change)
