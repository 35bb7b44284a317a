import os
import pkgutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers import ROOT, call

import raffle
from storage import Storage

APPLICATION_ID = 0x5261666C


def refusal(monkeypatch, **environment):
    """Start the program, which must refuse, and return the sentence it ends with."""
    for name, value in {"RAFFLE_LISTEN": "127.0.0.1:0", **environment}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.argv", ["raffle.py"])
    monkeypatch.setattr("waitress.create_server", lambda *_, **__: pytest.fail("the program starts"))
    with pytest.raises(SystemExit) as stopped:
        raffle.main()
    sentence = stopped.value.code
    assert isinstance(sentence, str)  # printed to standard error, and the exit code is 1
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("MANAGER_IPS", value)
            for value in (
                "localhost",
                "10.0.0",
                "10.0.0.256",
                "10.0.0.1,",
                ",",
                "10.0.0.1;10.0.0.2",
                "10.0.0.1 10.0.0.2",
                "10.0.0.1/8",
                "10.0.0.0/33",
                "::1/129",
                "::g",
                "010.0.0.1",
                "10.0.0.1:80",
                "[::1]",
                "*",
            )
        ],
        *[
            ("RAFFLE_LISTEN", value)
            for value in (
                "8080",
                ":8080",
                "localhost:8080",
                "127.0.0.1",
                "127.0.0.1:",
                "127.0.0.1:http",
                "127.0.0.1:65536",
                "127.0.0.1:-1",
                "::1:8080",
                "[::1]",
                "[127.0.0.1]:8080",
                "http://127.0.0.1:8080",
                "[fe80::1%nowhere]:8080",
            )
        ],
        *[("RAFFLE_THREADS", value) for value in ("0", "-1", "x", "1.5", "201", "٣", " ")],
        *[("RAFFLE_TRUSTED_PROXY", value) for value in ("x", "*", "10.0.0.0/8", "10.0.0.1,10.0.0.2")],
        *[("RAFFLE_TRUSTED_PROXY_COUNT", value) for value in ("0", "-1", "x")],
        *[
            ("RAFFLE_HOSTS", value)
            for value in ("http://raffle.example", "raffle.example:80", "a,,b", "a b", "*", ".", "[::", "[1.2.3.4]")
        ],
        *[("RAFFLE_IPV6_PREFIX", value) for value in ("0", "129", "/64", "x")],
    ],
)
def test_a_setting_that_makes_no_sense_stops_the_start(monkeypatch, database, name, value):
    monkeypatch.setenv("RAFFLE_DATABASE", str(database))
    assert refusal(monkeypatch, **{name: value}).startswith(f"{name}: ")
    assert not database.exists()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MANAGER_IP", "MANAGER_IPS"),
        ("RAFFLE_TRUSTED_PROXI", "RAFFLE_TRUSTED_PROXY"),
        ("RAFFLE_DB", "RAFFLE_DATABASE"),
        ("RAFFLE_", "RAFFLE_HOSTS"),
    ],
)
def test_a_setting_that_does_not_exist_stops_the_start(monkeypatch, database, name, nearest):
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=database, **{name: "x"})
    assert sentence == f"{name}: there is no such setting; the nearest is {nearest}"
    assert not database.exists()


def test_what_tests_and_kubernetes_set_is_not_taken_for_a_setting(monkeypatch):
    for name in ("RAFFLE_TEST_FUZZ", "RAFFLE_PORT_8080_TCP_ADDR", "RAFFLE_SERVICE_HOST", "MANAGERS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("RAFFLE_PORT", "tcp://10.0.0.1:8080")
    raffle.require_known_settings()


def test_a_missing_schema_is_named_and_leaves_nothing(monkeypatch, database):
    get_data = pkgutil.get_data

    def missing(package, resource):
        if resource == "schema.sql":
            raise FileNotFoundError(2, "No such file or directory")
        return get_data(package, resource)

    monkeypatch.setattr(pkgutil, "get_data", missing)
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=database)
    assert sentence == "RAFFLE_DATABASE: schema.sql cannot be read: No such file or directory"
    assert not database.exists()


def test_a_count_of_proxies_without_a_proxy_makes_no_sense(monkeypatch, database):
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=database, RAFFLE_TRUSTED_PROXY_COUNT=2)
    assert sentence.startswith("RAFFLE_TRUSTED_PROXY_COUNT: ")


@pytest.mark.parametrize("content", [b"x", b"This is no database. " * 100, b"SQLite format 3\0 but not really" * 100])
def test_a_file_that_is_no_database_is_refused_and_left_alone(monkeypatch, database, content):
    database.write_bytes(content)
    assert refusal(monkeypatch, RAFFLE_DATABASE=database).startswith(f"RAFFLE_DATABASE: {database} ")
    assert database.read_bytes() == content


def test_a_directory_is_refused(monkeypatch, tmp_path):
    assert refusal(monkeypatch, RAFFLE_DATABASE=tmp_path).startswith(f"RAFFLE_DATABASE: {tmp_path} ")


def test_a_directory_that_does_not_exist_is_refused(monkeypatch, tmp_path):
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=tmp_path / "nowhere" / "raffle.db")
    assert sentence.endswith("No such file or directory")


