"""Anyone can check a draw: with draw.py, or with a program written from the recipe in it."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from itertools import chain, permutations, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import FAULTS, ROOT

import draw

RAFFLE_ID = re.search("[0-9a-f]{8}-[0-9a-f-]{27}", draw.__doc__)[0]
SECRET = bytes(range(32))
# More than the 15 tickets that are issued, so all win: the chance that two draws are the same is
# less than 1e-12.
PRIZES = [
    {"name": "Bicycle", "amount": 1},
    {"name": "Book", "amount": 5},
    {"name": "Größe", "amount": 14},
]
PAST, FUTURE = "2000-01-01T00:00:00Z", "9999-01-01T00:00:00Z"
CLEAR = "\x1b[2J"  # clears a terminal

# The sentences that hold or fail.
AGREES = "The raffle agrees with what you saved of it"
ALGORITHM = "The draw was made by raffle-draw-2"
COMMITTED = "The secret is the committed one"
FOLLOW = "The wins follow from the secret, the randomness and issued_tickets"
ORDER = "The raffle was created, closed and drawn in this order"


# The recipe, followed with none of the program's code, perhaps with a mistake


MISTAKES = [
    "text secret",
    "odd side",
    "no walk",
    "little-endian round",
    "little-endian counter",
    "same digest again",
    "no deck",
    "53-bit words",
    "place moved once",
    "no rejection",
]


def sha256(*parts, order="big"):
    """Hash bytes, and integers as 8 bytes."""
    encoded = [part if isinstance(part, bytes) else part.to_bytes(8, order) for part in parts]
    return hashlib.sha256(b"".join(encoded)).digest()


def deal_by_recipe(raffle_id, secret, total, place, mistake=None):
    """Follow steps 1 and 2, and return the number of the ticket at a place."""
    if mistake == "text secret":
        secret = secret.hex().encode()
    order = "little" if mistake == "little-endian round" else "big"
    key = sha256(b"raffle-deal-2", raffle_id.encode(), secret)

    side = math.isqrt(total)
    while side * side < total or (side % 2 and mistake != "odd side"):
        side += 1

    x = place - 1
    while True:
        left, right = x // side, x % side
        for number in range(24):
            digest = sha256(key, number, right, order=order)
            left, right = right, (left + int.from_bytes(digest[:8], "big")) % side
        x = left * side + right
        if x < total or mistake == "no walk":
            return x % total + 1


def draw_by_recipe(raffle_id, secret, randomness, total, issued, amount, mistake=None):
    """Follow all steps, and return the numbers that win."""
    order = "little" if mistake == "little-endian counter" else "big"
    key = sha256(b"raffle-draw-2", raffle_id.encode(), secret, randomness.encode())

    words, counter, cells, numbers = [], 0, {}, []
    for last in range(issued, max(issued - amount, 0), -1):
        word = None
        while word is None or (word >= 2**64 // last * last and mistake != "no rejection"):
            if not words:
                digest = sha256(key, counter, order=order)
                words = [int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16, 24)]
                if mistake != "same digest again":
                    counter += 1
            word = words.pop(0)

        if mistake == "53-bit words":
            word = int(float(word))
        cell = word % last + 1
        place = cells.get(cell, cell)
        if mistake == "no deck":
            numbers.append(place)
        else:
            numbers.append(deal_by_recipe(raffle_id, secret, total, place, mistake))
        cells[cell] = last if mistake == "place moved once" else cells.get(last, last)
    return numbers


def deal_by_program(raffle_id, secret, total, place):
    return draw.number_at(draw.derive_deal_key(raffle_id, secret), total, place)


def assert_vectors(deal, draw_winners):
    """Check the vectors, which are read from the docstring."""
    decks = re.findall(r"(\d+) tickets, places (.+):\s+([\d ]+)\n", draw.__doc__)
    draws = re.findall(
        r'(\d+) of (\d+) issued; (.+); "(.+)".*:\s+([\d ]+)\n(?: +then the .+: ([\d ]+)\n)?',
        draw.__doc__,
    )
    assert len(decks) >= 3
    assert len(draws) >= 5
    assert len([replacements for *_, replacements in draws if replacements]) >= 3

    for total, places, expected in decks:
        shown = range(1, int(total) + 1) if "to" in places else (1, 2, 3, int(total))
        numbers = [deal(RAFFLE_ID, SECRET, int(total), place) for place in shown]
        assert numbers == [int(number) for number in expected.split()]

    for issued, total, prizes, randomness, wins, replacements in draws:
        amount = min(sum(int(amount) for amount in re.findall(r"\d+", prizes)), int(issued))
        expected = [int(number) for number in f"{wins} {replacements}".split()]
        assert len(wins.split()) == amount
        # Replacements go on where the wins end.
        inputs = (RAFFLE_ID, SECRET, randomness, int(total), int(issued))
        assert list(draw_winners(*inputs, len(expected))) == expected


def test_the_program_agrees_with_the_vectors():
    assert_vectors(deal_by_program, draw.winning_numbers)


def test_the_recipe_agrees_with_the_vectors():
    assert_vectors(deal_by_recipe, draw_by_recipe)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_usual_mistake_in_a_port_is_found_by_a_vector(mistake):
    deal = partial(deal_by_recipe, mistake=mistake)
    draw_winners = partial(draw_by_recipe, mistake=mistake)
    with pytest.raises(AssertionError):
        assert_vectors(deal, draw_winners)


def test_the_recipe_and_the_program_agree():
    chance = random.Random(2166)
    for n in range(200):
        total = chance.randint(1, 2 ** chance.randint(1, 53) - 1)
        issued = chance.randint(0, total)
        amount = chance.randint(1, 9)
        inputs = (RAFFLE_ID, sha256(n), f"{n} é", total, issued, amount)
        assert list(draw.winning_numbers(*inputs)) == draw_by_recipe(*inputs), inputs


# The deck and the draw


def test_the_deck_deals_every_number_once():
    for total in (*range(1, 50), 99, 100, 101, 1000):
        numbers = range(1, total + 1)
        dealt = [deal_by_program(RAFFLE_ID, SECRET, total, place) for place in numbers]
        assert sorted(dealt) == list(numbers), total


def distance(outcomes, items, length):
    """Return how far outcomes are from every order of some of the items being equally likely.

    It is chi-square, divided by what one uniform sample in a thousand exceeds (Wilson, Hilferty).
    """
    possible = list(permutations(items, length))
    expected = len(outcomes) / len(possible)
    chi_square = sum((outcomes.count(each) - expected) ** 2 / expected for each in possible)

    degrees = len(possible) - 1
    variance = 2 / (9 * degrees)
    return chi_square / degrees / (1 - variance + 3.09 * math.sqrt(variance)) ** 3


def deal_orders(deal, total):
    """Deal all tickets with many secrets, and return the order of each deal."""
    # The secrets are fixed, so that nothing fails by chance, and enough to find an odd side.
    secrets = [sha256(n) for n in range(10 * math.factorial(total))]
    places = range(1, total + 1)
    return [tuple(deal(RAFFLE_ID, secret, total, place) for place in places) for secret in secrets]


@pytest.mark.parametrize("total", [3, 4, 5])
def test_every_order_of_the_tickets_is_equally_likely(total):
    orders = deal_orders(deal_by_program, total)
    assert distance(orders, range(1, total + 1), total) < 1


def test_with_an_odd_side_not_every_order_is_equally_likely():
    """The test above would find it."""
    orders = deal_orders(partial(deal_by_recipe, mistake="odd side"), 5)
    assert distance(orders, range(1, 6), 5) > 1


def test_every_issued_ticket_is_equally_likely_to_win():
    issued = [deal_by_program(RAFFLE_ID, SECRET, 5, place) for place in range(1, 5)]
    draws = [
        tuple(draw.winning_numbers(RAFFLE_ID, SECRET, f"round {n}", 5, 4, 2)) for n in range(1200)
    ]
    assert distance(draws, issued, 2) < 1


def test_every_input_changes_the_draw():
    inputs = (RAFFLE_ID, SECRET, "x", 2**40, 2**39, 3)
    others = (RAFFLE_ID.replace("9", "8", 1), bytes(32), "x ", 2**40 + 2**20, 2**39 + 1)
    changed = [(*inputs[:n], other, *inputs[n + 1 :]) for n, other in enumerate(others)]
    assert len({tuple(draw.winning_numbers(*each)) for each in (inputs, *changed)}) == 6


# What the program says of a draw


@pytest.fixture
def drawn(client):
    """Answers on a raffle of 400 tickets, 15 of them issued, and its wins.

    open: before the close. closed: before the draw. raffle: after it. decided: the draw has been
    decided but not completed, so the server knows the winners.
    """
    path = client.new_raffle(400, PRIZES)
    opened = client.get(path).json
    for n in range(15):
        client.participate(path, f"10.2.0.{n}")
    closed = client.close(path).json
    wins = client.draw(path, {"public_randomness": "7 13 21"}).json
    return SimpleNamespace(
        open=opened,
        closed=closed,
        decided={**closed, "public_randomness": "7 13 21"},
        raffle=client.get(path).json,
        wins=wins,
    )


def run(directory, *arguments, python=("-IS", "draw.py")):
    """Run draw.py, copied alone; return its exit status and the lines that it prints.

    Check that they cannot command a terminal.
    """
    shutil.copy(ROOT / "draw.py", directory)
    done = subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=directory,
        capture_output=True,
        timeout=60,
        encoding="utf-8",
        check=False,
    )
    *lines, rest = done.stdout.split("\n")
    assert all(line.isprintable() for line in lines), lines
    assert rest == ""
    assert bool(done.stderr) == (done.returncode > 1), done.stderr
    return done.returncode, lines


def check(directory, raffle, *pages, before=()):
    """Run the program on answers, which are saved in files called 0, 1, 2...

    Answers are saved as JSON unless they are bytes.
    """
    answers = [raffle, *pages, *before]
    names = [str(number) for number in range(len(answers))]
    for name, answer in zip(names, answers):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        (directory / name).write_bytes(data)

    if not before:
        return run(directory, *names)
    first = len(answers) - len(before)
    return run(directory, *names[:first], "--before", *names[first:])


def assert_not_checked(outcome, words="", message=None):
    """Check that the program says in one line of ASCII why it did not check a draw."""
    status, lines = outcome
    assert status == 1, (message, lines)
    [line] = lines
    assert line.startswith("NOT CHECKED  "), (message, line)
    assert line.isascii(), (message, line)
    assert words in line, (message, line)


def test_every_sentence_holds_of_a_draw_and_the_status_is_0(drawn, tmp_path):
    pages = (drawn.wins[:5], drawn.wins[5:])
    status, lines = check(tmp_path, drawn.raffle, *pages, before=[drawn.open, drawn.raffle])
    sentences = [AGREES, ALGORITHM, COMMITTED, FOLLOW, ORDER]
    assert status == 0
    assert lines[:5] == [f"holds  {sentence}" for sentence in sentences]


def assert_failing(outcome, failing):
    """Check that exactly these sentences fail, and the status is 1."""
    status, lines = outcome
    assert status == 1
    assert lines[:4] == [
        f"FAILS  {sentence}" if sentence in failing else f"holds  {sentence}"
        for sentence in (ALGORITHM, COMMITTED, FOLLOW, ORDER)
    ]


@pytest.mark.parametrize(
    ("member", "value", "failing"),
    [
        ("algorithm", "raffle-draw-1", [ALGORITHM]),
        ("draw_commitment", "0" * 64, [COMMITTED]),
        ("secret", "0" * 64, [COMMITTED, FOLLOW]),
        ("id", RAFFLE_ID, [FOLLOW]),
        ("public_randomness", "7 13 22", [FOLLOW]),
        ("total_tickets", 4000, [FOLLOW]),
        ("issued_tickets", 14, [FOLLOW]),
        ("prizes", PRIZES[::-1], [FOLLOW]),
        ("created_at", FUTURE, [ORDER]),
        ("closed_at", PAST, [ORDER]),
        ("closed_at", FUTURE, [ORDER]),
        ("drawn_at", PAST, [ORDER]),
    ],
)
def test_a_sentence_fails_exactly_when_its_fact_is_broken(drawn, tmp_path, member, value, failing):
    broken = {**drawn.raffle, member: value}
    assert_failing(check(tmp_path, broken, drawn.wins), failing)


@pytest.mark.parametrize("change", ["exchanged", "one more", "another prize"])
def test_wins_that_do_not_follow_fail(drawn, tmp_path, change):
    first, second, *rest = drawn.wins
    wins = {
        "exchanged": [second, first, *rest],
        "one more": [*drawn.wins, first],
        "another prize": [{**first, "prize": "Book"}, second, *rest],
    }
    assert_failing(check(tmp_path, drawn.raffle, wins[change]), [FOLLOW])


# What a raffle shows from the start, from the close, and from the decision of the draw.
FROM_START = {
    "id": RAFFLE_ID,
    "total_tickets": 401,
    "prizes": PRIZES[::-1],
    "created_at": PAST,
    "algorithm": "draw",
    "randomness_source": "drand",
    "draw_commitment": "0" * 64,
    "issued_tickets": 16,  # more than in the end
}
FROM_CLOSE = {"issued_tickets": 14, "closed_at": PAST, "public_randomness": "x"}


@pytest.mark.parametrize(
    ("stage", "others"),
    [
        ("open", FROM_START),
        ("closed", {**FROM_START, **FROM_CLOSE}),
        ("raffle", FROM_CLOSE),
    ],
    ids=["open", "closed", "drawn"],
)
def test_every_answer_that_was_saved_before_is_compared(drawn, stage, others):
    saved = getattr(drawn, stage)
    renamed = {**saved, "name": "Winter fair"}
    assert draw.check_draw(drawn.raffle, drawn.wins, [renamed])[0] == (AGREES, True)

    for member, value in others.items():
        before = [drawn.open, {**saved, member: value}, drawn.closed]
        results = draw.check_draw(drawn.raffle, drawn.wins, before)
        assert results[0] == (f"{AGREES} (different: {member})", False)


@pytest.mark.parametrize("before", [["--before", "2", "3"], ["--before", "2", "--before", "3"]])
def test_every_file_that_is_named_after_before_counts(drawn, tmp_path, before):
    other_total = {**drawn.open, "total_tickets": 401}
    other_close = {**drawn.closed, "closed_at": PAST}
    check(tmp_path, drawn.raffle, drawn.wins, other_total, other_close)

    status, lines = run(tmp_path, "0", "1", *before)
    assert status == 1
    assert lines[0] == f"FAILS  {AGREES} (different: closed_at, total_tickets)"


# Values that a raffle cannot have, by member.
PEN = {"name": "Pen", "amount": 1}
WRONG_HEX = ["", "AB" * 32, "ab" * 31, "ab" * 33, 7, None]
WRONG_TIMES = ["", "2026-07-04", f"{PAST}\n", "٢000-01-01T00:00:00Z", 7, None]
# Text that could be mistaken for other randomness.
UNCLEAR = ["7\n", "7 ", " 7", "7  8", "7\ufe0f", "\u3164", "\u202e", "ü", "7\xa08", "7\t8", CLEAR]
WRONG = {
    "algorithm": [],  # any is read, so that it can be said to be another one
    "id": ["", RAFFLE_ID.upper(), f"{RAFFLE_ID}0", 7, None],
    "total_tickets": [11, 2**53, 400.0, True, "400", math.nan, None],
    "prizes": [
        "x",
        [[]],
        [{"name": "Pen"}],
        [PEN, {**PEN, "amount": -1}],
        *[[{**PEN, "amount": amount}] for amount in (0, True, 1.0, "1", 401, math.nan, None)],
        None,
    ],
    "issued_tickets": [-1, 401, 15.0, True, "15", math.nan, None],
    "randomness_source": [CLEAR, "a\n", "\u202e", "\ud800", 7, ["x"]],
    "public_randomness": ["", "x" * 1001, *UNCLEAR, "\ud800", 7, None],
    "draw_commitment": WRONG_HEX,
    "secret": WRONG_HEX,
    "created_at": WRONG_TIMES,
    "closed_at": WRONG_TIMES,
    "drawn_at": WRONG_TIMES,
}


def assert_malformed(raffle, wins):
    with pytest.raises((KeyError, TypeError, ValueError)):
        pytest.fail(f"{draw.check_draw(raffle, wins)} of {raffle}, {wins}")


@pytest.mark.parametrize("member", WRONG)
def test_a_raffle_with_a_missing_or_malformed_member_is_not_checked(drawn, member):
    assert_malformed(
        {name: drawn.raffle[name] for name in drawn.raffle.keys() - {member}}, drawn.wins
    )
    for value in WRONG[member]:
        assert_malformed({**drawn.raffle, member: value}, drawn.wins)


def test_malformed_wins_are_not_checked(drawn):
    first, *rest = drawn.wins
    malformed = [{**first, "ticket_number": number} for number in (True, 1.0, math.nan, "1", None)]
    malformed += [{**first, "prize": 1}, {"ticket_number": 1}, {"prize": "Bicycle"}]
    malformed += [[1, "Bicycle"], "x", 1, None]
    for win in malformed:
        assert_malformed(drawn.raffle, [win, *rest])


PROMISE = [
    "- that the raffle showed the same tickets, prizes and source before the close, and this "
    "commitment:",
    "  {draw_commitment}",
]
ISSUED = ["- that issued_tickets was {issued_tickets} when the raffle was closed"]


@pytest.mark.parametrize(
    ("before", "remarks"),
    [
        ([], PROMISE + ISSUED),
        (["raffle"], PROMISE + ISSUED),
        (["decided"], PROMISE + ISSUED),
        (["closed"], PROMISE),
        (["open"], ISSUED),
        (["open", "raffle"], ISSUED),
        (["closed", "open"], []),
    ],
    ids=["nothing", "drawn", "decided", "closed", "open", "open and drawn", "closed and open"],
)
def test_the_program_says_what_it_cannot_check(drawn, tmp_path, before, remarks):
    """It depends on what was saved when."""
    saved = [getattr(drawn, stage) for stage in before]
    status, lines = check(tmp_path, drawn.raffle, drawn.wins, before=saved)
    sentences = 5 if before else 4
    shown = [remark.format(**drawn.raffle) for remark in remarks]
    assert status == 0
    assert lines[sentences:-2] == ["This program cannot check:", *shown]


@pytest.mark.parametrize(
    ("source", "randomness", "remark"),
    [
        (
            None,
            None,
            "- that the server did not choose this randomness, because no public randomness was "
            "used:",
        ),
        (
            None,
            "7 13",
            "- that nobody chose this randomness, and that it was unknown to everyone at "
            "{closed_at}:",
        ),
        (
            "drand, é",
            "7 13",
            "- that this randomness is the announced one, and was unknown to everyone at "
            "{closed_at}:",
        ),
    ],
    ids=["made by the server", "sent", "announced"],
)
def test_the_program_shows_the_randomness_and_what_you_must_trust(
    client, tmp_path, monkeypatch, source, randomness, remark
):
    path, _ = client.new_sold_out(randomness_source=source)
    body = {"public_randomness": randomness} if randomness else None
    wins = client.draw(path, body).json
    raffle = client.get(path).json

    shown = [remark.format(**raffle), f"  {raffle['public_randomness']}"]
    if source:
        shown.append(f"  announced: {source}")
    status, lines = check(tmp_path, raffle, wins)
    assert status == 0
    assert lines[-len(shown) :] == shown

    # On a terminal that knows no other characters than those of ASCII.
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    status, lines = run(tmp_path, "0", "1", python=("-S", "draw.py"))
    assert status == 0
    assert lines[-1] == shown[-1].replace("é", r"\xe9")


def test_a_draw_in_the_future_is_a_remark_with_both_times(drawn, tmp_path):
    status, lines = check(tmp_path, {**drawn.raffle, "drawn_at": FUTURE}, drawn.wins)
    assert status == 0
    assert lines[3] == f"holds  {ORDER}"
    assert re.fullmatch(
        f"The draw is dated {FUTURE}, but this computer's clock shows 2...-..-..T..:..:..Z: "
        "one of them is wrong.",
        lines[4],
    )


# What the program does not check


JUNK = [b"", b"\xff", CLEAR.encode(), b"[" * 200_000, json.dumps(CLEAR).encode()]


@pytest.mark.parametrize("junk", JUNK, ids=["empty", "no UTF-8", "no JSON", "deep", "a string"])
def test_a_file_that_is_no_answer_is_not_checked(drawn, tmp_path, junk):
    assert_not_checked(check(tmp_path, junk, drawn.wins), "0 does not hold ")


def test_files_that_are_not_all_answers_are_not_checked(drawn, tmp_path):
    outcome = check(tmp_path, drawn.raffle, drawn.wins, before=[b"x"])
    assert_not_checked(outcome, "2 does not hold JSON")
    outcome = check(tmp_path, drawn.raffle, drawn.raffle)
    assert_not_checked(outcome, "1 does not hold a list")
    outcome = check(tmp_path, drawn.raffle, drawn.wins[:5])
    assert_not_checked(outcome, "only 5 of 15 wins were read")
    outcome = check(tmp_path, drawn.closed, [])
    assert_not_checked(outcome, "have not been drawn yet")
    outcome = check(tmp_path, {"drawn_at": PAST, "closes_at": None}, drawn.wins)
    assert_not_checked(outcome, "'id' is missing")
    outcome = run(tmp_path, "no-such-file", "1")
    assert_not_checked(outcome, "no-such-file")


def test_no_member_can_send_a_command_to_the_terminal(drawn, tmp_path):
    """`run` checks what the program prints."""
    for member in drawn.raffle:
        check(tmp_path, {**drawn.raffle, member: CLEAR}, drawn.wins)
    check(tmp_path, drawn.raffle, drawn.wins, before=[dict.fromkeys(drawn.raffle, CLEAR)])

    # The name of a prize may be anything.
    name = f"{CLEAR}\ud800"
    raffle = {**drawn.raffle, "prizes": [{**prize, "name": name} for prize in PRIZES]}
    wins = [{**win, "prize": name} for win in drawn.wins]
    assert check(tmp_path, raffle, wins)[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["0"],
        ["http://127.0.0.1/raffles/"],
        ["ftp://127.0.0.1/raffles/1/"],
        ["http://127.0.0.1/raffles/1/", "1"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_names_no_draw_is_refused(tmp_path, arguments):
    assert run(tmp_path, *arguments) == (2, [])


# A check that reads from a server


def test_a_raffle_is_checked_at_any_address_at_or_below_its_own(serve, tmp_path):
    server = serve(program=(FAULTS, "storage.MAX_WINS_PER_PAGE=5"))
    path, _ = server.create_sold_out(20, PRIZES)  # twenty wins, on four pages
    (tmp_path / "before").write_text(json.dumps(server.request("GET", path)[2]))
    status, _, wins = server.request("POST", f"{path}winners/", {"public_randomness": "7 13 21"})
    assert (status, len(wins)) == (201, 5)

    address, raffle_id = f"http://127.0.0.1:{server.port}{path}", path.split("/")[2]
    for spelled in (
        address,
        address[:-1],
        f"{address}winners/?limit=2&cursor=3",
        f"{address[:-1]}?x#y",
        address.replace(raffle_id, raffle_id.upper()).replace("http", "HTTP"),
    ):
        assert run(tmp_path, spelled, "--before", "before")[0] == 0, spelled
    assert_not_checked(run(tmp_path, address.replace(raffle_id, RAFFLE_ID)), "404")


def answer(value, *headers, status="200 OK"):
    """Return the bytes of a response, the value as JSON unless it is bytes already."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status}", *headers, ""]
    return "".join(f"{line}\r\n" for line in lines).encode() + body


