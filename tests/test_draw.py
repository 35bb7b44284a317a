"""Anyone can check a draw: with draw.py, or with a program written from the recipe in its docstring alone."""

import hashlib
import json
import math
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
from types import SimpleNamespace

import pytest
from helpers import ROOT

import draw

RAFFLE_ID = re.search("[0-9a-f]{8}-[0-9a-f-]{27}", draw.__doc__)[0]
SECRET = bytes(range(32))
# More than the 15 tickets that are issued, so all win: the chance that two draws are the same is less than 1e-12.
PRIZES = [
    {"name": "Bicycle", "amount": 1},
    {"name": "Book", "amount": 5},
    {"name": "Größe", "amount": 14},
]
AGREES = "The raffle agrees with what you saved of it"
ALGORITHM = "The draw was made by raffle-draw-2"
COMMITTED = "The secret is the committed one"
FOLLOW = "The wins follow from the secret, the randomness and issued_tickets"
ORDER = "The raffle was created, closed and drawn in this order"
PAST, FUTURE = "2000-01-01T00:00:00Z", "9999-01-01T00:00:00Z"
CLEAR = "\x1b[2J"  # clears a terminal
# Could be mistaken for other randomness.
UNCLEAR = ["7\n", "7 ", " 7", "7  8", "7\ufe0f", "\u3164", "\u202e", "ü", "7\xa08", "7\t8", CLEAR]
CHUNKED, NEXT = "Transfer-Encoding: chunked", 'Link: <{}>; rel="next"'


def sha256(*parts, order="big"):
    return hashlib.sha256(
        b"".join(p if isinstance(p, bytes) else p.to_bytes(8, order) for p in parts)
    ).digest()


def dealt(raffle_id, secret, total, place, mistake=None):
    """Follow steps 1 and 2 of the docstring with none of the program's code, perhaps with a mistake."""
    key = sha256(
        b"raffle-deal-2",
        raffle_id.encode(),
        secret.hex().encode() if mistake == "text secret" else secret,
    )
    side = math.isqrt(total)
    while side * side < total or (side % 2 and mistake != "odd side"):
        side += 1
    x = place - 1
    while True:
        left, right = x // side, x % side
        for number in range(24):
            digest = sha256(
                key, number, right, order="little" if mistake == "little-endian round" else "big"
            )
            left, right = right, (left + int.from_bytes(digest[:8], "big")) % side
        x = left * side + right
        if x < total or mistake == "no walk":
            return x % total + 1


def drawn_by_recipe(raffle_id, secret, randomness, total, issued, amount, mistake=None):
    """Follow all steps, and return the numbers that win."""
    key = sha256(b"raffle-draw-2", raffle_id.encode(), secret, randomness.encode())
    words, counter, cells, numbers = [], 0, {}, []
    for last in range(issued, max(issued - amount, 0), -1):
        word = None
        while word is None or (word >= 2**64 // last * last and mistake != "no rejection"):
            if not words:
                digest = sha256(
                    key, counter, order="little" if mistake == "little-endian counter" else "big"
                )
                words = [int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16, 24)]
                counter += mistake != "same digest again"
            word = words.pop(0)
        cell = (int(float(word)) if mistake == "53-bit words" else word) % last + 1
        place = cells.get(cell, cell)
        numbers.append(
            place if mistake == "no deck" else dealt(raffle_id, secret, total, place, mistake)
        )
        cells[cell] = last if mistake == "place moved once" else cells.get(last, last)
    return numbers


def assert_vectors(deal, draw_winners):
    """Check the vectors, which are read from the docstring."""
    decks = re.findall(r"(\d+) tickets, places (.+):\s+([\d ]+)\n", draw.__doc__)
    draws = re.findall(r'(\d+) of (\d+) issued; (.+); "(.+)".*:\s+([\d ]+)\n', draw.__doc__)
    assert len(decks + draws) >= 7
    for total, places, numbers in decks:
        shown = range(1, int(total) + 1) if "to" in places else (1, 2, 3, int(total))
        assert (
            " ".join(str(deal(RAFFLE_ID, SECRET, int(total), place)) for place in shown) == numbers
        )
    for issued, total, prizes, randomness, numbers in draws:
        inputs = (randomness, int(total), int(issued), sum(map(int, re.findall(r"\d+", prizes))))
        assert " ".join(map(str, draw_winners(RAFFLE_ID, SECRET, *inputs))) == numbers


