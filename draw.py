r"""The deck and the draw of a raffle, and a program that checks a draw.

It needs Python 3.9 or newer and nothing else.

    python3 draw.py https://host/raffles/<id>/ [--before raffle.json ...]
    python3 draw.py raffle.json winners.json [more.json ...] [--before raffle.json ...]

The first form reads from the server. The second reads answers that you saved after
the draw: of GET /raffles/<id>/, of .../winners/ (all pages, in order) and, if winners
were replaced, of .../replacements/. --before names answers of GET /raffles/<id>/ that
you saved earlier. The best are one from before the close, and one from between the
close and the draw. The program prints what holds, and exits with 0 if everything
does, else with 1.

The recipe "raffle-draw-2", for programs that check a draw by themselves. Like RFC
3797, it fixes the algorithm and all inputs in advance, except for one input that
nobody can predict. Bytes are concatenated without separators. The secret and the
keys are hashed as 32 bytes; JSON shows secret and draw_commitment in hexadecimal.
Integers are unsigned, 8 bytes, big-endian, both when they are hashed and when they
are read from a hash. They need all 64 bits (BigInt in JavaScript). Text is ASCII:
public_randomness has up to 1,000 characters, [!-~]+( [!-~]+)*. id is the raffle's
id, 36 characters in lower case.

    draw_commitment  SHA-256(secret), published when the raffle is created; the
                     secret, 32 random bytes, is published after the draw
    deal key         SHA-256("raffle-deal-2", id, secret)
    round word       the first 8 bytes of SHA-256(deal key, round, right)
    draw key         SHA-256("raffle-draw-2", id, secret, public_randomness)
    draw words       SHA-256(draw key, counter) for counter 0, 1, 2...: each
                     digest gives four words of 8 bytes

1. deck(k) is the number of the k-th ticket that was issued. Let side be the
   smallest even integer whose square is at least total_tickets, and x = k - 1.
2. Let left = x div side and right = x mod side. For round 0 to 23, replace left and
   right by right and (left + (round word mod side)) mod side; without the inner mod,
   the sum can need 65 bits. Let x = left * side + right. If x is not below
   total_tickets, repeat step 2. The number is x + 1.
3. The draw is over the places 1 to issued_tickets. Cell c holds place c at first.
   Set last to issued_tickets.
4. While a prize and a cell are left, take the next draw word. If it is not below
   the largest multiple of last that is at most 2^64, discard it and take the
   next one. The winning cell is the remainder of the word divided by last, plus 1.
5. The place k in that cell wins the next prize: the ticket with the number
   deck(k). Prizes are in the order of prizes, each repeated amount times. Move
   the place in cell last to the winning cell, decrease last by 1, and repeat
   from step 4. If there are fewer tickets than prizes, the last prizes are not won.
6. A replacement takes the prize of a ticket that has won to another ticket: draw on
   as in steps 4 and 5, in the order of .../replacements/. If W prizes were won, the
   k-th replacement of the raffle goes to the place that is drawn as number W + k. It
   is for one who holds a prize then, at first or as a replacement. .../winners/ shows
   who holds each prize now.

Also check that SHA-256(secret) is draw_commitment; that the raffle showed the same
id, total_tickets, prizes, created_at, closes_at, algorithm, randomness_source and
draw_commitment from the start, and the same issued_tickets and closed_at from the
close; that id has 36 characters and secret 32 bytes, because nothing separates them
in the keys; that created_at, closed_at and drawn_at are in this order; and, where
closes_at is given, that closed_at is closes_at, or earlier if all tickets were issued.

Test vectors, all with the id 9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21 and the
secret 00 01 02 ... 1f. Numbers of the tickets at these places:

    10 tickets, places 1 to 10: 8 10 6 5 4 2 1 7 3 9
    1000000 tickets, places 1, 2, 3, last: 979784 861337 889040 295461
    9007198946437697 tickets, places 1, 2, 3, last:
      6375462339659469 5876497713858070 4445202505515289 5920054644549947

Numbers that win:

    10 of 10 issued; 1 Bicycle, 3 Book; "lottery 2026-07-04: 7 13 21 34 42 49": 9 8 7 3
      then the replacements: 1 10 2 4 5 6
    5 of 100 issued; 3 Pen; "round 2166": 75 1 91
      then the replacements: 25 53
    10 of 10 issued; 4 Füße, 2 Buch 📚, 4 Füße; "round 2166": 3 7 9 5 1 6 4 10 8 2
    9002803354665472 of 9007198946437697 issued; 3 Pen; "round 2166":
      4892347116709942 1091195526445200 704771578431834
      then the replacements: 8812633307670638 6361553416936120 5509120465410158
    9002803354665472 of 9007198946437697 issued; 3 Pen; "round 637" (one word is discarded):
      438003207210994 847299426078921 4434974052213969
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import re
import struct
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ALGORITHM = "raffle-draw-2"
MAX_TICKETS = 2**53 - 1  # the largest integer a JavaScript client reads exactly
MAX_RANDOMNESS = 1_000  # characters
# What can be copied from a screen, and written in one way only.
RANDOMNESS_FORM = "[!-~]+( [!-~]+)*"
MADE_BY_SERVER = "made by the server: "  # how such randomness begins
# Fewer rounds of so small a Feistel network can be told from a random order.
ROUNDS = 24

MAX_ANSWER = 16 * 2**20  # bytes
READ_TIMEOUT = 60  # seconds
USER_AGENT = "raffle-draw/2"  # some servers refuse that of Python
PROGRESS_INTERVAL = 2  # seconds
MAX_READS = 3  # of a raffle whose winners are being replaced
MAX_FAULTS = 100  # wins that are not as computed, before it no longer matters why
# What a raffle shows from the start, and what it shows once it is closed.
FROM_START = (
    "id",
    "total_tickets",
    "prizes",
    "created_at",
    "closes_at",
    "algorithm",
    "randomness_source",
    "draw_commitment",
)
FROM_CLOSE = ("issued_tickets", "closed_at")


# The deck and the draw


_pack_round = struct.Struct(">QQ").pack
_read_word = struct.Struct(">Q24x").unpack  # the first of a digest


def derive_deal_key(raffle_id: str, secret: bytes) -> bytes:
    """Return the deal key of a raffle. raffle_id: lower-case UUID, hyphenated. secret: 32 bytes."""
    return hashlib.sha256(b"raffle-deal-2" + raffle_id.encode() + secret).digest()


def number_at(deal_key: bytes, total_tickets: int, place: int) -> int:
    """Return the number of the ticket that is issued as the `place`-th: deck(k), steps 1 and 2.

    total_tickets: 1 to MAX_TICKETS. place: 1 to total_tickets. This is a permutation
    of 1 to total_tickets: a generalized Feistel network with cycle walking (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
    """
    side = math.isqrt(total_tickets - 1) + 1
    # With an odd side, the parity of the permutation would be the same for every key.
    side += side % 2

    x = place - 1
    while True:
        left, right = divmod(x, side)
        for number in range(ROUNDS):
            digest = hashlib.sha256(deal_key + _pack_round(number, right)).digest()
            [word] = _read_word(digest)
            left, right = right, (left + word) % side
        x = left * side + right
        if x < total_tickets:
            return x + 1


def drawn_places(
    raffle_id: str, secret: bytes, public_randomness: str, issued_tickets: int
) -> Iterator[int]:
    """Yield the places of all issued tickets in the order in which they are drawn.

    These are steps 3 to 5. raffle_id, secret: as for `derive_deal_key`. public_randomness:
    text. issued_tickets: 0 to MAX_TICKETS. Memory grows with the places that are taken.
    """
    draw_key = hashlib.sha256(
        ALGORITHM.encode() + raffle_id.encode() + secret + public_randomness.encode()
    ).digest()
    words = _draw_words(draw_key)
    displaced: dict[int, int] = {}
    for last in range(issued_tickets, 0, -1):
        word = next(words)
        while word >= 2**64 - 2**64 % last:
            word = next(words)
        cell = word % last + 1
        yield displaced.get(cell, cell)
        displaced[cell] = displaced.pop(last, last)


def _draw_words(draw_key: bytes) -> Iterator[int]:
    for counter in itertools.count():
        digest = hashlib.sha256(draw_key + counter.to_bytes(8, "big")).digest()
        yield from struct.unpack(">4Q", digest)


def winning_numbers(
    raffle_id: str,
    secret: bytes,
    public_randomness: str,
    total_tickets: int,
    issued_tickets: int,
    amount: int,
    first: int = 1,
) -> Iterator[int]:
    """Yield the numbers of the tickets that are drawn: `amount` of them, from the `first` on.

    Those of the prizes come first, in their order, then those of replacements.
    Arguments as for `drawn_places`. total_tickets: issued_tickets to MAX_TICKETS.
    """
    deal_key = derive_deal_key(raffle_id, secret)
    places = drawn_places(raffle_id, secret, public_randomness, issued_tickets)
    for place in itertools.islice(places, first - 1, first - 1 + amount):
        yield number_at(deal_key, total_tickets, place)


def amount_of_wins(prizes: list[dict[str, Any]], issued_tickets: int) -> int:
    """Return how many wins a draw has: one for each prize, as long as there are tickets."""
    return min(sum(prize["amount"] for prize in prizes), issued_tickets)


# The check


Raffle = dict[str, Any]  # as GET /raffles/<id>/ returns it
Item = dict[str, Any]  # of .../winners/ or .../replacements/
Result = tuple[str, bool]  # a sentence, and whether it holds


def check_draw(
    raffle: Raffle,
    wins: Iterable[Item],
    saved: Sequence[Raffle] = (),
    replacements: Sequence[Item] = (),
) -> list[Result]:
    """Return sentences on a draw, each with whether it holds.

    raffle: as it is after the draw. wins, replacements: all that .../winners/ and
    .../replacements/ list. saved: what /raffles/<id>/ returned before. Raises
    KeyError, TypeError, ValueError if these are incomplete or of another form.
    """
    _require_drawn(raffle)
    _require_all_replacements(raffle, replacements)
    follow = _wins_follow(raffle, wins, replacements)
    commitment = hashlib.sha256(bytes.fromhex(raffle["secret"])).hexdigest()
    times = [raffle["created_at"], raffle["closed_at"], raffle["drawn_at"]]
    results = [
        (f"The draw was made by {ALGORITHM}", raffle["algorithm"] == ALGORITHM),
        ("The secret is the committed one", commitment == raffle["draw_commitment"]),
        ("The wins follow from the secret, the randomness and issued_tickets", follow),
        ("The raffle was created, closed and drawn in this order", times == sorted(times)),
    ]
    if raffle["closes_at"] is not None:
        sentence = "The raffle was closed by its last ticket or at the announced time"
        results.append((sentence, _closed_in_time(raffle)))
    if saved:
        results.insert(0, _agrees(raffle, saved))
    return results


def _closed_in_time(raffle: Raffle) -> bool:
    if raffle["issued_tickets"] == raffle["total_tickets"]:
        return raffle["closed_at"] <= raffle["closes_at"]
    return raffle["closed_at"] == raffle["closes_at"]


def _require_all_replacements(raffle: Raffle, replacements: Sequence[Item]) -> None:
    """Raise ValueError unless the list is of the raffle's number of replacements."""
    number = raffle["replacements"]
    if len(replacements) < number:
        raise ValueError(
            f"only {len(replacements)} of {number} replacements were read: they are at "
            f"/raffles/{raffle['id']}/replacements/, and all pages are needed"
        )
    if len(replacements) > number:
        raise ValueError(
            f"{len(replacements)} replacements were read, but the raffle had {number} when it was: "
            "read the raffle, its winners and its replacements again"
        )


def _wins_follow(raffle: Raffle, wins: Iterable[Item], replacements: Sequence[Item]) -> bool:
    """Return whether the wins are the computed ones, after the replacements.

    Raises ValueError if some are missing, or if wins and replacements were read at
    different times.
    """
    amount = amount_of_wins(raffle["prizes"], raffle["issued_tickets"])
    # Not computed before they are needed: what a server says may be endless.
    numbers = winning_numbers(
        raffle["id"],
        bytes.fromhex(raffle["secret"]),
        raffle["public_randomness"],
        raffle["total_tickets"],
        raffle["issued_tickets"],
        raffle["issued_tickets"],
    )
    names = (prize["name"] for prize in raffle["prizes"] for _ in range(prize["amount"]))
    replaced = _by_replaced_number(replacements)

    listed = 0
    # Of each wrong win: the number that is listed, and those that have held the prize.
    faults: list[tuple[int, list[int]]] = []
    is_hopeless = False
    followed = []
    for win in wins:
        listed += 1
        listed_number, listed_name = _number_and_prize(win)
        if is_hopeless or listed > amount or len(faults) > MAX_FAULTS:
            is_hopeless = True  # nothing more is computed, but what is listed is still read
            continue

        name = next(names)
        holders = _holders(next(numbers), name, replaced)
        followed += holders[1:]
        if listed_name != name:
            is_hopeless = True
        elif listed_number != holders[-1]:
            faults.append((listed_number, holders))
    if listed < amount:
        raise ValueError(f"only {listed} of {amount} wins were read: all pages are needed")
    if is_hopeless:
        return False
    if not faults and not replacements:
        return True

    drawn_next = list(itertools.islice(numbers, len(replacements) + MAX_FAULTS))
    due = drawn_next[: len(replacements)]
    # Each replacement went to the next ticket, and was of one who held the prize.
    if sorted(followed) != sorted(due) or not _are_in_order(replacements, due):
        return False
    if faults and all(number in holders + drawn_next for number, holders in faults):
        raise ValueError(
            "winners and replacements were read at different times: read the raffle, its winners "
            "and its replacements again"
        )
    return not faults


def _by_replaced_number(replacements: Sequence[Item]) -> dict[int, Item]:
    """Return the replacements by the number that was replaced. Raises ValueError."""
    replaced = {}
    for replacement in replacements:
        number = replacement["replaced_ticket_number"]
        _number_and_prize(replacement)
        if type(number) is not int:
            raise ValueError("a replacement is not of the form {..., replaced_ticket_number}")
        replaced[number] = replacement
    return replaced


def _holders(first: int, name: str, replaced: dict[int, Item]) -> list[int]:
    """Return the numbers that have held a prize, from the first one to the present one."""
    holders = [first]
    while holders[-1] in replaced and len(holders) <= len(replaced):
        replacement = replaced[holders[-1]]
        if replacement["prize"] != name:
            break
        holders.append(replacement["ticket_number"])
    return holders


def _are_in_order(replacements: Sequence[Item], due: list[int]) -> bool:
    """Return whether each replacement was of a ticket that was drawn before the new one.

    due: the new ones, in the order of the draw.
    """
    order = {number: n for n, number in enumerate(due)}
    return all(
        order.get(replacement["replaced_ticket_number"], -1) < order[replacement["ticket_number"]]
        for replacement in replacements
    )


def _number_and_prize(win: Item) -> tuple[int, str]:
    number = win["ticket_number"]
    prize = win["prize"]
    # Python takes True and 1.0 for 1.
    if type(number) is not int or not isinstance(prize, str):
        raise ValueError("a win or replacement is not of the form {ticket_number, prize}")
    return number, prize


def _agrees(raffle: Raffle, saved: Sequence[Raffle]) -> Result:
    """Return whether a raffle is what was saved of it earlier, and what is not."""
    different = {name for earlier in saved for name in _differing_members(raffle, earlier)}
    sentence = "The raffle agrees with what you saved of it"
    if different:
        sentence += f" (different: {', '.join(sorted(different))})"
    return sentence, not different


def _differing_members(raffle: Raffle, earlier: Raffle) -> list[str]:
    """Return the members of a raffle, as it was saved earlier, that it cannot have had."""
    members = list(FROM_START)
    if earlier["closed_at"]:
        members += FROM_CLOSE
    if earlier["public_randomness"] is not None:
        members.append("public_randomness")

    different = [name for name in members if earlier[name] != raffle[name]]
    for name in ("issued_tickets", "replacements"):
        if earlier[name] > raffle[name] and name not in different:
            different.append(name)
    return different


def _require_drawn(raffle: Raffle) -> None:
    """Raise KeyError, TypeError or ValueError unless a raffle has the form of a drawn one."""
    if raffle["drawn_at"] is None:
        raise ValueError("the winners of the raffle have not been drawn yet")

    time_form = "[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}Z"
    forms = {
        "id": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "draw_commitment": "[0-9a-f]{64}",
        "secret": "[0-9a-f]{64}",
        "created_at": time_form,
        "closed_at": time_form,
        "drawn_at": time_form,
        "public_randomness": RANDOMNESS_FORM,
    }
    if raffle["closes_at"] is not None:
        forms["closes_at"] = time_form
    for name, form in forms.items():
        if not re.fullmatch(form, raffle[name]):
            raise ValueError(f"{name} is malformed")
    if len(raffle["public_randomness"]) > MAX_RANDOMNESS:
        raise ValueError("public_randomness is too long")

    source = raffle["randomness_source"]
    # What is not printable could be a command to a terminal.
    if source is not None and not (isinstance(source, str) and source.isprintable()):
        raise ValueError("randomness_source is malformed")

    total_tickets = raffle["total_tickets"]
    issued_tickets = raffle["issued_tickets"]
    amounts = [prize["amount"] for prize in raffle["prizes"]]
    if not all(type(number) is int and number >= 1 for number in (total_tickets, *amounts)):
        raise ValueError("total_tickets or prizes are malformed")
    if not sum(amounts) <= total_tickets <= MAX_TICKETS:
        raise ValueError("total_tickets or prizes are out of range")
    if type(issued_tickets) is not int or not 0 <= issued_tickets <= total_tickets:
        raise ValueError("issued_tickets is malformed")
    left = issued_tickets - amount_of_wins(raffle["prizes"], issued_tickets)
    if type(raffle["replacements"]) is not int or not 0 <= raffle["replacements"] <= left:
        raise ValueError("replacements is malformed")


# The program


def main() -> int:
    """Check the draw that the command line names; return the exit status."""
    arguments, address = _parse_arguments()
    # A terminal may not know every character.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")

    try:
        saved = [_load(file, dict) for file in arguments.before]
        if address:
            raffle, results = _check_on_server(address, saved)
        else:
            raffle, results = _check_files(arguments.raffle, arguments.lists, saved)
    except Exception as error:  # there is no end to what a server may send
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        # In ASCII, because it could hold commands to a terminal.
        print(f"NOT CHECKED  {ascii(reason)[1:-1]}")
        return 1

    for sentence, holds in results:
        print(f"{'holds' if holds else 'FAILS'}  {sentence}")
    _print_remarks(raffle, saved)
    return 0 if all(holds for _, holds in results) else 1


def _parse_arguments() -> tuple[argparse.Namespace, re.Match[str] | None]:
    """Return the arguments, and the match of the raffle's address and id if it is an address."""
    parser = argparse.ArgumentParser(description="Check the draw of a raffle.")
    parser.add_argument(
        "raffle", help="address of the raffle, or file with the raffle after the draw"
    )
    parser.add_argument(
        "lists",
        nargs="*",
        metavar="winners",
        help="files with all pages of wins, in order, and of replacements, if there are any",
    )
    parser.add_argument(
        "--before",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files saved before",
    )
    arguments = parser.parse_args()
    address = re.match("(?i)https?://[^?#]*/raffles/([^/?#]+)", arguments.raffle)
    if bool(arguments.lists) == bool(address):
        parser.error(
            "expected an address such as https://host/raffles/<id>/, or files with the raffle "
            "and the wins"
        )
    return arguments, address


def _print_remarks(raffle: Raffle, saved: Sequence[Raffle]) -> None:
    """Print what the program cannot check."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if raffle["drawn_at"] > now:
        print(
            f"The draw is dated {raffle['drawn_at']}, but this computer's clock shows {now}: "
            "one of them is wrong."
        )

    # Once the randomness is decided, the server knows the winners.
    early = [earlier for earlier in saved if earlier["public_randomness"] is None]
    saved_before_close = [earlier for earlier in early if not earlier["closed_at"]]
    saved_after_close = [earlier for earlier in early if earlier["closed_at"]]
    print("This program cannot check:")
    if not saved_before_close:
        print(
            "- that the raffle showed the same tickets, prizes and source before the close, and "
            "this commitment:"
        )
        print(f"  {raffle['draw_commitment']}")
    if raffle["replacements"]:
        print(
            "- the reasons and times of replacements: whom to replace, and in which order, was the "
            "manager's decision"
        )
    if not saved_after_close:
        print(f"- that issued_tickets was {raffle['issued_tickets']} when the raffle was closed")

    randomness = raffle["public_randomness"]
    source = raffle["randomness_source"]
    closed_at = raffle["closed_at"]
    if randomness.startswith(MADE_BY_SERVER):
        print(
            "- that the server did not choose this randomness, because no public randomness was "
            "used:"
        )
    elif source:
        print("- that what was announced fixes chain, member and spelling: only one text may fit")
        print(
            "- that this randomness is the announced one, and was unknown to everyone at "
            f"{closed_at}:"
        )
    else:
        print(
            f"- that nobody chose this randomness, and that it was unknown to everyone at "
            f"{closed_at}:"
        )
    print(f"  {randomness}")
    if source:
        print(f"  announced: {source}")


def _check_files(
    file: str, lists: list[str], saved: Sequence[Raffle]
) -> tuple[Raffle, list[Result]]:
    """Return the raffle in a file, and what holds of it and of lists in other files."""
    raffle = _load(file, dict)
    wins = []
    replacements = []
    for name in lists:
        items = _load(name, list)
        if items and "replaced_ticket_number" in items[0]:
            replacements += items
        else:
            wins += items
    return raffle, check_draw(raffle, _show_progress(wins, len(wins)), saved, replacements)


def _show_progress(wins: Iterable[Item], amount: int) -> Iterator[Item]:
    """Yield the wins; if that takes long, say on a terminal how many of them are checked."""
    is_terminal = sys.stderr.isatty()
    shown_at = time.monotonic()
    is_shown = False
    for checked, win in enumerate(wins):
        if is_terminal and time.monotonic() > shown_at + PROGRESS_INTERVAL:
            print(
                f"\r{checked:,} of {amount:,} wins are checked", end="", file=sys.stderr, flush=True
            )
            shown_at = time.monotonic()
            is_shown = True
        yield win
    if is_shown:
        print(f"\r{amount:,} of {amount:,} wins are checked", file=sys.stderr)


def _check_on_server(
    address: re.Match[str], saved: Sequence[Raffle]
) -> tuple[Raffle, list[Result]]:
    """Return the raffle at an address, and what holds of it and of its lists. Raises ValueError.

    If a winner is replaced meanwhile, all is read again.
    """
    for _ in range(MAX_READS):
        raffle = _fetch_raffle(address)
        _require_drawn(raffle)
        replacements = []
        if raffle["replacements"]:
            url = f"{address[0]}/replacements/"
            replacements = list(_fetch_items(url, raffle["replacements"]))
        amount = amount_of_wins(raffle["prizes"], raffle["issued_tickets"])
        wins = _fetch_items(f"{address[0]}/winners/", amount)

        fault = None
        results = []
        try:
            results = check_draw(raffle, _show_progress(wins, amount), saved, replacements)
        except ValueError as error:
            fault = error
        if _fetch_raffle(address)["replacements"] == raffle["replacements"]:
            if fault:
                raise fault
            return raffle, results
    raise ValueError("winners are being replaced: try again later")


def _fetch_raffle(address: re.Match[str]) -> Raffle:
    """Return the raffle at an address. Raises ValueError."""
    raffle, _ = _fetch(f"{address[0]}/", dict)
    if raffle["id"] != address[1].lower():
        raise ValueError("the address returns another raffle")
    return raffle


def _fetch_items(url: str, amount: int) -> Iterator[Item]:
    """Yield the items of all pages, but read no more pages than there are items, or one."""
    next_url: str | None = url
    for _ in range(max(1, amount)):
        items, next_url = _fetch(next_url or url, list)
        yield from items
        if not next_url:
            return
    raise ValueError(f"there are more pages than items ({amount})")


def _fetch(url: str, expected_type: type) -> tuple[Any, str | None]:
    """Return the JSON at a URL, and the URL of its next page or None. Raises ValueError."""
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    try:
        with urllib.request.urlopen(request, timeout=READ_TIMEOUT) as answer:
            # read() would follow a chunk of negative length to its end.
            buffer = bytearray(MAX_ANSWER + 1)
            text = bytes(buffer[: answer.readinto(buffer)])
            link = answer.headers.get("Link", "")
    except urllib.error.HTTPError as error:
        error.close()
        raise ValueError(
            f"{url} answers {error.code} {error.reason}: what you save with another program can be "
            "checked as files"
        ) from None
    if len(text) > MAX_ANSWER:
        raise ValueError(f"{url} answers with more than {MAX_ANSWER} bytes")

    value = _parse(text, expected_type, url)
    # Only the query: the next page is never on another server.
    match = re.match(r'<[^>?]*(\?[^>]*)>; rel="next"', link)
    if not match:
        return value, None
    return value, url.partition("?")[0] + match[1]


def _load(file: str, expected_type: type) -> Any:
    return _parse(Path(file).read_bytes(), expected_type, file)


def _parse(text: bytes, expected_type: type, source: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} does not hold JSON: {error}") from error
    if not isinstance(value, expected_type):
        expected = "a list" if expected_type is list else "an object"
        raise ValueError(f"{source} does not hold {expected}")
    return value


if __name__ == "__main__":
    sys.exit(main())
