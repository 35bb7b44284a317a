import gzip
import json
import uuid

import pytest
from helpers import MANAGER, ONE_PRIZE, assert_problem, call

RAFFLE = {"name": "Fair", "total_tickets": 10, "prizes": ONE_PRIZE}
TICKET = {"ticket_number": 1, "verification_code": "x"}
MISSING = object()

NO_NAMES = [MISSING, None, 1, True, [], {}, "", " ", "\t\n\u00a0\u2003", "x" * 201, "\ud800", "a\udfffb"]
NO_INTEGERS = [MISSING, None, True, False, "1", 1.0, 1e300, [], {}, 0, -1, -(10**30)]
TOO_LARGE = [2**53, 2**63, 2**64, 10**30, int("9" * 4000)]
NAME = "a string of 1 to 200 characters, not blank"
INTEGER = "an integer from 1 to 9007199254740991"


def replaced(body, value, *keys):
    """Return a deep copy of `body` with the member at `keys` replaced, or left out."""
    copy = json.loads(json.dumps(body))
    member = copy
    for key in keys[:-1]:
        member = member[key]
    if value is MISSING:
        del member[keys[-1]]
    else:
        member[keys[-1]] = value
    return copy


CASES = [
    *[("name", NAME, replaced(RAFFLE, value, "name")) for value in NO_NAMES],
    *[("total_tickets", INTEGER, replaced(RAFFLE, v, "total_tickets")) for v in NO_INTEGERS + TOO_LARGE],
    *[
        ("prizes", "a non-empty list of objects with name and amount", replaced(RAFFLE, value, "prizes"))
        for value in (MISSING, None, [], {}, "x", 1, True)
    ],
    *[
        ("prizes[0]", "an object with name and amount", replaced(RAFFLE, value, "prizes", 0))
        for value in (None, [], "x", 1, True)
    ],
    *[("prizes[0].name", NAME, replaced(RAFFLE, value, "prizes", 0, "name")) for value in NO_NAMES],
    *[
        ("prizes[0].amount", "an integer of 1 or more", replaced(RAFFLE, value, "prizes", 0, "amount"))
        for value in NO_INTEGERS
    ],
    ("prizes[1].amount", "an integer of 1 or more", {**RAFFLE, "prizes": [*ONE_PRIZE, {"name": "Book"}]}),
    *[("ticket_number", INTEGER, replaced(TICKET, value, "ticket_number")) for value in NO_INTEGERS + TOO_LARGE],
    *[
        ("verification_code", "a string", replaced(TICKET, value, "verification_code"))
        for value in (MISSING, None, 1, True, [], {})
    ],
]


@pytest.mark.parametrize(("member", "expected", "body"), CASES)
def test_the_refusal_names_the_member_and_what_was_expected(client, member, expected, body):
    path = (
        "/raffles/" if "prizes" in member or "prizes" in body or "name" in body else "/raffles/unknown/verify-ticket/"
    )
    response = client.request_from(MANAGER, "POST", path, body, status=400)
    assert_problem(response, f"{member} must be {expected}")
    assert client.get("/raffles/").json == []


@pytest.mark.parametrize("amount", TOO_LARGE)
def test_a_huge_amount_is_too_many_prizes(client, amount):
    response = client.request_from(
        MANAGER, "POST", "/raffles/", replaced(RAFFLE, amount, "prizes", 0, "amount"), status=400
    )
    assert_problem(response, "Too many prizes")


NOT_AN_OBJECT = [
    b"",
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
    b"name=Fair&total_tickets=10",
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": 01}',
    b'{"a": 1,}',
    b'{"a": "\n"}',
    b'{"a": 1, "a": 1}',
    b'{"a": {"b": 1, "b": 2}}',
    b'{"a": "\xff"}',
    b'{"a": "\xc0\x80"}',
    b'{"a": "\xed\xa0\x80"}',
    b"\x00",
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    "{}".encode("utf-32"),
    b"[" * 4096,
    b'{"a":' * 800,
]
DEEP = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *[("/raffles/", body) for body in NOT_AN_OBJECT + DEEP],
        *[("/raffles/unknown/verify-ticket/", body) for body in NOT_AN_OBJECT],
    ],
    ids=lambda value: f"{value[:20]!r}-{len(value)}",
)
def test_what_is_not_one_json_object_is_refused(client, path, body):
    response = client.request_from(MANAGER, "POST", path, body, status=400)
    assert_problem(response)
    assert response.json["detail"].startswith("The body must")


def test_a_number_past_every_float_is_no_integer(client):
    response = client.request_from(
        MANAGER, "POST", "/raffles/", b'{"name": "Fair", "total_tickets": 1e999}', status=400
    )
    assert_problem(response, f"total_tickets must be {INTEGER}")


