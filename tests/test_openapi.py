"""openapi.json agrees with the program. CI also checks every response of a server against it."""

import json
import re

import pytest
from helpers import ROOT

import draw
import raffle

DESCRIPTION = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
SCHEMAS = DESCRIPTION["components"]["schemas"]
CURSOR = DESCRIPTION["components"]["parameters"]["cursor"]

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
    if status < "3" and "content" in response
}


def test_every_route_is_described_and_nothing_else(client):
    described = {
        (method.upper(), re.sub("{(.*)}", r"<\1>", path).rstrip("/")) for path, method in OPERATIONS
    }

    assert {(route.method, route.rule.rstrip("/")) for route in client.app.routes} == described


def test_the_description_is_served_and_of_this_version(client):
    assert client.get("/openapi.json").json == DESCRIPTION
    assert DESCRIPTION["info"]["version"] == raffle.VERSION


@pytest.mark.parametrize("error", raffle.ERRORS, ids=lambda error: error.__name__)
def test_every_refusal_is_described_with_its_type_and_detail(error):
    text = json.dumps(DESCRIPTION)
    _, detail, rule = raffle.ERRORS[error]

    # What {} stands for differs from case to case.
    beginning = detail.partition("{")[0]

    if rule is None:
        assert beginning in text
    else:
        assert f"`{rule}`: {beginning}" in text
        assert f'"urn:raffle:{rule}"' in text


@pytest.mark.parametrize(
    ("member", "schema"), [("name", "Name"), ("randomness_source", "RandomnessSource")]
)
def test_a_text_may_be_as_long_as_described(client, member, schema):
    longest = SCHEMAS[schema]["maxLength"]

    client.create(**{member: "x" * longest})
    client.create(**{member: "x" * (longest + 1)}, status=400)


def test_a_raffle_may_have_as_many_tickets_as_described(client):
    most = SCHEMAS["PositiveInteger"]["maximum"]

    client.create(most)
    client.create(most + 1, status=400)


@pytest.mark.parametrize("name", ["limit", "cursor"])
@pytest.mark.parametrize("page", ["/raffles/", "/raffles/{raffle_id}/winners/"])
def test_a_page_is_asked_for_within_the_described_bounds(client, page, name):
    limit = OPERATIONS[page, "get"]["parameters"][0]
    assert limit["name"] == "limit"
    parameter = {"limit": limit, "cursor": CURSOR}[name]
    lowest, highest = parameter["schema"]["minimum"], parameter["schema"]["maximum"]
    path = page.replace("/raffles/{raffle_id}/", client.new_raffle())

    for value in (lowest, highest):
        client.get(f"{path}?{name}={value}", status=200)
    for value in (lowest - 1, highest + 1):
        client.get(f"{path}?{name}={value}", status=400)


@pytest.mark.parametrize("length", [15, 16, 255, 256])
def test_an_idempotency_key_is_as_long_as_described(client, length):
    parameter = OPERATIONS["/raffles/{raffle_id}/participate/", "post"]["parameters"][0]
    assert parameter["name"] == "Idempotency-Key"
    key = "k" * length
    is_described = re.search(parameter["schema"]["pattern"], key) is not None

    response = client.participate(client.new_raffle(), status="*", Idempotency_Key=key)

    assert (response.status_int == 201) == is_described
    assert response.status_int in (201, 400)


def test_the_examples_are_one_raffle_whose_draw_holds():
    created = EXAMPLES["create_raffle"]
    drawn = EXAMPLES["get_raffle"]
    wins = EXAMPLES["list_winners"]
    [listed] = EXAMPLES["list_raffles"]

    results = draw.check_draw(drawn, wins, [created])

    assert all(holds for _, holds in results), results
    assert {**listed, "prizes": drawn["prizes"]} == drawn


def test_the_examples_of_tickets_and_wins_are_of_that_raffle():
    drawn = EXAMPLES["get_raffle"]
    first_win = EXAMPLES["list_winners"][0]
    ticket = EXAMPLES["participate"]

    assert ticket["raffle_id"] == drawn["id"]
    assert ticket["ticket_number"] == first_win["ticket_number"]
    assert EXAMPLES["redeem_prize"] == first_win
    # The draw was answered before the prize was redeemed.
    just_drawn = EXAMPLES["draw_winners"][0]
    assert {**just_drawn, "redeemed_at": first_win["redeemed_at"]} == first_win
