"""The command that copies a database in use, and the README's way to restore it."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from helpers import README, ROOT, Crowd, assert_kept, fill

from database import DatabaseRefused, backup


def back_up(database, copy):
    """Run `python raffle.py backup` and return what it has done."""
    command = [sys.executable, ROOT / "raffle.py", "backup", str(copy)]
    environment = {**os.environ, "RAFFLE_DATABASE": str(database)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def restore(directory):
    """Run the README's command in a directory."""
    (command,) = re.findall(r"^cp backup\.db raffle\.db\.new .*$", README, re.MULTILINE)
    subprocess.run(["bash", "-euc", command], cwd=directory, check=True, timeout=60)


def sell_out(server, raffle, database, before):
    """Check that a restored raffle issues the numbers that nobody in its backup has."""
    crowd = Crowd(first=50_000)
    crowd.start(server, raffle)
    crowd.wait_for(lambda: crowd.statuses[410])
    crowd.stop()
    assert server.stop() == 0
    assert_kept(database, before + crowd.tickets)


def test_a_backup_made_under_load_restores_to_a_consistent_raffle(serve, tmp_path, database):
    server = serve()
    raffle = server.create(2000)
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for_tickets(100)
    before = list(crowd.tickets)
    done = back_up(database, tmp_path / "backup.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{database} was copied to {tmp_path}/backup.db\n", "")
    crowd.wait_for_tickets(100)
    crowd.stop()
    assert server.stop() == 0
    assert_kept(database, crowd.tickets)

    assert (tmp_path / "backup.db").stat().st_mode & 0o777 == 0o600
    assert_kept(tmp_path / "backup.db", before)
    # What a crash would have left must not be mixed with the copy.
    database.with_name("raffle.db-wal").write_bytes(b"x" * 10_000)
    restore(tmp_path)
    server = serve()
    left = server.request("GET", raffle)[2]["available_tickets"]
    assert len(before) <= 2000 - left < len(crowd.tickets)
    sell_out(server, raffle, database, before)


def test_a_server_that_was_not_stopped_for_a_restore_issues_no_ticket_any_more(serve, tmp_path, database):
    server = serve()
    raffle = server.create(2000)
    crowd = Crowd()
    crowd.start(server, raffle)
    crowd.wait_for_tickets(100)
    before = list(crowd.tickets)
    assert back_up(database, tmp_path / "backup.db").returncode == 0
    crowd.wait_for_tickets(100)
    restore(tmp_path)
    late = Crowd(first=25_000)
    late.start(server, raffle)
    late.wait_for(lambda: late.statuses[503] >= 20)
    late.stop()
    crowd.stop()
    assert set(late.statuses) == {503}
    assert server.request("GET", "/health")[0] == 503
    (line,) = server.log.read_text().splitlines()[1:]
    assert re.search("ERROR Writes fail until a restart: .*/raffle.db(-wal)? was changed, moved or deleted", line)
    server.stop()
    server = serve()
    assert 2000 - server.request("GET", raffle)[2]["available_tickets"] >= len(before)
    sell_out(server, raffle, database, before)


def test_a_backup_writes_nothing_to_the_database(serve, tmp_path, database):
    server = serve()
    server.create()
    files = [database, tmp_path / "raffle.db-wal"]
    before = [file.read_bytes() for file in files]
    assert back_up(database, tmp_path / "backup.db").returncode == 0
    assert [file.read_bytes() for file in files] == before
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["backup.db", "log", "raffle.db", "raffle.db-shm", "raffle.db-wal"]
    # The copy is not in WAL mode (https://www.sqlite.org/fileformat.html, 1.3.3), so it is one file for whoever opens it.
    assert (tmp_path / "backup.db").read_bytes()[18:20] == b"\x01\x01"


@pytest.mark.parametrize("name", ["a #b?c%20d.db", "ü.db"])
def test_any_path_can_be_copied_from_and_to(tmp_path, name):
    fill(tmp_path / name, 3, [{"name": "Pen", "amount": 1}])
    assert back_up(tmp_path / name, tmp_path / f"copy of {name}").returncode == 0
    assert_kept(tmp_path / f"copy of {name}", [])


def test_the_commits_beside_an_emptied_database_are_not_deleted(tmp_path, database):
    database.touch()
    wal = tmp_path / "raffle.db-wal"
    wal.write_bytes(b"commits" * 1000)
    done = back_up(database, tmp_path / "backup.db")
    assert (done.returncode, done.stderr) == (1, f"{database} is missing or empty\n")
    assert wal.read_bytes() == b"commits" * 1000


def test_a_damaged_database_is_not_taken_for_a_backup(tmp_path, database):
    fill(database, 2_000, [{"name": "Pen", "amount": 1}])
    content = bytearray(database.read_bytes())
    content[40_000:60_000] = bytes(20_000)
    database.write_bytes(content)
    done = back_up(database, tmp_path / "backup.db")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{database} is damaged: ")
    assert not (tmp_path / "backup.db").exists()


def test_a_backup_does_not_overwrite_a_file(tmp_path, database):
    fill(database, 3, [{"name": "Pen", "amount": 1}])
    copy = tmp_path / "backup.db"
    copy.write_text("precious")
    done = back_up(database, copy)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{copy} already exists\n")
    assert copy.read_text() == "precious"


def test_a_backup_does_not_overwrite_a_file_that_appears_while_it_is_made(tmp_path, database, monkeypatch):
    fill(database, 3, [{"name": "Pen", "amount": 1}])
    copy = tmp_path / "backup.db"
    mkstemp = tempfile.mkstemp

    def mkstemp_and_copy(**arguments):
        copy.write_text("precious")
        return mkstemp(**arguments)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp_and_copy)
    with pytest.raises(DatabaseRefused, match="already exists"):
        backup(database, copy)
    assert copy.read_text() == "precious"
    assert list(tmp_path.glob("backup*")) == [copy]


@pytest.mark.parametrize(
    ("content", "copy", "says"),
    [
        (None, "backup.db", "{database} is missing or empty"),
        ("", "backup.db", "{database} is missing or empty"),
        ("no database" * 1000, "backup.db", "{database} cannot be copied to {copy}: file is not a database"),
        ("no database" * 1000, "missing/backup.db", "{copy} cannot be written: No such file or directory"),
    ],
)
def test_a_backup_that_fails_says_why_and_leaves_nothing_behind(tmp_path, database, content, copy, says):
    if content is not None:
        database.write_text(content)
    before = sorted(tmp_path.iterdir())
    done = back_up(database, tmp_path / copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == says.format(database=database, copy=tmp_path / copy) + "\n"
    assert sorted(tmp_path.iterdir()) == before
