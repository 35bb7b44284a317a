"""Who sends a request, who may manage, which hosts are served, other sites' pages, and the headers of all responses."""

from contextlib import ExitStack, closing
from itertools import product

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, Client, refused
from webtest import TestRequest

import raffle

NO_ADDRESS = "The client's address cannot be determined"
PROXIES = "10.7.7.0/24, 2001:db8:7::/48, ::1, ::ffff:10.7.9.0/120"
OWN = "http://localhost:80"  # the origin of the Host that WebTest sends


@pytest.fixture
def client_of(database, monkeypatch):
    """Make clients of applications with settings of their own: `client_of(managers, NAME=setting...)`."""
    with ExitStack() as applications:

        def make(managers=MANAGER, **settings):
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
            return Client(
                applications.enter_context(closing(raffle.create_app(database, managers)))
            )

        yield make


def assert_same_participant(client, address, other, **headers):
    """Check that a request from `other` with these headers counts as one from `address`, and as no other's."""
    path = client.new_raffle()
    for source, sent, status in (
        (other, headers, 201),
        (address, {}, 403),
        ("10.9.9.9", {}, 201),
        ("::9", {}, 201),
    ):
        response = client.participate(path, source, "*", **sent)
        assert response.status_int == status, (address, other, headers, source, response)


def test_every_spelling_of_an_address_is_the_same_participant(client):
    for spellings in (
        [
            "1.2.3.4",
            "::ffff:1.2.3.4",
            "::FFFF:102:304",
            "0:0:0:0:0:ffff:1.2.3.4",
            "::ffff:1.2.3.4%eth0",
        ],
        [
            "2001:db8::1",
            "2001:DB8::1",
            "2001:0db8:0000:0000:0000:0000:0000:0001",
            "2001:db8::1%eth0",
        ],
    ):
        for address, other in product(spellings, spellings):
            assert_same_participant(client, address, other)


def test_a_client_without_an_address_is_refused_wherever_the_address_matters(client):
    path, [ticket] = client.new_sold_out()
    client.draw(path)
    for address in (
        "",
        "localhost",
        "10.0.0",
        "10.0.0.1:80",
        "10.0.0.1, 10.0.0.1",
        "[::1]",
        "unix:",
        "::1%",
    ):
        for target in (
            "/raffles/",
            *(f"{path}{action}/" for action in ("participate", "winners", "close", "redeem")),
        ):
            response = client.send("POST", target, ticket, address=address)
            assert response.json["detail"] == NO_ADDRESS, (address, target, response)
        assert client.send("POST", f"{path}verify-ticket/", ticket, 200, address).json["has_won"], (
            address
        )
    # WebTest sends no address unless it is told to.
    refused(client.post("/raffles/", status=400), None, NO_ADDRESS)


def test_the_client_is_the_last_forwarded_address_that_is_not_a_trusted_proxys(client_of):
    client = client_of(RAFFLE_TRUSTED_PROXIES=PROXIES)
    for proxy, forwarded, address in (
        ("10.7.7.7", "10.1.0.1", "10.1.0.1"),
        ("10.7.7.255", "2001:DB8::1", "2001:db8::1"),
        ("::ffff:10.7.7.7", "::ffff:10.1.0.1", "10.1.0.1"),
        ("2001:db8:7:8::9", "10.1.0.1", "10.1.0.1"),
        ("10.7.9.9", "10.1.0.1", "10.1.0.1"),
        ("::1%lo", "fe80::1%eth0", "fe80::1"),
        # Several proxies.
        (
            "10.7.7.7",
            " \t10.1.0.1\t ,::ffff:10.7.7.8 , 2001:db8:7::1,[::1]:80,[::1],10.7.7.9:65535",
            "10.1.0.1",
        ),
        # What the client itself has sent.
        ("10.7.7.7", "10.7.7.1, 10.1.0.1, 10.7.7.8", "10.1.0.1"),
        ("10.7.7.7", "unknown, [::1, 10.1.0.1:x, ,10.1.0.1", "10.1.0.1"),
        # Nobody but proxies: the leftmost, or the one that connects.
        ("10.7.7.7", "10.7.7.9, ::1", "10.7.7.9"),
        ("10.7.7.7", None, "10.7.7.7"),
        # As Azure's gateways write it.
        ("10.7.7.7", "10.1.0.1:51008", "10.1.0.1"),
        ("10.7.7.7", "[2001:db8::1]:443", "2001:db8::1"),
        ("10.7.7.7", "[2001:db8::1]", "2001:db8::1"),
        ("10.7.7.7", "[::FFFF:10.1.0.1]:1", "10.1.0.1"),
        # Strangers.
        ("10.1.0.1", "10.6.6.6", "10.1.0.1"),
        ("10.7.8.0", "10.7.7.7", "10.7.8.0"),
        ("10.1.0.1", "unknown", "10.1.0.1"),
        ("10.1.0.1", "", "10.1.0.1"),
    ):
        assert_same_participant(
            client, address, proxy, **({} if forwarded is None else {"X_Forwarded_For": forwarded})
        )


