r"""The draw of a raffle, and a program that checks one. It needs Python 3.9 or newer and nothing else.

    python3 draw.py https://host/raffles/<id>/
    python3 draw.py receipt.json winners.json [more-winners.json ...] [--tickets tickets.json ...]

The first form reads from the server. The second reads saved answers of GET
/raffles/<id>/draw/, .../winners/ and .../tickets/ (all pages). With either,
--raffle raffle.json compares what you saved of the raffle before the draw. The
program prints what holds, and exits with 0 if everything does.

The recipe "raffle-draw-1", for programs that check a draw by themselves. It
follows RFC 3797: the algorithm and the inputs are fixed in advance, except for
one input that nobody can predict. Text is UTF-8. Integers are unsigned and
big-endian; words need all 64 bits (BigInt in JavaScript). Secrets and hashes are
written as lower-case hexadecimal digits. No text is normalized.

1. When a raffle is created, the server makes a secret of 32 random bytes. It
   publishes the SHA-256 of the secret as draw_commitment, and the secret itself
   after the draw.
2. The key is the SHA-256 of these bytes, concatenated: the 13 characters
   "raffle-draw-1", the 36 characters of the raffle's id in lower case, the 32
   bytes of the secret, and public_randomness as the receipt has it.
3. For counter = 0, 1, 2..., compute the SHA-256 of 40 bytes: the 32 bytes of the
   key, then counter as 8 bytes. Each digest gives four words of 8 bytes. Use the
   words in this order.
4. Cells 1 to issued_tickets hold the numbers of the issued tickets, ascending.
   So in a raffle that sold out, each cell holds its own number. Set last to
   issued_tickets.
5. While a prize and a cell are left, take the next word. If it is not below the
   largest multiple of last that is at most 2^64, discard it and take the next
   one. The winning cell is the remainder of the word divided by last, plus 1.
6. The number in that cell wins the next prize. Prizes are in the order of
   prizes, each repeated amount times. Move the number in cell last to the
   winning cell, and decrease last by 1. Repeat from step 5. The last prizes of a
   raffle with few tickets are not won.
7. wins_sha256 is the SHA-256 of one line per win: the number in decimal, a
   space, the length of the prize's name in bytes in decimal, a space, the name,
   and a line feed.
8. If a raffle was closed before it was sold out, tickets_sha256 is the SHA-256
   of one line per issued ticket, ascending: the number in decimal, and a line
   feed. It is published when the raffle is closed. Otherwise it is null.

Also check that the secret has the SHA-256 draw_commitment; that the raffle showed
the same id, total_tickets, prizes, created_at, randomness_source and
draw_commitment before the draw; that raffle_id and secret have their lengths,
because step 2 concatenates them; that total_tickets is an integer from 1 to
2^53 - 1 and the amounts are integers of 1 or more, at most total_tickets
together; that the issued tickets ascend from 1 to total_tickets; and that
created_at, closed_at and drawn_at (YYYY-MM-DDThh:mm:ssZ) are in this order.

Test vectors, all with the id 9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21 and the
secret 00 01 02 ... 1f:

    10 tickets; 1 Bicycle, 3 Book; "lottery 2026-07-04: 7 13 21 34 42 49"
      winners: 4, 2, 7, 10
      wins_sha256: 7dc61bb660d533dca6650ac11ce8e63e8044e4010cdc2ed4eb1f8546e764c327
    9002803354665472 tickets; 3 Pen; "round 2166" (one word is discarded)
      winners: 8754881462932720, 2225132005341526, 369873194124492
      wins_sha256: 43467741fc4037f17e4685772b880cef8445656da7e016aa8f95b45568aa3ed7
    10 tickets; 4 Füße, 2 Buch 📚, 4 Füße; "round 2166"
      winners: 6, 8, 7, 2, 4, 9, 5, 10, 3, 1
      wins_sha256: 6d10641aef8b09e481e6b1cd21bdc5e92a88830c069f609070dead37a4195b42
    1099511627776 tickets; 3 Pen; "drand 5000000: Å" (U+212B)
      winners: 447160495415, 49267881755, 813110503161
      wins_sha256: 5021251e979d9712c87cb993eb7b9b466dc8abcdab718229f4d86cc7e6271dec
    100 tickets, of which 2, 3, 5, 8, 13 were issued; 3 Pen; "round 2166"
      winners: 2, 8, 13
      wins_sha256: 3fd383aee0bb0f7cfedf04ad82d9851df5dcbb832505284b1e4e53d66562ac07
      tickets_sha256: 6e63630de263d4d328ff7850848e697b303a22d6103bbf701ce61801e7d81524
"""

