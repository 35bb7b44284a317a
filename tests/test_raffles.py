"""The rules of a raffle, in the order of its life: from its creation to its last prize, then what stays secret."""

import base64
import hashlib
import hmac
import json
import logging
import random
import re
import sqlite3
import uuid
from contextlib import closing
from functools import partial

from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, Client, at_once, query, refused

import draw
from raffle import create_app

PRIZES = [
    {"name": "Bicycle", "amount": 1},
    {"name": "Book", "amount": 3},
    {"name": "Bicycle", "amount": 1},
]
MEMBERS = "id name total_tickets issued_tickets available_tickets winners_drawn prizes created_at closed_at drawn_at"
MEMBERS += " algorithm draw_commitment randomness_source public_randomness secret"
KEY, OTHER_KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9325"
STRANGER = "10.0.0.2"
ADDRESSES = {
    "203.0.113.77": b"\xcb\x00\x71\x4d",
    "2001:db8::4d": b"\x20\x01\x0d\xb8" + bytes(11) + b"\x4d",
}
CROCKFORD, RFC_4648 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


def new_drawn(client, total_tickets=3, prizes=ONE_PRIZE):
    """Play a raffle up to its draw; return its path and its tickets, those that won first, in the order of the wins."""
    raffle, tickets = client.new_sold_out(total_tickets, prizes)
    others = {ticket["ticket_number"]: ticket for ticket in tickets}
    won = [others.pop(win["ticket_number"]) for win in client.draw(raffle).json]
    return raffle, [*won, *others.values()]


def check_draw(client, raffle):
    """Check a draw by nothing but what anyone can read of the raffle, and return all its wins."""
    wins = [win for page in client.pages(f"{raffle}winners/") for win in page]
    for sentence, holds in draw.check_draw(client.get(raffle).json, wins):
        assert holds, sentence
    return wins


