"""Whose request it is: the address that counts, managers, hosts, and other sites' pages.

Then the headers of all responses.
"""

from contextlib import ExitStack, closing
from itertools import product

import pytest
from helpers import MANAGER, NO_RAFFLE, ONE_PRIZE, Client, refused
from webtest import TestRequest

from raffle import create_app

NO_ADDRESS = "The client's address cannot be determined"
PROXIES = "10.7.7.0/24, 2001:db8:7::/48, ::1, ::ffff:10.7.9.0/120"
ONE_RAFFLE = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}


@pytest.fixture
def client_of(database, monkeypatch):
    """Make clients of applications with these settings: `client_of(managers, NAME=setting...)`."""
    with ExitStack() as applications:

        def make(managers=MANAGER, **settings):
            for name, value in settings.items():
                monkeypatch.setenv(name, value)
            app = create_app(database, managers)
            applications.enter_context(closing(app))
            return Client(app)

        yield make


# The address that counts


def assert_same_participant(client, address, other, **headers):
    """Check that a request from `other`, with these headers, counts as one from `address`.

    And as one from nobody else.
    """
    path = client.new_raffle()
    client.participate(path, other, 201, **headers)
    client.participate(path, address, 403)
    client.participate(path, "10.9.9.9", 201)
    client.participate(path, "::9", 201)


@pytest.mark.parametrize(
    "spellings",
    [
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
    ],
    ids=["IPv4", "IPv6"],
)
def test_every_spelling_of_an_address_is_the_same_participant(client, spellings):
    for address, other in product(spellings, spellings):
        assert_same_participant(client, address, other)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "10.0.0",
        "10.0.0.1:80",
        "10.0.0.1, 10.0.0.1",
        "[::1]",
        "unix:",
        "::1%",
    ],
)
def test_a_client_without_an_address_is_refused_where_it_matters(client, address):
    path, [ticket] = client.new_sold_out()
    client.draw(path)
    targets = (
        "/raffles/",
        f"{path}participate/",
        f"{path}winners/",
        f"{path}close/",
        f"{path}redeem/",
    )

    for target in targets:
        response = client.send("POST", target, ticket, 400, address)
        refused(response, None, NO_ADDRESS)

    verdict = client.send("POST", f"{path}verify-ticket/", ticket, 200, address).json
    assert verdict["has_won"]


def test_a_server_that_says_no_address_is_refused(client):
    # WebTest sends none unless it is told to.
    response = client.post("/raffles/", status=400)

    refused(response, None, NO_ADDRESS)


@pytest.mark.parametrize(
    ("proxy", "forwarded", "address"),
    [
        ("10.7.7.7", "10.1.0.1", "10.1.0.1"),
        ("10.7.7.255", "2001:DB8::1", "2001:db8::1"),
        ("::ffff:10.7.7.7", "::ffff:10.1.0.1", "10.1.0.1"),
        ("2001:db8:7:8::9", "10.1.0.1", "10.1.0.1"),
        ("10.7.9.9", "10.1.0.1", "10.1.0.1"),
        ("::1%lo", "fe80::1%eth0", "fe80::1"),
        # Several proxies.
        ("10.7.7.7", " \t10.1.0.1\t ,::ffff:10.7.7.8 , 2001:db8:7::1", "10.1.0.1"),
        ("10.7.7.7", "10.1.0.1,[::1]:80,[::1],10.7.7.9:65535", "10.1.0.1"),
        # What the client itself has sent is further left.
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
        # From strangers.
        ("10.1.0.1", "10.6.6.6", "10.1.0.1"),
        ("10.7.8.0", "10.7.7.7", "10.7.8.0"),
        ("10.1.0.1", "unknown", "10.1.0.1"),
        ("10.1.0.1", "", "10.1.0.1"),
    ],
)
def test_the_client_is_the_last_forwarded_address_that_is_no_proxys(
    client_of, proxy, forwarded, address
):
    client = client_of(RAFFLE_TRUSTED_PROXIES=PROXIES)
    headers = {}
    if forwarded is not None:
        headers["X_Forwarded_For"] = forwarded

    assert_same_participant(client, address, proxy, **headers)


