"""Every way to fail answers in the one shape, whatever raised the error."""

import json
import re
import sqlite3
import uuid
from contextlib import closing

import pytest
from description import DESCRIPTION, resolve
from helpers import MANAGER, ONE_PRIZE, README, ROOT, Client, assert_problem, call

import raffle
import storage

UNKNOWN = f"/raffles/{uuid.uuid4()}/"
TICKET = {"ticket_number": 1, "verification_code": "x"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/raffles/", {"name": "Fair"}, 400),
        ("POST", "/raffles/", {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE * 2}, 400),
        ("POST", "/raffles/", b"x", 400),
        ("POST", "/raffles/", b"x" * (2**20 + 1), 413),
        ("GET", "/raffles/?limit=x", None, 400),
        ("GET", "/raffles/?cursor=x", None, 400),
        ("GET", UNKNOWN, None, 404),
        ("POST", f"{UNKNOWN}participate/", None, 404),
        ("POST", f"{UNKNOWN}winners/", None, 404),
        ("GET", f"{UNKNOWN}winners/", None, 404),
        ("POST", f"{UNKNOWN}verify-ticket/", TICKET, 404),
        ("POST", f"{UNKNOWN}redeem/", TICKET, 404),
        ("POST", f"{UNKNOWN}close/", None, 404),
        ("GET", f"{UNKNOWN}tickets/", None, 404),
        ("GET", f"{UNKNOWN}tickets/?limit=x", None, 404),
        ("GET", "/nothing/here", None, 404),
    ],
)
def test_a_refusal_is_a_problem(client, method, path, body, status):
    assert_problem(client.request_from(MANAGER, method, path, body, status))


def test_a_stranger_gets_a_problem(client):
    assert_problem(client.request_from("10.1.0.1", "POST", "/raffles/", status=403))
    assert_problem(client.request_from("10.1.0.1", "POST", f"{UNKNOWN}winners/", status=403))


def test_a_body_that_is_not_called_json_gets_a_problem(client):
    for path in ("/raffles/", f"{UNKNOWN}verify-ticket/", f"{UNKNOWN}redeem/"):
        assert_problem(client.request_from(MANAGER, "POST", path, TICKET, 415, Content_Type="text/plain"))


