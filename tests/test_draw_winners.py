import pytest
from helpers import assert_problem

PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 3}, {"name": "Bicycle", "amount": 1}]
WON = ["Bicycle", "Book", "Book", "Book", "Bicycle"]


def test_the_wins_are_in_the_order_of_the_prizes_and_each_ticket_wins_once(client):
    raffle = client.new_raffle(total_tickets=8, prizes=PRIZES)
    assert client.get(f"{raffle}winners/").json == []
    client.sell_out(raffle)
    assert client.get(f"{raffle}winners/").json == []
    response = client.draw(raffle)
    assert [win["prize"] for win in response.json] == WON
    assert [list(win) for win in response.json] == [["ticket_number", "prize", "redeemed_at"]] * 5
    numbers = {win["ticket_number"] for win in response.json}
    assert len(numbers) == 5
    assert numbers <= set(range(1, 9))
    assert client.get(f"{raffle}winners/").json == response.json
    assert "Link" not in response.headers


def test_every_ticket_wins_if_there_are_as_many_prizes(client):
    raffle = client.new_sold_out(total_tickets=5, prizes=PRIZES)
    assert sorted(win["ticket_number"] for win in client.draw(raffle).json) == [1, 2, 3, 4, 5]


def test_only_a_manager_draws_the_winners(client):
    raffle = client.new_sold_out(total_tickets=1)
    assert_problem(client.draw(raffle, "10.0.0.2", status=403))
    assert client.get(raffle).json["winners_drawn"] is False
    client.draw("/raffles/unknown/", "10.0.0.2", status=403)


def test_winners_are_drawn_only_once(client):
    raffle = client.new_sold_out(total_tickets=2)
    wins = client.draw(raffle).json
    assert_problem(client.draw(raffle, status=403), "Winners for the raffle have already been drawn")
    assert client.get(f"{raffle}winners/").json == wins


def test_winners_are_not_drawn_while_tickets_are_available(client):
    raffle = client.new_raffle(total_tickets=2)
    client.participate(raffle)
    detail = "Winners can't be drawn when tickets are still available"
    assert_problem(client.draw(raffle, status=403), detail)
    assert client.get(f"{raffle}winners/").json == []


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5])])
def test_pages_of_wins_follow_one_another_without_gaps(client, limit, sizes):
    raffle = client.new_sold_out(total_tickets=8, prizes=PRIZES)
    wins = client.draw(raffle).json
    pages = client.pages(f"{raffle}winners/?limit={limit}")
    assert [len(page) for page in pages] == sizes
    assert [win for page in pages for win in page] == wins


def test_the_draw_answers_with_its_first_page_and_a_link_to_the_next(client, monkeypatch):
    monkeypatch.setattr("storage.MAX_WINS_PER_PAGE", 3)
    raffle = client.new_sold_out(total_tickets=5, prizes=PRIZES)
    response = client.draw(raffle)
    assert response.headers["Link"] == f'<{raffle}winners/?cursor=3>; rel="next"'
    pages = client.pages(f"{raffle}winners/")
    assert pages[0] == response.json
    assert [len(page) for page in pages] == [3, 2]
