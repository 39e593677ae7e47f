"""Everything of a slide that is no nucleus: fibres, cytoplasm, gland walls, vessel walls and fat.

`Fields` is what the nodes of a window know; `Matrix` turns it into concentrations of haematoxylin
and eosin at its pixels. Concentrations are natural optical densities, so 0.4 of eosin is the usual
pink of collagen.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from pipeline.phantom.architecture import ADIPOSE, GLANDULAR, LYMPHOID
from pipeline.phantom.nodes import NodeGrid
from pipeline.phantom.noise import Sites, Texture, jittered_sites, smoothstep

EPITHELIUM_UM = 17.0
VESSEL_WALL_UM = 4.0
FAT_CELL_UM, FAT_JITTER, FAT_STREAM = 62.0, 0.6, 50


@dataclass(frozen=True)
class Textures:
    """Periodic tables read at the pixels: collagen, and the grain of cytoplasm and camera."""

    fibres: Texture
    grain: Texture


@dataclass(frozen=True)
class Fields:
    """What the nodes of a window know: depths in µm, shares and gains without unit."""

    depth: Float[np.ndarray, "i j"]
    shares: Float[np.ndarray, "k i j"]
    gland: Float[np.ndarray, "i j"]
    vessel: Float[np.ndarray, "i j"]
    nest: Float[np.ndarray, "i j"]
    across: Float[np.ndarray, "i j"]
    along: Float[np.ndarray, "i j"]
    infiltrate: Float[np.ndarray, "i j"]
    pallor: Float[np.ndarray, "i j"]
    eosin_gain: Float[np.ndarray, "i j"]
    haematoxylin_gain: Float[np.ndarray, "i j"]


def fat_cells(seed: int, box: tuple[float, float, float, float]) -> Sites:
    """Middles of the fat cells that can lie in `box` (y0, x0, y1, x1 in µm)."""
    return jittered_sites(seed, FAT_STREAM, FAT_CELL_UM, FAT_JITTER, box)


@dataclass(frozen=True)
class Matrix:
    """The stain between the nuclei in the window of `height` × `width` pixels at (`y`, `x`)."""

    textures: Textures
    mpp: float
    seed: int
    nodes: NodeGrid
    fields: Fields
    y: int
    x: int
    height: int
    width: int

    def pixels(self, field: Float[np.ndarray, "i j"]) -> Float32[np.ndarray, "h w"]:
        """A node field at the window's pixels."""
        return self.nodes.to_pixels(field, self.y, self.x, self.height, self.width)

    def stains(self) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
        """Haematoxylin and eosin of everything but nuclei and blood."""
        fields = self.fields
        shares = [self.pixels(share) for share in fields.shares]
        fibrous, cytoplasm = self._fibres(), self._granules()
        haematoxylin = 0.02 + 0.03 * cytoplasm
        eosin = fibrous * (1 - 0.28 * shares[GLANDULAR])

        lymphoid = shares[LYMPHOID]
        eosin += lymphoid * (0.20 + 0.08 * cytoplasm - eosin)
        haematoxylin += (0.10 + 0.05 * self.pixels(fields.pallor)) * lymphoid
        if fields.shares[ADIPOSE].max() > 1e-3:
            fat = smoothstep(shares[ADIPOSE], 0.25, 0.75)
            eosin += fat * (0.5 * self._fat() - eosin)
            haematoxylin *= 1 - fat

        nest = smoothstep(self.pixels(fields.nest), -0.06, 0.06)
        eosin += nest * (0.40 + 0.10 * cytoplasm - eosin)
        haematoxylin += nest * (0.17 + 0.05 * cytoplasm)

        gland = self.pixels(fields.gland)
        wall = smoothstep(gland, -0.8, 0.8)
        lumen = smoothstep(gland, EPITHELIUM_UM - 1.5, EPITHELIUM_UM + 1.0)
        apical = smoothstep(gland, 7.0, EPITHELIUM_UM)
        eosin += wall * (0.34 + 0.10 * cytoplasm + 0.10 * apical - eosin)
        haematoxylin += wall * (0.20 - 0.14 * apical)
        eosin *= 1 - 0.93 * lumen
        haematoxylin *= 1 - 0.98 * lumen

        vessel = self.pixels(fields.vessel)
        wall = smoothstep(vessel, -2.0, 0.0)
        eosin += wall * (0.55 + 0.10 * cytoplasm - eosin)
        hollow = smoothstep(vessel, VESSEL_WALL_UM - 1, VESSEL_WALL_UM + 1)
        return haematoxylin * (1 - hollow), eosin * (1 - 0.95 * hollow)

    def _fibres(self) -> Float32[np.ndarray, "h w"]:
        """Eosin of collagen: bundles that follow two bent coordinates, wavy, with clefts between
        them.
        """
        across, along = self.pixels(self.fields.across), self.pixels(self.fields.along)
        across += 1.6 * np.sin(along * np.float32(0.33)) + 2.2 * np.sin(along * np.float32(0.11))
        texture = self.textures.fibres
        bundle = texture.at(across * np.float32(1 / 7.0), along * np.float32(1 / 70.0))
        fibril = texture.at(across * np.float32(1 / 1.7) + 57, along * np.float32(1 / 26.0))
        cleft = smoothstep(bundle - 0.25 * fibril, -1.25, -0.85)
        return (0.12 + cleft * (0.32 + 0.11 * bundle + 0.13 * fibril)).clip(0.02, 1.1)

    def _granules(self) -> Float32[np.ndarray, "h w"]:
        """Grain of cytoplasm, two µm coarse: mean 0, deviation 1."""
        scale = self.mpp / 1.3
        y = ((self.y + np.arange(self.height)) * scale)[:, None]
        x = ((self.x + np.arange(self.width)) * scale)[None, :]
        return self.textures.grain.at(*np.broadcast_arrays(y, x))

    def _fat(self) -> Float32[np.ndarray, "h w"]:
        """Membranes of fat cells: borders of a Voronoi diagram, thicker where three cells meet."""
        mpp, pitch = self.mpp, FAT_CELL_UM
        y = (self.y + np.arange(self.height) + 0.5) * mpp
        x = (self.x + np.arange(self.width) + 0.5) * mpp
        box = (y[0] - pitch, x[0] - pitch, y[-1] + pitch, x[-1] + pitch)
        sites = fat_cells(self.seed, box)
        columns = int(sites.column[-1] - sites.column[0]) + 1
        site_y, site_x = sites.y.astype(np.float32), sites.x.astype(np.float32)
        row = (y // pitch).astype(np.int64) - sites.row[0]
        column = (x // pitch).astype(np.int64) - sites.column[0]
        cell = row[:, None] * columns + column[None, :]
        y, x = y.astype(np.float32)[:, None], x.astype(np.float32)[None, :]
        distances = np.stack(
            [
                np.hypot(y - site_y.take(neighbour), x - site_x.take(neighbour))
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                for neighbour in (cell + (dy * columns + dx),)
            ]
        )
        nearest = distances.min(axis=0)
        crowding = np.exp((nearest - distances) * np.float32(1 / 2.2)).sum(axis=0) - 1
        return smoothstep(crowding, 0.35, 0.75)
