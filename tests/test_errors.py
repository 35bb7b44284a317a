"""Every way to fail: its type, status and sentence, which README.md and openapi.json name alike, and what it keeps."""

import re
import sqlite3
from contextlib import closing

from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, README, Client, refused

from raffle import create_app

STRANGER = "10.0.0.2"
TICKET = {"ticket_number": 1, "verification_code": "x"}
ALLOWED = dict.fromkeys(("/", "/health", "/openapi.json", NO_RAFFLE), "GET, HEAD")
ALLOWED.update(dict.fromkeys(("/raffles/", f"{NO_RAFFLE}winners/"), "GET, HEAD, POST"))
ALLOWED.update(
    {
        f"{NO_RAFFLE}{action}/": "POST"
        for action in ("participate", "close", "verify-ticket", "redeem")
    }
)
POSTS = [path for path, methods in ALLOWED.items() if "POST" in methods]
MANAGED = [path for path in POSTS if not path.endswith(("/participate/", "/verify-ticket/"))]
BODIES = {
    "/raffles/": {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE},
    f"{NO_RAFFLE}winners/": {},
}
BODIES.update({f"{NO_RAFFLE}verify-ticket/": TICKET, f"{NO_RAFFLE}redeem/": TICKET})
# The status of each rule, and its sentence, except where that holds a value that is tested elsewhere.
RULES = {
    "no-such-raffle": (404, "There is no raffle with this id"),
    "invalid-page": (400, None),
    "not-a-manager": (403, f"Your ip address {STRANGER} is not a manager's"),
    "cross-origin": (403, "Cross-origin requests are not allowed"),
    "too-many-prizes": (400, "Too many prizes"),
    "no-tickets-left": (410, "Tickets to this raffle are no longer available"),
    "already-participated": (403, "Your ip address has already participated in this raffle"),
    "already-closed": (403, "The raffle has already been closed"),
    "tickets-left": (403, "Winners can't be drawn when tickets are still available"),
    "randomness-required": (
        400,
        "The raffle is drawn with public_randomness from: drand {round} 7",
    ),
    "already-drawn": (403, "Winners for the raffle have already been drawn"),
    "not-drawn": (400, "Winners for the raffle have not been drawn yet"),
    "invalid-code": (400, "Invalid verification code"),
    "no-prize": (403, "This ticket has not won a prize"),
    "already-redeemed": (403, None),
}


def refusals(client):
    """Have every operation refuse a request by each of its rules, and return the responses by rule."""
    raffle, (drawn, tickets) = client.new_raffle(2), client.new_sold_out(2)
    announced = client.new_raffle(randomness_source="drand {round} 7")
    ticket = client.participate(raffle).json
    client.close(announced)
    [win] = client.draw(drawn).json
    won, lost = sorted(tickets, key=lambda ticket: ticket["ticket_number"] != win["ticket_number"])
    client.redeem(drawn, won)
    unknown = [("GET", NO_RAFFLE), ("GET", f"{NO_RAFFLE}winners/")]
    unknown += [("POST", path) for path in POSTS if path != "/raffles/"]
    return {
        "no-such-raffle": [client.send(method, path, BODIES.get(path)) for method, path in unknown],
        "invalid-page": [
            client.get(f"{path}?limit=x", status="*") for path in ("/raffles/", f"{drawn}winners/")
        ],
        "not-a-manager": [client.send("POST", path, address=STRANGER) for path in MANAGED],
        "cross-origin": [client.send("POST", path, Sec_Fetch_Site="cross-site") for path in POSTS],
        "too-many-prizes": [client.create(1, ONE_PRIZE * 2, "*")],
        "no-tickets-left": [client.participate(drawn, status="*")],
        "already-participated": [client.participate(raffle, status="*")],
        "already-closed": [client.close(drawn, "*")],
        "tickets-left": [client.draw(raffle, status="*")],
        "randomness-required": [client.draw(announced, status="*")],
        "already-drawn": [client.draw(drawn, status="*")],
        "not-drawn": [client.verify(raffle, ticket, "*"), client.redeem(raffle, ticket, "*")],
        "invalid-code": [client.verify(drawn, TICKET, "*"), client.redeem(drawn, TICKET, "*")],
        "no-prize": [client.redeem(drawn, lost, "*")],
        "already-redeemed": [client.redeem(drawn, won, "*")],
    }


def operation(method, path):
    return f"{method.upper()} {re.sub('<[a-z_]+>|{[a-z_]+}|[0-9a-f-]{36}', 'ID', path).rstrip('/')}"


def rules_in(part, components):
    """Yield the rule of every type that a part of openapi.json names, itself or by reference."""
    if isinstance(part, dict):
        yield from re.findall("urn:raffle:([a-z-]+)", str([part.get("const"), part.get("enum")]))
        *_, kind, name = part.get("$ref", "/").split("/")
        yield from rules_in([*part.values(), components.get(kind, {}).get(name)], components)
    elif isinstance(part, list):
        for inner in part:
            yield from rules_in(inner, components)