CHUNKED = "Transfer-Encoding: chunked"


def link_to(url):
    return f'Link: <{url}>; rel="next"'


class Site(socketserver.ThreadingTCPServer):
    """A server of one raffle, which answers as it is told.

    answers: by what follows the raffle's path, pieces of bytes. asked: what was asked for.
    agents: what said that it asked.
    """

    def __init__(self, drawn):
        super().__init__(("127.0.0.1", 0), None)
        self.address = f"http://127.0.0.1:{self.server_address[1]}/raffles/{drawn.raffle['id']}/"
        self.asked = []
        self.agents = []
        self.answers = {"": [answer(drawn.raffle)], "winners": [answer(drawn.wins)]}
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def finish_request(self, request, client_address):
        head = request.recv(65536).decode()
        self.asked.append(head.split()[1].split("/")[3])
        self.agents += re.findall("(?i)\r\nuser-agent: (.*)\r\n", head)
        with suppress(OSError):  # the program may have closed
            for piece in self.answers[self.asked[-1]]:
                request.sendall(piece)


@pytest.fixture
def site(drawn):
    with Site(drawn) as site:
        yield site
        site.shutdown()


def test_the_program_says_what_it_is_and_what_to_do_if_that_is_refused(site, drawn, tmp_path):
    """A CDN refuses the name of Python's library, and lets others pass."""
    assert run(tmp_path, site.address)[0] == 0
    assert set(site.agents) == {draw.USER_AGENT}
    assert "urllib" not in draw.USER_AGENT

    site.answers[""] = [answer(b"<html>", status="403 Forbidden")]
    outcome = run(tmp_path, site.address)
    assert_not_checked(outcome, "answers 403 Forbidden")
    assert_not_checked(outcome, "can be checked as files")


