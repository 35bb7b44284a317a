"""openapi.json describes what is served. What every test's client is answered is held to it as well: see helpers."""

import copy
import json
from contextlib import closing

import pytest
from description import DESCRIPTION, assert_described, described_path, fits, resolve
from helpers import MANAGER, README, assert_problem

import draw
import raffle
import storage


def test_the_description_is_served(client):
    response = client.get("/openapi.json")
    assert response.json == DESCRIPTION
    assert response.json["info"]["version"] == raffle.VERSION


def test_every_route_is_described_and_nothing_else(database):
    with closing(raffle.create_app(database)) as app:
        routes = {(route.rule.rstrip("/"), route.method) for route in app.routes}
    described = {
        (path.replace("{", "<").replace("}", ">").rstrip("/"), method.upper())
        for path, operations in DESCRIPTION["paths"].items()
        for method in set(operations) - {"parameters"}
    }
    assert routes == described


def test_every_operation_has_one_of_the_tags():
    operations = [
        operation for path in DESCRIPTION["paths"].values() for name, operation in path.items() if name != "parameters"
    ]
    tags = {tag for operation in operations for tag in operation["tags"]}
    assert all(len(operation["tags"]) == 1 for operation in operations)
    assert tags == {tag["name"] for tag in DESCRIPTION["tags"]}


def test_the_bounds_are_those_of_the_service():
    schemas, paths = DESCRIPTION["components"]["schemas"], DESCRIPTION["paths"]
    new = schemas["NewRaffle"]["properties"]
    assert resolve(new["total_tickets"])["maximum"] == storage.MAX_TICKETS
    assert resolve(new["name"])["maxLength"] == raffle.MAX_NAME
    assert schemas["PublicRandomness"]["maxLength"] == storage.MAX_RANDOMNESS
    [key] = paths["/raffles/{raffle_id}/participate/"]["post"]["parameters"]
    for length in (0, 15, 16, 255, 256):
        assert fits("k" * length, key["schema"]) == (16 <= length <= 255)
    for path, longest in (
        ("/raffles/", storage.MAX_RAFFLES_PER_PAGE),
        ("/raffles/{raffle_id}/winners/", storage.MAX_WINS_PER_PAGE),
    ):
        limit, _ = paths[path]["get"]["parameters"]
        assert limit["schema"]["maximum"] == limit["schema"]["default"] == longest


def test_every_name_in_the_description_leads_somewhere():
    def walk(value):
        if isinstance(value, dict):
            resolve(value)
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(DESCRIPTION)


def follow_links(client, answer):
    """Request all that an answer leads to by the description, as the manager, and return the answers."""
    path = answer.request.path
    described = resolve(DESCRIPTION["paths"][described_path(path)][answer.request.method.lower()]["responses"]["201"])
    values = {"$response.body": answer.json, "$request.path.raffle_id": path.split("/")[2]}
    if isinstance(answer.json, dict):
        values.update({f"$response.body#/{name}": value for name, value in answer.json.items()})
    operations = {
        operation["operationId"]: (method, template)
        for template, methods in DESCRIPTION["paths"].items()
        for method, operation in methods.items()
        if method != "parameters"
    }
    answers = {}
    for name, link in described["links"].items():
        method, template = operations[link["operationId"]]
        target = template.format(**{parameter: values[value] for parameter, value in link["parameters"].items()})
        body = values[link["requestBody"]] if "requestBody" in link else None
        answers[name] = client.request_from(MANAGER, method.upper(), target, body)
    return answers


def test_a_raffle_can_be_played_by_following_links(client):
    answers = follow_links(client, client.create(total_tickets=2))
    of_ticket = follow_links(client, answers["participate"])
    assert of_ticket["verify_ticket"].json == {"has_won": True, "prize": "Bicycle", "redeemed_at": None}
    assert of_ticket["redeem_prize"].json["prize"] == "Bicycle"
    assert answers["close_raffle"].json["issued_tickets"] == 1
    receipt = follow_links(client, answers["draw_winners"])["get_receipt"].json
    assert receipt["raffle_id"] == answers["get_raffle"].json["id"]
    assert answers["list_winners"].json == answers["draw_winners"].json


