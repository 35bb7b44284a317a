import faulthandler
import os
import signal
import sqlite3
from contextlib import closing

import pytest
from helpers import MANAGER, Client, Server

import raffle
from storage import Storage

# Seconds for one test. The longest takes five, unless it is told to take longer.
TIME_LIMIT = 120 + int(os.environ.get("RAFFLE_TEST_CRASHES", "0")) + int(os.environ.get("RAFFLE_TEST_FUZZ", "0")) // 100
STANDARD_ERROR = pytest.StashKey()


def pytest_configure(config):
    """Keep the standard error that pytest was started with: while a test runs, it has another."""
    config.stash[STANDARD_ERROR] = os.dup(2)


def pytest_unconfigure(config):
    os.close(config.stash[STANDARD_ERROR])


@pytest.fixture(autouse=True)
def time_limit(request):
    """Fail a test that hangs. If it cannot even fail, because a thread hangs with it, end the run and say where."""

    def fail(*_):
        raise TimeoutError(f"the test has taken {TIME_LIMIT} seconds")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(TIME_LIMIT)
    faulthandler.dump_traceback_later(TIME_LIMIT + 30, exit=True, file=request.config.stash[STANDARD_ERROR])
    yield
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """Tests ignore the settings and the proxies of the shell."""
    for name in os.environ:
        if name == "MANAGER_IPS" or name.startswith("RAFFLE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def database(tmp_path):
    return tmp_path / "raffle.db"


@pytest.fixture
def store(database):
    store = Storage(database)
    with closing(store.database):
        yield store


@pytest.fixture
def look(database):
    """Read the database past the program: `look(sql)` returns the rows."""
    with closing(sqlite3.connect(database)) as connection:
        yield lambda sql: connection.execute(sql).fetchall()


@pytest.fixture
def client(database):
    with closing(raffle.create_app(database=database, manager_ips=MANAGER)) as app:
        yield Client(app)


@pytest.fixture
def serve(tmp_path):
    """Start servers with `serve(NAME=setting...)`; they are stopped with the test."""
    servers = []

    def start(**settings):
        servers.append(Server(tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
