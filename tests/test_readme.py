import re
import shutil
import subprocess
from contextlib import closing

import pytest
from helpers import ROOT

import raffle
import server

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_route_is_in_the_readme(database):
    with closing(raffle.create_app(database)) as app:
        rules = [(route.method, route.rule.replace("raffle_id", "id")) for route in app.routes]
    routes = {
        f"`{method} {rule if rule in ('/', '/raffles/') or '<' in rule else rule.rstrip('/')}`"
        for method, rule in rules
    }
    assert len(routes) == 14
    assert routes <= set(re.findall(r"`[^`\n]+`", README))


def test_every_setting_is_in_the_readme_with_its_default_and_meaning():
    table = re.findall(r"^\| `([A-Z_0-9]+)` \| `?([^|`]+)`? \| (.+) \|$", README, re.MULTILINE)
    assert [(name, default, meaning.replace("`", "")) for name, default, meaning in table] == [
        (name, str(default or "none"), meaning) for name, (_, default, meaning) in raffle.SETTINGS.items()
    ]


def test_the_readme_says_how_long_a_slow_client_holds_what():
    assert f"hold one of {server.MAX_CONNECTIONS} connections for {server.STALL_TIMEOUT} seconds" in README
    assert f"it answers what has arrived, for up to {server.STOP_TIMEOUT} seconds" in README


def masked(text):
    """Replace what differs from one raffle to the next."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<id>", text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "<hash>", text)
    text = re.sub(r"\b[0-9A-Z]{4}(-[0-9A-Z]{4}){5}\b", "<code>", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)
    text = re.sub(r'"ticket_number": \d+', '"ticket_number": <number>', text)
    return re.sub(r'"prize": "Bicycle", "redeemed_at": "', '"prize": "<prize>", "redeemed_at": "', text)


def test_the_curl_session_goes_as_it_is_printed(serve, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    server = serve(MANAGER_IPS="127.0.0.2")
    (session,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = re.findall(r"^\$ ((?:.*\\\n)*.*\n)((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) == 7
    shutil.copy(ROOT / "draw.py", tmp_path)
    script = "".join(f"{command}echo ----\n" for command, _ in steps)
    done = subprocess.run(
        ["bash", "-eu", "-c", script.replace(":8080", f":{server.port}")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    printed = [masked(output) for _, output in steps]
    assert [masked(output) for output in done.stdout.split("----\n")[:-1]] == printed
    assert "<code>" in printed[2]
    assert "<prize>" in printed[5]
