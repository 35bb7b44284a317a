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
from settings import SETTINGS, SettingError

INVALID = {
    "MANAGER_IPS": [
        "localhost", "10.0.0", "10.0.0.256", "10.0.0.1,", ",", " ", "*", "10.0.0.1;10.0.0.2",
        "10.0.0.1 10.0.0.2", "10.0.0.1/8", "10.0.0.0/33", "::1/129", "::g", "10.0.0.1:80",
        "[::1]", "10.0.0.1,x",
    ],
    "RAFFLE_TRUSTED_PROXIES": ["x", "10.0.0.1/8", "10.0.0.1,", "[::1]", "10.0.0.1:80"],
    "RAFFLE_DATABASE": [
        "raffle.db\r", "raffle.db\n", " raffle.db", "raffle.db ", "raffle.db\t", "\xa0raffle.db",
        " ", "\x7f", "raf\x1bfle.db", "raf\u200bfle.db", "raf\u2028fle.db", "raf\udcfffle.db",
        ".", "no/raffle.db", "'raffle.db'", '"raffle.db"', "`raffle.db`", "\u201craffle.db\u201d",
        "\u2018raffle.db\u2019", "\u00abraffle.db\u00bb", '"raffle.db', "raffle.db'",
        "file:raffle.db", "FILE:/raffle.db?mode=ro", ":memory:",
    ],
    "RAFFLE_LISTEN": [
        "8080", ":8080", "localhost:8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", " ",
        "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:123456", "::1:8080", "[::1]", "*:8080",
        "[127.0.0.1]:8080", "http://127.0.0.1:8080", "127.0.0.1:8080\r", " 127.0.0.1:8080",
        "256.0.0.1:8080", "127.1:8080", "[::g]:8080", "[::1::]:80",
    ],
    "RAFFLE_PROCESSES": ["0", "65", "-1", "+1", "1.5", "two", " ", "1_0"],
    "RAFFLE_THREADS": [
        "0", "201", "-1", "+1", "1.5", "x", " ", "64\r", " 64", "٣", "1_0", "1" * 10,
    ],
    "RAFFLE_IPV6_PREFIX": ["0", "129", "-1", "/64", "64.0", "x", " ", "٦٤"],
    "RAFFLE_HOSTS": [
        "http://raffle.example", "raffle.example:80", "a,,b", "a,", "a b", "*", "*.example", ".",
        ".a", " ", "-a", "a-", "ü", "[::1", "::1", "[::1]:80", "[1.2.3.4]", "a/b", "a@b",
    ],
}  # fmt: skip

VALID = {
    "MANAGER_IPS": ["", "10.0.0.1", " 10.0.0.1 , ::1", "10.0.0.0/8,2001:db8::/32"],
    "RAFFLE_DATABASE": ["", "raffle.db"],
    "RAFFLE_LISTEN": [
        "", "0.0.0.0:0", "127.0.0.1:65535", "[::1]:8080", "[::]:0", "[::ffff:127.0.0.1]:80",
    ],
    "RAFFLE_TRUSTED_PROXIES": ["", "10.0.0.1", "10.0.0.0/8, ::1"],
    "RAFFLE_THREADS": ["", "1", "200", "064"],
    "RAFFLE_PROCESSES": ["", "1", "64"],
    "RAFFLE_IPV6_PREFIX": ["", "1", "128"],
    "RAFFLE_HOSTS": ["", "a", "raffle.example, LOCALHOST.,[::1],10.0.0.1,my_raffle-2"],
    # No settings: those of neighbours in a Kubernetes namespace.
    "RAFFLE_PORT": ["tcp://10.0.0.1:8080"],
    "RAFFLE_APP_SERVICE_HOST": ["10.0.0.1"],
}  # fmt: skip


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty directory, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(directory):
    return sorted(file.name for file in directory.iterdir())


def run(arguments, directory, **environment):
    """Run Python in a directory to its end."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# What the settings may be


def test_every_setting_has_invalid_values_here():
    assert set(INVALID) == set(SETTINGS)


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_setting_stops_the_start_and_leaves_no_file(directory, monkeypatch, name):
    for value in INVALID[name]:
        monkeypatch.setenv(name, value)
        with pytest.raises(SettingError) as refusal:
            raffle.create_app().close()
            pytest.fail(f"{value!r} is accepted")

        sentence = str(refusal.value)
        assert sentence.startswith(f"{name}: "), (value, sentence)
        assert sentence.isprintable(), (value, sentence)
        assert files(directory) == [], value


@pytest.mark.parametrize("name", VALID)
def test_a_valid_setting_starts_and_so_does_what_is_no_setting(directory, monkeypatch, name):
    for value in VALID[name]:
        monkeypatch.setenv(name, value)
        raffle.create_app().close()

        assert files(directory) == ["raffle.db"], value


@pytest.mark.parametrize("name", ["r af.db", "Füße.db"])
def test_the_database_may_have_any_printable_name(directory, monkeypatch, name):
    monkeypatch.setenv("RAFFLE_DATABASE", name)
    raffle.create_app().close()

    assert files(directory) == [name]


def managers_among(client, addresses):
    """Return which of the addresses may create raffles: a manager's malformed body gets 400."""
    return [
        address
        for address in addresses
        if client.send("POST", "/raffles/", b"{", address=address).status_int == 400
    ]