def test_each_refusal_of_a_raffle_is_a_problem(client):
    raffle = client.new_raffle(total_tickets=2)
    assert_problem(client.draw(raffle, status=403))
    ticket = client.participate(raffle, "10.1.0.1").json
    assert_problem(client.participate(raffle, "10.1.0.1", status=403))
    assert_problem(client.verify(raffle, ticket, status=400))
    client.participate(raffle, "10.1.0.2")
    assert_problem(client.participate(raffle, "10.1.0.3", status=410))
    client.draw(raffle)
    assert_problem(client.draw(raffle, status=403))
    assert_problem(client.verify(raffle, TICKET, status=400))
    assert_problem(client.get(f"{raffle}winners/?limit=x", status=400))


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/raffles/", "GET, HEAD, POST"),
        ("/raffles", "GET, HEAD, POST"),
        (UNKNOWN, "GET, HEAD"),
        (f"{UNKNOWN}participate/", "POST"),
        (f"{UNKNOWN}winners/", "GET, HEAD, POST"),
        (f"{UNKNOWN}verify-ticket/", "POST"),
        (f"{UNKNOWN}close/", "POST"),
        (f"{UNKNOWN}redeem/", "POST"),
        (f"{UNKNOWN}tickets/", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_another_method_is_told_which_are_allowed(client, path, allowed, method):
    response = client.request_from(MANAGER, method, path, status=405)
    assert_problem(response)
    assert response.headers["Allow"] == allowed


def test_get_is_not_allowed_where_only_post_is(client):
    response = client.get(f"{UNKNOWN}participate/", status=405)
    assert response.headers["Allow"] == "POST"
    assert client.head(f"{UNKNOWN}participate/", status=405).headers["Allow"] == "POST"


def test_an_unexpected_error_says_nothing_of_the_inside_but_to_the_log(client, monkeypatch, caplog):
    def fail(self, raffle_id):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(storage.Storage, "get_raffle", fail)
    response = client.request_from(MANAGER, "GET", UNKNOWN, status=500)
    assert_problem(response)
    assert "secret" not in response.text
    assert "RuntimeError: a secret of the inside" in caplog.text
    client.get("/raffles/", status=200)


def test_storage_that_cannot_be_written_is_unavailable_and_keeps_nothing(database, monkeypatch):
    monkeypatch.setattr("database.BUSY_TIMEOUT", 0.01)
    with closing(raffle.create_app(database, MANAGER)) as app, closing(sqlite3.connect(database)) as other:
        client = Client(app)
        path, sold_out = client.new_raffle(total_tickets=1), client.new_sold_out()
        other.execute("BEGIN IMMEDIATE")
        refused = [client.create(status=503), client.participate(path, status=503), client.draw(sold_out, status=503)]
        for response in refused:
            assert_problem(response)
            assert int(response.headers["Retry-After"]) >= 1
        assert len(client.get("/raffles/").json) == 2
        other.execute("ROLLBACK")
        client.draw(sold_out)
        assert client.get(path).json["available_tickets"] == 1
        client.participate(path)


def test_a_database_that_cannot_be_read_is_unavailable(client, monkeypatch):
    raffle = client.new_sold_out()

    def unavailable(*arguments):
        raise storage.DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr("database.Database.read", unavailable)
        assert_problem(client.get(raffle, status=503))
        client.create(status=201)
        client.draw(raffle, status=503)
    client.draw(raffle, status=201)


def test_another_host_is_misdirected(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_HOSTS", "Raffle.EXAMPLE, [::1]")
    with closing(raffle.create_app(database, MANAGER)) as app:
        client = Client(app)
        for host in ("raffle.example", "RAFFLE.example:8080", "raffle.example:", "[::1]", "[::1]:8080"):
            client.get("/raffles/", headers={"Host": host})
        for host in ("other.example", "raffle.example.evil", "raffle.example:8080:1", "::1", ""):
            assert_problem(client.get("/raffles/", headers={"Host": host}, status=421))
            client.request_from(MANAGER, "POST", "/raffles/", status=421, Host=host)
        assert call(app)[0] == 421


def test_a_client_without_an_address_can_neither_participate_nor_manage(client, caplog):
    raffle = client.new_raffle()
    for address in ("", "unknown", "localhost", "1.2.3", "1.2.3.4:80", "1.2.3.4%eth0", "[::1]:443", "::ffff"):
        for headers in ({}, {"X_Forwarded_For": MANAGER}):
            assert_problem(client.participate(raffle, address, status=400, **headers))
            client.request_from(address, "POST", f"{raffle}close/", status=400, **headers)
        client.draw(raffle, address, status=400)
        client.request_from(address, "POST", "/raffles/", status=400)
        client.request_from(address, "GET", raffle, status=200)
    assert client.get(raffle).json["available_tickets"] == 3
    assert "No client address can be determined from '1.2.3.4:80'" in caplog.text


def rules_of_the_service():
    """Return the names of all rules that raffle.py can refuse a request by."""
    raised = re.findall(r'Refused\(\d+, "([^"]+)"', (ROOT / "raffle.py").read_text(encoding="utf-8"))
    return {*raised, *(rule for _, rule, _ in raffle.ERRORS.values() if rule)}


def refusals_of_the_readme():
    """Return (operationId, status, rule) of each refusal by a rule that the README's table has, or says of all."""
    rows = re.findall(r"^\| `([A-Z]+) ([^`]+)` \| [^|]+ \|([^|]*)\|$", README, re.MULTILINE)
    assert len(rows) == 14
    refusals = {("create_raffle", 400, "too-many-prizes")}
    for method, path, cell in rows:
        operation = DESCRIPTION["paths"][path.replace("<id>", "{raffle_id}")][method.lower()]["operationId"]
        found = re.findall(r"(\d{3})(?: `([a-z-]+)`)?", cell)
        refusals |= {(operation, int(status), rule) for status, rule in found if rule}
        if ("404", "") in found:
            refusals.add((operation, 404, "no-such-raffle"))
        if method == "POST":
            refusals.add((operation, 403, "cross-origin"))
    return refusals


def described_refusals():
    """Yield method, operationId, status and types of each refusal in the description."""
    for operations in DESCRIPTION["paths"].values():
        for method in set(operations) - {"parameters"}:
            for status, response in operations[method]["responses"].items():
                content = resolve(response)["content"].get("application/problem+json")
                if content:
                    kind = resolve(content["schema"])["properties"]["type"]
                    types = {kind["const"]} if "const" in kind else set(kind["enum"])
                    yield method, operations[method]["operationId"], status, types


def test_the_types_of_a_described_refusal_are_those_of_the_readme_for_the_operation_and_the_status():
    described = set()
    for method, operation, status, types in described_refusals():
        # Where no rule has the status, and for a body, a query, a key or an address that makes no sense.
        blank = status not in ("403", "404", "410") and (method, status) != ("get", "400")
        assert ("about:blank" in types) == blank, (operation, status)
        for name in types - {"about:blank"}:
            assert name.startswith("urn:raffle:")
            described.add((operation, int(status), name.rpartition(":")[2]))
    assert described == refusals_of_the_readme()
    assert {rule for _, _, rule in described} == rules_of_the_service()
    assert set(re.findall("urn:raffle:([a-z-]+)", json.dumps(DESCRIPTION))) == rules_of_the_service()


def test_every_refusal_of_a_rule_is_of_the_type_of_that_rule(client):
    def of(response):
        return response.json["type"].rpartition(":")[2]

    raffle, drawn = client.new_raffle(2), client.new_raffle(9)
    ticket = client.participate(raffle).json
    announced = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE, "randomness_source": "drand"}
    sourced = f"/raffles/{client.request_from(MANAGER, 'POST', '/raffles/', announced).json['id']}/"
    numbers = [client.participate(drawn, f"10.1.0.{n}").json for n in range(2)]
    client.close(drawn)
    client.close(sourced)
    [win] = client.draw(drawn).json
    won, lost = sorted(numbers, key=lambda one: one["ticket_number"] != win["ticket_number"])
    client.redeem(drawn, won)
    found = [
        of(client.get(UNKNOWN, status=404)),
        of(client.get(f"{raffle}winners/?limit=x", status=400)),
        of(client.draw(raffle, "10.1.0.1", status=403)),
        of(client.request_from(MANAGER, "POST", "/raffles/", status=403, Sec_Fetch_Site="cross-site")),
        of(client.create(1, ONE_PRIZE * 2, status=400)),
        of(client.participate(raffle, status=403)),
        of(client.participate(drawn, status=410)),
        of(client.close(drawn, status=403)),
        of(client.draw(drawn, status=403)),
        of(client.draw(raffle, status=403)),
        of(client.draw(sourced, status=400)),
        of(client.verify(raffle, ticket, status=400)),
        of(client.verify(drawn, ticket, status=400)),
        of(client.redeem(drawn, lost, status=403)),
        of(client.redeem(drawn, won, status=403)),
    ]
    assert found == [
        "no-such-raffle",
        "invalid-page",
        "not-a-manager",
        "cross-origin",
        "too-many-prizes",
        "already-participated",
        "no-tickets-left",
        "already-closed",
        "already-drawn",
        "tickets-left",
        "randomness-required",
        "not-drawn",
        "invalid-code",
        "no-prize",
        "already-redeemed",
    ]
    assert of(client.get(f"{raffle}draw/", status=404)) == "not-drawn"
    assert set(found) == rules_of_the_service()
    for response in (client.get("/nothing", status=404), client.create(0, status=400)):
        assert response.json["type"] == "about:blank"