def test_a_long_check_says_on_a_terminal_how_far_it_is(drawn, tmp_path):
    answers = [str(tmp_path / name) for name in ("raffle", "wins")]
    Path(answers[0]).write_text(json.dumps(drawn.raffle))
    Path(answers[1]).write_text(json.dumps(drawn.wins))
    command = [sys.executable, ROOT / FAULTS, "draw.PROGRESS_INTERVAL=0", "check", *answers]

    terminal, end = os.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, check=True)
    os.close(end)
    assert "15 of 15 wins are checked" in os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "are checked" not in done.stdout

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("wins", [0, 1])
def test_no_more_pages_are_read_than_the_draw_has_wins(site, drawn, tmp_path, wins):
    next_page = link_to(f"{site.address}winners/?cursor=1")
    site.answers["winners"] = [answer(drawn.wins[:wins], next_page)]
    assert_not_checked(run(tmp_path, site.address))
    # At last whether a winner was replaced meanwhile.
    assert site.asked == ["", *["winners"] * 15, ""]


def test_an_answer_is_read_up_to_16_mib(site, drawn, tmp_path):
    raffle = json.dumps(drawn.raffle).encode()
    for length, expected in ((16 * 2**20, 0), (16 * 2**20 + 1, 1)):
        site.answers[""] = [answer(raffle.ljust(length))]
        assert run(tmp_path, site.address)[0] == expected, length


