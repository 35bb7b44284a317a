import gc
import shutil
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from helpers import ONE_PRIZE

import raffle
import storage
from storage import Storage


@pytest.fixture
def store(database):
    with closing(Storage(database)) as store:
        yield store


@pytest.fixture
def look(database, store):
    """Read the database of `store` past it: `look(sql)` returns the rows."""
    with closing(sqlite3.connect(database)) as connection:
        yield lambda sql: connection.execute(sql).fetchall()


def participant(n):
    return n.to_bytes(4, "big")


def write(store, job):
    """Have the writing thread call `job(connection)`."""
    return store._write(lambda db, _, requests: [job(db)], "none")


def together(store, jobs):
    """Have the jobs wait for the writer at the same instant, and return what became of each."""
    busy, go_on = threading.Event(), threading.Event()

    def occupy(db):
        busy.set()
        assert go_on.wait(30)

    def run(job):
        try:
            return job()
        except Exception as error:
            return type(error)

    with ThreadPoolExecutor(len(jobs) + 1) as pool:
        first = pool.submit(write, store, occupy)
        assert busy.wait(30)
        outcomes = [pool.submit(run, job) for job in jobs]
        with store._changed:
            assert store._changed.wait_for(lambda: sum(map(len, store._waiting.values())) == len(jobs), 30)
        go_on.set()
        first.result()
        return [outcome.result() for outcome in outcomes]


def count_commits(store, monkeypatch):
    batches = []
    commit = store._commit
    monkeypatch.setattr(store, "_commit", lambda batch: batches.append(sum(map(len, batch.values()))) or commit(batch))
    return batches


def test_writes_that_wait_share_one_transaction(store, monkeypatch):
    raffle_id = store.create_raffle("Fair", 100, ONE_PRIZE)["id"]
    batches = count_commits(store, monkeypatch)
    jobs = [lambda n=n: store.issue_ticket(raffle_id, participant(n))["ticket_number"] for n in range(20)]
    assert len(set(together(store, jobs))) == 20
    assert batches == [1, 20]


def test_a_write_that_is_refused_or_fails_does_no_harm_to_its_neighbours(store, look):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]

    def fail(db):
        db.execute("UPDATE raffle SET name = 'changed'")
        raise RuntimeError

    def join(n):
        return lambda: store.issue_ticket(raffle_id, participant(n))["ticket_number"]

    jobs = [join(1), lambda: write(store, fail), join(1), lambda: store.issue_ticket("none", participant(3)), join(2)]
    outcomes = together(store, jobs)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, type)]
    assert sorted(error.__name__ for error in refusals) == [
        "AlreadyParticipated",
        "RaffleNotFound",
        "RuntimeError",
    ]
    numbers = sorted(outcome for outcome in outcomes if outcome not in refusals)
    assert look("SELECT number FROM ticket ORDER BY number") == [(number,) for number in numbers]
    assert look("SELECT name, available_tickets FROM raffle") == [("Fair", 1)]


def test_nobody_is_answered_with_success_if_the_transaction_is_undone(store, look):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]

    def undo_everything(db):
        db.execute("ROLLBACK")  # as SQLite does by itself when the disk is full
        raise sqlite3.OperationalError("database or disk is full")

    def join(n):
        return lambda: store.issue_ticket(raffle_id, participant(n))

    outcomes = together(store, [join(1), lambda: write(store, undo_everything), join(2)])
    assert outcomes == [storage.StorageUnavailable] * 3
    assert look("SELECT * FROM ticket") == []
    store.issue_ticket(raffle_id, participant(1))


