"""Kinds of faults that the other tests did not see: each has a heading here."""

import base64
import http.client
import http.server
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from helpers import (
    CROCKFORD,
    FAULTS,
    HALF_BODY,
    HALF_HEAD,
    KEY,
    MANAGER,
    NO_RAFFLE,
    ONE_PRIZE,
    RFC_4648,
    ROOT,
    SCHEMA,
    STRANGER,
    Client,
    Crowd,
    add,
    children,
    forms_of_code,
    installed,
    is_alive,
    mebibytes,
    post_environ,
    query,
    refused,
    wait_for,
)

import draw
from database import Database, DatabaseUnavailable, Share
from raffle import create_app

pytestmark = pytest.mark.long

MOST = 2**53 - 1
TIME_FORM = "%Y-%m-%dT%H:%M:%SZ"
NOON = "2026-07-04T12:00:00Z"


def raffle_id(path):
    return path.split("/")[2]


def execute(database, sql, *values):
    """Change the database as another program would."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(sql, values)


def drawn_by(client, path, tickets):
    """Draw a raffle; return the tickets that won, in the order of the wins, then the others."""
    others = {ticket["ticket_number"]: ticket for ticket in tickets}
    won = [others.pop(win["ticket_number"]) for win in client.draw(path).json]
    return [*won, *others.values()]


def limited(option, value):
    """Return a command that runs a command with a hard limit of the shell's ulimit."""
    return ["sh", "-c", f'ulimit {option} {value} && exec "$@"', "sh"]


# Secrets


def test_files_hold_no_part_of_a_code_issued_without_a_key(client, database):
    """Neither in the hash's salt nor anywhere else; of a code issued with a key neither."""
    _, tickets = client.new_sold_out(20, [{"name": "Penny-farthing", "amount": 1}])
    keyed = client.new_raffle(1)
    tickets.append(client.participate(keyed, Idempotency_Key=KEY).json)
    wal = database.with_name("raffle.db-wal").read_bytes()
    client.app.close()
    stored = database.read_bytes()
    assert b"Penny-farthing" in stored
    assert b"Penny-farthing" in wal

    for ticket in tickets:
        code = ticket["verification_code"]
        plain = code.replace("-", "")
        raw = base64.b32decode(plain.translate(str.maketrans(CROCKFORD, RFC_4648)))
        parts = forms_of_code(code)
        # By chance, one of these is found in a run of a hundred million.
        parts += [raw[start : start + 6] for start in range(len(raw) - 5)]
        parts += [plain[start : start + 10].encode() for start in range(len(plain) - 9)]
        for part in parts:
            assert part not in stored, (code, part)
            assert part not in wal, (code, part)


def test_a_code_does_not_follow_from_its_salt(client, database, monkeypatch):
    """Two tickets with one salt, and all else by chance, have codes with nothing in common."""
    token_bytes, made = secrets.token_bytes, []

    def record(size):
        made.append(token_bytes(size))
        return made[-1]

    def use_salt_again(size):
        fresh = token_bytes(size)
        if size != len(with_salt):
            return fresh
        start = with_salt.index(salt)
        return fresh[:start] + salt + fresh[start + len(salt) :]

    path = client.new_raffle()
    monkeypatch.setattr("secrets.token_bytes", record)
    first = client.participate(path, "10.1.0.1").json
    [(salt,)] = query(database, "SELECT salt FROM ticket")
    [with_salt] = [each for each in made if salt in each]
    monkeypatch.setattr("secrets.token_bytes", use_salt_again)
    second = client.participate(path, "10.1.0.2").json

    assert query(database, "SELECT DISTINCT salt FROM ticket") == [(salt,)]
    groups = [ticket["verification_code"].split("-") for ticket in (first, second)]
    assert [pair for pair in zip(*groups) if pair[0] == pair[1]] == []


def test_every_byte_of_the_hash_of_a_code_counts(client, database):
    path, [ticket] = client.new_sold_out()
    client.draw(path)
    [(code_hash,)] = query(database, "SELECT code_hash FROM ticket")
    for position in range(len(code_hash)):
        other = bytearray(code_hash)
        other[position] ^= 1
        execute(database, "UPDATE ticket SET code_hash = ?", bytes(other))
        refused(client.verify(path, ticket, 400), "invalid-code")
    execute(database, "UPDATE ticket SET code_hash = ?", code_hash)
    client.verify(path, ticket)


def make_secrets(path, closed, opened):
    """Draw, issue and create in a copy of a database; return the number, and all that is secret."""
    random.seed(7)
    with closing(create_app(path, MANAGER)) as app:
        client = Client(app)
        client.draw(closed)
        ticket = client.participate(opened).json
        new_id = client.create().json["id"]
        [of_new] = query(path, f"SELECT secret, address_key FROM raffle WHERE id = '{new_id}'")
        sequence = f"(SELECT sequence FROM raffle WHERE id = '{raffle_id(opened)}')"
        [of_ticket] = query(path, f"SELECT salt, code_hash FROM ticket WHERE raffle = {sequence}")
        randomness = client.get(closed).json["public_randomness"]
    made = [randomness, ticket["verification_code"], new_id, *of_new, *of_ticket]
    return ticket["ticket_number"], made


def test_a_copy_of_the_database_tells_no_secret_to_come(client, database, tmp_path, monkeypatch):
    """The same is done in two copies at the same instant, and chance makes it different."""
    closed, _ = client.new_sold_out(3)
    opened = client.new_raffle(MOST)
    client.app.close()
    instant = time.time()
    monkeypatch.setattr("storage.now", lambda: NOON.replace("2026", "2999"))
    monkeypatch.setattr("time.time", lambda: instant)
    monkeypatch.setattr("time.time_ns", lambda: int(instant * 10**9))

    outcomes = []
    for name in ("a.db", "b.db"):
        shutil.copy(database, tmp_path / name)
        outcomes.append(make_secrets(tmp_path / name, closed, opened))

    (first_number, first), (second_number, second) = outcomes
    # What the copy does tell, as the README says.
    assert first_number == second_number
    for made, other in zip(first, second):
        assert made != other


