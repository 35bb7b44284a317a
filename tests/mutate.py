"""Applies the deliberate faults of faults.txt, each to a copy of its own, and says which of them the tests find.

    python tests/mutate.py [--only TEXT]

Exits with 1 if a fault survives: then a rule has no test that fails without it.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).with_name("faults.txt")
AT_ONCE = 2
FIRST_LIMIT = 600  # seconds for the tests without a fault
# They take longest, so they come last, in this order.
SLOW = ["settings", "error_shape", "read_raffles", "bad_input", "nginx", "uniformity", "fuzz", "addresses", "server"]
SLOW += ["cross_site", "draw", "backup", "durability", "worn_down"]


class Fault(NamedTuple):
    file: str
    rule: str  # that the fault breaks
    text: str
    replacement: str


def read_faults():
    """Return the faults of the list. Ends the program unless the text of each is found exactly once in its file."""
    _, *blocks = re.split("^-{4,}\n", FAULTS.read_text(encoding="utf-8"), flags=re.M)
    faults = []
    for block in blocks:
        parts = re.fullmatch("([^\n:]+): ([^\n]+)\n(.+)\n->\n(.*)\n", block, re.S)
        if not parts:
            sys.exit(f"not a fault:\n{block}")
        fault = Fault(*parts.groups())
        found = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.text)
        if found != 1:
            sys.exit(f"{fault.file}: {fault.rule}: the text is found {found} times:\n{fault.text}")
        faults.append(fault)
    return faults


def copy_tree(target):
    """Copy what git tracks, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())


def outcome(fault, limit):
    """Return the result for a fault, or for none: "survived", "timed out", or which test found it."""
    with tempfile.TemporaryDirectory() as directory:
        tree, output = Path(directory) / "tree", Path(directory) / "output"
        copy_tree(tree)
        if fault:
            file = tree / fault.file
            file.write_text(file.read_text(encoding="utf-8").replace(fault.text, fault.replacement), encoding="utf-8")
        status = run_tests(tree, output, limit)
        found = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", output.read_text(errors="replace"), re.M)
    if status is None:
        return "timed out"
    if status == 0:
        return "survived"
    return f"found by {found[1]}" if found else f"found, with exit status {status}"


def order(name):
    """Return the place of a test file in the order of the time that they take."""
    subject = name.removeprefix("test_")
    return SLOW.index(subject) if subject in SLOW else -1


def run_tests(tree, output, limit):
    """Run the tests of a tree to the first that fails; return the exit status, or None after `limit` seconds."""
    files = sorted((tree / "tests").glob("test_*.py"), key=lambda path: (order(path.stem), path))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *map(str, files)]
    # Not a pipe, which a server that outlives its test would keep open.
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=tree, stdout=file, stderr=file, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Whatever the tests have left, too.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main():
    """Return the exit status."""
    parser = argparse.ArgumentParser(description="Apply deliberate faults, and see whether the tests find them.")
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose file, rule or text contains TEXT")
    only = parser.parse_args().only
    faults = [fault for fault in read_faults() if any(only in member for member in fault)]
    if not faults:
        parser.error(f"no fault contains {only!r}")
    began = time.monotonic()
    # If the tests fail without a fault, they would find everything.
    said = outcome(None, FIRST_LIMIT)
    if said != "survived":
        sys.exit(f"without a fault: {said}")
    limit = 4 * (time.monotonic() - began)
    results = Counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(outcome, fault, limit): fault for fault in faults}
        try:
            for future in as_completed(running):
                fault, said = running[future], future.result()
                results[said.partition(" by ")[0]] += 1
                print(f"{said.replace('survived', 'SURVIVED')}  {fault.file}: {fault.rule}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{len(faults)} faults: {', '.join(f'{count} {said}' for said, count in results.items())}")
    return 1 if results["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
