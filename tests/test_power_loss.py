"""Loss of power: whatever the disk holds afterwards, it holds everything that had been answered.

A process that is killed leaves its writes to the kernel, so it loses nothing that was not synced.
A loss of power does. So strace records what a server writes, syncs and answers, and from the record
the tests rebuild what a disk may hold at any instant: all that was synced by then and, of what was
written since, everything, nothing or any part, down to single sectors.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
from helpers import FAULTS, Server, at_once, installed, wait_for

pytestmark = pytest.mark.long

# How often power is lost, half of it with the default settings: up to 500 times in one life.
POWER_LOSSES = int(os.environ.get("RAFFLE_TEST_POWER_LOSSES", "200"))
LOSSES_PER_LIFE = min(500, max(1, POWER_LOSSES // 2))
LIVES = max(1, POWER_LOSSES // 2 // LOSSES_PER_LIFE)
LOSSES_PER_START = 25  # one state in so many is served, all are read

SECTOR = 512  # bytes that a disk writes as a whole
PARTS = ("nothing", "everything", "some writes", "some sectors")

# What SQLite does to files, and waitress to connections. A question mark: where the call exists.
CALLS = "openat,pwrite64,ftruncate,?unlink,unlinkat,fsync,fdatasync,recvfrom,sendto"
# -D: the server is the process that is started, and strace is its child.
STRACE = f"-D -f -y -xx -s 10000000 -e signal=kill -e trace={CALLS}".split()

AS_IT_IS = ("raffle.py",)
WITH_CHECKPOINTS = (FAULTS, "serve_with_pragma", "wal_autocheckpoint = 20")
WITH_FEWER_SYNCS = (FAULTS, "serve_with_pragma", "synchronous = NORMAL")

PRIZES = [{"name": "Bicycle", "amount": 1}, {"name": "Pen", "amount": 9}]
# Almost a megabyte: five of them fill the 1,000 pages after which SQLite checkpoints by itself.
LONG_LIST = [{"name": "x" * 200, "amount": 1}] * 4_500


# The disk


class Cached:
    """A file or a directory: what the disk holds for certain, and the changes that it may hold.

    content: bytearray, or dict of name and Cached or None. A change is (name, Cached or None) of a
    directory, and (offset, bytes) or, for a new length, (length, None) of a file.
    """

    def __init__(self, content):
        self.content = content
        self.changes = []
        self.synced = 0

    def mark(self):
        """Return the number of changes so far: what a sync covers that begins now."""
        return self.synced + len(self.changes)

    def sync(self, mark):
        """Hold for certain what a sync covers that has ended."""
        while self.synced < mark:
            apply(self.content, *self.changes.pop(0))
            self.synced += 1

    def now(self):
        """Return the content as programs see it."""
        return self.after_loss("everything", random)

    def after_loss(self, part, rng):
        """Return the content after a loss of power that leaves a part of what is not synced."""
        content = self.content.copy()
        share = {"nothing": 0, "everything": 1}.get(part, rng.random())
        for change in self.changes:
            for where, what in in_sectors(*change) if part == "some sectors" else [change]:
                if rng.random() < share:
                    apply(content, where, what)
                elif isinstance(what, bytes) and part == "some sectors" and rng.random() < 0.5:
                    # The file has its new length already, and there zeros.
                    apply(content, where + len(what), b"")
        return content


def apply(content, where, what):
    """Make one change to the content of a file or a directory."""
    if isinstance(content, dict):
        content[where] = what
        return

    content.extend(bytes(max(0, where - len(content))))
    if what is None:
        del content[where:]
    else:
        content[where : where + len(what)] = what


def in_sectors(where, what):
    """Return a change as the changes of single sectors."""
    if not isinstance(what, bytes):
        return [(where, what)]

    end = where + len(what)
    borders = [where, *range(where - where % SECTOR + SECTOR, end, SECTOR), end]
    return [(a, what[a - where : b - where]) for a, b in zip(borders, borders[1:])]


class Disk:
    """The directory of a database, and the answers that have left.

    Each event of a record is a call of a method.
    """

    def __init__(self):
        self.directory = Cached({})
        self.answers = []
        self.syncs = {}

    def change(self, name, where, what):
        self.directory.now()[name].changes.append((where, what))

    def create(self, name):
        if not self.directory.now().get(name):
            self.directory.changes.append((name, Cached(bytearray())))

    def unlink(self, name):
        self.directory.changes.append((name, None))

    def begin_sync(self, thread, name):
        subject = self.directory.now()[name] if name else self.directory
        self.syncs[thread] = subject, subject.mark()

    def end_sync(self, thread):
        subject, mark = self.syncs.pop(thread)
        subject.sync(mark)

    def answer(self, exchange):
        self.answers.append(exchange)

    def end(self):
        pass

    def after_loss(self, part, rng):
        """Return the files, name and bytes, after a loss of power; arguments as for Cached."""
        files = self.directory.after_loss(part, rng)
        return {name: bytes(file.after_loss(part, rng)) for name, file in files.items() if file}


# The record


class Exchange:
    """A request, and its answer."""

    def __init__(self):
        self.request = b""
        self.response = b""

    def read(self):
        """Take both apart, once they are complete."""
        head, _, _ = self.request.partition(b"\r\n\r\n")
        self.method, self.path, _ = head.decode().partition("\r\n")[0].split(" ")
        self.raffle = self.path.split("/")[2]
        self.action = self.path.split("/")[3] if self.raffle else ""
        key = re.search(r"(?i)^Idempotency-Key: the-key-of-(.*)$", head.decode(), re.MULTILINE)
        self.source = key and key[1].strip()

        head, _, body = self.response.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ")[1])
        self.body = json.loads(body)

    def sent(self):
        return json.loads(self.request.partition(b"\r\n\r\n")[2])


class Record:
    """What traces say of one database: events, the names of methods of Disk with arguments."""

    def __init__(self, database):
        self.database = database
        self.mark = in_hex(str(database))
        self.directory = f"<{in_hex(str(database.parent))}>"
        self.events = []
        self.exchanges = {}

    def read(self, trace):
        """Add what a trace says. Of a call that ends after others have begun, it has two lines."""
        unfinished = {}
        with trace.open() as lines:
            for line in lines:
                thread, _, text = line.rstrip("\n").partition(" ")
                text = text.lstrip()
                if text.startswith("<... "):
                    text = unfinished.pop(thread) + text.partition(" resumed>")[2]
                else:
                    self._begin(thread, text)
                if text.endswith(" <unfinished ...>"):
                    unfinished[thread] = text[: -len(" <unfinished ...>")]
                else:
                    self._end(thread, text)

    def _begin(self, thread, text):
        call, _, rest = text.partition("(")
        if self._is_sync(call, rest):
            name = self._name(rest) if self.mark in rest else None
            self.events.append(("begin_sync", thread, name))

        # An answer counts from here: nobody knows when within the call it leaves.
        exchange = self.exchanges.get(rest.partition(",")[0])
        if call == "sendto" and exchange and not exchange.response:
            self.events.append(("answer", exchange))

    def _end(self, thread, text):
        call, _, rest = text.partition("(")
        result = re.match(" ([0-9]+)", rest.rpartition("=")[2])
        if not result:
            return  # it has failed, or not returned

        if call in ("recvfrom", "sendto"):
            self._exchange(call, rest, int(result[1]))
        elif self._is_sync(call, rest):
            self.events.append(("end_sync", thread))
        elif self.mark in rest and not self._name(rest).endswith("-shm"):  # which SQLite makes anew
            self._change(call, rest, int(result[1]))

    def _is_sync(self, call, rest):
        is_ours = self.mark in rest or self.directory in rest
        return is_ours and call in ("fsync", "fdatasync")

    def _exchange(self, call, rest, length):
        data, connection = string_in(rest)[:length], rest.partition(",")[0]
        exchange = self.exchanges.get(connection)
        if call == "sendto" and exchange:
            exchange.response += data
        elif call == "recvfrom" and data:
            if not exchange or exchange.response:
                exchange = self.exchanges[connection] = Exchange()
            exchange.request += data

    def _change(self, call, rest, result):
        name, number = self._name(rest), re.search(r", ([0-9]+)\) +=", rest)
        if call == "openat":
            self.events += [("create", name)] if "O_CREAT" in rest else []
            self.events += [("change", name, 0, None)] if "O_TRUNC" in rest else []
        elif call == "pwrite64":
            data = string_in(rest)[:result]
            self.events.append(("change", name, int(number[1]), data))
        elif call == "ftruncate":
            self.events.append(("change", name, int(number[1]), None))
        elif call in ("unlink", "unlinkat"):
            self.events.append(("unlink", name))

    def _name(self, rest):
        """Return the name of the file that a call mentions, one of the database's."""
        end = rest[rest.index(self.mark) + len(self.mark) :]
        return self.database.name + from_hex(re.match(r"((?:\\x[0-9a-f]{2})*)", end)[1]).decode()


