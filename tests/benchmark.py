"""Measure the service in a process of its own, on a database that is synced with every commit.

    python tests/benchmark.py
    python tests/benchmark.py --only tickets --tickets 10000000
    python tests/benchmark.py --only processes --tickets 10000000

Machines differ, and so do the minutes of one machine: compare the ratios of one
run. A "floor" is a bare Bottle route that returns a constant of the size of a
ticket, served in the same way. Rates need wrk.
"""

import argparse
import http.client
import json
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import FAULTS, NO_RAFFLE, Server

import draw
import storage

CONNECTIONS = 64
SECONDS = 4
BATCH = 20_000  # tickets
LEFT = 200_000  # tickets for those who participate in a raffle that is nearly sold out
# Those who wait during a draw: 8 clients for each kind of request, each sends 10 in a second.
WAITING = 8
INTERVAL = 0.1  # seconds

HOLDER = "12.0.0.1"  # no other client has this address
LOADS = {  # what: (method, path, status, what its rate is compared to)
    "floor": ("POST", "/ticket/", 200, ()),
    "floor that hashes": ("POST", "/hash/", 200, ("floor",)),
    "participate": ("POST", "{raffle}participate/", 201, ("floor", "floor that hashes")),
    "verify-ticket": ("POST", "{sold_out}verify-ticket/", 200, ("floor", "floor that hashes")),
    "raffle": ("GET", "{raffle}", 200, ("floor",)),
    "participate, sold out": ("POST", "{sold_out}participate/", 410, ("floor", "raffle")),
    "participate, unknown raffle": ("POST", f"{NO_RAFFLE}participate/", 404, ("floor", "raffle")),
    "participate, has a ticket": ("POST", "{raffle}participate/", 403, ("floor", "raffle")),
}

WRK = """
local bodies, n = {}, %(first)d
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
function request()
  n = n + 1
  local address = string.format("%(address)s", n / 65536 %% 256, n / 256 %% 256, n %% 256)
  local headers = {["X-Forwarded-For"] = address, ["Content-Type"] = "application/json"}
  return wrk.format("%(method)s", nil, headers, bodies[n %% #bodies + 1])
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.status,
    e.connect + e.read + e.write + e.timeout))
end
"""

addresses = count(1)


def show(what, figure, also="", ratio=""):
    print(f"| {what} | {figure} | {also} | {ratio} |", flush=True)


def connected(server):
    return closing(http.client.HTTPConnection("127.0.0.1", int(server.port), timeout=120))


def one(connection, method, path, status, body="", address=None):
    """Send one request, from an address of its own unless one is given; return its milliseconds."""
    n = next(addresses)
    address = address or f"11.{n // 65536 % 256}.{n // 256 % 256}.{n % 256}"
    began = time.perf_counter()
    connection.request(
        method, path, body, {"X-Forwarded-For": address, "Content-Type": "application/json"}
    )
    response = connection.getresponse()
    answer = response.read()
    assert response.status == status, answer
    return (time.perf_counter() - began) * 1e3


def median(server, requests, *request):
    """Send a request so many times over one connection; return the median of its milliseconds."""
    with connected(server) as connection:
        return statistics.median(one(connection, *request) for _ in range(requests))


def percentiles(milliseconds):
    """Return p50 and p99."""
    quantiles = statistics.quantiles(milliseconds, n=100)
    return quantiles[49], quantiles[98]


def load(server, method, path, status, bodies=("",), address=None, connections=CONNECTIONS):
    """Send requests over many connections for some seconds.

    Return requests per second, and p50 and p99 in milliseconds.
    """
    # wrk tells refusals from successes, but not one refusal from another.
    median(server, 1, method, path, status, bodies[0], address)
    with tempfile.TemporaryDirectory() as directory:
        lines, script = Path(directory, "bodies"), Path(directory, "script.lua")
        lines.write_text("".join(f"{body}\n" for body in bodies))
        values = {"bodies": lines, "method": method, "address": address or "10.%d.%d.%d"}
        script.write_text(WRK % {"first": next(addresses) * 100_000, **values})
        url = f"http://127.0.0.1:{server.port}{path}"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "-s", script, url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration, p50, p99, refused, failed = map(
        int, re.search(r"RESULT (.*)", output)[1].split()
    )
    assert not failed, output
    assert refused == (requests if status >= 400 else 0), output
    return requests / duration * 1e6, p50 / 1e3, p99 / 1e3