def test_writes_for_which_the_disk_is_too_full_are_unavailable_until_it_is_not(store, look):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]
    pages = write(store, lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    write(store, lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    many = [{"name": "x" * 200, "amount": 1}] * 200
    outcomes = together(
        store,
        [
            lambda: store.create_raffle("Fair", 200, many),
            lambda: store.issue_ticket(raffle_id, participant(1))["raffle_id"],
        ],
    )
    assert outcomes == [storage.StorageUnavailable] * 2
    assert look("SELECT count(*) FROM ticket") == [(0,)]
    assert look("SELECT count(*) FROM raffle") == [(1,)]
    write(store, lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
    store.create_raffle("Fair", 200, many)
    store.issue_ticket(raffle_id, participant(1))
    assert look("PRAGMA integrity_check") == [("ok",)]


def test_a_database_made_read_only_is_unavailable_to_writes_until_it_is_not(store, look):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]
    store._writer.execute("PRAGMA query_only = ON")
    for _ in range(2):
        with pytest.raises(storage.StorageUnavailable):
            store.issue_ticket(raffle_id, participant(1))
        assert store.get_raffle(raffle_id)["available_tickets"] == 3
    store._writer.execute("PRAGMA query_only = OFF")
    store.issue_ticket(raffle_id, participant(1))
    assert look("SELECT available_tickets FROM raffle") == [(2,)]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_no_longer_in_its_place_is_written_no_more(store, database, tmp_path, replaced):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]
    kept = database.rename(tmp_path / "kept.db")
    if replaced:
        shutil.copy(kept, database)
    with pytest.raises(storage.StorageUnavailable):
        store.issue_ticket(raffle_id, participant(1))
    with pytest.raises(storage.StorageUnavailable):
        store.check_health()
    kept.rename(database)
    store.check_health()
    assert store.issue_ticket(raffle_id, participant(1))["raffle_id"] == raffle_id
    assert store.get_raffle(raffle_id)["available_tickets"] == 2


def test_a_file_that_stays_locked_is_waited_for_only_once(database, monkeypatch):
    monkeypatch.setattr(storage, "BUSY_TIMEOUT", 0.01)
    with closing(Storage(database)) as store, closing(sqlite3.connect(database)) as other:
        raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]
        timeouts = []
        for statement in ("BEGIN IMMEDIATE", "SELECT 1", "ROLLBACK"):
            other.execute(statement)
            with suppress(storage.StorageUnavailable):
                store.issue_ticket(raffle_id, participant(len(timeouts)))
            timeouts.append(store._writer.execute("PRAGMA busy_timeout").fetchone()[0])
        assert timeouts == [0, 0, 10]


def test_a_commit_that_fails_is_answered_with_no_success_and_the_next_one_works(store, look):
    raffle_id = store.create_raffle("Fair", 3, ONE_PRIZE)["id"]

    def owe_a_reference(db):
        db.execute("PRAGMA defer_foreign_keys = ON")
        db.execute("INSERT INTO prize (raffle, position, name, amount) VALUES (99, 1, 'none', 1)")

    def join(n):
        return lambda: store.issue_ticket(raffle_id, participant(n))

    outcomes = together(store, [join(1), lambda: write(store, owe_a_reference), join(2)])
    assert outcomes == [storage.StorageUnavailable] * 3
    assert look("SELECT * FROM ticket") == []
    store.issue_ticket(raffle_id, participant(1))


ASKING_TOGETHER = [
    ([1, 1, 2, 1, 2], "ticket again ticket again again"),
    ([3, 2, 1, 3, 3, 4, 4, 1], "ticket again again again again ticket again again"),
    ([2, 5, 5, 1, 3, 6, 6, 7], "again ticket again again again ticket gone gone"),
]


def test_those_who_ask_together_get_what_they_would_get_one_after_the_other(store, look):
    for _ in range(50):
        raffle_id = store.create_raffle("Fair", 6, ONE_PRIZE)["id"]
        numbers = []
        for participants, expected in ASKING_TOGETHER:
            requests = [(participant(n), b"", 1, b"") for n in participants]
            outcomes = write(store, lambda db, i=raffle_id, r=requests: storage._issue_tickets(db, i, r))
            refusals = {storage.AlreadyParticipated: "again", storage.TicketsNoLongerAvailable: "gone"}
            assert " ".join(refusals.get(type(outcome), "ticket") for outcome in outcomes) == expected
            numbers += [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert look("SELECT count(*) FROM displaced") == [(0,)]


def test_a_refusal_writes_nothing(store, look, database):
    raffle_id = store.create_raffle("Fair", 2**53 - 1, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    before = look("SELECT * FROM displaced"), database.with_name("raffle.db-wal").stat().st_size
    for _ in range(20):
        with pytest.raises(storage.AlreadyParticipated):
            store.issue_ticket(raffle_id, participant(1))
    assert (look("SELECT * FROM displaced"), database.with_name("raffle.db-wal").stat().st_size) == before


def test_a_new_raffle_has_no_rows_for_its_tickets(store, look):
    store.create_raffle("Fair", 2**53 - 1, ONE_PRIZE)
    assert look("SELECT count(*) FROM ticket") == look("SELECT count(*) FROM displaced") == [(0,)]


def test_a_sold_out_raffle_leaves_no_cells_of_its_shuffle(store, look):
    raffle_id = store.create_raffle("Fair", 50, ONE_PRIZE)["id"]
    for n in range(25):
        store.issue_ticket(raffle_id, participant(n))
    assert look("SELECT count(*) FROM displaced") > [(0,)]
    for n in range(25, 50):
        store.issue_ticket(raffle_id, participant(n))
    assert look("SELECT count(*) FROM displaced") == [(0,)]


def test_winners_do_not_exist_before_the_draw(store, look):
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    assert look("SELECT * FROM win") == []
    store.draw_winners(raffle_id)
    assert look("SELECT position, ticket_number, prize FROM win") == [(1, 1, 1)]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO win VALUES (1, 2, 1, 1)",  # a second prize for a ticket
        "INSERT INTO win VALUES (1, 1, 2, 1)",  # a second draw
        "INSERT INTO win VALUES (1, 2, 2, 9)",  # a prize that does not exist
        "INSERT INTO win VALUES (1, 2, 0, 1)",  # no ticket
        "INSERT INTO ticket VALUES (1, 1, x'7f000009', x'00', 1, x'00')",  # a number twice
        "INSERT INTO ticket VALUES (1, 3, x'00000001', x'00', 1, x'00')",  # a participant twice
        "INSERT INTO ticket VALUES (1, 3, x'0001', x'00', 1, x'00')",  # no address
        "INSERT INTO ticket VALUES (9, 3, x'7f000009', x'00', 1, x'00')",  # no raffle
        "UPDATE raffle SET available_tickets = -1",
        "UPDATE raffle SET available_tickets = 3",
        "UPDATE raffle SET available_tickets = 1",  # available after the draw
        "UPDATE raffle SET total_tickets = 9007199254740992",
    ],
)
def test_the_schema_refuses_what_the_rules_forbid(store, sql):
    raffle_id = store.create_raffle("Fair", 2, ONE_PRIZE)["id"]
    store.issue_ticket(raffle_id, participant(1))
    store.issue_ticket(raffle_id, participant(2))
    store.draw_winners(raffle_id)
    write(store, lambda db: db.execute("UPDATE win SET ticket_number = 1"))
    with pytest.raises(sqlite3.IntegrityError):
        write(store, lambda db: db.execute(sql))