def dealt_by_program(raffle_id, secret, *inputs):
    return draw.number_at(draw.derive_deal_key(raffle_id, secret), *inputs)


def test_the_vectors_are_dealt_and_drawn():
    assert_vectors(dealt_by_program, draw.winning_numbers)
    assert_vectors(dealt, drawn_by_recipe)


def test_usual_mistakes_in_ports_are_found_by_a_vector():
    mistakes = "text secret, odd side, no walk, little-endian round, little-endian counter, same digest again, no deck"
    for mistake in [*mistakes.split(", "), "53-bit words", "place moved once", "no rejection"]:
        with pytest.raises(AssertionError):
            assert_vectors(
                partial(dealt, mistake=mistake), partial(drawn_by_recipe, mistake=mistake)
            )
            pytest.fail(f"no vector finds {mistake}")


def test_the_recipe_and_the_program_agree():
    chance = random.Random(2166)
    for n in range(200):
        total = chance.randint(1, 2 ** chance.randint(1, 53) - 1)
        inputs = (
            RAFFLE_ID,
            sha256(n),
            f"{n} é",
            total,
            chance.randint(0, total),
            chance.randint(1, 9),
        )
        assert list(draw.winning_numbers(*inputs)) == drawn_by_recipe(*inputs), inputs


def test_the_deck_deals_every_number_once():
    for total in (*range(1, 50), 99, 100, 101, 1000):
        numbers = [dealt_by_program(RAFFLE_ID, SECRET, total, place + 1) for place in range(total)]
        assert sorted(numbers) == [*range(1, total + 1)], total


def distance(outcomes, items, length):
    """Return chi-square, divided by what one uniform sample in a thousand exceeds (Wilson and Hilferty)."""
    possible = list(permutations(items, length))
    expected, degrees = len(outcomes) / len(possible), len(possible) - 1
    chi_square = sum((outcomes.count(each) - expected) ** 2 / expected for each in possible)
    return chi_square / degrees / (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def test_every_order_of_the_tickets_is_equally_likely():
    odd = partial(dealt, mistake="odd side")
    for deal, total in (
        (dealt_by_program, 3),
        (dealt_by_program, 4),
        (dealt_by_program, 5),
        (odd, 5),
    ):
        # Fixed, so that nothing fails by chance, and enough of them to find an odd side.
        secrets = [sha256(n) for n in range(10 * math.factorial(total))]
        orders = [
            tuple(deal(RAFFLE_ID, secret, total, place + 1) for place in range(total))
            for secret in secrets
        ]
        assert (distance(orders, range(1, total + 1), total) < 1) == (deal is not odd), (
            deal,
            total,
        )


def test_every_issued_ticket_is_equally_likely_to_win():
    issued = [dealt_by_program(RAFFLE_ID, SECRET, 5, place) for place in range(1, 5)]
    draws = [
        tuple(draw.winning_numbers(RAFFLE_ID, SECRET, f"round {n}", 5, 4, 2)) for n in range(1200)
    ]
    assert distance(draws, issued, 2) < 1


def test_every_input_changes_the_draw():
    inputs = (RAFFLE_ID, SECRET, "x", 2**40, 2**39, 3)
    others = (RAFFLE_ID.replace("9", "8", 1), bytes(32), "x ", 2**40 + 2**20, 2**39 + 1)
    changed = [(*inputs[:n], other, *inputs[n + 1 :]) for n, other in enumerate(others)]
    assert len({tuple(draw.winning_numbers(*each)) for each in (inputs, *changed)}) == 6


@pytest.fixture
def drawn(client):
    """Answers on a raffle of 400 tickets, 15 of them issued: while open, once closed, once drawn, and its wins."""
    path = client.new_raffle(400, PRIZES)
    opened = client.get(path).json
    for n in range(15):
        client.participate(path, f"10.2.0.{n}")
    closed = client.close(path).json
    wins = client.draw(path, {"public_randomness": "7 13 21"}).json
    return SimpleNamespace(open=opened, closed=closed, raffle=client.get(path).json, wins=wins)


def run(directory, *arguments, python=("-IS", "draw.py")):
    """Run draw.py, copied alone; return its exit status and the lines it prints, which may not command a terminal."""
    shutil.copy(ROOT / "draw.py", directory)
    command = [sys.executable, *python, *arguments]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, timeout=60, encoding="utf-8", check=False
    )
    *lines, rest = done.stdout.split("\n")
    assert all(line.isprintable() for line in lines), lines
    assert (rest, bool(done.stderr)) == ("", done.returncode > 1), done.stderr
    return done.returncode, lines