def test_an_entry_that_must_be_read_and_is_no_address_is_refused_and_logged(client_of, caplog):
    client = client_of(RAFFLE_TRUSTED_PROXIES=PROXIES)
    path = client.new_raffle()
    for entry in (
        *(
            "",
            " ",
            "unknown",
            "_hidden",
            "10.1.0",
            "10.1.0.256",
            "::fffff",
            "::1::1",
            "localhost:80",
            "for=10.1.0.1",
        ),
        *(
            "10.1.0.1:",
            "10.1.0.1:x",
            "10.1.0.1:123456",
            "10.1.0.1:80:80",
            "10.1.0.1 :80",
            ":80",
            "10.1.0.1/32",
        ),
        *(
            "[10.1.0.1]",
            "[10.1.0.1]:80",
            "[]",
            "[::1",
            "::1]",
            "[::1]:",
            "[::1]80",
            "[::1]:x",
            "[[::1]]",
            "[::1] :80",
        ),
        *(
            '"10.1.0.1"',
            "10.1.0.1 10.1.0.2",
            "10.1.0.1;",
            "\xa010.1.0.1",
            "10.1.0.1\xa0",
            "10.1.0.1%eth0",
        ),
    ):
        for forwarded in (entry, f"10.1.0.1,{entry}", f"10.1.0.1, {entry}, 10.7.7.8"):
            caplog.clear()
            response = client.participate(path, "10.7.7.7", "*", X_Forwarded_For=forwarded)
            assert response.json.get("detail") == NO_ADDRESS, (forwarded, response)
            assert [record.levelname for record in caplog.records] == ["WARNING"], forwarded
            assert repr(entry.strip(" ")) in caplog.text, forwarded


def test_no_header_makes_a_stranger_someone_else(serve):
    server = serve(MANAGER_IPS="127.0.0.2, 10.0.0.1", RAFFLE_TRUSTED_PROXIES="127.0.0.9, 127.0.0.8")
    path = server.create(source="127.0.0.2")
    names = (
        "X-Forwarded-For",
        "X_Forwarded_For",
        "Forwarded",
        "X-Real-IP",
        "Client-IP",
        "Remote-Addr",
        "REMOTE_ADDR",
    )
    for claim in ("10.0.0.1", "for=10.0.0.1", "", "unknown"):
        headers = dict.fromkeys(names, claim)
        # Directly, and through a proxy, which adds the address that it sees.
        for source, added in (("127.0.0.1", claim), ("127.0.0.9", f"{claim}, 127.0.0.1")):
            headers["X-Forwarded-For"] = added
            status, _, problem = server.request("POST", "/raffles/", {}, source, **headers)
            assert (status, problem["type"]) == (403, "urn:raffle:not-a-manager"), (claim, source)
            server.request("POST", f"{path}participate/", None, source, **headers)
    # Two lines of a header are one list.
    lines = {"X-Forwarded-For": "10.0.0.1", "x-forwarded-for": "127.0.0.1, 127.0.0.8"}
    assert server.request("POST", f"{path}participate/", None, "127.0.0.9", **lines)[0] == 403
    _, headers, body = server.request("GET", path)
    assert body["issued_tickets"] == 1
    assert "Server" not in headers


