import os
from contextlib import closing

import pytest
from helpers import MANAGER, Client, Server

import raffle


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """A test sets what it needs: what the shell has exported is not for it, and no proxy stands in between."""
    for name in os.environ:
        if name == "MANAGER_IPS" or name.startswith("RAFFLE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def database(tmp_path):
    return tmp_path / "raffle.db"


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