def test_every_commit_reaches_the_disk_before_it_is_answered(store):
    pragmas = {
        name: write(store, lambda db, name=name: db.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_readers_cannot_write(store):
    with pytest.raises(storage.StorageUnavailable):
        store._read("DELETE FROM raffle RETURNING id")


def test_what_was_stored_is_there_when_the_database_is_opened_again(database):
    with closing(Storage(database)) as store:
        raffle_id = store.create_raffle("Fair", 2, ONE_PRIZE)["id"]
        tickets = [store.issue_ticket(raffle_id, participant(1))]
    with closing(Storage(database)) as store:
        tickets.append(store.issue_ticket(raffle_id, participant(2)))
        store.draw_winners(raffle_id)
        prizes = {store.verify_ticket(raffle_id, t["ticket_number"], t["verification_code"]) for t in tickets}
    assert prizes == {"Bicycle", None}


def test_a_new_database_is_readable_by_its_owner_only(store, database):
    store.create_raffle("Fair", 1, ONE_PRIZE)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in database.parent.iterdir()}
    assert modes == {"raffle.db": 0o600, "raffle.db-wal": 0o600, "raffle.db-shm": 0o600}


def test_closing_leaves_one_file_no_thread_and_no_way_to_write(database):
    store = Storage(database)
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    store.close()
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]
    assert not store._thread.is_alive()
    with pytest.raises(storage.StorageUnavailable):
        store.issue_ticket(raffle_id, participant(1))
    with pytest.raises(storage.StorageUnavailable):
        store.get_raffle(raffle_id)
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]


def test_closing_undoes_a_write_that_takes_too_long(database):
    store = Storage(database)
    raffle_id = store.create_raffle("Fair", 1, ONE_PRIZE)["id"]
    busy = threading.Event()

    def count_for_ever(db):
        db.execute("UPDATE raffle SET name = 'Unfair'")
        busy.set()
        db.execute("WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n")

    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(write, store, count_for_ever)
        assert busy.wait(30)
        store.close()
        with pytest.raises(storage.StorageUnavailable):
            outcome.result()
    with closing(Storage(database)) as store:
        assert store.get_raffle(raffle_id)["name"] == "Fair"


def test_threads_that_come_and_go_leave_no_connections_behind(store):
    for _ in range(20):
        thread = threading.Thread(target=store.list_raffles, args=(1,))
        thread.start()
        thread.join()
    assert len(store._readers) == 1


def test_an_application_that_is_collected_while_it_writes_ends_as_well(database):
    store = Storage(database)
    write(store, lambda db: store.close())
    store._thread.join(30)
    assert [file.name for file in database.parent.iterdir()] == ["raffle.db"]


def test_the_writing_thread_ends_with_the_application_that_owns_it(database):
    def writers():
        return [thread for thread in threading.enumerate() if thread.name == "raffle-writer"]

    app = raffle.create_app(database)
    assert len(writers()) == 1
    del app
    gc.collect()
    assert writers() == []
