"""Several raffles live at random on one or two servers, and a model says what each answer must be.

A longer run, or the same choices once more, perhaps at other instants and with other answers:

    RAFFLE_TEST_SECONDS=600 RAFFLE_TEST_SEED=7 env/bin/pytest -s -m long tests/test_random_lives.py
"""

import calendar
import copy
import faulthandler
import hashlib
import http.client
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import permutations
from typing import NamedTuple

import pytest
from conftest import STANDARD_ERROR, TIME_LIMIT
from helpers import all_pages, at_once, query

pytestmark = pytest.mark.long

SEED = int(os.environ.get("RAFFLE_TEST_SEED") or random.SystemRandom().randrange(10**6))
SECONDS = float(os.environ.get("RAFFLE_TEST_SECONDS") or 15)
SHORTEST = 500  # steps, however slow the machine is

TIME = "%Y-%m-%dT%H:%M:%SZ"
MANAGER, STRANGER = "127.0.0.1", "127.0.2.1"
PARTICIPANTS = [f"127.0.1.{n}" for n in range(1, 9)]
KEYS = ["8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9325"]
NO_TICKET = {"ticket_number": 1, "verification_code": "0000-0000-0000-0000-0000-0000"}

# What a request asks for: its method, the end of its path, and its status if it succeeds.
VERBS = {
    "create": ("POST", "", 201),
    "list": ("GET", "", 200),
    "show": ("GET", "", 200),
    "delete": ("DELETE", "", 204),
    "participate": ("POST", "participate/", 201),
    "close": ("POST", "close/", 200),
    "draw": ("POST", "winners/", 201),
    "winners": ("GET", "winners/", 200),
    "verify": ("POST", "verify-ticket/", 200),
    "redeem": ("POST", "redeem/", 201),
    "replace": ("POST", "replacements/", 201),
    "replacements": ("GET", "replacements/", 200),
}
FOR_MANAGERS = {"create", "delete", "close", "draw", "redeem", "replace"}

# The rules that refuse, with their status; the first is that of a body that is not valid.
RULES = {
    "about:blank": 400,
    "urn:raffle:already-closed": 403,
    "urn:raffle:already-drawn": 403,
    "urn:raffle:already-participated": 403,
    "urn:raffle:already-redeemed": 403,
    "urn:raffle:closes-by-itself": 403,
    "urn:raffle:has-participants": 403,
    "urn:raffle:invalid-code": 400,
    "urn:raffle:invalid-page": 400,
    "urn:raffle:no-prize": 403,
    "urn:raffle:no-such-raffle": 404,
    "urn:raffle:no-tickets-left": 410,
    "urn:raffle:no-tickets-left-to-draw": 403,
    "urn:raffle:not-a-manager": 403,
    "urn:raffle:not-drawn": 400,
    "urn:raffle:randomness-required": 400,
    "urn:raffle:tickets-left": 403,
    "urn:raffle:too-many-prizes": 400,
}

# How often each is chosen while a raffle has tickets, until its draw, and from then on.
CHOICES = {
    "show": (2, 2, 2),
    "delete": (1, 1, 1),
    "participate": (20, 5, 2),
    "close": (1, 1, 1),
    "draw": (1, 4, 1),
    "winners": (1, 1, 2),
    "verify": (1, 1, 5),
    "redeem": (1, 1, 3),
    "replace": (1, 1, 6),
    "replacements": (1, 1, 2),
}


# The model: it knows the rules, and nothing of the program

UNKNOWN = ...  # what the rules leave open, until an answer shows it


class Refusal(Exception):
    """The rules refuse a request; the argument is the type of the problem."""


def refuse(rule, is_broken):
    """Raise Refusal if a rule is broken."""
    if is_broken:
        raise Refusal(f"urn:raffle:{rule}")


