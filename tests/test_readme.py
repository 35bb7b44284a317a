"""The README says what is true: its commands, its routes, its limits, its layout, its links."""

import re
import subprocess
from contextlib import closing

import pytest
from helpers import README, ROOT, installed

import raffle
import server

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_every_route_is_in_the_readme(database):
    with closing(raffle.create_app(database)) as app:
        routes = [(route.method, route.rule.replace("raffle_id", "id")) for route in app.routes]

    for method, rule in routes:
        # With or without the last slash.
        assert re.search(f"`{method} {re.escape(rule.rstrip('/'))}/?`", README), (method, rule)


def test_the_layout_of_the_readme_names_every_file():
    files = [*ROOT.glob("*.py"), ROOT / "schema.sql", ROOT / "openapi.json"]

    for file in files:
        assert re.search(rf"`{re.escape(file.name)}` \(?\w+", README), file.name


def test_the_limits_of_the_readme_are_those_of_the_server():
    limits = (
        f"{server.MAX_CONNECTIONS} connections",
        f"{server.STALL_TIMEOUT} seconds",
        f"up to {server.STOP_TIMEOUT} seconds",
    )

    for limit in limits:
        assert re.search(rf"\b{limit}\b", README), limit


def test_the_session_goes_as_it_is_printed(serve, tmp_path):
    """With the id, number and code of this raffle in place of those that are printed."""
    installed("curl")
    server = serve()
    sessions = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", sessions, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\$ ", sessions, re.MULTILINE)) > 10

    actual = {":8080": f":{server.port}", "draw.py": f"'{ROOT / 'draw.py'}'"}
    variables = ""
    for command, printed in steps:
        command = replaced(command, actual)
        if re.match("[a-z]+=", command):
            variables += f"{command}\n"
            continue

        output = run_in_bash(variables + command, tmp_path)
        pattern = re.escape(masked(printed)).replace(re.escape("..."), ".*")
        assert re.fullmatch(pattern, masked(output)), (command, output)
        actual.update(zip(values_in(printed), values_in(output)))

    assert printed.count("holds  ") == 5


def run_in_bash(script, directory):
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


# What differs from one raffle to the next: ids, codes, numbers of tickets, times.
VALUE = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}"
    r"|\b[0-9A-Z]{4}(?:-[0-9A-Z]{4}){5}\b"
    r'|"ticket_number": [0-9]+'
    r"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
)


def values_in(text):
    return VALUE.findall(text)


def masked(text):
    return VALUE.sub("<value>", text)


def replaced(text, values):
    for old, new in values.items():
        text = text.replace(old, new)
    return text


def test_the_round_of_the_beacon_is_the_one_that_is_printed():
    command, printed = re.search(
        r"```console\n\$ (.*)\n(.*\n)```", (ROOT / "docs/fairness.md").read_text(encoding="utf-8")
    ).groups()

    assert run_in_bash(command, ROOT) == printed
    assert f"drand quicknet round {printed.strip()}," in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_or_a_heading(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """Return what the headings of a page are called in links to them."""
    headings = re.findall("^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