# At the same instant: what waits is run in one commit, and decided one after the other


@pytest.fixture
def in_one_commit(client):
    """Make calls whose writes are one transaction, in this order; return their answers."""
    database = client.app.storage._database

    def run(*calls):
        is_busy, are_waiting = threading.Event(), threading.Event()

        def occupy(connection, group, requests):
            is_busy.set()
            assert are_waiting.wait(30)
            return requests

        answers = []
        with ThreadPoolExecutor(1 + len(calls)) as pool:
            pool.submit(database.write, occupy, None)
            try:
                assert is_busy.wait(30)
                for number, call in enumerate(calls, 1):
                    answers.append(pool.submit(call))
                    # As in test_database.py: nothing else tells that a write waits.
                    wait_for(lambda number=number: database._writes.qsize() == number)
            finally:
                are_waiting.set()
        return [answer.result() for answer in answers]

    return run


def test_raffles_created_in_one_commit_share_nothing(client, database, in_one_commit):
    names = [f"Fair {n}" for n in range(5)]
    creations = [
        partial(client.create, 9, [{"name": f"Prize of {name}", "amount": 1}], name=name)
        for name in names
    ]
    answers = [answer.json for answer in in_one_commit(*creations)]

    for name, answer in zip(names, answers):
        assert answer["name"] == name
        assert answer["prizes"] == [{"name": f"Prize of {name}", "amount": 1}]
        assert client.get(f"/raffles/{answer['id']}/").json == answer
    columns = "id, secret, draw_commitment, address_key, sequence"
    for column in zip(*query(database, f"SELECT {columns} FROM raffle")):
        assert len(set(column)) == len(names), column


def test_tickets_issued_in_one_commit_share_nothing(client, database, in_one_commit):
    path = client.new_raffle(9)
    answers = in_one_commit(*[partial(client.participate, path, f"10.1.0.{n}") for n in range(9)])

    tickets = [answer.json for answer in answers]
    assert sorted(ticket["ticket_number"] for ticket in tickets) == list(range(1, 10))
    assert len({ticket["verification_code"] for ticket in tickets}) == 9
    for column in zip(*query(database, "SELECT participant_hash, salt, code_hash FROM ticket")):
        assert len(set(column)) == 9, column
    client.draw(path)
    assert [client.verify(path, ticket).status_int for ticket in tickets] == [200] * 9


@pytest.mark.parametrize(
    ("keys", "statuses"),
    [
        ((KEY, KEY, KEY), [201, 201, 201]),
        ((KEY, KEY.upper(), None), [201, 403, 403]),
        ((None, KEY, None), [201, 403, 403]),
    ],
    ids=["one key", "other keys", "no key first"],
)
def test_an_address_that_asks_at_once_gets_one_ticket(client, in_one_commit, keys, statuses):
    path = client.new_raffle()
    headers = [{"Idempotency_Key": key} if key else {} for key in keys]
    answers = in_one_commit(
        *[partial(client.participate, path, status="*", **each) for each in headers]
    )

    assert [answer.status_int for answer in answers] == statuses
    assert len({answer.text for answer in answers if answer.status_int == 201}) == 1
    assert client.get(path).json["issued_tickets"] == 1


def test_the_holder_of_the_last_ticket_is_told_that_none_is_left(client, in_one_commit):
    """As in the README, that comes first, even where both requests are one group."""
    path = client.new_raffle(1)
    ticket, other = in_one_commit(*[partial(client.participate, path, status="*")] * 2)
    assert ticket.status_int == 201
    refused(other, "no-tickets-left")


def test_of_redemptions_at_once_one_succeeds(client, in_one_commit):
    path, tickets = client.new_sold_out(3)
    won = drawn_by(client, path, tickets)[0]
    first, *others = in_one_commit(*[partial(client.redeem, path, won, "*")] * 3)

    assert first.status_int == 201
    detail = f"The prize of this ticket was already redeemed at {first.json['redeemed_at']}"
    for other in others:
        assert other.status_int == 403
        refused(other, "already-redeemed", detail)
    assert client.get(f"{path}winners/").json == [first.json]


def test_of_closes_at_once_one_succeeds(client, in_one_commit):
    path = client.new_raffle()
    first, *others = in_one_commit(*[partial(client.close, path, "*")] * 3)

    assert (first.status_int, first.json) == (200, client.get(path).json)
    for other in others:
        refused(other, "already-closed")


def test_of_a_close_and_the_last_ticket_the_first_one_counts(client, in_one_commit):
    path = client.new_raffle(1)
    closed, ticket = in_one_commit(
        partial(client.close, path, "*"), partial(client.participate, path, status="*")
    )
    assert (closed.status_int, closed.json["issued_tickets"]) == (200, 0)
    refused(ticket, "no-tickets-left")
    assert client.get(path).json == closed.json

    path = client.new_raffle(1)
    ticket, closed = in_one_commit(
        partial(client.participate, path, status="*"), partial(client.close, path, "*")
    )
    assert ticket.status_int == 201
    refused(closed, "already-closed")
    shown = client.get(path).json
    assert (shown["issued_tickets"], shown["available_tickets"]) == (1, 0)
    client.draw(path)


def test_a_close_shows_the_tickets_that_were_issued_before_it(client, in_one_commit):
    path = client.new_raffle(9)
    client.participate(path, "10.1.0.1")
    asked = [partial(client.participate, path, f"10.1.0.{n}", "*") for n in range(2, 7)]
    *tickets, closed, late = in_one_commit(
        *asked, partial(client.close, path), partial(client.participate, path, "10.1.0.7", "*")
    )

    # Requests for one raffle are one group, at the place of the first of them.
    issued = 1 + [ticket.status_int for ticket in [*tickets, late]].count(201)
    assert issued >= 6
    assert closed.json["issued_tickets"] == issued
    assert client.get(path).json == closed.json


def test_of_a_deletion_and_a_close_the_first_one_counts(client, in_one_commit):
    path = client.new_raffle()
    deleted, closed = in_one_commit(
        partial(client.delete_raffle, path, "*"), partial(client.close, path, "*")
    )
    assert deleted.status_int == 204
    refused(closed, "no-such-raffle")


