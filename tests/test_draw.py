"""Anyone can check a draw: with draw.py, or with a program written from the recipe in its docstring alone."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
from array import array
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import isgenerator
from itertools import cycle, islice, repeat
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from helpers import ROOT, assert_problem, at_once, fill

import draw
import storage

RAFFLE_ID = "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21"
SECRET = bytes(range(32))
VECTORS = [
    (
        [int(number) for number in issued.split(", ")] if issued else range(1, int(total) + 1),
        [(name, int(amount)) for amount, name in re.findall(r"(\d+) ([^,;]+)", prizes)],
        *rest,
    )
    for total, issued, prizes, *rest in re.findall(
        r'(\d+) tickets(?:, of which (.+) were issued)?; (.+); "(.+)".*\n'
        r" +winners: ([\d, ]+)\n +wins_sha256: ([0-9a-f]{64})\n(?: +tickets_sha256: ([0-9a-f]{64})\n)?",
        draw.__doc__,
    )
]
# Twelve of twelve: the chance that another draw comes out the same is less than 1e-8.
PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 5}, {"name": "Größe", "amount": 6}]
SENTENCES = {
    "algorithm": "The draw was made by raffle-draw-1",
    "secret": "The secret is the committed one",
    "wins": "The wins follow from the secret and the public randomness",
    "digest": "The wins have the digest of the receipt",
    "order": "The raffle was created, closed and drawn in this order",
}
OF_RAFFLE = "The receipt agrees with the raffle"
NESTED = b"[" * 200_000
WINS = int(os.environ.get("RAFFLE_TEST_WINS", "100000"))
CHUNKED = "Transfer-Encoding: chunked"


# The draw


def recipe(raffle_id, secret, public_randomness, tickets, prizes, mistake=None):
    """Follow the docstring's steps, with none of the program's code: return the wins and wins_sha256."""
    if mistake == "normalization":
        public_randomness = unicodedata.normalize("NFC", public_randomness)
    key = hashlib.sha256(b"raffle-draw-1" + raffle_id.encode() + secret + public_randomness.encode()).digest()
    words, counter = [], 0
    cells, last = {}, len(tickets)
    wins = []
    for name, amount in prizes:
        for _ in range(amount):
            while True:
                if not words:
                    order = "little" if mistake == "little-endian counter" else "big"
                    digest = hashlib.sha256(key + counter.to_bytes(8, order)).digest()
                    words = [int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16, 24)]
                    counter += mistake != "the first digest again"
                word = words.pop(0)
                if word < 2**64 // last * last or mistake == "no rejection":
                    break
            if mistake == "words of 53 bits":
                word = int(float(word))
            cell = word % last + 1
            rank = cells.get(cell, cell)
            wins.append((rank if mistake == "cells as numbers" else tickets[rank - 1], name))
            cells[cell] = last if mistake == "a moved number is not moved again" else cells.get(last, last)
            last -= 1
    lines = "".join(
        f"{number} {len(name if mistake == 'length in characters' else name.encode())} {name}\n"
        for number, name in wins
    )
    return wins, hashlib.sha256(lines.encode()).hexdigest()


def program(raffle_id, secret, public_randomness, tickets, prizes):
    """Do the same with the program's code."""
    amount = sum(amount for _, amount in prizes)
    numbers = draw.winning_numbers(raffle_id, secret, public_randomness, tickets, amount)
    wins = list(zip(numbers, draw.prize_of_each_win(prizes)))
    return wins, draw.digest_of_wins(wins)


@pytest.mark.parametrize("make", [recipe, program])
def test_the_vectors_are_drawn(make):
    assert len(VECTORS) == 5
    assert RAFFLE_ID in draw.__doc__
    for tickets, prizes, public_randomness, numbers, digest, tickets_sha256 in VECTORS:
        wins, found = make(RAFFLE_ID, SECRET, public_randomness, tickets, prizes)
        assert ", ".join(str(number) for number, _ in wins) == numbers
        assert found == digest
        assert not tickets_sha256 or draw.digest_of_tickets(tickets) == tickets_sha256


@pytest.mark.parametrize(
    "mistake",
    [
        "normalization",
        "little-endian counter",
        "the first digest again",
        "no rejection",
        "words of 53 bits",
        "cells as numbers",
        "a moved number is not moved again",
        "length in characters",
    ],
)
def test_a_usual_mistake_in_a_port_is_found_by_a_vector(mistake):
    found = [
        recipe(RAFFLE_ID, SECRET, public_randomness, tickets, prizes, mistake)[1] != digest
        for tickets, prizes, public_randomness, _, digest, _ in VECTORS
    ]
    assert any(found)


def test_the_recipe_and_the_program_draw_the_same():
    for n in range(200):
        inputs = (
            RAFFLE_ID,
            hashlib.sha256(b"%d" % n).digest(),
            f"{n} é",
            range(1, n + 4),
            [("Pen", 1), ("Größe", n + 1)],
        )
        assert recipe(*inputs) == program(*inputs)


@pytest.mark.parametrize("last", [1, 2, 3, 10, 2**32, 2**32 + 1, 2**53 - 1])
def test_the_words_from_the_largest_multiple_on_are_discarded_and_no_others(last):
    multiple = 2**64 // last * last
    assert draw.uniform(iter([multiple - 1]), last) == last
    for word in [word for word in (multiple, 2**64 - 1) if multiple <= word < 2**64]:
        assert draw.uniform(iter([word, word, 1]), last) == 2