def test_each_operation_refuses_by_the_rules_that_readme_and_description_name(client):
    made = set()
    for rule, responses in refusals(client).items():
        for response in responses:
            status, detail = RULES[rule]
            assert refused(response, rule, detail).json["status"] == status, (
                rule,
                response.request.path,
            )
            made.add((operation(response.request.method, response.request.path), status, rule))
    description = client.get("/openapi.json").json
    assert made == {
        (operation(method, path), int(status), rule)
        for path, operations in description["paths"].items()
        for method in operations.keys() & {"get", "post"}
        for status, response in operations[method]["responses"].items()
        for rule in rules_in(response, description["components"])
    }
    # The README names in its table what a row has of its own, and these three in a sentence.
    named = {
        refusal
        for refusal in made
        if refusal[2] in ("no-such-raffle", "cross-origin", "too-many-prizes")
    }
    for method, path, row in re.findall(r"^\| `([A-Z]+) (/[^`]*)` (.*)", README, re.MULTILINE):
        here = operation(method, path)
        named |= {
            (here, int(status), rule) for status, rule in re.findall("([0-9]+) `([a-z-]+)`", row)
        }
        assert ("404" in row) == ((here, 404, "no-such-raffle") in made), path
    assert named == made
    assert [rule for rule in RULES if f"`{rule}`" not in README] == []


def test_each_path_has_its_methods_and_needs_no_last_slash(client):
    for path, allowed in ALLOWED.items():
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            for spelling in (f"{path.rstrip('/')}/", path.rstrip("/") or "/"):
                response = client.send(method, spelling, BODIES.get(path))
                if method in allowed.split(", "):
                    assert response.status_int in (200, 201, 404), (method, spelling)
                    assert not response.text.startswith('{"type": "about:blank"'), (
                        method,
                        spelling,
                    )
                else:
                    assert (response.status_int, response.headers["Allow"]) == (405, allowed), (
                        method,
                        spelling,
                    )
                    assert method == "HEAD" or refused(response, None)


def test_head_answers_as_get_does_without_the_body(client):
    raffle, _ = client.new_raffle(), client.new_raffle()
    for path in (
        "/",
        "/health",
        "/openapi.json",
        "/raffles/?limit=1",
        raffle,
        f"{raffle}winners/",
        "/nothing/",
    ):
        head, get = client.send("HEAD", path), client.send("GET", path)
        assert (head.status, head.headers, head.body) == (get.status, get.headers, b""), path


def test_what_is_no_path_or_no_id_of_a_raffle_is_not_found(client):
    raffle_id = client.create().json["id"]
    ids = [
        f"{raffle_id}%0A",
        f"%0A{raffle_id}",
        f"{raffle_id}%00",
        f"{raffle_id}%20",
        f"%FF{raffle_id}",
        "x" * 10_000,
    ]
    ids += [
        f"{raffle_id}%C3",
        f"{{{raffle_id}}}",
        f"urn:uuid:{raffle_id}",
        raffle_id.replace("-", ""),
        "%ED%A0%80",
    ]
    ids += [
        f"../raffles/{raffle_id}",
        "..",
        "%00",
        "%25",
        "%0A",
        "_" * 36,
        "' OR 1=1 --",
        raffle_id[:-1],
    ]
    paths = [
        "/raffle/",
        "/health/x",
        "/raffles//",
        "//raffles/",
        "/raffles%0A",
        "/%FF",
        "/health%0A",
        "/raffles/x/%0A",
    ]
    requests = [("GET", path) for path in paths] + [
        ("GET", f"/raffles/{each}/winners") for each in ids
    ]
    requests += [
        ("POST", f"/raffles/{each}/{action}/")
        for each in ids
        for action in ("close", "participate")
    ]
    for method, path in requests:
        response = client.send(method, path)
        assert (response.status_int, response.content_type) == (404, "application/problem+json"), (
            path
        )


def test_an_unexpected_error_tells_the_client_nothing_and_the_log_all(client, monkeypatch, caplog):
    monkeypatch.setattr(client.app.storage, "get_raffle", lambda raffle_id: 1 / 0)
    response = refused(client.get(NO_RAFFLE, status=500), None, "Internal Server Error")
    assert (response.headers["Cache-Control"], response.headers["X-Content-Type-Options"]) == (
        "no-store",
        "nosniff",
    )
    assert "ZeroDivisionError: division by zero" in caplog.text


def test_a_database_that_cannot_be_written_is_503_and_keeps_nothing(database, monkeypatch):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.01)
    with closing(create_app(database, MANAGER)) as app, closing(sqlite3.connect(database)) as other:
        client = Client(app)
        raffle, closed, (drawn, [ticket]) = (
            client.new_raffle(),
            client.new_raffle(),
            client.new_sold_out(),
        )
        client.close(closed)
        client.draw(drawn)
        client.participate(drawn, status=410)
        before = [*other.iterdump()]
        other.execute("BEGIN IMMEDIATE")
        responses = [
            client.create(status=503),
            client.participate(raffle, status=503),
            client.close(raffle, 503),
        ]
        responses += [
            client.draw(closed, status=503),
            client.redeem(drawn, ticket, 503),
            client.send("GET", "/health"),
        ]
        for response in responses:
            refused(response, None, "The database cannot be read or written at the moment")
            assert int(response.headers["Retry-After"]) >= 1
        # Neither needs a write.
        client.participate(drawn, status=410)
        client.verify(drawn, ticket)
        other.rollback()
        assert [*other.iterdump()] == before
        client.draw(closed)
