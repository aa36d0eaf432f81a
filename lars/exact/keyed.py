"""Counter-based random numbers: a pure function of integer keys, the same on every machine.

A worker, a rank or a device never owns a random state here, so none can leak its number into the run. The mixer is
SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014). It is spelled out, not taken from `numpy.random`, because
numpy may change the streams of its generators between releases (NEP 19), and a recipe must not change with them.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class Purpose(IntEnum):
    """What a random key is for. Frozen: another value moves its purpose's draws; a new purpose takes a new number."""

    ROW_GROUPS = 1  # their order in an epoch
    WINDOW = 2  # the samples inside of one
    AUGMENT = 3
    DROPOUT = 4  # and stochastic depth
    TURN = 5  # of an epoch's line of row groups
    MIX = 6


class MixDraw(IntEnum):
    """Where a group's random numbers for mixup and cutmix stand. Frozen, as those of `lars.data.augment.Draw`."""

    CUT = 0  # cutmix, or mixup
    CENTRE_DOWN = 1  # of the box that is cut
    CENTRE_ACROSS = 2
    SHARE = 3  # two for each of 64 tries


def mix64(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys (scalars or arrays that broadcast, taken mod 2^64) into uint64; the order of keys matters."""
    state: np.ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is mod 2^64 on purpose
        for key in keys:
            mixed = np.uint64(key % 2**64) if isinstance(key, int) else np.asarray(key).astype(np.uint64)
            state = (state ^ mixed) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _FIRST
            state = (state ^ (state >> np.uint64(27))) * _SECOND
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(count: int, *keys: int | np.ndarray) -> np.ndarray:
    """`count` float64 numbers in [0, 1), a pure function of the keys; with keys of shape (n, 1) a row for each."""
    return (mix64(*keys, np.arange(count)) >> np.uint64(11)) * 2.0**-53


def permutation(count: int, *keys: int) -> np.ndarray:
    """A permutation of 0 ... count - 1 (int64), a pure function of the keys."""
    return np.argsort(mix64(*keys, np.arange(count)), kind="stable")