NO_ENTRIES = [
    "", " ", "unknown", "_hidden", "10.1.0", "10.1.0.256", "::fffff", "::1::1", "localhost:80",
    "for=10.1.0.1", '"10.1.0.1"', "10.1.0.1 10.1.0.2", "10.1.0.1;", "\xa010.1.0.1", "10.1.0.1\xa0",
    "10.1.0.1%eth0", "10.1.0.1/32",
    # No ports.
    "10.1.0.1:", "10.1.0.1:x", "10.1.0.1:123456", "10.1.0.1:80:80", "10.1.0.1 :80", ":80",
    # No brackets around an IPv6 address.
    "[10.1.0.1]", "[10.1.0.1]:80", "[]", "[::1", "::1]", "[::1]:", "[::1]80", "[::1]:x", "[[::1]]",
    "[::1] :80",
]  # fmt: skip


@pytest.mark.parametrize("around", ["{}", "10.1.0.1,{}", "10.1.0.1, {}, 10.7.7.8"])
def test_a_forwarded_entry_that_is_no_address_is_refused_and_logged(client_of, caplog, around):
    client = client_of(RAFFLE_TRUSTED_PROXIES=PROXIES)
    path = client.new_raffle()

    for entry in NO_ENTRIES:
        caplog.clear()
        forwarded = around.format(entry)
        response = client.participate(path, "10.7.7.7", "*", X_Forwarded_For=forwarded)

        assert response.status_int == 400, entry
        refused(response, None, NO_ADDRESS)
        [record] = caplog.records
        assert record.levelname == "WARNING", entry
        assert repr(entry.strip(" ")) in record.getMessage(), entry


@pytest.mark.parametrize(
    ("prefix", "same", "other"),
    [
        ("128", "2001:db8::1%eth0", "2001:db8::"),
        ("64", "2001:db8::8000:0:0:1", "2001:db8:0:1::1"),
        ("63", "2001:db8:0:1::1", "2001:db8:0:2::1"),
        ("1", "::", "8000::"),
    ],
)
def test_a_prefix_makes_an_ipv6_network_one_participant(client_of, prefix, same, other):
    client = client_of(RAFFLE_IPV6_PREFIX=prefix)
    path = client.new_raffle(5)

    client.participate(path, "2001:db8::1", 201)
    client.participate(path, same, 403)
    client.participate(path, other, 201)
    # IPv4 addresses count in full.
    client.participate(path, "10.1.0.1", 201)
    client.participate(path, "10.1.0.0", 201)
    client.participate(path, "::ffff:10.1.0.1", 403)


# Managers


@pytest.mark.parametrize(
    ("managers", "inside", "outside"),
    [
        ("10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2", "10.0.0.10", "::1"]),
        (" 10.0.0.1 ,10.0.0.3", ["10.0.0.1", "10.0.0.3"], ["10.0.0.2"]),
        ("10.0.0.0/30", ["10.0.0.0", "10.0.0.3"], ["10.0.0.4"]),
        ("::ffff:10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.2"]),
        ("::ffff:10.0.0.0/126", ["10.0.0.3", "::ffff:a00:3"], ["10.0.0.4"]),
        ("2001:DB8::/64", ["2001:db8::ffff"], ["2001:db8:0:1::"]),
        ("2001:DB8::/64,::1", ["2001:db8::", "::1%lo", "0::1"], ["::2", "0.0.0.1"]),
        ("0.0.0.0/0", ["10.0.0.1", "::ffff:10.0.0.1"], ["2001:db8::1"]),
        ("::/0", ["2001:db8::1"], ["10.0.0.1", "::ffff:10.0.0.1"]),
        (None, [], ["10.0.0.1", "127.0.0.1", "::1"]),
    ],
    ids=str,
)
def test_managers_are_those_whom_the_setting_names(client_of, managers, inside, outside):
    client = client_of(managers, RAFFLE_IPV6_PREFIX="48")

    # What a manager sends is read, and found malformed.
    for address in inside:
        assert client.send("POST", "/raffles/", b"{", address=address).status_int == 400, address
    for address in outside:
        assert client.send("POST", "/raffles/", b"{", address=address).status_int == 403, address


def test_a_stranger_is_told_which_address_is_not_a_managers(client):
    response = client.send("POST", "/raffles/", None, 403, "fe80::1%any text")

    refused(response, "not-a-manager", "Your ip address fe80::1 is not a manager's")


@pytest.mark.parametrize(
    ("peer", "forwarded", "status"),
    [
        ("10.7.7.7", "10.0.0.1", 400),
        ("10.7.7.7", "10.0.0.1, 10.1.0.1", 403),
        ("10.1.0.1", "10.0.0.1", 403),
    ],
)
def test_a_trusted_proxy_says_whether_the_client_is_a_manager(client_of, peer, forwarded, status):
    client = client_of("10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")

    client.send("POST", "/raffles/", b"{", status, peer, X_Forwarded_For=forwarded)


