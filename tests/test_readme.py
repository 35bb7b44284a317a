"""The README says what is true: its commands, its routes, its settings, its layout."""

import re
import shutil
import subprocess
from contextlib import closing

import pytest
from helpers import README, ROOT

import raffle
import server


def test_every_route_is_in_the_readme(database):
    with closing(raffle.create_app(database)) as app:
        routes = [(route.method, route.rule.replace("raffle_id", "id")) for route in app.routes]
    for method, rule in routes:
        assert f"`{method} {rule}`" in README or f"`{method} {rule.rstrip('/')}`" in README, (
            method,
            rule,
        )


def test_the_layout_of_the_readme_names_every_file():
    for file in [*ROOT.glob("*.py"), ROOT / "schema.sql", ROOT / "openapi.json"]:
        assert re.search(rf"`{re.escape(file.name)}` \(?\w+", README), file.name


def test_the_limits_of_the_readme_are_those_of_the_server():
    assert (
        f"hold one of {server.MAX_CONNECTIONS} connections for {server.STALL_TIMEOUT} seconds"
        in README
    )
    assert f"answers what has arrived, for up to {server.STOP_TIMEOUT} seconds" in README


def masked(text):
    """Replace what differs from one raffle to the next."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<id>", text)
    text = re.sub(r"\b[0-9A-Z]{4}(-[0-9A-Z]{4}){5}\b", "<code>", text)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)


def test_the_curl_session_goes_as_it_is_printed(serve, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    server = serve()
    (session,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = re.findall(r"^\$ (.*\n)((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) == 7
    script = "".join(f"{command}echo ----\n" for command, _ in steps).replace(
        ":8080", f":{server.port}"
    )
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [masked(output) for output in done.stdout.split("----\n")[:-1]] == [
        masked(output) for _, output in steps
    ]
    save = re.search(r"`(curl \$raffle/ > 1\.json)`", README)[1]
    check = re.search(r"`(python3 draw\.py \$raffle/ --before 1\.json 2\.json)`", README)[1]
    script += (
        f"{save}\n{save.replace('1', '2')}\n{check.replace('draw.py', str(ROOT / 'draw.py'))}\n"
    )
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.count("\nholds  ") == 5
    assert "FAILS" not in done.stdout
