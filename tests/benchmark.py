"""Measure the service in a process of its own, on a database that is synchronised with every commit.

    python tests/benchmark.py
    python tests/benchmark.py --only verify-ticket
    python tests/benchmark.py --only tickets --tickets 10000000

Machines differ, and so do the minutes of one machine: the ratios of one run are
what to look at. A "floor" is a bare Bottle route that returns a constant of the
size of a ticket, served in the same way. Uses wrk where it is installed.
"""

import argparse
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
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import Server, Stalling, all_pages, fill

import storage

CONNECTIONS = 64
SECONDS = 4
MILLION = 1_000_000
BATCH = 20_000  # tickets

# Those who wait during a draw: 8 clients for each kind of request, each sends 10 in a second.
WAITING = 8
INTERVAL = 0.1  # seconds

HOLDER = "12.0.0.1"  # no other client has this address
LOADS = {  # name: (what, method, path, status, the lines whose rates it is compared to)
    "floor": ("floor", "POST", "/ticket/", 200, ()),
    "hashing-floor": ("floor that hashes as a ticket does", "POST", "/hash/", 200, ("floor",)),
    "participate": ("participate", "POST", "{raffle}participate/", 201, ("floor", "hashing-floor")),
    "verify-ticket": ("verify-ticket", "POST", "{sold_out}verify-ticket/", 200, ("floor", "hashing-floor")),
    "raffle": ("raffle", "GET", "{raffle}", 200, ("floor",)),
    "sold-out": ("participate, sold out", "POST", "{sold_out}participate/", 410, ("floor", "raffle")),
    "unknown": ("participate, unknown raffle", "POST", "{unknown}participate/", 404, ("floor", "raffle")),
    "twice": ("participate, has a ticket already", "POST", "{raffle}participate/", 403, ("floor", "raffle")),
}

FLOOR = """
import bottle, hashlib, raffle, server, storage
app = bottle.Bottle()
ticket = '{"raffle_id": "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21", "ticket_number": 2, ' \\
    '"verification_code": "7K3M-9QXD-04TZ-WHE8-5C1N-VRP6"}\\n'
def hashed():
    hashlib.pbkdf2_hmac("sha256", b"7K3M9QXD04TZWHE85C1NVRP6", b"s" * storage.SALT_BYTES, storage.ITERATIONS)
    return ticket
app.route("/ticket/", ["GET", "POST"], lambda: ticket)
app.route("/hash/", ["GET", "POST"], hashed)
listen, threads = raffle.setting("RAFFLE_LISTEN"), raffle.setting("RAFFLE_THREADS")
server.serve(app, server.bind(listen), threads, max_body=2 * raffle.MAX_BODY, on_stop=lambda: None)
"""

