"""The README's way to copy a database that is in use, and to restore it."""

import re
import subprocess
import sys
from itertools import count

from helpers import ONE_PRIZE, ROOT
from test_durability import Crowd, assert_kept

README = (ROOT / "README.md").read_text(encoding="utf-8")


def backup(directory):
    """Run the README's command in a directory, with the Python of the tests."""
    (command,) = re.findall(r"^(python3 -c '\nimport os, sqlite3.*?')", README, re.MULTILINE | re.DOTALL)
    command = command.replace("python3", sys.executable, 1)
    subprocess.run(["bash", "-euc", f"{command} raffle.db backup.db"], cwd=directory, check=True, timeout=60)


def test_a_backup_made_under_load_restores_to_a_consistent_raffle(serve, tmp_path, database):
    server = serve()
    total = 100_000
    raffle = server.request("POST", "/raffles/", {"name": "Fair", "total_tickets": total, "prizes": ONE_PRIZE})[1][
        "Location"
    ]
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for(lambda: len(crowd.tickets) >= 100)
    before = list(crowd.tickets)
    backup(tmp_path)
    crowd.wait_for(lambda: len(crowd.tickets) >= len(before) + 100)
    assert server.stop() == 0
    crowd.stop()
    assert_kept(database, crowd.tickets)

    copy = tmp_path / "backup.db"
    assert copy.stat().st_mode & 0o077 == 0
    assert_kept(copy, before)
    # What a crash would have left must not be mixed with the copy.
    database.with_name("raffle.db-wal").write_bytes(b"x" * 10_000)
    (restore,) = re.findall(r"^rm -f raffle.db-wal .*$", README, re.MULTILINE)
    subprocess.run(["bash", "-euc", restore], cwd=tmp_path, check=True, timeout=60)
    server = serve()
    restored = server.request("GET", raffle)[2]
    assert len(before) <= total - restored["available_tickets"] < len(crowd.tickets)
    # The numbers that are left are those that nobody in the backup has.
    crowd = Crowd()
    crowd.numbers = count(100_000)
    crowd.start(server, raffle)
    crowd.wait_for(lambda: len(crowd.tickets) >= 100)
    crowd.stop()
    assert server.stop() == 0
    assert_kept(database, before + crowd.tickets)


def test_a_backup_writes_nothing_to_the_database(serve, tmp_path, database):
    server = serve()
    server.request("POST", "/raffles/", {"name": "Fair", "total_tickets": 2, "prizes": ONE_PRIZE})
    files = [database, tmp_path / "raffle.db-wal"]
    before = [file.read_bytes() for file in files]
    backup(tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert sorted(file.name for file in tmp_path.glob("*.db*")) == [
        "backup.db",
        "raffle.db",
        "raffle.db-shm",
        "raffle.db-wal",
    ]