import argparse
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import struct
import sys
import threading
import time
import urllib.request
from array import array
from concurrent import futures
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin

ALGORITHM = "raffle-draw-1"
MAX_TICKETS = 2**53 - 1  # the largest integer a JavaScript client reads exactly
MAX_RANDOMNESS = 1_000  # characters
MADE_BY_SERVER = "made by the server: "  # how such randomness begins
# What the receipt repeats of the raffle: from the start, and once it is closed.
OF_RAFFLE = ("total_tickets", "prizes", "created_at", "randomness_source", "draw_commitment")
OF_CLOSED_RAFFLE = ("issued_tickets", "closed_at", "tickets_sha256")

CLOCK_TOLERANCE = 300  # seconds
WINS_PER_PAGE = 3_000
TICKETS_PER_PAGE = 10_000
# A page of the longest names has 3.6 MiB. Parsed, 4 MiB of empty lists take 90.
MAX_ANSWER = 4 * 2**20  # bytes
MAX_ANSWER_TIME = 60  # seconds


# The draw


def winning_numbers(raffle_id, secret, public_randomness, tickets, amount):
    """Yield the winning ticket numbers, in the order of the prizes (steps 2 to 6).

    raffle_id: lower-case UUID with hyphens. secret: 32 bytes. public_randomness:
    text. tickets: the issued numbers, ascending, as a sequence such as a range.
    amount: number of prizes.
    """
    key = hashlib.sha256(ALGORITHM.encode() + raffle_id.encode() + secret + public_randomness.encode()).digest()
    words = _words(key)
    displaced = {}
    for last in range(len(tickets), max(0, len(tickets) - amount), -1):
        cell = uniform(words, last)
        yield tickets[displaced.get(cell, cell) - 1]
        displaced[cell] = displaced.pop(last, last)


def uniform(words, last):
    """Return an integer from 1 to `last`, each as likely, from an iterator of uniform 64-bit integers."""
    word = next(words)
    while word >= 2**64 - 2**64 % last:
        word = next(words)
    return word % last + 1


def _words(key):
    for counter in itertools.count():
        yield from struct.unpack(">4Q", hashlib.sha256(key + counter.to_bytes(8, "big")).digest())


def prize_of_each_win(prizes):
    """Yield the prize's name for each win, from (name, amount) pairs."""
    return (name for name, amount in prizes for _ in range(amount))


def digest_of_wins(wins):
    """Return wins_sha256 of (ticket number, prize's name) pairs (step 7)."""
    digest = hashlib.sha256()
    for win in wins:
        digest.update(_line(*win))
    return digest.hexdigest()


def digest_of_tickets(numbers):
    """Return tickets_sha256 of the issued numbers, ascending (step 8)."""
    digest = hashlib.sha256()
    for number in numbers:
        digest.update(b"%d\n" % number)
    return digest.hexdigest()


def _line(number, name):
    encoded = name.encode()
    return b"%d %d %s\n" % (number, len(encoded), encoded)


# The check