class Life:
    """One raffle. Each verb changes it and returns what the answer must show, or raises Refusal."""

    def __init__(self):
        self.raffle = {}  # as it is shown
        self.tickets = {}  # address: its Idempotency-Key, its ticket
        self.wins = []
        self.changes = []  # winners who were replaced
        self.is_deleted = False

    def create(self, name, total_tickets, prizes, randomness_source=None, closes_at=None):
        refuse("too-many-prizes", sum(prize["amount"] for prize in prizes) > total_tickets)
        # None that is chosen here is near these bounds.
        if closes_at and not -60 < seconds(closes_at) - time.time() < 366 * 86400:
            raise Refusal("about:blank")

        for member in ("id", "created_at", "algorithm", "draw_commitment"):
            self.raffle[member] = UNKNOWN
        for member in ("closed_at", "public_randomness", "drawn_at", "secret"):
            self.raffle[member] = None
        self.raffle.update(name=name, total_tickets=total_tickets, prizes=prizes)
        self.raffle.update(issued_tickets=0, available_tickets=total_tickets, winners_drawn=False)
        self.raffle.update(randomness_source=randomness_source)

        self.raffle.update(closes_at=closes_at, replacements=0)
        return self.raffle

    def show(self):
        return self.raffle

    def list(self):
        return {member: value for member, value in self.raffle.items() if member != "prizes"}

    def delete(self):
        refuse("has-participants", self.tickets)
        self.is_deleted = True

    def participate(self, address, key):
        used_key, ticket = self.tickets.get(address, (None, None))
        if key and key == used_key and not self.raffle["winners_drawn"]:
            return ticket

        refuse("no-tickets-left", self.raffle["closed_at"])
        refuse("already-participated", ticket)

        ticket = {"raffle_id": self.raffle["id"]}
        ticket.update(ticket_number=UNKNOWN, verification_code=UNKNOWN)
        self.tickets[address] = key, ticket

        self.raffle["issued_tickets"] += 1
        self.raffle["available_tickets"] -= 1
        if not self.raffle["available_tickets"]:
            self.raffle["closed_at"] = UNKNOWN
        return ticket

    def close(self):
        refuse("already-closed", self.raffle["closed_at"])
        refuse("closes-by-itself", self.raffle.get("closes_at"))
        self.raffle.update(closed_at=UNKNOWN, available_tickets=0)
        return self.raffle

    def draw(self, public_randomness=None):
        is_decided = self.raffle["public_randomness"]
        if not is_decided:
            self.decide(public_randomness)

        if not self.raffle["winners_drawn"]:
            self.raffle.update(winners_drawn=True, drawn_at=UNKNOWN, secret=UNKNOWN)
            prizes = [prize for prize in self.raffle["prizes"] for _ in range(prize["amount"])]
            for name in [prize["name"] for prize in prizes][: self.raffle["issued_tickets"]]:
                self.wins.append({"ticket_number": UNKNOWN, "prize": name, "redeemed_at": None})

        refuse("already-drawn", is_decided)
        return self.wins

    def decide(self, public_randomness=None):
        """Do the first half of a draw: a server that dies may leave the other half undone."""
        refuse("tickets-left", not self.raffle["closed_at"])
        is_announced = self.raffle["randomness_source"]
        refuse("randomness-required", is_announced and not public_randomness)
        self.raffle["public_randomness"] = public_randomness or UNKNOWN

    def winners(self, limit):
        refuse("invalid-page", limit < 1)
        return self.wins

    def verify(self, ticket_number, verification_code):
        refuse("not-drawn", not self.raffle["winners_drawn"])
        refuse("invalid-code", (ticket_number, verification_code) not in self.codes())

        win = self.win_of(ticket_number)
        verdict = {"has_won": False, "prize": None, "redeemed_at": None}
        if win:
            verdict = {"has_won": True, "prize": win["prize"], "redeemed_at": win["redeemed_at"]}

        times = {each["replaced_ticket_number"]: each["replaced_at"] for each in self.changes}
        verdict["replaced_at"] = times.get(ticket_number)
        return verdict

    def redeem(self, ticket_number, verification_code):
        self.verify(ticket_number, verification_code)
        win = self.win_of(ticket_number)
        refuse("no-prize", not win)
        refuse("already-redeemed", win["redeemed_at"])

        win["redeemed_at"] = UNKNOWN
        return win

    def replace(self, ticket_number, prize, reason):
        refuse("not-drawn", not self.raffle["winners_drawn"])
        win = self.win_of(ticket_number)
        refuse("no-prize", not win or win["prize"] != prize)
        refuse("already-redeemed", win["redeemed_at"])
        drawn = len(self.wins) + len(self.changes)
        refuse("no-tickets-left-to-draw", drawn == self.raffle["issued_tickets"])

        change = {"ticket_number": UNKNOWN, "prize": prize, "replaced_ticket_number": ticket_number}
        self.changes.append({**change, "reason": reason, "replaced_at": UNKNOWN})
        self.raffle["replacements"] += 1
        win["ticket_number"] = UNKNOWN
        return self.changes[-1]

    def replacements(self, limit):
        refuse("invalid-page", limit < 1)
        return self.changes

    def win_of(self, ticket_number):
        """Return the win that a ticket holds now, or None."""
        return next((win for win in self.wins if win["ticket_number"] == ticket_number), None)

    def codes(self):
        """Return number and code of each ticket that has been shown."""
        tickets = [ticket for _, ticket in self.tickets.values()]
        pairs = [(ticket["ticket_number"], ticket["verification_code"]) for ticket in tickets]
        return [pair for pair in pairs if UNKNOWN not in pair]

    def contradictions(self):
        """Yield what cannot be true, whatever the rules leave open."""
        numbers = [number for number, _ in self.codes()]
        held = [(win["ticket_number"], win["prize"]) for win in self.wins]
        lost = [(each["replaced_ticket_number"], each["prize"]) for each in self.changes]
        given = [(each["ticket_number"], each["prize"]) for each in self.changes]
        winners = [number for number, _ in held + lost if number is not UNKNOWN]
        is_known = not any(UNKNOWN in pair for pair in held + given)
        secret = self.raffle["secret"] or UNKNOWN

        if not {*numbers, *winners} <= {*range(1, self.raffle["total_tickets"] + 1)}:
            yield "a number is none of the raffle's"
        if len(numbers) > len(set(numbers)):
            yield "two tickets have one number"
        if len(winners) > len(set(winners)):
            yield "a ticket wins twice"
        if len({*numbers, *winners}) > len(self.tickets):
            yield "a number wins that nobody has"
        if is_known and not set(given) <= {*held, *lost}:
            yield "who follows a winner does not hold the prize"
        if secret is not UNKNOWN and self.raffle["draw_commitment"] != sha256(secret):
            yield "the secret is not that of the commitment"


