r"""The draw of a raffle, and a program that checks one. It needs Python 3.9 or newer and nothing else.

    python3 draw.py https://host/raffles/<id>/
    python3 draw.py receipt.json winners.json

The first form reads from the server. The second reads saved answers of GET
/raffles/<id>/draw/ and GET /raffles/<id>/winners/ (all pages in one list). The
program prints what holds, and exits with 0 if everything does.

The recipe "raffle-draw-1", for programs that check a draw by themselves. It
follows RFC 3797: the algorithm and the inputs are fixed in advance, except for
one input that nobody can predict. Text is UTF-8. Integers are unsigned and
big-endian. Secrets and hashes are written as lower-case hexadecimal digits.

1. When a raffle is created, the server makes a secret of 32 random bytes. It
   publishes the SHA-256 of the secret as draw_commitment, and the secret itself
   after the draw.
2. The key is the SHA-256 of these bytes, concatenated: the 13 characters
   "raffle-draw-1", the 36 characters of the raffle's id, the 32 bytes of the
   secret, and public_randomness.
3. For counter = 0, 1, 2..., compute SHA-256(key + counter as 8 bytes). Each
   digest gives four words of 8 bytes. Use the words in this order.
4. Cells 1 to total_tickets each hold their own number. Set last to
   total_tickets.
5. Take the next word. If it is not below the largest multiple of last that is
   at most 2^64, discard it and take the next one. The winning cell is the
   remainder of the word divided by last, plus 1.
6. The number in that cell wins the next prize. Prizes are in the order of
   prizes, each repeated amount times. Move the number in cell last to the
   winning cell, and decrease last by 1. Repeat from step 5 until no prize is
   left.
7. wins_sha256 is the SHA-256 of one line per win: the number in decimal, a
   space, the length of the prize's name in bytes in decimal, a space, the name,
   and a line feed.

Test vectors, all with the id 9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21 and the
secret 00 01 02 ... 1f:

    10 tickets; 1 Bicycle, 3 Book; "lottery 2026-07-04: 7 13 21 34 42 49"
      winners: 4, 2, 7, 10
      wins_sha256: 7dc61bb660d533dca6650ac11ce8e63e8044e4010cdc2ed4eb1f8546e764c327
    1099511627776 tickets; 3 Pen; "drand 5000000: é"
      winners: 749861834868, 739518757960, 205935867619
      wins_sha256: 35d55d7b81415549cf7767e1244d43c477aecf4bf3e205de9e1064ee65e32649
    9002803354665472 tickets; 3 Pen; "round 2166" (one word is discarded)
      winners: 8754881462932720, 2225132005341526, 369873194124492
      wins_sha256: 43467741fc4037f17e4685772b880cef8445656da7e016aa8f95b45568aa3ed7
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import struct
import sys
import threading
import time
import urllib.request
from concurrent import futures
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urljoin

ALGORITHM = "raffle-draw-1"
MAX_TICKETS = 2**53 - 1  # the largest integer a JavaScript client reads exactly
MAX_RANDOMNESS = 1_000  # characters

WINS_PER_PAGE = 3_000
# A page of the longest names has 3.6 MiB. Parsed, 4 MiB of empty lists take 90.
MAX_ANSWER = 4 * 2**20  # bytes
MAX_ANSWER_TIME = 60  # seconds


# The draw


def winning_numbers(raffle_id, secret, public_randomness, total_tickets, amount):
    """Yield the winning ticket numbers, in the order of the prizes (steps 2 to 6).

    raffle_id: lower-case UUID with hyphens. secret: 32 bytes. public_randomness:
    text. total_tickets: 1 to MAX_TICKETS. amount: number of prizes, 0 to
    total_tickets.
    """
    key = hashlib.sha256(ALGORITHM.encode() + raffle_id.encode() + secret + public_randomness.encode()).digest()
    words = _words(key)
    displaced = {}
    for last in range(total_tickets, total_tickets - amount, -1):
        cell = uniform(words, last)
        yield displaced.get(cell, cell)
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


def _line(number, name):
    encoded = name.encode()
    return b"%d %d %s\n" % (number, len(encoded), encoded)


# The check


def check_draw(receipt, wins):
    """Return sentences on a draw, each with whether it holds.

    receipt: as GET /raffles/<id>/draw/ returns it. wins: iterable of what GET
    /raffles/<id>/winners/ lists. Raises KeyError, TypeError, ValueError if they
    are not of that form.
    """
    amount = require_receipt(receipt)
    secret = bytes.fromhex(receipt["secret"])
    numbers = winning_numbers(
        receipt["raffle_id"], secret, receipt["public_randomness"], receipt["total_tickets"], amount
    )
    names = prize_of_each_win((prize["name"], prize["amount"]) for prize in receipt["prizes"])
    drawn, follow, digest = zip(numbers, names), True, hashlib.sha256()
    for listed in map(_number_and_prize, wins):
        follow = follow and next(drawn, None) == listed
        digest.update(_line(*listed))
    follow = follow and next(drawn, None) is None
    return [
        (f"The draw was made by {ALGORITHM}", receipt["algorithm"] == ALGORITHM),
        ("The secret is the committed one", hashlib.sha256(secret).hexdigest() == receipt["draw_commitment"]),
        (f"The {amount} wins follow from the secret and the public randomness", follow),
        ("The wins have the digest of the receipt", digest.hexdigest() == receipt["wins_sha256"]),
        ("The last ticket was issued before the draw", receipt["sold_out_at"] <= receipt["drawn_at"]),
    ]


def _number_and_prize(win):
    number, prize = win["ticket_number"], win["prize"]
    # Python takes True and 1.0 for 1.
    if type(number) is not int or not isinstance(prize, str):
        raise ValueError("a win is not of the form {ticket_number, prize}")
    return number, prize


def require_receipt(receipt):
    """Return how many wins a receipt's draw has. Raises KeyError, TypeError, ValueError if it has a wrong form.

    The key of the draw is unambiguous only if id and secret have their fixed lengths.
    """
    time_form = "[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}Z"
    forms = {
        "raffle_id": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "draw_commitment": "[0-9a-f]{64}",
        "secret": "[0-9a-f]{64}",
        "public_randomness": f"(?s).{{1,{MAX_RANDOMNESS}}}",
        "sold_out_at": time_form,
        "drawn_at": time_form,
    }
    for member, form in forms.items():
        if not re.fullmatch(form, receipt[member]):
            raise ValueError(f"the receipt's {member} has a wrong form")
    total_tickets, amounts = receipt["total_tickets"], [prize["amount"] for prize in receipt["prizes"]]
    if not amounts or not all(type(n) is int and 1 <= n <= MAX_TICKETS for n in (total_tickets, *amounts)):
        raise ValueError("the receipt's total_tickets or prizes have a wrong form")
    if sum(amounts) > total_tickets:
        raise ValueError("the receipt has more prizes than tickets")
    return sum(amounts)


def check_server(address, deadline):
    """Return what check_draw returns, and the receipt, for the raffle at an address.

    deadline: of time.monotonic(). Raises what check_draw and fetch raise.
    """
    address = f"{address.rstrip('/')}/"
    receipt, _ = fetch(urljoin(address, "draw/"), deadline)
    amount = require_receipt(receipt)
    raffle, _ = fetch(address, deadline)
    ids = {address.split("/")[-2], raffle["id"], receipt["raffle_id"]}
    same = all(raffle[member] == receipt[member] for member in ("total_tickets", "prizes", "draw_commitment"))
    of_raffle = ("The receipt has the raffle's id, tickets, prizes and commitment", len(ids) == 1 and same)
    wins = _fetch_wins(urljoin(address, f"winners/?limit={WINS_PER_PAGE}"), amount, deadline)
    return [of_raffle, *check_draw(receipt, wins)], receipt


def _fetch_wins(page, amount, deadline):
    # A server that lies must not keep the program busy: no more pages than the prizes fill.
    for _ in range(0, amount, WINS_PER_PAGE):
        wins, page = fetch(page, deadline)
        yield from wins
        if not page or len(wins) < WINS_PER_PAGE:
            return
    yield {"ticket_number": 0, "prize": "of a page too many"}


def fetch(url, deadline):
    """Return the JSON at a URL, and the URL of its next page or None.

    Reads up to MAX_ANSWER bytes, for up to MAX_ANSWER_TIME seconds and until the
    deadline of time.monotonic(). Raises OSError, HTTPException, ValueError, RecursionError.
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
    if len(text) > MAX_ANSWER:
        raise ValueError(f"{url} answers with more than {MAX_ANSWER} bytes")
    return _parse(text), link and urljoin(url, link[1])


