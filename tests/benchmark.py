"""Measure the service in a process of its own, on a database that is synchronised with every commit.

    python tests/benchmark.py

Machines differ, and so do the minutes of one machine: the ratios of one run are
what to look at. "Floor" is a bare Bottle route that returns a constant of the
size of a ticket, served in the same way. Uses wrk where it is installed.
"""

import http.client
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import helpers
from helpers import Server, Stalling, all_pages

import storage

CONNECTIONS = 64
SECONDS = 5
MILLION = 1_000_000

FLOOR = """
import bottle, raffle, server
app = bottle.Bottle()
ticket = '{"raffle_id": "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21", "ticket_number": 2, ' \\
    '"verification_code": "7K3M-9QXD-04TZ-WHE8-5C1N-VRP6"}\\n'
app.route("/<path:path>", ["GET", "POST"], lambda path: ticket)
listen, threads = raffle.setting("RAFFLE_LISTEN"), raffle.setting("RAFFLE_THREADS")
server.serve(app, server.bind(listen), threads, max_body=2 * raffle.MAX_BODY, on_stop=lambda: None)
"""

WRK = """
local bodies, n = {}, tonumber("%(first)d")
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
function request()
  n = n + 1
  local address = string.format("10.%%d.%%d.%%d", n / 65536 %% 256, n / 256 %% 256, n %% 256)
  local headers = {["X-Forwarded-For"] = address, ["Content-Type"] = "application/json"}
  return wrk.format("%(method)s", nil, headers, bodies[n %% #bodies + 1])
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""

SLOW_DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int slow(const char *name, int fd) {
    usleep(5000);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return slow("fsync", fd); }
int fdatasync(int fd) { return slow("fdatasync", fd); }
"""

addresses = count(1)


def forwarded():
    n = next(addresses)
    return {"X-Forwarded-For": f"11.{n // 65536 % 256}.{n // 256 % 256}.{n % 256}"}


def progress(text):
    print(f"... {text}", file=sys.stderr, flush=True)


def show(what, *figures):
    print(f"| {what} | {' | '.join(figures)} |", flush=True)


def load(server, method, path, bodies=("",)):
    """Send requests over 64 connections for 5 seconds; return those per second, and p50 and p99 in milliseconds."""
    if shutil.which("wrk"):
        with tempfile.TemporaryDirectory() as directory:
            lines = Path(directory, "bodies")
            lines.write_text("".join(f"{body}\n" for body in bodies))
            script = Path(directory, "script.lua")
            script.write_text(WRK % {"first": next(addresses) * 100_000, "bodies": lines, "method": method})
            options = [
                "-t1",
                f"-c{CONNECTIONS}",
                f"-d{SECONDS}s",
                "-s",
                script,
                f"http://127.0.0.1:{server.port}{path}",
            ]
            output = subprocess.run(["wrk", *options], capture_output=True, text=True, check=True).stdout
        requests, duration, p50, p99, errors = map(int, re.search(r"RESULT (.*)", output)[1].split())
        assert not errors, output
        return requests / duration * 1e6, p50 / 1e3, p99 / 1e3
    latencies = []
    end = time.perf_counter() + SECONDS

    def connect():
        with closing(http.client.HTTPConnection("127.0.0.1", int(server.port))) as connection:
            while time.perf_counter() < end:
                latencies.append(one(connection, method, path, random.choice(bodies)))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for client in [pool.submit(connect) for _ in range(CONNECTIONS)]:
            client.result()
    quantiles = statistics.quantiles(latencies, n=100)
    return len(latencies) / SECONDS, quantiles[49], quantiles[98]