def test_of_completions_of_a_draw_at_once_the_first_one_dates_it(client, database, monkeypatch):
    """Two servers complete it: the second has read that it is not, and comes last."""
    path, _ = client.new_sold_out(3)
    amount_of_wins, shown = draw.amount_of_wins, []
    monkeypatch.setattr("storage.now", lambda: after("2999-07-04T12:00:00Z", hours=len(shown)))

    with closing(create_app(database, MANAGER)) as app, ThreadPoolExecutor() as pool:
        other = Client(app)

        def complete_elsewhere(*arguments):
            monkeypatch.setattr("draw.amount_of_wins", amount_of_wins)
            refused(pool.submit(other.draw, path, status=403).result(30), "already-drawn")
            shown.append(pool.submit(other.get, path).result(30).json)
            return amount_of_wins(*arguments)

        monkeypatch.setattr("draw.amount_of_wins", complete_elsewhere)
        client.draw(path)
    assert shown[0]["drawn_at"] == "2999-07-04T12:00:00Z"
    assert shown == [client.get(path).json]


# Several raffles


def test_a_replacement_in_one_raffle_is_none_in_another(client):
    """Even where both have won with the same number."""

    def new_drawn():
        path, tickets = client.new_sold_out(2)
        return path, drawn_by(client, path, tickets)

    first, (replaced, _) = new_drawn()
    number = replaced["ticket_number"]
    client.replace(first, number, "Bicycle")
    raffles = [new_drawn() for _ in range(50)]
    second, (won, lost) = next(each for each in raffles if each[1][0]["ticket_number"] == number)

    untouched = {"redeemed_at": None, "replaced_at": None}
    assert client.verify(second, won).json == {"has_won": True, "prize": "Bicycle", **untouched}
    assert client.verify(second, lost).json == {"has_won": False, "prize": None, **untouched}
    third, (won_there, _) = next(
        each for each in raffles if each[1][0]["ticket_number"] == number and each[0] != second
    )
    client.replace(third, won_there["ticket_number"], "Bicycle")
    client.redeem(second, won)
    assert client.get(f"{second}replacements/").json == []


def test_what_sold_out_keeps_its_time_when_others_close_by_theirs(client, monkeypatch):
    monkeypatch.setattr("storage.now", lambda: NOON)
    early = after(NOON, hours=1)
    sold_out = client.new_raffle(1, closes_at=after(NOON, hours=2))
    due, later = (client.new_raffle(closes_at=after(NOON, hours=hours)) for hours in (2, 4))
    by_hand = client.new_raffle()
    monkeypatch.setattr("storage.now", lambda: early)
    client.participate(sold_out)
    client.close(by_hand)

    monkeypatch.setattr("storage.now", lambda: after(NOON, hours=3))
    assert client.get(due).json["closed_at"] == after(NOON, hours=2)
    times = [client.get(path).json["closed_at"] for path in (sold_out, by_hand, later)]
    assert times == [early, early, None]


# Two groups in one commit


def test_groups_of_one_commit_do_not_disturb_each_other(client, database, in_one_commit):
    first, second, full = client.new_raffle(5), client.new_raffle(7), client.new_raffle(1)
    client.participate(full, "10.1.0.9")
    gone, none = client.new_raffle(), client.new_raffle()
    client.participate(second, "10.1.0.1")

    def ask(path, n):
        return partial(client.participate, path, f"10.1.0.{n}", "*")

    # The participants of a raffle that is deleted before are a group that fails as a whole.
    answers = in_one_commit(
        partial(client.delete_raffle, gone, "*"),
        ask(first, 1), ask(gone, 1), ask(second, 1), ask(second, 2), ask(gone, 2), ask(first, 2),
        partial(client.close, none, "*"), ask(first, 1), ask(second, 3),
    )  # fmt: skip

    statuses = [answer.status_int for answer in answers]
    assert statuses == [204, 201, 404, 403, 201, 404, 201, 200, 403, 201]
    for path, issued in ((first, 2), (second, 3), (full, 1), (none, 0)):
        assert client.get(path).json["issued_tickets"] == issued
        assert client.close(path, "*").status_int == (200 if path in (first, second) else 403)
    for path, indices in ((first, (1, 6)), (second, (4, 9))):
        client.draw(path)
        for index in indices:
            client.verify(path, answers[index].json)
    per_raffle = "SELECT raffle, count(*) FROM ticket GROUP BY raffle ORDER BY raffle"
    assert query(database, per_raffle) == [(1, 2), (2, 3), (3, 1)]


# Long and huge


@pytest.mark.parametrize("position", [15, 16, 31, 32, 63, 64, 127, 128, 200, 253, 254])
def test_every_character_of_an_idempotency_key_counts(client, position):
    path = client.new_raffle()
    key = "k" * 255
    ticket = client.participate(path, Idempotency_Key=key).json

    other = f"{key[:position]}K{key[position + 1 :]}"
    refused(client.participate(path, status=403, Idempotency_Key=other), "already-participated")
    shorter = key[: max(position, 16)]
    refused(client.participate(path, status=403, Idempotency_Key=shorter), "already-participated")
    assert client.participate(path, Idempotency_Key=key).json == ticket


GIBIBYTE = limited("-v", 2**20)  # of addresses, in KiB