def check(directory, raffle, *pages, before=()):
    """Save answers, as JSON unless they are bytes, in files called 0, 1, 2...; run the program on them."""
    answers = [raffle, *pages, *before]
    for n, value in enumerate(answers):
        (directory / str(n)).write_bytes(
            value if isinstance(value, bytes) else json.dumps(value).encode()
        )
    names, end = [str(n) for n in range(len(answers))], len(answers) - len(before)
    return run(directory, *names[:end], *(["--before", *names[end:]] if before else []))


def assert_not_checked(outcome, words=""):
    """Check that the program says in one line of ASCII why it did not check a draw."""
    status, [line] = outcome
    assert (status, line[:13], line.isascii(), words in line) == (1, "NOT CHECKED  ", True, True), (
        line
    )


def test_a_sentence_fails_and_the_status_is_1_exactly_when_its_fact_is_broken(drawn, tmp_path):
    sentences = [AGREES, ALGORITHM, COMMITTED, FOLLOW, ORDER]
    status, lines = check(
        tmp_path, drawn.raffle, drawn.wins[:5], drawn.wins[5:], before=[drawn.open, drawn.raffle]
    )
    assert (status, lines[:5]) == (0, [f"holds  {sentence}" for sentence in sentences])
    first, second, *rest = drawn.wins
    wins = [
        [second, first, *rest],
        [*drawn.wins, first],
        [{**first, "prize": "Book"}, second, *rest],
    ]
    broken = [
        ([ALGORITHM], {"algorithm": ["raffle-draw-1"]}),
        ([COMMITTED], {"draw_commitment": ["0" * 64]}),
        ([COMMITTED, FOLLOW], {"secret": ["0" * 64]}),
        ([FOLLOW], {"id": [RAFFLE_ID], "public_randomness": ["7 13 22"], "total_tickets": [4000]}),
        ([FOLLOW], {"issued_tickets": [14], "prizes": [PRIZES[::-1]], "wins": wins}),
        ([ORDER], {"created_at": [FUTURE], "closed_at": [PAST, FUTURE], "drawn_at": [PAST]}),
    ]
    for failing, changes in broken:
        expected = [
            f"{'FAILS' if sentence in failing else 'holds'}  {sentence}"
            for sentence in sentences[1:]
        ]
        for member, value in (
            (member, value) for member, values in changes.items() for value in values
        ):
            status, lines = check(
                tmp_path, {**drawn.raffle, member: value}, value if member == "wins" else drawn.wins
            )
            assert (status, lines[:4]) == (1, expected), (member, value)


def test_every_answer_that_was_saved_before_is_compared(drawn, tmp_path):
    others = {
        "id": RAFFLE_ID,
        "total_tickets": 401,
        "prizes": PRIZES[::-1],
        "created_at": PAST,
        "algorithm": "draw",
    }
    others.update(randomness_source="drand", draw_commitment="0" * 64, issued_tickets=16)
    closed = {"issued_tickets": 14, "closed_at": PAST, "public_randomness": "x"}
    for saved, changes in (
        (drawn.open, others),
        (drawn.closed, {**others, **closed}),
        (drawn.raffle, closed),
    ):
        assert draw.check_draw(drawn.raffle, drawn.wins, [{**saved, "name": "Winter fair"}])[0] == (
            AGREES,
            True,
        )
        for member, value in changes.items():
            results = draw.check_draw(
                drawn.raffle, drawn.wins, [drawn.open, {**saved, member: value}, drawn.closed]
            )
            assert results[0] == (f"{AGREES} (different: {member})", False)
    # A file counts, whether it is named by the same --before or by one of its own.
    check(
        tmp_path,
        drawn.raffle,
        drawn.wins,
        {**drawn.open, "total_tickets": 401},
        {**drawn.closed, "closed_at": PAST},
    )
    for before in (["--before", "2", "3"], ["--before", "2", "--before", "3"]):
        status, lines = run(tmp_path, "0", "1", *before)
        assert (status, lines[0]) == (
            1,
            f"FAILS  {AGREES} (different: closed_at, total_tickets)",
        ), before


