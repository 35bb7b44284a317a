"""Every way to fail: its type, its status and its sentence, and that nothing is kept.

README.md and openapi.json must name the same refusals.
"""

import re
import sqlite3
from contextlib import closing
from datetime import date, timedelta

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, README, STRANGER, Client, refused

from raffle import create_app

ALLOWED = {  # by path
    "/": "GET, HEAD",
    "/openapi.json": "GET, HEAD",
    "/health": "GET, HEAD",
    "/raffles/": "GET, HEAD, POST",
    NO_RAFFLE: "DELETE, GET, HEAD",
    f"{NO_RAFFLE}participate/": "POST",
    f"{NO_RAFFLE}close/": "POST",
    f"{NO_RAFFLE}winners/": "GET, HEAD, POST",
    f"{NO_RAFFLE}verify-ticket/": "POST",
    f"{NO_RAFFLE}redeem/": "POST",
    f"{NO_RAFFLE}replacements/": "GET, HEAD, POST",
}
CHANGES = [  # (method, path)
    (method, path)
    for path, methods in ALLOWED.items()
    for method in ("POST", "DELETE")
    if method in methods
]
MANAGED = [
    (method, path)
    for method, path in CHANGES
    if not path.endswith(("/participate/", "/verify-ticket/"))
]

TICKET = {"ticket_number": 1, "verification_code": "x"}
BODIES = {  # by path: what a POST needs to be understood
    "/raffles/": {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE},
    f"{NO_RAFFLE}winners/": {},
    f"{NO_RAFFLE}verify-ticket/": TICKET,
    f"{NO_RAFFLE}redeem/": TICKET,
    f"{NO_RAFFLE}replacements/": {"ticket_number": 1, "prize": "Book", "reason": "declined"},
}

# By rule: the status, and the sentence unless that holds a value that is tested elsewhere.
RULES = {
    "no-such-raffle": (404, "There is no raffle with this id"),
    "invalid-page": (400, None),
    "not-a-manager": (403, f"Your ip address {STRANGER} is not a manager's"),
    "cross-origin": (403, "Cross-origin requests are not allowed"),
    "too-many-prizes": (400, "Too many prizes"),
    "no-tickets-left": (410, "Tickets to this raffle are no longer available"),
    "already-participated": (403, "Your ip address has already participated in this raffle"),
    "has-participants": (403, "Tickets of the raffle have been issued, so it cannot be deleted"),
    "already-closed": (403, "The raffle has already been closed"),
    "closes-by-itself": (403, None),
    "tickets-left": (403, "Winners can't be drawn when tickets are still available"),
    "randomness-required": (400, "The raffle is drawn with public_randomness from: drand {r} 7"),
    "already-drawn": (403, "Winners for the raffle have already been drawn"),
    "not-drawn": (400, "Winners for the raffle have not been drawn yet"),
    "invalid-code": (400, "Invalid verification code"),
    "no-prize": (403, "This ticket has not won a prize"),
    "already-redeemed": (403, None),
    "no-tickets-left-to-draw": (403, "Every ticket of the raffle has been drawn"),
}


# The table of refusals


