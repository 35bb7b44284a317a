"""A raffle that closes by itself: at its time, whoever asks first, and for good."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from functools import partial

import pytest
from helpers import MANAGER, Client, Crowd, assert_drawn, at_once, query, refused

import draw
from raffle import create_app

NOON = "2026-07-04T12:00:00Z"
BEFORE = "2026-07-04T17:59:59Z"
CLOSES_AT = "2026-07-04T18:00:00Z"
NEXT_DAY = "2026-07-05T18:00:00Z"
TICKET = {"ticket_number": 1, "verification_code": "x"}


@pytest.fixture
def clock(monkeypatch):
    """Set the time with `clock(text)`; at first it is noon."""

    def set_time(text):
        monkeypatch.setattr("storage.now", lambda: text)

    set_time(NOON)
    return set_time


# Each finds the raffle due, when nobody has before.
FINDERS = {
    "the raffle": lambda client, path: client.get(path),
    "the list": lambda client, path: client.get("/raffles/"),
    "a participant": lambda client, path: client.participate(path, "10.1.0.2", 410),
    "a holder with a key": lambda client, path: client.participate(
        path, "10.1.0.1", 201, Idempotency_Key="k" * 16
    ),
    "who closes it": lambda client, path: client.close(path, 403),
    "who draws": lambda client, path: client.draw(path),
    "the wins": lambda client, path: client.get(f"{path}winners/"),
    "who verifies": lambda client, path: client.verify(path, TICKET, 400),
    "the replacements": lambda client, path: client.get(f"{path}replacements/"),
}


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS.keys())
def test_whoever_finds_it_due_stores_that_it_is_closed(client, database, clock, find):
    path = client.new_raffle(9, closes_at=CLOSES_AT)
    clock(BEFORE)
    client.participate(path, Idempotency_Key="k" * 16)
    assert client.get(path).json["closed_at"] is None

    clock(CLOSES_AT)
    find(client, path)
    assert query(database, "SELECT closed_at FROM raffle") == [(CLOSES_AT,)]

    # A clock that is put back changes nothing.
    clock(BEFORE)
    body = client.get(path).json
    assert (body["closed_at"], body["available_tickets"]) == (CLOSES_AT, 0)
    refused(client.participate(path, "10.1.0.3", 410), "no-tickets-left")


def test_nobody_asks_for_a_day_and_the_server_starts_anew(database, clock):
    with closing(create_app(database, MANAGER)) as app:
        client = Client(app)
        path = client.new_raffle(closes_at=CLOSES_AT)
        client.participate(path)
    clock(NEXT_DAY)
    with closing(create_app(database, MANAGER)) as app:
        client = Client(app)
        refused(client.participate(path, "10.1.0.2", 410), "no-tickets-left")
        assert client.get(path).json["closed_at"] == CLOSES_AT
        assert len(client.draw(path).json) == 1


def test_a_list_stores_all_raffles_that_are_due(client, database, clock):
    for _ in range(3):
        client.new_raffle(closes_at=CLOSES_AT)
    later = client.new_raffle(closes_at=NEXT_DAY)
    never = client.new_raffle()
    clock(CLOSES_AT)
    listed = client.get("/raffles/?limit=3").json
    assert [raffle["closed_at"] for raffle in listed] == [None, None, CLOSES_AT]
    closed = query(database, "SELECT count(*) FROM raffle WHERE closed_at = closes_at")
    assert closed == [(3,)]
    assert client.get(later).json["closed_at"] is client.get(never).json["closed_at"] is None


def test_the_last_ticket_closes_it_earlier(client, clock):
    path = client.new_raffle(1, closes_at=CLOSES_AT)
    clock(BEFORE)
    client.participate(path)
    body = client.get(path).json
    assert (body["closes_at"], body["closed_at"]) == (CLOSES_AT, BEFORE)
    client.draw(path)


def test_it_cannot_be_closed_by_hand(client, clock):
    path = client.new_raffle(closes_at=CLOSES_AT)
    detail = f"The raffle closes by itself at {CLOSES_AT}"
    refused(client.close(path, 403), "closes-by-itself", detail)
    assert client.get(path).json["closed_at"] is None
    refused(client.draw(path, status=403), "tickets-left")

    clock(CLOSES_AT)
    refused(client.close(path, 403), "already-closed")


@pytest.mark.parametrize(
    ("text", "closes_at"),
    [
        ("2026-07-04T12:00:01Z", "2026-07-04T12:00:01Z"),
        ("2026-07-04T18:00:00.000Z", CLOSES_AT),
        ("2026-07-04T18:00:00.0Z", CLOSES_AT),
        ("2027-07-05T12:00:00Z", "2027-07-05T12:00:00Z"),
        (None, None),
    ],
)
def test_the_time_may_be_up_to_366_days_ahead(client, clock, text, closes_at):
    assert client.create(closes_at=text).json["closes_at"] == closes_at


def test_any_other_time_is_refused(client, clock):
    form = "closes_at must be a time in UTC such as 2026-12-24T18:00:00Z"
    for value in (
        "",
        "tomorrow",
        "2026-07-04",
        "2026-07-04T18:00:00",
        "2026-07-04 18:00:00Z",
        "2026-07-04T18:00:00z",
        "2026-07-04T18:00:00.5Z",
        "2026-07-04T18:00:00.Z",
        "2026-07-04T18:00:00+00:00",
        "2026-07-04T20:00:00+02:00",
        "2026-02-30T18:00:00Z",
        "2026-07-04T24:00:00Z",
        "2026-07-04T18:00:60Z",
        "0000-07-04T18:00:00Z",
        "2026-07-04T18:00:00Z\n",
        "\u0662026-07-04T18:00:00Z",
    ):
        refused(client.create(closes_at=value, status=400), None, form)
    for value, found in ((7, "a number"), ([], "a list"), (True, "a boolean")):
        refused(client.create(closes_at=value, status=400), None, f"{form}, not {found}")

    out_of_range = f"closes_at must be later than {NOON}, and at most 366 days later"
    for value in (NOON, "2026-07-04T11:59:59Z", "2027-07-05T12:00:01Z", "9999-12-31T23:59:59Z"):
        refused(client.create(closes_at=value, status=400), None, out_of_range)
    assert client.get("/raffles/").json == []


@pytest.fixture
def hold_commit(monkeypatch):
    """Once told to, hold the next COMMIT; it goes on after `release`."""
    told, held, release = threading.Event(), threading.Event(), threading.Event()

    def trace(sql):
        if sql == "COMMIT" and told.is_set() and not held.is_set():
            held.set()
            assert release.wait(30)

    def connect(*arguments, **options):
        connection = original(*arguments, **options)
        connection.set_trace_callback(trace)
        return connection

    original = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    yield told, held, release
    release.set()


def test_a_ticket_that_was_decided_before_the_close_is_counted(hold_commit, database, clock):
    """Its batch is held over the second between its decision and its COMMIT."""
    told, held, release = hold_commit
    with closing(create_app(database, MANAGER)) as app, ThreadPoolExecutor() as pool:
        client = Client(app)
        path = client.new_raffle(9, closes_at=CLOSES_AT)
        clock(BEFORE)
        told.set()
        ticket = pool.submit(Client(app).participate, path)
        assert held.wait(30)

        clock(CLOSES_AT)
        readers = [pool.submit(Client(app).get, each) for each in (path, "/raffles/")]
        release.set()
        shown = readers[0].result(30).json
        [listed] = readers[1].result(30).json
        assert ticket.result(30).status_int == 201
        for body in (shown, listed):
            assert (body["closed_at"], body["issued_tickets"]) == (CLOSES_AT, 1)


def test_a_raffle_that_is_due_is_not_shown_while_that_cannot_be_stored(
    database, clock, monkeypatch
):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.5)
    with (
        closing(create_app(database, MANAGER)) as app,
        closing(sqlite3.connect(database, isolation_level=None)) as other,
    ):
        client = Client(app)
        path = client.new_raffle(closes_at=CLOSES_AT)
        other.execute("BEGIN IMMEDIATE")
        assert client.get(path).json["closed_at"] is None
        clock(CLOSES_AT)
        for each in (path, "/raffles/", f"{path}winners/"):
            refused(client.get(each, status=503), None)
        other.execute("ROLLBACK")
        assert client.get(path).json["closed_at"] == CLOSES_AT


def test_two_servers_close_it_at_the_same_instant(serve, database):
    servers = [serve(), serve()]
    crowds = [Crowd(4), Crowd(4, first=10_000)]
    closes_at = (datetime.now(timezone.utc) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = {
        "name": "Fair",
        "total_tickets": 10**6,
        "prizes": [{"name": "Bicycle", "amount": 1}],
        "closes_at": closes_at,
    }
    status, _, created = servers[0].request("POST", "/raffles/", body)
    assert status == 201, created
    path = f"/raffles/{created['id']}/"

    with crowds[0].asking(servers[0], path), crowds[1].asking(servers[1], path):
        for crowd in crowds:
            crowd.wait_for(lambda crowd=crowd: crowd.statuses[410])
    shown = [server.request("GET", path)[2] for server in servers]
    assert shown[0] == shown[1]
    tickets = sum(len(crowd.tickets) for crowd in crowds)
    assert (shown[0]["closed_at"], shown[0]["issued_tickets"]) == (closes_at, tickets)
    assert query(database, "SELECT count(*) FROM ticket") == [(tickets,)]

    answers = at_once([partial(server.request, "POST", f"{path}winners/") for server in servers])
    assert sorted(status for status, _, _ in answers) == [201, 403]
    assert_drawn(servers[0], path, servers[1].request("GET", path)[2]["public_randomness"])


def test_the_check_says_whether_it_was_closed_as_announced(client, clock):
    path = client.new_raffle(9, closes_at=CLOSES_AT)
    client.participate(path)
    clock(CLOSES_AT)
    wins = client.draw(path).json
    body = client.get(path).json
    sentence = "The raffle was closed by its last ticket or at the announced time"
    sold_out = {"issued_tickets": 1, "total_tickets": 1}
    for changes, holds in (
        ({}, True),
        ({"closed_at": BEFORE}, False),
        ({"closes_at": NEXT_DAY}, False),
        ({"closed_at": BEFORE, **sold_out}, True),
        ({"closed_at": NEXT_DAY, "drawn_at": NEXT_DAY, **sold_out}, False),
    ):
        results = dict(draw.check_draw({**body, **changes}, wins))
        assert results[sentence] is holds, changes
    assert sentence not in dict(draw.check_draw({**body, "closes_at": None}, wins))

    saved = {**body, "closes_at": NEXT_DAY}
    agrees = draw.check_draw(body, wins, [saved])[0]
    assert agrees == ("The raffle agrees with what you saved of it (different: closes_at)", False)
    for value in ("tomorrow", 7, "", f"{CLOSES_AT}\n"):
        with pytest.raises((TypeError, ValueError)):
            draw.check_draw({**body, "closes_at": value}, wins)