@pytest.mark.parametrize(
    "head",
    [answer(b""), answer(b"f" * 15 + b"\r\n", CHUNKED), answer(b"-1\r\n", CHUNKED)],
    ids=["without a length", "in a long chunk", "in a chunk of negative length"],
)
def test_an_endless_answer_is_not_read_to_its_end(site, tmp_path, head):
    pieces = repeat(bytes(2**20), 64)
    site.answers[""] = chain([head], pieces)
    assert_not_checked(run(tmp_path, site.address))
    assert next(pieces, None)


@pytest.mark.parametrize("start", [b"", answer(b"{")], ids=["at once", "in the answer"])
def test_a_server_that_stalls_is_given_up(site, tmp_path, start):
    is_over = threading.Event()

    def stall():
        yield start
        is_over.wait(70)

    site.answers[""] = stall()
    impatient = (ROOT / FAULTS, "draw.READ_TIMEOUT=0.2", "check")
    assert_not_checked(run(tmp_path, site.address, python=impatient), "timed out")
    is_over.set()


def truncated(response):
    """Return a response whose connection is closed too early, without and with its length."""
    with_length = response.replace(b"\r\n", b"\r\nContent-Length: 9999\r\n", 1)
    return {"cut off": response[:-9], "shorter than it says": with_length[:-9]}