def refusals(client):
    """Have every operation refuse a request by each of its rules; return the responses by rule."""
    running = client.new_raffle(2)
    running_ticket = client.participate(running).json

    announced = client.new_raffle(randomness_source="drand {r} 7")
    client.close(announced)

    drawn, tickets = client.new_sold_out(2)
    [win] = client.draw(drawn).json
    [won] = [ticket for ticket in tickets if ticket["ticket_number"] == win["ticket_number"]]
    [lost] = [ticket for ticket in tickets if ticket["ticket_number"] != win["ticket_number"]]
    client.redeem(drawn, won)

    all_won, [winner] = client.new_sold_out(1)
    client.draw(all_won)
    timed = client.new_raffle(closes_at=f"{date.today() + timedelta(days=2)}T00:00:00Z")

    return {
        "no-such-raffle": [
            client.send("GET", NO_RAFFLE),
            client.send("GET", f"{NO_RAFFLE}winners/"),
            client.send("GET", f"{NO_RAFFLE}replacements/"),
            *(
                client.send(method, path, BODIES.get(path))
                for method, path in CHANGES
                if path != "/raffles/"
            ),
        ],
        "invalid-page": [
            client.send("GET", "/raffles/?limit=x"),
            client.send("GET", f"{drawn}winners/?limit=x"),
            client.send("GET", f"{drawn}replacements/?limit=x"),
        ],
        "not-a-manager": [client.send(method, path, address=STRANGER) for method, path in MANAGED],
        "cross-origin": [
            client.send(method, path, Sec_Fetch_Site="cross-site") for method, path in CHANGES
        ],
        "too-many-prizes": [client.create(1, ONE_PRIZE * 2, "*")],
        "no-tickets-left": [client.participate(drawn, status="*")],
        "already-participated": [client.participate(running, status="*")],
        "has-participants": [client.delete_raffle(drawn, "*")],
        "already-closed": [client.close(drawn, "*")],
        "closes-by-itself": [client.close(timed, "*")],
        "tickets-left": [client.draw(running, status="*")],
        "randomness-required": [client.draw(announced, status="*")],
        "already-drawn": [client.draw(drawn, status="*")],
        "not-drawn": [
            client.verify(running, running_ticket, "*"),
            client.redeem(running, running_ticket, "*"),
            client.replace(running, running_ticket["ticket_number"], "Bicycle", status="*"),
        ],
        "invalid-code": [
            client.verify(drawn, TICKET, "*"),
            client.redeem(drawn, TICKET, "*"),
        ],
        "no-prize": [
            client.redeem(drawn, lost, "*"),
            client.replace(drawn, lost["ticket_number"], "Bicycle", status="*"),
        ],
        "already-redeemed": [
            client.redeem(drawn, won, "*"),
            client.replace(drawn, won["ticket_number"], "Bicycle", status="*"),
        ],
        "no-tickets-left-to-draw": [
            client.replace(all_won, winner["ticket_number"], "Bicycle", status="*")
        ],
    }


def operation(method, path):
    """Return what an operation is called here, whatever its raffle is called."""
    path = re.sub("<[a-z_]+>|{[a-z_]+}|[0-9a-f-]{36}", "ID", path)
    return f"{method.upper()} {path.rstrip('/')}"


def refusals_made(client):
    """Return (operation, status, rule) of every refusal, and check each on the way."""
    made = set()
    for rule, responses in refusals(client).items():
        status, detail = RULES[rule]
        for response in responses:
            request = response.request
            assert response.status_int == status, (rule, request.method, request.path)
            refused(response, rule, detail)
            made.add((operation(request.method, request.path), status, rule))
    return made


def refusals_described(description):
    """Return (operation, status, rule) of every refusal in openapi.json."""
    return {
        (operation(method, path), int(status), rule)
        for path, operations in description["paths"].items()
        for method in operations.keys() & {"get", "post", "delete"}
        for status, response in operations[method]["responses"].items()
        for rule in rules_in(response, description["components"])
    }


def rules_in(part, components):
    """Yield the rules that a part of openapi.json names, itself or by reference."""
    if isinstance(part, dict):
        yield from re.findall("urn:raffle:([a-z-]+)", str([part.get("const"), part.get("enum")]))
        *_, kind, name = part.get("$ref", "/").split("/")
        yield from rules_in([*part.values(), components.get(kind, {}).get(name)], components)
    elif isinstance(part, list):
        for inner in part:
            yield from rules_in(inner, components)


def refusals_of_the_readme():
    """Return (operation, status, rule) of every refusal in its table, and operations with a 404."""
    named = set()
    not_found = set()
    for method, path, row in re.findall(r"^\| `([A-Z]+) (/[^`]*)` (.*)", README, re.MULTILINE):
        here = operation(method, path)
        named |= {
            (here, int(status), rule) for status, rule in re.findall("([0-9]+) `([a-z-]+)`", row)
        }
        if "404" in row:
            not_found.add(here)
    return named, not_found


def test_each_operation_refuses_by_the_rules_of_the_description(client):
    description = client.get("/openapi.json").json

    assert refusals_made(client) == refusals_described(description)


def test_each_operation_refuses_by_the_rules_of_the_readme(client):
    """The README's table says 404 without a rule, and a sentence below has the other two."""
    made = refusals_made(client)
    named, not_found = refusals_of_the_readme()

    beside_the_table = ("no-such-raffle", "cross-origin", "too-many-prizes")
    assert named == {refusal for refusal in made if refusal[2] not in beside_the_table}
    assert not_found == {here for here, _, rule in made if rule == "no-such-raffle"}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_in_the_readme(rule):
    assert f"`{rule}`" in README


# Paths and methods


