"""Anyone can check a draw: with the program itself, and with one written from the README's recipe alone."""

import copy
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT, assert_problem, fill

import raffle
import storage

README = (ROOT / "README.md").read_text(encoding="utf-8")
RAFFLE_ID = "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21"
SECRET = bytes(range(32))
VECTORS = [
    (
        int(row[0]),
        [(name, int(amount)) for amount, name in re.findall(r"(\d+) (\w+)", row[1])],
        row[2],
        [int(number) for number in row[3].split(", ")],
        row[4],
    )
    for row in re.findall(
        r"^\| (\d+) tickets; (.+); `(.+?)`.*? \| ([\d, ]+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE
    )
]
# Twelve of twelve: that another draw comes out the same by chance is less likely than 1e-8.
PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 5}, {"name": "Book", "amount": 6}]


def recipe(raffle_id, secret, public_randomness, total_tickets, prizes):
    """Follow the README's steps, with none of the program's code: return the wins and wins_sha256."""
    key = hashlib.sha256(b"raffle-draw-1" + raffle_id.encode() + secret + public_randomness.encode()).digest()
    words = []
    counter = 0
    cells = {}
    last = total_tickets
    wins = []
    for name, amount in prizes:
        for _ in range(amount):
            while True:
                if not words:
                    digest = hashlib.sha256(key + counter.to_bytes(8, "big")).digest()
                    words = [int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16, 24)]
                    counter += 1
                word = words.pop(0)
                if word < 2**64 // last * last:
                    break
            cell = word % last + 1
            wins.append((cells.get(cell, cell), name))
            cells[cell] = cells.get(last, last)
            last -= 1
    lines = "".join(f"{number} {len(name.encode())} {name}\n" for number, name in wins)
    return wins, hashlib.sha256(lines.encode()).hexdigest()


def program(raffle_id, secret, public_randomness, total_tickets, prizes):
    """Do the same with the program's code."""
    amount = sum(amount for _, amount in prizes)
    numbers = storage.winning_numbers(raffle_id, secret, public_randomness, total_tickets, amount)
    wins = list(zip(numbers, storage.names_of_wins(prizes)))
    return wins, storage.digest_of_wins(wins)


@pytest.mark.parametrize("draw", [recipe, program])
def test_the_vectors_of_the_readme(draw):
    assert len(VECTORS) == 3
    assert max(total for total, *_ in VECTORS) > 2**32
    for total, prizes, public_randomness, numbers, digest in VECTORS:
        wins, found = draw(RAFFLE_ID, SECRET, public_randomness, total, prizes)
        assert [number for number, _ in wins] == numbers
        assert found == digest


def test_the_recipe_and_the_program_draw_the_same():
    for n in range(200):
        inputs = (RAFFLE_ID, hashlib.sha256(b"%d" % n).digest(), f"{n} é", n + 3, [("Pen", 1), ("Größe", n + 1)])
        assert recipe(*inputs) == program(*inputs)


def test_every_input_changes_the_draw():
    total, amount = 2**40, 3
    usual = (RAFFLE_ID, SECRET, "x", total, amount)
    changed = [
        (RAFFLE_ID.replace("9", "8", 1), *usual[1:]),
        (RAFFLE_ID, bytes([1, *SECRET[1:]]), *usual[2:]),
        (*usual[:2], "y", *usual[3:]),
        (*usual[:2], "x ", *usual[3:]),
    ]
    draws = [tuple(storage.winning_numbers(*inputs)) for inputs in (usual, *changed)]
    assert len(set(draws)) == len(draws)


@pytest.fixture
def drawn(client):
    """A raffle that has been drawn with public randomness: its path, its receipt and its wins."""
    path = client.new_raffle(total_tickets=12, prizes=PRIZES)
    client.sell_out(path)
    client.request_from("10.0.0.1", "POST", f"{path}winners/", {"public_randomness": "7 13 21"}, status=201)
    return path, client.get(f"{path}draw/").json, client.get(f"{path}winners/").json


