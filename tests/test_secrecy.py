import logging

import pytest
from helpers import assert_problem, spellings


def test_neither_the_database_nor_its_wal_nor_the_log_holds_a_code(serve, tmp_path):
    server = serve()
    prizes = [{"name": "Penny-farthing", "amount": 2}]
    raffle = server.create(20, prizes)
    tickets = [server.request("POST", f"{raffle}participate/", source=f"127.0.3.{n}")[2] for n in range(1, 21)]
    server.request("POST", f"{raffle}winners/")
    for ticket in tickets:
        assert server.request("POST", f"{raffle}verify-ticket/", ticket)[0] == 200
        wrong = {**ticket, "ticket_number": ticket["ticket_number"] % 20 + 1}
        assert server.request("POST", f"{raffle}verify-ticket/", wrong)[0] == 400
    wal = tmp_path.joinpath("raffle.db-wal").read_bytes()
    assert server.stop() == 0
    assert {file.name for file in tmp_path.iterdir()} == {"raffle.db", "log"}
    database, log = tmp_path.joinpath("raffle.db").read_bytes(), server.log.read_bytes()
    # The search finds what is there: the address of a participant, the name of a prize, a line of the log.
    for stored in (wal, database):
        assert bytes([127, 0, 3, 20]) in stored
        assert b"Penny-farthing" in stored
    assert b"created by 127.0.0.1" in log
    for ticket in tickets:
        for spelling in spellings(ticket["verification_code"]):
            assert spelling not in wal + database + log


def test_the_log_has_a_line_for_each_creation_and_each_draw(client, caplog):
    caplog.set_level(logging.INFO)
    raffle = client.new_raffle(total_tickets=1)
    raffle_id = raffle.split("/")[2]
    (ticket,) = client.sell_out(raffle)
    client.draw(raffle)
    client.verify(raffle, ticket)
    assert caplog.messages == [
        f"Raffle {raffle_id} created by 10.0.0.1",
        f"Winners of raffle {raffle_id} drawn by 10.0.0.1",
    ]


@pytest.mark.parametrize("refused", ["draw", "create"])
def test_what_was_refused_is_not_logged_as_done(client, caplog, refused):
    raffle = client.new_raffle()
    caplog.clear()
    caplog.set_level(logging.INFO)
    response = client.draw(raffle, status=403) if refused == "draw" else client.create(total_tickets=0, status=400)
    assert_problem(response)
    assert caplog.messages == []
