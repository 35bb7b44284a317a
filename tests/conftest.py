"""The fixtures that the tests share, a time limit, and an environment without settings."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import MANAGER, Client, Server

import raffle

TIME_LIMIT = 120  # seconds for one test; the longest takes ten
STANDARD_ERROR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that pytest was started with: while a test runs, it has another."""
    config.stash[STANDARD_ERROR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STANDARD_ERROR])


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """End a run that hangs, and say where."""
    file = request.config.stash[STANDARD_ERROR]
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=file)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ignore the settings and the proxies of the shell."""
    for name in os.environ:
        if name == "MANAGER_IPS" or name.startswith("RAFFLE_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "raffle.db"


@pytest.fixture
def client(database: Path) -> Iterator[Client]:
    with closing(raffle.create_app(database=database, manager_ips=MANAGER)) as app:
        yield Client(app)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with `serve(NAME=setting...)`; they are stopped with the test."""
    servers = []

    def start(**options: Any) -> Server:
        servers.append(Server(tmp_path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
