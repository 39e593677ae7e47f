"""A keyed permutation of 0 ... size - 1 that is never written down.

A Feistel network (Luby and Rackoff, 1988) over the smallest power of two that holds the numbers
scrambles them by rounds, each of which can be undone; a number that lands outside is scrambled on
until it lands inside (cycle walking, Black and Rogaway, 2002), less than once on average. So any
few of 10^9 pixels, in a random order without repeats, cost time and memory for those few.
"""

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8


class Permutation:
    """pi(i) of any indices, for a size and a key of non-negative integers."""

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"a permutation is of 1 to 2^62 numbers, not {size}")
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self.low = np.uint64(bits // 2)
        self.masks = [np.uint64((1 << half) - 1) for half in (bits - bits // 2, bits // 2)]
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Where each index goes."""
        if len(index) and not 0 <= index.min() <= index.max() < self.size:
            raise ValueError(f"indices of a permutation of {self.size} run from 0 to one less")
        values = self._scramble(index.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._scramble(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _scramble(self, values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        halves = [values >> self.low, values & self.masks[1]]
        for number, key in enumerate(self.keys):
            here, other = number % 2, 1 - number % 2
            halves[here] = halves[here] ^ (_mix(halves[other] + key) & self.masks[here])
        return (halves[0] << self.low) | halves[1]


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