def test_every_input_changes_the_draw():
    usual = (RAFFLE_ID, SECRET, "x", range(1, 2**40 + 1), [("Pen", 3)])
    changed = [
        (RAFFLE_ID.replace("9", "8", 1), *usual[1:]),
        (RAFFLE_ID, bytes([1, *SECRET[1:]]), *usual[2:]),
        (*usual[:2], "y", *usual[3:]),
        (*usual[:2], "x ", *usual[3:]),
        (*usual[:3], range(1, 2**40 + 2), usual[4]),
    ]
    draws = [[number for number, _ in program(*inputs)[0]] for inputs in (usual, *changed)]
    assert len({tuple(numbers) for numbers in draws}) == len(draws)


# The receipt, and what the draw is made with


@pytest.fixture
def drawn(client):
    """A raffle that has been drawn with public randomness: its path, its receipt and its wins."""
    path = client.new_sold_out(12, PRIZES)
    wins = client.draw(path, body={"public_randomness": "7 13 21"}).json
    return path, client.get(f"{path}draw/").json, wins


def assert_holds(receipt, wins):
    assert all(holds for _, holds in draw.check_draw(receipt, wins))


def test_the_receipt_has_all_that_the_check_needs_and_nothing_of_the_participants(client, drawn):
    path, receipt, wins = drawn
    raffle = client.get(path).json
    secret = bytes.fromhex(receipt["secret"])
    prizes = [(prize["name"], prize["amount"]) for prize in PRIZES]
    expected, digest = recipe(raffle["id"], secret, "7 13 21", range(1, 13), prizes)
    assert list(receipt.items()) == [
        ("algorithm", "raffle-draw-1"),
        ("raffle_id", raffle["id"]),
        ("total_tickets", 12),
        ("prizes", PRIZES),
        ("created_at", raffle["created_at"]),
        ("randomness_source", None),
        ("draw_commitment", raffle["draw_commitment"]),
        ("issued_tickets", 12),
        ("closed_at", raffle["closed_at"]),
        ("tickets_sha256", None),
        ("secret", secret.hex()),
        ("public_randomness", "7 13 21"),
        ("drawn_at", receipt["drawn_at"]),
        ("wins_sha256", digest),
    ]
    assert hashlib.sha256(secret).hexdigest() == raffle["draw_commitment"]
    assert receipt["created_at"] <= receipt["closed_at"] <= receipt["drawn_at"]
    assert [(win["ticket_number"], win["prize"]) for win in wins] == expected


def test_nobody_sees_the_secret_before_the_draw(client):
    path = client.new_raffle(total_tickets=1)
    seen = []
    for step in (client.sell_out, client.draw):
        refused = client.get(f"{path}draw/", status=404)
        assert_problem(refused, "Winners for the raffle have not been drawn yet")
        seen += [refused, client.get(path), client.get("/raffles/"), client.get(f"{path}winners/")]
        step(path)
    secret = client.get(f"{path}draw/").json["secret"]
    assert not any(secret in response.text for response in seen)


def test_without_public_randomness_the_server_makes_some(client):
    made = set()
    for headers in ({}, {"Content_Type": "application/json"}, {"Content_Type": "text/plain", "Content_Length": "00"}):
        path = client.new_sold_out()
        client.request_from("10.0.0.1", "POST", f"{path}winners/", status=201, **headers)
        made.add(client.get(f"{path}draw/").json["public_randomness"])
    assert len(made) == 3
    assert all(re.fullmatch("made by the server: [0-9a-f]{64}", randomness) for randomness in made)


@pytest.mark.parametrize("randomness", ["x", " x ", "x" * 1000, "🎲" * 1000, "a\0b\n"])
def test_public_randomness_is_any_text_of_1_to_1000_characters(client, randomness):
    path = client.new_sold_out()
    wins = client.draw(path, body={"public_randomness": randomness}).json
    receipt = client.get(f"{path}draw/").json
    assert receipt["public_randomness"] == randomness
    assert_holds(receipt, wins)


@pytest.mark.parametrize(
    ("body", "status", "headers"),
    [(body, 400, {}) for body in ({}, {"publicRandomness": "x"}, b"x", b"[]", b" ")]
    + [({"public_randomness": value}, 400, {}) for value in (None, "", "x" * 1001, 7, True, ["x"], {}, "\ud800")]
    + [
        (b'{"public_randomness": "x"}', 415, {"Content_Type": "text/plain"}),
        (b" " * (2**20 + 1), 413, {}),
        # As a server passes it on that does not put chunks together.
        (b"", 400, {"Transfer_Encoding": "chunked"}),
    ],
)
def test_a_body_without_valid_public_randomness_draws_nothing(client, body, status, headers):
    path = client.new_sold_out()
    assert_problem(client.request_from("10.0.0.1", "POST", f"{path}winners/", body, status, **headers))
    assert client.get(path).json["winners_drawn"] is False


def test_a_clock_that_is_put_back_does_not_spoil_the_draw(client, monkeypatch):
    path = client.new_sold_out()
    monkeypatch.setattr(storage, "_now", lambda: "2000-01-01T00:00:00Z")
    wins = client.draw(path).json
    assert_holds(client.get(f"{path}draw/").json, wins)