WRK = """
local bodies, n = {}, tonumber("%(first)d")
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
    latency:percentile(50), latency:percentile(99), e.status, e.connect + e.read + e.write + e.timeout))
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


def progress(text):
    print(f"... {text}", file=sys.stderr, flush=True)


def show(what, *figures):
    print(f"| {what} | {' | '.join(figures)} |", flush=True)


def connected(server):
    return closing(http.client.HTTPConnection("127.0.0.1", int(server.port), timeout=120))


def one(connection, method, path, status, body="", address=None):
    """Send one request, from an address of its own unless one is given, and return its milliseconds."""
    n = next(addresses)
    address = address or f"11.{n // 65536 % 256}.{n // 256 % 256}.{n % 256}"
    start = time.perf_counter()
    connection.request(method, path, body, {"X-Forwarded-For": address, "Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    assert response.status == status, response.status
    return (time.perf_counter() - start) * 1e3


def median(server, requests, *request):
    """Send a request so many times over one connection, and return the median of its milliseconds."""
    with connected(server) as connection:
        return statistics.median(one(connection, *request) for _ in range(requests))


def percentiles(milliseconds):
    """Return p50 and p99."""
    quantiles = statistics.quantiles(milliseconds, n=100)
    return quantiles[49], quantiles[98]


def load(server, method, path, status, bodies=("",), address=None):
    """Send requests over 64 connections for some seconds; return those per second, and p50 and p99 in milliseconds."""
    # wrk tells refusals from successes, but not one refusal from another.
    median(server, 1, method, path, status, bodies[0], address)
    if shutil.which("wrk"):
        return load_with_wrk(server, method, path, status, bodies, address)
    latencies = []
    end = time.perf_counter() + SECONDS

    def connect(_):
        with connected(server) as connection:
            while time.perf_counter() < end:
                latencies.append(one(connection, method, path, status, random.choice(bodies), address))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(connect, range(CONNECTIONS)))
    return len(latencies) / SECONDS, *percentiles(latencies)


def load_with_wrk(server, method, path, status, bodies, address):
    with tempfile.TemporaryDirectory() as directory:
        lines, script = Path(directory, "bodies"), Path(directory, "script.lua")
        lines.write_text("".join(f"{body}\n" for body in bodies))
        values = {"bodies": lines, "method": method, "address": address or "10.%d.%d.%d"}
        script.write_text(WRK % {"first": next(addresses) * 100_000, **values})
        url = f"http://127.0.0.1:{server.port}{path}"
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", script, url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, duration, p50, p99, refused, failed = map(int, re.search(r"RESULT (.*)", output)[1].split())
    assert not failed, output
    assert refused == (requests if status >= 400 else 0), output
    return requests / duration * 1e6, p50 / 1e3, p99 / 1e3


def measure_rates(start, names):
    """Show the lines of LOADS that are named, and those they are compared to."""
    floor_server, server = start(program=("-c", FLOOR)), start()
    raffle, sold_out, unknown = server.create(2**53 - 1), server.create(1000), f"/raffles/{uuid.uuid4()}/"

    def participate(path, address):
        status, _, ticket = server.request("POST", f"{path}participate/", **{"X-Forwarded-For": address})
        assert status == 201, ticket
        return json.dumps(ticket)

    participate(raffle, HOLDER)
    tickets = [participate(sold_out, f"10.0.{n // 250}.{n % 250}") for n in range(1000)]
    server.request("POST", f"{sold_out}winners/")
    progress("rates at 64 connections")
    wanted = {*names, *(compared for name in names for compared in LOADS[name][-1])}
    rates = {}
    for name, (what, method, path, status, comparisons) in LOADS.items():
        if name in wanted:
            rates[name], p50, p99 = load(
                floor_server if name in ("floor", "hashing-floor") else server,
                method,
                path.format(raffle=raffle, sold_out=sold_out, unknown=unknown),
                status,
                bodies=tickets if name == "verify-ticket" else [""],
                address=HOLDER if name == "twice" else None,
            )
            show(
                f"{what}, 64 connections",
                f"{rates[name]:,.0f}/s",
                f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
                ", ".join(f"{rates[name] / rates[other]:.2f} of {other}" for other in comparisons),
            )


def measure_alone(start):
    server = start()
    alone = median(server, 300, "POST", f"{server.create(2**53 - 1)}participate/", 201)
    show("participate, one connection", f"{1000 / alone:,.0f}/s", f"p50 {alone:.1f} ms", "")
    body = '{"name": "Fair", "prizes": [{"name": "Pen", "amount": 1}], "total_tickets": %d}'
    few, many = (median(server, 50, "POST", "/raffles/", 201, body % total) for total in (10, 2**53 - 1))
    show("create a raffle of 10 tickets, and of 2^53 - 1", f"{few:.1f} ms, {many:.1f} ms", "", f"{many / few:.2f}")


def measure_slow_disk(start, directory):
    if not shutil.which("cc"):
        progress("no C compiler: the slow disk is left out")
        return
    progress("a slow disk")
    source, library = directory / "slow.c", directory / "slow.so"
    source.write_text(SLOW_DISK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    server = start(LD_PRELOAD=str(library))
    participate = ("POST", f"{server.create(2**53 - 1)}participate/", 201)
    alone = median(server, 100, *participate)
    rate, p50, p99 = load(server, *participate)
    show("5 ms more for every fsync, one connection", f"{1000 / alone:,.0f}/s", f"p50 {alone:.1f} ms", "")
    show(
        "5 ms more for every fsync, 64 connections",
        f"{rate:,.0f}/s",
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        f"{rate * alone / 1000:.0f} times as many",
    )


def measure_stalling(start, directory):
    progress("clients that stall")
    sold_out = fill(directory / "raffle.db", 10_000, [{"name": "x" * 20, "amount": 10_000}])
    server = start()
    server.request("POST", f"{sold_out}winners/")
    raffle = server.create(2**53 - 1)
    stalling = Stalling(server, f"{sold_out}winners/", resting=200, dribbling=200, unreading=50)
    with connected(server) as connection:
        p50, p99 = percentiles([one(connection, "POST", f"{raffle}participate/", 201) for _ in range(1000)])
    stalling.stop()
    what = "participate, one connection, while 450 others rest, send slowly or never read"
    show(what, f"{1000 / p50:,.0f}/s", f"p50 {p50:.1f} ms, p99 {p99:.0f} ms", "")


def participant(n):
    """Return the nth address: no two are alike, and they are in no order."""
    return (n * 2654435761 % 2**32).to_bytes(4, "big")


def issue(store, raffle_id, numbers):
    """Issue tickets in 64 threads, those that wait in one commit; return tickets per second, and the last ticket."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        tickets = list(pool.map(lambda n: store.issue_ticket(raffle_id, participant(n)), numbers))
    return len(tickets) / (time.perf_counter() - began), tickets[-1]