def in_hex(text):
    """Return text as strace writes it."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def string_in(rest):
    """Return the only string among the arguments of a call."""
    return from_hex(rest.split('"', 2)[1])


def from_hex(string):
    return bytes.fromhex(string.replace("\\x", ""))


# The life of a server


def end_traced(server, trace, how):
    """End a server, and wait for the last line of its trace."""
    server.stop(how)
    last = re.compile(rf"(?m)^{server.process.pid} +\+\+\+ .*\n".encode())

    def is_complete():
        with trace.open("rb") as file:
            file.seek(max(0, trace.stat().st_size - 200))
            return last.search(file.read())

    wait_for(is_complete)


def record_life(directory, program):
    """Return the record of a server that is killed and of the next one, which is stopped."""
    directory.mkdir()
    record = Record(directory / "raffle.db")
    for how in (signal.SIGKILL, signal.SIGTERM):
        trace = directory / f"trace-{how.name}"
        long_lists = 5 if program == AS_IT_IS and how == signal.SIGKILL else 0
        strace = [installed("strace"), *STRACE, "-o", str(trace)]
        server = Server(directory, program, strace, processes=1)
        try:
            sold_out = partial(play, server, total=20, participants=20, first=0)
            closed = partial(play, server, total=1000, participants=20, first=1000)
            left_open = partial(play, server, 1000, participants=15, first=2000, is_drawn=False)
            at_once([sold_out, closed, left_open, partial(fill, server, long_lists)])
        finally:
            end_traced(server, trace, how)
        record.read(trace)

    for event, *arguments in record.events:
        if event == "answer":
            arguments[0].read()
    assert_complete(record, directory)
    return record


def fill(server, number):
    for _ in range(number):
        server.create(len(LONG_LIST), LONG_LIST)


def play(server, total, participants, first, is_drawn=True):
    """Play a raffle to its end: participants come at once, and those who have a key ask twice."""
    raffle = server.create(total, PRIZES)  # a closes_at would be sent from here
    asking = [first + n for n in range(participants) for _ in range(1 + n % 2)]
    with ThreadPoolExecutor(6) as pool:
        tickets = list(pool.map(lambda n: participate(server, raffle, n), asking))

    if is_drawn:
        if participants < total:
            ask(server, "POST", f"{raffle}close/", 200)
        ask(server, "GET", raffle, 200)
        wins = ask(server, "POST", f"{raffle}winners/", 201)
        use(server, raffle, wins, {ticket["ticket_number"]: ticket for ticket in tickets})


def participate(server, raffle, n):
    source = f"127.1.{n // 250}.{n % 250 + 1}"
    headers = {"Idempotency-Key": f"the-key-of-{source}"} if n % 2 else {}
    return ask(server, "POST", f"{raffle}participate/", 201, source=source, **headers)


def use(server, raffle, wins, tickets):
    """Verify and redeem some prizes of a raffle, and replace a winner."""
    for win in wins[:3]:
        ticket = tickets[win["ticket_number"]]
        assert ask(server, "POST", f"{raffle}verify-ticket/", 200, ticket)["has_won"]
        ask(server, "POST", f"{raffle}redeem/", 201, ticket)
        ask(server, "POST", f"{raffle}verify-ticket/", 200, ticket)
    replace(server, raffle, wins[3])


def replace(server, raffle, win):
    """Give a prize that nobody has come for to another ticket."""
    body = {"ticket_number": win["ticket_number"], "prize": win["prize"], "reason": "unclaimed"}
    status, _, answer = server.request("POST", f"{raffle}replacements/", body)
    assert status == 201, answer


def ask(server, method, path, wanted, body=None, **options):
    status, _, answer = server.request(method, path, body, **options)
    assert status == wanted, answer
    return answer


def assert_complete(record, directory):
    """Check a record: it leads to the files that are there, and has every kind of answer."""
    disk = Disk()
    for event, *arguments in record.events:
        getattr(disk, event)(*arguments)
    names = {"raffle.db", "raffle.db-wal", "raffle.db-journal"}
    found = {file.name: file.read_bytes() for file in directory.iterdir() if file.name in names}
    assert disk.after_loss("everything", random) == found

    kinds = Counter((exchange.action, exchange.status) for exchange in disk.answers)
    assert kinds["participate", 201] > 100, kinds
    assert {("", 201), ("close", 200), ("winners", 201), ("redeem", 201)} <= set(kinds), kinds


# What answers promise

TIMES = ("closed_at", "drawn_at")  # of a raffle: once set, they stay


class Promises:
    """What the answers so far say of raffles, tickets and wins. All of it must be kept."""

    def __init__(self, answers):
        self.raffles = {}  # id: issued_tickets and what else has been shown
        self.tickets = set()  # (id, number)
        self.wins = {}  # (id, number): prize
        self.redemptions = {}  # (id, number): time
        self.replacements = {}  # (id, number of the ticket that has the prize now): prize
        for exchange in answers:
            if exchange.status in (200, 201):
                getattr(self, f"_{exchange.action.replace('-', '_') or 'raffle'}")(exchange)

    def _raffle(self, exchange):
        shown = exchange.body
        raffle = self.raffles.setdefault(shown["id"], {"issued_tickets": 0})
        raffle["issued_tickets"] = max(raffle["issued_tickets"], shown["issued_tickets"])
        raffle.update({name: shown[name] for name in TIMES if shown[name]})

    _close = _raffle

    def _participate(self, exchange):
        self.tickets.add((exchange.raffle, exchange.body["ticket_number"]))

    def _winners(self, exchange):
        for win in exchange.body:
            self.wins[exchange.raffle, win["ticket_number"]] = win["prize"]

    def _redeem(self, exchange):
        if exchange.body["redeemed_at"]:
            ticket = exchange.raffle, exchange.sent()["ticket_number"]
            self.redemptions[ticket] = exchange.body["redeemed_at"]

    _verify_ticket = _redeem

    def _replacements(self, exchange):
        ticket = exchange.raffle, exchange.body["ticket_number"]
        self.replacements[ticket] = exchange.body["prize"]

    def assert_kept(self, raffles, tickets, wins, replaced=()):
        """Check what a database holds.

        raffles: {id: members}. tickets: (id, number) of each. wins: {(id, number): (prize,
        redeemed_at)}. replaced: (id, number) of the tickets that lose their prize,
        whether that has been answered or not.
        """
        for raffle_id, promised in self.raffles.items():
            held = raffles[raffle_id]
            assert held["issued_tickets"] >= promised["issued_tickets"]
            assert all(promised.get(name) in (None, held[name]) for name in TIMES)

        assert self.tickets <= set(tickets)
        for (raffle_id, number), prize in self.wins.items():
            assert raffles[raffle_id]["drawn_at"]
            assert (raffle_id, number) in replaced or wins[raffle_id, number][0] == prize

        for key, redeemed_at in self.redemptions.items():
            assert wins[key][1] == redeemed_at
        for key, prize in self.replacements.items():
            assert wins[key][0] == prize


TICKETS = "SELECT id, number FROM ticket JOIN raffle ON sequence = raffle"
WINS = """
SELECT id, ticket_number, prize.name, redeemed_at
FROM win
JOIN raffle ON sequence = win.raffle
JOIN prize ON prize.raffle = win.raffle AND prize.position = win.prize_position
"""


def replaced_tickets(record):
    """Return the (id, number) of the tickets that lose their prize in the life of a server."""
    return {
        (exchange.raffle, exchange.body["replaced_ticket_number"])
        for exchange in record.exchanges.values()
        if exchange.action == "replacements" and exchange.status == 201
    }


def assert_read(database, answers, replaced):
    """Check the database of a state, read past the program."""
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        read = connection.execute
        read("PRAGMA synchronous = OFF")  # the next state needs no sync of this one
        assert [*map(tuple, read("PRAGMA integrity_check"))] == [("ok",)]
        if not answers:
            return

        assert read("PRAGMA foreign_key_check").fetchall() == []
        raffles = {row["id"]: row for row in read("SELECT * FROM raffle")}
        tickets = [*map(tuple, read(TICKETS))]
        wins = {(raffle_id, number): tuple(win) for raffle_id, number, *win in read(WINS)}

    counts = Counter(raffle_id for raffle_id, _ in tickets)
    assert all(row["issued_tickets"] == counts[key] for key, row in raffles.items())
    Promises(answers).assert_kept(raffles, tickets, wins, replaced)


def assert_served(directory, answers, replaced):
    """Check the database of a state as a server shows it, and that the server goes on."""
    promises = Promises(answers)
    server = Server(directory)
    try:
        raffles = {key: ask(server, "GET", f"/raffles/{key}/", 200) for key in promises.raffles}
        for exchange in answers[-20:]:
            if exchange.action == "participate":
                assert_held(server, exchange, raffles[exchange.raffle])

        wins = {}
        for raffle_id in raffles:
            for win in server.list_wins(f"/raffles/{raffle_id}/"):
                wins[raffle_id, win["ticket_number"]] = win["prize"], win["redeemed_at"]
        promises.assert_kept(raffles, promises.tickets, wins, replaced)
        assert_goes_on(server, promises)
    finally:
        assert server.stop() == 0


def assert_held(server, exchange, raffle):
    """Check that a ticket is still its participant's."""
    path = f"/raffles/{exchange.raffle}/"
    if raffle["drawn_at"]:
        ask(server, "POST", f"{path}verify-ticket/", 200, exchange.body)
    elif exchange.source:
        headers = {"Idempotency-Key": f"the-key-of-{exchange.source}"}
        again = ask(server, "POST", f"{path}participate/", 201, source=exchange.source, **headers)
        assert again == exchange.body