def test_of_draws_at_once_the_receipt_is_of_the_one_that_counts(serve, database):
    path = fill(database, 1_000, [{"name": "Pen", "amount": 100}])
    server = serve()
    bodies = [{"public_randomness": f"round {n}"} for n in range(8)]
    answers = at_once([partial(server.request, "POST", f"{path}winners/", body) for body in bodies])
    [(body, wins)] = [(body, wins) for body, (status, _, wins) in zip(bodies, answers) if status == 201]
    receipt = server.request("GET", f"{path}draw/")[2]
    assert receipt["public_randomness"] == body["public_randomness"]
    assert_holds(receipt, wins)
    assert server.list_wins(path) == wins


# The check


def test_a_true_draw_holds(drawn):
    _, receipt, wins = drawn
    assert draw.check_draw(receipt, iter(wins)) == [(sentence, True) for sentence in SENTENCES.values()]


def flip(members, name):
    """Change the last bit of a number, or of the hexadecimal digit that ends a text."""
    value = members[name]
    members[name] = value ^ 1 if isinstance(value, int) else f"{value[:-1]}{int(value[-1], 16) ^ 1:x}"


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda receipt, wins: flip(receipt, "algorithm"), {"algorithm"}),
        (lambda receipt, wins: flip(receipt, "raffle_id"), {"wins"}),
        (lambda receipt, wins: receipt.update(total_tickets=13, issued_tickets=13), {"wins"}),
        (lambda receipt, wins: flip(receipt["prizes"][0], "name"), {"wins"}),
        (lambda receipt, wins: flip(receipt["prizes"][1], "amount"), {"wins"}),
        (lambda receipt, wins: receipt["prizes"].reverse(), {"wins"}),
        (lambda receipt, wins: receipt["prizes"].pop(), {"wins"}),
        (lambda receipt, wins: flip(receipt, "draw_commitment"), {"secret"}),
        (lambda receipt, wins: flip(receipt, "secret"), {"secret", "wins"}),
        (lambda receipt, wins: flip(receipt, "public_randomness"), {"wins"}),
        (lambda receipt, wins: flip(receipt, "wins_sha256"), {"digest"}),
        (lambda receipt, wins: receipt.update(closed_at="9999-01-01T00:00:00Z"), {"order"}),
        (lambda receipt, wins: receipt.update(drawn_at="2000-01-01T00:00:00Z"), {"order"}),
        (lambda receipt, wins: receipt.update(drawn_at="9999-01-01T00:00:00Z"), {"order"}),
        (lambda receipt, wins: receipt.update(created_at="9999-01-01T00:00:00Z"), {"order"}),
        (lambda receipt, wins: flip(wins[0], "ticket_number"), {"wins", "digest"}),
        (lambda receipt, wins: flip(wins[11], "prize"), {"wins", "digest"}),
        (lambda receipt, wins: wins.append(wins[0]), {"wins", "digest"}),
        (lambda receipt, wins: wins.reverse(), {"wins", "digest"}),
    ],
)
def test_one_change_makes_exactly_the_sentences_fail_that_it_breaks(drawn, change, failing):
    _, receipt, wins = copy.deepcopy(drawn)
    change(receipt, wins)
    results = draw.check_draw(receipt, wins)
    assert {name for name, (_, holds) in zip(SENTENCES, results) if not holds} == failing


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("algorithm", [...]),
        ("total_tickets", [..., 11, 2**65, 12.0, True, "12", None]),
        ("prizes", [..., [], {}, "x", [["Pen", 1]], [{"amount": 1}], [{"name": "Pen"}], None]),
        ("prizes", [[{"name": "Pen", "amount": amount}] for amount in (0, 1.0, True, "1", 13, 2**53)]),
        ("prizes", [[{"name": "Pen", "amount": 13}, {"name": "Pen", "amount": -1}]]),
        ("secret", [..., "", "AB" * 32, "ab" * 31, "ab" * 33, 7]),
        ("draw_commitment", [..., "\x1b[2J" + "ab" * 30, "ab" * 32 + "\n", None]),
        ("raffle_id", [..., "nonsense", RAFFLE_ID.upper(), f"{RAFFLE_ID}0", 7]),
        ("public_randomness", [..., "", "x" * 1001, "\ud800", 7, None]),
        ("created_at", [..., "0", "2026-07-04", None]),
        ("closed_at", [..., "0", "2026-07-04", None]),
        ("issued_tickets", [..., -1, 13, 12.0, True, None]),
        ("drawn_at", [..., "whenever", "٢٠٢٦-07-04T12:00:00Z", None]),
        ("wins_sha256", [...]),
    ],
)
def test_a_receipt_of_a_wrong_form_is_not_checked(drawn, member, values):
    _, receipt, wins = drawn
    for value in values:
        wrong = {**receipt, member: value}
        if value is ...:
            del wrong[member]
        with pytest.raises((KeyError, TypeError, ValueError)):
            draw.check_draw(wrong, wins)


@pytest.mark.parametrize(
    "win",
    [{"ticket_number": number, "prize": "Bicycle"} for number in (True, 1.0, float("inf"), "1", None)]
    + [{"ticket_number": 1, "prize": prize} for prize in (1, None, ["Bicycle"], "\ud800")]
    + [{}, {"ticket_number": 1}, {"prize": "Bicycle"}, [1, "Bicycle"], "x", 1, None],
)
def test_a_win_of_a_wrong_form_is_not_checked(drawn, win):
    _, receipt, wins = drawn
    for listed in ([win, *wins[1:]], [*wins, win]):
        with pytest.raises((KeyError, TypeError, ValueError)):
            draw.check_draw(receipt, listed)


