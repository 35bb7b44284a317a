"""What the settings mean, what stops a start, and how the program starts and ends."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import closing

import pytest
from helpers import README, ROOT, Client, query

import raffle
import settings

BAD = {
    "MANAGER_IPS": [
        *(
            "localhost",
            "10.0.0",
            "10.0.0.256",
            "10.0.0.1,",
            ",",
            " ",
            "10.0.0.1;10.0.0.2",
            "10.0.0.1 10.0.0.2",
            "*",
        ),
        *("10.0.0.1/8", "10.0.0.0/33", "::1/129", "::g", "10.0.0.1:80", "[::1]", "10.0.0.1,x"),
    ],
    "RAFFLE_TRUSTED_PROXIES": ["x", "10.0.0.1/8", "10.0.0.1,", "[::1]", "10.0.0.1:80"],
    "RAFFLE_DATABASE": [
        *(
            "raffle.db\r",
            "raffle.db\n",
            " raffle.db",
            "raffle.db ",
            "raffle.db\t",
            "\xa0raffle.db",
            " ",
        ),
        *(
            "raf\x1bfle.db",
            "raf\u200bfle.db",
            "raf\u2028fle.db",
            "raf\udcfffle.db",
            ".",
            "no/raffle.db",
            "\x7f",
        ),
    ],
    "RAFFLE_LISTEN": [
        *(
            "8080",
            ":8080",
            "localhost:8080",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:http",
            "127.0.0.1:65536",
            " ",
        ),
        *(
            "127.0.0.1:-1",
            "127.0.0.1:123456",
            "::1:8080",
            "[::1]",
            "[127.0.0.1]:8080",
            "http://127.0.0.1:8080",
        ),
        *(
            "127.0.0.1:8080\r",
            " 127.0.0.1:8080",
            "256.0.0.1:8080",
            "127.1:8080",
            "[::g]:8080",
            "[::1::]:80",
            "*:8080",
        ),
    ],
    "RAFFLE_THREADS": [
        "0",
        "201",
        "-1",
        "+1",
        "1.5",
        "x",
        " ",
        "64\r",
        " 64",
        "٣",
        "1_0",
        "1" * 10,
    ],
    "RAFFLE_IPV6_PREFIX": ["0", "129", "-1", "/64", "64.0", "x", " ", "٦٤"],
    "RAFFLE_HOSTS": [
        *(
            "http://raffle.example",
            "raffle.example:80",
            "a,,b",
            "a,",
            "a b",
            "*",
            "*.example",
            ".",
            " ",
            "-a",
            "a-",
            "ü",
        ),
        *("[::1", "::1", "[::1]:80", "[1.2.3.4]", "a/b", "a@b", ".a"),
    ],
}
GOOD = {
    "MANAGER_IPS": ["", "10.0.0.1", " 10.0.0.1 , ::1", "10.0.0.0/8,2001:db8::/32"],
    "RAFFLE_DATABASE": ["", "r af.db", "Füße.db"],
    "RAFFLE_LISTEN": [
        "",
        "0.0.0.0:0",
        "127.0.0.1:65535",
        "[::1]:8080",
        "[::]:0",
        "[::ffff:127.0.0.1]:80",
    ],
    "RAFFLE_TRUSTED_PROXIES": ["", "10.0.0.1", "10.0.0.0/8, ::1"],
    "RAFFLE_THREADS": ["", "1", "200", "064"],
    "RAFFLE_IPV6_PREFIX": ["", "1", "128"],
    "RAFFLE_HOSTS": ["", "a", "raffle.example, LOCALHOST.,[::1],10.0.0.1,my_raffle-2"],
    # Those of neighbours in a Kubernetes namespace.
    "RAFFLE_PORT": ["tcp://10.0.0.1:8080"],
    "RAFFLE_APP_SERVICE_HOST": ["10.0.0.1"],
}


def start_and_stop(arguments, monkeypatch):
    """Run the program with settings that stop it, if the arguments do not; return what it exits with."""
    monkeypatch.setenv("RAFFLE_LISTEN", "nowhere")
    monkeypatch.setattr(sys, "argv", ["raffle.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        raffle.main()
    return stopped.value.code


def run(program, directory, **environment):
    """Run a Python program in a directory to its end."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    command = [sys.executable, *program]
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_setting_that_makes_no_sense_stops_the_start_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(BAD) == set(settings.SETTINGS)
    for name, values in BAD.items():
        for value in values:
            with monkeypatch.context() as context:
                context.setenv(name, value)
                with pytest.raises(settings.SettingError) as refused:
                    raffle.create_app().close()
                    pytest.fail(f"{name}={value!r} is accepted")
            sentence = str(refused.value)
            assert sentence.startswith(f"{name}: "), (name, value, sentence)
            assert sentence.isprintable(), (name, value, sentence)
            assert list(tmp_path.iterdir()) == [], (name, value)