def sha256(secret):
    return hashlib.sha256(bytes.fromhex(secret)).hexdigest()


def seconds(text):
    return calendar.timegm(time.strptime(text, TIME))


# How answers are held against it


class Request(NamedTuple):
    """What somebody asks for; the path is that of the raffle."""

    verb: str
    path: str
    source: str
    arguments: dict


class Answer(NamedTuple):
    """What comes back; the status is None if nothing does."""

    sent: float
    received: float
    status: int
    body: object


def agrees(expected, got):
    """Tell whether an answer shows what is expected, which learns from it what was unknown."""
    if isinstance(expected, list):
        is_alike = isinstance(got, list) and len(got) == len(expected)
        return is_alike and all(map(agrees, expected, got))

    if isinstance(expected, dict):
        if not isinstance(got, dict) or not set(expected) <= set(got):
            return False
        unknown = [name for name, value in expected.items() if value is UNKNOWN]
        expected.update({name: got[name] for name in unknown})
        return None not in map(expected.get, unknown) and all(
            type(got[name]) is type(value) and got[name] == value
            for name, value in expected.items()
        )

    return expected == got


def expect(life, request):
    """Change a life as a request does; return the status and body that the rules expect."""
    try:
        refuse("not-a-manager", request.verb in FOR_MANAGERS and request.source != MANAGER)
        refuse("no-such-raffle", life.is_deleted)
        body = getattr(life, request.verb)(**request.arguments)
        return VERBS[request.verb][2], body
    except Refusal as refusal:
        status = RULES[str(refusal)]
        return status, {"type": str(refusal), "status": status}


