"""The rules of a raffle where they meet the database."""

import gc
import hashlib
import re
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from helpers import ONE_PRIZE

import draw
import raffle
import storage
from storage import Storage

VERSION_2 = Path(__file__).with_name("version_2.sql")


def participant(n):
    return n.to_bytes(4, "big")


def issue(store, raffle_id, participants):
    """Have the participants ask for a ticket in one batch; return numbers and names of refusals."""
    requests = [(participant(n), b"", 1, b"") for n in participants]
    outcomes = store.database.write(lambda db, *_: [storage.issue_tickets(db, raffle_id, requests)], "issue").result()
    return [outcome if isinstance(outcome, int) else type(outcome).__name__ for outcome in outcomes]


GONE, AGAIN = "TicketsNoLongerAvailable", "AlreadyParticipated"
BATCHES = [
    ([1, 1, 2, 1, 2], [int, AGAIN, int, AGAIN, AGAIN]),
    ([3, 2, 1, 3, 3, 4, 4, 1], [int, AGAIN, AGAIN, AGAIN, AGAIN, int, AGAIN, AGAIN]),
    ([2, 5, 5, 1, 3, 6, 6, 7], [AGAIN, int, AGAIN, AGAIN, AGAIN, int, GONE, GONE]),
    ([1, 8], [GONE, GONE]),
]