@contextmanager
def not_as_root():
    """Give up, for a while, the right of root to read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_database_that_cannot_be_read_is_refused(monkeypatch):
    with TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        database = Path(directory) / "raffle.db"
        Storage(database).database.close()
        database.chmod(0)
        # The program's own files may be the owner's only, too.
        files = {name: pkgutil.get_data("storage", name) for name in ("schema.sql", "openapi.json")}
        monkeypatch.setattr(pkgutil, "get_data", lambda _, name: files[name])
        with not_as_root():
            sentence = refusal(monkeypatch, RAFFLE_DATABASE=database)
    assert sentence == f"RAFFLE_DATABASE: {database} cannot be opened: Permission denied"


def test_a_database_that_is_served_is_not_served_by_a_second_server(serve, monkeypatch, database):
    server = serve()
    path = server.create()
    assert (
        refusal(monkeypatch, RAFFLE_DATABASE=database)
        == f"RAFFLE_DATABASE: {database} is already in use by another server"
    )
    assert server.request("POST", f"{path}participate/")[0] == 201


@pytest.mark.parametrize(
    "made_by",
    [
        "CREATE TABLE raffle (id)",
        "PRAGMA application_id = 1",
        "PRAGMA application_id = 1; CREATE TABLE raffle (id)",
        "PRAGMA application_id = 1; PRAGMA user_version = 4",
        f"PRAGMA application_id = {APPLICATION_ID}; CREATE TABLE raffle (id)",
    ],
)
def test_the_database_of_another_program_is_refused_and_left_alone(monkeypatch, database, made_by):
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(f"{made_by};")
    before = database.read_bytes()
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=database)
    assert sentence == f"RAFFLE_DATABASE: {database} was made by another program"
    assert database.read_bytes() == before


def test_what_another_program_has_not_checkpointed_yet_is_left_alone(monkeypatch, database):
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE raffle (id);")
        files = {file: file.read_bytes() for file in database.parent.glob("raffle.db*") if file.suffix != ".db-shm"}
        copy = database.parent / "copy"
        copy.mkdir()
        for file, content in files.items():
            (copy / file.name).write_bytes(content)
    assert len(files) == 2
    assert "another program" in refusal(monkeypatch, RAFFLE_DATABASE=copy / "raffle.db")
    for file, content in files.items():
        assert (copy / file.name).read_bytes() == content


@pytest.mark.parametrize(
    ("version", "made_by"),
    [
        (1, "a version of this program that is too old"),
        (5, "a newer version of this program"),
    ],
)
def test_the_database_of_another_version_is_refused(monkeypatch, database, version, made_by):
    Storage(database).database.close()
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    content = database.read_bytes()
    assert refusal(monkeypatch, RAFFLE_DATABASE=database) == f"RAFFLE_DATABASE: {database} was made by {made_by}"
    assert database.read_bytes() == content


def test_an_empty_file_becomes_a_database(database):
    database.touch()
    Storage(database).database.close()
    Storage(database).database.close()


def test_an_old_sqlite_is_refused(monkeypatch, database):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.36.0")
    sentence = refusal(monkeypatch, RAFFLE_DATABASE=database)
    assert sentence == "RAFFLE_DATABASE: SQLite 3.37 or newer is needed, and this Python has 3.36.0"


def test_no_managers_at_all_is_a_warning(database, caplog):
    raffle.create_app(database).close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MANAGER_IPS" in caplog.text
    caplog.clear()
    raffle.create_app(database, "10.0.0.1").close()
    assert caplog.records == []


def test_what_is_not_given_comes_from_the_environment(monkeypatch, database):
    monkeypatch.setenv("RAFFLE_DATABASE", str(database))
    monkeypatch.setenv("MANAGER_IPS", "bogus")
    raffle.create_app(manager_ips="10.0.0.1").close()
    assert database.exists()
    with pytest.raises(raffle.SettingError, match="MANAGER_IPS"):
        raffle.create_app()


def test_no_managers_given_are_none_whatever_the_environment_says(monkeypatch, database):
    monkeypatch.setenv("MANAGER_IPS", "10.0.0.1")
    for none in ([], ""):
        with closing(raffle.create_app(database, none)) as app:
            assert call(app, REMOTE_ADDR="10.0.0.1")[0] == 403


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("RAFFLE_THREADS", 1, 200),
        ("RAFFLE_TRUSTED_PROXY_COUNT", 1, 100),
        ("RAFFLE_IPV6_PREFIX", 1, 128),
    ],
)
def test_a_number_in_a_setting_is_within_its_bounds(name, lowest, highest):
    for number in (lowest, highest):
        assert raffle.setting(name, str(number)) == number
    for text in (str(lowest - 1), str(highest + 1), "٣", "1_0", "1" * 10):
        with pytest.raises(raffle.SettingError) as refused:
            raffle.setting(name, text)
        assert str(refused.value) == f"{name}: {text!r} is not an integer from {lowest} to {highest}"


def test_importing_the_module_touches_no_file(tmp_path):
    command = [sys.executable, "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import raffle"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_does_not_close_the_application_ends_and_leaves_one_file(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import raffle; app = raffle.create_app('raffle.db')"
    subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert [file.name for file in tmp_path.iterdir()] == ["raffle.db"]


def test_a_refused_start_prints_one_sentence_and_fails(tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        environment = {**os.environ, "RAFFLE_LISTEN": listen, "MANAGER_IPS": "127.0.0.1"}
        environment["RAFFLE_DATABASE"] = str(tmp_path / "raffle.db")
        command = [sys.executable, ROOT / "raffle.py"]
        started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert started.returncode == 1
    assert started.stdout == ""
    assert started.stderr == f"RAFFLE_LISTEN: {listen}: Address already in use\n"
    # The database is another server's, perhaps.
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_setting_and_the_version():
    said = run("--help")
    assert f"Raffle {raffle.VERSION}" in said
    for name, (_, default, meaning) in raffle.SETTINGS.items():
        assert f"{name} (default: {default or 'none'})\n      {meaning}\n" in said
    assert run("--version") == f"raffle {raffle.VERSION}\n"


def run(option):
    command = [sys.executable, "raffle.py", option]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