def test_the_receipt_has_all_that_is_needed_and_nothing_of_the_participants(client, drawn):
    path, receipt, wins = drawn
    created = client.get(path).json
    assert list(receipt) == [
        "algorithm",
        "raffle_id",
        "total_tickets",
        "prizes",
        "draw_commitment",
        "secret",
        "public_randomness",
        "sold_out_at",
        "drawn_at",
        "wins_sha256",
    ]
    assert receipt["algorithm"] == "raffle-draw-1"
    assert receipt["public_randomness"] == "7 13 21"
    assert [receipt[key] for key in ("raffle_id", "total_tickets", "prizes", "draw_commitment")] == [
        created[key] for key in ("id", "total_tickets", "prizes", "draw_commitment")
    ]
    secret = bytes.fromhex(receipt["secret"])
    assert hashlib.sha256(secret).hexdigest() == receipt["draw_commitment"]
    prizes = [(prize["name"], prize["amount"]) for prize in PRIZES]
    expected, digest = recipe(receipt["raffle_id"], secret, "7 13 21", 12, prizes)
    assert [(win["ticket_number"], win["prize"]) for win in wins] == expected
    assert receipt["wins_sha256"] == digest
    assert created["created_at"] <= receipt["sold_out_at"] <= receipt["drawn_at"]


def test_the_secret_is_shown_to_nobody_before_the_draw(client):
    path = client.new_raffle(total_tickets=1)
    assert_problem(client.get(f"{path}draw/", status=404), "Winners for the raffle have not been drawn yet")
    client.sell_out(path)
    bodies = [client.get(path).text, client.get("/raffles/").text, client.get(f"{path}winners/").text]
    assert_problem(client.get(f"{path}draw/", status=404), "Winners for the raffle have not been drawn yet")
    client.draw(path)
    secret = client.get(f"{path}draw/").json["secret"]
    assert not any(secret in body for body in bodies)
    assert_problem(client.get(f"/raffles/{RAFFLE_ID}/draw/", status=404), "There is no raffle with this id")


def test_without_public_randomness_the_server_makes_some(client):
    made = set()
    for headers in ({}, {"Content_Type": "application/json"}, {"Content_Type": "text/plain", "Content_Length": "00"}):
        path = client.new_raffle(total_tickets=1)
        client.sell_out(path)
        client.request_from("10.0.0.1", "POST", f"{path}winners/", status=201, **headers)
        made.add(client.get(f"{path}draw/").json["public_randomness"])
    assert len(made) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", randomness) for randomness in made)


@pytest.mark.parametrize("randomness", ["x", " ", "x" * 1000, "🎲" * 1000, "a\0b"])
def test_public_randomness_is_any_text_of_1_to_1000_characters(client, randomness):
    path = client.new_raffle(total_tickets=1)
    client.sell_out(path)
    client.request_from("10.0.0.1", "POST", f"{path}winners/", {"public_randomness": randomness}, status=201)
    receipt = client.get(f"{path}draw/").json
    assert receipt["public_randomness"] == randomness
    assert all(holds for _, holds in raffle.check_draw(receipt, client.get(f"{path}winners/").json))


@pytest.mark.parametrize(
    "body",
    [{}, {"publicRandomness": "x"}, b"x", b"[]", b" "]
    + [{"public_randomness": value} for value in (None, "", "x" * 1001, 7, True, ["x"], {}, "\ud800")],
)
def test_anything_else_in_its_place_is_refused_and_draws_nothing(client, body):
    path = client.new_raffle(total_tickets=1)
    client.sell_out(path)
    assert_problem(client.request_from("10.0.0.1", "POST", f"{path}winners/", body, status=400))
    assert client.get(path).json["winners_drawn"] is False


def test_a_body_that_is_no_json_or_too_long_or_in_chunks_draws_nothing(client):
    path = client.new_raffle(total_tickets=1)
    client.sell_out(path)
    client.request_from("10.0.0.1", "POST", f"{path}winners/", b"{}", status=415, Content_Type="text/plain")
    client.request_from("10.0.0.1", "POST", f"{path}winners/", b" " * (2**20 + 1), status=413)
    # Under a server that does not put chunks together.
    client.request_from("10.0.0.1", "POST", f"{path}winners/", b"", status=400, Transfer_Encoding="chunked")
    assert client.get(path).json["winners_drawn"] is False


def test_a_clock_that_is_put_back_does_not_spoil_the_draw(client, monkeypatch):
    path = client.new_raffle(total_tickets=1)
    client.sell_out(path)
    monkeypatch.setattr(storage, "_now", lambda: "2000-01-01T00:00:00Z")
    wins = client.draw(path).json
    assert all(holds for _, holds in raffle.check_draw(client.get(f"{path}draw/").json, wins))


