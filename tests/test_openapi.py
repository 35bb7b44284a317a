"""openapi.json agrees with the program. CI also checks every response of a running server against it."""

import json
import re

from helpers import ROOT

import draw
import raffle

DESCRIPTION = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
OPERATIONS = {  # by path and method
    (path, method): operation
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
    if method != "parameters"
}
EXAMPLES = {  # the body of the success of each operation
    operation["operationId"]: response["content"]["application/json"].get("example")
    for operation in OPERATIONS.values()
    for status, response in operation["responses"].items()
    if status < "3"
}


def test_every_route_is_described_and_nothing_else(client):
    assert client.get("/openapi.json").json == DESCRIPTION
    assert DESCRIPTION["info"]["version"] == raffle.VERSION
    routes = {(route.rule.rstrip("/"), route.method) for route in client.app.routes}
    assert routes == {
        (re.sub("{(.*)}", "<\\1>", path).rstrip("/"), method.upper()) for path, method in OPERATIONS
    }


def test_every_refusal_is_described_with_its_type_and_detail():
    text = json.dumps(DESCRIPTION)
    for _, detail, rule in raffle.ERRORS.values():
        assert f"`{rule}`: {detail.partition('{')[0]}" in text if rule else detail in text
        assert not rule or f'"urn:raffle:{rule}"' in text


def test_the_bounds_are_those_of_the_service(client):
    schemas, parameters = (DESCRIPTION["components"][part] for part in ("schemas", "parameters"))
    for member, text in (
        ("name", schemas["Name"]),
        ("randomness_source", schemas["RandomnessSource"]),
    ):
        client.create(**{member: "x" * text["maxLength"]})
        client.create(**{member: "x" * (text["maxLength"] + 1)}, status=400)
    path = client.new_raffle(schemas["PositiveInteger"]["maximum"])
    client.create(schemas["PositiveInteger"]["maximum"] + 1, status=400)
    for page in ("/raffles/", "/raffles/{raffle_id}/winners/"):
        limit = OPERATIONS[page, "get"]["parameters"][0]
        for name, bounds in (
            ("limit", limit["schema"]),
            ("cursor", parameters["cursor"]["schema"]),
        ):
            lowest, highest = bounds["minimum"], bounds["maximum"]
            for value, status in (
                (lowest - 1, 400),
                (lowest, 200),
                (highest, 200),
                (highest + 1, 400),
            ):
                url = f"{page.replace('/raffles/{raffle_id}/', path)}?{name}={value}"
                assert client.send("GET", url).status_int == status, url
    key = OPERATIONS["/raffles/{raffle_id}/participate/", "post"]["parameters"][0]["schema"][
        "pattern"
    ]
    for length in (15, 16, 255, 256):
        answer = client.participate(
            path, f"10.1.0.{length // 2}", "*", Idempotency_Key="k" * length
        )
        assert answer.status_int == (201 if re.search(key, "k" * length) else 400), length


def test_the_examples_are_one_raffle_whose_draw_holds():
    created, drawn, wins = (
        EXAMPLES[name] for name in ("create_raffle", "get_raffle", "list_winners")
    )
    results = draw.check_draw(drawn, wins, [created])
    assert all(holds for _, holds in results), results
    [listed] = EXAMPLES["list_raffles"]
    assert {**listed, "prizes": drawn["prizes"]} == drawn
    ticket = EXAMPLES["participate"]
    assert (ticket["raffle_id"], ticket["ticket_number"]) == (drawn["id"], wins[0]["ticket_number"])
    assert (
        EXAMPLES["redeem_prize"]
        == wins[0]
        == {**EXAMPLES["draw_winners"][0], "redeemed_at": wins[0]["redeemed_at"]}
    )