def check_at(address, wrapper=(), **environment):
    """Run draw.py on an address; return its exit status and its lines."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-I", ROOT / "draw.py", address],
        capture_output=True,
        env=environment,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("amounts", [[MOST], [1, MOST - 2, 1], [1]], ids=["all", "some", "one"])
def test_a_prize_of_2_to_the_53_pens_takes_little_memory(serve, amounts):
    """It is drawn among three tickets, replaced if a ticket is left, and checked."""
    server = serve(wrapper=GIBIBYTE, RAFFLE_THREADS="4", processes=1)
    prizes = [{"name": f"Pen {n}", "amount": amount} for n, amount in enumerate(amounts)]
    path = server.create(MOST, prizes)
    tickets = [server.request("POST", f"{path}participate/", source=f"127.1.1.{n}")[2]
               for n in (1, 2, 3)]  # fmt: skip
    assert server.request("POST", f"{path}close/")[0] == 200
    status, _, wins = server.request("POST", f"{path}winners/", {"public_randomness": "7"})
    assert status == 201
    assert len(wins) == min(sum(amounts), 3)

    body = {"ticket_number": wins[0]["ticket_number"], "prize": "Pen 0", "reason": "declined"}
    status, _, answer = server.request("POST", f"{path}replacements/", body)
    assert status == (201 if len(wins) < 3 else 403), answer
    verdicts = [server.request("POST", f"{path}verify-ticket/", each)[2] for each in tickets]
    assert sum(verdict["has_won"] for verdict in verdicts) == len(wins)
    assert check_at(f"http://127.0.0.1:{server.port}{path}", GIBIBYTE)[0] == 0


def test_a_last_ticket_at_the_announced_time_is_in_time(client):
    path = client.new_raffle(1, closes_at=after(days=1))
    client.participate(path)
    wins = client.draw(path).json
    raffle = client.get(path).json
    dated = {**raffle, "closed_at": raffle["closes_at"], "drawn_at": after(days=2)}
    assert all(holds for _, holds in draw.check_draw(dated, wins))


def test_replacements_that_go_in_a_circle_are_followed_to_an_end(client, tmp_path):
    path, _ = client.new_sold_out(4)
    numbers = [win["ticket_number"] for win in client.draw(path).json]
    for _ in range(2):
        numbers.append(client.replace(path, numbers[-1], "Bicycle").json["ticket_number"])
    replacements = client.get(f"{path}replacements/").json
    replacements[1]["ticket_number"] = numbers[0]
    answers = {
        "raffle": client.get(path).json,
        "wins": client.get(f"{path}winners/").json,
        "replacements": replacements,
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(json.dumps(answer))

    done = subprocess.run(
        [*GIBIBYTE, sys.executable, "-I", ROOT / "draw.py", *answers],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILS  The wins follow from the secret" in done.stdout


def queued_bytes(server):
    """Return how many bytes of its clients the server has not yet read."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    port = f"{int(server.port):04X}"
    queued = 0
    for _, local, remote, state, queues, *_ in rows:
        unsent, unread = (int(queue, 16) for queue in queues.split(":"))
        if state != "0A" and local.endswith(f":{port}"):
            queued += unread
        elif remote.endswith(f":{port}"):
            queued += unsent
    return queued


@pytest.mark.parametrize(
    "head",
    ["Content-Length: 1048576\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n100000\r\n"],
    ids=["length", "chunks"],
)
def test_half_sent_bodies_take_little_memory(serve, head):
    server = serve(processes=1)
    half = f"POST /raffles/ HTTP/1.1\r\nHost: x\r\n{head}".encode() + bytes(500 * 1024)

    with ExitStack() as opened:

        def send_halves(number):
            for _ in range(number):
                opened.enter_context(server.connect()).sendall(half)
            wait_for(lambda: queued_bytes(server) == 0)

        send_halves(5)
        before = mebibytes(server)
        send_halves(100)
        # 50 MiB have been sent.
        assert mebibytes(server) - before < 15
        assert server.request("GET", "/health")[0] == 200


def test_under_a_hard_limit_of_400_files_all_are_served_in_turn(serve):
    """Each client holds a connection and a file for its body, so that not all fit."""
    server = serve(wrapper=limited("-n", 400), processes=1)
    path = server.create()
    body = bytes(70_000)
    head = f"POST {path}participate/ HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"

    with ExitStack() as opened:
        clients = [opened.enter_context(server.connect(f"127.2.0.{n}")) for n in range(1, 201)]
        for client in clients:
            client.sendall(head.encode() + body[1:])
        for client in clients:
            client.sendall(body[:1])
            assert client.recv(12) == b"HTTP/1.1 201"
            client.close()

    assert server.request("GET", path)[2]["issued_tickets"] == len(clients)
    assert not re.search("ERROR|Traceback|accept\\(\\) threw", server.log.read_text())


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({"SERVER_PROTOCOL": "HTTP/1.1", "HTTP_TRANSFER_ENCODING": "chunked"}, 400),
        ({"SERVER_PROTOCOL": "HTTP/2"}, 201),
    ],
    ids=["chunks", "HTTP/2"],
)
def test_an_empty_body_is_none_only_where_none_was_announced(client, environ, status):
    """Chunks that hold nothing were to hold something: a draw cannot be undone."""
    path, _ = client.new_sold_out()
    answer = post_environ(
        client, f"{path}winners/", b"", {**environ, "wsgi.input_terminated": True}
    )
    assert answer.status_int == status
    assert client.get(path).json["winners_drawn"] == (status == 201)


LONG_HEADERS = [
    "Cookie", "X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-IP", "Origin",
    "Sec-Fetch-Site", "Idempotency-Key", "Content-Type", "User-Agent", "Referer", "X",
]  # fmt: skip


@pytest.mark.parametrize("proxies", ["", "127.0.0.1"], ids=["no proxy", "trusted proxy"])
def test_a_header_of_30_kb_is_read_and_makes_no_long_log_line(serve, proxies):
    server = serve(RAFFLE_TRUSTED_PROXIES=proxies, processes=1)
    path = server.create() if not proxies else NO_RAFFLE
    for name in LONG_HEADERS:
        for size in (20_000, 30_000):
            line = f"{name}: ".encode().ljust(size, b"\x9b")
            for target in (path, f"{path}participate/", f"{path}winners/"):
                method = b"GET" if target == path else b"POST"
                start = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % (
                    method, target.encode()
                )  # fmt: skip
                answer = server.send(start + line + b"\r\n\r\n")
                assert re.match(rb"HTTP/1.1 (200|201|400|403|404|415) ", answer), (name, answer)
    with server.connect() as connection:
        connection.sendall(start + b"Cookie: " + b"x" * 40_000 + b"\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.0 431"

    lines = server.log.read_text().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) < 500


# Headers that others trust


