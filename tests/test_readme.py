"""The README says what is true: its commands, its routes, its limits, its layout."""

import re
import subprocess
from contextlib import closing

from helpers import README, ROOT, installed

import raffle
import server


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


def test_the_curl_session_goes_as_it_is_printed(serve, tmp_path):
    """Then the README's check of a draw holds for the raffle that was played."""
    installed("curl")
    server = serve()
    [session] = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\$ ", session, re.MULTILINE)) > 1

    save = re.search(r"`(curl \$raffle/ > 1\.json)`", README)[1]
    check = re.search(r"`(python3 draw\.py \$raffle/ --before 1\.json 2\.json)`", README)[1]
    commands = [
        *(command.replace(":8080", f":{server.port}") for command, _ in steps),
        f"{save}; {save.replace('1', '2')}",
        check.replace("draw.py", f"'{ROOT / 'draw.py'}'"),
    ]
    *outputs, saved, checked = run_commands(commands, tmp_path)

    assert [masked(output) for output in outputs] == [masked(output) for _, output in steps]
    assert saved == ""
    assert checked.count("holds  ") == 5
    assert "FAILS" not in checked


def run_commands(commands, directory):
    """Run commands in one bash, which stops at the first that fails; return what each prints."""
    script = "".join(f"{command}\necho ----\n" for command in commands)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    *outputs, rest = done.stdout.split("----\n")
    assert rest == ""
    return outputs


def masked(text):
    """Replace what differs from one raffle to the next."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<id>", text)
    text = re.sub(r"\b[0-9A-Z]{4}(-[0-9A-Z]{4}){5}\b", "<code>", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)