def test_a_true_draw_holds(drawn):
    _, receipt, wins = drawn
    results = list(raffle.check_draw(receipt, wins))
    assert len(results) == 7
    assert all(holds for _, holds in results)


def flipped(text):
    """Return a text with one bit of its last character changed, or of its last digit if it is hexadecimal."""
    if re.fullmatch("[0-9a-f]{64}|[0-9a-f-]{36}", text):
        return text[:-1] + f"{int(text[-1], 16) ^ 1:x}"
    return text[:-1] + chr(ord(text[-1]) ^ 1)


@pytest.mark.parametrize(
    "member", ["raffle_id", "secret", "draw_commitment", "public_randomness", "wins_sha256", "algorithm"]
)
def test_a_bit_changed_in_the_receipt_makes_the_check_fail(drawn, member):
    _, receipt, wins = drawn
    receipt[member] = flipped(receipt[member])
    assert not all(holds for _, holds in raffle.check_draw(receipt, wins))


@pytest.mark.parametrize(
    "change",
    [
        lambda receipt, wins: receipt.update(total_tickets=receipt["total_tickets"] ^ 1),
        lambda receipt, wins: receipt["prizes"][0].update(name="Bicyclf"),
        lambda receipt, wins: receipt["prizes"][0].update(amount=2),
        lambda receipt, wins: receipt["prizes"][0].update(amount=2**53 - 1),
        lambda receipt, wins: receipt["prizes"].reverse(),
        lambda receipt, wins: receipt.update(drawn_at="2000-01-01T00:00:00Z"),
        lambda receipt, wins: wins[0].update(ticket_number=wins[0]["ticket_number"] ^ 1),
        lambda receipt, wins: wins[0].update(prize="Bicyclf"),
        lambda receipt, wins: wins.pop(),
        lambda receipt, wins: wins.append(wins[0]),
        lambda receipt, wins: wins.reverse(),
    ],
)
def test_a_bit_changed_in_prizes_or_winners_makes_the_check_fail(drawn, change):
    _, receipt, wins = copy.deepcopy(drawn)
    change(receipt, wins)
    assert not all(holds for _, holds in raffle.check_draw(receipt, wins))


@pytest.mark.parametrize(
    "changes",
    [
        {"total_tickets": 2**65},
        {"total_tickets": 12.0},
        {"total_tickets": True},
        {"prizes": []},
        {"prizes": [{"name": "Pen", "amount": 13}, {"name": "Pen", "amount": -1}]},
        {"secret": ""},
        {"secret": "AB" * 32},
        {"draw_commitment": "\x1b[2J" + "ab" * 30},
        {"raffle_id": "nonsense"},
        {"public_randomness": ""},
        {"public_randomness": "x" * 1001},
        {"sold_out_at": "0"},
        {"drawn_at": "whenever"},
        {"drawn_at": None},
        {"drawn_at": "٢٠٢٦-07-04T12:00:00Z"},
    ],
)
def test_a_receipt_that_is_none_is_not_checked(drawn, changes):
    _, receipt, wins = drawn
    with pytest.raises((ValueError, TypeError)):
        list(raffle.check_draw({**receipt, **changes}, wins))


@pytest.mark.parametrize("number", [True, 1.0, float("inf"), "1", None])
def test_a_win_that_is_none_is_not_checked(drawn, number):
    _, receipt, wins = drawn
    with pytest.raises(ValueError, match="ticket_number"):
        list(raffle.check_draw(receipt, [{**wins[0], "ticket_number": number}, *wins[1:]]))


@pytest.fixture
def run_check(capsys):
    """Check sources with `run_check(...)`, which returns the exit code and what was printed."""

    def run(*sources):
        code = raffle.check([str(source) for source in sources])
        return code, capsys.readouterr().out

    return run


