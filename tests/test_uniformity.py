"""The order of the tickets and the winners are uniform: no number, and nobody, is favoured."""

import math
import sqlite3
from collections import Counter
from contextlib import closing
from functools import partial
from itertools import permutations, product

import pytest

import storage

RAFFLES = 2_000
TICKETS = range(1, 5)
CERTAIN = 1e-6  # how rarely a test may fail by chance


class Unsynchronised(sqlite3.Connection):
    """Chance is tested here, not the disk."""

    def execute(self, sql, *values):
        return super().execute(sql.replace("synchronous = FULL", "synchronous = OFF"), *values)


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """Play many raffles of 4 tickets and 2 prizes: the numbers in the order they were asked for, and those that won.

    In every other raffle the participants ask together, in one batch.
    """
    prizes = [{"name": "first", "amount": 1}, {"name": "second", "amount": 1}]
    asking = [(bytes([127, 0, 0, n]), b"", 1, b"") for n in TICKETS]

    def issue(db, raffle_id, requests):
        [together] = requests
        batches = [asking] if together else [[request] for request in asking]
        return [[number for batch in batches for number in storage.issue_tickets(db, raffle_id, batch)]]

    def play(store, n):
        raffle_id = store.create_raffle("Fair", len(TICKETS), prizes)["id"]
        given = store.database.write(issue, raffle_id, n % 2).result()
        wins, _ = store.draw_winners(raffle_id)
        return tuple(given), tuple(win["ticket_number"] for win in wins)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Unsynchronised))
        store = storage.Storage(tmp_path_factory.mktemp("uniformity") / "raffle.db")
    with closing(store.database):
        return [play(store, n) for n in range(RAFFLES)]


def chance(count, p):
    """Bound the probability of a count at least as far from the mean: Chernoff's bound, true for every n."""
    q = count / RAFFLES
    divergence = sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a)
    return 2 * math.exp(-RAFFLES * divergence)


def assert_uniform(outcomes, possible, p):
    counts = Counter(outcomes)
    possible = list(possible)
    assert set(counts) <= set(possible)
    for outcome in possible:
        assert chance(counts[outcome], p) > CERTAIN / len(possible), (outcome, counts)


def test_the_bound_refuses_what_is_not_uniform():
    with pytest.raises(AssertionError):
        assert_uniform([0] * (RAFFLES * 43 // 100) + [1] * (RAFFLES * 57 // 100), [0, 1], 1 / 2)


def test_every_order_of_the_numbers_is_as_likely(plays):
    assert_uniform((numbers for numbers, _ in plays), permutations(TICKETS), 1 / 24)


def test_every_number_comes_as_likely_at_every_position(plays):
    positions = (item for numbers, _ in plays for item in enumerate(numbers, 1))
    assert_uniform(positions, product(TICKETS, TICKETS), 1 / 4)


def test_every_pair_of_numbers_wins_as_likely(plays):
    assert_uniform((won for _, won in plays), permutations(TICKETS, 2), 1 / 12)


def test_whoever_asks_first_or_last_wins_as_likely(plays):
    orders = (numbers.index(number) for numbers, won in plays for number in won)
    assert_uniform(orders, range(4), 2 / 4)
    assert_uniform((numbers.index(won[0]) for numbers, won in plays), range(4), 1 / 4)