def assert_goes_on(server, promises):
    """Check that a raffle that is open goes on with a number that nobody has been told."""
    for raffle_id in promises.raffles:
        path = f"/raffles/{raffle_id}/participate/"
        status, _, answer = server.request("POST", path, source="127.9.0.1")
        assert status in (201, 410), answer
        assert status == 410 or (raffle_id, answer["ticket_number"]) not in promises.tickets
    new = server.create()
    assert ask(server, "POST", f"{new}participate/", 201)["ticket_number"]


# Losses of power


def instants(events):
    """Return after how many events to lose power: when most is unsynced, or most is promised."""
    names = [event for event, *_ in events] + ["end"]
    return [
        n
        for n, (before, after) in enumerate(zip(["", *names], names))
        if after in ("end_sync", "end") or (before in ("answer", "unlink") and after != "answer")
    ]


def lose_power(record, number, rng):
    """Yield so many different states of the disk after losses of power, and the answers before."""
    places, seen = instants(record.events), set()
    while len(seen) < number:
        chosen = rng.sample(places, min(number - len(seen), len(places)))
        disk = Disk()
        for n, (event, *arguments) in enumerate([*record.events, ("end",)]):
            if n in chosen:
                part = rng.choice(PARTS)
                files = disk.after_loss(part, rng)
                state = n, digest(files)
                if state not in seen:
                    seen.add(state)
                    yield f"{part} left after {n} events", files, [*disk.answers]
            getattr(disk, event)(*arguments)