CLAIMS = [
    "X-Forwarded-Host", "X-Forwarded-Server", "X-Host", "X-Original-Host", "X-HTTP-Host-Override",
    "Forwarded", "X-Original-URL", "X-Rewrite-URL",
]  # fmt: skip


@pytest.mark.parametrize("peer", ["10.7.7.7", "10.1.0.1"], ids=["trusted proxy", "stranger"])
@pytest.mark.parametrize("header", CLAIMS)
def test_no_header_but_the_host_names_the_host(database, monkeypatch, header, peer):
    monkeypatch.setenv("RAFFLE_HOSTS", "raffle.example")
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXIES", "10.7.7.7")
    with closing(create_app(database, MANAGER)) as app:
        client = Client(app)

        def status(host, claim, **headers):
            value = f"host={claim}" if header == "Forwarded" else claim
            sent = {"Host": host, header: value, "X_Forwarded_For": "10.1.0.2", **headers}
            target = f"{NO_RAFFLE}participate/"
            return client.send("POST", target, None, address=peer, **sent).status_int

        for host in ("evil.example", ".raffle.example", "raffle.example:80.", "raffle"):
            assert status(host, "raffle.example") == 421, host
        assert status("raffle.example", "evil.example") == 404
        # A page of another site cannot make itself the own one.
        assert status("raffle.example", "evil.example", Origin="https://evil.example") == 403
        assert status("raffle.example", "evil.example", Origin="https://raffle.example") == 404


@pytest.mark.parametrize(
    ("managers", "insiders", "outsiders"),
    [
        ("::ffff:0.0.0.0/96", ["10.0.0.1", "::ffff:192.0.2.1"], ["::1", "2001:db8::1"]),
        ("::ffff:128.0.0.0/97", ["192.0.2.1", "255.0.0.1"], ["10.0.0.1", "::1"]),
        ("10.0.0.7/32", ["10.0.0.7"], ["10.0.0.6", "10.0.0.8"]),
    ],
)
def test_a_network_of_mapped_addresses_is_one_of_ipv4(database, managers, insiders, outsiders):
    with closing(create_app(database, managers)) as app:
        send = partial(Client(app).send, "POST", "/raffles/", b"{")
        assert {send(address=each).status_int for each in insiders} == {400}
        assert {send(address=each).status_int for each in outsiders} == {403}


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_no_header_makes_another_method_of_a_request(client, header):
    path = client.new_raffle()
    client.send("GET", path, None, 200, **{header: "DELETE"})
    client.send("POST", path, None, 405, **{header: "DELETE"})
    client.get(path)


@pytest.mark.parametrize(
    ("peer", "forwarded", "named"),
    [
        ("10.7.7.7", "10.6.6.6, 10.0.0.1, 10.7.7.8", "10.0.0.1"),
        ("10.7.7.7", "[2001:DB8::1]:443", "2001:db8::1"),
        ("::ffff:10.7.7.7", "::ffff:10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", None, "10.0.0.1"),
    ],
)
def test_the_log_names_the_manager_and_not_the_proxy(
    database, monkeypatch, caplog, peer, forwarded, named
):
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXIES", "10.7.7.0/24")
    caplog.set_level(logging.INFO)
    with closing(create_app(database, ["10.0.0.1", "2001:db8::1"])) as app:
        client = Client(app)
        caplog.clear()
        headers = {"X_Forwarded_For": forwarded} if forwarded else {}
        send = partial(client.send, address=peer, **headers)

        body = {"name": "Fair", "total_tickets": 9, "prizes": ONE_PRIZE}
        path, other = (send("POST", "/raffles/", body, 201).json["id"] for _ in range(2))
        first = client.participate(f"/raffles/{path}/", "10.1.0.1").json
        second = client.participate(f"/raffles/{path}/", "10.1.0.2").json
        send("POST", f"/raffles/{path}/close/", None, 200)
        [win] = send("POST", f"/raffles/{path}/winners/", None, 201).json
        won, lost = (first, second) if win["ticket_number"] == first["ticket_number"] else (
            second, first
        )  # fmt: skip
        numbers = (won["ticket_number"], lost["ticket_number"])
        claim = {"ticket_number": numbers[0], "prize": "Bicycle", "reason": "ineligible"}
        send("POST", f"/raffles/{path}/replacements/", claim, 201)
        send("POST", f"/raffles/{path}/redeem/", lost, 201)
        send("DELETE", f"/raffles/{other.upper()}/", None, 204)

    assert caplog.messages == [
        f"Raffle {path} created by {named}",
        f"Raffle {other} created by {named}",
        f"Raffle {path} closed by {named}",
        f"Winners of raffle {path} drawn by {named}",
        f"Ticket {numbers[0]} of raffle {path} replaced by ticket {numbers[1]} (ineligible) "
        f"by {named}",
        f"The prize of ticket {numbers[1]} of raffle {path} redeemed by {named}",
        f"Raffle {other} deleted by {named}",
    ]


# Places and clocks


# As POSIX writes them, because not every machine knows the names of places.
ZONES = {"New York": "EST5EDT,M3.2.0,M11.1.0", "Tokyo": "JST-9"}