def test_what_is_no_answer_of_a_raffle_is_not_checked(site, drawn, tmp_path):
    lies = {
        "nothing": b"",
        "no HTTP": f"{CLEAR}\r\n".encode(),
        "no JSON": answer(b"{"),
        "deep JSON": answer(b"[" * 200_000),
        "a list": answer([drawn.raffle]),
        "an error": answer(b"[]", status=f"404 {CLEAR}"),
        "a redirection": answer(b"", f"Location: http://{CLEAR}/", status="302 Found"),
        "half a chunk": answer(b"2\r\n[", CHUNKED),
        "no chunk": answer(CLEAR.encode(), CHUNKED),
        "another raffle": answer({**drawn.raffle, "id": RAFFLE_ID}),
        **truncated(answer(drawn.raffle)),
    }
    for name, lie in lies.items():
        site.answers[""] = [lie]
        assert_not_checked(run(tmp_path, site.address), message=name)


def test_what_is_no_list_of_wins_is_not_checked(site, drawn, tmp_path):
    lies = {
        "a raffle": answer(drawn.raffle),
        "a list of lists": answer([[CLEAR]]),
        **truncated(answer(drawn.wins)),
    }
    for name, lie in lies.items():
        site.answers["winners"] = [lie]
        assert_not_checked(run(tmp_path, site.address), message=name)


def test_a_next_page_is_read_from_the_same_server_only(site, drawn, tmp_path):
    rest = tmp_path / "rest"
    rest.write_text(json.dumps(drawn.wins[5:]))
    for target in (rest.as_uri(), f"http://{CLEAR}/?"):
        site.answers["winners"] = [answer(drawn.wins[:5], link_to(target))]
        assert_not_checked(run(tmp_path, site.address), message=target)