def test_answers_of_a_wrong_form_are_not_checked(drawn):
    pen, times = (
        {"name": "Pen", "amount": 1},
        ("", "2026-07-04", f"{PAST}\n", "٢000-01-01T00:00:00Z", 7, None),
    )
    amounts = [[{**pen, "amount": amount}] for amount in (0, True, 1.0, "1", 401, math.nan, None)]
    wrong = {
        "algorithm": (),
        "id": ("", RAFFLE_ID.upper(), f"{RAFFLE_ID}0", 7, None),
        "total_tickets": (11, 2**53, 400.0, True, "400", math.nan, None),
        "prizes": (
            "x",
            [[]],
            [{"name": "Pen"}],
            [pen, {"name": "Pen", "amount": -1}],
            None,
            *amounts,
        ),
        "issued_tickets": (-1, 401, 15.0, True, "15", math.nan, None),
        "randomness_source": (CLEAR, "a\n", "\u202e", "\ud800", 7, ["x"]),
        "public_randomness": ("", "x" * 1001, *UNCLEAR, "\ud800", 7, None),
        **dict.fromkeys(
            ("draw_commitment", "secret"), ("", "AB" * 32, "ab" * 31, "ab" * 33, 7, None)
        ),
        **dict.fromkeys(("created_at", "closed_at", "drawn_at"), times),
    }
    answers = [
        ({**drawn.raffle, member: value}, drawn.wins) for member in wrong for value in wrong[member]
    ]
    answers += [
        ({name: drawn.raffle[name] for name in drawn.raffle if name != member}, drawn.wins)
        for member in wrong
    ]
    first, *rest = drawn.wins
    wins = [{**first, "ticket_number": number} for number in (True, 1.0, math.nan, "1", None)]
    wins += [
        {**first, "prize": 1},
        {"ticket_number": 1},
        {"prize": "Bicycle"},
        [1, "Bicycle"],
        "x",
        1,
        None,
    ]
    answers += [(drawn.raffle, [win, *rest]) for win in wins]
    for raffle, listed in answers:
        with pytest.raises((KeyError, TypeError, ValueError)):
            pytest.fail(f"{draw.check_draw(raffle, listed)} of {raffle}, {listed}")


def test_the_program_says_what_it_cannot_check(drawn, tmp_path):
    issued = "- that issued_tickets was 15 when the raffle was closed"
    promise = "- that the raffle showed the same tickets, prizes and source before the close, and this commitment:"
    commitment = f"  {drawn.raffle['draw_commitment']}"
    decided = {
        **drawn.closed,
        "public_randomness": "7 13 21",
    }  # from then on the server knows the winners
    for remarks, *cases in (
        ([promise, commitment, issued], [], [drawn.raffle], [decided]),
        ([promise, commitment], [drawn.closed]),
        ([issued], [drawn.open], [drawn.open, drawn.raffle]),
        ([], [drawn.closed, drawn.open]),
    ):
        for before in cases:
            status, lines = check(tmp_path, drawn.raffle, drawn.wins, before=before)
            assert (status, lines[4 + bool(before) : -2]) == (
                0,
                ["This program cannot check:", *remarks],
            ), before


