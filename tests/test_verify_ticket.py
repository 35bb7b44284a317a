import pytest
from helpers import assert_problem


@pytest.fixture
def raffle(client):
    return client.new_raffle(total_tickets=4, prizes=[{"name": "Bicycle", "amount": 1}, {"name": "Book", "amount": 1}])


@pytest.fixture
def tickets(client, raffle):
    """All tickets of the raffle, its winners drawn."""
    tickets = client.sell_out(raffle)
    client.draw(raffle)
    return tickets


def test_a_ticket_is_verified_with_its_code(client, raffle, tickets):
    prizes = {win["ticket_number"]: win["prize"] for win in client.get(f"{raffle}winners/").json}
    for ticket in tickets:
        prize = prizes.get(ticket["ticket_number"])
        for _ in range(2):
            verdict = {"has_won": prize is not None, "prize": prize, "redeemed_at": None}
            assert client.verify(raffle, ticket).json == verdict


def test_no_ticket_is_verified_with_the_code_of_another(client, raffle, tickets):
    for ticket in tickets:
        for other in tickets:
            if other is not ticket:
                mixed = {**ticket, "verification_code": other["verification_code"]}
                assert_problem(client.verify(raffle, mixed, status=400), "Invalid verification code")


@pytest.mark.parametrize(
    "spelling",
    [
        "01AB-CDEF-GHJK-MNPQ-RSTV-WXYZ",
        "01ABCDEFGHJKMNPQRSTVWXYZ",
        "01ab-cdef-ghjk-mnpq-rstv-wxyz",
        " 01AB CDEF GHJK MNPQ RSTV WXYZ ",
        "--0-1ABC DEFGHJKMNPQRSTVWXYZ",
        "OIAB-CDEF-GHJK-MNPQ-RSTV-WXYZ",
        "OLAB-CDEF-GHJK-MNPQ-RSTV-WXYZ",
        "oiab-cdef-ghjk-mnpq-rstv-wxyz",
        "olab-cdef-ghjk-mnpq-rstv-wxyz",
    ],
)
def test_a_code_is_read_leniently(client, raffle, monkeypatch, spelling):
    monkeypatch.setattr("storage._code", lambda _: "01AB-CDEF-GHJK-MNPQ-RSTV-WXYZ")
    tickets = client.sell_out(raffle)
    client.draw(raffle)
    client.verify(raffle, {**tickets[0], "verification_code": spelling}, status=200)


@pytest.mark.parametrize(
    "code",
    ["", "-", "x", "U" * 24, "0" * 24, "0" * 25, "\0", "\ud800", "\ud800" * 24, "🎟" * 24, "0" * 3000],
)
def test_a_wrong_code_is_refused(client, raffle, tickets, code):
    ticket = {**tickets[0], "verification_code": code}
    assert_problem(client.verify(raffle, ticket, status=400), "Invalid verification code")


def test_every_character_of_a_code_counts(client, raffle, tickets):
    ticket = tickets[0]
    code = ticket["verification_code"]
    for index, character in enumerate(code):
        if character != "-":
            other = "A" if character != "A" else "B"
            wrong = code[:index] + other + code[index + 1 :]
            client.verify(raffle, {**ticket, "verification_code": wrong}, status=400)
    for wrong in (code[:-1], code[1:], code + "0", code + "\0", code + "\0" * 40, code + "\n", code.replace("-", "_")):
        client.verify(raffle, {**ticket, "verification_code": wrong}, status=400)


def test_a_ticket_of_another_raffle_or_of_none_is_refused_like_a_wrong_code(client, raffle, tickets):
    other = client.new_raffle(total_tickets=1)
    (foreign,) = client.sell_out(other)
    client.draw(other)
    answers = {
        client.verify(raffle, ticket, status=400).body
        for ticket in (
            {**tickets[0], "verification_code": "0000-0000-0000-0000-0000-0000"},
            {**tickets[0], "ticket_number": 5},
            {**tickets[0], "ticket_number": 2**53 - 1},
            foreign,
        )
    }
    assert len(answers) == 1


def test_nothing_is_verified_before_the_draw(client, raffle):
    detail = "Winners for the raffle have not been drawn yet"
    ticket = client.participate(raffle).json
    assert_problem(client.verify(raffle, ticket, status=400), detail)
    assert_problem(client.verify(raffle, {**ticket, "verification_code": "x"}, status=400), detail)


def test_a_code_stays_valid_when_the_number_of_iterations_changes(client, raffle, tickets, monkeypatch):
    monkeypatch.setattr("storage.ITERATIONS", 2_000)
    for ticket in tickets:
        client.verify(raffle, ticket, status=200)
