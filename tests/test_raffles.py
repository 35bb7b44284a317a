"""The rules of a raffle, in the order of its life: from its creation to its last prize.

Then what stays secret.
"""

import hashlib
import hmac
import json
import logging
import random
import re
import sqlite3
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone
from urllib.parse import urljoin

import pytest
from helpers import (
    CROCKFORD,
    KEY,
    MANAGER,
    NO_RAFFLE,
    ONE_PRIZE,
    STRANGER,
    Client,
    forms_of_code,
    query,
    refused,
)

import draw
from raffle import create_app

PRIZES = [
    {"name": "Bicycle", "amount": 1},
    {"name": "Book", "amount": 3},
    {"name": "Bicycle", "amount": 1},
]
OTHER_KEY = "8e03978e-40d5-43dd-bc93-6894a57f9325"
CODE = "01AB-CDEF-GHJK-MNPQ-RSTV-WXYZ"

ADDRESSES = {  # with their bytes
    "203.0.113.77": b"\xcb\x00\x71\x4d",
    "2001:db8::4d": b"\x20\x01\x0d\xb8" + bytes(11) + b"\x4d",
}


def new_drawn(client, total_tickets=3, prizes=ONE_PRIZE):
    """Play a raffle up to its draw; return its path and its tickets.

    The tickets that won come first, in the order of the wins.
    """
    path, tickets = client.new_sold_out(total_tickets, prizes)
    others = {ticket["ticket_number"]: ticket for ticket in tickets}
    won = [others.pop(win["ticket_number"]) for win in client.draw(path).json]
    return path, [*won, *others.values()]


def all_wins(client, path):
    return [win for page in client.pages(f"{path}winners/") for win in page]


def assert_draw_holds(client, path):
    """Check a draw by nothing but what anyone can read of the raffle."""
    for sentence, holds in draw.check_draw(client.get(path).json, all_wins(client, path)):
        assert holds, sentence