@pytest.mark.parametrize("path", ALLOWED)
def test_a_path_answers_its_methods_with_and_without_its_last_slash(client, path):
    methods = ALLOWED[path].split(", ")
    for spelling in (f"{path.rstrip('/')}/", path.rstrip("/") or "/"):
        for method in methods:
            response = client.send(method, spelling, BODIES.get(path))

            assert response.status_int in (200, 201, 404), (method, spelling)
            # What is not found is the raffle, not the path.
            assert not response.text.startswith('{"type": "about:blank"'), (method, spelling)


@pytest.mark.parametrize("path", ALLOWED)
def test_a_path_refuses_other_methods_and_says_which_it_has(client, path):
    methods = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}
    for spelling in (f"{path.rstrip('/')}/", path.rstrip("/") or "/"):
        for method in methods.difference(ALLOWED[path].split(", ")):
            response = client.send(method, spelling, BODIES.get(path))

            assert response.status_int == 405, (method, spelling)
            assert response.headers["Allow"] == ALLOWED[path], (method, spelling)
            if method != "HEAD":
                refused(response, None)


def test_head_answers_as_get_does_without_the_body(client):
    path = client.new_raffle()
    client.new_raffle()
    targets = (
        "/",
        "/health",
        "/openapi.json",
        "/raffles/?limit=1",
        path,
        f"{path}winners/",
        "/nothing/",
    )

    for target in targets:
        head = client.send("HEAD", target)
        get = client.send("GET", target)

        assert head.status == get.status, target
        assert head.headers == get.headers, target
        assert head.body == b"", target


def assert_not_found(client, method, path):
    response = client.send(method, path)

    assert response.status_int == 404, (method, path)
    assert response.content_type == "application/problem+json", (method, path)


def test_what_is_no_path_is_not_found(client):
    paths = (
        "/raffle/", "/health/x", "/raffles//", "//raffles/", "/raffles%0A", "/%FF", "/health%0A",
        "/raffles/x/%0A",
    )  # fmt: skip

    for path in paths:
        assert_not_found(client, "GET", path)


def test_what_is_no_id_of_a_raffle_is_not_found(client):
    raffle_id = client.create().json["id"]
    ids = (
        # Beside the id of a raffle.
        f"{raffle_id}%0A", f"%0A{raffle_id}", f"{raffle_id}%00", f"{raffle_id}%20",
        f"{raffle_id}%C3", f"%FF{raffle_id}", f"{{{raffle_id}}}", f"urn:uuid:{raffle_id}",
        f"../raffles/{raffle_id}", raffle_id.replace("-", ""), raffle_id[:-1],
        # Anything.
        "..", "%00", "%25", "%0A", "%ED%A0%80", "_" * 36, "x" * 10_000, "' OR 1=1 --",
    )  # fmt: skip

    for each in ids:
        assert_not_found(client, "GET", f"/raffles/{each}/winners")
        assert_not_found(client, "POST", f"/raffles/{each}/close/")
        assert_not_found(client, "POST", f"/raffles/{each}/participate/")


# What is nobody's fault, and the database's


def test_an_unexpected_error_tells_the_client_nothing_and_the_log_all(client, monkeypatch, caplog):
    monkeypatch.setattr(client.app.storage, "get_raffle", lambda raffle_id: 1 / 0)

    response = refused(client.get(NO_RAFFLE, status=500), None, "Internal Server Error")

    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "ZeroDivisionError: division by zero" in caplog.text


def test_a_database_that_cannot_be_written_is_503_and_keeps_nothing(database, monkeypatch):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.5)
    with closing(create_app(database, MANAGER)) as app, closing(sqlite3.connect(database)) as other:
        client = Client(app)
        path = client.new_raffle()
        closed = client.new_raffle()
        client.close(closed)
        drawn, [ticket] = client.new_sold_out()
        client.draw(drawn)
        # The first refusal finds out that the raffle is closed.
        client.participate(drawn, status=410)
        before = list(other.iterdump())

        other.execute("BEGIN IMMEDIATE")
        responses = [
            client.create(status=503),
            client.participate(path, status=503),
            client.close(path, 503),
            client.draw(closed, status=503),
            client.redeem(drawn, ticket, 503),
            client.send("GET", "/health"),
        ]

        for response in responses:
            refused(response, None, "The database cannot be read or written at the moment")
            assert response.status_int == 503
            assert int(response.headers["Retry-After"]) >= 1
        # Neither of these needs a write.
        client.participate(drawn, status=410)
        client.verify(drawn, ticket)

        other.rollback()
        assert list(other.iterdump()) == before
        client.draw(closed)