def test_the_program_ends_with_the_outcome_of_the_check(drawn, tmp_path):
    _, receipt, wins = drawn
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    for code, listed in ((0, wins), (1, wins[::-1])):
        (tmp_path / "winners.json").write_text(json.dumps(listed))
        command = [sys.executable, ROOT / "raffle.py", "check", "receipt.json", "winners.json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (code, "")
        assert done.stdout.count("FAILS  ") == 2 * code


def test_a_draw_is_checked_page_by_page_or_saved(serve, tmp_path, database, run_check):
    path = fill(database, 20_001, [{"name": "Pen", "amount": 20_001}])
    server = serve()
    url = f"http://127.0.0.1:{server.port}{path}"
    code, said = run_check(url)
    assert (code, said.startswith("NOT CHECKED")) == (1, True)
    assert "Winners for the raffle have not been drawn yet" in said
    server.request("POST", f"{path}winners/", {"public_randomness": "7 13 21"})
    for spelled in (url, url.rstrip("/")):
        code, said = run_check(spelled)
        assert code == 0, said
        assert [line[:7] for line in said.splitlines()[:9]] == ["holds  "] * 8 + ["What no"]
        assert server.request("GET", path)[2]["draw_commitment"] in said
        assert "  '7 13 21'" in said
    receipt = server.request("GET", f"{path}draw/")[2]
    wins, page = [], f"{path}winners/"
    while page:
        _, headers, more = server.request("GET", page)
        wins += more
        page = (re.findall("<(.*)>", headers.get("Link", "")) or [None])[0]
    files = tmp_path / "receipt.json", tmp_path / "winners.json"
    for file, value in zip(files, (receipt, wins)):
        file.write_text(json.dumps(value))
    assert run_check(*files)[0] == 0
    wins[0], wins[1] = wins[1], wins[0]
    files[1].write_text(json.dumps(wins))
    code, said = run_check(*files)
    assert code == 1
    assert "FAILS  The winners follow from the secret and the public randomness" in said
    for content in ("x", "[]", "{}", '{"secret": 1}', "[" * 200_000):
        files[0].write_text(content)
        code, said = run_check(*files)
        assert (code, said.startswith("NOT CHECKED")) == (1, True)


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Content-Length: 100", "\x1b[2Jholds  all, \xe9\n"),
        ("Content-Length: 99999999999999999", "{}"),
        ("Content-Length: 99999999999999999999999999999", "{}"),
        ("Transfer-Encoding: chunked", "ff\r\n\x1b[2Jholds  all"),
        ("Transfer-Encoding: chunked", "fffffffffffffff\r\n{}"),
        ("Transfer-Encoding: chunked", "-5\r\n{}"),
    ],
)
def test_what_a_server_sends_instead_of_a_receipt_is_shown_as_ascii_if_at_all(run_check, status, header, body):
    class Cheats(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status, "\x1b[1m")
            self.send_header(*header.split(": "))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Cheats) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        code, said = run_check(f"http://127.0.0.1:{server.server_port}/raffles/{RAFFLE_ID}/")
        server.shutdown()
    assert code == 1
    assert re.fullmatch("NOT CHECKED [ -~]*\n", said)


def test_a_server_that_shows_another_raffle_or_lists_without_end_is_found_out(drawn, run_check):
    _, receipt, wins = drawn
    shown = {
        "id": receipt["raffle_id"],
        **{name: receipt[name] for name in ("total_tickets", "prizes", "draw_commitment")},
    }

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rstrip("/").rpartition("/")[2]
            self.send_response(200)
            if name == "winners" and "endless" in self.path:
                self.send_header("Link", f'<{self.path}>; rel="next"')
            self.end_headers()
            changed = {**shown, "total_tickets": 13} if "changed" in self.path else shown
            self.wfile.write(json.dumps({"draw": receipt, "winners": wins}.get(name, changed)).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}"
        codes = [
            run_check(f"{url}/{name}/{raffle_id}/")[0]
            for name, raffle_id in (
                ("true", receipt["raffle_id"]),
                ("true", RAFFLE_ID),
                ("changed", receipt["raffle_id"]),
                ("endless", receipt["raffle_id"]),
            )
        ]
        server.shutdown()
    assert codes == [0, 1, 1, 1]


def test_of_two_draws_at_once_the_receipt_is_of_the_one_that_counts(serve, database):
    path = fill(database, 1_000, [{"name": "Pen", "amount": 100}])
    server = serve()
    answers = {}

    def draw(randomness):
        answers[randomness] = server.request("POST", f"{path}winners/", {"public_randomness": randomness})

    threads = [threading.Thread(target=draw, args=(f"round {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [(randomness, wins)] = [(name, wins) for name, (status, _, wins) in answers.items() if status == 201]
    receipt = server.request("GET", f"{path}draw/")[2]
    assert receipt["public_randomness"] == randomness
    assert all(holds for _, holds in raffle.check_draw(receipt, wins))
    assert server.request("GET", f"{path}winners/")[2] == wins