def execute(database, sql, *values):
    """Change the database as another program would."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(sql, values)


def hash_code(code, salt, iterations=1000):
    return hashlib.pbkdf2_hmac("sha256", code.replace("-", "").encode(), salt, iterations)


UNTOUCHED = {"redeemed_at": None, "replaced_at": None}


def set_clock(monkeypatch, hour):
    """Set the clock to an hour of 4 July 2026."""
    monkeypatch.setattr("storage.now", lambda: f"2026-07-04T{hour}:00:00Z")


# Raffles


def test_a_raffle_is_created_with_these_members(client, monkeypatch):
    set_clock(monkeypatch, 12)
    response = client.create(10, PRIZES)

    created = response.json
    # In this order.
    expected = {
        "id": created["id"],
        "name": "Summer fair",
        "total_tickets": 10,
        "issued_tickets": 0,
        "available_tickets": 10,
        "winners_drawn": False,
        "replacements": 0,
        "prizes": PRIZES,
        "created_at": "2026-07-04T12:00:00Z",
        "closes_at": None,
        "closed_at": None,
        "drawn_at": None,
        "algorithm": "raffle-draw-2",
        "draw_commitment": created["draw_commitment"],
        "randomness_source": None,
        "public_randomness": None,
        "secret": None,
    }
    assert response.text == json.dumps(expected) + "\n"
    assert client.get(f"/raffles/{created['id']}/").text == response.text


def test_an_id_is_a_random_uuid(client):
    raffle_id = client.create().json["id"]

    assert str(uuid.UUID(raffle_id)) == raffle_id
    assert uuid.UUID(raffle_id).version == 4


def test_unknown_members_of_a_raffle_are_ignored(client):
    prizes = [{**prize, "colour": "red"} for prize in PRIZES]

    created = client.create(10, prizes, id="mine", winners_drawn=True).json

    assert created["id"] != "mine"
    assert created["winners_drawn"] is False
    assert created["prizes"] == PRIZES


def test_an_id_is_read_in_any_case_and_answered_in_lower_case(client, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("storage.MAX_WINS_PER_PAGE", 1)
    path = client.new_raffle(3, PRIZES[:1] * 2)
    raffle_id = path.split("/")[2]
    upper = f"/raffles/{raffle_id.upper()}/"

    ticket = client.participate(upper, Idempotency_Key=KEY)
    again = client.participate(upper, Idempotency_Key=KEY)
    other = client.participate(path, "10.1.0.2")
    client.participate(path, status=403)
    answers = [
        ticket,
        again,
        other,
        client.close(upper),
        client.draw(upper),
        client.get(f"{upper}winners/?limit=1"),
        client.verify(upper, ticket.json),
        client.redeem(upper, ticket.json),
        client.get(upper),
    ]

    for answer in answers:
        assert raffle_id.upper() not in f"{answer.text} {answer.headers}"
    assert raffle_id.upper() not in caplog.text
    assert len(all_wins(client, path)) == 2
    assert_draw_holds(client, path)


def test_a_raffle_may_have_ten_thousand_prizes_and_2_to_the_53_tickets(client):
    """A JavaScript client can count as far."""
    most = 2**53 - 1
    prizes = [{"name": f"Prize {n}", "amount": 1} for n in range(9_999)]
    prizes.append({"name": "Pen", "amount": most - 9_999})

    path = client.new_raffle(most, prizes)

    assert 1 <= client.participate(path).json["ticket_number"] <= most
    body = client.get(path).json
    assert body["total_tickets"] == most
    assert body["available_tickets"] == most - 1
    assert body["prizes"] == prizes


# Lists of raffles


def test_there_are_no_raffles_at_first(client):
    assert client.get("/raffles/").json == []


@pytest.mark.parametrize(
    ("limit", "longest", "sizes"),
    [
        (1, 9, [1, 1, 1, 1]),
        # A full last page has no next one.
        (2, 9, [2, 2]),
        (3, 9, [3, 1]),
        (None, 4, [4]),
        (None, 3, [3, 1]),
    ],
)
def test_raffles_are_listed_latest_first_without_prizes(client, monkeypatch, limit, longest, sizes):
    monkeypatch.setattr("storage.MAX_RAFFLES_PER_PAGE", longest)
    listed = []
    for n in range(4):
        members = client.create(name=f"Fair {n}").json
        del members["prizes"]
        listed.insert(0, members)

    pages = client.pages(f"/raffles/?limit={limit}" if limit else "/raffles/")

    assert [len(page) for page in pages] == sizes
    raffles = [raffle for page in pages for raffle in page]
    # As text, because the members have an order.
    assert json.dumps(raffles) == json.dumps(listed)


def test_pages_stay_right_while_raffles_are_added(client):
    ids = [client.create().json["id"] for _ in range(4)]
    first = client.get("/raffles/?limit=2")
    client.create()

    [link] = re.findall("<(.+)>", first.headers["Link"])
    second = client.get(urljoin("/raffles/", link))

    assert [raffle["id"] for raffle in first.json + second.json] == ids[::-1]


@pytest.mark.parametrize("prefix", ["", "/tombola", "/a/b"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_references_are_right_behind_any_prefix(client, prefix, slash):
    """They are resolved against the address that was asked for, as RFC 3986 says."""
    body = {"name": "Fair", "total_tickets": 3, "prizes": PRIZES[:1]}
    created = client.send("POST", f"/raffles{slash}", body, 201)
    location = urljoin(f"http://host{prefix}/raffles{slash}", created.headers["Location"])
    assert location == f"http://host{prefix}/raffles/{created.json['id']}/"
    client.create()

    [link] = re.findall("<(.+)>", client.get(f"/raffles{slash}?limit=1").headers["Link"])
    next_page = urljoin(f"http://host{prefix}/raffles{slash}?limit=1", link)
    assert next_page == f"http://host{prefix}/raffles{slash}?limit=1&cursor=2"


# Tickets


def test_the_numbers_are_those_of_the_deck_in_the_order_of_issue(client):
    path, tickets = client.new_sold_out(30)
    client.draw(path)

    body = client.get(path).json
    deal_key = draw.derive_deal_key(body["id"], bytes.fromhex(body["secret"]))
    deck = [draw.number_at(deal_key, 30, place) for place in range(1, 31)]
    assert [ticket["ticket_number"] for ticket in tickets] == deck
    assert sorted(deck) == list(range(1, 31))
    assert deck != sorted(deck)


def test_a_ticket_has_a_code_of_its_own_and_is_not_cached(client):
    path = client.new_raffle()
    responses = [client.participate(path, f"10.1.0.{n}") for n in range(3)]

    for response in responses:
        assert list(response.json) == ["raffle_id", "ticket_number", "verification_code"]
        assert response.json["raffle_id"] == path.split("/")[2]
        code = response.json["verification_code"]
        assert re.fullmatch(f"([{CROCKFORD}]{{4}}-){{5}}[{CROCKFORD}]{{4}}", code)
        assert response.headers["Cache-Control"] == "no-store"
    assert len({response.json["verification_code"] for response in responses}) == 3


def test_whoever_participates_may_send_any_body(client):
    path = client.new_raffle()

    client.send("POST", f"{path}participate/", b"{", 201, Content_Type="text/plain")


def test_an_address_gets_one_ticket_per_raffle(client):
    first = client.new_raffle()
    second = client.new_raffle()

    for path, address in ((first, "10.1.0.1"), (second, "10.1.0.1"), (first, MANAGER)):
        client.participate(path, address)
        refused(client.participate(path, address, 403), "already-participated")

    assert client.get(first).json["available_tickets"] == 1
    assert client.get(second).json["available_tickets"] == 2


@pytest.mark.parametrize(
    ("spelling", "address"),
    [
        ("10.1.0.1", "10.1.0.1"),
        ("::ffff:10.1.0.2", "10.1.0.2"),
        ("2001:DB8::1%eth0", "2001:db8::1"),
    ],
)
def test_who_has_participated_is_told_which_address_counted(client, spelling, address):
    path = client.new_raffle()
    client.participate(path, spelling)

    assert client.participate(path, spelling, 403).json["address"] == address


def assert_no_tickets_left(client, path):
    """Check that neither the holder of a ticket, 10.1.0.1, nor anyone else gets one."""
    for address in ("10.1.0.1", "10.1.0.2"):
        refused(client.participate(path, address, 410), "no-tickets-left")


def test_a_raffle_that_a_manager_has_closed_refuses_everybody(client):
    path = client.new_raffle()
    client.participate(path)
    client.close(path)

    assert_no_tickets_left(client, path)


def test_a_raffle_that_is_sold_out_refuses_everybody(client):
    path = client.new_raffle(1)
    client.participate(path)

    assert_no_tickets_left(client, path)


def test_a_raffle_that_another_program_has_closed_refuses_everybody(client, database):
    """What this one remembers of a raffle decides nothing."""
    path = client.new_raffle()
    client.participate(path)
    execute(database, "UPDATE raffle SET closed_at = created_at")

    assert_no_tickets_left(client, path)


# Idempotency keys


def test_the_same_address_and_key_get_the_same_ticket_until_the_draw(client, monkeypatch):
    path = client.new_raffle(3)
    ticket = client.participate(path, Idempotency_Key=KEY).json
    assert client.participate(path, Idempotency_Key=KEY).json == ticket

    client.participate(path, "10.1.0.2")
    client.close(path)
    # Later versions may hash more often: the ticket knows how often it was hashed.
    monkeypatch.setattr("storage.ITERATIONS", 2000)
    assert client.participate(path, Idempotency_Key=KEY).json == ticket

    client.draw(path)
    refused(client.participate(path, status=410, Idempotency_Key=KEY), "no-tickets-left")


def test_in_a_closed_raffle_another_address_or_key_gets_nothing(client):
    path = client.new_raffle(3)
    client.participate(path, Idempotency_Key=KEY)
    client.close(path)

    client.participate(path, "10.1.0.1", 410, Idempotency_Key=OTHER_KEY)
    client.participate(path, "10.1.0.3", 410, Idempotency_Key=KEY)


def test_the_same_key_of_another_address_or_raffle_gets_another_ticket(client):
    path = client.new_raffle()
    other = client.new_raffle()
    tickets = [
        client.participate(path, "10.1.0.1", Idempotency_Key=KEY).json,
        client.participate(path, "10.1.0.2", Idempotency_Key=KEY).json,
        client.participate(other, "10.1.0.1", Idempotency_Key=KEY).json,
    ]

    assert len({ticket["verification_code"] for ticket in tickets}) == 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"Idempotency_Key": KEY}, {"Idempotency_Key": OTHER_KEY}),
        ({"Idempotency_Key": KEY}, {"Idempotency_Key": KEY.upper()}),
        ({"Idempotency_Key": KEY}, {}),
        ({}, {"Idempotency_Key": KEY}),
    ],
    ids=["other key", "other case", "no key", "no key at first"],
)
def test_the_same_address_with_another_key_gets_nothing(client, first, second):
    path = client.new_raffle()
    client.participate(path, **first)

    refused(client.participate(path, status=403, **second), "already-participated")


# The close


def test_a_close_withdraws_the_tickets_that_are_left(client):
    path = client.new_raffle(9)
    before = client.get(path).json
    client.participate(path)

    closed = client.close(path).json

    changed = {"issued_tickets": 1, "available_tickets": 0, "closed_at": closed["closed_at"]}
    assert closed["closed_at"] is not None
    assert closed == {**before, **changed}
    assert client.get(path).json == closed


def test_a_raffle_is_closed_once_and_closes_with_its_last_ticket(client):
    closed = client.new_raffle()
    client.close(closed)
    sold_out, _ = client.new_sold_out()

    for path in (closed, sold_out):
        assert client.get(path).json["closed_at"]
        refused(client.close(path, 403), "already-closed")


def test_a_stranger_closes_nothing(client):
    path = client.new_raffle()

    refused(client.close(path, 403, STRANGER), "not-a-manager")

    assert client.get(path).json["closed_at"] is None


# The draw


@pytest.mark.parametrize(
    ("issued", "randomness"),
    [(0, "{}"), (1, "7 13 21 34 42 49"), (4, "drand: !~"), (5, "x" * 1000), (8, "x")],
    ids=lambda value: str(value)[:20],
)
def test_prizes_are_won_in_their_order_as_long_as_there_are_tickets(client, issued, randomness):
    path = client.new_raffle(2**53 - 1, PRIZES)
    tickets = [client.participate(path, f"10.2.0.{n}").json for n in range(issued)]
    client.close(path)

    wins = client.draw(path, {"public_randomness": randomness}).json

    names = ["Bicycle", "Book", "Book", "Book", "Bicycle"]
    assert [win["prize"] for win in wins] == names[:issued]
    for win in wins:
        assert list(win) == ["ticket_number", "prize", "redeemed_at"]
        assert win["redeemed_at"] is None
    winners = {win["ticket_number"] for win in wins}
    assert len(winners) == len(wins)
    assert winners <= {ticket["ticket_number"] for ticket in tickets}
    assert client.get(path).json["public_randomness"] == randomness
    assert all_wins(client, path) == wins
    assert_draw_holds(client, path)


@pytest.mark.parametrize(("longest", "sizes"), [(2, [2, 2, 1]), (3, [3, 2]), (5, [5])])
def test_a_draw_answers_with_the_first_page_of_its_wins(client, monkeypatch, longest, sizes):
    monkeypatch.setattr("storage.MAX_WINS_PER_PAGE", longest)
    path, _ = client.new_sold_out(6, PRIZES)

    response = client.draw(path)

    pages = client.pages(f"{path}winners/")
    assert [len(page) for page in pages] == sizes
    assert pages[0] == response.json
    link = response.headers.get("Link")
    if len(pages) == 1:
        assert link is None
    else:
        assert link == f'<?cursor={longest}>; rel="next"'

    wins = [win for page in pages for win in page]
    assert client.pages(f"{path}winners/?limit=1") == [[win] for win in wins]


def test_draws_are_refused_in_the_order_of_the_contract(client):
    path = client.new_raffle(randomness_source="drand round 7")
    malformed = {"more": 1}

    refused(client.draw(NO_RAFFLE, malformed, 403, STRANGER), "not-a-manager")
    refused(client.draw(NO_RAFFLE, malformed, 400), None)
    refused(client.draw(NO_RAFFLE, status=404), "no-such-raffle")
    refused(client.draw(path, status=403), "tickets-left")

    client.participate(path)
    client.close(path)
    refused(client.draw(path, status=400), "randomness-required")
    refused(client.draw(path, {}, 400), "randomness-required")

    client.draw(path, {"public_randomness": "a1b2c3"})
    refused(client.draw(path, malformed, 400), None)
    refused(client.draw(path, status=403), "already-drawn")


def test_a_raffle_is_drawn_once(client):
    path, _ = client.new_sold_out(3, randomness_source="drand round 7")
    wins = client.draw(path, {"public_randomness": "a1b2c3"}).json
    drawn = client.get(path).json
    assert drawn["winners_drawn"] is True

    for body in (None, {}, {"public_randomness": "a1b2c3"}, {"public_randomness": "d4e5f6"}):
        refused(client.draw(path, body, 403), "already-drawn")

    assert client.get(path).json == drawn
    assert client.get(f"{path}winners/").json == wins


def test_an_interrupted_draw_is_hidden_and_completed_as_decided(client, database):
    path, tickets = client.new_sold_out(5, PRIZES, randomness_source="drand round 7")
    before = client.get(path).json
    wins = client.draw(path, {"public_randomness": "round 7"}).json
    execute(database, "DELETE FROM win WHERE position = 2")
    execute(database, "UPDATE raffle SET drawn_at = NULL, address_key = zeroblob(32)")

    # Nothing shows but the decision.
    assert client.get(path).json == {**before, "public_randomness": "round 7"}
    assert client.get(f"{path}winners/").json == []
    for body in (tickets[0], {**tickets[0], "verification_code": "x"}):
        refused(client.verify(path, body, 400), "not-drawn")
        refused(client.redeem(path, body, 400), "not-drawn")

    # The next request to draw completes it.
    refused(client.draw(path, status=403), "already-drawn")
    assert client.get(path).json["public_randomness"] == "round 7"
    assert all_wins(client, path) == wins
    assert_draw_holds(client, path)


def test_a_draw_succeeds_beside_draws_of_an_unknown_raffle(client, database):
    path, _ = client.new_sold_out()

    with closing(sqlite3.connect(database)) as other, ThreadPoolExecutor(8) as pool:
        # While another program writes, the draw waits, and the others arrive.
        other.execute("BEGIN IMMEDIATE")
        drawing = pool.submit(client.draw, path, None, "*")
        unknown = [pool.submit(client.draw, NO_RAFFLE, None, "*") for _ in range(7)]
        assert not drawing.done()
        other.rollback()

    assert drawing.result().status_int == 201
    assert [response.result().status_int for response in unknown] == [404] * 7


@pytest.mark.parametrize("body", [None, b"", {}], ids=repr)
def test_the_server_makes_the_randomness_of_a_draw_without_any(client, body):
    path, _ = client.new_sold_out()
    client.draw(path, body)

    randomness = client.get(path).json["public_randomness"]
    assert re.fullmatch("made by the server: [0-9a-f]{64}", randomness)


# The secret


def test_the_commitment_of_a_raffle_is_the_hash_of_its_secret(client):
    path = client.new_raffle()
    commitment = client.get(path).json["draw_commitment"]
    client.close(path)
    client.draw(path)

    drawn = client.get(path).json
    assert drawn["draw_commitment"] == commitment
    assert hashlib.sha256(bytes.fromhex(drawn["secret"])).hexdigest() == commitment


def test_the_secret_is_shown_after_the_draw_only(client, database):
    path = client.new_raffle()
    [(secret,)] = query(database, "SELECT lower(hex(secret)) FROM raffle")

    def assert_hidden(*responses):
        public = [client.get(each) for each in (path, "/raffles/", f"{path}winners/")]
        for response in (*responses, *public):
            assert secret not in f"{response.text} {response.headers}", response.request.path

    assert_hidden()
    assert_hidden(client.participate(path))
    assert_hidden(client.close(path))
    # The draw is decided, but not complete.
    execute(database, "UPDATE raffle SET public_randomness = 'decided'")
    assert_hidden()

    client.draw(path, status=403)
    assert client.get(path).json["secret"] == secret
    assert client.get("/raffles/").json[0]["secret"] == secret


# Verification


def test_a_ticket_is_verified_with_its_code(client):
    path, (won, lost, _) = new_drawn(client)

    verdict = client.verify(path, won).json
    assert verdict == {"has_won": True, "prize": "Bicycle", **UNTOUCHED}
    verdict = client.verify(path, lost).json
    assert verdict == {"has_won": False, "prize": None, **UNTOUCHED}


def test_a_wrong_number_or_code_is_refused_whatever_is_wrong(client):
    path, (won, lost, _) = new_drawn(client)
    _, (of_other_raffle, *_) = new_drawn(client)
    wrong = [
        {**won, "verification_code": lost["verification_code"]},
        {**won, "ticket_number": lost["ticket_number"]},
        {**won, "ticket_number": 4},
        {**won, "ticket_number": 2**53 - 1},
        of_other_raffle,
    ]

    bodies = {refused(client.verify(path, ticket, 400), "invalid-code").body for ticket in wrong}

    assert len(bodies) == 1


@pytest.fixture
def verify_code(client, database):
    """Verify a drawn ticket, whose code is CODE, with another spelling; return the response."""
    path, [ticket] = new_drawn(client, 1)
    salt = bytes(16)
    sql = "UPDATE ticket SET salt = ?, iterations = ?, code_hash = ?"
    execute(database, sql, salt, 2000, hash_code(CODE, salt, 2000))

    def verify(spelling):
        return client.verify(path, {**ticket, "verification_code": spelling}, "*")

    return verify


SPELLINGS = {
    "typed": [CODE, CODE.lower(), "-".join(CODE), "\0".join(CODE)],
    "look-alikes": [CODE.replace("01", digits) for digits in ("OI", "OL", "oi", "ol")],
    "with spaces": [
        CODE.replace("-", space)
        for space in ("", " ", "\t", "\xa0", "\u2003", "\u2028", "\u2029", "\xad")
    ],
    "with dashes": [
        CODE.replace("-", dash)
        for dash in ("\u2010", "\u2011", "\u2013", "\u2014", "\u2212", "\ufe63")
    ],
    # What scanners make of the hyphen on other keyboard layouts.
    "scanned": [CODE.replace("-", mark) for mark in "'+*=?ß_/.:~)é"],
    "with anything": [
        CODE.replace("-", mark)
        for mark in "\u30fc\uff70\u00b7\u2043\u2500\ufe0f\u2800\u3164\u0332\u0335🎟\ud800"
    ],
    "pasted": [
        f"{CODE}\0\0", f" {CODE}\r\n", f"\ufeff{CODE}\u200b", f"{CODE}\ufe0f", f"{CODE}.",
        f"'{CODE}'", f"[{CODE}]", f"({CODE}).", f"\u201c{CODE}\u201d",
    ],
    "full width": ["".join(chr(ord(char) + 0xFEE0) for char in CODE)],
}  # fmt: skip

OTHER_CODES = {
    "too short": ["", "-", CODE[:-1], CODE[1:], f"{CODE[:-1]}\0", f"\0{CODE[1:]}"],
    "too long": [f"{CODE}0", CODE.replace("-", "x"), "0" * 3000],
    "no letters": [f"{CODE[:-1]}\ud800", "\ud800" * 24, "\0" * 24, "🎟" * 24],
    "others": ["0" * 24, CODE[::-1]],
    "one character": [
        f"{CODE[:n]}{'B' if char == 'A' else 'A'}{CODE[n + 1 :]}"
        for n, char in enumerate(CODE)
        if char != "-"
    ],
}


@pytest.mark.parametrize("how", SPELLINGS)
def test_a_code_is_read_as_people_type_paste_and_scan_it(verify_code, how):
    for spelling in SPELLINGS[how]:
        assert verify_code(spelling).status_int == 200, spelling


@pytest.mark.parametrize("how", OTHER_CODES)
def test_another_code_is_refused(verify_code, how):
    for spelling in OTHER_CODES[how]:
        response = verify_code(spelling)
        assert response.status_int == 400, spelling
        assert response.json["detail"] == "Invalid verification code", spelling


# Prizes


def test_a_prize_is_redeemed_by_a_manager_for_its_ticket(client):
    path, (won, lost) = new_drawn(client, 2)

    refused(client.redeem(path, won, 403, STRANGER), "not-a-manager")
    refused(client.redeem(path, {**won, "verification_code": "x"}, 400), "invalid-code")
    refused(client.redeem(path, lost, 403), "no-prize")

    assert client.verify(path, won).json["redeemed_at"] is None


def test_a_prize_is_redeemed_once_and_the_refusal_says_when(client, monkeypatch):
    path, (won, other) = new_drawn(client, 2, PRIZES[:1] * 2)
    drawn = client.get(path).json

    set_clock(monkeypatch, 18)
    redeemed = client.redeem(path, won).json

    assert redeemed == {
        "ticket_number": won["ticket_number"],
        "prize": "Bicycle",
        "redeemed_at": "2026-07-04T18:00:00Z",
    }
    set_clock(monkeypatch, 19)
    for _ in range(2):
        detail = "The prize of this ticket was already redeemed at 2026-07-04T18:00:00Z"
        refused(client.redeem(path, won, 403), "already-redeemed", detail)
    assert client.verify(path, won).json["redeemed_at"] == "2026-07-04T18:00:00Z"
    assert client.verify(path, other).json["redeemed_at"] is None
    assert client.get(f"{path}winners/").json[0] == redeemed
    assert client.get(path).json == drawn


# Several raffles, and the clock


def rows_of(database, path):
    """Return all rows of a raffle, by table."""
    raffle_id = path.split("/")[2]
    [(sequence,)] = query(database, f"SELECT sequence FROM raffle WHERE id = '{raffle_id}'")
    return {
        "raffle": query(database, f"SELECT * FROM raffle WHERE sequence = {sequence}"),
        "prize": query(database, f"SELECT * FROM prize WHERE raffle = {sequence}"),
        "ticket": query(database, f"SELECT * FROM ticket WHERE raffle = {sequence}"),
        "win": query(database, f"SELECT * FROM win WHERE raffle = {sequence}"),
    }


def test_what_is_done_to_one_raffle_leaves_the_other_as_it_is(client, database):
    first_prizes = [{"name": f"Prize {n} of the first raffle", "amount": 1} for n in range(3)]
    second_prizes = [{"name": f"Prize {n} of the second raffle", "amount": 1} for n in range(3)]
    first = client.new_raffle(3, first_prizes)
    second = client.new_raffle(4, second_prizes)

    def act(verb, path, *arguments, **headers):
        """Do something to one raffle, check that the other stays as it is; return the answer."""
        other = second if path == first else first
        before = rows_of(database, other)
        answer = verb(path, *arguments, **headers).json
        assert rows_of(database, other) == before
        return answer

    tickets = {first: [], second: []}
    for address in ("10.1.0.1", "10.1.0.2", "10.1.0.3"):
        for path in (first, second):
            ticket = act(client.participate, path, address, Idempotency_Key=KEY)
            assert act(client.participate, path, address, Idempotency_Key=KEY) == ticket
            tickets[path].append(ticket)
    act(client.close, second)
    wins = {path: act(client.draw, path) for path in (first, second)}

    for path, other, prizes in ((first, second, first_prizes), (second, first, second_prizes)):
        assert client.get(path).json["prizes"] == prizes
        assert all_wins(client, path) == wins[path]
        assert_draw_holds(client, path)
        prize_of = {win["ticket_number"]: win["prize"] for win in wins[path]}
        for ticket in tickets[path]:
            refused(client.verify(other, ticket, 400), "invalid-code")
            assert client.verify(path, ticket).json["prize"] == prize_of[ticket["ticket_number"]]
            act(client.redeem, path, ticket)


@pytest.fixture
def far_east(monkeypatch):
    """The local time is 14 hours ahead of UTC."""
    monkeypatch.setenv("TZ", "XXX-14")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_times_are_utc(client, far_east):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    path, [ticket] = client.new_sold_out()
    client.draw(path)
    redeemed = client.redeem(path, ticket).json
    after = datetime.now(timezone.utc)

    body = client.get(path).json
    times = (body["created_at"], body["closed_at"], body["drawn_at"], redeemed["redeemed_at"])
    for text in times:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        assert before <= moment <= after, text


def test_times_are_in_order_even_if_the_clock_is_put_back(client, monkeypatch):
    set_clock(monkeypatch, 18)
    closed = client.new_raffle()
    sold_out = client.new_raffle(1)

    set_clock(monkeypatch, 17)
    client.close(closed)
    client.participate(sold_out)

    set_clock(monkeypatch, 16)
    for path in (closed, sold_out):
        client.draw(path)
        body = client.get(path).json
        assert {body["created_at"], body["closed_at"], body["drawn_at"]} == {"2026-07-04T18:00:00Z"}


# What stays secret


def test_a_ticket_is_stored_as_hashes_of_its_address_and_its_code(client, database):
    path = client.new_raffle()
    [(address_key,)] = query(database, "SELECT address_key FROM raffle")
    salts = set()

    for address, packed in ADDRESSES.items():
        ticket = client.participate(path, address).json
        [(participant_hash, salt, iterations, code_hash)] = query(
            database,
            f"""
            SELECT participant_hash, salt, iterations, code_hash
            FROM ticket
            WHERE number = {ticket["ticket_number"]}
            """,
        )

        assert participant_hash == hmac.new(address_key, packed, "sha256").digest()[:16]
        assert iterations == 1000
        assert code_hash == hash_code(ticket["verification_code"], salt)
        assert len(salt) == 16
        salts.add(salt)

    assert len(salts) == len(ADDRESSES)


def test_files_and_log_hold_no_code_no_key_and_no_address(client, database, caplog):
    caplog.set_level(logging.DEBUG)
    path = client.new_raffle(2, [{"name": "Penny-farthing", "amount": 2}])
    tickets = [client.participate(path, each, Idempotency_Key=KEY).json for each in ADDRESSES]
    [(address_key,)] = query(database, "SELECT address_key FROM raffle")
    # Behind this one, the row of the first raffle has to move when it grows.
    client.new_raffle()
    client.draw(path)
    for ticket, other in zip(tickets, tickets[::-1]):
        client.redeem(path, ticket)
        client.verify(path, {**ticket, "ticket_number": other["ticket_number"]}, 400)

    wal = database.with_name("raffle.db-wal").read_bytes()
    client.app.close()
    stored = database.read_bytes()
    log = caplog.text.encode()

    # What is there is found.
    assert b"Penny-farthing" in stored
    assert b"Penny-farthing" in wal
    assert MANAGER.encode() in log

    # The -wal file keeps the address key until it is overwritten, as the README says.
    assert address_key not in stored
    forms = [KEY.encode(), uuid.UUID(KEY).bytes]
    for address, packed in ADDRESSES.items():
        forms += [address.encode(), packed]
    for ticket in tickets:
        forms += forms_of_code(ticket["verification_code"])
    for form in forms:
        assert form not in stored, form
        assert form not in wal, form
        assert form not in log, form


def test_no_secret_follows_from_what_is_public(tmp_path, monkeypatch):
    """In two applications with the same raffle at the same time, nothing but chance may differ."""
    set_clock(monkeypatch, 18)
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(KEY))
    secrets = []

    for name in ("a.db", "b.db"):
        random.seed(7)
        with closing(create_app(tmp_path / name, MANAGER)) as app:
            client = Client(app)
            path, tickets = client.new_sold_out(2)
            [(address_key,)] = query(tmp_path / name, "SELECT address_key FROM raffle")
            client.draw(path)
            body = client.get(path).json
        assert body["id"] == KEY
        secrets += [address_key, body["secret"], body["public_randomness"]]
        secrets += [ticket["verification_code"] for ticket in tickets]

    assert len(secrets) == 10
    assert len(set(secrets)) == 10


def test_the_log_says_which_manager_did_what_and_nothing_of_refusals(client, caplog):
    caplog.set_level(logging.INFO)
    path = client.new_raffle()
    ticket = client.participate(path).json
    client.close(path)
    client.draw(path)
    client.redeem(path, ticket)

    raffle_id = ticket["raffle_id"]
    number = ticket["ticket_number"]
    done = [
        f"Raffle {raffle_id} created by {MANAGER}",
        f"Raffle {raffle_id} closed by {MANAGER}",
        f"Winners of raffle {raffle_id} drawn by {MANAGER}",
        f"The prize of ticket {number} of raffle {raffle_id} redeemed by {MANAGER}",
    ]
    assert caplog.messages == done

    client.create(0, status=400)
    client.participate(path, status=410)
    client.close(path, 403)
    client.draw(path, status=403)
    client.redeem(path, ticket, 403)
    client.redeem(path, ticket, 403, STRANGER)
    assert caplog.messages == done