def lives_at(life, sent, received):
    """Return the life as it may be at an instant between two, of which its closes_at may be one."""
    due = life.raffle.get("closes_at")
    if not due or life.raffle["closed_at"] or life.is_deleted or received < seconds(due):
        return [life]

    closed = copy.deepcopy(life)
    closed.raffle.update(closed_at=due, available_tickets=0)
    return [closed] if sent >= seconds(due) else [life, closed]


def lives_after(life, request, answer):
    """Return the lives that a life may have become by this answer, and what was expected."""
    after = copy.deepcopy(life)
    status, body = expect(after, request)
    expected = f"{status} {body}".replace("Ellipsis", "...")

    if answer.status is None:
        decided = copy.deepcopy(life)
        if request.verb == "draw" and status == 201:
            decided.decide(**request.arguments)
        return [life, decided, after], expected

    if answer.status != status or not agrees(body, answer.body):
        return [], expected

    contradictions = list(after.contradictions()) if after.raffle else []
    return [] if contradictions else [after], f"{expected} {' and '.join(contradictions)}"


def explain(lives, exchanges):
    """Return the lives that explain the answers to simultaneous requests, and what was expected."""
    found, expectations = [], []
    for order in permutations(exchanges):
        possible = lives
        for request, answer in order:
            befores = [
                now for life in possible for now in lives_at(life, answer.sent, answer.received)
            ]
            outcomes = [lives_after(before, request, answer) for before in befores]
            possible = [after for afters, _ in outcomes for after in afters]
            expectations += [f"{request.verb}: {expected}" for _, expected in outcomes]
        found += possible
    different = [life for n, life in enumerate(found) if vars(life) not in map(vars, found[:n])]
    return different, list(dict.fromkeys(expectations))


# The servers, and what is asked of them


def exchange(server, request):
    """Send a request, and return its answer; of a list, all pages as one."""
    method, end, _ = VERBS[request.verb]
    path, arguments, headers, body = f"{request.path}{end}", dict(request.arguments), {}, None
    pages = []

    def get(path):
        pages.append(server.request(method, path, body, request.source, **headers))
        return pages[-1][1:]

    if request.verb == "participate" and arguments["key"]:
        headers["Idempotency-Key"] = arguments["key"]
    elif "limit" in arguments:
        path += f"?limit={arguments['limit']}"
    elif arguments and request.verb != "participate":
        body = arguments

    sent = time.time()
    bodies = list(all_pages(get, path))
    received = time.time()

    status = pages[-1][0]
    if status != 200 or "limit" not in arguments:
        return Answer(sent, received, status, bodies[-1])

    sizes = [len(page) for page in bodies]
    assert all(size == arguments["limit"] for size in sizes[:-1]), f"{path}: pages of {sizes}"
    assert sizes[-1] <= arguments["limit"], f"{path}: pages of {sizes}"
    return Answer(sent, received, status, [entry for page in bodies for entry in page])


def exchange_or_lose(server, request):
    """Send a request to a server that may die, and return its answer, or one that says nothing."""
    sent = time.time()
    try:
        return exchange(server, request)
    except (OSError, http.client.HTTPException):
        return Answer(sent, time.time(), None, None)


