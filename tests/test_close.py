"""A raffle can be closed before it is sold out, and is then drawn among the tickets that were issued."""

import hashlib
import re
import time
from contextlib import closing
from functools import partial

import pytest
from helpers import MANAGER, ONE_PRIZE, assert_problem, at_once

import draw
import storage

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
CLOSED = "The raffle has already been closed"
NO_TICKETS = "Tickets to this raffle are no longer available"


def participate(client, raffle, count):
    """Issue tickets to so many participants; return their numbers, ascending."""
    return sorted(client.participate(raffle, f"10.2.0.{n}").json["ticket_number"] for n in range(count))


def digest(numbers):
    return hashlib.sha256("".join(f"{number}\n" for number in numbers).encode()).hexdigest()


def assert_holds(client, raffle):
    receipt, wins, tickets = (client.get(f"{raffle}{path}/").json for path in ("draw", "winners", "tickets"))
    assert all(holds for _, holds in draw.check_draw(receipt, wins, tickets, [client.get(raffle).json]))


def test_closing_withdraws_the_tickets_that_are_left(client):
    raffle = client.new_raffle(total_tickets=9)
    before = client.get(raffle).json
    numbers = participate(client, raffle, 3)
    ticket = client.participate(raffle, "10.3.0.1", Idempotency_Key=KEY).json
    numbers = sorted([*numbers, ticket["ticket_number"]])
    assert client.get(f"{raffle}tickets/").json == []
    closed = client.close(raffle).json
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", closed["closed_at"])
    assert closed == {
        **before,
        "available_tickets": 0,
        "issued_tickets": 4,
        "closed_at": closed["closed_at"],
        "tickets_sha256": digest(numbers),
    }
    assert client.get(raffle).json == closed
    assert client.get(f"{raffle}tickets/").json == numbers
    assert client.pages(f"{raffle}tickets/?limit=3") == [numbers[:3], numbers[3:]]
    for address in ("10.2.0.1", "10.2.0.99"):
        assert_problem(client.participate(raffle, address, status=410), NO_TICKETS)
    assert client.participate(raffle, "10.3.0.1", Idempotency_Key=KEY).json == ticket


def test_a_raffle_closes_by_itself_with_its_last_ticket(client):
    raffle = client.new_sold_out(2)
    body = client.get(raffle).json
    assert (body["issued_tickets"], body["tickets_sha256"]) == (2, None)
    assert body["closed_at"]
    assert client.get(f"{raffle}tickets/").json == [1, 2]
    assert_problem(client.close(raffle, status=403), CLOSED)


def test_a_raffle_is_closed_once_by_a_manager(client):
    raffle = client.new_raffle()
    assert_problem(client.close(raffle, "10.0.0.2", status=403))
    assert client.get(raffle).json["closed_at"] is None
    client.close(raffle)
    assert_problem(client.close(raffle, status=403), CLOSED)
    assert_problem(client.close(f"/raffles/{storage.uuid.uuid4()}/", status=404))


@pytest.mark.parametrize(("issued", "amounts"), [(5, [1, 2]), (3, [2, 4]), (1, [1, 1]), (0, [3])])
def test_a_closed_raffle_is_drawn_among_the_tickets_that_were_issued(client, issued, amounts):
    prizes = [{"name": f"Prize {n}", "amount": amount} for n, amount in enumerate(amounts)]
    raffle = client.new_raffle(2**53 - 1, prizes)
    numbers = participate(client, raffle, issued)
    assert_problem(client.draw(raffle, status=403), "Winners can't be drawn when tickets are still available")
    client.close(raffle)
    wins = client.draw(raffle).json
    names = [prize["name"] for prize in prizes for _ in range(prize["amount"])]
    assert [win["prize"] for win in wins] == names[:issued]
    assert len({win["ticket_number"] for win in wins}) == len(wins)
    assert {win["ticket_number"] for win in wins} <= set(numbers)
    assert client.get(f"{raffle}winners/").json == wins
    assert_holds(client, raffle)


def test_every_ticket_of_a_closed_raffle_wins_as_often(store):
    raffle_id = store.create_raffle("Fair", 100, ONE_PRIZE)["id"]
    for n in range(4):
        store.issue_ticket(raffle_id, n.to_bytes(4, "big"))
    store.close_raffle(raffle_id)
    numbers, _ = store.list_tickets(raffle_id, 10)
    winners = [next(draw.winning_numbers(raffle_id, bytes(32), str(n), numbers, 1)) for n in range(4000)]
    # Four cells of 1,000 expected: chi-squared with 3 degrees of freedom is above 30 once in 700,000 runs;
    # the inputs differ by the raffle's id.
    assert sum((winners.count(number) - 1000) ** 2 / 1000 for number in numbers) < 30