def test_the_program_shows_the_randomness_and_what_you_must_trust(client, tmp_path, monkeypatch):
    made = (
        "- that the server did not choose this randomness, because no public randomness was used:"
    )
    chosen = "- that nobody chose this randomness, and that it was unknown to everyone at {}:"
    announced = "- that this randomness is the announced one, and was unknown to everyone at {}:"
    for source, randomness, remark in (
        (None, None, made),
        (None, "7 13", chosen),
        ("drand, é", "7 13", announced),
    ):
        path, _ = client.new_sold_out(randomness_source=source)
        wins, raffle = (
            client.draw(path, randomness and {"public_randomness": randomness}).json,
            client.get(path).json,
        )
        shown = [remark.format(raffle["closed_at"]), f"  {raffle['public_randomness']}"]
        shown += [f"  announced: {source}"] if source else []
        status, lines = check(tmp_path, raffle, wins)
        assert (status, lines[-len(shown) :]) == (0, shown)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # all that some terminals know
    assert run(tmp_path, "0", "1", python=("-S", "draw.py"))[1][-1] == r"  announced: drand, \xe9"


def test_a_draw_in_the_future_is_a_remark_with_both_times(drawn, tmp_path):
    status, lines = check(tmp_path, {**drawn.raffle, "drawn_at": FUTURE}, drawn.wins)
    remark = f"The draw is dated {FUTURE}, but this computer's clock shows 2...-..-..T..:..:..Z: one of them is wrong."
    assert (status, lines[3]) == (0, f"holds  {ORDER}")
    assert re.fullmatch(remark, lines[4]), lines


def test_files_that_are_not_all_answers_are_not_checked(drawn, tmp_path):
    for junk in (b"", b"\xff", CLEAR.encode(), b"[" * 200_000, json.dumps(CLEAR).encode()):
        assert_not_checked(check(tmp_path, junk, drawn.wins), "0 does not hold ")
    assert_not_checked(
        check(tmp_path, drawn.raffle, drawn.wins, before=[b"x"]), "2 does not hold JSON"
    )
    assert_not_checked(check(tmp_path, drawn.raffle, drawn.raffle), "1 does not hold a list")
    assert_not_checked(check(tmp_path, drawn.raffle, drawn.wins[:5]), "only 5 of 15 wins were read")
    assert_not_checked(check(tmp_path, drawn.closed, []), "have not been drawn yet")
    assert_not_checked(check(tmp_path, {"drawn_at": PAST}, drawn.wins), "'id' is missing")
    assert_not_checked(run(tmp_path, "no-such-file", "1"), "no-such-file")


def test_no_member_can_send_a_command_to_the_terminal(drawn, tmp_path):
    for member in drawn.raffle:
        check(tmp_path, {**drawn.raffle, member: CLEAR}, drawn.wins)
    check(tmp_path, drawn.raffle, drawn.wins, before=[dict.fromkeys(drawn.raffle, CLEAR)])
    name = f"{CLEAR}\ud800"
    prizes, wins = (
        [{**prize, "name": name} for prize in PRIZES],
        [{**win, "prize": name} for win in drawn.wins],
    )
    assert check(tmp_path, {**drawn.raffle, "prizes": prizes}, wins)[0] == 0


def test_a_command_line_that_names_no_draw_is_refused(tmp_path):
    root = "http://127.0.0.1/raffles/"
    for arguments in ((), ("0",), (root,), ("ftp://127.0.0.1/raffles/1/",), (f"{root}1/", "1")):
        assert run(tmp_path, *arguments) == (2, []), arguments


def test_a_raffle_is_checked_at_any_address_at_or_below_its_own(serve, tmp_path):
    server = serve(
        program=(
            "-c",
            "import storage; storage.MAX_WINS_PER_PAGE = 5; import raffle; raffle.main()",
        )
    )
    path, _ = server.create_sold_out(20, PRIZES)  # twenty wins, on four pages
    address, raffle_id = f"http://127.0.0.1:{server.port}{path}", path.split("/")[2]
    (tmp_path / "before").write_text(json.dumps(server.request("GET", path)[2]))
    assert server.request("POST", f"{path}winners/", {"public_randomness": "7 13 21"})[0] == 201
    upper = address.replace(raffle_id, raffle_id.upper()).replace("http", "HTTP")
    for spelled in (
        address,
        address[:-1],
        f"{address}winners/?limit=2&cursor=3",
        f"{address[:-1]}?x#y",
        upper,
    ):
        assert run(tmp_path, spelled, "--before", "before")[0] == 0, spelled
    assert_not_checked(run(tmp_path, address.replace(raffle_id, RAFFLE_ID)), "404")