def test_no_header_makes_a_stranger_someone_else(serve):
    """On a real server, because waitress joins, renames and drops headers."""
    server = serve(MANAGER_IPS="127.0.0.2, 10.0.0.1", RAFFLE_TRUSTED_PROXIES="127.0.0.9, 127.0.0.8")
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
        # A proxy adds the address that it sees.
        proxied = {**headers, "X-Forwarded-For": f"{claim}, 127.0.0.1"}
        for source, sent in (("127.0.0.1", headers), ("127.0.0.9", proxied)):
            status, _, problem = server.request("POST", "/raffles/", {}, source, **sent)
            assert status == 403, (claim, source)
            assert problem["type"] == "urn:raffle:not-a-manager", (claim, source)

        target = f"{server.create(source='127.0.0.2')}participate/"
        status, _, _ = server.request("POST", target, None, "127.0.0.1", **headers)
        assert status == 201, claim
        status, _, _ = server.request("POST", target, None, "127.0.0.9", **proxied)
        assert status == 403, claim


def test_two_lines_of_a_forwarded_header_are_one_list(serve):
    server = serve(RAFFLE_TRUSTED_PROXIES="127.0.0.9, 127.0.0.8")
    path = server.create()
    lines = {"X-Forwarded-For": "10.0.0.1", "x-forwarded-for": "127.0.0.7, 127.0.0.8"}

    status, _, _ = server.request("POST", f"{path}participate/", None, "127.0.0.7")
    assert status == 201
    status, _, _ = server.request("POST", f"{path}participate/", None, "127.0.0.9", **lines)
    assert status == 403