def test_a_setting_that_makes_sense_starts_and_so_does_what_is_no_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, values in GOOD.items():
        for value in values:
            with monkeypatch.context() as context:
                context.setenv(name, value)
                raffle.create_app().close()
    assert {file.name for file in tmp_path.iterdir()} == {"raffle.db", "r af.db", "Füße.db"}


def test_a_refused_start_prints_one_sentence_exits_with_1_and_leaves_no_file(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, value, reason in (
            ("RAFFLE_LISTEN", listen, f"{listen}: Address already in use"),
            ("RAFFLE_THREADS", "many", "'many' is not an integer from 1 to 200"),
        ):
            ended = run(
                [ROOT / "raffle.py"], tmp_path, **{"RAFFLE_LISTEN": "127.0.0.1:0", name: value}
            )
            assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"{name}: {reason}\n")
            assert list(tmp_path.iterdir()) == [], name


def test_one_log_line_shows_the_effective_value_of_every_setting(serve, database):
    empty = dict.fromkeys(("RAFFLE_THREADS", "RAFFLE_TRUSTED_PROXIES", "RAFFLE_IPV6_PREFIX"), "")
    server = serve(
        MANAGER_IPS="10.0.0.1, ::/0",
        RAFFLE_HOSTS="Raffle.example.",
        RAFFLE_PORT="tcp://10.0.0.1:80",
        **empty,
    )
    [line] = [line for line in server.log.read_text().splitlines() if " Settings: " in line]
    assert json.loads(line.partition(" Settings: ")[2]) == {
        "MANAGER_IPS": ["10.0.0.1/32", "::/0"],
        "RAFFLE_DATABASE": str(database),
        "RAFFLE_LISTEN": "127.0.0.1:0",
        "RAFFLE_THREADS": 64,
        "RAFFLE_TRUSTED_PROXIES": [],
        "RAFFLE_HOSTS": ["raffle.example"],
        "RAFFLE_IPV6_PREFIX": 128,
    }
    assert server.greeting == f"Listening on http://127.0.0.1:{int(server.port)}\n"


def test_arguments_of_create_app_win_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANAGER_IPS", "10.0.0.9")
    monkeypatch.setenv("RAFFLE_DATABASE", "of-environment.db")
    for database, managers, allowed, file in (
        (None, None, ["10.0.0.9"], "of-environment.db"),
        ("a.db", None, ["10.0.0.9"], "a.db"),
        (tmp_path / "b.db", "10.0.0.1", ["10.0.0.1"], "b.db"),
        (None, ["10.0.0.1", "10.0.0.4/31"], ["10.0.0.1", "10.0.0.5"], "of-environment.db"),
        (None, [], [], "of-environment.db"),
        (None, "", [], "of-environment.db"),
    ):
        with closing(raffle.create_app(database=database, manager_ips=managers)) as app:
            client = Client(app)
            for address in ("10.0.0.1", "10.0.0.5", "10.0.0.9"):
                response = client.send("POST", "/raffles/", b"{", address=address)
                assert (response.status_int == 400) == (address in allowed), (
                    database,
                    managers,
                    address,
                )
        (tmp_path / file).unlink()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(settings.SettingError, match="MANAGER_IPS: "):
        raffle.create_app("f.db", ["10.0.0.1", "x"])


def test_importing_the_module_touches_no_file(tmp_path):
    assert run(["-c", "import raffle"], tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_does_not_close_the_application_ends_and_loses_nothing(tmp_path):
    program = """
import helpers, raffle
app = raffle.create_app("raffle.db", helpers.MANAGER)
client = helpers.Client(app)
client.participate(client.new_raffle())
"""
    ended = run(["-c", program], tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    # Without a -wal file: the database has been closed in order.
    assert [file.name for file in tmp_path.iterdir()] == ["raffle.db"]
    assert query(tmp_path / "raffle.db", "SELECT count(*) FROM ticket") == [(1,)]


def test_help_lists_every_setting_with_default_and_meaning(monkeypatch, capsys):
    assert start_and_stop(["--help"], monkeypatch) == 0
    said = capsys.readouterr().out
    for name, (_, default, meaning) in settings.SETTINGS.items():
        assert f"  {name} ({default or 'none'})\n      {meaning}\n" in said
    assert start_and_stop(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"raffle {raffle.VERSION}\n"


def test_an_unknown_argument_ends_the_program_with_2(monkeypatch):
    for arguments in (["serve"], ["--port", "80"], ["--versions"]):
        assert start_and_stop(arguments, monkeypatch) == 2, arguments


def test_the_readme_lists_every_setting_with_default_and_meaning():
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| `?([^|`]+)`? \| (.+) \|$", README, re.MULTILINE)
    expected = [
        (name, default or "none", meaning)
        for name, (_, default, meaning) in settings.SETTINGS.items()
    ]
    assert [
        (name, default, meaning.replace("`", "")) for name, default, meaning in rows
    ] == expected
