"""A prize is redeemed once, with the ticket that won it."""

import signal
from functools import partial

import pytest
from helpers import assert_problem, at_once

import storage

PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 1}]


@pytest.fixture
def raffle(client):
    return client.new_raffle(3, PRIZES)


@pytest.fixture
def tickets(client, raffle):
    """The tickets of a raffle that has been drawn: those that won in the order of the prizes, and the one that did not."""
    tickets = {ticket["ticket_number"]: ticket for ticket in client.sell_out(raffle)}
    wins = [win["ticket_number"] for win in client.draw(raffle).json]
    [lost] = set(tickets) - set(wins)
    return [tickets[number] for number in (*wins, lost)]


def test_a_prize_is_redeemed_once(client, raffle, tickets, monkeypatch):
    receipt = client.get(f"{raffle}draw/").json
    monkeypatch.setattr(storage, "_now", lambda: "2026-07-04T18:00:00Z")
    won, other, _ = tickets
    redeemed = client.redeem(raffle, won).json
    number = won["ticket_number"]
    assert redeemed == {"ticket_number": number, "prize": "Bicycle", "redeemed_at": "2026-07-04T18:00:00Z"}
    monkeypatch.setattr(storage, "_now", lambda: "2026-07-05T18:00:00Z")
    refusal = "The prize of this ticket was already redeemed at 2026-07-04T18:00:00Z"
    for _ in range(2):
        assert_problem(client.redeem(raffle, won, status=403), refusal)
    assert client.verify(raffle, won).json == {
        "has_won": True,
        "prize": "Bicycle",
        "redeemed_at": "2026-07-04T18:00:00Z",
    }
    assert client.verify(raffle, other).json == {"has_won": True, "prize": "Book", "redeemed_at": None}
    listed = [(win["ticket_number"], win["redeemed_at"]) for win in client.get(f"{raffle}winners/").json]
    assert listed == [(number, "2026-07-04T18:00:00Z"), (other["ticket_number"], None)]
    assert client.get(f"{raffle}draw/").json == receipt


def test_a_prize_is_redeemed_with_a_ticket_that_won_only(client, raffle, tickets):
    won, _, lost = tickets
    assert_problem(client.redeem(raffle, lost, status=403), "This ticket has not won a prize")
    wrong = {**won, "verification_code": lost["verification_code"]}
    assert_problem(client.redeem(raffle, wrong, status=400), "Invalid verification code")
    assert_problem(client.redeem(raffle, {**won, "ticket_number": 4}, status=400), "Invalid verification code")
    assert_problem(
        client.redeem(raffle, won, status=403, address="10.0.0.2"), "Your ip address 10.0.0.2 is not a manager's"
    )
    for body in ({}, {**won, "ticket_number": 0}, {**won, "verification_code": 7}, b"x"):
        assert_problem(client.redeem(raffle, body, status=400))
    assert_problem(client.redeem(raffle, b"x" * 4097, status=413))
    assert client.verify(raffle, won).json["redeemed_at"] is None


def test_no_prize_is_redeemed_before_the_draw_or_of_another_raffle(client, raffle, tickets):
    other = client.new_raffle(1)
    ticket = client.participate(other).json
    assert_problem(client.redeem(other, ticket, status=400), "Winners for the raffle have not been drawn yet")
    client.draw(other)
    assert_problem(client.redeem(other, tickets[0], status=400), "Invalid verification code")
    client.redeem(other, ticket)
    # Ticket 1 of the one raffle is not ticket 1 of the other.
    assert {client.verify(raffle, ticket).json["redeemed_at"] for ticket in tickets} == {None}
    assert_problem(client.redeem(f"/raffles/{storage.uuid.uuid4()}/", ticket, status=404))


def test_of_requests_at_once_exactly_one_redeems(serve):
    server = serve(MANAGER_IPS="127.0.0.1")
    raffle = server.create(1)
    _, _, ticket = server.request("POST", f"{raffle}participate/")
    server.request("POST", f"{raffle}winners/")
    answers = at_once([partial(server.request, "POST", f"{raffle}redeem/", ticket)] * 24)
    [redeemed] = [body for status, _, body in answers if status == 201]
    refusals = {body["detail"] for status, _, body in answers if status == 403}
    assert refusals == {f"The prize of this ticket was already redeemed at {redeemed['redeemed_at']}"}


def test_a_redemption_that_was_answered_survives_a_kill(serve, database):
    server = serve(MANAGER_IPS="127.0.0.1")
    raffle = server.create(1)
    _, _, ticket = server.request("POST", f"{raffle}participate/")
    server.request("POST", f"{raffle}winners/")
    assert server.request("POST", f"{raffle}redeem/", ticket)[0] == 201
    server.stop(signal.SIGKILL)
    assert serve(MANAGER_IPS="127.0.0.1").request("POST", f"{raffle}redeem/", ticket)[0] == 403


def test_a_redemption_is_logged_with_the_manager_and_without_the_code(client, raffle, tickets, caplog):
    caplog.clear()
    client.redeem(raffle, tickets[0])
    number, raffle_id = tickets[0]["ticket_number"], tickets[0]["raffle_id"]
    assert caplog.messages == [f"The prize of ticket {number} of raffle {raffle_id} redeemed by 10.0.0.1"]