def one(connection, method, path, body=""):
    """Send one request from an address of its own, and return its milliseconds."""
    start = time.perf_counter()
    connection.request(method, path, body, {**forwarded(), "Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    assert response.status < 300, response.status
    return (time.perf_counter() - start) * 1e3


def fill(store, raffle_id, start, end):
    """Give tickets to the participants `start` to `end`, at addresses in no order, 20,000 in a commit."""
    participants = [n * 2654435761 % 2**32 for n in range(start, end)]
    for first in range(0, len(participants), 20_000):
        requests = [(n.to_bytes(4, "big"), b"s" * 16, 1, b"h" * 32) for n in participants[first : first + 20_000]]
        store.database.write(lambda db, *_, r=requests: storage.issue_tickets(db, raffle_id, r)[:1], raffle_id).result()


def issue(store, raffle_id, start, tickets):
    """Return the tickets per second that 64 threads get, each ticket in a commit shared with those who wait."""
    numbers = iter(range(start, start + tickets))
    lock = threading.Lock()

    def ask():
        while True:
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            store.issue_ticket(raffle_id, (n * 2654435761 % 2**32).to_bytes(4, "big"))

    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for thread in [pool.submit(ask) for _ in range(CONNECTIONS)]:
            thread.result()
    return tickets / (time.perf_counter() - began)


def memory(server, field):
    """Return a field of the process's memory in MiB: VmRSS (now) or VmHWM (peak)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def measure_rates(start):
    floor_server, server = start(program=("-c", FLOOR)), start()
    raffle = server.create(2**53 - 1)
    sold_out = server.create(1000)
    tickets = []
    for _ in range(1000):
        status, _, ticket = server.request("POST", f"{sold_out}participate/", **forwarded())
        assert status == 201, ticket
        tickets.append(json.dumps(ticket))
    server.request("POST", f"{sold_out}winners/")
    progress("rates at 64 connections")
    floor, p50, p99 = load(floor_server, "POST", "/ticket/")
    show("floor, 64 connections", f"{floor:,.0f}/s", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms", "1")
    for what, method, path, bodies in (
        ("participate, 64 connections", "POST", f"{raffle}participate/", [""]),
        ("verify-ticket, 64 connections", "POST", f"{sold_out}verify-ticket/", tickets),
        ("raffle, 64 connections", "GET", raffle, [""]),
    ):
        rate, p50, p99 = load(server, method, path, bodies)
        show(what, f"{rate:,.0f}/s", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms", f"{rate / floor:.2f} of the floor")
    with closing(http.client.HTTPConnection("127.0.0.1", int(server.port))) as connection:
        alone = statistics.median(one(connection, "POST", f"{raffle}participate/") for _ in range(300))
        show("participate, one connection", f"{1000 / alone:,.0f}/s", f"p50 {alone:.1f} ms", "")
        body = '{"name": "Fair", "prizes": [{"name": "Pen", "amount": 1}], "total_tickets": %d}'
        few, many = (
            statistics.median(one(connection, "POST", "/raffles/", body % total) for _ in range(50))
            for total in (10, 2**53 - 1)
        )
    show("create a raffle of 10 tickets, and of 2^53 - 1", f"{few:.1f} ms, {many:.1f} ms", "", f"{many / few:.2f}")


def participate(server, raffle, waits, over):
    """Ask for tickets, one after the other, and add to `waits` what each took in milliseconds."""
    with closing(http.client.HTTPConnection("127.0.0.1", int(server.port), timeout=120)) as connection:
        while not over.is_set():
            waits.append(one(connection, "POST", f"{raffle}participate/"))


def measure_million(start, database):
    progress("a raffle of a million tickets; this takes a minute")
    store = storage.Storage(database)
    with closing(store.database):
        empty = database.stat().st_size
        million = store.create_raffle("Million", MILLION, [{"name": "Pen", "amount": MILLION}])["id"]
        first = issue(store, million, 0, 20_000)
        fill(store, million, 20_000, MILLION - 20_000)
        last = issue(store, million, MILLION - 20_000, 20_000)
        show(
            "the last 20,000 of a million tickets, and the first",
            f"{last:,.0f}/s, {first:,.0f}/s",
            "",
            f"{last / first:.2f}",
        )
    show("disk for a million tickets", f"{(database.stat().st_size - empty) / MILLION:.0f} bytes each", "", "")
    store = storage.Storage(database)
    with closing(store.database):
        hundred_thousand = store.create_raffle("Big", 100_000, [{"name": "Pen", "amount": 100_000}])["id"]
        fill(store, hundred_thousand, 0, 100_000)

    server = start(RAFFLE_DATABASE=str(database))
    other = server.create(2**53 - 1)
    for prizes, raffle_id in ((100_000, hundred_thousand), (MILLION, million)):
        progress(f"a draw of {prizes:,} prizes")
        waits = []
        over = threading.Event()

        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
        participant = threading.Thread(target=participate, args=(server, other, waits, over))
        participant.start()
        began = time.perf_counter()
        status, _, _ = server.request("POST", f"/raffles/{raffle_id}/winners/")
        took = time.perf_counter() - began
        assert status == 201
        over.set()
        participant.join()
        show(
            f"draw of {prizes:,} prizes",
            f"{took:.1f} s",
            f"peak {memory(server, 'VmHWM'):.0f} MiB",
            f"others wait up to {max(waits) / 1e3:.1f} s",
        )

    progress("a million wins, page by page")
    pages, resident = [], []
    with closing(http.client.HTTPConnection("127.0.0.1", int(server.port))) as connection:

        def get(path):
            began = time.perf_counter()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            pages.append(time.perf_counter() - began)
            resident.append(memory(server, "VmRSS"))
            return response.headers, None

        for _ in all_pages(get, f"/raffles/{million}/winners/"):
            pass
    # Every thread that serves its first long page keeps some memory: so not from the first on.
    grown = resident[-1] - resident[49]
    first, last = statistics.median(pages[:10]), statistics.median(pages[-10:])
    show(
        f"list a million wins in {len(pages)} pages",
        f"{sum(pages):.1f} s",
        f"memory grows by {grown:.0f} MiB from the 50th page on",
        f"last pages {last / first:.2f} of the first",
    )


def measure_slow_disk(start, directory):
    if not shutil.which("cc"):
        progress("no C compiler: the slow disk is left out")
        return
    progress("a slow disk")
    source = directory / "slow.c"
    source.write_text(SLOW_DISK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", directory / "slow.so", source, "-ldl"], check=True)
    server = start(LD_PRELOAD=str(directory / "slow.so"))
    raffle = server.create(2**53 - 1)
    with closing(http.client.HTTPConnection("127.0.0.1", int(server.port))) as connection:
        alone = statistics.median(one(connection, "POST", f"{raffle}participate/") for _ in range(100))
    rate, p50, p99 = load(server, "POST", f"{raffle}participate/")
    show("5 ms more for every fsync, one connection", f"{1000 / alone:,.0f}/s", f"p50 {alone:.1f} ms", "")
    show(
        "5 ms more for every fsync, 64 connections",
        f"{rate:,.0f}/s",
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        f"{rate * alone / 1000:.0f} times as many",
    )


def measure_worn_down(start, directory):
    progress("clients that stall")
    sold_out = helpers.fill(directory / "raffle.db", 10_000, [{"name": "x" * 20, "amount": 10_000}])
    server = start()
    server.request("POST", f"{sold_out}winners/")
    raffle = server.create(2**53 - 1)
    stalling = Stalling(server, f"{sold_out}winners/", resting=200, dribbling=200, unreading=50)
    with closing(http.client.HTTPConnection("127.0.0.1", int(server.port))) as connection:
        waits = [one(connection, "POST", f"{raffle}participate/") for _ in range(1000)]
    stalling.stop()
    quantiles = statistics.quantiles(waits, n=100)
    show(
        "participate, one connection, while 450 others rest, send slowly or never read",
        f"{1000 / quantiles[49]:,.0f}/s",
        f"p50 {quantiles[49]:.1f} ms, p99 {quantiles[98]:.0f} ms",
        "",
    )


def main():
    began = time.perf_counter()
    servers = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def start(**options):
            settings = {"RAFFLE_TRUSTED_PROXY": "127.0.0.1", "MANAGER_IPS": "127.0.0.1,11.0.0.0/8"}
            servers.append(Server(directory, **settings, **options))
            return servers[-1]

        print("| What | Figure | Also | Ratio |\n|---|---|---|---|")
        try:
            for measure in (
                lambda: measure_rates(start),
                lambda: measure_slow_disk(start, directory),
                lambda: measure_worn_down(start, directory),
                lambda: measure_million(start, directory / "million.db"),
            ):
                measure()
                while servers:
                    servers.pop().stop()
        finally:
            while servers:
                servers.pop().stop()
    progress(f"{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