def test_a_close_and_participants_at_once_leave_every_ticket_listed_or_refused(serve):
    server = serve(MANAGER_IPS="127.0.0.1")
    raffle = server.create()
    join = [partial(server.request, "POST", f"{raffle}participate/", source=f"127.0.1.{n}") for n in range(1, 60)]
    *answers, first, second = at_once([*join, *[partial(server.request, "POST", f"{raffle}close/")] * 2])
    # Whoever comes second may finish what the first has begun.
    assert sorted([first[0], second[0]]) in ([200, 200], [200, 403])
    issued = sorted(ticket["ticket_number"] for status, _, ticket in answers if status == 201)
    assert {status for status, *_ in answers} <= {201, 410}
    body = server.request("GET", raffle)[2]
    assert server.request("GET", f"{raffle}tickets/")[2] == issued
    assert (body["issued_tickets"], body["tickets_sha256"]) == (len(issued), digest(issued))


@pytest.mark.parametrize("finish", ["close", "draw"])
@pytest.mark.parametrize("step", range(1, 4))
def test_a_close_that_was_interrupted_is_finished_by_a_repeated_close_or_by_the_draw(
    client, look, monkeypatch, step, finish
):
    monkeypatch.setattr(storage, "ROWS_PER_COMMIT", 5)
    raffle = client.new_raffle(total_tickets=50)
    numbers = participate(client, raffle, 10)
    store, steps = client.app.storage, []
    write = store._write_in_turn

    def interrupt(*arguments):
        steps.append(arguments)
        if len(steps) > step:
            raise storage.DatabaseUnavailable
        return write(*arguments)

    monkeypatch.setattr(store, "_write_in_turn", interrupt)
    client.close(raffle, status=503)
    monkeypatch.setattr(store, "_write_in_turn", write)
    body = client.get(raffle).json
    assert (body["available_tickets"], body["tickets_sha256"]) == (0, None)
    assert_problem(client.participate(raffle, "10.4.0.1", status=410), NO_TICKETS)
    (client.close if finish == "close" else client.draw)(raffle)
    assert client.get(raffle).json["tickets_sha256"] == digest(numbers)
    assert look("SELECT * FROM displaced") == []
    assert_problem(client.close(raffle, status=403), CLOSED)
    if finish == "close":
        client.draw(raffle)
    assert_holds(client, raffle)


def test_a_clock_that_is_put_back_does_not_spoil_a_close(client, monkeypatch):
    early, sold_out = client.new_raffle(), client.new_raffle()
    client.participate(early)
    monkeypatch.setattr(storage, "_now", lambda: "2000-01-01T00:00:00Z")
    client.close(early)
    client.sell_out(sold_out)
    for raffle in (early, sold_out):
        client.draw(raffle)
        assert_holds(client, raffle)


@pytest.mark.parametrize("zone", ["XST-14", "XST12"])
def test_all_times_are_in_utc(client, monkeypatch, zone):
    def utc():
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        before, raffle = utc(), client.new_raffle()
        ticket = client.participate(raffle).json
        client.close(raffle)
        client.draw(raffle)
        redeemed = client.redeem(raffle, ticket).json
        receipt = client.get(f"{raffle}draw/").json
        times = [before, receipt["created_at"], receipt["closed_at"], receipt["drawn_at"], redeemed["redeemed_at"]]
        assert [*times, utc()] == sorted([*times, utc()])
        assert_holds(client, raffle)
    time.tzset()


def test_a_close_is_logged_with_the_manager(client, caplog):
    raffle = client.new_raffle()
    caplog.clear()
    client.close(raffle)
    assert caplog.messages == [f"Raffle {raffle.split('/')[2]} closed by {MANAGER}"]


def test_a_raffle_with_a_source_is_drawn_with_public_randomness_only(client):
    body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE, "randomness_source": "drand {round} 7"}
    created = client.request_from(MANAGER, "POST", "/raffles/", body, 201).json
    raffle = f"/raffles/{created['id']}/"
    assert created["randomness_source"] == "drand {round} 7"
    assert_problem(client.draw(raffle, status=403), "Winners can't be drawn when tickets are still available")
    client.close(raffle)
    for headers in ({}, {"Content_Type": "application/json"}):
        refused = client.request_from(MANAGER, "POST", f"{raffle}winners/", status=400, **headers)
        assert_problem(
            refused, "This raffle can only be drawn with public_randomness from its announced source: drand {round} 7"
        )
    client.draw(raffle, body={"public_randomness": "x"})
    assert client.get(f"{raffle}draw/").json["randomness_source"] == "drand {round} 7"
    assert_holds(client, raffle)


@pytest.mark.parametrize("source", ["", " ", "x" * 1001, 7, True, ["x"], "\ud800"])
def test_a_source_is_text(client, source):
    body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE, "randomness_source": source}
    refused = client.request_from(MANAGER, "POST", "/raffles/", body, 400)
    assert_problem(refused, "randomness_source must be a string of 1 to 1000 characters, not blank")


def test_a_draw_with_a_query_draws_nothing(client):
    raffle = client.new_sold_out()
    for query in ("public_randomness=x", "x"):
        assert_problem(client.request_from(MANAGER, "POST", f"{raffle}winners/?{query}", status=400))
    assert client.get(raffle).json["winners_drawn"] is False


def test_a_raffle_that_was_closed_is_kept_over_a_restart(database):
    store = storage.Storage(database)
    raffle_id = store.create_raffle("Fair", 9, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, b"1234")
    closed = store.close_raffle(raffle_id)
    store.database.close()
    again = storage.Storage(database)
    with closing(again.database):
        assert again.get_raffle(raffle_id) == closed
