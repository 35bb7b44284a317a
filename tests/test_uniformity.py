"""The order of the tickets and the winners are uniform: no number, and nobody, is favoured."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import permutations, product

import pytest

from storage import Storage

RAFFLES = 3_000
TICKETS = range(1, 5)
CERTAIN = 1e-6  # how rarely a test may fail by chance


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """Play many raffles of 4 tickets and 2 prizes: the numbers in the order they were asked for, and those that won."""
    with closing(Storage(tmp_path_factory.mktemp("uniformity") / "raffle.db")) as storage:
        patch = pytest.MonkeyPatch()
        patch.setattr("storage.ITERATIONS", 1)

        def play(_):
            prizes = [{"name": "first", "amount": 1}, {"name": "second", "amount": 1}]
            raffle = storage.create_raffle("Fair", len(TICKETS), prizes)["id"]
            numbers = [storage.issue_ticket(raffle, bytes([127, 0, 0, n]))["ticket_number"] for n in TICKETS]
            storage.draw_winners(raffle)
            wins, _ = storage.list_winners(raffle, 2)
            return tuple(numbers), tuple(win["ticket_number"] for win in wins)

        with patch.context(), ThreadPoolExecutor(32) as pool:
            played = list(pool.map(play, range(RAFFLES)))
        patch.undo()
        return played


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
        assert_uniform([0] * (RAFFLES * 44 // 100) + [1] * (RAFFLES * 56 // 100), [0, 1], 1 / 2)


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