def issue_unhashed(store, raffle_id, numbers):
    """Issue tickets in few large commits: more than helpers.fill can, whose participants are one statement's values."""
    for batch in (numbers[first : first + BATCH] for first in range(0, len(numbers), BATCH)):
        requests = [(participant(n), b"s" * storage.SALT_BYTES, 1, b"h" * 32) for n in batch]
        store.database.write(lambda db, *_, r=requests: storage.issue_tickets(db, raffle_id, r)[:1], raffle_id).result()


def memory(server, field):
    """Return a field of the process's memory in MiB: VmRSS (now) or VmHWM (peak)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def wait_regularly(server, method, path, status, due, over):
    """Send a request every INTERVAL until `over`; return the milliseconds of each, counted from when it was due.

    A request that is due while the one before still waits is not forgotten: its
    wait has begun, as that of a participant who comes at this moment.
    """
    waits = []
    with connected(server) as connection:
        while due < time.perf_counter() or not over.is_set():
            time.sleep(max(0, due - time.perf_counter()))
            one(connection, method, path, status)
            waits.append((time.perf_counter() - due) * 1e3)
            due += INTERVAL
    return waits


def measure_draw(server, raffle_id, prizes):
    """Draw the winners, and show what the draw takes and how long others wait meanwhile."""
    progress(f"a draw of {prizes:,} prizes")
    other = server.create(2**53 - 1)
    kinds = {"participate": ("POST", f"{other}participate/", 201), "raffle": ("GET", other, 200)}
    over = threading.Event()
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    with ThreadPoolExecutor(WAITING * len(kinds)) as pool:
        dues = [time.perf_counter() + n * INTERVAL / WAITING for n in range(WAITING)]
        clients = {
            what: [pool.submit(wait_regularly, server, *request, due, over) for due in dues]
            for what, request in kinds.items()
        }
        began = time.perf_counter()
        try:
            status, _, answer = server.request("POST", f"/raffles/{raffle_id}/winners/")
            took = time.perf_counter() - began
        finally:
            over.set()
    assert status == 201, answer
    show(f"draw of {prizes:,} prizes", f"{took:.2f} s", f"peak {memory(server, 'VmHWM'):.0f} MiB", "")
    for what, waiting in clients.items():
        waits = [milliseconds for client in waiting for milliseconds in client.result()]
        # Of fewer than 100 waits, none is the 99th percentile.
        if len(waits) >= 100:
            p50, p99 = percentiles(waits)
            figures = f"p99 {p99:.0f} ms, worst {max(waits):.0f} ms", f"p50 {p50:.0f} ms, {len(waits):,} requests"
            show(f"{what}, while {prizes:,} prizes are drawn", *figures, "")


def measure_pages(server, winners):
    """List all wins, and show whether later pages take longer or more memory than the first."""
    progress("all wins, page by page")
    seconds, resident = [], []
    with connected(server) as connection:

        def get(path):
            began = time.perf_counter()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            seconds.append(time.perf_counter() - began)
            resident.append(memory(server, "VmRSS"))
            return response.headers, None

        for _ in all_pages(get, winners):
            pass
    first, last = statistics.median(seconds[:10]), statistics.median(seconds[-10:])
    show(
        f"list all wins in {len(seconds)} pages",
        f"{sum(seconds):.1f} s",
        # Every thread that serves its first long page keeps some memory: so not from the first on.
        f"memory grows by {resident[-1] - resident[len(resident) // 2]:.0f} MiB in the second half",
        f"last pages {last / first:.2f} of the first",
    )


def measure_tickets(start, database, tickets):
    progress(f"a raffle of {tickets:,} tickets; a million take half a minute")
    # Every ticket of a million wins. Of more, few do: a draw depends on its prizes, not on its tickets.
    prizes = tickets if tickets <= MILLION else 1_000
    store = storage.Storage(database)
    with closing(store.database):
        empty = database.stat().st_size
        large = store.create_raffle("Large", tickets, [{"name": "Pen", "amount": prizes}])["id"]
        first, _ = issue(store, large, range(BATCH))
        issue_unhashed(store, large, range(BATCH, tickets - BATCH))
        last, ticket = issue(store, large, range(tickets - BATCH, tickets))
    rates = f"{last:,.0f}/s, {first:,.0f}/s"
    show(f"the last {BATCH:,} of {tickets:,} tickets, and the first", rates, "", f"{last / first:.2f}")
    show(f"disk for {tickets:,} tickets", f"{(database.stat().st_size - empty) / tickets:.0f} bytes each", "", "")
    store = storage.Storage(database)
    with closing(store.database):
        small = store.create_raffle("Small", 100_000, [{"name": "Pen", "amount": 100_000}])["id"]
        issue_unhashed(store, small, range(100_000))

    server = start(RAFFLE_DATABASE=str(database))
    measure_draw(server, small, 100_000)
    measure_draw(server, large, prizes)
    page = median(server, 10, "GET", f"/raffles/{large}/winners/", 200)
    show(f"a page of {min(prizes, storage.MAX_WINS_PER_PAGE):,} wins", f"{page:.1f} ms", "", "")
    verification = median(server, 100, "POST", f"/raffles/{large}/verify-ticket/", 200, json.dumps(ticket))
    show(f"verify-ticket, one connection, {tickets:,} tickets", f"{verification:.1f} ms", "", "")
    if prizes > storage.MAX_WINS_PER_PAGE:
        measure_pages(server, f"/raffles/{large}/winners/")


def main():
    measures = {
        "rates": lambda start, _: measure_rates(start, [only] if only in LOADS else LOADS),
        "alone": lambda start, _: measure_alone(start),
        "slow-disk": measure_slow_disk,
        "stalling": measure_stalling,
        "tickets": lambda start, directory: measure_tickets(start, directory / "large.db", arguments.tickets),
    }
    parser = argparse.ArgumentParser(description="Measure the service; print one table.")
    parser.add_argument(
        "--only",
        choices=[*measures, *LOADS],
        help=f"run one group ({', '.join(measures)}), or one line of rates and what it is compared to",
    )
    parser.add_argument(
        "--tickets", type=int, default=MILLION, help=f"tickets of the large raffle, {2 * BATCH:,} or more (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.tickets < 2 * BATCH:
        parser.error(f"--tickets: {2 * BATCH:,} or more")
    only = arguments.only
    began = time.perf_counter()
    print("| What | Figure | Also | Ratio |\n|---|---|---|---|")
    for name, measure in measures.items():
        if only in (None, name) or (only in LOADS and name == "rates"):
            with tempfile.TemporaryDirectory() as directory, ExitStack() as servers:

                def start(directory=Path(directory), servers=servers, **options):
                    settings = {"RAFFLE_TRUSTED_PROXY": "127.0.0.1", "MANAGER_IPS": "127.0.0.1,11.0.0.0/8"}
                    server = Server(directory, **settings, **options)
                    servers.callback(server.stop)
                    return server

                measure(start, Path(directory))
    progress(f"{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
