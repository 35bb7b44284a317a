"""A web page that a manager or a participant visits cannot use their address."""

import shutil
import subprocess
from itertools import product

import pytest
from helpers import MANAGER, ONE_PRIZE, assert_problem, call

OWN = "http://localhost:80"  # what WebTest sends as the Host

RULE = [
    ({}, True),
    ({"Sec_Fetch_Site": "same-origin"}, True),
    ({"Sec_Fetch_Site": "none"}, True),
    ({"Sec_Fetch_Site": "same-origin", "Origin": "https://evil.example"}, True),
    ({"Sec_Fetch_Site": ""}, True),
    ({"Sec_Fetch_Site": "same-site"}, False),
    ({"Sec_Fetch_Site": "cross-site"}, False),
    ({"Sec_Fetch_Site": "cross-site", "Origin": OWN}, False),
    ({"Sec_Fetch_Site": "Same-Origin"}, False),
    ({"Sec_Fetch_Site": "same-origin, none"}, False),
    ({"Origin": OWN}, True),
    ({"Origin": "https://LOCALHOST:80"}, True),
    ({"Origin": OWN, "Host": "LocalHost:80"}, True),
    ({"Origin": ""}, True),
    ({"Origin": "http://localhost"}, False),
    ({"Origin": "http://localhost:8080"}, False),
    ({"Origin": "https://evil.example"}, False),
    ({"Origin": "https://evil.example/http://localhost:80"}, False),
    ({"Origin": "https://localhost:80.evil.example"}, False),
    ({"Origin": "http://[::1"}, False),
    ({"Origin": "null"}, False),
    ({"Origin": "localhost:80"}, False),
]


@pytest.mark.parametrize(("headers", "allowed"), RULE)
def test_only_pages_of_the_same_origin_change_anything(client, headers, allowed):
    path = client.new_raffle(total_tickets=1)
    target = f"{path}participate/"
    refusal = client.request_from("10.1.0.1", "POST", target, status=201 if allowed else 403, **headers)
    if not allowed:
        assert_problem(refusal, "Cross-origin requests are not allowed")
    assert client.get(path).json["available_tickets"] == (0 if allowed else 1)


def test_every_request_that_changes_something_follows_the_rule(client):
    path = client.new_raffle(total_tickets=1)
    ticket = client.participate(path).json
    for target, body in (("/raffles/", None), (f"{path}winners/", None), (f"{path}verify-ticket/", ticket)):
        refusal = client.request_from(MANAGER, "POST", target, body, status=403, Sec_Fetch_Site="cross-site")
        assert_problem(refusal, "Cross-origin requests are not allowed")
    assert client.get(path).json["winners_drawn"] is False


def test_anybody_may_read_and_no_page_of_another_site_sees_it(client):
    path = client.new_raffle()
    reads = [("GET", 200), ("HEAD", 200), ("OPTIONS", 405)]
    for target, (method, status) in product(("/raffles/", path, f"{path}winners/"), reads):
        response = client.request_from(
            "10.1.0.1", method, target, status=status, Sec_Fetch_Site="cross-site", Origin="https://evil.example"
        )
        assert not [name for name in response.headers if name.lower().startswith("access-control-")]


def test_a_request_with_an_origin_and_without_a_host_is_refused(client):
    status, problem = call(client.app, HTTP_ORIGIN=OWN)
    assert (status, problem["detail"]) == (403, "Cross-origin requests are not allowed")


# Pages beside the raffle, as a proxy in front would serve them: they send a request and show its status.
WITH_PAGES = '''
import raffle
create_app = raffle.create_app
PAGES = {
    "/script": b"""<script>
        const sent = new XMLHttpRequest()
        sent.open("POST", location.hash.slice(1), false)
        try { sent.send() } catch (error) {}
        document.write("status " + sent.status)
    </script>""",
    "/both": b"""<form method=post></form><script>
        const sent = new XMLHttpRequest()
        sent.open("POST", location.hash.slice(1), false)
        try { sent.send() } catch (error) {}
        document.forms[0].action = location.hash.slice(1)
        document.forms[0].submit()
    </script>""",
}
def create_app_with_pages():
    app = create_app()
    def site(environ, start_response):
        if environ["PATH_INFO"] not in PAGES:
            return app(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/html")])
        return [PAGES[environ["PATH_INFO"]]]
    site.close, site.storage = app.close, app.storage
    return site
raffle.create_app = create_app_with_pages
raffle.main()
'''


@pytest.fixture
def visit(tmp_path):
    """Have a real browser, at 127.0.0.1, open an address; return what it shows once the page has done its work."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("there is no chromium here")

    def open_page(url):
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--virtual-time-budget=10000",
            "--host-resolver-rules=MAP *.example 127.0.0.1",
            f"--user-data-dir={tmp_path / 'browser'}",
        ]
        command = [browser, *options, "--dump-dom", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    return open_page


def test_in_a_browser_only_a_page_of_the_same_origin_participates_and_draws(serve, visit):
    server = serve(program=("-c", WITH_PAGES))
    body = {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE}
    path = server.request("POST", "/raffles/", body)[1]["Location"]
    own = f"http://127.0.0.1:{server.port}"

    def refuses(action):
        state = server.request("GET", path)[2]
        visit(f"http://evil.example:{server.port}/both#{own}{path}{action}/")
        assert server.request("GET", path)[2] == state

    refuses("participate")
    assert "status 201" in visit(f"{own}/script#{path}participate/")
    assert server.request("GET", path)[2]["available_tickets"] == 0
    refuses("winners")
    # Its script has drawn them before its form is sent.
    assert "have already been drawn" in visit(f"{own}/both#{path}winners/")
    assert server.request("GET", path)[2]["winners_drawn"] is True


def test_in_a_browser_a_name_that_was_bound_to_the_server_is_refused(serve, visit):
    server = serve(program=("-c", WITH_PAGES), RAFFLE_HOSTS="127.0.0.1")
    path = server.request("POST", "/raffles/", {"name": "Fair", "total_tickets": 1, "prizes": ONE_PRIZE})[1]["Location"]
    assert "status 421" in visit(f"http://evil.example:{server.port}/script#{path}participate/")
    assert "status 201" in visit(f"http://127.0.0.1:{server.port}/script#{path}participate/")
