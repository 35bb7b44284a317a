import uuid

import pytest
from helpers import all_pages, assert_problem


def test_raffles_are_listed_latest_first_without_their_prizes(client):
    created = [client.create(name=name).json for name in ("first", "second", "third")]
    for raffle in created:
        del raffle["prizes"]
    response = client.get("/raffles/")
    assert response.json == created[::-1]
    assert "Link" not in response.headers


def test_no_raffles_are_an_empty_list(client):
    assert client.get("/raffles/").json == []


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (4, [4, 1]), (5, [5]), (1000, [5])])
def test_pages_of_raffles_follow_one_another_without_gaps(client, limit, sizes):
    ids = [client.create().json["id"] for _ in range(5)]
    pages = client.pages(f"/raffles/?limit={limit}")
    assert [len(page) for page in pages] == sizes
    assert [raffle["id"] for page in pages for raffle in page] == ids[::-1]


def test_a_page_has_at_most_a_thousand_raffles(client):
    ids = [client.create().json["id"] for _ in range(1001)]
    pages = client.pages("/raffles/")
    assert [len(page) for page in pages] == [1000, 1]
    assert [raffle["id"] for page in pages for raffle in page] == ids[::-1]


def test_a_cursor_stays_right_while_raffles_are_added(client):
    ids = [client.create().json["id"] for _ in range(4)]
    listed = []
    for page in all_pages(client.page, "/raffles/?limit=2"):
        listed += page
        client.create()
    assert [raffle["id"] for raffle in listed] == ids[::-1]


@pytest.mark.parametrize("longest", [1000, 10_000])
def test_a_limit_goes_from_one_to_the_longest_page(client, longest):
    path = "/raffles/" if longest == 1000 else f"{client.new_raffle()}winners/"
    client.get(f"{path}?limit=1")
    client.get(f"{path}?limit={longest}")
    client.get(f"{path}?cursor=1")
    for limit in ("0", "-1", f"{longest + 1}", "", "x", "1.0", "1e2", "+1", "01", "%201", "٣", "1٣", "%00", "9" * 5000):
        refused = client.get(f"{path}?limit={limit}", status=400)
        assert_problem(refused, f"limit must be an integer from 1 to {longest}")
    for query in ("limit=1&limit=1", "limit=1&limit=x", "limit=x&limit=1", "cursor=1&cursor=1"):
        assert_problem(client.get(f"{path}?{query}", status=400))
    for cursor in ("0", "-1", "", "x", "1.5", "9" * 30, "%FF"):
        assert_problem(client.get(f"{path}?cursor={cursor}", status=400), "cursor must be one from a Link header")


def test_an_unknown_raffle_is_refused_before_a_bad_limit(client):
    client.get(f"/raffles/{uuid.uuid4()}/winners/?limit=0", status=404)


def test_a_raffle_says_how_many_tickets_are_left_and_whether_winners_are_drawn(client):
    raffle = client.new_raffle(total_tickets=2)
    client.participate(raffle, "10.1.0.1")
    assert client.get(raffle).json["available_tickets"] == 1
    client.participate(raffle, "10.1.0.2")
    assert client.get(raffle).json["available_tickets"] == 0
    assert client.get(raffle).json["winners_drawn"] is False
    client.draw(raffle)
    assert client.get(raffle).json["winners_drawn"] is True
    assert client.get("/raffles/").json[0]["winners_drawn"] is True


@pytest.mark.parametrize("path", ["", "participate/", "winners/", "verify-ticket/"])
def test_a_raffle_that_does_not_exist_is_not_found(client, path):
    method = {"": "GET", "winners/": "GET"}.get(path, "POST")
    ticket = {"ticket_number": 1, "verification_code": "x"}
    response = client.request_from("10.1.0.1", method, f"/raffles/{uuid.uuid4()}/{path}", ticket, status=404)
    assert_problem(response, "There is no raffle with this id")


def test_a_path_without_its_last_slash_is_served_as_if_it_had_it(client):
    raffle = client.new_raffle(total_tickets=1)
    ticket = client.request_from("10.1.0.1", "POST", f"{raffle}participate", status=201).json
    assert client.get(raffle[:-1]).json == client.get(raffle).json
    assert client.get("/raffles").json == client.get("/raffles/").json
    wins = client.request_from("10.0.0.1", "POST", f"{raffle}winners", status=201).json
    assert client.get(f"{raffle}winners").json == wins
    assert client.request_from("10.1.0.1", "POST", f"{raffle}verify-ticket", ticket, status=200).json["has_won"]


def test_head_works_wherever_get_does(client):
    raffle = client.new_raffle()
    for path in ("/raffles/", raffle, f"{raffle}winners/"):
        response = client.head(path)
        assert response.body == b""
        assert response.headers["Content-Length"] == client.get(path).headers["Content-Length"]
