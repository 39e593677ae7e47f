"""Nuclei and other small things, drawn once as sprites and stamped where they belong.

A nucleus is an ellipse with a wobbly rim, a membrane, clumps of chromatin and perhaps nucleoli;
its value is haematoxylin's concentration. A bank holds many of them per kind, turned to a set of
angles. Stamps combine by maximum, which does not depend on the order: a window and the whole
agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Int

from pipeline.phantom.noise import smoothstep

NUM_ANGLES = 16
REACH_UM = 12.0
"""No sprite extends farther from its centre."""


@dataclass(frozen=True)
class CellKind:
    """How one kind of nucleus looks: semi-axes in µm, stain in natural optical density."""

    length_um: tuple[float, float]
    aspect: tuple[float, float]
    body: tuple[float, float]
    membrane: float
    clumping: float
    nucleoli: int
    wobble: float
    variants: int = 10


EPITHELIAL = CellKind((3.6, 4.8), (1.25, 1.7), (0.75, 1.15), 0.35, 0.35, 1, 0.03)
TUMOUR_CELL = CellKind((4.0, 6.6), (1.05, 1.5), (0.65, 1.35), 0.50, 0.50, 2, 0.045, variants=16)
FIBROBLAST = CellKind((4.2, 8.6), (3.0, 5.6), (1.00, 1.50), 0.20, 0.30, 0, 0.06)
LYMPHOCYTE = CellKind((2.7, 3.4), (1.00, 1.15), (1.45, 2.00), 0.20, 0.30, 0, 0.03)
ERYTHROCYTE = CellKind((2.9, 3.5), (1.00, 1.35), (0.80, 1.05), 0.15, 0.05, 0, 0.03)

Sprites = list[list[Float32[np.ndarray, "s s"]]]


def draw_sprites(kind: CellKind, mpp: float, seed: int) -> Sprites:
    """`kind.variants` cells at `NUM_ANGLES` angles over half a turn: `sprites[variant][angle]`,
    odd sides.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, int(kind.length_um[0] * 1000)]))
    half = int(np.ceil(kind.length_um[1] * (1 + 3 * kind.wobble) / mpp)) + 1
    axis_um = np.arange(-half, half + 1) * mpp
    sprites: Sprites = []
    for _ in range(kind.variants):
        length = random.uniform(*kind.length_um)
        aspect = random.uniform(*kind.aspect)
        body = random.uniform(*kind.body)
        shift = random.uniform(-0.5, 0.5, 2) * mpp
        wobble = kind.wobble * random.standard_normal(3)
        phase = random.uniform(0, 2 * np.pi, 3)
        waves = random.standard_normal((12, 2)) * 2.2
        waves_phase = random.uniform(0, 2 * np.pi, 12)
        spots = random.uniform(-0.45, 0.45, (kind.nucleoli, 2))
        turned = []
        for angle in np.arange(NUM_ANGLES) * np.pi / NUM_ANGLES:
            y, x = np.meshgrid(axis_um - shift[0], axis_um - shift[1], indexing="ij")
            along = (x * np.cos(angle) + y * np.sin(angle)) / length
            across = (y * np.cos(angle) - x * np.sin(angle)) / (length / aspect)
            theta = np.arctan2(across, along)
            rim = 1 + sum(
                w * np.cos((k + 2) * theta + p)
                for k, (w, p) in enumerate(zip(wobble, phase, strict=True))
            )
            radius = np.hypot(along, across) / rim
            inside_um = (1 - radius) * length / np.sqrt(aspect)
            chromatin = sum(
                np.cos(wy * across * 1.6 + wx * along * 2.0 + p)
                for (wy, wx), p in zip(waves, waves_phase, strict=True)
            ) / np.sqrt(6)
            value = body * (1 + kind.clumping * chromatin * 0.55)
            value += kind.membrane * np.exp(-(((inside_um - 0.45) / 0.5) ** 2))
            for spot_y, spot_x in spots:
                distance_um = np.hypot(across - spot_y, along - spot_x) * length / np.sqrt(aspect)
                value += 0.6 * np.exp(-((distance_um / 0.8) ** 2))
            edge = smoothstep(inside_um, -0.35 - 0.3 * mpp, 0.35 + 0.3 * mpp)
            turned.append((np.maximum(value, 0.1 * body) * edge).astype(np.float32))
        sprites.append(turned)
    return sprites


@dataclass(frozen=True)
class SpriteBank:
    """Every kind's sprites at one pixel size."""

    sprites: Mapping[CellKind, Sprites]
    mpp: float

    @classmethod
    def drawn(cls, mpp: float, seed: int) -> "SpriteBank":
        """Sprites of all kinds at `mpp` µm a pixel."""
        kinds = (EPITHELIAL, TUMOUR_CELL, FIBROBLAST, LYMPHOCYTE, ERYTHROCYTE)
        return cls({kind: draw_sprites(kind, mpp, seed) for kind in kinds}, mpp)

    def stamp(
        self,
        canvas: Float32[np.ndarray, "h w"],
        origin_px: tuple[int, int],
        kind: CellKind,
        cells: "Cells",
    ) -> None:
        """Stamp `cells` on `canvas`, whose first pixel is `origin_px` on the slide; those that
        reach beyond it are left out.

        The canvas must therefore extend twice `REACH_UM` beyond the window that is kept.
        """
        bank = self.sprites[kind]
        rows = np.floor(cells.y / self.mpp).astype(np.int64) - origin_px[0]
        columns = np.floor(cells.x / self.mpp).astype(np.int64) - origin_px[1]
        variants = (cells.variant * kind.variants).astype(np.int64)
        angles = np.rint(cells.angle * NUM_ANGLES / np.pi).astype(np.int64) % NUM_ANGLES
        half = bank[0][0].shape[0] // 2
        height, width = canvas.shape
        fits = (
            (rows >= half) & (rows < height - half) & (columns >= half) & (columns < width - half)
        )
        strengths = cells.strength.astype(np.float32)
        chosen: Int[np.ndarray, m] = np.flatnonzero(fits)
        for row, column, variant, angle, strength in zip(
            rows[chosen].tolist(),
            columns[chosen].tolist(),
            variants[chosen].tolist(),
            angles[chosen].tolist(),
            strengths[chosen],
            strict=True,
        ):
            place = canvas[row - half : row + half + 1, column - half : column + half + 1]
            np.maximum(place, strength * bank[variant][angle], out=place)


@dataclass(frozen=True)
class Cells:
    """Where cells of one kind lie (µm), how they are turned (radians), and how dark they are (1 is
    usual).
    """

    y: Float[np.ndarray, "n"]
    x: Float[np.ndarray, "n"]
    angle: Float[np.ndarray, "n"]
    variant: Float[np.ndarray, "n"]
    strength: Float[np.ndarray, "n"]

    def where(self, chosen: np.ndarray) -> "Cells":
        """The cells that `chosen` (booleans) selects."""
        fields = (self.y, self.x, self.angle, self.variant, self.strength)
        return Cells(*(field[chosen] for field in fields))

    def turned(self, angle: Float[np.ndarray, "n"]) -> "Cells":
        """The same cells at other angles."""
        return replace(self, angle=angle)