@pytest.fixture
def drawn_early(client):
    """The receipt, the wins and the tickets of a raffle that was closed before it was sold out."""
    path = client.new_raffle(1000, PRIZES)
    for n in range(20):
        client.participate(path, f"10.2.0.{n}")
    client.close(path)
    client.draw(path, body={"public_randomness": "7 13 21"})
    return [client.get(f"{path}{of}/").json for of in ("draw", "winners", "tickets")]


@pytest.mark.parametrize(
    "change",
    [
        lambda tickets: tickets.append(1001),
        lambda tickets: tickets.reverse(),
        lambda tickets: tickets.insert(1, tickets.pop(0)),
        lambda tickets: tickets.__setitem__(1, tickets[0]),
        lambda tickets: tickets.__setitem__(0, 0),
        lambda tickets: tickets.__setitem__(-1, 1001),
        lambda tickets: tickets.insert(0, 0),
        lambda tickets: tickets.__setitem__(0, next(n for n in range(1, 1000) if n not in tickets)),
    ],
)
@pytest.mark.parametrize("as_published", [False, True])
def test_a_list_of_tickets_that_is_not_the_one_that_was_closed_does_not_hold(drawn_early, change, as_published):
    receipt, wins, tickets = drawn_early
    assert all(holds for _, holds in draw.check_draw(receipt, wins, tickets))
    other = list(tickets)
    change(other)
    if as_published and sorted({*other}) != other:
        # Not even if the receipt says so.
        receipt["tickets_sha256"] = draw.digest_of_tickets(other)
    results = dict(draw.check_draw(receipt, wins, other))
    assert results["The issued tickets are those of the receipt"] is False


def test_there_are_no_more_issued_tickets_than_the_receipt_says(drawn_early):
    receipt, _, tickets = drawn_early
    more = sorted([*tickets, next(n for n in range(1, 1000) if n not in tickets)])
    # A server that knew the winners could have added the one it wants among them.
    for digest in (receipt["tickets_sha256"], draw.digest_of_tickets(more)):
        forged = {**receipt, "tickets_sha256": digest}
        arguments = (bytes.fromhex(receipt["secret"]), receipt["public_randomness"], more, 12)
        numbers = draw.winning_numbers(receipt["raffle_id"], *arguments)
        names = draw.prize_of_each_win((prize["name"], prize["amount"]) for prize in receipt["prizes"])
        wins = [{"ticket_number": number, "prize": name} for number, name in zip(numbers, names)]
        assert dict(draw.check_draw(forged, wins, more))["The issued tickets are those of the receipt"] is False


def test_the_clock_of_the_server_may_be_five_minutes_ahead(drawn):
    _, receipt, wins = drawn
    for ahead, holds in ((280, True), (320, False)):
        results = draw.check_draw({**receipt, "drawn_at": draw._time(ahead)}, wins)
        assert dict(results)[SENTENCES["order"]] is holds


def test_a_list_of_tickets_of_a_wrong_form_is_not_checked(drawn_early):
    receipt, wins, tickets = drawn_early
    for other in (
        [],
        tickets[:-1],
        ["1", *tickets[1:]],
        [-1, *tickets[1:]],
        [1.5, *tickets[1:]],
        [2**64, *tickets[1:]],
    ):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            draw.check_draw(receipt, wins, other)


