"""Two raffles in one database, played side by side, know nothing of each other."""

from contextlib import contextmanager
from itertools import count

from helpers import MANAGER, assert_problem

import storage
from draw import check_draw

TICKETS = 6
PRIZES = {
    "Spring fair": [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 2}],
    "Summer fair": [{"name": "Pen", "amount": 2}, {"name": "Kite", "amount": 1}, {"name": "Book", "amount": 1}],
}
ADDRESSES = [f"10.2.0.{n}" for n in range(1, TICKETS + 1)]


def key(name, address):
    return f"{name}, {address}".replace(" ", "_").ljust(16, "_")


DRAWN = {"available_tickets": 0, "issued_tickets": TICKETS, "winners_drawn": True}


def test_two_raffles_in_one_database_are_kept_apart(client):
    created = {name: client.create(TICKETS, prizes, name).json for name, prizes in PRIZES.items()}
    paths = {name: f"/raffles/{raffle['id']}/" for name, raffle in created.items()}
    tickets = {name: {} for name in PRIZES}
    for address in ADDRESSES:
        for name, path in paths.items():
            ticket = client.participate(path, address, Idempotency_Key=key(name, address)).json
            assert ticket["raffle_id"] == created[name]["id"]
            tickets[name][address] = ticket
    wins, receipts = {}, {}
    for name, path in paths.items():
        before = {other: client.get(paths[other]).json for other in paths}
        drawn = client.draw(path, body={"public_randomness": name})
        wins[name] = drawn.json
        after = {other: client.get(paths[other]).json for other in paths}
        assert after == {**before, name: {**created[name], **DRAWN, "closed_at": after[name]["closed_at"]}}
        created[name] = after[name]

    for name, path in paths.items():
        assert created[name]["name"] == name
        assert created[name]["prizes"] == PRIZES[name]
        prizes = [prize["name"] for prize in PRIZES[name] for _ in range(prize["amount"])]
        assert [win["prize"] for win in wins[name]] == prizes
        assert len({win["ticket_number"] for win in wins[name]}) == len(prizes)
        assert client.get(f"{path}winners/").json == wins[name]
        assert client.pages(f"{path}winners/?limit=1") == [[win] for win in wins[name]]
        receipts[name] = client.get(f"{path}draw/").json
        assert receipts[name]["raffle_id"] == created[name]["id"]
        assert all(holds for _, holds in check_draw(receipts[name], wins[name]))
        assert receipts[name]["public_randomness"] == name
        for member in ("total_tickets", "prizes", "draw_commitment"):
            assert receipts[name][member] == created[name][member]
    for member in ("draw_commitment", "secret", "wins_sha256"):
        assert len({receipt[member] for receipt in receipts.values()}) == 2

    listed = [{**created[name]} for name in reversed(list(PRIZES))]
    for raffle in listed:
        del raffle["prizes"]
    assert client.get("/raffles/").json == listed
    assert client.pages("/raffles/?limit=1") == [[raffle] for raffle in listed]

    for name, path in paths.items():
        [other] = set(PRIZES) - {name}
        won = {win["ticket_number"] for win in wins[name]}
        assert sorted(ticket["ticket_number"] for ticket in tickets[name].values()) == list(range(1, TICKETS + 1))
        for address, ticket in tickets[name].items():
            assert client.verify(path, ticket).json["has_won"] == (ticket["ticket_number"] in won)
            foreign = client.participate(path, address, status=410, Idempotency_Key=key(other, address))
            assert_problem(foreign, "Tickets to this raffle are no longer available")


# Sold and total of raffles 1 to 4. The numbers of the small ones are in the large ones, too, but not the other way
# round; and each kind comes both before and after the other.
SIZES = {1: (2, 3), 2: (5, 6), 3: (2, 3), 4: (5, 6)}
KEY = "the_same_in_every_raffle"
TABLES = {"raffle": "sequence", "prize": "raffle", "displaced": "raffle", "ticket": "raffle", "win": "raffle"}


def test_what_is_done_to_one_raffle_leaves_the_others_as_they_are(client, look, monkeypatch):
    clock = count()
    monkeypatch.setattr(storage, "_now", lambda: "2026-07-04T18:{:02}:{:02}Z".format(*divmod(next(clock), 60)))

    def stored(n):
        return [look(f"SELECT * FROM {table} WHERE {column} = {n} ORDER BY 1, 2") for table, column in TABLES.items()]

    @contextmanager
    def nothing_but(n):
        before = {other: stored(other) for other in SIZES}
        yield
        assert [other for other in SIZES if stored(other) != before[other]] == [n]

    prizes = {n: [{"name": f"{i} of {n}", "amount": 1} for i in range(total)] for n, (_, total) in SIZES.items()}
    paths, tickets = {}, {n: [] for n in SIZES}
    for n, (_, total) in SIZES.items():
        with nothing_but(n):
            paths[n] = client.new_raffle(total, prizes[n])
    for buyer in range(5):
        for n, (sold, _) in SIZES.items():
            if buyer < sold:
                with nothing_but(n):
                    ticket = client.participate(paths[n], ADDRESSES[buyer], Idempotency_Key=KEY).json
                tickets[n].append(ticket)
    for act in (client.close, client.draw):
        for n in (2, 3, 1, 4):
            with nothing_but(n):
                act(paths[n])
    wins = {n: client.get(f"{paths[n]}winners/").json for n in SIZES}
    for n in SIZES:
        numbers = sorted(ticket["ticket_number"] for ticket in tickets[n])
        assert client.get(f"{paths[n]}tickets/").json == numbers
        assert sorted(win["ticket_number"] for win in wins[n]) == numbers
        assert [win["prize"] for win in wins[n]] == [prize["name"] for prize in prizes[n][: len(numbers)]]
        assert client.get(paths[n]).json["prizes"] == prizes[n]
        receipt = client.get(f"{paths[n]}draw/").json
        assert all(holds for _, holds in check_draw(receipt, wins[n], numbers, [client.get(paths[n]).json]))

    for n in (3, 2, 4, 1):
        for address, ticket in zip(ADDRESSES, tickets[n]):
            repeated = client.participate(paths[n], address, Idempotency_Key=KEY)
            assert repeated.json == ticket
            for other in set(SIZES) - {n}:
                for path in ("verify-ticket", "redeem"):
                    refused = client.request_from(MANAGER, "POST", f"{paths[other]}{path}/", ticket, status=400)
                    assert_problem(refused, "Invalid verification code")
            [prize] = [win["prize"] for win in wins[n] if win["ticket_number"] == ticket["ticket_number"]]
            assert client.verify(paths[n], ticket).json == {"has_won": True, "prize": prize, "redeemed_at": None}
            with nothing_but(n):
                redeemed = client.redeem(paths[n], ticket).json
            assert redeemed["prize"] == prize
            refusal = f"The prize of this ticket was already redeemed at {redeemed['redeemed_at']}"
            assert_problem(client.redeem(paths[n], ticket, status=403), refusal)
            verdict = {"ticket_number": ticket["ticket_number"], **client.verify(paths[n], ticket).json}
            assert verdict == {"has_won": True, **redeemed}