def failures_of(record, directory, number):
    """Check the disk after so many losses of power; return what is wrong, and print counts."""
    seed = random.randrange(2**32)
    failures, served, replaced = [], 0, replaced_tickets(record)
    for n, (name, files, answers) in enumerate(lose_power(record, number, random.Random(seed))):
        try:
            restore(directory, files)
            assert_read(directory / "raffle.db", answers, replaced)
            if n % LOSSES_PER_START == 0:
                restore(directory, files)
                assert_served(directory, answers, replaced)
                served += 1
        except (AssertionError, LookupError, sqlite3.Error) as error:
            failures.append(f"{name}: {error!r:.300}")

    print(
        f"{number} different states after a loss of power, {served} of them served: "
        f"{len(failures)} failures ({len(record.events)} events, seed {seed})"
    )
    return failures


def digest(files):
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).digest()


def restore(directory, files):
    """Put the files of a state into an empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("program", [AS_IT_IS, WITH_CHECKPOINTS], ids=["default", "checkpoints"])
@pytest.mark.parametrize("n", range(LIVES))
def test_nothing_that_was_answered_is_lost_with_the_power(tmp_path, program, n):
    record = record_life(tmp_path / "life", program)
    assert failures_of(record, tmp_path / "disk", LOSSES_PER_LIFE) == []


def test_a_database_that_syncs_too_little_is_found_out(tmp_path):
    record = record_life(tmp_path / "life", WITH_FEWER_SYNCS)
    assert len(failures_of(record, tmp_path / "disk", 40)) > 10