def _read(answer, length):
    # Unlike read(length), which reads all that follows a chunk of length -1.
    buffer = bytearray(length)
    return buffer[: answer.readinto(buffer)]


def _parse(text):
    # Python before 3.9.14 takes minutes for an integer of a million digits. Those past 20 do not matter.
    return json.loads(text, parse_int=lambda digits: int(digits[:20]))


# The program


def main():
    """Check the draw that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Check the draw of a raffle.")
    parser.add_argument("source", help="the raffle's address, or a file with its receipt")
    parser.add_argument("winners", nargs="?", help="a file with the list of wins, if source is a file")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to read from the server (default: 600)")
    arguments = parser.parse_args()
    is_address = re.match("https?://", arguments.source)
    if bool(arguments.winners) == bool(is_address):
        parser.error("expected one address that begins with http:// or https://, or two files")
    try:
        if is_address:
            results, receipt = check_server(arguments.source, time.monotonic() + arguments.timeout)
        else:
            receipt, wins = (_parse(Path(file).read_bytes()) for file in (arguments.source, arguments.winners))
            results = check_draw(receipt, wins)
    except Exception as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        # As ASCII, because a server may send control sequences of terminals.
        print(f"NOT CHECKED  {said[:2000]!a}")
        return 1
    for sentence, holds in results:
        print(f"{'holds' if holds else 'FAILS'}  {sentence}")
    print("This program cannot check:")
    print(f"- that the raffle showed this commitment before the draw: {receipt['draw_commitment']}")
    print(f"- that this randomness was announced in advance, and unknown to everyone at {receipt['sold_out_at']}:")
    print(f"  {receipt['public_randomness']!a}")
    return 0 if all(holds for _, holds in results) else 1


if __name__ == "__main__":
    sys.exit(main())
