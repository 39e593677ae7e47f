"""Round structures with a wall and a lumen: glands and blood vessels.

Each is a closed curve r(θ) around a jittered site. The field is the depth below the nearest curve,
in µm: negative outside, the wall up to its thickness, the lumen beyond. Depths of neighbours
combine by maximum, so that structures which touch stand back to back.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from pipeline.phantom.cells import Cells
from pipeline.phantom.nodes import NodeGrid
from pipeline.phantom.noise import Sites, jittered_sites, keyed_uniform

PROFILE_STEPS = 256
MAX_SWELL = 1.45
"""No radius exceeds this many times the ring's mean radius."""


@dataclass(frozen=True)
class RingKind:
    """Sizes (µm) and places of one kind of ring; `stream` keeps its randomness apart from the
    others'.
    """

    stream: int
    pitch_um: float
    radius_um: tuple[float, float]
    wobble: float
    presence: float


@dataclass(frozen=True)
class Rings:
    """The rings that may touch a window, with the radius of each at `PROFILE_STEPS` angles."""

    sites: Sites
    profiles: Float[np.ndarray, "n a"]

    def depth_um(self, nodes: NodeGrid) -> Float[np.ndarray, "i j"]:
        """Depth below the nearest curve at every node; −1000 where no ring is near."""
        depth = np.full((nodes.rows, nodes.columns), -1000.0)
        node_y, node_x = (
            axis * nodes.pitch
            for axis in (_span(nodes.top, nodes.rows), _span(nodes.left, nodes.columns))
        )
        for y, x, profile in zip(self.sites.y, self.sites.x, self.profiles, strict=True):
            reach = profile.max() + 12
            rows = slice(*np.searchsorted(node_y, (y - reach, y + reach)))
            columns = slice(*np.searchsorted(node_x, (x - reach, x + reach)))
            dy, dx = node_y[rows, None] - y, node_x[None, columns] - x
            turn = np.arctan2(dy, dx) / (2 * np.pi) % 1 * PROFILE_STEPS
            step = turn.astype(np.int64)
            closed = np.append(profile, profile[:2])
            radius = closed[step] + (turn - step) * (closed[step + 1] - closed[step])
            place = depth[rows, columns]
            np.maximum(place, radius - np.hypot(dy, dx), out=place)
        return depth

    def lining(
        self, stream: int, spacing_um: float, depth_um: tuple[float, float], radial: bool
    ) -> Cells:
        """Cells along every curve, `spacing_um` apart and `depth_um` (from, to) below it.

        They point to the middle where `radial`, along the curve otherwise.
        """
        perimeters = 2 * np.pi * self.profiles.mean(axis=1)
        counts = np.maximum(np.rint(perimeters / spacing_um), 5).astype(np.int64)
        ring: Int[np.ndarray, m] = np.repeat(np.arange(counts.size), counts)
        index = np.arange(ring.size) - np.repeat(np.cumsum(counts) - counts, counts)

        def uniform(attribute: int) -> Float[np.ndarray, "m"]:
            row = self.sites.row[ring] * 4096 + index
            return keyed_uniform(
                self.sites.seed, stream * 64 + attribute, row, self.sites.column[ring]
            )

        turn = (index + 0.8 * (uniform(0) - 0.5)) / counts[ring] % 1
        below = depth_um[0] + (depth_um[1] - depth_um[0]) * uniform(1)
        radius = self.profiles[ring, (turn * PROFILE_STEPS).astype(np.int64)] - below
        theta = 2 * np.pi * turn
        tilt = theta + (0.0 if radial else np.pi / 2) + 0.35 * (uniform(2) - 0.5)
        return Cells(
            self.sites.y[ring] + radius * np.sin(theta),
            self.sites.x[ring] + radius * np.cos(theta),
            tilt,
            uniform(3),
            0.8 + 0.4 * uniform(4),
        )


def _span(first: int, count: int) -> Int[np.ndarray, "n"]:
    return first + np.arange(count)


def rings_near(kind: RingKind, seed: int, box: tuple[float, float, float, float]) -> Rings:
    """Every ring of `kind` that can reach into `box` (y0, x0, y1, x1 in µm); the caller drops
    those that do not belong.
    """
    reach = kind.radius_um[1] * MAX_SWELL + 12
    grown = (box[0] - reach, box[1] - reach, box[2] + reach, box[3] + reach)
    sites = jittered_sites(seed, kind.stream, kind.pitch_um, 0.45, grown)
    sites = sites.where(sites.uniform(0) < kind.presence)
    low, high = kind.radius_um
    mean = low + (high - low) * sites.uniform(1)
    theta = np.arange(PROFILE_STEPS) * (2 * np.pi / PROFILE_STEPS)
    swell = np.ones((sites.y.size, PROFILE_STEPS))
    for harmonic, share in ((2, 1.0), (3, 0.7), (4, 0.4), (5, 0.35), (7, 0.2)):
        amplitude = kind.wobble * share * sites.uniform(2 * harmonic)
        phase = 2 * np.pi * sites.uniform(2 * harmonic + 1)
        swell += amplitude[:, None] * np.cos(harmonic * theta + phase[:, None])
    return Rings(sites, mean[:, None] * np.clip(swell, 0.45, MAX_SWELL))