def answer(value, *headers, status="200 OK"):
    """Return the bytes of a response, the value as JSON unless it is bytes already."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, "")).encode() + body


class Site(socketserver.ThreadingTCPServer):
    """A server of one raffle. It answers as it is told: what is below the raffle's path, with pieces of bytes."""

    def __init__(self, drawn):
        super().__init__(("127.0.0.1", 0), None)
        self.address = f"http://127.0.0.1:{self.server_address[1]}/raffles/{drawn.raffle['id']}/"
        self.asked, self.answers = [], {"": [answer(drawn.raffle)], "winners": [answer(drawn.wins)]}
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def finish_request(self, request, client_address):
        self.asked.append(request.recv(65536).split()[1].decode().split("/")[3])
        with suppress(OSError):  # the program may have closed
            for piece in self.answers[self.asked[-1]]:
                request.sendall(piece)


@pytest.fixture
def site(drawn):
    with Site(drawn) as site:
        yield site
        site.shutdown()


def test_no_more_pages_are_read_than_the_draw_has_wins(site, drawn, tmp_path):
    for page in ([], drawn.wins[:1]):
        site.asked.clear()
        site.answers["winners"] = [answer(page, NEXT.format(f"{site.address}winners/?cursor=1"))]
        assert_not_checked(run(tmp_path, site.address))
        assert site.asked == ["", *["winners"] * 15]


def test_an_answer_is_read_up_to_16_mib(site, drawn, tmp_path):
    raffle = json.dumps(drawn.raffle).encode()
    for length, expected in ((16 * 2**20, 0), (16 * 2**20 + 1, 1)):
        site.answers[""] = [answer(raffle.ljust(length))]
        assert run(tmp_path, site.address)[0] == expected, length
    # Not even if the length of a chunk is negative.
    for head in (answer(b""), answer(b"f" * 15 + b"\r\n", CHUNKED), answer(b"-1\r\n", CHUNKED)):
        pieces = repeat(bytes(2**20), 64)
        site.answers[""] = chain([head], pieces)
        assert_not_checked(run(tmp_path, site.address))
        assert next(pieces, None), head


def test_a_server_that_stalls_is_given_up(site, tmp_path):
    patched = "import sys; sys.path.append('.'); import draw; draw.READ_TIMEOUT = 0.2; sys.exit(draw.main())"
    for start in (b"", answer(b"{")):
        is_over = threading.Event()
        site.answers[""] = chain([start], (b"" for _ in [0] if is_over.wait(70)))
        assert_not_checked(run(tmp_path, site.address, python=("-ISc", patched)), "timed out")
        is_over.set()


def test_what_is_no_answer_of_the_raffle_is_not_checked(site, drawn, tmp_path):
    lies = [
        b"",
        f"{CLEAR}\r\n".encode(),
        answer(b"{"),
        answer(b"[" * 200_000),
        answer([drawn.raffle]),
    ]
    lies += [
        answer(b"[]", status=f"404 {CLEAR}"),
        answer(b"", f"Location: http://{CLEAR}/", status="302 Found"),
    ]
    lies += [
        answer(b"2\r\n[", CHUNKED),
        answer(CLEAR.encode(), CHUNKED),
        answer({**drawn.raffle, "id": RAFFLE_ID}),
    ]
    for below, wrong in (("", lies), ("winners", [answer(drawn.raffle), answer([[CLEAR]])])):
        [good] = site.answers[below]
        for lie in (
            *wrong,
            good[:-9],
            good.replace(b"\r\n", b"\r\nContent-Length: 9999\r\n", 1)[:-9],
        ):
            site.answers[below] = [lie]
            assert_not_checked(run(tmp_path, site.address))
        site.answers[below] = [good]
    # Nor is a file read because a server says so.
    (tmp_path / "rest").write_text(json.dumps(drawn.wins[5:]))
    for target in ((tmp_path / "rest").as_uri(), f"http://{CLEAR}/?"):
        site.answers["winners"] = [answer(drawn.wins[:5], NEXT.format(target))]
        assert_not_checked(run(tmp_path, site.address))