def test_a_batch_gets_what_its_participants_would_get_one_after_the_other(store, look):
    for _ in range(50):
        raffle_id = store.create_raffle("Fair", 6, ONE_PRIZE)["id"]
        numbers = []
        for participants, expected in BATCHES:
            outcomes = issue(store, raffle_id, participants)
            assert [int if isinstance(outcome, int) else outcome for outcome in outcomes] == expected
            numbers += [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert look("SELECT count(*) FROM displaced") == [(0,)]


def test_requests_of_an_unknown_raffle_do_no_harm_to_those_of_others(store):
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    with pytest.raises(storage.RaffleNotFound):
        store.issue_ticket("none", participant(1))
    assert store.issue_ticket(raffle_id, participant(1))["ticket_number"] == 1


def test_of_closings_that_are_committed_together_the_first_has_closed_the_raffle(store):
    raffle_id = store.create_raffle("Fair", 9, ONE_PRIZE)["id"]
    for closed in ([True, False, False], [False, False, False]):
        close = store.database.write(lambda db, *_: [storage._close_raffle(db, raffle_id, [None] * 3)], "close")
        assert [bool(one) for one in close.result()] == closed


def test_of_redemptions_that_are_committed_together_the_first_succeeds(store):
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    issue(store, raffle_id, [1])
    store.draw_winners(raffle_id)
    times = ["2026-07-04T18:00:00Z", "2026-07-04T18:00:01Z", "2026-07-04T18:00:02Z"]
    for succeeded in ([True, False, False], [False, False, False]):
        redeem = store.database.write(lambda db, *_: [storage._redeem_prize(db, (raffle_id, 1), times)], "redeem")
        outcomes = redeem.result()
        assert [outcome is None for outcome in outcomes] == succeeded
        assert {str(outcome) for outcome in outcomes if outcome} == {times[0]}


def test_a_refusal_writes_nothing(store, look, database):
    raffle_id = store.create_raffle("Fair", 2**53 - 1, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    before = look("SELECT * FROM displaced"), database.with_name("raffle.db-wal").stat().st_size
    for _ in range(20):
        with pytest.raises(storage.AlreadyParticipated):
            store.issue_ticket(raffle_id, participant(1))
    assert (look("SELECT * FROM displaced"), database.with_name("raffle.db-wal").stat().st_size) == before


def test_a_raffle_that_is_sold_out_or_unknown_is_refused_before_anything_is_hashed_or_written(store, monkeypatch):
    other = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    sold_out = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    issue(store, sold_out, [1])
    monkeypatch.setattr(storage, "_hash_code", None)
    monkeypatch.setattr(store.database, "write", None)
    for _ in range(2):
        with pytest.raises(storage.TicketsNoLongerAvailable):
            store.issue_ticket(sold_out, participant(2))
        with pytest.raises(storage.RaffleNotFound):
            store.issue_ticket("none", participant(2))
    with pytest.raises(TypeError):
        store.issue_ticket(other, participant(2))


def test_a_raffle_that_is_known_to_be_open_is_not_read_for_every_ticket(store, monkeypatch):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    read = store.database.read
    monkeypatch.setattr(store.database, "read", None)
    store.issue_ticket(raffle_id, participant(2))
    store.issue_ticket(raffle_id, participant(3))
    with pytest.raises(storage.TicketsNoLongerAvailable):
        store.issue_ticket(raffle_id, participant(4))
    # Once it has been refused by the writing thread, it is read.
    monkeypatch.setattr(store.database, "read", read)
    monkeypatch.setattr(store.database, "write", None)
    with pytest.raises(storage.TicketsNoLongerAvailable):
        store.issue_ticket(raffle_id, participant(4))


def test_a_new_raffle_has_no_rows_for_its_tickets(store, look):
    store.create_raffle("Fair", 2**53 - 1, ONE_PRIZE)
    assert look("SELECT count(*) FROM ticket") == look("SELECT count(*) FROM displaced") == [(0,)]


def test_a_sold_out_raffle_leaves_no_cells_of_its_shuffle(store, look):
    raffle_id = store.create_raffle("Fair", 50, ONE_PRIZE)["id"]
    issue(store, raffle_id, range(25))
    assert look("SELECT count(*) FROM displaced") > [(0,)]
    issue(store, raffle_id, range(50))
    assert look("SELECT count(*) FROM displaced") == [(0,)]


def test_winners_do_not_exist_before_the_draw(store, look):
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    assert look("SELECT * FROM win") == []
    store.draw_winners(raffle_id)
    assert look("SELECT position, ticket_number, prize FROM win") == [(1, 1, 1)]


def test_a_read_that_fails_after_the_draw_does_not_hide_that_it_is_stored(store, monkeypatch):
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    write = store.database.write

    def write_and_fail(*arguments):
        monkeypatch.setattr(store.database, "read", None)
        return write(*arguments)

    monkeypatch.setattr(store.database, "write", write_and_fail)
    wins = [{"ticket_number": 1, "prize": "Bicycle", "redeemed_at": None}]
    assert store.draw_winners(raffle_id) == (wins, None)


# Raffle 1 has been drawn, and sold 2 of 2 tickets; raffle 2 is open, and has sold 1 of 3. What goes against one rule:
CLOSED_2 = "available_tickets = 0, closed_at = created_at"
FORBIDDEN = {
    "NOT NULL": [
        ("raffle.id", "UPDATE raffle SET id = NULL"),
        ("raffle.name", "UPDATE raffle SET name = NULL"),
        ("raffle.total_tickets", "UPDATE raffle SET total_tickets = NULL"),
        ("raffle.available_tickets", "UPDATE raffle SET available_tickets = NULL"),
        ("raffle.winners_drawn", "UPDATE raffle SET winners_drawn = NULL"),
        ("raffle.created_at", "UPDATE raffle SET created_at = NULL"),
        ("raffle.secret", "UPDATE raffle SET secret = NULL"),
        ("prize.name", "UPDATE prize SET name = NULL"),
        ("prize.amount", "UPDATE prize SET amount = NULL"),
        ("displaced.ticket_number", "INSERT INTO displaced VALUES (2, 9, NULL)"),
        ("ticket.participant", "UPDATE ticket SET participant = NULL"),
        ("ticket.salt", "UPDATE ticket SET salt = NULL"),
        ("ticket.iterations", "UPDATE ticket SET iterations = NULL"),
        ("ticket.code_hash", "UPDATE ticket SET code_hash = NULL"),
        ("win.ticket_number", "UPDATE win SET ticket_number = NULL"),
        ("win.prize", "UPDATE win SET prize = NULL"),
    ],
    "UNIQUE": [
        ("raffle.id", "UPDATE raffle SET id = 'x'"),
        ("prize.raffle, prize.position", "INSERT INTO prize VALUES (1, 1, 'x', 1)"),
        ("displaced.raffle, displaced.position", "INSERT INTO displaced VALUES (2, 9, 1), (2, 9, 2)"),
        ("ticket.raffle, ticket.number", "UPDATE ticket SET number = 1"),
        ("ticket.raffle, ticket.participant", "UPDATE ticket SET participant = x'00000001'"),
        ("win.raffle, win.position", "INSERT INTO win VALUES (1, 1, 2, 1, NULL)"),
        ("win.raffle, win.ticket_number", "INSERT INTO win VALUES (1, 2, 1, 1, NULL)"),
    ],
    "FOREIGN KEY": [
        ("", "INSERT INTO prize VALUES (9, 1, 'x', 1)"),
        ("", "INSERT INTO displaced VALUES (9, 1, 1)"),
        ("", "INSERT INTO ticket VALUES (9, 1, x'00000001', x'00', 1, x'00')"),
        ("", "INSERT INTO win VALUES (1, 2, 2, 9, NULL)"),
        ("", "INSERT INTO win VALUES (9, 1, 1, 1, NULL)"),
    ],
    "CHECK": [
        (
            "total_tickets BETWEEN 1 AND 9007199254740991",
            "UPDATE raffle SET total_tickets = 9007199254740992 WHERE sequence = 1",
            f"UPDATE raffle SET total_tickets = 0, issued_tickets = 0, {CLOSED_2} WHERE sequence = 2",
        ),
        # The number issued is NULL, because it is unknown while a database of version 3 is upgraded.
        (
            "available_tickets BETWEEN 0 AND total_tickets",
            "UPDATE raffle SET issued_tickets = NULL, available_tickets = 4 WHERE sequence = 2",
            f"UPDATE raffle SET issued_tickets = NULL, {CLOSED_2}, available_tickets = -1 WHERE sequence = 2",
        ),
        (
            "winners_drawn = 0 OR (winners_drawn = 1 AND available_tickets = 0)",
            "UPDATE raffle SET winners_drawn = 2 WHERE sequence = 1",
            "UPDATE raffle SET winners_drawn = 1, drawn_at = '', public_randomness = '', wins_sha256 = ''",
        ),
        ("length(secret) = 32", "UPDATE raffle SET secret = zeroblob(31)", "UPDATE raffle SET secret = zeroblob(33)"),
        (
            "(closed_at IS NULL) = (available_tickets > 0)",
            "UPDATE raffle SET closed_at = NULL WHERE sequence = 1",
            "UPDATE raffle SET closed_at = '' WHERE sequence = 2",
        ),
        *[
            (
                f"({column} IS NULL) = (winners_drawn = 0)",
                f"UPDATE raffle SET {column} = NULL WHERE sequence = 1",
                f"UPDATE raffle SET {column} = '' WHERE sequence = 2",
            )
            for column in ("drawn_at", "public_randomness", "wins_sha256")
        ],
        *[
            (
                f"length({column}) = 64",
                f"UPDATE raffle SET {column} = printf('%063d', 0)",
                f"UPDATE raffle SET {column} = printf('%065d', 0)",
            )
            for column in ("draw_commitment", "tickets_sha256")
        ],
        (
            "issued_tickets BETWEEN 0 AND total_tickets AND available_tickets IN (0, total_tickets - issued_tickets)",
            f"UPDATE raffle SET issued_tickets = -1, {CLOSED_2} WHERE sequence = 2",
            f"UPDATE raffle SET issued_tickets = 4, {CLOSED_2} WHERE sequence = 2",
            "UPDATE raffle SET issued_tickets = 0 WHERE sequence = 2",
            "UPDATE raffle SET issued_tickets = 2 WHERE sequence = 2",
        ),
        ("amount >= 1", "UPDATE prize SET amount = 0"),
        ("number >= 1", "UPDATE ticket SET number = 0 WHERE number = 1"),
        *[
            ("length(participant) IN (4, 16)", f"UPDATE ticket SET participant = zeroblob({length}) WHERE number = 1")
            for length in (0, 3, 5, 15, 17)
        ],
        ("ticket_number >= 1", "UPDATE win SET ticket_number = 0"),
    ],
    "STRICT": [
        ("BLOB value in TEXT column raffle.name", "UPDATE raffle SET name = x'00'"),
        ("BLOB value in TEXT column prize.name", "UPDATE prize SET name = x'00'"),
        ("TEXT value in INTEGER column displaced.ticket_number", "INSERT INTO displaced VALUES (2, 9, 'x')"),
        ("TEXT value in BLOB column ticket.salt", "UPDATE ticket SET salt = 'x'"),
        ("BLOB value in TEXT column win.redeemed_at", "UPDATE win SET redeemed_at = x'00'"),
    ],
}


def test_the_schema_refuses_what_the_rules_forbid(store):
    for total, participants in ((2, [1, 2]), (3, [1])):
        raffle_id = store.create_raffle("Fair", total, ONE_PRIZE)["id"]
        issue(store, raffle_id, participants)
        if len(participants) == total:
            store.draw_winners(raffle_id)

    def run(statement):
        store.database.write(lambda db, *_: [db.execute(statement)], "sql").result()

    run("UPDATE win SET ticket_number = 1")
    for kind, cases in FORBIDDEN.items():
        for rule, *statements in cases:
            separator = ": " if rule else ""
            message = f"cannot store {rule}" if kind == "STRICT" else f"{kind} constraint failed{separator}{rule}"
            for statement in statements:
                with pytest.raises(sqlite3.IntegrityError) as refusal:
                    run(statement)
                assert str(refusal.value) == message, statement


SCHEMA = Path(storage.__file__).with_name("schema.sql").read_text(encoding="utf-8")


def test_the_schema_may_be_run_again_on_a_database_of_its_version(store, database, look):
    raffle_id = store.create_raffle("Fair", 2, ONE_PRIZE)["id"]
    issue(store, raffle_id, [1])
    with closing(sqlite3.connect(database)) as connection:
        before = list(connection.iterdump())
        connection.executescript(SCHEMA)
        assert list(connection.iterdump()) == before


def test_a_database_has_the_whole_schema_or_nothing_of_it(database):
    # As if the process were killed before each statement.
    statements = re.findall(r".+?;(?=\n)", re.sub("--.*", "", SCHEMA), re.DOTALL)
    assert statements[-1].strip() == "COMMIT;"
    for count in range(len(statements)):
        with closing(sqlite3.connect(database)) as connection:
            connection.executescript("".join(statements[:count]))
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT * FROM sqlite_schema").fetchall() == []
            assert connection.execute("PRAGMA application_id").fetchall() == [(0,)]


def test_the_writing_thread_ends_with_the_application_that_owns_it(database):
    def writers():
        return [thread for thread in threading.enumerate() if thread.name == "raffle-writer"]

    app = raffle.create_app(database)
    assert len(writers()) == 1
    del app
    gc.collect()
    assert writers() == []


# Upgrades

# The codes of the tickets in version_2.sql: (raffle's name, number): code.
CODES = {
    ("Drawn", 1): "BJ5H-4WM6-DX1C-77Y1-SRR7-4Y9H",
    ("Drawn", 2): "YS7Z-A08B-QNH9-YZ6Z-DMER-0N6T",
    ("Drawn", 3): "G6PV-ST6S-K9DS-ZS54-JXSQ-FE48",
    ("Sold out", 1): "TSJC-E18Z-FNCJ-H2PV-0NE8-HNBS",
    ("Sold out", 2): "KBKF-3Q0F-EKK8-6P9J-CSPG-99EQ",
    ("Open", 3): "0BQT-SJN0-S11G-766D-NMP8-T857",
    ("Open", 4): "Z182-K36D-M4GE-HVC4-QNAN-3WQ9",
    ("Open", 5): "Y58S-PAA9-H14J-72EZ-R91B-W1TJ",
}

# issued_tickets and closed_at of the raffles in version_2.sql, latest first.
CLOSED = [(3, None), (2, "2026-11-24T13:31:11Z"), (3, "2026-11-24T13:31:11Z")]


def test_the_raffles_of_version_2_go_on(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(VERSION_2.read_text(encoding="utf-8"))
        secrets = dict(connection.execute("SELECT name, secret FROM raffle"))
    store = Storage(database)
    with closing(store.database):
        raffles = {raffle["name"]: store.get_raffle(raffle["id"]) for raffle in store.list_raffles(10)[0]}
        assert list(raffles) == ["Open", "Sold out", "Drawn"]
        for name, raffle in raffles.items():
            assert raffle["draw_commitment"] == hashlib.sha256(secrets[name]).hexdigest()
        ids = {name: raffle["id"] for name, raffle in raffles.items()}
        # What was stored of the draw still holds, and so do the codes.
        wins, _ = store.list_winners(ids["Drawn"], 10)
        assert [tuple(win.values()) for win in wins] == [(2, "Bicycle", None), (3, "Größe", None)]
        assert [(raffle["issued_tickets"], raffle["closed_at"]) for raffle in raffles.values()] == CLOSED
        assert all(holds for _, holds in draw.check_draw(store.get_receipt(ids["Drawn"]), wins))
        again, *numbers, gone = issue(store, ids["Open"], [0x0A020001, 1, 2, 3, 4])
        assert (again, sorted(numbers), gone) == (AGAIN, [1, 2, 6], GONE)
        prizes = {}
        for name in ids:
            if name != "Drawn":
                store.draw_winners(ids[name])
            prizes[name] = {win["ticket_number"]: win["prize"] for win in store.list_winners(ids[name], 10)[0]}
        for (name, number), code in CODES.items():
            assert store.verify_ticket(ids[name], number, code)["prize"] == prizes[name].get(number)
    assert {file.name for file in database.parent.iterdir()} == {"raffle.db", "raffle.db.version-2"}