def after(text=None, **difference):
    """Return the time so much later than a time, or than now, as the server writes times."""
    start = datetime.strptime(text, TIME_FORM) if text else datetime.now(timezone.utc)
    return (start + timedelta(**difference)).strftime(TIME_FORM)


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
def test_a_check_knows_the_time_wherever_it_runs(client, tmp_path, zone):
    path, _ = client.new_sold_out()
    wins = client.draw(path).json
    raffle = client.get(path).json
    (tmp_path / "wins").write_text(json.dumps(wins))

    for difference, is_early in ((-60, False), (3600, True)):
        dated = {**raffle, "created_at": after(days=-2), "closed_at": after(days=-1)}
        dated["drawn_at"] = after(seconds=difference)
        (tmp_path / "raffle").write_text(json.dumps(dated))
        done = subprocess.run(
            [sys.executable, "-S", ROOT / "draw.py", "raffle", "wins"],
            cwd=tmp_path, env={"TZ": zone}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert ("one of them is wrong" in done.stdout) == is_early, done.stdout
        if is_early:
            # By the clock, not by the place.
            shown = re.search(r"clock shows (\S+Z):", done.stdout)[1]
            assert after(seconds=-60) <= shown <= after(seconds=1)


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
def test_a_server_knows_the_time_wherever_it_runs(serve, zone):
    server = serve(TZ=zone)
    began = after()
    closes_at = after(hours=1)
    body = {"name": "Fair", "total_tickets": 9, "prizes": ONE_PRIZE, "closes_at": closes_at}
    status, _, raffle = server.request("POST", "/raffles/", body)
    assert (status, raffle["closes_at"]) == (201, closes_at)
    assert began <= raffle["created_at"] <= after()
    for wrong in (after(hours=-1), after(days=366, hours=1)):
        assert server.request("POST", "/raffles/", {**body, "closes_at": wrong})[0] == 400, wrong

    # It is still open, and one that nobody closed by hand.
    path = f"/raffles/{raffle['id']}/"
    assert server.request("GET", path)[2]["closed_at"] is None
    status, _, problem = server.request("POST", f"{path}close/")
    assert problem["type"] == "urn:raffle:closes-by-itself"


@contextmanager
def below(server, prefix):
    """Forward GET requests below a path to a server; yield the port."""

    class Forwarder(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = self.path[len(prefix) :] if self.path.startswith(prefix) else "/nothing/"
            status, headers, value = server.request("GET", path)
            self.send_response(status)
            self.send_header("Link", headers.get("Link", ""))
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *arguments):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forwarder) as forwarder:
        threading.Thread(target=forwarder.serve_forever, args=(0.01,)).start()
        try:
            yield forwarder.server_address[1]
        finally:
            forwarder.shutdown()
    assert [path for path in asked if not path.startswith(f"{prefix}/raffles/")] == []


@pytest.mark.parametrize("prefix", ["/fair", "/raffles/2026", "/Raffles/a%20b"])
def test_a_raffle_below_a_path_is_checked_at_its_address(serve, prefix):
    server = serve(program=(FAULTS, "storage.MAX_WINS_PER_PAGE=2"))
    path, _ = server.create_sold_out(5, [{"name": "Pen", "amount": 4}])
    status, _, wins = server.request("POST", f"{path}winners/", {"public_randomness": "7"})
    assert (status, len(wins)) == (201, 2)
    body = {"ticket_number": wins[0]["ticket_number"], "prize": "Pen", "reason": "unclaimed"}
    assert server.request("POST", f"{path}replacements/", body)[0] == 201

    with below(server, prefix) as port:
        for spelled in (path, f"{path}winners/?limit=1", path.rstrip("/")):
            assert check_at(f"http://127.0.0.1:{port}{prefix}{spelled}")[0] == 0, spelled


def test_a_draw_without_tickets_is_checked_at_its_address(serve):
    server = serve()
    path = server.create()
    assert server.request("POST", f"{path}close/")[0] == 200
    assert server.request("POST", f"{path}winners/")[2] == []

    status, lines = check_at(f"http://127.0.0.1:{server.port}{path}")
    assert status == 0
    assert [line for line in lines if line.startswith("FAILS")] == []
    assert "- that issued_tickets was 0 when the raffle was closed" in lines


# Log lines


def test_a_read_that_fails_is_503_and_is_logged(serve, database):
    server = serve(processes=1)
    path = server.create()
    # All is in the file itself, where another program spoils every page but the first.
    assert query(database, "PRAGMA wal_checkpoint(TRUNCATE)") == [(0, 0, 0)]
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (database.stat().st_size - 4096))

    status, headers, problem = server.request("GET", path)
    assert (status, problem["title"], headers["Retry-After"]) == (503, "Service Unavailable", "5")
    assert "malformed" not in problem["detail"]
    line = " ERROR The database cannot be read: database disk image is malformed\n"
    assert server.log.read_text().count(line) == 1


def test_a_normal_day_under_load_leaves_no_warning(serve):
    """More ask than there are threads, each line is one of these, and the other is no other."""
    server = serve(RAFFLE_THREADS="1", processes=1)
    path, crowd = server.create(200), Crowd(24)
    with crowd.asking(server, path):
        crowd.wait_for(lambda: crowd.statuses[410])
    assert server.request("POST", f"{path}winners/")[0] == 201
    assert server.stop() == 0

    said = [line.partition(" INFO ")[2] for line in server.log.read_text().splitlines()]
    assert re.fullmatch(
        f"Settings: .+\nRaffle {raffle_id(path)} created by 127.0.0.1\n"
        f"Winners of raffle {raffle_id(path)} drawn by 127.0.0.1",
        "\n".join(said),
    )


# Clients that stall, and processes that do


def test_a_clock_that_is_put_back_gives_nobody_more_time(serve):
    program = (FAULTS, "server.STALL_TIMEOUT=600", "put_clock_back")
    server = serve(program=program, processes=1)
    with server.connect() as idle, server.connect() as head, server.connect() as body:
        head.sendall(HALF_HEAD)
        body.sendall(HALF_BODY)
        assert [client.recv(1) for client in (idle, head, body)] == [b""] * 3


def test_as_many_processes_serve_as_are_set(serve):
    assert len(children(serve(processes=3))) == 3


def test_a_process_that_does_not_stop_is_killed(serve):
    server = serve(program=(FAULTS, "server.KILL_TIMEOUT=0.5", "never_stop"), processes=2)
    pids = children(server)
    assert server.stop() == 0
    for pid in pids:
        assert not is_alive(pid)
        assert server.log.read_text().count(f"Process {pid} does not stop, and is killed") >= 1


