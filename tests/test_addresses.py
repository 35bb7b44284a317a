from contextlib import closing

import pytest
from helpers import Client

import raffle

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


def test_what_a_client_says_of_its_address_changes_nothing(client):
    path = client.new_raffle()
    forged = {
        "X_Forwarded_For": "10.9.9.9",
        "Forwarded": "for=10.9.9.9",
        "X_Real_IP": "10.9.9.9",
        "Client_IP": "10.9.9.9",
    }
    client.request_from("10.1.0.1", "POST", f"{path}participate/", status=201, **forged)
    client.request_from("10.1.0.1", "POST", f"{path}participate/", status=403)
    client.participate(path, "10.9.9.9")
    as_manager = {name: value.replace("10.9.9.9", "10.0.0.1") for name, value in forged.items()}
    client.request_from("10.1.0.1", "POST", "/raffles/", status=403, **as_manager)


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
        client.participate(path, "2001:db8::ffff:1", status=403)
        client.participate(path, "2001:db8:0:1::1")
        client.participate(path, "10.1.0.1")
        client.participate(path, "10.1.0.2")
        client.participate(path, "::ffff:10.1.0.3")
