import hashlib
import logging
import uuid
from contextlib import closing

import pytest
from helpers import MANAGER, Client, assert_problem, spellings

from raffle import create_app


def test_a_code_is_stored_as_its_salted_hash(client, look):
    raffle = client.new_raffle()
    codes = {ticket["ticket_number"]: ticket["verification_code"] for ticket in client.sell_out(raffle)}
    stored = look("SELECT number, salt, iterations, code_hash FROM ticket")
    for number, salt, iterations, code_hash in stored:
        assert (len(salt), iterations) == (16, 1000)
        code = codes[number].replace("-", "").encode()
        assert code_hash == hashlib.pbkdf2_hmac("sha256", code, salt, iterations)
    assert len({salt for _, salt, *_ in stored}) == len(set(codes.values())) == 3


def test_no_secret_follows_from_what_is_public(tmp_path, monkeypatch):
    # Two servers at the same time, with the same raffle and the same participants: nothing but chance differs.
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(int=7, version=4))
    monkeypatch.setattr("storage._now", lambda: "2026-07-04T18:00:00Z")
    secrets = []
    for name in ("a", "b"):
        with closing(create_app(tmp_path / name, MANAGER)) as app:
            client = Client(app)
            raffle = client.new_raffle()
            tickets = {ticket["ticket_number"]: ticket["verification_code"] for ticket in client.sell_out(raffle)}
            client.draw(raffle)
            receipt = client.get(f"{raffle}draw/").json
            secrets += [receipt["secret"], receipt["public_randomness"], *tickets.values()]
            assert receipt["draw_commitment"] == hashlib.sha256(bytes.fromhex(receipt["secret"])).hexdigest()
    assert len(set(secrets)) == len(secrets) == 10


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
