import re
from datetime import datetime, timedelta, timezone

import pytest
from helpers import MANAGER, ONE_PRIZE, assert_problem

PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 3}, {"name": "Bicycle", "amount": 2}]


def test_a_manager_creates_a_raffle(client):
    response = client.create(total_tickets=10, prizes=PRIZES, name="Summer fair")
    created = response.json
    assert list(created) == [
        "id",
        "name",
        "total_tickets",
        "available_tickets",
        "issued_tickets",
        "winners_drawn",
        "created_at",
        "closed_at",
        "randomness_source",
        "draw_commitment",
        "tickets_sha256",
        "prizes",
    ]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", created["id"])
    assert created["name"] == "Summer fair"
    assert created["total_tickets"] == created["available_tickets"] == 10
    assert (created["issued_tickets"], created["winners_drawn"]) == (0, False)
    assert created["closed_at"] is created["randomness_source"] is created["tickets_sha256"] is None
    assert created["prizes"] == PRIZES
    created_at = datetime.strptime(created["created_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs(datetime.now(timezone.utc) - created_at) < timedelta(minutes=1)
    assert response.content_type == "application/json"
    assert response.headers["Location"] == f"/raffles/{created['id']}/"
    assert client.get(response.headers["Location"]).json == created


def test_only_a_manager_creates_a_raffle(client):
    response = client.request_from("10.0.0.2", "POST", "/raffles/", b"", status=403)
    assert_problem(response)
    assert client.get("/raffles/").json == []


def test_a_stranger_is_refused_before_the_body_is_looked_at(client):
    client.request_from("10.0.0.2", "POST", "/raffles/", b"{", status=403, Content_Type="text/plain")


@pytest.mark.parametrize("name", ["x", "x" * 200, " x ", "Größe 🎟", "a\0b", "'; DROP TABLE raffle; --", "\u200b"])
def test_a_name_comes_back_as_it_was_sent(client, name):
    raffle = client.create(name=name, prizes=[{"name": name, "amount": 1}]).json
    assert raffle["name"] == raffle["prizes"][0]["name"] == name
    assert client.get("/raffles/").json[0]["name"] == name


def test_members_that_are_not_known_are_ignored(client):
    prizes = [{"name": "Bicycle", "amount": 1, "colour": "red"}]
    body = {"name": "Fair", "total_tickets": 1, "prizes": prizes, "id": "mine", "winners_drawn": True}
    created = client.request_from(MANAGER, "POST", "/raffles/", body, status=201).json
    assert created["id"] != "mine"
    assert created["winners_drawn"] is False
    assert created["prizes"] == ONE_PRIZE


def test_there_may_be_as_many_prizes_as_tickets_and_no_more(client):
    client.create(total_tickets=3, prizes=[{"name": "a", "amount": 1}, {"name": "b", "amount": 2}])
    too_many = [{"name": "a", "amount": 2}, {"name": "b", "amount": 2}]
    assert_problem(client.create(total_tickets=3, prizes=too_many, status=400), "Too many prizes")


def test_a_raffle_may_have_as_many_tickets_as_a_client_can_count(client):
    most = 2**53 - 1
    raffle = client.new_raffle(total_tickets=most, prizes=[{"name": "a", "amount": most}])
    ticket = client.participate(raffle).json
    assert 1 <= ticket["ticket_number"] <= most
    assert client.get(raffle).json["available_tickets"] == most - 1


def test_a_raffle_may_have_ten_thousand_prizes(client):
    prizes = [{"name": f"Prize {n}", "amount": 1} for n in range(10_000)]
    assert client.create(total_tickets=10_000, prizes=prizes).json["prizes"] == prizes


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json;charset=utf-8", "application/json ; charset=utf-8", "Application/JSON"],
)
def test_the_content_type_may_have_parameters_in_any_spacing(client, content_type):
    body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}
    client.request_from(MANAGER, "POST", "/raffles/", body, status=201, Content_Type=content_type)
