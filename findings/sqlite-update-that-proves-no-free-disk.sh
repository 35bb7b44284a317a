#!/usr/bin/env bash
# Pinned: apsw 3.54.1.0, which brings SQLite 3.54.1. Seen with Python 3.11 on Linux.
#
# Expected: a health check that commits a write, as UPDATE probe SET x = x, needs disk space
#   like any other write, and so fails on a full disk. An INSERT that is rolled back does too.
# Seen: in WAL mode, both put 0 bytes into the -wal file and say ok on a full disk. SQLite
#   compares the new record with the stored one, and an equal record makes no page dirty; a
#   rolled back page is never written. INSERT OR IGNORE, an UPDATE without a match and an
#   empty BEGIN IMMEDIATE are alike. Others write a page of 4096 bytes and its header of 24,
#   though nothing changes either: PRAGMA user_version set to its present value, REPLACE of a
#   row by itself, and an INSERT undone by ROLLBACK TO before a COMMIT. These fail when full.
# For a raffle: its health can be green while no ticket can be written, so the load balancer
#   goes on to send players there. So can a heartbeat that stores the same second twice.
#   Probe with PRAGMA user_version, or with a value that differs each time, and commit it.
# The full disk here is a limit of this process: it can write no file past the size of the -wal.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check apsw==3.54.1.0

seen=$("$folder/env/bin/python" - "$folder" <<'PYTHON'
import os
import resource
import signal
import sys

import apsw

PROBES = {
    "empty transaction": ["BEGIN IMMEDIATE", "COMMIT"],
    "UPDATE to the same value": ["UPDATE probe SET x = x"],
    "UPDATE without a match": ["UPDATE probe SET x = 2 WHERE id = 2"],
    "INSERT OR IGNORE": ["INSERT OR IGNORE INTO probe VALUES (1, 1)"],
    "INSERT, then ROLLBACK": ["BEGIN IMMEDIATE", "INSERT INTO probe VALUES (2, 2)", "ROLLBACK"],
    "INSERT, ROLLBACK TO, COMMIT": [
        "BEGIN IMMEDIATE", "SAVEPOINT s", "INSERT INTO probe VALUES (2, 2)", "ROLLBACK TO s",
        "COMMIT"],
    "REPLACE of a row by itself": ["REPLACE INTO probe VALUES (1, 1)"],
    "user_version to the same value": ["PRAGMA user_version = 7"],
    "UPDATE to another value": ["UPDATE probe SET x = 2"],
}
# A write past the limit is then an error of the write, not the end of the process.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)


def probe(number, statements, full):
    path = f"{sys.argv[1]}/{number}-{full}.db"
    connection = apsw.Connection(path)
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("PRAGMA user_version = 7; CREATE TABLE probe (id INTEGER PRIMARY KEY, x);"
                       "INSERT INTO probe VALUES (1, 1)").fetchall()
    before = os.path.getsize(path + "-wal")
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, no_limit[1]))
    try:
        for statement in statements:
            connection.execute(statement).fetchall()
        return f"ok, {os.path.getsize(path + '-wal') - before} bytes"
    except apsw.Error:
        return "fails"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)


print("SQLite", apsw.sqlite_lib_version())
for number, (name, statements) in enumerate(PROBES.items()):
    print(f"{name}: {probe(number, statements, False)}; full: {probe(number, statements, True)}")
PYTHON
)
echo "$seen"

stated='SQLite 3.54.1
empty transaction: ok, 0 bytes; full: ok, 0 bytes
UPDATE to the same value: ok, 0 bytes; full: ok, 0 bytes
UPDATE without a match: ok, 0 bytes; full: ok, 0 bytes
INSERT OR IGNORE: ok, 0 bytes; full: ok, 0 bytes
INSERT, then ROLLBACK: ok, 0 bytes; full: ok, 0 bytes
INSERT, ROLLBACK TO, COMMIT: ok, 4120 bytes; full: fails
REPLACE of a row by itself: ok, 4120 bytes; full: fails
user_version to the same value: ok, 4120 bytes; full: fails
UPDATE to another value: ok, 4120 bytes; full: fails'
if [ "$seen" != "$stated" ]; then
  printf 'The behaviour has changed. It was:\n%s\n' "$stated" >&2
  exit 1
fi