def test_a_process_that_was_suspended_stops_with_the_others(serve):
    server = serve(processes=2)
    suspended, _ = children(server)
    os.kill(suspended, signal.SIGSTOP)
    assert server.stop() == 0
    assert not is_alive(suspended)
    assert "is killed" not in server.log.read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_stops_refuses_newcomers_and_answers_others(serve, database, processes):
    limits = ["server.STOP_TIMEOUT=600", "server.KILL_TIMEOUT=600", "database.BUSY_TIMEOUT=600"]
    server = serve(program=(FAULTS, *limits), processes=processes)
    path = server.create()

    def is_refused():
        try:
            server.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with server.connect() as waiting:
            waiting.sendall(f"POST {path}participate/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            server.process.terminate()
            try:
                wait_for(is_refused)
                assert server.process.poll() is None
            finally:
                other.execute("ROLLBACK")
            assert waiting.recv(12) == b"HTTP/1.1 201"
    assert server.process.wait(30) == 0


def test_a_process_that_dies_is_not_replaced_at_once(serve):
    """Or one that dies at each start would keep a core busy."""
    server = serve(program=(FAULTS, "server.RESTART_INTERVAL=600"), processes=2)
    for pid in children(server):
        os.kill(pid, signal.SIGKILL)
        line = f"Process {pid} ended with status -9, and is replaced"
        wait_for(lambda line=line: line in server.log.read_text())
    assert children(server) == []
    assert server.stop() == 0


def test_the_greeting_does_not_wait_for_more(serve, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    for processes in (1, 2):
        assert serve(processes=processes).greeting.startswith("Listening on http://127.0.0.1:")


# The second start


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("starts", [1, 2])
def test_each_start_sets_how_the_file_is_written(database, starts, processes):
    for _ in range(starts - 1):
        Database(database, SCHEMA).close()
    values = {"synchronous": 2, "secure_delete": 1, "foreign_keys": 1, "temp_store": 2}
    # Several processes have the memory of one.
    values["cache_size"] = -128 * 1024 // processes
    with closing(Database(database, SCHEMA, Share(processes, None))) as opened:
        for name, value in values.items():
            assert [tuple(row) for row in opened.execute(f"PRAGMA {name}")] == [(value,)], name


def test_after_a_second_start_all_is_synced_before_it_is_answered(serve, tmp_path):
    server = serve(processes=1)
    path, sold = server.create_sold_out(9)
    unused, closing_path = server.create(), server.create()
    tickets = {ticket["ticket_number"]: ticket for _, ticket in sold}
    assert server.stop() == 0

    trace = tmp_path / "trace"
    strace = [installed("strace"), "-D", "-f", "-y", "-o", str(trace)]
    strace += ["-e", "trace=fsync,fdatasync,sendto", "-e", "signal=none"]
    server = serve(wrapper=strace, processes=1)

    def change(method, target, body=None):
        status, _, answer = server.request(method, target, body)
        assert status in (200, 201, 204), (target, answer)
        return answer

    # What comes before the first of these is the start.
    change("GET", path)
    change("POST", f"{closing_path}participate/")
    change("POST", f"{closing_path}close/")
    [win] = change("POST", f"{path}winners/")
    claim = {"ticket_number": win["ticket_number"], "prize": "Bicycle", "reason": "unclaimed"}
    new = change("POST", f"{path}replacements/", claim)["ticket_number"]
    change("POST", f"{path}redeem/", tickets[new])
    change("DELETE", unused)
    server.create()
    server.stop()

    _, *changes, _ = re.split(r'sendto\([^"]*"HTTP/1.1 20. .*', trace.read_text())
    assert len(changes) == 7
    for between in changes:
        assert re.search(r"sync\(\d+<.*/raffle.db-wal>\) += 0", between)


@pytest.mark.parametrize("starts", [1, 2])
def test_what_is_deleted_is_overwritten(serve, database, starts):
    name = "A name that nobody has to read again"
    server = serve(processes=1)
    kept, [(_, ticket)] = server.create_sold_out(1)
    for _ in range(starts - 1):
        assert server.stop() == 0
        server = serve(processes=1)
    deleted = server.create(prizes=[{"name": name, "amount": 1}])
    query(database, "PRAGMA wal_checkpoint(TRUNCATE)")
    [(key, _)] = query(database, "SELECT address_key, max(sequence) FROM raffle WHERE closed_at")
    assert key in database.read_bytes()
    assert name.encode() in database.read_bytes()

    assert server.request("POST", f"{kept}winners/")[0] == 201
    assert server.request("DELETE", deleted)[0] == 204
    assert server.stop() == 0
    assert key not in database.read_bytes()
    assert name.encode() not in database.read_bytes()
    assert ticket["verification_code"].encode() not in database.read_bytes()


@pytest.mark.parametrize("starts", [1, 2])
def test_no_raffle_is_deleted_from_under_its_tickets(database, starts):
    """As little as the rule, the database lets a ticket lose its raffle."""
    for _ in range(starts - 1):
        create_app(database, MANAGER).close()
    with closing(create_app(database, MANAGER)) as app:
        client = Client(app)
        path = client.new_raffle()
        # By another program, which does not count it.
        execute(
            database,
            """
            INSERT INTO ticket (raffle, number, participant_hash, salt, iterations, code_hash)
            VALUES (1, 1, zeroblob(16), zeroblob(16), 1000, zeroblob(32))
            """,
        )
        client.delete_raffle(path, 500)
        assert client.get(path).json["prizes"] == ONE_PRIZE


# Writes that fail


def test_what_writes_nothing_does_not_show_that_the_disk_has_room(database, caplog):
    with closing(Database(database, SCHEMA)) as opened:
        [(pages,)] = opened.execute("PRAGMA page_count")
        opened.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                opened.write(add, None, "x" * 10_000)
            opened.execute("SELECT value FROM item")
        assert caplog.messages == ["Writes fail: database or disk is full"]

        opened.execute(f"PRAGMA max_page_count = {pages + 9}")
        opened.write(add, None, "x" * 10_000)
    assert caplog.messages[1:] == ["Writes succeed again"]


def test_who_has_waited_for_a_turn_waits_less_for_a_lock(database, monkeypatch):
    statements = []

    def trace(connection, group, requests):
        connection.set_trace_callback(statements.append)
        return requests

    with closing(Database(database, SCHEMA)) as opened:
        opened.write(trace, None)
        # Each look at this clock finds three of the five seconds gone.
        monkeypatch.setattr("time.monotonic", partial(next, count(0, 3)))
        opened.write(add, None, 1)
        monkeypatch.undo()
    *_, before, begin, behind = [
        each for each in statements if "busy_timeout" in each or "BEGIN" in each
    ]
    assert (before, begin) == ("PRAGMA busy_timeout = 2000", "BEGIN IMMEDIATE")
    assert behind == "PRAGMA busy_timeout = 5000"


# The order of refusals where two apply


def test_of_two_refusals_the_first_in_the_readme_is_made(client, monkeypatch):
    tickets_of, prizes = {}, [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 1}]

    def new_drawn(total_tickets):
        path, tickets = client.new_sold_out(total_tickets, prizes)
        tickets_of[path] = drawn_by(client, path, tickets)
        return path

    opened = client.new_raffle()
    client.participate(opened)
    timed = client.new_raffle(1, closes_at=after(days=1))
    client.participate(timed)
    plain = {"Content_Type": "text/plain"}
    long_ticket, long_body = b"x" * 4097, b"x" * (2**20 + 1)

    drawn, all_drawn = new_drawn(4), new_drawn(2)
    won, *_, lost = tickets_of[drawn]
    client.redeem(drawn, won)
    winner, other = tickets_of[all_drawn]
    client.redeem(all_drawn, winner)
    replaced_path = new_drawn(3)
    replaced = tickets_of[replaced_path][0]
    client.replace(replaced_path, replaced["ticket_number"], "Bicycle")
    wrong = {"verification_code": "x"}

    def claim(ticket, prize):
        return {"ticket_number": ticket["ticket_number"], "prize": prize, "reason": "declined"}

    def post(path, action, body=None, address=MANAGER, **headers):
        return client.send("POST", f"{path}{action}/", body, address=address, **headers)

    chunked = {"Transfer_Encoding": "chunked"}
    for number, (answer, status, rule) in enumerate((
        # A host or a page before the sender, the sender before the raffle.
        (post(NO_RAFFLE, "close", None, STRANGER, Origin="null"), 403, "cross-origin"),
        (post(NO_RAFFLE, "participate", Idempotency_Key="x", Origin="null"), 403, "cross-origin"),
        (client.delete_raffle(NO_RAFFLE, "*", STRANGER), 403, "not-a-manager"),
        (client.delete_raffle(opened, "*", STRANGER), 403, "not-a-manager"),
        *(
            (post(path, action, body, STRANGER, **headers), 403, "not-a-manager")
            for path in (NO_RAFFLE, opened, drawn)
            for action in ("close", "winners", "redeem", "replacements")
            for body, headers in ((None, {}), (b"{", plain), (long_ticket, {}), (None, chunked))
        ),
        (post("", "/raffles", None, STRANGER, **chunked), 403, "not-a-manager"),
        # The length before the type, the type before too long, too long before malformed.
        *(
            (post(path, action, None, **chunked, **plain), 411, None)
            for path, action in (
                ("", "/raffles"), (NO_RAFFLE, "winners"), (NO_RAFFLE, "verify-ticket"),
                (NO_RAFFLE, "redeem"), (NO_RAFFLE, "replacements"),
            )
        ),
        *(
            (post(path, action, body, **headers), status, None)
            for path in (NO_RAFFLE, opened, drawn)
            for action, long in (
                ("winners", long_body), ("verify-ticket", long_ticket), ("redeem", long_ticket),
                ("replacements", long_ticket),
            )
            for body, headers, status in (
                (long, plain, 415), (long, {}, 413), (b"{", plain, 415), (b"{", {}, 400),
                (b'{"ticket_number": 0, "public_randomness": " "}', {}, 400),
            )
        ),
        # Malformed before no such raffle, and that before its state.
        (post(NO_RAFFLE, "participate", Idempotency_Key="x"), 400, None),
        (post(timed, "participate", Idempotency_Key="x"), 400, None),
        (post(opened, "participate", address="10.1.0.1", Idempotency_Key="x"), 400, None),
        (post(timed, "participate", address="10.1.0.1"), 410, "no-tickets-left"),
        (post(drawn, "participate", address="10.2.0.0"), 410, "no-tickets-left"),
        (post(timed, "close"), 403, "already-closed"),
        (post(opened, "verify-ticket", {**won, **wrong}), 400, "not-drawn"),
        (post(opened, "redeem", {**won, **wrong}), 400, "not-drawn"),
        (post(opened, "replacements", claim(won, "Pen")), 400, "not-drawn"),
        # A wrong code learns nothing, neither that a ticket lost nor that its prize is gone.
        (post(drawn, "redeem", {**won, **wrong}), 400, "invalid-code"),
        (post(drawn, "redeem", {**lost, **wrong}), 400, "invalid-code"),
        (post(replaced_path, "redeem", {**replaced, **wrong}), 400, "invalid-code"),
        (post(replaced_path, "redeem", replaced), 403, "no-prize"),
        # Of a replacement: the prize, then whether it was redeemed, then whether tickets are left.
        (post(drawn, "replacements", claim(won, "Book")), 403, "no-prize"),
        (post(drawn, "replacements", claim(lost, "Book")), 403, "no-prize"),
        (post(all_drawn, "replacements", claim(winner, "Book")), 403, "no-prize"),
        (post(all_drawn, "replacements", claim(winner, "Bicycle")), 403, "already-redeemed"),
        (post(all_drawn, "replacements", claim(other, "Bicycle")), 403, "no-prize"),
        (post(all_drawn, "replacements", claim(other, "Book")), 403, "no-tickets-left-to-draw"),
        (post(replaced_path, "replacements", claim(replaced, "Bicycle")), 403, "no-prize"),
        (post(drawn, "winners"), 403, "already-drawn"),
    )):  # fmt: skip
        assert answer.status_int == status, (number, answer)
        refused(answer, rule)


def test_a_host_that_is_not_served_is_told_so_first(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_HOSTS", "raffle.example")
    with closing(create_app(database, MANAGER)) as app:
        send = partial(Client(app).send, Host="evil.example", Origin="null")
        for method, path in (("POST", "/raffles/"), ("DELETE", NO_RAFFLE), ("PUT", "/nothing/")):
            refused(send(method, path, b"{", 421, STRANGER), None)
        refused(send("POST", "/health/", None, 403), "cross-origin")