def test_saved_pages_and_a_saved_raffle_are_checked_by_the_program(drawn_early, tmp_path):
    receipt, wins, tickets = drawn_early
    saved = {member: receipt[member] for member in draw.OF_RAFFLE}
    files = {
        "receipt.json": receipt,
        "wins-1.json": wins[:5],
        "wins-2.json": wins[5:],
        "tickets-1.json": tickets[:9],
        "tickets-2.json": tickets[9:],
        "raffle.json": {"id": receipt["raffle_id"], "closed_at": None, **saved},
        "other.json": {"id": receipt["raffle_id"], "closed_at": None, **saved, "draw_commitment": "0" * 64},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    lists = ("wins-1.json", "wins-2.json", "--tickets", "tickets-1.json", "tickets-2.json")
    done = run_alone(tmp_path, "receipt.json", *lists, "--raffle", "raffle.json", "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["holds"], said["receipt"]) == (0, True, receipt)
    assert [sentence["holds"] for sentence in said["sentences"]] == [True] * 7
    done = run_alone(tmp_path, "receipt.json", *lists, "--raffle", "raffle.json", "other.json")
    assert (done.returncode, failing(done.stdout)) == (1, [f"{OF_RAFFLE} (different: draw_commitment)"])
    done = run_alone(tmp_path, "receipt.json", "wins-1.json", *lists[2:])
    assert_not_checked((done.returncode, done.stdout), "only 5 of 12 wins were read")
    done = run_alone(tmp_path, "receipt.json", *lists[:4])
    assert_not_checked((done.returncode, done.stdout), "only 9 of 20 tickets were read")
    done = run_alone(tmp_path, "wins-1.json", "receipt.json", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]) == (1, "wins-1.json does not hold an object")
    done = run_alone(tmp_path, "receipt.json", "tickets-1.json", "--tickets", "wins-1.json")
    assert done.returncode == 1


def test_no_member_of_the_receipt_can_be_left_out(drawn_early):
    receipt, wins, tickets = drawn_early
    raffle = {"id": receipt["raffle_id"], **{member: receipt[member] for member in draw.OF_RAFFLE}}
    assert all(holds for _, holds in draw.check_draw(receipt, wins, tickets, [raffle]))
    for member in receipt:
        with pytest.raises((KeyError, ValueError)):
            draw.check_draw({name: receipt[name] for name in receipt if name != member}, wins, tickets)
    # Nor by pretending that the receipt is an older one.
    announced = {**raffle, "randomness_source": "drand"}
    older = {name: value for name, value in receipt.items() if name != "randomness_source"}
    older["sold_out_at"] = receipt["closed_at"]
    older["total_tickets"] = receipt["issued_tickets"]
    assert draw.check_draw(older, wins, tickets, [announced])[0] == (
        f"{OF_RAFFLE} (different: randomness_source, total_tickets)",
        False,
    )


def test_a_raffle_that_was_saved_during_its_close_is_the_raffle_of_the_receipt(drawn_early):
    receipt, wins, tickets = drawn_early
    members = draw.OF_RAFFLE + draw.OF_CLOSED_RAFFLE
    saved = {"id": receipt["raffle_id"], **{member: receipt[member] for member in members}}
    for digest, same in ((None, True), (receipt["tickets_sha256"], True), ("0" * 64, False)):
        sentence, holds = draw.check_draw(receipt, wins, tickets, [{**saved, "tickets_sha256": digest}])[0]
        assert (sentence == OF_RAFFLE, holds) == (same, same)


def test_a_receipt_of_an_older_server_is_checked(drawn):
    _, receipt, wins = drawn
    older = {**receipt, "sold_out_at": receipt["closed_at"]}
    for member in ("created_at", "closed_at", "issued_tickets", "tickets_sha256", "randomness_source"):
        del older[member]
    assert [holds for _, holds in draw.check_draw(older, wins)] == [True] * len(SENTENCES)


# The program


def run_alone(directory, *arguments, start=()):
    """Run draw.py, copied into the directory, without site-packages, and return the process that has ended."""
    shutil.copy(ROOT / "draw.py", directory)
    command = [*start, sys.executable, "-IS", "draw.py", *map(str, arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def check(monkeypatch, capsys):
    """Run draw.py in this process with `check(argument...)`, which returns the exit code and what was printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["draw.py", *arguments])
        return draw.main(), capsys.readouterr().out

    return run


def assert_not_checked(outcome, *expected):
    """Check that one line of ASCII says that a draw was not checked, and why."""
    code, said = outcome
    assert code == 1
    assert said.startswith("NOT CHECKED  ")
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    for words in expected:
        assert words in said


def failing(said):
    """Return the sentences that fail."""
    return [line[7:] for line in said.splitlines() if line.startswith("FAILS  ")]


def test_saved_answers_are_checked_by_the_program_alone(drawn, tmp_path):
    _, receipt, wins = drawn
    empty = tmp_path / "empty"
    empty.mkdir()
    swapped = [wins[1], wins[0], *wins[2:]]
    for listed, broken, code in ((wins, (), 0), (swapped, ("wins", "digest"), 1)):
        (empty / "receipt.json").write_text(json.dumps(receipt))
        (empty / "winners.json").write_text(json.dumps(listed))
        done = run_alone(empty, "receipt.json", "winners.json")
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.splitlines() == [
            *(f"{'FAILS' if name in broken else 'holds'}  {sentence}" for name, sentence in SENTENCES.items()),
            "This program cannot check:",
            "- that the raffle showed the same tickets, prizes and source before the draw, and this commitment:",
            f"  {receipt['draw_commitment']}",
            "- that this randomness was not chosen by the server, and was unknown to everyone at "
            f"{receipt['closed_at']}:",
            "  7 13 21",
        ]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"x", b"7", b'{"secret": 1}', b"[[]]", NESTED, b"\xff\x1b[2J"],
    ids=lambda garbage: repr(garbage)[:20],
)
@pytest.mark.parametrize("name", ["receipt.json", "winners.json"])
def test_files_that_hold_no_answers_are_not_checked(drawn, tmp_path, monkeypatch, check, name, garbage):
    monkeypatch.chdir(tmp_path)
    for file, value in zip(("receipt.json", "winners.json"), drawn[1:]):
        (tmp_path / file).write_text(json.dumps(value))
    (tmp_path / name).write_bytes(garbage)
    assert_not_checked(check("receipt.json", "winners.json"))


@pytest.mark.parametrize("output", [">&-", "> /dev/full", "| head -c 0"])
def test_a_program_that_nobody_reads_ends_without_a_traceback(drawn, tmp_path, output):
    for file, value in zip(("receipt.json", "winners.json"), drawn[1:]):
        (tmp_path / file).write_text(json.dumps(value))
    shell = ("sh", "-c", f'"$@" {output}', "sh")
    assert run_alone(tmp_path, "receipt.json", "winners.json", start=shell).stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("receipt.json",),
        ("http://127.0.0.1/", "winners.json"),
        ("ftp://127.0.0.1/",),
        ("http://127.0.0.1/", "--timeout", "soon"),
        ("http://127.0.0.1/raffles/1/", "--timeout", "nan"),
        ("http://127.0.0.1/raffles/1/", "--timeout", "0"),
        ("http://127.0.0.1/raffles/1/", "winners.json"),
        ("http://127.0.0.1/raffles/1/", "--tickets", "tickets.json"),
    ],
)
def test_a_wrong_command_line_ends_with_2(tmp_path, arguments):
    done = run_alone(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: draw.py ")


def test_a_raffle_is_checked_at_its_address_page_by_page(serve, database, tmp_path):
    path = fill(database, 20_001, [{"name": "Pen", "amount": 20_001}])
    server = serve()
    address = f"http://127.0.0.1:{server.port}{path}"
    done = run_alone(tmp_path, address)
    assert done.stderr == ""
    assert_not_checked((done.returncode, done.stdout), "404", "Winners for the raffle have not been drawn yet")
    server.request("POST", f"{path}winners/", {"public_randomness": "7 13 21"})
    for spelled in (address, address.rstrip("/"), f"{address}draw/", f"{address}winners/?limit=1#a"):
        done = run_alone(tmp_path, spelled)
        assert (done.returncode, done.stderr) == (0, "")
        sentences = [OF_RAFFLE, *SENTENCES.values()]
        held = [f"holds  {sentence}" for sentence in sentences]
        assert done.stdout.splitlines()[:7] == [*held, "This program cannot check:"]


# Servers that lie


def answer(value=b"", *headers, status="200 OK"):
    """Return the bytes of an answer: the value as JSON unless it is bytes already."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, "")).encode() + body


def link(target):
    return f'Link: <{target}>; rel="next"'


class Site:
    """A server on loopback of one raffle that has been drawn. It answers as it is told."""

    def __init__(self, path, receipt, wins):
        members = draw.OF_RAFFLE + draw.OF_CLOSED_RAFFLE
        self.raffle = {"id": receipt["raffle_id"], **{member: receipt[member] for member in members}}
        self.path, self.receipt, self.wins = path, receipt, wins
        # By the path below the raffle's: JSON, bytes, or a function of the query that returns or yields bytes.
        self.answers = {"": self.raffle, "draw/": receipt, "winners/": wins}
        self.requests = []
        self.dripped = False
        self.over = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append(self.path)
                url = urlsplit(self.path)
                value = site.answers[url.path.split("/", 3)[3]]
                value = value(dict(parse_qsl(url.query))) if callable(value) else value
                with suppress(OSError):
                    for piece in value if isgenerator(value) else [value]:
                        self.wfile.write(piece if isinstance(piece, bytes) else answer(piece))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that close() waits for them
        self.address = f"http://127.0.0.1:{self.server.server_port}{path}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()

    def page(self, numbers, names, query):
        """Answer with a page of wins, as raffle.py does."""
        start = int(query.get("cursor", 0))
        end = start + int(query["limit"])
        wins = [{"ticket_number": number, "prize": name} for number, name in zip(numbers[start:end], names[start:end])]
        more = link(f"{self.path}winners/?limit={query['limit']}&cursor={end}")
        return answer(wins, *[more] * (end < len(numbers)))

    def drip(self, start, piece, query):
        """Send the start of an answer, and then a piece now and then until the test is over."""
        yield start
        for _ in range(200):  # not for ever, so that the test of a program that waits fails
            if self.over.wait(0.05):
                return
            yield piece
        self.dripped = True

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(drawn):
    site = Site(*drawn)
    yield site
    site.close()


@pytest.fixture
def short_pages(monkeypatch):
    monkeypatch.setattr(draw, "WINS_PER_PAGE", 4)


def test_as_many_pages_are_read_as_there_are(site, check, short_pages):
    numbers, names = zip(*((win["ticket_number"], win["prize"]) for win in site.wins))
    site.answers["winners/"] = partial(site.page, numbers, names)
    assert check(site.address)[0] == 0
    assert len(site.requests) == 2 + 3


@pytest.mark.parametrize(
    ("size", "pages", "said"),
    [
        (0, 1, "only 0 of 12 wins"),
        (1, 1, "only 1 of 12 wins"),
        (4, 3, "more than 12 items"),
        (5, 3, "more than 12 items"),
    ],
)
def test_pages_without_end_are_followed_no_further_than_the_prizes_fill(site, check, short_pages, size, pages, said):
    wins = cycle(site.wins)
    more = link(f"{site.path}winners/")
    site.answers["winners/"] = lambda query: answer(list(islice(wins, size)), more)
    assert_not_checked(check(site.address), said)
    assert len(site.requests) == 2 + pages


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("total_tickets", 13),
        ("issued_tickets", 11),
        ("closed_at", "2000-01-01T00:00:00Z"),
        ("prizes", PRIZES[::-1]),
        ("draw_commitment", "0" * 64),
        ("created_at", "2000-01-01T00:00:00Z"),
        ("randomness_source", "drand"),
        ("tickets_sha256", "0" * 64),
    ],
)
def test_a_raffle_that_differs_from_its_receipt_is_found_out(site, check, member, value):
    site.raffle[member] = value
    code, said = check(site.address)
    assert (code, failing(said)) == (1, [f"{OF_RAFFLE} (different: {member})"])


def test_an_address_may_be_of_http_and_https_in_any_case(site, check):
    assert check(site.address.replace("http", "HTTP"))[0] == 0
    # The site speaks no TLS.
    for scheme in ("https", "HTTPS"):
        assert_not_checked(check(site.address.replace("http", scheme)), "SSL")


@pytest.mark.parametrize("shown", ["the raffle of the address", "the raffle of the receipt"])
def test_the_receipt_of_another_raffle_is_found_out(site, check, shown):
    if shown == "the raffle of the address":
        site.raffle["id"] = RAFFLE_ID
    address = site.address.replace(site.receipt["raffle_id"], RAFFLE_ID)
    code, said = check(address)
    if shown == "the raffle of the address":
        assert (code, failing(said)) == (1, [f"{OF_RAFFLE} (different: id)"])
    else:
        assert_not_checked((code, said), f"{address} returns another raffle")


@pytest.mark.parametrize("kind", [bool, float, str])
def test_a_ticket_number_that_only_equals_an_integer_does_not_pass(site, check, kind):
    [win] = [win for win in site.wins if win["ticket_number"] == 1]
    win["ticket_number"] = kind(1)
    assert_not_checked(check(site.address), "ticket_number")


def test_an_answer_has_up_to_max_answer_bytes(site, check, monkeypatch):
    longest = max(len(json.dumps(value)) for value in (site.raffle, site.receipt, site.wins))
    monkeypatch.setattr(draw, "MAX_ANSWER", longest)
    assert check(site.address)[0] == 0
    monkeypatch.setattr(draw, "MAX_ANSWER", longest - 1)
    assert_not_checked(check(site.address), f"more than {longest - 1} bytes")


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
@pytest.mark.parametrize(
    ("header", "size"),
    [("X: y", b""), (f"Content-Length: {10**30}", b""), (CHUNKED, b"f" * 15 + b"\r\n"), (CHUNKED, b"-1\r\n")],
)
def test_a_body_without_end_is_not_read_to_its_end(site, check, status, header, size):
    read_to_the_end = []

    def body(query):
        yield answer(size, header, status=status)
        for _ in range(64):
            yield b" " * 2**20
        read_to_the_end.append(True)

    site.answers["draw/"] = body
    assert_not_checked(check(site.address))
    assert not read_to_the_end


DRIPS = [
    (b"HTTP/1.1 200 ", b"O"),
    (answer()[:-2] + b"X: ", b"x"),
    (answer(), b" "),
    (answer(status="404 Not Found"), b" "),
    (answer(b"4\r\nnull\r\n0\r\n", CHUNKED), b"X: x\r\n"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
]


@pytest.mark.parametrize("limit", ["of one answer", "of all answers"])
@pytest.mark.parametrize(("start", "piece"), DRIPS)
def test_an_answer_without_end_is_given_up_in_time(site, check, monkeypatch, limit, start, piece):
    site.answers["draw/"] = partial(site.drip, start, piece)
    if limit == "of one answer":
        monkeypatch.setattr(draw, "MAX_ANSWER_TIME", 0.1)
        code, said = check(site.address)
    else:
        code, said = check(site.address, "--timeout", "0.1")
    assert_not_checked((code, said))
    assert "takes too long" in said or "timed out" in said


def test_the_program_ends_while_the_server_still_answers(site, tmp_path):
    site.answers["draw/"] = partial(site.drip, answer(), b" ")
    done = run_alone(tmp_path, site.address, "--timeout", "0.3")
    assert not site.dripped
    assert done.stderr == ""
    assert_not_checked((done.returncode, done.stdout), "takes too long")


def test_pages_without_end_of_prizes_without_end_are_given_up_in_time(site, check, monkeypatch):
    monkeypatch.setattr(draw, "WINS_PER_PAGE", 1)
    for shown in (site.raffle, site.receipt):
        shown.update(
            total_tickets=draw.MAX_TICKETS,
            issued_tickets=draw.MAX_TICKETS,
            prizes=[{"name": "Pen", "amount": draw.MAX_TICKETS}],
        )
    wins = repeat({"ticket_number": 1, "prize": "Pen"}, 20_000)
    more = link(f"{site.path}winners/")
    site.answers["winners/"] = lambda query: answer(list(islice(wins, 1)), more)
    assert_not_checked(check(site.address, "--timeout", "0.3"), "takes too long")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "{address}elsewhere/", "elsewhere/"])