class World:
    """The servers, the lives that each raffle may have, and a chance of what happens next."""

    def __init__(self, serve, chance):
        self.serve, self.chance = serve, chance
        self.servers = [serve()]
        self.lives = {}  # path: the lives that explain all answers so far; the latest raffle last
        self.unseen = []  # requests that died with their server, and have not been overwritten
        self.created = self.steps = 0
        self.log = []  # path and line of every exchange
        self.outcomes = Counter()

    def step(self):
        """Let one thing happen."""
        self.steps += 1
        events = {
            self.ask: 80,
            self.ask_two_at_once: 12,
            self.create: 3,
            self.list_all: 1,
            self.stop_a_server: 1,
            self.start_a_server: 1,
        }
        happens = self.pick(events) if self.lives else self.create
        happens()

    def pick(self, weights):
        return self.chance.choices(list(weights), list(weights.values()))[0]

    # What happens

    def ask(self):
        request = self.choose_request(self.choose_path())
        self.hold_against_model(request.path, [(request, self.exchange(request))])

    def ask_two_at_once(self):
        """Send two requests at one instant: the answers must be those of one of the two orders."""
        path = self.choose_path()
        # Those that read are no single instant: a list has pages, and a draw is shown half done.
        writing = {"participate", "close", "draw", "verify", "redeem", "replace", "delete"}
        requests = [self.choose_request(path, writing) for _ in range(2)]
        servers = [self.chance.choice(self.servers) for _ in requests]
        calls = [partial(exchange, *each) for each in zip(servers, requests)]
        self.hold_against_model(path, list(zip(requests, at_once(calls))))

    def create(self):
        request = self.choose_creation()
        self.note_creation(request, self.exchange(request))

    def list_all(self):
        """List all raffles, the latest first."""
        limit = self.chance.choice((7, 20, 50))
        request = Request("list", "/raffles/", STRANGER, {"limit": limit})
        answer = self.exchange(request)
        self.note("/raffles/", request, answer._replace(body=f"{len(answer.body)} raffles"))

        paths = [path for path, lives in self.lives.items() if not lives[0].is_deleted]
        listed = [f"/raffles/{raffle['id']}/" for raffle in answer.body]
        assert listed == paths[::-1], f"step {self.steps}, pages of {limit}: not all, latest first"
        for path, raffle in zip(listed, answer.body):
            entry = Request("list", path, STRANGER, {})
            self.hold_against_model(path, [(entry, answer._replace(body=raffle))])

    def start_a_server(self):
        if len(self.servers) == 1:
            self.servers.append(self.serve())

    def stop_a_server(self):
        """End a server while it has a request to answer: that is done, or it is not."""
        server = self.chance.choice(self.servers)
        how = self.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        creates = self.chance.random() < 0.2
        request = self.choose_creation() if creates else self.choose_last_request()

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(exchange_or_lose, server, request)
            wait([future], self.chance.uniform(0, 0.003))
            status = server.stop(how)
            answer = future.result()
        assert status == (0 if how == signal.SIGTERM else -how), server.log.read_text()

        self.servers.remove(server)
        server_is_left = bool(self.servers)
        late = [] if server_is_left else self.start_alone()
        if answer.status is None:
            # It may have been done at any time until now, and perhaps nobody sees it yet.
            answer = answer._replace(received=time.time())
            if how == signal.SIGKILL and server_is_left:
                self.unseen.append(request)

        if creates:
            self.note_creation(request, answer)
        else:
            self.hold_against_model(request.path, [(request, answer)])
        for path in late:
            self.hold_against_model(path, [])

    def start_alone(self):
        """Start a server when none is left; return the paths of raffles of which it may know more.

        A server that is killed while it syncs a commit can leave it in SQLite's -wal file, but
        not yet in the -shm file. Then the other server does not see it, and overwrites it when it
        writes next. But if it does not write either, whoever opens the database alone finds what
        was never answered.
        """
        self.servers.append(self.serve())
        late = [request for request in self.unseen if request.path in self.lives]
        for request in late:
            lost = Answer(time.time(), time.time(), None, None)
            self.lives[request.path], _ = explain(self.lives[request.path], [(request, lost)])
        for request in self.unseen:
            if request.verb == "create":
                self.look_for_a_raffle(request)
        self.unseen = []
        return [request.path for request in late]

    # What is chosen

    def choose_path(self):
        """Choose a raffle: mostly one of the latest."""
        paths = list(self.lives)
        return self.chance.choice(paths if self.chance.random() < 0.05 else paths[-6:])

    def stage(self, path):
        """Return 0 for a raffle that is open, 1 for one that is closed, 2 for one that is drawn."""
        raffle = self.lives[path][0].raffle
        return bool(raffle["closed_at"]) + raffle["winners_drawn"]

    def choose_creation(self):
        self.created += 1
        total, amounts = self.chance.randint(1, 9), [1] * self.chance.randint(1, 3)
        amounts[0] = self.chance.choice((1, 1, 1, 2, total))
        prizes = [
            {"name": self.chance.choice(("Bicycle", "Book", "Größe")), "amount": amount}
            for amount in amounts
        ]
        body = {"name": f"Fair {self.created}", "total_tickets": total, "prizes": prizes}

        if self.chance.random() < 0.3:
            body["randomness_source"] = "drand round 5000000"
        if self.chance.random() < 0.4:
            body["total_tickets"] += 9
            ahead = self.chance.choice((2, 3, 4, 5, 2, 3, 4, 5, -3600, 367 * 86400))
            body["closes_at"] = time.strftime(TIME, time.gmtime(time.time() + ahead))
        return Request("create", "/raffles/", self.choose_manager(), body)

    def choose_manager(self):
        """Choose who asks for what is only a manager's: mostly a manager."""
        return STRANGER if self.chance.random() < 0.05 else MANAGER

    def choose_request(self, path, among=frozenset(VERBS)):
        """Choose what is asked of a raffle: mostly what makes sense."""
        life, stage = self.lives[path][0], self.stage(path)
        verbs = [verb for verb in CHOICES if verb in among]
        verb = self.pick({verb: CHOICES[verb][stage] for verb in verbs})
        source = self.choose_manager() if verb in FOR_MANAGERS else STRANGER

        arguments = {}
        if verb == "participate":
            source = self.chance.choice(PARTICIPANTS)
            arguments = {"address": source, "key": self.chance.choice((None, *KEYS))}
        elif verb == "draw" and self.chance.random() < 0.6:
            arguments = {"public_randomness": f"round {self.chance.randrange(100)}"}
        elif verb in ("winners", "replacements"):
            arguments = {"limit": self.chance.choice((1, 2, 3, 10, 1, 2, 3, 10, 0))}
        elif verb in ("verify", "redeem"):
            arguments = self.choose_ticket(life)
        elif verb == "replace":
            arguments = self.choose_replacement(life)
        return Request(verb, path, source, arguments)

    def choose_last_request(self):
        """Choose what to ask of a server that dies: if possible a draw, with its many commits."""
        for path in list(self.lives)[-6:]:
            if self.stage(path) == 1 and self.chance.random() < 0.5:
                return Request("draw", path, MANAGER, {"public_randomness": "round 2166"})
        return self.choose_request(self.choose_path())

    def choose_ticket(self, life):
        """Choose a ticket, mostly one that has won, and sometimes with another one's code."""
        pairs = life.codes()
        if not pairs:
            return NO_TICKET
        winners = [pair for pair in pairs if life.win_of(pair[0])]
        number, code = self.chance.choice(
            winners if winners and self.chance.random() < 0.6 else pairs
        )
        if self.chance.random() < 0.15:
            code = self.chance.choice([*pairs, (0, NO_TICKET["verification_code"])])[1]
        return {"ticket_number": number, "verification_code": code}

    def choose_replacement(self, life):
        """Choose whom to replace: mostly one who holds the prize."""
        number, prize = self.chance.randint(1, 9), "Bicycle"
        if life.wins and self.chance.random() < 0.8:
            win = self.chance.choice(life.wins)
            number, prize = win["ticket_number"], win["prize"]
        if life.changes and self.chance.random() < 0.1:
            number = self.chance.choice(life.changes)["replaced_ticket_number"]
        reason = self.chance.choice(("unclaimed", "declined", "ineligible"))
        return {"ticket_number": number, "prize": prize, "reason": reason}

    # What is found

    def exchange(self, request):
        return exchange(self.chance.choice(self.servers), request)

    def note_creation(self, request, answer):
        """Hold the answer to a creation against the model, or else look for the raffle."""
        if answer.status is None:
            self.note("/raffles/", request, answer)
            self.look_for_a_raffle(request)
        elif answer.status == 201:
            path = f"/raffles/{answer.body['id']}/"
            self.lives[path] = [Life()]
            self.hold_against_model(path, [(request, answer)])
        else:
            self.lives["/raffles/"] = [Life()]
            self.hold_against_model("/raffles/", [(request, answer)])
            del self.lives["/raffles/"]

    def look_for_a_raffle(self, creation):
        """Find the raffle of a creation that was not answered, if there is one."""
        _, _, latest = self.servers[0].request("GET", "/raffles/?limit=1")
        for path in {f"/raffles/{raffle['id']}/" for raffle in latest} - set(self.lives):
            life = Life()
            status, _ = expect(life, creation)
            self.lives[path] = [life] if status == 201 else []
            self.read(path, "show")

    def hold_against_model(self, path, exchanges):
        """Keep the lives that explain the answers, and fail if there is none."""
        self.narrow(path, exchanges)
        # The model cannot say what comes next if it does not know who has won.
        wins = [win for life in self.lives[path] for win in life.wins]
        if len(self.lives[path]) > 1 or any(UNKNOWN in win.values() for win in wins):
            for verb in ("show", "winners", "replacements"):
                if verb in CHOICES:
                    self.read(path, verb)

    def read(self, path, verb):
        request = Request(verb, path, STRANGER, {} if verb == "show" else {"limit": 4})
        self.narrow(path, [(request, self.exchange(request))])

    def narrow(self, path, exchanges):
        for request, answer in exchanges:
            self.note(path, request, answer)
        found, expectations = explain(self.lives[path], exchanges)
        if not found:
            earlier = [line for where, line in self.log if where == path][: -len(exchanges)]
            got = [line for _, line in self.log[-len(exchanges) :]]
            lines = [f"RAFFLE_TEST_SEED={SEED}, {path}"]
            lines += ["Before:", *(line[:300] for line in earlier[-20:])]
            lines += ["Got:", *got, "Expected:", *expectations]
            pytest.fail("\n".join(lines), pytrace=False)
        self.lives[path] = found

    def note(self, path, request, answer):
        got = "no answer" if answer.status is None else f"{answer.status} {answer.body}"
        line = f"{request.verb} {request.arguments} from {request.source}: {got}"
        self.log.append((path, f"step {self.steps}: {line}"))
        kind = answer.body.get("type", "") if isinstance(answer.body, dict) else ""
        self.outcomes[request.verb, answer.status, kind] += 1
        if request.verb in FOR_MANAGERS and answer.status in (200, 201, 204):
            self.unseen = []


def test_a_random_life_goes_by_the_rules(serve, database, request):
    print(f"RAFFLE_TEST_SEED={SEED}")
    allow_seconds(request, SECONDS)
    world, end = World(serve, random.Random(SEED)), time.monotonic() + SECONDS
    while world.steps < SHORTEST or time.monotonic() < end:
        world.step()

    for path in world.lives:
        for verb in ("show", "winners"):
            world.read(path, verb)
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(database, "PRAGMA foreign_key_check") == []
    done = {verb for verb, status, _ in world.outcomes if status == VERBS[verb][2]}
    assert {"participate", "draw", "redeem"} <= done

    print(f"{world.steps} steps, {len(world.lives)} raffles")
    for (verb, status, kind), times in sorted(world.outcomes.items(), key=str):
        print(f"{times:6} {verb} {status} {kind}")


def allow_seconds(request, seconds):
    """Give a test so many seconds more than the others have."""
    file = request.config.stash[STANDARD_ERROR]
    faulthandler.dump_traceback_later(TIME_LIMIT + seconds, exit=True, file=file)