def test_a_member_that_is_there_twice_is_named(client):
    response = client.request_from(
        MANAGER, "POST", "/raffles/", b'{"name": "Fair", "x": 1, "name": "Fair"}', status=400
    )
    assert "'name' occurs twice" in response.json["detail"]


def test_an_integer_of_a_million_digits_is_an_integer_out_of_range(client):
    body = b'{"name": "Fair", "total_tickets": %s}' % (b"9" * 1_000_000)
    response = client.request_from(MANAGER, "POST", "/raffles/", body, status=400)
    assert_problem(response, f"total_tickets must be {INTEGER}")


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "text/json", ";", "\xff"],
)
@pytest.mark.parametrize("path", ["/raffles/", "/raffles/unknown/verify-ticket/"])
def test_a_body_that_is_not_called_json_is_refused(client, path, content_type):
    response = client.request_from(MANAGER, "POST", path, RAFFLE, status=415, Content_Type=content_type)
    assert_problem(response)


def test_a_compressed_body_is_told_so(client):
    body = gzip.compress(json.dumps(RAFFLE).encode())
    refused = client.request_from(MANAGER, "POST", "/raffles/", body, status=415, Content_Encoding="gzip")
    assert_problem(refused, "The body must not be compressed")
    client.request_from(MANAGER, "POST", "/raffles/", RAFFLE, status=201, Content_Encoding="identity")


@pytest.mark.parametrize(
    ("path", "longest", "status"), [("/raffles/", 2**20, 201), ("/raffles/unknown/verify-ticket/", 2**12, 404)]
)
def test_a_body_may_have_one_mebibyte_or_four_kibibytes_for_a_ticket_and_no_more(client, path, longest, status):
    body = json.dumps({**RAFFLE, **TICKET}).encode()
    client.request_from(MANAGER, "POST", path, body.ljust(longest), status=status)
    assert_problem(client.request_from(MANAGER, "POST", path, body.ljust(longest + 1), status=413))


@pytest.mark.parametrize(
    ("length", "says"),
    [
        ({}, "The body must be one JSON object in UTF-8: "),
        ({"CONTENT_LENGTH": ""}, "The body must be one JSON object in UTF-8: "),
        *[
            ({"CONTENT_LENGTH": text}, "Content-Length must be a number")
            for text in ("-1", "x", "+9", "1.0", "٣", " 9")
        ],
        ({"CONTENT_LENGTH": "9" * 19}, "Content-Length must be a number"),
        ({"CONTENT_LENGTH": "9" * 18}, "The body must not be longer than "),
    ],
)
def test_no_more_of_a_body_is_read_than_its_length_says(client, length, says):
    status, problem = call(client.app, json.dumps(RAFFLE).encode(), CONTENT_TYPE="application/json", **length)
    assert status in (400, 413)
    assert problem["detail"].startswith(says)
    assert client.get("/raffles/").json == []


def test_a_body_of_the_wrong_type_is_refused_before_its_length(client):
    client.request_from(MANAGER, "POST", "/raffles/", b"x" * 2**21, status=415, Content_Type="text/plain")


@pytest.mark.parametrize(
    "disguise",
    [
        str.upper,
        "{{{}}}".format,
        "{}%0A".format,
        "%0A{}".format,
        "{}%00".format,
        "{}%20".format,
        "%FF{}".format,
        "{}%C3".format,
        "urn:uuid:{}".format,
        lambda raffle_id: raffle_id.replace("-", ""),
        lambda raffle_id: "../raffles/" + raffle_id,
        lambda raffle_id: str(uuid.uuid4()),
        lambda raffle_id: "..",
        lambda raffle_id: "%00",
        lambda raffle_id: "%25",
        lambda raffle_id: "_" * 36,
        lambda raffle_id: "%ED%A0%80",
        lambda raffle_id: "x" * 10_000,
        lambda raffle_id: "' OR 1=1 --",
    ],
)
@pytest.mark.parametrize("ending", ["/", ""])
def test_what_is_not_exactly_the_id_of_a_raffle_is_not_found(client, disguise, ending):
    raffle_id = client.create().json["id"]
    path = f"/raffles/{disguise(raffle_id)}{ending}"
    assert_problem(client.get(path, status=404))
    assert_problem(client.participate(f"{path.rstrip('/')}/", status=404))
    for action in ("winners", "draw", "tickets"):
        assert_problem(client.get(f"{path.rstrip('/')}/{action}", status=404))
    body = {**TICKET, "public_randomness": "x"}
    for action in ("close", "winners", "verify-ticket", "redeem"):
        assert_problem(client.request_from(MANAGER, "POST", f"{path.rstrip('/')}/{action}", body, status=404))


@pytest.mark.parametrize(
    "path", ["/raffle/", "/health/x", "/raffles//", "//raffles/", "/raffles/%0A", "/raffles%0A", "/%FF"]
)
def test_an_unknown_path_is_not_found(client, path):
    assert_problem(client.get(path, status=404))
