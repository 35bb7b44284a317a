import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import assert_problem


def test_a_participant_gets_a_ticket(client):
    created = client.create(total_tickets=3).json
    response = client.participate(f"/raffles/{created['id']}/")
    ticket = response.json
    assert list(ticket) == ["raffle_id", "ticket_number", "verification_code"]
    assert ticket["raffle_id"] == created["id"]
    assert ticket["ticket_number"] in (1, 2, 3)
    assert re.fullmatch(r"([0-9A-HJKMNP-TV-Z]{4}-){5}[0-9A-HJKMNP-TV-Z]{4}", ticket["verification_code"])
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_the_numbers_are_exactly_one_to_the_total(client, total):
    tickets = client.sell_out(client.new_raffle(total_tickets=total))
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, total + 1))
    assert len({ticket["verification_code"] for ticket in tickets}) == total


def test_the_numbers_are_not_given_out_in_sequence(client):
    numbers = [ticket["ticket_number"] for ticket in client.sell_out(client.new_raffle(total_tickets=100))]
    assert numbers != sorted(numbers)
    assert numbers != sorted(numbers, reverse=True)


def test_an_address_joins_a_raffle_only_once(client):
    raffle = client.new_raffle()
    client.participate(raffle)
    response = client.participate(raffle, status=403)
    assert_problem(response, "Your ip address has already participated in this raffle")
    assert client.get(raffle).json["available_tickets"] == 2


def test_an_address_may_join_every_raffle(client):
    for _ in range(3):
        client.participate(client.new_raffle())


def test_a_manager_may_participate(client):
    client.participate(client.new_raffle(), "10.0.0.1")


def test_a_sold_out_raffle_is_gone_for_everybody(client):
    raffle = client.new_raffle(total_tickets=1)
    client.participate(raffle, "10.1.0.1")
    for address in ("10.1.0.1", "10.1.0.2"):
        response = client.participate(raffle, address, status=410)
        assert_problem(response, "Tickets to this raffle are no longer available")


def test_no_body_is_needed_and_any_is_ignored(client):
    raffle = client.new_raffle()
    client.request_from("10.1.0.1", "POST", f"{raffle}participate/", b"{", status=201, Content_Type="text/plain")


def test_many_at_once_get_every_number_once(client):
    raffle = client.new_raffle(total_tickets=150)
    addresses = [f"10.3.0.{n % 200}" for n in range(400)]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda address: client.participate(raffle, address, status="*"), addresses))
    tickets = [response.json["ticket_number"] for response in responses if response.status_int == 201]
    assert sorted(tickets) == list(range(1, 151))
    assert {response.status_int for response in responses} <= {201, 403, 410}