def execute(database, sql, *values):
    """Change the database as another program would."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(sql, values)


def hash_code(code, salt, iterations=1000):
    return hashlib.pbkdf2_hmac("sha256", code.replace("-", "").encode(), salt, iterations)


def set_clock(monkeypatch, hour):
    monkeypatch.setattr("storage.now", lambda: f"2026-07-04T{hour:02}:00:00Z")


def test_a_raffle_is_created_with_these_members_and_unknown_ones_are_ignored(client):
    prizes = [{**prize, "colour": "red"} for prize in PRIZES]
    response = client.create(10, prizes, name="Summer fair", id="mine", winners_drawn=True)
    raffle_id, time, commitment = (
        response.json[name] for name in ("id", "created_at", "draw_commitment")
    )
    values = [
        raffle_id,
        "Summer fair",
        10,
        0,
        10,
        False,
        PRIZES,
        time,
        None,
        None,
        "raffle-draw-2",
        commitment,
    ]
    assert (
        response.text == json.dumps(dict(zip(MEMBERS.split(), [*values, None, None, None]))) + "\n"
    )
    assert (str(uuid.UUID(raffle_id)), uuid.UUID(raffle_id).version) == (raffle_id, 4)
    assert response.headers["Location"] == f"/raffles/{raffle_id}/"
    assert client.get(response.headers["Location"]).text == response.text


def test_an_id_is_read_in_any_case_and_answered_in_lower_case(client, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("storage.MAX_WINS_PER_PAGE", 1)
    raffle = client.new_raffle(3, PRIZES[:1] * 2)
    upper = raffle.upper().replace("RAFFLES", "raffles")
    tickets = [client.participate(upper, Idempotency_Key=KEY) for _ in range(2)]
    tickets.append(client.participate(raffle, "10.1.0.2"))
    client.participate(raffle, status=403)
    answers = [
        *tickets,
        client.close(upper),
        client.draw(upper),
        client.get(f"{upper}winners/?limit=1"),
    ]
    answers += [
        client.verify(upper, tickets[0].json),
        client.redeem(upper, tickets[0].json),
        client.get(upper),
    ]
    for answer in answers:
        assert upper.split("/")[2] not in f"{answer.text} {answer.headers} {caplog.text}"
    assert len(check_draw(client, raffle)) == 2


def test_a_raffle_may_have_as_many_tickets_as_a_client_can_count_and_ten_thousand_prizes(client):
    most = 2**53 - 1
    prizes = [{"name": f"Prize {n}", "amount": 1} for n in range(9_999)] + [
        {"name": "Pen", "amount": most - 9_999}
    ]
    raffle = client.new_raffle(most, prizes)
    assert 1 <= client.participate(raffle).json["ticket_number"] <= most
    body = client.get(raffle).json
    assert (body["total_tickets"], body["available_tickets"], body["prizes"]) == (
        most,
        most - 1,
        prizes,
    )


def test_raffles_are_listed_latest_first_without_prizes_and_a_full_last_page_has_no_next(
    client, monkeypatch
):
    assert client.get("/raffles/").json == []
    raffles = [client.create(name=f"Fair {n}").json for n in range(4)]
    listed = [
        {name: raffle[name] for name in MEMBERS.replace(" prizes", "").split()}
        for raffle in raffles[::-1]
    ]
    for limit, longest, sizes in (
        (1, 9, [1] * 4),
        (2, 9, [2, 2]),
        (3, 9, [3, 1]),
        (None, 4, [4]),
        (None, 3, [3, 1]),
    ):
        monkeypatch.setattr("storage.MAX_RAFFLES_PER_PAGE", longest)
        pages = client.pages(f"/raffles/?limit={limit}" if limit else "/raffles/")
        assert [len(page) for page in pages] == sizes
        assert [[*raffle.items()] for page in pages for raffle in page] == [
            [*raffle.items()] for raffle in listed
        ]


def test_pages_stay_right_while_raffles_are_added(client):
    ids = [client.create().json["id"] for _ in range(4)]
    first = client.get("/raffles/?limit=2")
    client.create()
    second = client.get(re.match("<(.+)>", first.headers["Link"])[1])
    assert [raffle["id"] for raffle in first.json + second.json] == ids[::-1]


def test_the_numbers_are_those_of_the_deck_in_the_order_of_issue(client):
    raffle, tickets = client.new_sold_out(30)
    client.draw(raffle)
    body = client.get(raffle).json
    key = draw.derive_deal_key(body["id"], bytes.fromhex(body["secret"]))
    numbers = [ticket["ticket_number"] for ticket in tickets]
    assert numbers == [draw.number_at(key, 30, place) for place in range(1, 31)]
    assert numbers != sorted(numbers) == list(range(1, 31))


def test_a_ticket_needs_no_body_has_a_code_of_its_own_and_is_not_cached(client):
    raffle = client.new_raffle()
    responses = [client.participate(raffle, f"10.1.0.{n}") for n in range(2)]
    responses.append(
        client.send("POST", f"{raffle}participate/", b"{", 201, Content_Type="text/plain")
    )
    for response in responses:
        assert list(response.json) == ["raffle_id", "ticket_number", "verification_code"]
        assert response.json["raffle_id"] == raffle.split("/")[2]
        assert re.fullmatch(
            f"([{CROCKFORD}]{{4}}-){{5}}[{CROCKFORD}]{{4}}", response.json["verification_code"]
        )
        assert response.headers["Cache-Control"] == "no-store"
    assert len({response.json["verification_code"] for response in responses}) == 3


def test_an_address_gets_one_ticket_per_raffle(client):
    raffle, other = client.new_raffle(), client.new_raffle()
    for path, address in ((raffle, "10.1.0.1"), (other, "10.1.0.1"), (raffle, MANAGER)):
        client.participate(path, address)
        refused(client.participate(path, address, 403), "already-participated")
    assert client.get(raffle).json["available_tickets"] == 1


def test_who_has_participated_is_told_which_address_counted(client):
    raffle = client.new_raffle(9)
    for spelling, address in (
        ("10.1.0.1", "10.1.0.1"),
        ("::ffff:10.1.0.2", "10.1.0.2"),
        ("2001:DB8::1%eth0", "2001:db8::1"),
    ):
        client.participate(raffle, spelling)
        assert client.participate(raffle, spelling, 403).json["address"] == address


def test_a_closed_raffle_refuses_everybody_holders_included(client, database):
    raffles = [client.new_raffle(), client.new_raffle(), client.new_raffle(1)]
    for raffle in raffles:
        client.participate(raffle)
    client.close(raffles[0])
    # By another program: what this one remembers of a raffle decides nothing.
    execute(database, "UPDATE raffle SET closed_at = created_at WHERE closed_at IS NULL")
    for raffle in raffles:
        for address in ("10.1.0.1", "10.1.0.2"):
            refused(client.participate(raffle, address, 410), "no-tickets-left")


def test_the_same_address_and_key_get_the_same_ticket_until_the_draw(client, monkeypatch):
    raffle = client.new_raffle(3)
    tickets = [client.participate(raffle, Idempotency_Key=KEY).json for _ in range(2)]
    client.participate(raffle, "10.1.0.2")
    client.close(raffle)
    monkeypatch.setattr("storage.ITERATIONS", 2000)
    tickets.append(client.participate(raffle, Idempotency_Key=KEY).json)
    assert tickets == tickets[:1] * 3
    client.participate(raffle, "10.1.0.1", 410, Idempotency_Key=OTHER_KEY)
    client.participate(raffle, "10.1.0.3", 410, Idempotency_Key=KEY)
    client.draw(raffle)
    refused(client.participate(raffle, status=410, Idempotency_Key=KEY), "no-tickets-left")


def test_another_key_gets_nothing_and_another_address_or_raffle_another_ticket(client):
    raffle = client.new_raffle(9)
    tickets = [client.participate(raffle, f"10.1.0.{n}", Idempotency_Key=KEY).json for n in (1, 2)]
    tickets.append(client.participate(client.new_raffle(), Idempotency_Key=KEY).json)
    assert len({ticket["verification_code"] for ticket in tickets}) == 3
    for headers in ({"Idempotency_Key": OTHER_KEY}, {"Idempotency_Key": KEY.upper()}, {}):
        refused(client.participate(raffle, status=403, **headers), "already-participated")
    client.participate(raffle, "10.1.0.3")
    refused(
        client.participate(raffle, "10.1.0.3", 403, Idempotency_Key=KEY), "already-participated"
    )


def test_a_manager_closes_a_raffle_once_which_withdraws_the_tickets_that_are_left(client):
    raffle, (sold_out, _) = client.new_raffle(9), client.new_sold_out()
    before = client.get(raffle).json
    client.participate(raffle)
    refused(client.close(raffle, 403, STRANGER), "not-a-manager")
    assert client.get(raffle).json["closed_at"] is None
    closed = client.close(raffle).json
    changed = {"issued_tickets": 1, "available_tickets": 0, "closed_at": closed["closed_at"]}
    assert closed == client.get(raffle).json == {**before, **changed}
    for path in (raffle, sold_out):
        assert client.get(path).json["closed_at"]
        refused(client.close(path, 403), "already-closed")


def test_prizes_are_won_in_their_order_for_as_long_as_there_are_tickets(client):
    names = ["Bicycle", "Book", "Book", "Book", "Bicycle"]
    for issued, randomness in (
        (0, "{}"),
        (1, "7 13 21 34 42 49"),
        (4, "drand: !~"),
        (5, "x" * 1000),
        (8, "x"),
    ):
        raffle = client.new_raffle(2**53 - 1, PRIZES)
        numbers = {
            client.participate(raffle, f"10.2.0.{n}").json["ticket_number"] for n in range(issued)
        }
        client.close(raffle)
        wins = client.draw(raffle, {"public_randomness": randomness}).json
        assert client.get(raffle).json["public_randomness"] == randomness
        assert [win["prize"] for win in wins] == names[:issued]
        assert all(
            [*win] == ["ticket_number", "prize", "redeemed_at"] and not win["redeemed_at"]
            for win in wins
        )
        assert len(numbers & {win["ticket_number"] for win in wins}) == len(wins)
        assert check_draw(client, raffle) == wins


def test_a_draw_answers_with_the_first_page_of_its_wins(client, monkeypatch):
    for longest, sizes in ((2, [2, 2, 1]), (3, [3, 2]), (5, [5])):
        monkeypatch.setattr("storage.MAX_WINS_PER_PAGE", longest)
        raffle, _ = client.new_sold_out(6, PRIZES)
        response = client.draw(raffle)
        link = f'<{raffle}winners/?cursor={longest}>; rel="next"' if sizes[1:] else None
        assert response.headers.get("Link") == link
        pages = client.pages(f"{raffle}winners/")
        assert pages[0] == response.json
        assert [len(page) for page in pages] == sizes
        assert client.pages(f"{raffle}winners/?limit=1") == [
            [win] for page in pages for win in page
        ]


def test_only_the_request_that_decides_has_drawn_and_the_others_are_refused_in_the_order_of_the_contract(
    client,
):
    raffle, malformed = client.new_raffle(randomness_source="drand round 7"), {"more": 1}
    refused(client.draw(NO_RAFFLE, malformed, 403, STRANGER), "not-a-manager")
    refused(client.draw(NO_RAFFLE, malformed, 400), None)
    refused(client.draw(NO_RAFFLE, status=404), "no-such-raffle")
    refused(client.draw(raffle, status=403), "tickets-left")
    client.participate(raffle)
    client.close(raffle)
    refused(client.draw(raffle, status=400), "randomness-required")
    refused(client.draw(raffle, {}, 400), "randomness-required")
    wins = client.draw(raffle, {"public_randomness": "a1b2c3"}).json
    drawn = client.get(raffle).json
    assert drawn["winners_drawn"] is True
    refused(client.draw(raffle, malformed, 400), None)
    for body in (None, {}, {"public_randomness": "a1b2c3"}, {"public_randomness": "d4e5f6"}):
        refused(client.draw(raffle, body, 403), "already-drawn")
    assert (client.get(raffle).json, client.get(f"{raffle}winners/").json) == (drawn, wins)


def test_a_draw_that_was_interrupted_is_hidden_until_a_request_completes_it_as_decided(
    client, database
):
    raffle, tickets = client.new_sold_out(5, PRIZES, randomness_source="drand round 7")
    before = client.get(raffle).json
    wins = client.draw(raffle, {"public_randomness": "round 7"}).json
    execute(database, "DELETE FROM win WHERE position = 2")
    execute(database, "UPDATE raffle SET drawn_at = NULL, address_key = zeroblob(32)")
    assert client.get(raffle).json == {**before, "public_randomness": "round 7"}
    assert client.get(f"{raffle}winners/").json == []
    for body in (tickets[0], {**tickets[0], "verification_code": "x"}):
        refused(client.verify(raffle, body, 400), "not-drawn")
        refused(client.redeem(raffle, body, 400), "not-drawn")
    refused(client.draw(raffle, status=403), "already-drawn")
    assert client.get(raffle).json["public_randomness"] == "round 7"
    assert check_draw(client, raffle) == wins


def test_a_draw_of_an_unknown_raffle_does_no_harm_to_one_at_the_same_instant(client):
    # Most rounds put both into one commit.
    for _ in range(10):
        raffle, _ = client.new_sold_out()
        draws = [partial(client.draw, path, status="*") for path in [raffle] + [NO_RAFFLE] * 7]
        assert [response.status_int for response in at_once(draws)] == [201] + [404] * 7


def test_the_server_makes_the_randomness_of_a_draw_without_a_body(client):
    for body in (None, b"", {}):
        raffle, _ = client.new_sold_out()
        client.draw(raffle, body)
        assert re.fullmatch(
            "made by the server: [0-9a-f]{64}", client.get(raffle).json["public_randomness"]
        ), body


def test_the_secret_is_committed_to_from_the_start_and_shown_after_the_draw_only(client, database):
    def public():
        paths = (raffle, "/raffles/", f"{raffle}winners/")
        return "".join(f"{response.text} {response.headers}" for response in map(client.get, paths))

    raffle = client.new_raffle()
    [(secret, commitment)] = query(database, "SELECT secret, draw_commitment FROM raffle")
    assert (
        client.get(raffle).json["draw_commitment"]
        == commitment
        == hashlib.sha256(secret).hexdigest()
    )
    shown = (
        public() + client.participate(raffle).text + public() + client.close(raffle).text + public()
    )
    execute(database, "UPDATE raffle SET public_randomness = 'decided'")
    assert secret.hex() not in shown + public()
    client.draw(raffle, status=403)
    assert (
        client.get(raffle).json["secret"]
        == client.get("/raffles/").json[0]["secret"]
        == secret.hex()
    )


def test_a_ticket_is_verified_with_its_own_code_only(client):
    raffle, (won, lost, other) = new_drawn(client)
    assert client.verify(raffle, won).json == {
        "has_won": True,
        "prize": "Bicycle",
        "redeemed_at": None,
    }
    assert client.verify(raffle, lost).json == {
        "has_won": False,
        "prize": None,
        "redeemed_at": None,
    }
    wrong = [{**won, "verification_code": other["verification_code"]}, new_drawn(client)[1][0]]
    wrong += [{**won, "ticket_number": number} for number in (4, 2**53 - 1)]
    assert (
        len({refused(client.verify(raffle, ticket, 400), "invalid-code").body for ticket in wrong})
        == 1
    )


def test_a_code_is_read_as_people_type_paste_and_scan_it(client, database):
    raffle, [ticket] = new_drawn(client, 1)
    code, salt = "01AB-CDEF-GHJK-MNPQ-RSTV-WXYZ", bytes(16)
    values = salt, 2000, hash_code(code, salt, 2000)
    execute(database, "UPDATE ticket SET salt = ?, iterations = ?, code_hash = ?", *values)
    read = [
        code,
        code.lower(),
        "-".join(code),
        "\0".join(code),
        f"{code}\0\0",
        f" {code}\r\n",
        f"\ufeff{code}\u200b",
    ]
    read += [
        code.replace("-", space)
        for space in ("", " ", "\t", "\xa0", "\u2003", "\u2028", "\u2029", "\xad")
    ]
    read += [
        code.replace("-", dash)
        for dash in ("\u2010", "\u2011", "\u2013", "\u2014", "\u2212", "\ufe63")
    ]
    read += [code.replace("01", digits) for digits in ("OI", "OL", "oi", "ol")]
    # What scanners make of the hyphen on other keyboard layouts, and what people copy along.
    marks = "'+*=?ß_/.:~)\u30fc\uff70\u00b7\u2043\u2500\ufe0f\u2800\u3164\u0332\u0335é🎟\ud800"
    read += [code.replace("-", mark) for mark in marks]
    read += [
        f"'{code}'",
        f"[{code}]",
        f"({code}).",
        f"{code}\ufe0f",
        f"\u201c{code}\u201d",
        f"{code}.",
    ]
    read.append("".join(chr(ord(char) + 0xFEE0) for char in code))
    for spelling in read:
        assert (
            client.verify(raffle, {**ticket, "verification_code": spelling}, "*").status_int == 200
        ), spelling
    wrong = [
        "",
        "-",
        code[:-1],
        code[1:],
        f"{code}0",
        f"{code[:-1]}\0",
        f"\0{code[1:]}",
        code.replace("-", "x"),
    ]
    wrong += [
        f"{code[:-1]}\ud800",
        "\ud800" * 24,
        "\0" * 24,
        "🎟" * 24,
        "0" * 24,
        "0" * 3000,
        code[::-1],
    ]
    wrong += [
        code[:n] + ("B" if char == "A" else "A") + code[n + 1 :]
        for n, char in enumerate(code)
        if char != "-"
    ]
    for spelling in wrong:
        response = client.verify(raffle, {**ticket, "verification_code": spelling}, "*")
        assert (response.status_int, response.json["detail"]) == (
            400,
            "Invalid verification code",
        ), spelling


def test_a_prize_is_redeemed_once_by_a_manager_and_the_refusal_says_when(client, monkeypatch):
    raffle, (won, other, lost) = new_drawn(client, 3, PRIZES[:1] * 2)
    drawn = client.get(raffle).json
    refused(client.redeem(raffle, won, 403, STRANGER), "not-a-manager")
    refused(client.redeem(raffle, {**won, "verification_code": "x"}, 400), "invalid-code")
    refused(client.redeem(raffle, lost, 403), "no-prize")
    set_clock(monkeypatch, 18)
    redeemed = {
        "ticket_number": won["ticket_number"],
        "prize": "Bicycle",
        "redeemed_at": "2026-07-04T18:00:00Z",
    }
    assert client.redeem(raffle, won).json == redeemed
    set_clock(monkeypatch, 19)
    detail = "The prize of this ticket was already redeemed at 2026-07-04T18:00:00Z"
    for _ in range(2):
        refused(client.redeem(raffle, won, 403), "already-redeemed", detail)
    assert client.verify(raffle, won).json["redeemed_at"] == redeemed["redeemed_at"]
    assert client.verify(raffle, other).json["redeemed_at"] is None
    assert client.get(f"{raffle}winners/").json[0] == redeemed
    assert client.get(raffle).json == drawn


def test_what_is_done_to_one_raffle_leaves_the_other_as_it_is(client, database):
    def rows(n):
        tables = {"raffle": "sequence", "prize": "raffle", "ticket": "raffle", "win": "raffle"}
        return [
            query(database, f"SELECT * FROM {table} WHERE {key} = {n + 1}")
            for table, key in tables.items()
        ]

    def act(verb, n, *arguments, **headers):
        before = rows(1 - n)
        answer = verb(paths[n], *arguments, **headers).json
        assert rows(1 - n) == before
        return answer

    prizes = [
        [{"name": f"Prize {n} of raffle {raffle}", "amount": 1} for n in range(3)]
        for raffle in (0, 1)
    ]
    paths, tickets = [client.new_raffle(3, prizes[0]), client.new_raffle(4, prizes[1])], ([], [])
    for address in ("10.1.0.1", "10.1.0.2", "10.1.0.3"):
        for n in (0, 1):
            tickets[n].append(act(client.participate, n, address, Idempotency_Key=KEY))
            assert act(client.participate, n, address, Idempotency_Key=KEY) == tickets[n][-1]
    act(client.close, 1)
    wins = [act(client.draw, n) for n in (0, 1)]
    for n in (0, 1):
        assert check_draw(client, paths[n]) == wins[n]
        assert client.get(paths[n]).json["prizes"] == prizes[n]
        won = {win["ticket_number"]: win["prize"] for win in wins[n]}
        for ticket in tickets[n]:
            refused(client.verify(paths[1 - n], ticket, 400), "invalid-code")
            assert client.verify(paths[n], ticket).json["prize"] == won[ticket["ticket_number"]]
            act(client.redeem, n, ticket)


def test_times_are_utc_and_in_order_even_if_the_clock_is_put_back(client, monkeypatch):
    set_clock(monkeypatch, 18)
    closed, sold_out = client.new_raffle(), client.new_raffle(1)
    set_clock(monkeypatch, 17)
    client.close(closed)
    client.participate(sold_out)
    set_clock(monkeypatch, 16)
    for raffle in (closed, sold_out):
        client.draw(raffle)
        body = client.get(raffle).json
        assert {body["created_at"], body["closed_at"], body["drawn_at"]} == {"2026-07-04T18:00:00Z"}


def test_a_ticket_is_stored_as_hashes_of_its_address_and_its_code(client, database):
    raffle, salts = client.new_raffle(), set()
    [(key,)] = query(database, "SELECT address_key FROM raffle")
    for address, packed in ADDRESSES.items():
        number, code = [*client.participate(raffle, address).json.values()][1:]
        sql = f"SELECT participant_hash, salt, iterations, code_hash FROM ticket WHERE number = {number}"
        [(participant, salt, *hashed)] = query(database, sql)
        assert participant == hmac.new(key, packed, "sha256").digest()[:16]
        assert [len(salt), *hashed] == [16, 1000, hash_code(code, salt)]
        salts.add(salt)
    assert len(salts) == len(ADDRESSES)


def test_no_file_and_no_line_of_the_log_tells_a_code_a_key_or_who_took_part(
    client, database, caplog
):
    caplog.set_level(logging.DEBUG)
    raffle = client.new_raffle(2, [{"name": "Penny-farthing", "amount": 2}])
    tickets = [
        client.participate(raffle, address, Idempotency_Key=KEY).json for address in ADDRESSES
    ]
    [(address_key,)] = query(database, "SELECT address_key FROM raffle")
    client.new_raffle()  # behind which the row of the first one has to move when it grows
    client.draw(raffle)
    for ticket, other in zip(tickets, tickets[::-1]):
        client.redeem(raffle, ticket)
        client.verify(raffle, {**ticket, "ticket_number": other["ticket_number"]}, 400)
    wal = database.with_name("raffle.db-wal").read_bytes()
    client.app.close()
    stored, log = database.read_bytes(), caplog.text.encode()
    # What is there is found.
    assert (b"Penny-farthing" in stored, b"Penny-farthing" in wal, MANAGER.encode() in log) == (
        True,
        True,
        True,
    )
    assert address_key not in stored
    forms = [KEY.encode(), uuid.UUID(KEY).bytes, *ADDRESSES.values(), *map(str.encode, ADDRESSES)]
    for code in (ticket["verification_code"] for ticket in tickets):
        plain = code.replace("-", "")
        raw = base64.b32decode(plain.translate(str.maketrans(CROCKFORD, RFC_4648)))
        forms += [raw, raw[::-1], raw.hex().encode(), base64.b64encode(raw), base64.b32encode(raw)]
        for text in (code, plain, code.lower(), plain.lower()):
            forms += [text.encode(), text.encode("utf-16-le"), text.encode().hex().encode()]
    for form in forms:
        assert form not in stored + wal + log, form


def test_no_secret_follows_from_what_is_public(tmp_path, monkeypatch):
    # Two applications with the same raffle at the same time: nothing but chance may differ.
    set_clock(monkeypatch, 18)
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(KEY))
    secrets = []
    for name in ("a.db", "b.db"):
        random.seed(7)
        with closing(create_app(tmp_path / name, MANAGER)) as app:
            client = Client(app)
            raffle, tickets = client.new_sold_out(2)
            secrets += query(tmp_path / name, "SELECT address_key FROM raffle")
            client.draw(raffle)
            body = client.get(raffle).json
        assert body["id"] == KEY
        secrets += [
            body["secret"],
            body["public_randomness"],
            *(ticket["verification_code"] for ticket in tickets),
        ]
    assert len(set(secrets)) == len(secrets) == 10


def test_the_log_says_which_manager_did_what_and_nothing_of_what_was_refused(client, caplog):
    caplog.set_level(logging.INFO)
    raffle = client.new_raffle()
    ticket = client.participate(raffle).json
    client.close(raffle)
    client.draw(raffle)
    client.redeem(raffle, ticket)
    raffle_id, number = ticket["raffle_id"], ticket["ticket_number"]
    done = [f"Raffle {raffle_id} created by {MANAGER}", f"Raffle {raffle_id} closed by {MANAGER}"]
    done.append(f"Winners of raffle {raffle_id} drawn by {MANAGER}")
    done.append(f"The prize of ticket {number} of raffle {raffle_id} redeemed by {MANAGER}")
    assert caplog.messages == done
    client.create(0, status=400)
    client.participate(raffle, status=410)
    client.close(raffle, 403)
    client.draw(raffle, status=403)
    for address in (MANAGER, STRANGER):
        client.redeem(raffle, ticket, 403, address)
    assert caplog.messages == done