def test_an_answer_that_is_not_as_described_is_noticed(client):
    path = client.new_raffle()
    good = client.get(path).json
    schema = {"$ref": "#/components/schemas/Raffle"}
    assert fits(good, schema)
    changes = {"id": "x", "name": "", "total_tickets": True, "prizes": [], "created_at": None, "more": 1}
    for name, value in changes.items():
        assert not fits({**copy.deepcopy(good), name: value}, schema)
    response = client.get(path)
    for status in (201, 400, 418):
        with pytest.raises(AssertionError):
            assert_described("GET", path, status, response.headers, response.body)
    with pytest.raises(AssertionError):
        assert_described("GET", path, 200, {"Content-Type": "application/json"}, response.body)


def test_a_refusal_that_is_not_as_described_is_noticed(client):
    path = f"{client.new_raffle()}draw/"
    response = client.get(path, status=404)
    assert response.json["type"] == "urn:raffle:not-drawn"

    def hold(**changes):
        body = {name: value for name, value in {**response.json, **changes}.items() if value is not None}
        assert_described("GET", path, 404, response.headers, json.dumps(body))

    hold(type="urn:raffle:no-such-raffle")
    for changes in ({"type": "about:blank"}, {"type": "urn:raffle:no-prize"}, {"status": 400}, {"detail": None}):
        with pytest.raises(AssertionError):
            hold(**changes)


def media_types(value, path=""):
    """Yield (where it is, media type) of every body in a part of the description."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "content":
                for kind, media_type in inner.items():
                    yield f"{path} {kind}", media_type
            else:
                yield from media_types(inner, f"{path}/{name}")


def example(media_type):
    """Return the only example of a body."""
    if "examples" in media_type:
        [named] = media_type["examples"].values()
        return resolve(named)["value"]
    return media_type["example"]


def test_every_body_has_an_example_that_fits():
    found = dict(media_types(DESCRIPTION))
    for path, media_type in found.items():
        value = example(media_type)
        assert fits(value, media_type["schema"]), path
        if path.endswith("problem+json"):
            status_line = raffle.HTTPError(value["status"]).status_line
            # Its name in HTTP since RFC 9110, and in Python since 3.13.
            status_line = status_line.replace("Content Too Large", "Request Entity Too Large")
            assert status_line == f"{value['status']} {value['title']}", path
            if path.split("/")[-3].split()[0].isdigit():
                assert str(value["status"]) == path.split("/")[-3], path
    for part in ("headers", "parameters"):
        for name, described in DESCRIPTION["components"][part].items():
            assert fits(described["example"], described["schema"]), name


def test_the_examples_are_the_raffle_of_the_readme_and_its_draw_holds():
    sent, answered = {}, {}
    for operations in DESCRIPTION["paths"].values():
        for operation in (operations[method] for method in operations if method != "parameters"):
            name = operation["operationId"]
            if "requestBody" in operation:
                sent[name] = example(resolve(operation["requestBody"])["content"]["application/json"])
            [success] = [response for status, response in operation["responses"].items() if status < "3"]
            answered[name] = example(success["content"]["application/json"])
    in_readme = [sent["create_raffle"], sent["draw_winners"]]
    in_readme += [answered[name] for name in ("participate", "draw_winners", "redeem_prize")]
    assert all(json.dumps(value) in README for value in in_readme)
    assert answered["get_raffle"]["tickets_sha256"] in README
    assert sent["verify_ticket"].items() <= answered["participate"].items()
    raffles = [answered["create_raffle"], answered["close_raffle"], *answered["list_raffles"]]
    receipt, wins, tickets = (answered[name] for name in ("get_receipt", "draw_winners", "list_tickets"))
    assert all(held for _, held in draw.check_draw(draw.require_receipt(receipt), wins, tickets, raffles[:2]))
    without_prizes = {name: value for name, value in {**raffles[1], "winners_drawn": True}.items() if name != "prizes"}
    assert raffles[2] == without_prizes


def test_the_index_leads_to_what_there_is(client):
    links = client.get("/").json
    assert list(links) == ["raffles", "description", "health"]
    for link in links.values():
        assert client.get(link).status_int == 200


def test_health_says_that_all_is_well(client):
    assert client.get("/health").json == {"status": "ok"}


def test_health_notices_a_file_that_is_damaged(client, database):
    for file in (database, database.with_name("raffle.db-wal")):
        file.write_bytes(b"x" * file.stat().st_size)
    assert_problem(client.get("/health", status=503))
    assert_problem(client.get("/raffles/", status=503))


def test_health_notices_a_writing_thread_that_has_ended(client):
    client.app.storage.database.close()
    assert_problem(client.get("/health", status=503))