FORWARDING = [
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Anything",
    "Forwarded",
    "X-Real-IP",
    "CF-Connecting-IP",
    "Via",
]


@pytest.mark.parametrize("header", FORWARDING)
def test_a_request_forwarded_by_a_stranger_is_never_a_managers(client_of, header):
    client = client_of("10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    path, [ticket] = client.new_sold_out()
    open_raffle = client.new_raffle()
    headers = {header: "10.0.0.1"}
    for target in ("/raffles/", f"{open_raffle}close/", f"{path}winners/", f"{path}redeem/"):
        refusal = refused(client.send("POST", target, ticket, 403, **headers), "not-a-manager")
        assert "10.0.0.1" in refusal.json["detail"]
        assert "RAFFLE_TRUSTED_PROXIES" in refusal.json["detail"]
    assert client.get(open_raffle).json["closed_at"] is None
    assert not client.get(path).json["winners_drawn"]
    # A participant counts as the address that connects.
    client.participate(open_raffle, "10.1.0.1", **headers)
    client.participate(open_raffle, "10.1.0.1", 403)


def test_a_trusted_proxy_that_names_no_client_is_no_manager(client_of):
    client = client_of("10.7.7.7, 10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    for headers in ({}, {"Forwarded": "for=10.0.0.1"}, {"X_Real_IP": "10.0.0.1"}):
        refusal = client.send("POST", "/raffles/", b"{", 403, "10.7.7.7", **headers)
        refused(refusal, "not-a-manager")
        assert "10.7.7.7 is in RAFFLE_TRUSTED_PROXIES" in refusal.json["detail"]
        assert "send X-Forwarded-For" in refusal.json["detail"]
    # As that says, a manager on the proxy's host goes on.
    client.send("POST", "/raffles/", b"{", 400, "10.7.7.7", X_Forwarded_For="10.7.7.7")


def test_the_log_warns_once_of_each_of_a_hundred_peers(client_of, caplog):
    client = client_of(RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    path = client.new_raffle()

    def warnings():
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    client.send("GET", path, None, 200, "10.8.8.8", X_Forwarded_For="10.1.0.1")
    client.participate(path, "10.1.0.1")
    client.participate(path, "10.7.7.7", X_Forwarded_For="10.1.0.2")
    assert warnings() == []
    for n in range(110):
        for _ in range(2):
            client.participate(NO_RAFFLE, f"10.8.8.{n}", 404, X_Forwarded_For="10.1.0.1")
    assert len(warnings()) == 100
    for n, warning in enumerate(warnings()):
        assert f"forwarded by 10.8.8.{n}, which is not in RAFFLE_TRUSTED_PROXIES" in warning

    caplog.clear()
    client = client_of()
    for _ in range(2):
        client.participate(NO_RAFFLE, "10.7.7.7", 404)
    [warning] = warnings()
    assert "10.7.7.7 is in RAFFLE_TRUSTED_PROXIES but sent no X-Forwarded-For" in warning


def test_managers_are_those_whom_the_setting_names(client_of):
    for managers, inside, outside in (
        ("10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2", "10.0.0.10", "::1"]),
        (" 10.0.0.1 ,10.0.0.3", ["10.0.0.1", "10.0.0.3"], ["10.0.0.2"]),
        ("10.0.0.0/30", ["10.0.0.0", "10.0.0.3"], ["10.0.0.4"]),
        ("::ffff:10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2"]),
        ("::ffff:10.0.0.0/126", ["10.0.0.3", "::ffff:a00:3"], ["10.0.0.4"]),
        (
            "2001:DB8::/64,::1",
            ["2001:db8::ffff", "::1%lo", "0::1"],
            ["2001:db8:0:1::", "::2", "0.0.0.1"],
        ),
        ("0.0.0.0/0", ["10.0.0.1", "::ffff:10.0.0.1"], ["2001:db8::1"]),
        ("::/0", ["2001:db8::1"], ["10.0.0.1", "::ffff:10.0.0.1"]),
        (None, [], ["10.0.0.1", "127.0.0.1", "::1"]),
    ):
        client = client_of(managers, RAFFLE_IPV6_PREFIX="48")
        for address in inside + outside:
            response = client.send("POST", "/raffles/", b"{", address=address)
            assert response.status_int == (400 if address in inside else 403), (
                managers,
                address,
                response,
            )
    stranger = client.send("POST", "/raffles/", None, 403, "fe80::1%any text")
    refused(stranger, "not-a-manager", "Your ip address fe80::1 is not a manager's")


def test_a_trusted_proxy_says_whether_the_client_is_a_manager(client_of):
    client = client_of("10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    for address, forwarded, status in (
        ("10.7.7.7", "10.0.0.1", 400),
        ("10.7.7.7", "10.0.0.1, 10.1.0.1", 403),
        ("10.1.0.1", "10.0.0.1", 403),
    ):
        client.send("POST", "/raffles/", b"{", status, address, X_Forwarded_For=forwarded)


def test_a_prefix_makes_an_ipv6_network_one_participant(client_of):
    for prefix, same, other in (
        ("128", "2001:db8::1%eth0", "2001:db8::"),
        ("64", "2001:db8::8000:0:0:1", "2001:db8:0:1::1"),
        ("63", "2001:db8:0:1::1", "2001:db8:0:2::1"),
        ("1", "::", "8000::"),
    ):
        client = client_of(RAFFLE_IPV6_PREFIX=prefix)
        path = client.new_raffle(5)
        for address, status in (
            ("2001:db8::1", 201),
            (same, 403),
            (other, 201),
            ("10.1.0.1", 201),
            ("10.1.0.0", 201),
        ):
            response = client.participate(path, address, "*")
            assert response.status_int == status, (prefix, address, response)
        client.participate(path, "::ffff:10.1.0.1", 403)


def test_only_the_hosts_of_the_setting_are_answered(client_of):
    served = [
        "raffle.example",
        "RAFFLE.example:8080",
        "raffle.example.",
        "Raffle.Example.:443",
        "raffle.example:",
    ]
    served += ["other.example", "[2001:db8::1]", "[2001:DB8::1]:8080", "10.0.0.5", "10.0.0.5:80"]
    others = [
        "",
        ".",
        ":80",
        "evil.example",
        "www.raffle.example",
        "notraffle.example",
        "raffle.example.evil.example",
    ]
    others += [
        "example",
        "raffle.example@evil.example",
        "raffle.example:80:80",
        "raffle.example:x",
        "raffle.example/",
    ]
    others += [
        "raffle.example, evil.example",
        "2001:db8::1",
        "[2001:db8::2]",
        "10.0.0.50",
        "raffle.exampl\xe9",
        "\xff",
    ]
    open_client = client_of()
    client = client_of(RAFFLE_HOSTS="Raffle.example, other.example.,[2001:DB8::1] , 10.0.0.5")
    for host in served:
        client.send("GET", "/raffles/", None, 200, Host=host)
    for host in others:
        for method, path in (
            ("GET", "/raffles/"),
            ("POST", "/raffles/"),
            ("GET", "/nothing/"),
            ("GET", "/health/x"),
        ):
            response = client.send(method, path, Host=host)
            assert response.status_int == 421, (host, path, response)
            refused(response, None)
        for anyway, path in ((client, "/health"), (client, "/health/"), (open_client, "/raffles/")):
            assert anyway.send("GET", path, Host=host).status_int == 200, (host, path)
    for path, status in (("/raffles/", 421), ("/health", 200)):
        request = TestRequest.blank(path)
        del request.environ["HTTP_HOST"]
        client.do_request(request, status=status)


# Whether a request may change something, by what a browser says of the page that sends it. None: Origin decides.
SITES = {
    None: None,
    "": None,
    "same-origin": True,
    "none": True,
    "same-site": False,
    "cross-site": False,
}
SITES.update({"Same-Origin": False, "same-origin, none": False, "\xff": False})
ORIGINS = {
    None: True,
    "": True,
    OWN: True,
    "https://LOCALHOST:80": True,
    "http://localhost": False,
    "null": False,
}
ORIGINS.update(
    {
        "http://localhost:8080": False,
        "https://evil.example": False,
        "localhost:80": False,
        "\xff": False,
    }
)
ORIGINS.update(
    {"https://evil.example/http://localhost:80": False, "https://localhost:80.evil.example": False}
)


def test_only_pages_of_the_same_origin_change_anything(client):
    paths = [
        path
        for path, methods in client.get("/openapi.json").json["paths"].items()
        if "post" in methods
    ]
    assert len(paths) == 6
    body, created = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}, 0
    for (site, is_own_site), (origin, is_own_origin) in product(SITES.items(), ORIGINS.items()):
        headers = {
            name: value
            for name, value in (("Sec-Fetch-Site", site), ("Origin", origin))
            if value is not None
        }
        is_allowed = is_own_origin if is_own_site is None else is_own_site
        created += is_allowed
        for path in paths:
            response = client.send(
                "POST", path.replace("/raffles/{id}/", NO_RAFFLE), body, **headers
            )
            assert (response.json.get("type") == "urn:raffle:cross-origin") != is_allowed, (
                path,
                headers,
                response,
            )
        for method, status in (("GET", 200), ("HEAD", 200), ("OPTIONS", 405)):
            assert client.send(method, "/raffles/", **headers).status_int == status, (
                method,
                headers,
            )
    assert len(client.get("/raffles/").json) == created


