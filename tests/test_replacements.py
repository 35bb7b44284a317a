"""A winner who cannot be found is replaced by the next ticket of the draw, on the record."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import partial
from itertools import permutations

import pytest
from helpers import FAULTS, MANAGER, NO_RAFFLE, ROOT, STRANGER, Client, at_once, query, refused

import draw
from raffle import create_app

PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 3}]
CLAIM = {"ticket_number": 1, "prize": "Bicycle", "reason": "unclaimed"}


def new_drawn(client, total_tickets=10, prizes=PRIZES):
    """Play a raffle up to its draw; return its path and its tickets in the order of the draw."""
    path, tickets = client.new_sold_out(total_tickets, prizes)
    client.draw(path, {"public_randomness": "round 7"})
    by_number = {ticket["ticket_number"]: ticket for ticket in tickets}
    return path, [by_number[number] for number in drawn_numbers(client.get(path).json)]


def drawn_numbers(body):
    """Return all numbers of a raffle in the order in which they are drawn."""
    issued = body["issued_tickets"]
    secret = bytes.fromhex(body["secret"])
    inputs = (body["public_randomness"], body["total_tickets"], issued, issued)
    return list(draw.winning_numbers(body["id"], secret, *inputs))


def check(client, path):
    """Check a draw and its replacements by what anyone can read, and return the wins."""
    wins = client.get(f"{path}winners/").json
    replacements = client.get(f"{path}replacements/").json
    results = draw.check_draw(client.get(path).json, wins, (), replacements)
    assert all(holds for _, holds in results), results
    return wins


def test_the_prize_goes_to_the_next_ticket_of_the_draw(client):
    path, drawn = new_drawn(client)
    numbers = [ticket["ticket_number"] for ticket in drawn]
    # The second one is of a ticket that is a replacement itself.
    for position, replaced, new, prize, reason in (
        (1, numbers[1], numbers[4], "Book", "unclaimed"),
        (1, numbers[4], numbers[5], "Book", "declined"),
        (0, numbers[0], numbers[6], "Bicycle", "ineligible"),
        (3, numbers[3], numbers[7], "Book", "unclaimed"),
    ):
        before = client.get(f"{path}winners/").json
        body = client.replace(path, replaced, prize, reason).json
        assert body == {
            "ticket_number": new,
            "prize": prize,
            "replaced_ticket_number": replaced,
            "reason": reason,
            "replaced_at": body["replaced_at"],
        }
        assert client.get(f"{path}replacements/").json[-1] == body
        before[position]["ticket_number"] = new
        assert check(client, path) == before
    assert client.get(path).json["replacements"] == 4
    assert client.get("/raffles/").json[0]["replacements"] == 4


def test_who_was_replaced_has_no_prize_and_the_new_winner_has(client):
    path, drawn = new_drawn(client)
    replaced, new = drawn[0], drawn[4]
    body = client.replace(path, replaced["ticket_number"], "Bicycle").json
    assert client.verify(path, replaced).json == {
        "has_won": False,
        "prize": None,
        "redeemed_at": None,
        "replaced_at": body["replaced_at"],
    }
    went_to = f"The prize of this ticket went to ticket {new['ticket_number']}"
    detail = f"{went_to} at {body['replaced_at']}"
    refused(client.redeem(path, replaced, 403), "no-prize", detail)
    refused(
        client.replace(path, replaced["ticket_number"], "Bicycle", status=403), "no-prize", detail
    )

    verdict = client.verify(path, new).json
    assert (verdict["has_won"], verdict["prize"], verdict["replaced_at"]) == (True, "Bicycle", None)
    assert client.redeem(path, new).json["prize"] == "Bicycle"
    refused(client.replace(path, new["ticket_number"], "Bicycle", status=403), "already-redeemed")


def test_replacements_end_with_the_last_ticket(client):
    path, drawn = new_drawn(client, 6)
    numbers = [ticket["ticket_number"] for ticket in drawn]
    client.replace(path, numbers[0], "Bicycle")
    client.replace(path, numbers[4], "Bicycle")
    detail = "Every ticket of the raffle has been drawn"
    refused(
        client.replace(path, numbers[5], "Bicycle", status=403), "no-tickets-left-to-draw", detail
    )
    check(client, path)
    # With fewer tickets than prizes, everyone has won.
    path, drawn = new_drawn(client, 4)
    number = drawn[0]["ticket_number"]
    refused(client.replace(path, number, "Bicycle", status=403), "no-tickets-left-to-draw")


def test_a_replacement_is_refused_by_the_first_rule_that_applies(client):
    path, drawn = new_drawn(client, 6)
    target = f"{path}replacements/"
    open_path = client.new_raffle()
    first = drawn[0]["ticket_number"]
    claim = {"ticket_number": first, "prize": "Bicycle", "reason": "unclaimed"}

    refused(client.send("POST", target, {}, 403, STRANGER), "not-a-manager")
    refused(client.send("POST", target, claim, 415, Content_Type="text/plain"), None)
    refused(client.send("POST", target, b" " * 4097, 413), None)
    refused(client.send("POST", f"{NO_RAFFLE}replacements/", {**claim, "more": 1}, 400), None)
    refused(client.send("POST", f"{NO_RAFFLE}replacements/", claim, 404), "no-such-raffle")
    refused(client.send("POST", f"{open_path}replacements/", claim, 400), "not-drawn")
    other = "This ticket has won another prize: Bicycle"
    refused(client.replace(path, first, "Book", status=403), "no-prize", other)
    has_none = "This ticket has not won a prize"
    for number in (drawn[5]["ticket_number"], 7, 2**53 - 1):
        refused(client.replace(path, number, "Bicycle", status=403), "no-prize", has_none)
    client.redeem(path, drawn[0])
    refused(client.replace(path, first, "Bicycle", status=403), "already-redeemed")
    assert client.get(target).json == []
    assert client.get(path).json["replacements"] == 0


def test_a_replacement_is_described_exactly(client):
    path, _ = new_drawn(client)
    target = f"{path}replacements/"
    for changes, part in (
        ({"ticket_number": 0}, "ticket_number must be an integer from 1"),
        ({"ticket_number": "1"}, "ticket_number must be an integer"),
        ({"ticket_number": None}, "ticket_number must be an integer"),
        ({"prize": ""}, "prize must be a non-blank string"),
        ({"prize": None}, "prize must be a non-blank string"),
        ({"reason": None}, "reason must be one of unclaimed, declined, ineligible"),
        ({"reason": "ill"}, "reason must be one of"),
        ({"reason": "Unclaimed"}, "reason must be one of"),
        ({"reason": ["unclaimed"]}, "reason must be one of"),
        ({"verification_code": "x"}, "not 'verification_code'"),
    ):
        response = client.send("POST", target, {**CLAIM, **changes}, 400)
        refused(response, None)
        assert part in response.json["detail"], changes
    assert client.get(target).json == []


def test_replacements_are_listed_in_pages_oldest_first(client):
    path, drawn = new_drawn(client)
    numbers = [ticket["ticket_number"] for ticket in drawn]
    assert client.get(f"{path}replacements/").json == []
    made = [client.replace(path, number, "Bicycle").json for number in (numbers[0], *numbers[4:8])]
    for limit, sizes in ((2, [2, 2, 1]), (5, [5]), (1, [1] * 5)):
        pages = client.pages(f"{path}replacements/?limit={limit}")
        assert [len(page) for page in pages] == sizes
        assert [item for page in pages for item in page] == made
    refused(client.get(f"{path}replacements/?limit=0", status=400), "invalid-page")
    refused(client.get(f"{NO_RAFFLE}replacements/?limit=0", status=404), "no-such-raffle")


def test_times_of_replacements_are_in_order_even_if_the_clock_is_put_back(client, monkeypatch):
    path, drawn = new_drawn(client)
    for time, expected in (
        ("2999-01-02T00:00:00Z", "2999-01-02T00:00:00Z"),
        ("2999-01-01T00:00:00Z", "2999-01-02T00:00:00Z"),
        ("2999-01-03T00:00:00Z", "2999-01-03T00:00:00Z"),
    ):
        monkeypatch.setattr("storage.now", lambda time=time: time)
        number = client.get(f"{path}winners/").json[0]["ticket_number"]
        assert client.replace(path, number, "Bicycle").json["replaced_at"] == expected
    path, drawn = new_drawn(client)
    monkeypatch.setattr("storage.now", lambda: "2026-01-01T00:00:00Z")
    replaced_at = client.replace(path, drawn[0]["ticket_number"], "Bicycle").json["replaced_at"]
    assert replaced_at == client.get(path).json["drawn_at"]


def test_replacements_at_once_skip_nobody(serve, database):
    """For one winner and for several, on two servers on one file."""
    servers = [serve(), serve()]
    prizes = [{"name": "Pen", "amount": 6}]
    path, _ = servers[0].create_sold_out(30, prizes)
    assert servers[0].request("POST", f"{path}winners/", {"public_randomness": "7"})[0] == 201
    numbers = drawn_numbers(servers[0].request("GET", path)[2])

    def replace(server, number):
        body = {"ticket_number": number, "prize": "Pen", "reason": "declined"}
        return server.request("POST", f"{path}replacements/", body)

    same = [partial(replace, server, numbers[0]) for server in servers * 3]
    others = [partial(replace, servers[n % 2], numbers[n]) for n in range(1, 6)]
    answers = at_once(same + others)
    statuses = [status for status, _, _ in answers]
    assert (sorted(statuses[:6]), statuses[6:]) == ([201] + [403] * 5, [201] * 5)

    listed = servers[1].request("GET", f"{path}replacements/")[2]
    assert [item["ticket_number"] for item in listed] == numbers[6:12]
    assert sorted(item["replaced_ticket_number"] for item in listed) == sorted(numbers[:6])
    wins = servers[0].list_wins(path)
    results = draw.check_draw(servers[0].request("GET", path)[2], wins, (), listed)
    assert all(holds for _, holds in results), results


def test_a_redemption_or_a_replacement_wins_the_race_not_both(client):
    for _ in range(10):
        path, drawn = new_drawn(client)
        number = drawn[0]["ticket_number"]
        redeem = partial(client.redeem, path, drawn[0], "*")
        replace = partial(client.replace, path, number, "Bicycle", status="*")
        redeemed, replaced = at_once([redeem, replace])
        assert sorted([redeemed.status_int, replaced.status_int]) == [201, 403]
        if redeemed.status_int == 403:
            refused(redeemed, "no-prize")
        else:
            refused(replaced, "already-redeemed")
        check(client, path)


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE win", "INSERT INTO replacement", "COMMIT"])
def test_a_kill_in_a_replacement_leaves_all_or_nothing(serve, database, statement):
    server = serve(program=(FAULTS, "kill_in_replacement", statement), processes=1)
    path, _ = server.create_sold_out(9, PRIZES)
    assert server.request("POST", f"{path}winners/", {"public_randomness": "7"})[0] == 201
    numbers = drawn_numbers(server.request("GET", path)[2])
    body = {"ticket_number": numbers[0], "prize": "Bicycle", "reason": "unclaimed"}
    with pytest.raises(OSError):
        server.request("POST", f"{path}replacements/", body)
    server.process.wait(30)
    assert query(database, "SELECT count(*) FROM replacement") == [(0,)]

    server = serve()
    status, _, made = server.request("POST", f"{path}replacements/", body)
    assert (status, made["ticket_number"]) == (201, numbers[4])
    listed = server.request("GET", f"{path}replacements/")[2]
    results = draw.check_draw(server.request("GET", path)[2], server.list_wins(path), (), listed)
    assert listed == [made]
    assert all(holds for _, holds in results), results


def test_a_draw_that_goes_on_computes_only_what_is_missing(client, database, monkeypatch):
    monkeypatch.setattr("storage.WINS_PER_COMMIT", 2)
    path, _ = new_drawn(client, 9, [{"name": "Pen", "amount": 7}])
    wins = client.get(f"{path}winners/").json
    with closing(sqlite3.connect(database)) as other, other:
        other.execute("DELETE FROM win WHERE position IN (3, 7)")
        other.execute("UPDATE raffle SET drawn_at = NULL, address_key = zeroblob(32)")
    places = []

    def number_at(deal_key, total_tickets, place):
        places.append(place)
        return original(deal_key, total_tickets, place)

    original = draw.number_at
    monkeypatch.setattr(draw, "number_at", number_at)
    refused(client.draw(path, status=403), "already-drawn")
    # Those of the commits that lack one: positions 3, 4 and 7.
    assert len(places) == 3
    assert client.get(f"{path}winners/").json == wins


# The check


@pytest.fixture
def replaced(client):
    """The raffle, the wins and the replacements of a draw in which four winners were replaced."""
    path, _ = new_drawn(client, 40)
    for position in (1, 1, 3, 0):
        win = client.get(f"{path}winners/").json[position]
        client.replace(path, win["ticket_number"], win["prize"])
    return [client.get(each).json for each in (path, f"{path}winners/", f"{path}replacements/")]


FOLLOW = "The wins follow from the secret, the randomness and issued_tickets"


def run_check(directory, *answers):
    """Run draw.py on answers that were saved; return its exit status and its lines."""
    names = []
    for number, answer in enumerate(answers):
        names.append(str(directory / str(number)))
        (directory / str(number)).write_text(json.dumps(answer))
    done = subprocess.run(
        [sys.executable, ROOT / "draw.py", *names], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_check_follows_the_replacements_in_any_order_of_files(replaced, tmp_path):
    body, wins, replacements = replaced
    for answers in (
        [body, wins, replacements],
        [body, replacements, wins],
        [body, wins[:2], replacements[2:], wins[2:], replacements[:2]],
    ):
        status, lines = run_check(tmp_path, *answers)
        assert (status, lines[2]) == (0, f"holds  {FOLLOW}")
        assert any("was the manager's decision" in line for line in lines)


def test_the_check_finds_a_replacement_that_does_not_follow(replaced, tmp_path):
    body, wins, replacements = replaced
    first, *others, last = replacements
    unused = next(n for n in range(1, 41) if n not in drawn_numbers(body)[:8])
    for changed in (
        [first, *others, {**last, "prize": "Book"}],
        [first, *others, {**last, "ticket_number": unused}],
        [first, *others, {**last, "replaced_ticket_number": unused}],
        [first, *others, {**last, "replaced_ticket_number": first["replaced_ticket_number"]}],
    ):
        status, lines = run_check(tmp_path, body, wins, changed)
        assert (status, lines[2]) == (1, f"FAILS  {FOLLOW}"), changed
    swapped = [{**wins[0], "ticket_number": replacements[0]["replaced_ticket_number"]}, *wins[1:]]
    assert run_check(tmp_path, body, swapped, replacements)[0] == 1


def test_the_check_does_not_accuse_over_answers_of_different_times(client, tmp_path):
    path, _ = new_drawn(client, 40)
    saved = []
    for position in (0, 1, 1):
        answers = [
            client.get(each).json for each in (path, f"{path}winners/", f"{path}replacements/")
        ]
        saved.append(answers)
        win = answers[1][position]
        client.replace(path, win["ticket_number"], win["prize"])
    for (body, _, replacements), (_, wins, _) in permutations(saved, 2):
        status, lines = run_check(tmp_path, body, wins, replacements)
        assert (status, len(lines)) == (1, 1)
        assert lines[0].startswith("NOT CHECKED  winners and replacements were read at different")


def test_the_check_reads_all_wins_before_it_computes_replacements(replaced, tmp_path):
    """What a server says may be endless: it would be computed for hours."""
    body, _, replacements = replaced
    many = {"issued_tickets": 10**15, "total_tickets": 10**15}
    prizes = [{"name": "Pen", "amount": 10**14}]
    status, lines = run_check(tmp_path, {**body, **many, "prizes": prizes}, [], replacements)
    assert (status, lines) == (
        1,
        [f"NOT CHECKED  only 0 of {10**14} wins were read: all pages are needed"],
    )


def test_the_check_does_not_accuse_where_it_lacks_replacements(replaced, tmp_path):
    body, wins, replacements = replaced
    for listed in ([], replacements[:3], [*replacements, replacements[0]]):
        status, lines = run_check(tmp_path, body, wins, listed)
        assert (status, len(lines)) == (1, 1)
        assert lines[0].startswith("NOT CHECKED  ")
        assert "replacements" in lines[0]
    malformed = [*replacements[:3], {**replacements[3], "replaced_ticket_number": "1"}]
    assert run_check(tmp_path, body, wins, malformed)[1][0].startswith("NOT CHECKED")


def test_the_check_reads_again_if_a_winner_is_replaced_meanwhile(serve, tmp_path):
    """The server replaces a winner after the raffle was read for the first time."""
    server = serve(program=(FAULTS, "replace_while_read"))
    path, _ = server.create_sold_out(20, PRIZES)
    assert server.request("POST", f"{path}winners/", {"public_randomness": "7"})[0] == 201
    address = f"http://127.0.0.1:{server.port}{path}"
    done = subprocess.run(
        [sys.executable, ROOT / "draw.py", address], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"holds  {FOLLOW}" in done.stdout
    assert server.request("GET", path)[2]["replacements"] == 1


def test_a_raffle_without_tickets_can_be_deleted(database):
    with closing(create_app(database, MANAGER)) as app:
        client = Client(app)
        path, other = client.new_raffle(), client.new_raffle()
        refused(client.delete_raffle(path, 403, STRANGER), "not-a-manager")
        response = client.delete_raffle(path)
        assert (response.body, "Content-Type" in response.headers) == (b"", False)
        for response in (
            client.get(path, status=404),
            client.participate(path, status=404),
            client.delete_raffle(path, 404),
            client.delete_raffle(NO_RAFFLE, 404),
        ):
            refused(response, "no-such-raffle")
        assert len(client.get("/raffles/").json) == 1

        client.participate(other)
        detail = "Tickets of the raffle have been issued, so it cannot be deleted"
        refused(client.delete_raffle(other, 403), "has-participants", detail)
        client.get(other)

        # Its place in the list is not given to another, even if it was the latest.
        latest = client.new_raffle()
        client.close(latest)
        client.draw(latest)
        client.delete_raffle(latest)
        client.new_raffle()
    assert query(database, "SELECT sequence FROM raffle ORDER BY sequence") == [(2,), (4,)]
    assert query(database, "SELECT raffle FROM prize ORDER BY raffle") == [(2,), (4,)]


def test_a_deletion_and_a_ticket_at_once_leave_one_of_them(client):
    for _ in range(10):
        path = client.new_raffle()
        delete = partial(client.delete_raffle, path, "*")
        participate = partial(client.participate, path, status="*")
        deleted, ticket = at_once([delete, participate])
        outcome = (deleted.status_int, ticket.status_int)
        assert outcome in ((204, 404), (403, 201))
        assert client.get(path, status="*").status_int == (404 if outcome == (204, 404) else 200)