@pytest.mark.parametrize(
    "header",
    [
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-Anything",
        "Forwarded",
        "X-Real-IP",
        "CF-Connecting-IP",
        "Via",
    ],
)
def test_a_request_forwarded_by_a_stranger_is_never_a_managers(client_of, header):
    client = client_of("10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    path = client.new_raffle()
    sold_out, [ticket] = client.new_sold_out()
    headers = {header: "10.0.0.1"}

    for target in ("/raffles/", f"{path}close/", f"{sold_out}winners/", f"{sold_out}redeem/"):
        response = client.send("POST", target, ticket, 403, **headers)
        refused(response, "not-a-manager")
        assert "10.0.0.1" in response.json["detail"], target
        assert "RAFFLE_TRUSTED_PROXIES" in response.json["detail"], target
    assert client.get(path).json["closed_at"] is None
    assert not client.get(sold_out).json["winners_drawn"]

    # A participant counts as the address that connects.
    client.participate(path, "10.1.0.1", **headers)
    client.participate(path, "10.1.0.1", 403)


@pytest.mark.parametrize("headers", [{}, {"Forwarded": "for=10.0.0.1"}, {"X_Real_IP": "10.0.0.1"}])
def test_a_trusted_proxy_that_names_no_client_is_no_manager(client_of, headers):
    client = client_of("10.7.7.7, 10.0.0.1", RAFFLE_TRUSTED_PROXIES="10.7.7.7")

    response = client.send("POST", "/raffles/", b"{", 403, "10.7.7.7", **headers)

    refused(response, "not-a-manager")
    assert "10.7.7.7 is in RAFFLE_TRUSTED_PROXIES" in response.json["detail"]
    assert "send X-Forwarded-For" in response.json["detail"]
    # As that says, a manager on the proxy's host goes on.
    client.send("POST", "/raffles/", b"{", 400, "10.7.7.7", X_Forwarded_For="10.7.7.7")


# What the log says of proxies


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_the_log_does_not_warn_of_what_is_set_up_well(client_of, caplog):
    client = client_of(RAFFLE_TRUSTED_PROXIES="10.7.7.7")
    path = client.new_raffle()

    # Reading asks for no address.
    client.send("GET", path, None, 200, "10.8.8.8", X_Forwarded_For="10.1.0.1")
    client.participate(path, "10.1.0.1")
    client.participate(path, "10.7.7.7", X_Forwarded_For="10.1.0.2")

    assert warnings_of(caplog) == []


def test_the_log_warns_once_of_each_of_a_hundred_strangers_that_forward(client_of, caplog):
    client = client_of(RAFFLE_TRUSTED_PROXIES="10.7.7.7")

    for n in range(110):
        for _ in range(2):
            client.participate(NO_RAFFLE, f"10.8.8.{n}", 404, X_Forwarded_For="10.1.0.1")

    warnings = warnings_of(caplog)
    assert len(warnings) == 100
    for n, warning in enumerate(warnings):
        assert f"forwarded by 10.8.8.{n}, which is not in RAFFLE_TRUSTED_PROXIES" in warning


def test_the_log_warns_once_of_a_trusted_proxy_that_names_no_client(client_of, caplog):
    client = client_of(RAFFLE_TRUSTED_PROXIES="10.7.7.7")

    for _ in range(2):
        client.participate(NO_RAFFLE, "10.7.7.7", 404)

    [warning] = warnings_of(caplog)
    assert "10.7.7.7 is in RAFFLE_TRUSTED_PROXIES but sent no X-Forwarded-For" in warning


# Hosts


HOSTS = "Raffle.example, other.example.,[2001:DB8::1] , 10.0.0.5"
OTHER_HOSTS = [
    "",
    ".",
    ":80",
    "evil.example",
    "www.raffle.example",
    "notraffle.example",
    "raffle.example.evil.example",
    "example",
    "raffle.example@evil.example",
    "raffle.example:80:80",
    "raffle.example:x",
    "raffle.example/",
    "raffle.example, evil.example",
    "2001:db8::1",
    "[2001:db8::2]",
    "10.0.0.50",
    "raffle.exampl\xe9",
    "\xff",
]


def test_the_hosts_of_the_setting_are_served_in_any_spelling(client_of):
    client = client_of(RAFFLE_HOSTS=HOSTS)
    served = (
        "raffle.example", "RAFFLE.example:8080", "raffle.example.", "Raffle.Example.:443",
        "raffle.example:", "other.example", "[2001:db8::1]", "[2001:DB8::1]:8080", "10.0.0.5",
        "10.0.0.5:80",
    )  # fmt: skip

    for host in served:
        assert client.send("GET", "/raffles/", Host=host).status_int == 200, host


def test_other_hosts_are_not_served_wherever_they_ask(client_of):
    client = client_of(RAFFLE_HOSTS=HOSTS)
    targets = (
        ("GET", "/raffles/"),
        ("POST", "/raffles/"),
        ("GET", "/nothing/"),
        ("GET", "/health/x"),
    )

    for host, (method, path) in product(OTHER_HOSTS, targets):
        response = client.send(method, path, Host=host)
        assert response.status_int == 421, (host, path)
        refused(response, None)


def test_probes_of_the_health_may_have_any_host(client_of):
    client = client_of(RAFFLE_HOSTS=HOSTS)

    for host, path in product(OTHER_HOSTS, ("/health", "/health/")):
        assert client.send("GET", path, Host=host).status_int == 200, (host, path)


def test_without_the_setting_every_host_is_served(client):
    for host in OTHER_HOSTS:
        assert client.send("GET", "/raffles/", Host=host).status_int == 200, host


@pytest.mark.parametrize(("path", "status"), [("/raffles/", 421), ("/health", 200)])
def test_a_request_without_a_host_is_one_for_another_host(client_of, path, status):
    client = client_of(RAFFLE_HOSTS=HOSTS)
    request = TestRequest.blank(path)
    del request.environ["HTTP_HOST"]

    client.do_request(request, status=status)


# Other sites' pages


# By Sec-Fetch-Site: whether a request may change something.
SITES = {
    "same-origin": True,
    "none": True,
    "same-site": False,
    "cross-site": False,
    "Same-Origin": False,
    "same-origin, none": False,
    "\xff": False,
}
# By Origin, None for none: the same, where there is no Sec-Fetch-Site. WebTest asks localhost:80.
ORIGINS = {
    None: True,
    "": True,
    "http://localhost:80": True,
    "https://LOCALHOST:80": True,
    "http://localhost": True,
    "https://localhost": False,
    "http://localhost:8080": False,
    "https://evil.example": False,
    "https://evil.example/http://localhost:80": False,
    "https://localhost:80.evil.example": False,
    "localhost:80": False,
    "null": False,
    "\xff": False,
}


def browser_headers(site, origin):
    """Return the headers of a browser's request, without those that are None."""
    headers = {"Sec-Fetch-Site": site, "Origin": origin}
    return {name: value for name, value in headers.items() if value is not None}


def assert_changes(client, headers, is_allowed):
    """Check that a request with these headers may change something, or that none may.

    Requests that only read are answered either way.
    """
    description = client.get("/openapi.json").json
    posts = [path for path, methods in description["paths"].items() if "post" in methods]
    assert len(posts) == 7
    before = len(client.get("/raffles/").json)

    for path in posts:
        target = path.replace("/raffles/{raffle_id}/", NO_RAFFLE)
        response = client.send("POST", target, ONE_RAFFLE, **headers)
        is_refused = response.json.get("type") == "urn:raffle:cross-origin"
        assert is_refused != is_allowed, (path, headers)

    assert (len(client.get("/raffles/").json) > before) == is_allowed, headers
    assert client.send("GET", "/raffles/", **headers).status_int == 200, headers
    assert client.send("HEAD", "/raffles/", **headers).status_int == 200, headers
    assert client.send("OPTIONS", "/raffles/", **headers).status_int == 405, headers


@pytest.mark.parametrize("site", SITES)
def test_sec_fetch_site_decides_whether_a_page_may_change_anything(client, site):
    for origin in ORIGINS:
        assert_changes(client, browser_headers(site, origin), SITES[site])


@pytest.mark.parametrize("origin", ORIGINS)
def test_without_sec_fetch_site_the_origin_decides(client, origin):
    for site in (None, ""):
        assert_changes(client, browser_headers(site, origin), ORIGINS[origin])


def test_behind_nat64_the_whole_address_counts(client_of):
    """Every IPv4 client has an address in the same network there."""
    client = client_of(RAFFLE_IPV6_PREFIX="64")
    path = client.new_raffle(9)
    for address, status in (
        ("64:ff9b::c000:201", 201),
        ("64:ff9b::c000:202", 201),
        ("64:ff9b::c000:201", 403),
        ("64:ff9b:1::c000:201", 201),
        ("64:ff9b:1:ffff::1", 201),
        ("64:ff9b:1:ffff::2", 201),
        ("64:ff9b:2::1", 201),
        ("64:ff9b:2::2", 403),
    ):
        client.participate(path, address, status)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("raffle.example", "https://raffle.example", 404),
        ("Raffle.example:8080", "http://raffle.Example:8080", 404),
        ("[::1]:8080", "http://[::1]:8080", 404),
        # The port of a scheme may be left out.
        ("raffle.example:443", "https://raffle.example", 404),
        ("raffle.example", "https://raffle.example:443", 404),
        ("raffle.example:80", "http://raffle.example", 404),
        ("raffle.example", "http://raffle.example:80", 404),
        ("raffle.example:80", "https://raffle.example", 403),
        ("raffle.example:443", "http://raffle.example", 403),
        ("raffle.example:8080", "http://raffle.example", 403),
        ("", "null", 403),
        ("raffle.example", "http://localhost:80", 403),
        ("", "http://localhost:80", 403),
    ],
)
def test_an_origin_is_compared_with_the_host_of_the_request(client, host, origin, status):
    client.participate(NO_RAFFLE, "10.1.0.1", status, Host=host, Origin=origin)


