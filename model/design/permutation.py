"""A keyed permutation of the pixels of an image that is never written down.

An index i of [0, n) is a pair (l, r) of [0, a) x [0, b) with a b >= n, both about sqrt(n). Each
round of a Feistel network (Luby & Rackoff 1988, with addition modulo a and b in place of exclusive
or) adds to one half a keyed function of the other: whatever the function, a bijection of the
pairs. An image that falls on [n, a b) is sent through again until it does not ("cycle walking",
Black & Rogaway 2002), which is a bijection of [0, n); a b - n < a, so that few indices ever are.
Last comes a keyed rotation, which alone makes every image of an index equally likely.
"""

import math

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8
LARGEST = 2**62


class Permutation:
    """A permutation of [0, size), of which any part costs time and memory in proportion to that
    part.

    key: non-negative integers.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size <= LARGEST:
            raise ValueError(f"a permutation needs 1 to 2^62 things, not {size}")
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        self._keys = random.integers(2**64, size=ROUNDS, dtype=np.uint64)
        self._turn = int(random.integers(size))

    def at(self, index: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Where the permutation sends each index."""
        out = self._once(index)
        outside = np.flatnonzero(out >= self.size)
        while len(outside):
            out[outside] = self._once(out[outside])
            outside = outside[out[outside] >= self.size]
        out += self._turn
        out[out >= self.size] -= self.size
        return out

    def _once(self, index: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        sides = (np.uint64(self._left), np.uint64(self._right))
        halves = list(np.divmod(index.astype(np.uint64), sides[1]))
        for number, key in enumerate(self._keys):
            one, other = number % 2, 1 - number % 2
            halves[one] += _below(sides[one], _mix(halves[other] ^ key))
            halves[one] -= np.where(halves[one] >= sides[one], sides[one], np.uint64(0))
        return (halves[0] * sides[1] + halves[1]).astype(np.int64)


def _mix(x: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit hangs on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _below(side: np.uint64, bits: UInt64[np.ndarray, " k"]) -> UInt64[np.ndarray, " k"]:
    """A number below `side` <= 2^32 from the upper half of the bits."""
    return np.asarray((bits >> np.uint64(32)) * side >> np.uint64(32))