def check_draw(receipt, wins, tickets=(), raffles=()):
    """Return sentences on a draw, each with whether it holds.

    receipt: as GET /raffles/<id>/draw/ returns it. wins, tickets: iterables of
    what .../winners/ and .../tickets/ list; tickets are read if the raffle was
    closed before it was sold out. raffles: what /raffles/<id>/ returned at any
    times. Raises KeyError, TypeError, ValueError if these are incomplete or of
    another form.
    """
    receipt = require_receipt(receipt)
    secret, issued, amount = bytes.fromhex(receipt["secret"]), receipt["issued_tickets"], amount_of_wins(receipt)
    results = []
    if raffles:
        differing = sorted({member for raffle in raffles for member in _differing_members(receipt, raffle)})
        different = f" (different: {', '.join(differing)})" if differing else ""
        results.append((f"The receipt agrees with the raffle{different}", not differing))
    results += [
        (f"The draw was made by {ALGORITHM}", receipt["algorithm"] == ALGORITHM),
        ("The secret is the committed one", hashlib.sha256(secret).hexdigest() == receipt["draw_commitment"]),
    ]
    numbers = range(1, issued + 1)
    if issued < receipt["total_tickets"]:
        numbers = array("Q", map(_number, itertools.islice(tickets, issued + 1)))
        _require_whole("tickets", len(numbers), issued)
        ends = [receipt["total_tickets"] + 1]
        ascend = all(map(operator.lt, itertools.chain([0], numbers), itertools.chain(numbers, ends)))
        same = ascend and len(numbers) == issued and digest_of_tickets(numbers) == receipt["tickets_sha256"]
        results.append(("The issued tickets are those of the receipt", same))
    drawn = zip(
        winning_numbers(receipt["raffle_id"], secret, receipt["public_randomness"], numbers, amount),
        prize_of_each_win((prize["name"], prize["amount"]) for prize in receipt["prizes"]),
    )
    count, follow, digest = 0, True, hashlib.sha256()
    for listed in map(_number_and_prize, wins):
        count += 1
        follow = follow and next(drawn, None) == listed
        digest.update(_line(*listed))
    _require_whole("wins", count, amount)
    times = [receipt.get("created_at", ""), receipt["closed_at"], receipt["drawn_at"], _time(CLOCK_TOLERANCE)]
    return [
        *results,
        ("The wins follow from the secret and the public randomness", follow and count == amount),
        ("The wins have the digest of the receipt", digest.hexdigest() == receipt["wins_sha256"]),
        ("The raffle was created, closed and drawn in this order", times == sorted(times)),
    ]


def _differing_members(receipt, raffle):
    """Return the members of a raffle, as it was at any time, that the receipt repeats with another value."""
    members = OF_RAFFLE + (OF_CLOSED_RAFFLE if raffle.get("closed_at") else ())
    # An older receipt has no created_at.
    expected = {"id": receipt["raffle_id"], **{member: receipt[member] for member in members if member in receipt}}
    if raffle.get("tickets_sha256") is None:
        # It is missing while the raffle is being closed.
        expected.pop("tickets_sha256", None)
    return [member for member, value in expected.items() if raffle.get(member) != value]


def _require_whole(what, count, expected):
    if count < expected:
        raise ValueError(f"only {count} of {expected} {what} were read: all pages are needed")


def _number(value):
    if type(value) is not int or not 0 <= value <= MAX_TICKETS:
        raise ValueError("the tickets are not a list of numbers")
    return value


def _number_and_prize(win):
    number, prize = win["ticket_number"], win["prize"]
    # Python takes True and 1.0 for 1.
    if type(number) is not int or not isinstance(prize, str):
        raise ValueError("a win is not of the form {ticket_number, prize}")
    return number, prize


def _time(offset):
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + offset))


def amount_of_wins(receipt):
    """Return how many wins a draw has: one for each prize, as long as there are tickets."""
    return min(sum(prize["amount"] for prize in receipt["prizes"]), receipt["issued_tickets"])