# Responses


def test_every_response_is_a_line_of_json_for_the_one_who_asked(client):
    """Nobody may keep it, guess its type, or read it from another site."""
    path, [ticket] = client.new_sold_out()
    responses = [
        client.draw(path),
        client.participate(path, status=410),
        client.participate(client.new_raffle()),
        client.verify(path, ticket),
        client.send("POST", "/raffles/", {}, 403, Origin="null"),
        client.send("POST", "/raffles/", status=415),
        client.send("POST", "/raffles/", b"[" * 2**21, 413),
        client.send("POST", "/nothing/", status=404),
        client.send("POST", NO_RAFFLE, status=405),
        client.send("PUT", "/raffles/", status=405),
        client.send("OPTIONS", "/raffles/", status=405),
        client.send("HEAD", "/raffles/", status=200),
        client.send("GET", "/raffles/?limit=0", status=400),
        client.send("GET", "/raffles", status=200),
        client.send("GET", NO_RAFFLE, status=404),
        client.send("GET", "/%ff", status=404),
        client.send("GET", "/", status=200),
        client.send("GET", "/health", status=200),
        client.send("GET", "/openapi.json", status=200),
    ]

    for response in responses:
        content_type = "application/json"
        if response.status_int >= 400:
            content_type = "application/problem+json"
        assert response.headers["Content-Type"] == content_type, response
        assert response.headers["X-Content-Type-Options"] == "nosniff", response
        assert response.headers["Cache-Control"] == "no-store", response
        assert "access-control-" not in str(response.headers).lower(), response

        if response.request.method == "HEAD":
            assert response.body == b"", response
        else:
            assert response.body.endswith(b"\n"), response


def test_no_response_names_the_server(serve):
    _, headers, _ = serve().request("GET", "/")

    assert "Server" not in headers
