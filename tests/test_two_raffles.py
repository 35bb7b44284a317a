"""Two raffles in one database, played side by side, know nothing of each other."""

from helpers import assert_problem

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
        won = {win["ticket_number"]: win["prize"] for win in wins[name]}
        assert sorted(ticket["ticket_number"] for ticket in tickets[name].values()) == list(range(1, TICKETS + 1))
        for address, ticket in tickets[name].items():
            prize = won.get(ticket["ticket_number"])
            verdict = {"has_won": prize is not None, "prize": prize, "redeemed_at": None}
            assert client.verify(path, ticket).json == verdict
            assert client.participate(path, address, Idempotency_Key=key(name, address)).json == ticket
            foreign = client.participate(path, address, status=410, Idempotency_Key=key(other, address))
            assert_problem(foreign, "Tickets to this raffle are no longer available")
            # The number is in both raffles, the code in one.
            assert_problem(client.verify(paths[other], ticket, status=400), "Invalid verification code")
