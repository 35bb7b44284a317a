import logging
from contextlib import closing

import pytest
from helpers import MANAGER, ONE_PRIZE, Client, assert_problem

import raffle

# The server of the standard library, which strips nothing from a request.
WSGIREF = """
from wsgiref.simple_server import make_server
import raffle
server = make_server("127.0.0.1", 0, raffle.create_app())
print(f"Listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""

FORGED = ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Client-IP"]

SAME = [
    ["1.2.3.4", "::ffff:1.2.3.4", "::FFFF:102:304", "0:0:0:0:0:ffff:1.2.3.4"],
    ["2001:db8::1", "2001:DB8::1", "2001:0db8:0000:0000:0000:0000:0000:0001", "2001:db8::1%eth0"],
    ["fe80::1", "FE80::1%eth0", "fe80::1%1"],
]


@pytest.mark.parametrize("spellings", SAME)
def test_every_spelling_of_an_address_is_the_same_participant(client, spellings):
    for first in spellings:
        raffle = client.new_raffle(total_tickets=9)
        client.participate(raffle, first)
        for other in spellings:
            client.participate(raffle, other, status=403)
        client.participate(raffle, "1.2.3.5")
        client.participate(raffle, "2001:db8::2")


@pytest.mark.parametrize("proxy", [None, "127.0.0.9"])
@pytest.mark.parametrize("program", [("raffle.py",), ("-c", WSGIREF)], ids=["waitress", "wsgiref"])
def test_what_a_client_says_of_its_address_changes_nothing(serve, program, proxy):
    settings = {"RAFFLE_TRUSTED_PROXY": proxy} if proxy else {}
    server = serve(program=program, MANAGER_IPS="127.0.0.2, 10.0.0.1", **settings)
    body = {"name": "Fair", "total_tickets": 9, "prizes": ONE_PRIZE}
    _, headers, _ = server.request("POST", "/raffles/", body, source="127.0.0.2")
    path = headers["Location"]
    for claim in ("10.0.0.1", "for=10.0.0.1", "", "unknown"):
        forged = dict.fromkeys(FORGED, claim)
        assert server.request("POST", "/raffles/", body, **forged)[0] == 403
        assert server.request("POST", f"{path}winners/", **forged)[0] == 403
        server.request("POST", f"{path}participate/", **forged)
    assert server.request("GET", path)[2]["available_tickets"] == 8


FORWARDED = [
    ({}, ["10.0.0.1", "10.0.0.2", " 10.0.0.2 ", "6.6.6.6, 10.0.0.2", ",10.0.0.2", "2001:db8::1"], 3),
    ({}, ["10.0.0.1", "::ffff:10.0.0.1", "::FFFF:a00:1", "6.6.6.6,::ffff:10.0.0.2"], 2),
    ({"RAFFLE_TRUSTED_PROXY": "::ffff:127.0.0.1"}, ["10.0.0.1", "10.0.0.2"], 2),
    ({"RAFFLE_TRUSTED_PROXY_COUNT": "2"}, ["10.0.0.1, 10.9.9.9", "6.6.6.6, 10.0.0.1, 10.9.9.8"], 1),
    ({"RAFFLE_IPV6_PREFIX": "64"}, ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "10.0.0.1", "10.0.0.2"], 4),
]


@pytest.mark.parametrize("program", [("raffle.py",), ("-c", WSGIREF)], ids=["waitress", "wsgiref"])
@pytest.mark.parametrize(("settings", "forwarded", "participants"), FORWARDED)
def test_a_trusted_proxy_says_who_the_client_is(serve, program, settings, forwarded, participants):
    settings = {"RAFFLE_TRUSTED_PROXY": "127.0.0.1", **settings}
    server = serve(program=program, MANAGER_IPS="127.0.0.2", **settings)
    body = {"name": "Fair", "total_tickets": 9, "prizes": ONE_PRIZE}
    _, headers, _ = server.request("POST", "/raffles/", body, source="127.0.0.2")
    for value in forwarded:
        status, _, _ = server.request("POST", f"{headers['Location']}participate/", **{"X-Forwarded-For": value})
        assert status in (201, 403)
    assert server.request("GET", headers["Location"])[2]["available_tickets"] == 9 - participants


def test_the_zone_of_a_link_local_proxy_does_not_matter(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXY", "fe80::1")
    with closing(raffle.create_app(database, MANAGER)) as app:
        client = Client(app)
        path = client.new_raffle()
        for participant in ("10.1.0.1", "10.1.0.2"):
            client.participate(path, "fe80::1%eth0", X_Forwarded_For=participant)


def test_the_log_warns_of_a_proxy_that_is_a_manager(database, monkeypatch, caplog):
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXY", "10.7.7.7")
    with closing(raffle.create_app(database, "10.0.0.0/8")):
        assert [message.partition(":")[0] for message in caplog.messages] == ["MANAGER_IPS lists RAFFLE_TRUSTED_PROXY"]
    caplog.clear()
    with closing(raffle.create_app(database, "10.0.0.1")):
        assert caplog.messages == []


@pytest.fixture
def behind_proxy(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXY", "10.7.7.7")
    with closing(raffle.create_app(database, f"10.7.7.7, {MANAGER}")) as app:
        yield Client(app)


@pytest.mark.parametrize(
    "forwarded",
    [
        "",
        " ",
        "unknown",
        "10.0.0.1,",
        "10.0.0.1, ",
        "10.0.0.1, unknown",
        "[::1]:443",
        "10.0.0.1:80",
        "::ffff",
        "_hidden",
    ],
)
def test_a_proxy_that_names_no_address_is_told_to_the_operator(behind_proxy, caplog, forwarded):
    path = behind_proxy.new_raffle()
    for target in ("/raffles/", f"{path}winners/", f"{path}participate/"):
        caplog.clear()
        response = behind_proxy.request_from("10.7.7.7", "POST", target, status=400, X_Forwarded_For=forwarded)
        assert_problem(response, "The client's address cannot be determined")
        assert [record.getMessage() for record in caplog.records] == [
            f"No client address can be determined from {forwarded!r}"
        ]
    assert behind_proxy.get(path).json["available_tickets"] == 3


def test_fewer_entries_than_there_are_proxies_name_nobody(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXY", "10.7.7.7")
    monkeypatch.setenv("RAFFLE_TRUSTED_PROXY_COUNT", "2")
    with closing(raffle.create_app(database, MANAGER)) as app:
        client = Client(app)
        client.request_from("10.7.7.7", "POST", "/raffles/", status=400, X_Forwarded_For=MANAGER)
        client.request_from("10.7.7.7", "POST", "/raffles/", b"{", status=400, X_Forwarded_For=f"{MANAGER}, 10.9.9.9")


def test_the_log_says_once_that_a_proxy_may_stand_in_front(client, caplog):
    path = client.new_raffle()
    for address in ("10.1.0.1", "10.1.0.2"):
        client.participate(path, address, X_Forwarded_For="10.1.0.9")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("X-Forwarded-For was ignored")
    assert "RAFFLE_TRUSTED_PROXY" in warnings[0]


def test_the_log_says_once_that_the_proxy_sends_no_header(behind_proxy, caplog):
    path = behind_proxy.new_raffle()
    caplog.clear()
    behind_proxy.request_from("10.7.7.7", "POST", "/raffles/", b"{", status=400)
    behind_proxy.participate(path, "10.7.7.7")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("RAFFLE_TRUSTED_PROXY sent no X-Forwarded-For")


@pytest.mark.parametrize(
    ("managers", "inside", "outside"),
    [
        ("10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2", "::1"]),
        ("10.0.0.1, 10.0.0.3", ["10.0.0.1", "10.0.0.3"], ["10.0.0.2"]),
        (["10.0.0.1", "10.0.0.3"], ["10.0.0.1", "10.0.0.3"], ["10.0.0.2"]),
        ("10.0.0.0/30", ["10.0.0.0", "10.0.0.3"], ["10.0.0.4"]),
        ("::ffff:10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2"]),
        ("::ffff:10.0.0.0/126", ["10.0.0.3", "::ffff:a00:3"], ["10.0.0.4"]),
        ("2001:DB8::/64,::1", ["2001:db8::ffff", "::1", "0::1"], ["2001:db8:0:1::", "::2", "0.0.0.1"]),
        ("0.0.0.0/0", ["10.0.0.1", "::ffff:10.0.0.1"], ["2001:db8::1"]),
        ("::/0", ["2001:db8::1"], ["10.0.0.1"]),
        ("", [], ["10.0.0.1", "127.0.0.1", "::1"]),
    ],
)
def test_the_managers_are_those_that_the_setting_names(database, managers, inside, outside):
    with closing(raffle.create_app(database, managers)) as app:
        client = Client(app)
        for address in inside:
            client.request_from(address, "POST", "/raffles/", b"{", status=400)
        for address in outside:
            client.request_from(address, "POST", "/raffles/", b"{", status=403)


def test_a_prefix_makes_an_ipv6_network_one_participant(database, monkeypatch):
    monkeypatch.setenv("RAFFLE_IPV6_PREFIX", "64")
    with closing(raffle.create_app(database, "10.0.0.1")) as app:
        client = Client(app)
        path = client.new_raffle(total_tickets=9)
        client.participate(path, "2001:db8::1")
        client.participate(path, "2001:db8::8000:0:0:1", status=403)  # the 65th bit
        client.participate(path, "2001:db8:0:1::1")
        client.participate(path, "10.1.0.1")
        client.participate(path, "10.1.0.2")
        client.participate(path, "::ffff:10.1.0.3")