def measure_rates(start, directory):
    floor, server = start(program=(FAULTS, "serve_floor")), start()
    paths = {
        "raffle": server.create(2**53 - 1, source="127.0.0.2"),
        "sold_out": server.create(1000, source="127.0.0.2"),
    }

    def participate(path, address):
        status, _, ticket = server.request(
            "POST", f"{path}participate/", **{"X-Forwarded-For": address}
        )
        assert status == 201, ticket
        return json.dumps(ticket)

    participate(paths["raffle"], HOLDER)
    tickets = [participate(paths["sold_out"], f"10.0.{n // 250}.{n % 250}") for n in range(1000)]
    server.request("POST", f"{paths['sold_out']}winners/", source="127.0.0.2")
    rates = {}
    for what, (method, path, status, comparisons) in LOADS.items():
        asked = floor if "floor" in what else server
        bodies = tickets if what == "verify-ticket" else [""]
        address = HOLDER if status == 403 else None
        rates[what], p50, p99 = load(asked, method, path.format(**paths), status, bodies, address)
        ratios = ", ".join(f"{rates[what] / rates[other]:.2f} of {other}" for other in comparisons)
        show(
            f"{what}, 64 connections",
            f"{rates[what]:,.0f}/s",
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
            ratios,
        )


def issue(store, raffle_id, participants):
    """Issue tickets in 64 threads; return tickets per second, and the last ticket."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        tickets = list(
            pool.map(lambda n: store.issue_ticket(raffle_id, n.to_bytes(4, "big")), participants)
        )
    return len(tickets) / (time.perf_counter() - began), tickets[-1]


def fill(database, tickets, left=BATCH):
    """Put tickets of the only raffle into the database, without codes, but not the last ones."""
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -400000"
        )
        [(raffle_id, secret)] = connection.execute("SELECT id, secret FROM raffle")
        deal_key = draw.derive_deal_key(raffle_id, secret)
        places = range(tickets - left + 1, tickets + 1)
        last = [draw.number_at(deal_key, tickets, place) for place in places]
        connection.execute(
            """
            WITH RECURSIVE numbers (number) AS (
                SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < ?
            )
            INSERT INTO ticket (raffle, number, participant_hash, salt, iterations, code_hash)
            SELECT 1, number, randomblob(16), randomblob(16), 1000, randomblob(32)
            FROM numbers
            WHERE number NOT IN (SELECT number FROM ticket UNION SELECT value FROM json_each(?))
            ORDER BY random()
            """,
            (tickets, json.dumps(last)),
        )
        connection.execute("UPDATE raffle SET issued_tickets = (SELECT count(*) FROM ticket)")
        connection.commit()


def wait_regularly(server, due, is_over, *request):
    """Send a request every INTERVAL until `is_over`.

    Return the milliseconds of each, counted from when it was due.
    """
    waits = []
    with connected(server) as connection:
        while due < time.perf_counter() or not is_over.is_set():
            time.sleep(max(0, due - time.perf_counter()))
            one(connection, *request)
            waits.append((time.perf_counter() - due) * 1e3)
            due += INTERVAL
    return waits


def measure_draw(server, raffle, prizes):
    """Draw the winners, and show what the draw takes and how long others wait meanwhile."""
    other, is_over = server.create(2**53 - 1, source="127.0.0.2"), threading.Event()
    kinds = {"participate": ("POST", f"{other}participate/", 201), "raffle": ("GET", other, 200)}
    with ThreadPoolExecutor(WAITING * len(kinds)) as pool, connected(server) as connection:
        dues = [time.perf_counter() + n * INTERVAL / WAITING for n in range(WAITING)]
        clients = {
            what: [pool.submit(wait_regularly, server, due, is_over, *request) for due in dues]
            for what, request in kinds.items()
        }
        try:
            took = one(connection, "POST", f"{raffle}winners/", 201)
        finally:
            is_over.set()
    peak = int(
        re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())[1]
    )
    show(f"draw of {prizes:,} prizes", f"{took / 1000:.2f} s", f"peak {peak / 1024:.0f} MiB")
    for what, waiting in clients.items():
        waits = [milliseconds for client in waiting for milliseconds in client.result()]
        p50, p99 = percentiles(waits)
        figures = (
            f"p99 {p99:.0f} ms, worst {max(waits):.0f} ms",
            f"p50 {p50:.0f} ms, {len(waits):,} requests",
        )
        show(f"{what}, while {prizes:,} prizes are drawn", *figures)


def measure_processes(start, directory, tickets):
    """Show the rate of one process, of two and of one for each core, twice: as the file grows."""
    database = directory / "raffle.db"
    with closing(storage.Storage(database)) as store:
        create = partial(store.create_raffle, prizes=[{"name": "Pen", "amount": 1}])
        raffles = {"a new raffle": create("New", 2**53 - 1)["id"]}
    rates = {}
    for what in ("a new raffle", f"a raffle with {tickets:,} tickets"):
        if what not in raffles:
            raffles[what] = new_filled(directory, tickets)
        for processes in sorted({1, 2, os.cpu_count() or 1}):
            server = start(processes=processes)
            floor = start(program=(FAULTS, "serve_floor"), processes=processes)
            bare, _, _ = load(floor, "POST", "/ticket/", 200, connections=128)
            path = f"/raffles/{raffles[what]}/participate/"
            rate, p50, p99 = load(server, "POST", path, 201, connections=128)
            rates[what, processes] = rate
            show(
                f"participate in {what}, {processes} processes, 128 connections",
                f"{rate:,.0f}/s",
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
                f"{rate / bare:.2f} of the floor, {rate / rates[what, 1]:.2f} of one process",
            )
            server.stop()
            floor.stop()


def new_filled(directory, tickets):
    """Put a raffle with so many tickets into a new database; return its id."""
    database = directory / "raffle.db"
    for file in directory.glob("raffle.db*"):
        file.unlink()
    with closing(storage.Storage(database)) as store:
        prizes = [{"name": "Pen", "amount": 1}]
        raffle_id = store.create_raffle("Large", tickets + LEFT, prizes)["id"]
    fill(database, tickets + LEFT, LEFT)
    return raffle_id


def measure_tickets(start, directory, tickets):
    # Every ticket of a million wins. Of more, few do: a draw depends on its prizes, not on its
    # tickets.
    prizes = tickets if tickets <= 1_000_000 else 1_000
    database = directory / "raffle.db"
    store = storage.Storage(database)
    with closing(store):
        raffle_id = store.create_raffle("Large", tickets, [{"name": "Pen", "amount": prizes}])["id"]
        first, _ = issue(store, raffle_id, range(BATCH))
    fill(database, tickets)
    store = storage.Storage(database)
    with closing(store):
        last, ticket = issue(store, raffle_id, range(BATCH, 2 * BATCH))
    rates = f"{last:,.0f}/s, {first:,.0f}/s"
    show(
        f"the last {BATCH:,} of {tickets:,} tickets, and the first",
        rates,
        "",
        f"{last / first:.2f}",
    )
    show(f"disk for {tickets:,} tickets", f"{database.stat().st_size / tickets:.0f} bytes each")
    # Started only now, because a process keeps memory that it has once used.
    server, raffle = start(), f"/raffles/{raffle_id}/"
    measure_draw(server, raffle, prizes)
    verification = median(server, 100, "POST", f"{raffle}verify-ticket/", 200, json.dumps(ticket))
    show(f"verify-ticket, one connection, {tickets:,} tickets", f"{verification:.1f} ms")
    path = f"{raffle}winners/?cursor="
    page, last = (
        median(server, 10, "GET", f"{path}{cursor}", 200) for cursor in (1, max(1, prizes - 10_000))
    )
    show(
        "a page of 10,000 wins, the first and the last",
        f"{page:.1f} ms, {last:.1f} ms",
        "",
        f"{last / page:.2f}",
    )


def main():
    parser = argparse.ArgumentParser(description="Measure the service; print one table.")
    parser.add_argument(
        "--tickets", type=int, default=1_000_000, help="tickets of the large raffle (%(default)s)"
    )
    measures = {
        "rates": measure_rates,
        "tickets": measure_tickets,
        "processes": measure_processes,
    }
    parser.add_argument("--only", choices=measures, help="run one group (all)")
    arguments = parser.parse_args()
    if arguments.tickets < 2 * BATCH:
        parser.error(f"--tickets: {2 * BATCH:,} or more")
    for name in ("tickets", "processes"):
        measures[name] = partial(measures[name], tickets=arguments.tickets)
    print("| What | Figure | Also | Ratio |\n|---|---|---|---|")
    for name in [arguments.only] if arguments.only else measures:
        print(f"... {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as directory, ExitStack() as servers:

            def start(directory=Path(directory), servers=servers, **options):
                settings = {
                    "RAFFLE_TRUSTED_PROXIES": "127.0.0.1",
                    "MANAGER_IPS": "127.0.0.2,11.0.0.0/8",
                }
                server = Server(directory, **settings, **options)
                servers.callback(server.stop)
                return server

            measures[name](start, Path(directory))


if __name__ == "__main__":
    main()