def test_a_redirect_is_shown_and_not_followed(site, check, status, target):
    target = target.format(address=site.address)
    site.answers["elsewhere/"] = site.receipt
    site.answers["draw/"] = answer(b"", f"Location: {target}", status=f"{status} Moved")
    assert_not_checked(check(site.address), f"answers {status}: {target}")
    assert site.requests == [f"{site.path}draw/"]


@pytest.mark.parametrize("scheme", ["file", "data", "ftp"])
def test_a_link_to_something_else_than_http_is_not_followed(site, check, tmp_path, short_pages, scheme):
    saved = tmp_path / "wins.json"
    saved.write_text(json.dumps(site.wins[4:]))
    targets = {
        "file": saved.as_uri(),
        "data": f"data:application/json,{quote(saved.read_text())}",
        "ftp": f"ftp://127.0.0.1{saved}",
    }
    site.answers["winners/"] = answer(site.wins[:4], link(targets[scheme]))
    assert_not_checked(check(site.address), f"unknown url type: {scheme}")


@pytest.mark.parametrize("target", ["\x1b[2J", "http://\x1b[2J/", "http://[", "http:///x", "https:"])
def test_a_link_that_leads_nowhere_is_not_checked(site, check, short_pages, target):
    site.answers["winners/"] = answer(site.wins[:4], link(target))
    assert_not_checked(check(site.address))


