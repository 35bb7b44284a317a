"""A participant whose answer was lost gets the same ticket again, with the same Idempotency-Key."""

import hashlib
import hmac
import sqlite3
import uuid
from contextlib import closing

import pytest
from helpers import Client, assert_problem, at_once, spellings

import raffle
import storage

KEY = str(uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEF))
OTHER = str(uuid.UUID(int=0x1234567890ABCDEF1234567890ABCDEE))


def test_the_same_key_from_the_same_address_gets_the_same_ticket(client):
    raffle = client.new_raffle()
    first = client.participate(raffle, Idempotency_Key=KEY)
    for _ in range(3):
        again = client.participate(raffle, Idempotency_Key=KEY)
        assert (again.status, again.json) == (first.status, first.json)
    assert client.get(raffle).json["available_tickets"] == 2


def test_a_ticket_is_repeated_when_the_number_of_iterations_has_changed(client, monkeypatch):
    raffle = client.new_raffle()
    ticket = client.participate(raffle, Idempotency_Key=KEY).json
    monkeypatch.setattr("storage.ITERATIONS", 2_000)
    assert client.participate(raffle, Idempotency_Key=KEY).json == ticket


def test_another_key_is_refused(client):
    raffle = client.new_raffle()
    client.participate(raffle, Idempotency_Key=KEY)
    for headers in ({"Idempotency_Key": OTHER}, {"Idempotency_Key": KEY.upper()}, {}):
        refusal = client.participate(raffle, status=403, **headers)
        assert_problem(refusal, "Your ip address has already participated in this raffle")


def test_the_same_key_from_another_address_is_another_participant(client):
    raffle = client.new_raffle()
    tickets = [client.participate(raffle, f"10.1.0.{n}", Idempotency_Key=KEY).json for n in range(3)]
    assert len({ticket["ticket_number"] for ticket in tickets}) == 3
    assert len({ticket["verification_code"] for ticket in tickets}) == 3


def test_the_same_key_in_another_raffle_is_another_ticket(client):
    first, second = (client.participate(client.new_raffle(), Idempotency_Key=KEY).json for _ in range(2))
    assert first["verification_code"] != second["verification_code"]


def test_a_ticket_without_a_key_is_not_had_again_with_one(client):
    raffle = client.new_raffle()
    client.participate(raffle)
    client.participate(raffle, status=403, Idempotency_Key=KEY)


def test_sold_out_is_sold_out_except_for_the_repeat(client):
    raffle = client.new_raffle(total_tickets=1)
    first = client.participate(raffle, Idempotency_Key=KEY)
    assert client.participate(raffle, Idempotency_Key=KEY).json == first.json
    for address, headers in (
        ("10.1.0.1", {"Idempotency_Key": OTHER}),
        ("10.1.0.1", {}),
        ("10.1.0.2", {"Idempotency_Key": KEY}),
    ):
        refusal = client.participate(raffle, address, status=410, **headers)
        assert_problem(refusal, "Tickets to this raffle are no longer available")
    client.draw(raffle)
    again = client.participate(raffle, Idempotency_Key=KEY)
    assert again.json == first.json
    assert client.verify(raffle, again.json).json == {"has_won": True, "prize": "Bicycle", "redeemed_at": None}


@pytest.mark.parametrize("key", ["x" * 16, "x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "!~" * 8])
def test_a_key_is_16_to_255_visible_characters(client, key):
    raffle = client.new_raffle()
    assert client.participate(raffle, Idempotency_Key=key).json == client.participate(raffle, Idempotency_Key=key).json


@pytest.mark.parametrize(
    "key", ["", "x" * 15, "x" * 256, "x" * 8 + " " + "x" * 8, "é" * 16, f"{KEY}, {KEY}", "x" * 16 + "\x7f"]
)
def test_anything_else_is_refused(client, key):
    raffle = client.new_raffle()
    refusal = client.participate(raffle, status=400, Idempotency_Key=key.encode().decode("latin1"))
    assert_problem(refusal, "Idempotency-Key must be 16 to 255 visible ASCII characters")
    assert client.get(raffle).json["available_tickets"] == 3


def test_a_raffle_that_does_not_exist_is_not_found_with_a_key_either(client):
    assert_problem(client.participate(f"/raffles/{uuid.uuid4()}/", status=404, Idempotency_Key=KEY))


def test_the_same_network_is_the_same_address(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_IPV6_PREFIX", "64")
    with closing(raffle.create_app(database, "10.0.0.1")) as app:
        client = Client(app)
        path = client.new_raffle()
        first, again = (client.participate(path, f"2001:db8::{n}", Idempotency_Key=KEY).json for n in (1, 2))
        assert first == again


def test_a_key_is_not_used_up_by_a_failure(client, monkeypatch):
    path = client.new_raffle()

    def unavailable(*arguments):
        raise storage.DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr("database.Database.write", unavailable)
        client.participate(path, status=503, Idempotency_Key=KEY)
    assert client.participate(path, Idempotency_Key=KEY).json == client.participate(path, Idempotency_Key=KEY).json


@pytest.mark.parametrize("total", [1, 100])
def test_the_same_key_ten_times_at_once_is_one_ticket_ten_times(serve, total):
    server = serve()
    raffle = server.create(total)

    def participate():
        status, _, ticket = server.request("POST", f"{raffle}participate/", **{"Idempotency-Key": KEY})
        return status, ticket["ticket_number"], ticket["verification_code"]

    answers = at_once([participate] * 10)
    assert answers == [answers[0]] * 10
    assert answers[0][0] == 201
    assert server.request("GET", raffle)[2]["available_tickets"] == total - 1


def test_nothing_is_stored_that_reveals_the_key_or_the_code(client, database):
    raffle = client.new_raffle()
    code = client.participate(raffle, Idempotency_Key=KEY).json["verification_code"]
    client.participate(raffle, Idempotency_Key=KEY)
    with closing(sqlite3.connect(database)) as connection:
        [(salt,)] = connection.execute("SELECT salt FROM ticket").fetchall()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    stored = database.read_bytes()
    assert salt in stored
    key = KEY.encode()
    digests = [hashlib.new(name, key).digest() for name in ("md5", "sha1", "sha256", "sha512")]
    digests.append(hmac.digest(key, salt, "sha256"))
    # Cut to 120 bits as the code is, too.
    for secret in (key, uuid.UUID(KEY).bytes, *[digest[:15] for digest in digests], *spellings(code)):
        assert secret not in stored
        assert secret.hex().encode() not in stored