def require_receipt(receipt):
    """Return a receipt, one of an older server in today's form. Raises KeyError, TypeError, ValueError.

    The key of the draw is unambiguous only if id and secret have their fixed lengths.
    """
    time_form = "[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}Z"
    forms = {
        "raffle_id": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "draw_commitment": "[0-9a-f]{64}",
        "secret": "[0-9a-f]{64}",
        "public_randomness": f"(?s).{{1,{MAX_RANDOMNESS}}}",
        "created_at": time_form,
        "closed_at": time_form,
        "drawn_at": time_form,
    }
    if "sold_out_at" in receipt:
        absent = {"randomness_source": None, "tickets_sha256": None}
        receipt = {**absent, **receipt, "closed_at": receipt["sold_out_at"], "issued_tickets": receipt["total_tickets"]}
        del forms["created_at"]
    for member, form in forms.items():
        if not isinstance(receipt[member], str) or not re.fullmatch(form, receipt[member]):
            raise ValueError(f"the receipt's {member} is malformed")
    total, issued = receipt["total_tickets"], receipt["issued_tickets"]
    amounts = [prize["amount"] for prize in receipt["prizes"]]
    if not amounts or not all(type(n) is int and 1 <= n <= MAX_TICKETS for n in (total, *amounts)):
        raise ValueError("the receipt's total_tickets or prizes are malformed")
    if type(issued) is not int or not 0 <= issued <= total:
        raise ValueError("the receipt's issued_tickets is malformed")
    if sum(amounts) > total:
        raise ValueError("the receipt has more prizes than tickets")
    if not isinstance(receipt["randomness_source"], (str, type(None))) or "tickets_sha256" not in receipt:
        raise ValueError("the receipt's randomness_source or tickets_sha256 is malformed")
    return receipt


def check_server(address, raffles, deadline):
    """Return what check_draw returns, and the receipt, for the raffle at an address that ends with its id and a slash.

    raffles: what the address returned before. deadline: of time.monotonic().
    Raises what check_draw and fetch raise.
    """
    receipt, _ = fetch(urljoin(address, "draw/"), deadline)
    receipt = require_receipt(receipt)
    raffle, _ = fetch(address, deadline)
    if raffle["id"] != address.split("/")[-2].lower():
        raise ValueError(f"{address} returns another raffle")
    wins = _fetch_list(urljoin(address, "winners/"), amount_of_wins(receipt), WINS_PER_PAGE, deadline)
    tickets = _fetch_list(urljoin(address, "tickets/"), receipt["issued_tickets"], TICKETS_PER_PAGE, deadline)
    return check_draw(receipt, wins, tickets, [raffle, *raffles]), receipt


def _fetch_list(address, length, limit, deadline):
    page = f"{address}?limit={limit}"
    # A server that lies must not keep the program busy: no more pages than the list fills.
    for _ in range(0, max(1, length), limit):
        items, page = fetch(page, deadline)
        yield from items
        if not page or len(items) < limit:
            return
    raise ValueError(f"{address} has more than {length} items")


def fetch(url, deadline):
    """Return the JSON at a URL, and the URL of its next page or None.

    Reads up to MAX_ANSWER bytes, for up to MAX_ANSWER_TIME seconds and until the
    deadline of time.monotonic(). Raises ValueError.
    """
    outcome = futures.Future()

    def run():
        try:
            outcome.set_result(_fetch(url))
        except Exception as error:  # there is no end to what a server may send
            outcome.set_exception(error)

    # A socket timeout applies to each read, not to the whole answer; a thread can be abandoned.
    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(max(0, min(MAX_ANSWER_TIME, deadline - time.monotonic())))
    except futures.TimeoutError:
        raise ValueError(f"{url} takes too long to answer") from None


@functools.cache  # an HTTPSHandler reads all certificates when it is made
def _opener():
    # urlopen() would follow redirects, and read them to the end.
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener


def _fetch(url):
    try:
        with _opener().open(url, timeout=MAX_ANSWER_TIME) as answer:
            text = _read(answer, MAX_ANSWER + 1)
            link = re.match('<([^>]*)>; rel="next"', answer.headers.get("Link", ""))
    except HTTPError as error:
        with error:
            said = error.headers.get("Location") or _read(error, 1000).decode("utf-8", "replace").strip()
        raise ValueError(f"{url} answers {error.code}: {said}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ValueError(f"{url} cannot be read: {reason}") from None
    if len(text) > MAX_ANSWER:
        raise ValueError(f"{url} answers with more than {MAX_ANSWER} bytes")
    return _parse(text, url), link and urljoin(url, link[1])


def _read(answer, length):
    # Unlike read(length), which reads all that follows a chunk of length -1.
    buffer = bytearray(length)
    return buffer[: answer.readinto(buffer)]


def _parse(text, source):
    try:
        # Python before 3.9.14 takes minutes for an integer of a million digits. Those past 20 do not matter.
        return json.loads(text, parse_int=lambda digits: int(digits[:20]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} does not hold JSON: {error}") from None


# The program


def main():
    """Check the draw that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check the draw of a raffle.",
        usage="draw.py source [winners ...] [--tickets FILE ...] [--raffle FILE ...] [--json] [--timeout SECONDS]",
    )
    parser.add_argument("source", help="address of the raffle, or file with its receipt")
    parser.add_argument("wins", nargs="*", metavar="winners", help="files with all pages of wins, in order")
    parser.add_argument("--tickets", nargs="+", default=[], help="files with all pages of tickets, in order")
    parser.add_argument("--raffle", nargs="+", default=[], help="files with the raffle as saved before the draw")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to read from the server (default: 600)")
    arguments = parser.parse_args()
    address = re.match("(?i)https?://[^?#]*/raffles/[^/?#]+", arguments.source)
    is_file = "://" not in arguments.source
    if not arguments.timeout > 0:
        parser.error("--timeout must be more than 0")
    if bool(arguments.wins) != is_file or (arguments.tickets and not is_file) or not (is_file or address):
        parser.error("expected an address such as https://host/raffles/<id>/, or files with the receipt and the wins")
    # A terminal may not know every character.
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        raffles = [_load(file, dict) for file in arguments.raffle]
        if address:
            results, receipt = check_server(f"{address[0]}/", raffles, time.monotonic() + arguments.timeout)
        else:
            receipt = require_receipt(_load(arguments.source, dict))
            wins, tickets = (
                itertools.chain.from_iterable(_load(file, list) for file in files)
                for files in (arguments.wins, arguments.tickets)
            )
            results = check_draw(receipt, wins, tickets, raffles)
    except Exception as error:
        explained = {KeyError: "{} is missing", TypeError: "unexpected data: {}"}
        said = _printable(explained.get(type(error), "{}").format(error))[:2000]
        print(json.dumps({"holds": None, "error": said}) if arguments.json else f"NOT CHECKED  {said}")
        return 1
    holds = all(held for _, held in results)
    if arguments.json:
        sentences = [{"sentence": sentence, "holds": held} for sentence, held in results]
        print(json.dumps({"holds": holds, "sentences": sentences, "receipt": receipt}))
    else:
        _print_results(results, receipt, any(raffle.get("winners_drawn") is False for raffle in raffles))
    return 0 if holds else 1


def _print_results(results, receipt, saved_before):
    randomness, source = receipt["public_randomness"], receipt.get("randomness_source")
    for sentence, held in results:
        print(f"{'holds' if held else 'FAILS'}  {sentence}")
    print("This program cannot check:")
    if receipt["tickets_sha256"]:
        print(f"- that this tickets_sha256 was shown before the randomness was known: {receipt['tickets_sha256']}")
    if not saved_before:
        print("- that the raffle showed the same tickets, prizes and source before the draw, and this commitment:")
        print(f"  {receipt['draw_commitment']}")
    if randomness.startswith(MADE_BY_SERVER):
        print("- that the server did not choose this randomness, because no public randomness was used:")
    elif source:
        print(f"- that this randomness is the announced one, and was unknown to everyone at {receipt['closed_at']}:")
    else:
        print(
            f"- that this randomness was not chosen by the server, and was unknown to everyone at {receipt['closed_at']}:"
        )
    print(f"  {_printable(randomness)}")
    # What looks the same may be another text, and another draw.
    if ascii(randomness)[1:-1] != randomness.strip():
        print(f"  exactly: {randomness!a}")
    if source:
        print(f"  announced: {_printable(source)}")


def _load(file, kind):
    value = _parse(Path(file).read_bytes(), file)
    if not isinstance(value, kind):
        raise ValueError(f"{file} does not hold {'a list' if kind is list else 'an object'}")
    return value


def _printable(text):
    # A server may send control sequences of terminals.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


if __name__ == "__main__":
    try:
        code = main()
        print(end="", flush=True)
    except OSError:  # the reader of a pipe has left, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)