@pytest.mark.parametrize(
    ("database", "manager_ips", "managers", "file"),
    [
        (None, None, ["10.0.0.9"], "of-environment.db"),
        ("a.db", None, ["10.0.0.9"], "a.db"),
        ("a.db", "10.0.0.1", ["10.0.0.1"], "a.db"),
        (None, ["10.0.0.1", "10.0.0.4/31"], ["10.0.0.1", "10.0.0.5"], "of-environment.db"),
        (None, [], [], "of-environment.db"),
        (None, "", [], "of-environment.db"),
    ],
)
def test_arguments_of_create_app_win_over_the_environment(
    directory, monkeypatch, database, manager_ips, managers, file
):
    monkeypatch.setenv("MANAGER_IPS", "10.0.0.9")
    monkeypatch.setenv("RAFFLE_DATABASE", "of-environment.db")

    with closing(raffle.create_app(database=database, manager_ips=manager_ips)) as app:
        addresses = ["10.0.0.1", "10.0.0.5", "10.0.0.9"]
        assert managers_among(Client(app), addresses) == managers
    assert files(directory) == [file]


def test_the_database_may_be_given_as_a_path_object(directory):
    raffle.create_app(database=directory / "b.db").close()

    assert files(directory) == ["b.db"]


def test_an_invalid_argument_of_create_app_is_called_by_its_setting(directory):
    with pytest.raises(SettingError, match="MANAGER_IPS: "):
        raffle.create_app("f.db", ["10.0.0.1", "x"])

    assert files(directory) == []


def test_one_log_line_shows_the_effective_value_of_every_setting(serve, database):
    server = serve(
        processes=1,
        MANAGER_IPS="10.0.0.1, ::/0",
        RAFFLE_HOSTS="Raffle.example.",
        RAFFLE_THREADS="",
        RAFFLE_TRUSTED_PROXIES="",
        RAFFLE_IPV6_PREFIX="",
        RAFFLE_PORT="tcp://10.0.0.1:80",
    )

    lines = server.log.read_text().splitlines()
    [logged] = [line.partition(" Settings: ")[2] for line in lines if " Settings: " in line]
    assert json.loads(logged) == {
        "MANAGER_IPS": ["10.0.0.1/32", "::/0"],
        "RAFFLE_DATABASE": str(database),
        "RAFFLE_LISTEN": "127.0.0.1:0",
        "RAFFLE_THREADS": 64,
        "RAFFLE_PROCESSES": 1,
        "RAFFLE_TRUSTED_PROXIES": [],
        "RAFFLE_HOSTS": ["raffle.example"],
        "RAFFLE_IPV6_PREFIX": 128,
    }
    assert server.greeting == f"Listening on http://127.0.0.1:{int(server.port)}\n"


# How the program starts and ends


def start_refused(directory, **settings):
    """Start the program with settings that stop it; return what it prints as its reason."""
    ended = run([ROOT / "raffle.py"], directory, **{"RAFFLE_LISTEN": "127.0.0.1:0", **settings})

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert files(directory) == []
    return ended.stderr


def test_an_address_in_use_stops_the_start_with_one_sentence(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        reason = start_refused(tmp_path, RAFFLE_LISTEN=listen)

    assert reason == f"RAFFLE_LISTEN: {listen}: Address already in use\n"


def test_an_invalid_setting_stops_the_program_with_one_sentence(tmp_path):
    reason = start_refused(tmp_path, RAFFLE_THREADS="many")

    assert reason == "RAFFLE_THREADS: 'many' is not an integer from 1 to 200\n"


def test_importing_the_module_touches_no_file(tmp_path):
    assert run(["-c", "import raffle"], tmp_path).returncode == 0
    assert files(tmp_path) == []


def test_a_program_that_does_not_close_the_application_loses_nothing(tmp_path):
    program = """
import helpers, raffle
app = raffle.create_app("raffle.db", helpers.MANAGER)
client = helpers.Client(app)
client.participate(client.new_raffle())
"""
    ended = run(["-c", program], tmp_path)

    assert ended.returncode == 0
    assert ended.stderr == ""
    # Without a -wal file: the database has been closed in order.
    assert files(tmp_path) == ["raffle.db"]
    assert query(tmp_path / "raffle.db", "SELECT count(*) FROM ticket") == [(1,)]


def exit_status(arguments, monkeypatch):
    """Call main() with arguments that end it, and return its exit status."""
    # If they do not, this does.
    monkeypatch.setenv("RAFFLE_LISTEN", "nowhere")
    monkeypatch.setattr(sys, "argv", ["raffle.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        raffle.main()
    return ended.value.code


def test_help_lists_every_setting_with_default_and_meaning(monkeypatch, capsys):
    assert exit_status(["--help"], monkeypatch) == 0

    said = capsys.readouterr().out
    for name, (_, default, meaning) in SETTINGS.items():
        assert f"  {name} ({default or 'none'})\n      {meaning}\n" in said


def test_version_prints_name_and_version(monkeypatch, capsys):
    assert exit_status(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"raffle {raffle.VERSION}\n"


@pytest.mark.parametrize("arguments", [["serve"], ["--port", "80"], ["--versions"]])
def test_an_unknown_argument_ends_the_program_with_2(monkeypatch, arguments):
    assert exit_status(arguments, monkeypatch) == 2


def test_the_readme_lists_every_setting_with_default_and_meaning():
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| `?([^|`]+)`? \| (.+) \|$", README, re.MULTILINE)
    listed = [(name, default, meaning.replace("`", "")) for name, default, meaning in rows]

    assert listed == [
        (name, default or "none", meaning) for name, (_, default, meaning) in SETTINGS.items()
    ]
