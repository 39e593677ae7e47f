"""What tissue lies where: the outline of a section and the compartments inside it.

A compartment map is a soft Voronoi diagram of a few sites whose boundaries are bent by noise, so
that a window of a millimetre or two shows one or two compartments and two windows differ in colour
and in layout. Sites take their compartment from a Latin arrangement, so that neighbours rarely
agree and no compartment is missing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pipeline.phantom.noise import SmoothNoise, jittered_sites, keyed_number

GLANDULAR, TUMOUR, STROMA, LYMPHOID, ADIPOSE = range(5)
NUM_COMPARTMENTS = 5
ARRANGEMENT = (GLANDULAR, STROMA, TUMOUR, ADIPOSE, GLANDULAR, LYMPHOID, TUMOUR)
BOUNDARY_UM = 14.0
"""Scale over which one compartment gives way to the next."""


@dataclass(frozen=True)
class Architecture:
    """Outline and compartments of a section on a slide of `height_um` × `width_um`."""

    height_um: float
    width_um: float
    seed: int

    @property
    def pitch_um(self) -> float:
        """Distance between compartments: a quarter of the slide, at least 250 µm and at most 1300
        µm.
        """
        return float(np.clip(min(self.height_um, self.width_um) / 3.6, 250, 1300))

    def depth_um(
        self, y: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """Roughly the distance to the section's edge: positive in tissue, negative on glass."""
        shift_y, shift_x = (0.16 * (keyed_number(self.seed, 1, axis) - 0.5) for axis in (0, 1))
        side = min(self.height_um, self.width_um)
        from_middle_y = np.abs(y / self.height_um - 0.5 - shift_y) / 0.46
        from_middle_x = np.abs(x / self.width_um - 0.5 - shift_x) / 0.46
        reach = np.sqrt(np.sqrt(from_middle_y**4 + from_middle_x**4))
        ragged = (
            0.045 * side * SmoothNoise(self.seed, 2, side / 4).at(y, x)
            + 0.012 * side * SmoothNoise(self.seed, 3, side / 16).at(y, x)
            + 5.0 * SmoothNoise(self.seed, 4, 40.0).at(y, x)
            + 1.5 * SmoothNoise(self.seed, 5, 9.0).at(y, x)
        )
        return (1 - reach) * 0.46 * side + ragged

    def shares(
        self, y: Float[np.ndarray, "*shape"], x: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "k *shape"]:
        """The share of each compartment at positions in µm; shares sum to one."""
        pitch = self.pitch_um
        bent = []
        for stream, position in ((10, y), (13, x)):
            bent.append(
                position
                + 0.16 * pitch * SmoothNoise(self.seed, stream, 0.5 * pitch).at(y, x)
                + 0.03 * pitch * SmoothNoise(self.seed, stream + 1, 0.11 * pitch).at(y, x)
                + 7.0 * SmoothNoise(self.seed, stream + 2, 25.0).at(y, x)
            )
        reach = pitch * 1.5
        box = (y.min() - reach, x.min() - reach, y.max() + reach, x.max() + reach)
        sites = jittered_sites(self.seed, 16, pitch, 0.5, box)
        offset = int(keyed_number(self.seed, 17) * len(ARRANGEMENT))
        order = (2 * sites.column + 3 * sites.row + offset) % len(ARRANGEMENT)
        distances = np.full((NUM_COMPARTMENTS, *np.shape(y)), np.inf)
        for site_y, site_x, place in zip(sites.y, sites.x, order, strict=True):
            distance = np.sqrt((bent[0] - site_y) ** 2 + (bent[1] - site_x) ** 2)
            compartment = ARRANGEMENT[place]
            np.minimum(distances[compartment], distance, out=distances[compartment])
        nearest = distances.min(axis=0)
        shares = np.exp(-(distances - nearest) / BOUNDARY_UM)
        return shares / shares.sum(axis=0)