@pytest.mark.parametrize(
    "lie",
    [
        answer(body, header, status=f"{status} \x1b[1m")
        for status in (200, 404)
        for header, body in [
            ("X: \x1b[2J", b"\x1b[2Jholds  all, \xe9\n"),
            ("X: \x1b[2J", "\x1b[2Jholds  all, é\r\n".encode()),
            ("Content-Length: 100", b"\x1b[2J"),
            ("Content-Length: 99999999999999999999999999999", b"{}"),
            (CHUNKED, b"ff\r\n\x1b[2Jholds  all"),
            (CHUNKED, b"\x1b[2J\r\n"),
            (CHUNKED, b"-5\r\n{}"),
            ("Location: \x1b[2J\x07é", b""),
        ]
    ]
    + [b"", b"\x1b[2J\r\n", b"HTTP/1.1 \x1b[2J\r\n", answer(b"", "\x1b[2J"), answer(NESTED), answer("\x1b")],
    ids=lambda lie: repr(lie)[:60],
)
def test_whatever_a_server_sends_instead_is_shown_as_one_line_of_ascii(site, check, lie):
    site.answers["draw/"] = lie
    assert_not_checked(check(site.address))


def test_a_refusal_is_shown_with_its_status_and_its_text(site, check):
    site.answers["draw/"] = answer(b" \x1b[2J \xe9 " + "é".encode(), status="404 Not Found")
    assert_not_checked(check(site.address), r"/draw/ answers 404: \x1b[2J � é")