def test_an_origin_is_compared_with_the_host_of_the_request(client):
    for host, origin, status in (
        ("raffle.example", "https://raffle.example", 404),
        ("Raffle.example:8080", "http://raffle.Example:8080", 404),
        ("[::1]:8080", "http://[::1]:8080", 404),
        ("raffle.example", OWN, 403),
        ("", OWN, 403),
    ):
        response = client.participate(NO_RAFFLE, "10.1.0.1", "*", Host=host, Origin=origin)
        assert response.status_int == status, (host, origin, response)


def test_every_response_is_a_line_of_json_that_nobody_keeps_guesses_at_or_reads_from_another_site(
    client,
):
    path, [ticket] = client.new_sold_out()
    responses = [
        client.draw(path),
        client.participate(path, status=410),
        client.participate(client.new_raffle()),
    ]
    responses += [
        client.verify(path, ticket),
        client.send("POST", "/raffles/", {}, 403, Origin="null"),
    ]
    responses += [client.send("POST", each) for each in ("/raffles/", NO_RAFFLE, "/nothing/")]
    responses += [
        client.send("GET", each)
        for each in ("/", "/health", "/openapi.json", "/raffles", NO_RAFFLE, "/%ff")
    ]
    responses += [client.send(method, "/raffles/") for method in ("HEAD", "PUT", "OPTIONS")]
    responses += [
        client.send("POST", "/raffles/", b"[" * 2**21),
        client.send("GET", "/raffles/?limit=0"),
    ]
    assert {response.status_int for response in responses} == {
        200,
        201,
        400,
        403,
        404,
        405,
        410,
        413,
        415,
    }
    for response in responses:
        kind = "application/json" if response.status_int < 400 else "application/problem+json"
        sent = [
            response.headers[name]
            for name in ("Content-Type", "X-Content-Type-Options", "Cache-Control")
        ]
        assert sent == [kind, "nosniff", "no-store"], response
        assert not [
            name for name in response.headers if name.lower().startswith("access-control-")
        ], response
        assert response.body[-1:] == (b"" if response.request.method == "HEAD" else b"\n"), response
