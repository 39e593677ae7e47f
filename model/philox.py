"""Philox-4x32-10 (Salmon et al., SC 2011): randomness as a pure function of counter and key.

Integers are held in int64, so that CPU and GPU agree bit for bit; the normals made of them agree
to rounding.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(
    counter: tuple[Int64[Tensor, "..."], ...], key: tuple[Int64[Tensor, "..."], ...]
) -> tuple[Int64[Tensor, "..."], ...]:
    """Philox-4x32-10: four 32-bit words (held in int64) from a counter of four and a key of two
    words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The low 64 bits of a product are right although int64 wraps; sign bits are masked.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & MASK) ^ c1 ^ k0,
            second & MASK,
            ((first >> 32) & MASK) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def normals(words: tuple[Int64[Tensor, "..."], ...]) -> Float[Tensor, "*shape 4"]:
    """Four standard normals (float64) from four 32-bit words, by Box and Muller."""
    u = [(word.double() + 0.5) * 2.0**-32 for word in words]
    out = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r, phi = torch.sqrt(-2.0 * torch.log(radius)), 2.0 * math.pi * angle
        out += [r * torch.cos(phi), r * torch.sin(phi)]
    return torch.stack(out, dim=-1)