def test_the_public_randomness_and_its_source_are_shown_on_one_line(site, check):
    site.receipt["public_randomness"] = "\x1b[2J é\r\n"
    site.receipt["randomness_source"] = site.raffle["randomness_source"] = "\x1b[2J ü"
    _, said = check(site.address)
    exactly = r"'\x1b[2J \xe9\r\n'"
    assert said.endswith(f"  \\x1b[2J é\\r\\n\n  exactly: {exactly}\n  announced: \\x1b[2J ü\n")


@pytest.mark.parametrize(
    ("randomness", "shown"),
    [
        ("7 13 21", "  7 13 21\n"),
        ("7 13 21 ", "  7 13 21 \n  exactly: '7 13 21 '\n"),
        ("\u212b", "  \u212b\n  exactly: '\\u212b'\n"),
        ("\\u212b", "  \\u212b\n  exactly: '\\\\u212b'\n"),
    ],
)
def test_randomness_that_looks_like_another_is_told_from_it(site, check, randomness, shown):
    site.receipt["public_randomness"] = randomness
    _, said = check(site.address)
    assert said.endswith(f":\n{shown}")


def test_only_a_raffle_that_was_saved_before_the_draw_shows_what_was_promised(site, check, tmp_path):
    saved = tmp_path / "raffle.json"
    for drawn, promised in ((False, True), (True, False), (None, False)):
        saved.write_text(json.dumps({**site.raffle, "winners_drawn": drawn}))
        code, said = check(site.address, "--raffle", str(saved))
        assert (code, "before the draw" not in said) == (0, promised)


def test_an_integer_of_any_length_is_read(site, check):
    text = json.dumps(site.receipt).replace('"total_tickets": 12', f'"total_tickets": {"9" * 10**6}')
    site.answers["draw/"] = answer(text.encode())
    assert_not_checked(check(site.address), "total_tickets or prizes are malformed")


# Memory

# `python -c` with this runs a command, and then prints the most KiB that it had in memory. What resource says
# of a child counts what its parent had when it was started: here the parent is small.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_and_measure(directory, address):
    """Run draw.py alone; return the exit code, what was printed, and the peak of its memory in MiB."""
    done = run_alone(directory, address, start=(sys.executable, "-c", PEAK))
    assert done.stderr == ""
    said, _, peak = done.stdout.rstrip("\n").rpartition("\n")
    return done.returncode, f"{said}\n", int(peak) / 1024


def test_a_draw_of_a_million_wins_is_checked_in_200_mib(site, tmp_path):
    secret, randomness = bytes.fromhex(site.receipt["secret"]), site.receipt["public_randomness"]
    tickets = range(1, draw.MAX_TICKETS + 1)
    numbers = draw.winning_numbers(site.receipt["raffle_id"], secret, randomness, tickets, WINS)
    numbers, names = array("Q", numbers), ["Pen"] * WINS
    for shown in (site.raffle, site.receipt):
        shown.update(
            total_tickets=draw.MAX_TICKETS, issued_tickets=draw.MAX_TICKETS, prizes=[{"name": "Pen", "amount": WINS}]
        )
    site.receipt["wins_sha256"] = draw.digest_of_wins(zip(numbers, names))
    site.answers["winners/"] = partial(site.page, numbers, names)
    code, said, peak = run_and_measure(tmp_path, site.address)
    assert code == 0, said
    assert peak < 40 + 160 * WINS / 1_000_000  # fewer wins, in less


@pytest.mark.parametrize("path", ["", "draw/", "winners/"])
def test_an_answer_that_is_long_when_parsed_is_checked_in_200_mib(site, tmp_path, path):
    site.answers[path] = answer(b"[" + b"[]," * ((draw.MAX_ANSWER - 4) // 3) + b"[]]")
    code, said, peak = run_and_measure(tmp_path, site.address)
    assert_not_checked((code, said), "indices")
    assert peak < 200
