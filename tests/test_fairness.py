"""When somebody entered says nothing about their number, nor about whether they win.

In 2011 a state lottery was annulled: nine in ten of those drawn had entered in the first two days.
So many small raffles are dealt, and drawn to their last ticket: who replaces a winner is who comes
next in the draw. Their secrets are fixed, so that nothing fails by chance.
"""

import hashlib
import math
import random
from functools import cache

import pytest

import draw

RAFFLE_ID = "9b2f6a54-6d0c-4b7e-9a35-0c8a3c1f7d21"
TOTAL, ISSUED, WINS = 30, 20, 5  # tickets, those that were issued, and prizes of each raffle
RAFFLES, FEWER = 1200, 400  # the second number is enough to find a skew
HALF = ISSUED // 2

# What is measured is 0 in the mean if the program is right. Each mean over all raffles, divided by
# its standard error, is nearly a normal variable: it is beyond this limit, on either side,
# with a probability of 6.4e-14. There are 103 of them, so that with other secrets a right program
# would fail with a probability of less than 1e-11.
LIMIT = 7.5


def play(n):
    """Return the numbers in the order of entry, and the entrants, from 0, as they are drawn."""
    secret = hashlib.sha256(b"raffle %d" % n).digest()
    key = draw.derive_deal_key(RAFFLE_ID, secret)
    numbers = [draw.number_at(key, TOTAL, place) for place in range(1, ISSUED + 1)]
    drawn = draw.winning_numbers(RAFFLE_ID, secret, f"round {n}", TOTAL, ISSUED, ISSUED)
    return numbers, [numbers.index(number) for number in drawn]


@cache
def played():
    return [play(n) for n in range(RAFFLES)]


def measures(numbers, order):
    """Return what one raffle shows of each skew: values with a mean of 0 if there is none."""
    numbers = centred(numbers, TOTAL)
    ranks = centred([order.index(entrant) + 1 for entrant in range(ISSUED)], ISSUED)
    entries = centred(range(1, ISSUED + 1), ISSUED)
    winners, followers = order[:WINS], order[WINS : 2 * WINS]

    return {
        "early entrants have low numbers": [product(entries, numbers)],
        "an entrant has low or high numbers": numbers,
        "entrants at a distance have like numbers": products_at_distances(numbers, TOTAL),
        "early entrants are drawn early": [product(entries, ranks)],
        "low numbers are drawn early": [product(numbers, ranks)],
        "the first half wins": [sum(entrant < HALF for entrant in winners) - WINS / 2],
        "the first half follows": [sum(entrant < HALF for entrant in followers) - WINS / 2],
        "an entrant wins": excess(winners),
        "an entrant follows": excess(followers),
        "entrants at a distance are drawn together": products_at_distances(ranks, ISSUED),
    }


def centred(values, highest):
    """Return values from 1 to `highest`, less their mean."""
    return [value - (highest + 1) / 2 for value in values]


def product(values, others):
    return sum(value * other for value, other in zip(values, others))


def products_at_distances(values, highest):
    """Return the product of the values with those at each distance behind them, less its mean.

    Two different numbers from 1 to `highest` have a covariance of -(highest + 1) / 12.
    """
    return [
        product(values, values[distance:]) + (ISSUED - distance) * (highest + 1) / 12
        for distance in range(1, ISSUED)
    ]


def excess(chosen):
    """Return for each entrant whether they are among some, less the probability."""
    return [(entrant in chosen) - len(chosen) / ISSUED for entrant in range(ISSUED)]


def errors_of_means(raffles):
    """Return for every skew the largest of its means, in standard errors."""
    rows = [measures(*raffle) for raffle in raffles]
    errors = {}
    for skew in rows[0]:
        columns = list(zip(*(row[skew] for row in rows)))
        errors[skew] = max(map(error_of_mean, columns))
    return errors


def error_of_mean(values):
    mean = sum(values) / len(values)
    variance = sum(value * value for value in values) / len(values) - mean * mean
    return abs(mean) / math.sqrt(max(variance, 1e-9) / len(values))


def skews(raffles):
    """Return the skews that are past what chance does."""
    errors = errors_of_means(raffles)
    return {skew: round(error, 1) for skew, error in errors.items() if error > LIMIT}


def test_the_order_of_entry_says_nothing():
    assert skews(played()) == {}


# Orders that are not fair, each made of a fair one


def first_half_preferred(numbers, order, chance):
    """Draw with weights of 3 for the first half, 2 for the second (Efraimidis, Spirakis 2006)."""
    return sorted(order, key=lambda n: chance.random() ** (2 if n < HALF else 3), reverse=True)


def early_followers(numbers, order, chance):
    """Draw the winners as it should be, and let those who entered first replace them."""
    return order[:WINS] + sorted(order[WINS:])


def last_never_wins(numbers, order, chance):
    """Draw among all entrants but the last."""
    return [n for n in order if n < ISSUED - 1] + [ISSUED - 1]


def neighbours_together(numbers, order, chance):
    """Draw one entrant, and then those who came next."""
    return [(order[0] + step) % ISSUED for step in range(ISSUED)]


def low_numbers_preferred(numbers, order, chance):
    """Draw two tickets for each prize, and take the one with the lower number."""
    pairs = zip(order[::2], order[1::2])
    pairs = [sorted(pair, key=lambda n: numbers[n]) for pair in pairs]
    return [first for first, _ in pairs] + [second for _, second in pairs]


@pytest.mark.parametrize(
    ("unfair", "skew"),
    [
        (first_half_preferred, "the first half wins"),
        (early_followers, "the first half follows"),
        (last_never_wins, "an entrant wins"),
        (neighbours_together, "entrants at a distance are drawn together"),
        (low_numbers_preferred, "low numbers are drawn early"),
    ],
)
def test_a_skew_of_the_draw_is_found(unfair, skew):
    chance = random.Random(2011)
    raffles = [(numbers, unfair(numbers, order, chance)) for numbers, order in played()[:FEWER]]
    assert skew in skews(raffles), errors_of_means(raffles)


@pytest.mark.parametrize(
    ("rounds", "skew"),
    [
        (0, "early entrants have low numbers"),
        (2, "entrants at a distance have like numbers"),
    ],
)
def test_a_deck_that_is_nearly_in_order_is_found(rounds, skew, monkeypatch):
    monkeypatch.setattr(draw, "ROUNDS", rounds)
    raffles = [play(n) for n in range(FEWER)]
    assert skew in skews(raffles), errors_of_means(raffles)
