"""An aerial scene in four bands (red, green, blue, near-infrared) drawn by code.

The ground takes the spectrum of what covers it: vegetation is bright in the near-infrared and dark
in red, water is dark in the near-infrared, soil and roads are flat. On it stand roofs and trees,
lit from the south-east, each with the shadow that it throws to the north-west: the shadow at a
point is the thing at the point shifted towards the sun. A pure function of (seed, position), in
metres.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, UInt8

from pipeline.phantom.landcover import (
    FARMLAND,
    FOREST,
    MEADOW,
    ROAD_HALF_WIDTH_M,
    STREET_HALF_WIDTH_M,
    VILLAGE,
    Frame,
    Ground,
    LandCover,
)
from pipeline.phantom.nodes import NodeGrid
from pipeline.phantom.noise import (
    SmoothNoise,
    Texture,
    jittered_sites,
    keyed_uniform,
    smoothstep,
)

BANDS = ("red", "green", "blue", "nir")
WATER = (46, 66, 70, 24)
BANK = (104, 112, 76, 150)
ASPHALT = (142, 140, 136, 128)
STREET = (128, 127, 125, 116)
FOREST_FLOOR = (58, 68, 46, 96)
MEADOW_GRASS = (108, 128, 78, 176)
GARDEN = (112, 122, 84, 156)
CROPS = np.array(
    [
        (186, 168, 118, 150),
        (84, 120, 62, 190),
        (62, 98, 54, 198),
        (152, 124, 98, 124),
        (118, 98, 82, 102),
        (126, 138, 84, 172),
        (178, 176, 74, 188),
        (204, 190, 146, 158),
    ],
    np.float32,
)
ROOFS = np.array(
    [
        (166, 92, 72, 110),
        (142, 80, 66, 100),
        (120, 118, 118, 112),
        (176, 172, 166, 160),
        (96, 92, 94, 88),
    ],
    np.float32,
)
CROWN = np.array([62, 86, 48, 178], np.float32)
SUN = (0.64, 0.77)
"""Direction towards the sun along (y, x): south-east."""

TREE_PITCH_M = 6.5
TREE_REACH_M = 5.0
NODE_M = 2.0


@dataclass(frozen=True)
class Trees:
    """Tree tables over the jittered lattice that covers a window: positions and crown radii (0: no
    tree), in metres.
    """

    top: int
    left: int
    y: Float32[np.ndarray, "i j"]
    x: Float32[np.ndarray, "i j"]
    radius: Float32[np.ndarray, "i j"]
    shade: Float32[np.ndarray, "i j"]

    def crown(
        self, y: Float[np.ndarray, "h w"], x: Float[np.ndarray, "h w"]
    ) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
        """Height of the highest crown over each point (0 to 1, 0 where there is none) and its
        brightness in the sun.
        """
        row = np.floor(y / TREE_PITCH_M).astype(np.int64) - self.top
        column = np.floor(x / TREE_PITCH_M).astype(np.int64) - self.left
        columns = self.y.shape[1]
        site = row * columns + column
        height = np.zeros(y.shape, np.float32)
        light = np.zeros(y.shape, np.float32)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near = site + (dy * columns + dx)
                radius = self.radius.ravel().take(near)
                from_y = (y - self.y.ravel().take(near)).astype(np.float32)
                from_x = (x - self.x.ravel().take(near)).astype(np.float32)
                size = np.maximum(radius, np.float32(0.1))
                dome = np.maximum(1 - (from_y**2 + from_x**2) / size**2, 0)
                dome = np.sqrt(dome) * (radius / np.float32(TREE_REACH_M))
                facing = (SUN[0] * from_y + SUN[1] * from_x) / size
                higher = dome > height
                height = np.where(higher, dome, height)
                light = np.where(
                    higher, self.shade.ravel().take(near) * (0.92 + 0.42 * facing), light
                )
        return height, light


class AerialScene:
    """The scene of `seed` at `gsd` m a pixel; it has no borders."""

    def __init__(self, gsd: float, seed: int) -> None:
        self.gsd, self.seed = gsd, seed
        self.cover = LandCover(seed)
        self.step_px = max(1, round(NODE_M / gsd))
        self.grain = Texture.drawn(seed, 120)

    def ground(self, y: int, x: int, height: int, width: int) -> Ground:
        """The true land cover of a window of pixels."""
        return self.cover.ground(
            self._frame(self._nodes(y, x, height, width), y, x, height, width)
        )

    def draw(self, y: int, x: int, height: int, width: int) -> UInt8[np.ndarray, "4 h w"]:
        """The window of `height` × `width` pixels whose first pixel is (`y`, `x`)."""
        nodes = self._nodes(y, x, height, width)
        frame = self._frame(nodes, y, x, height, width)
        ground = self.cover.ground(frame)
        node_y, node_x = nodes.positions()

        def noise(stream: int, wavelength_m: float) -> Float32[np.ndarray, "h w"]:
            field = SmoothNoise(self.seed, stream, wavelength_m).at(node_y, node_x)
            return nodes.to_pixels(field, y, x, height, width)

        patches = 0.6 * noise(121, 45.0) + 0.5 * noise(122, 9.0)
        image = self._paint_ground(ground, frame, patches, self._grain(y, x, height, width))
        position_y = np.broadcast_to(
            ((y + np.arange(height) + 0.5) * self.gsd)[:, None], (height, width)
        )
        position_x = np.broadcast_to(
            ((x + np.arange(width) + 0.5) * self.gsd)[None, :], (height, width)
        )
        trees = self._trees(position_y, position_x)

        shadow = np.zeros((height, width), np.float32)
        for reach in (1.5, 3.0, 4.5):
            crown, _ = trees.crown(position_y + reach * SUN[0], position_x + reach * SUN[1])
            shadow = np.maximum(shadow, crown * 5.0 > reach)
            inside, _ = self._roofs(ground, reach)
            shadow = np.maximum(shadow, inside)
        image *= 1 - 0.48 * shadow
        inside, roof = self._roofs(ground, 0.0)
        image += inside * (roof - image)
        crown, light = trees.crown(position_y, position_x)
        leaves = CROWN[:, None, None] * (
            light * (1 + 0.16 * self._grain(y + 91, x + 37, height, width))
        )
        image += (crown > 0) * (leaves - image)
        image += 1.6 * self._grain(y + 211, x + 143, height, width)
        return np.clip(np.rint(image), 1, 255).astype(np.uint8)

    def _nodes(self, y: int, x: int, height: int, width: int) -> NodeGrid:
        return NodeGrid.covering(y, x, height, width, self.step_px, self.gsd)

    def _frame(self, nodes: NodeGrid, y: int, x: int, height: int, width: int) -> Frame:
        frame = self.cover.frame(*nodes.positions())
        v, u, water = (
            nodes.to_pixels(field, y, x, height, width)
            for field in (frame.v, frame.u, frame.water)
        )
        return Frame(v, u, water)

    def _grain(self, y: int, x: int, height: int, width: int) -> Float32[np.ndarray, "h w"]:
        size = self.grain.table.shape[0]
        rows, columns = (y + np.arange(height)) % size, (x + np.arange(width)) % size
        return self.grain.table[np.ix_(rows, columns)]

    def _paint_ground(
        self,
        ground: Ground,
        frame: Frame,
        patches: Float32[np.ndarray, "h w"],
        grain: Float32[np.ndarray, "h w"],
    ) -> Float32[np.ndarray, "4 h w"]:
        """Colour of the ground, without anything that stands on it."""

        def uniform(stream: int) -> Float[np.ndarray, "h w"]:
            return keyed_uniform(self.seed, stream, ground.parcel_row, ground.parcel_column)

        crop = CROPS[(uniform(130) * len(CROPS)).astype(np.int64)].transpose(2, 0, 1)
        crop = crop * (0.9 + 0.2 * uniform(131)).astype(np.float32)
        across = np.where(uniform(132) < 0.7, frame.u, frame.v)
        row_m, tramline_m = 2.6 + 2.0 * uniform(133), 14 + 10 * uniform(134)
        rows = 0.06 * np.sin(2 * np.pi * across / row_m)
        tramline = np.abs(across % tramline_m - 1.2) < 0.7
        texture = (rows - 0.09 * tramline).astype(np.float32)

        def plain(colour: tuple[int, ...]) -> Float32[np.ndarray, "4 1 1"]:
            return np.array(colour, np.float32)[:, None, None]

        image = crop * (1 + texture)
        for kind, colour in ((MEADOW, MEADOW_GRASS), (FOREST, FOREST_FLOOR), (VILLAGE, GARDEN)):
            image = np.where(ground.kind == kind, plain(colour), image)
        verge = (ground.kind == FARMLAND) & (ground.edge < 1.6)
        image = np.where(verge, plain(BANK), image)
        image = image * (1 + 0.075 * patches + 0.035 * grain)

        soft = self.gsd

        def lay(colour: tuple[int, ...], inside_m: Float[np.ndarray, "h w"], rough: float) -> None:
            share = smoothstep(inside_m.astype(np.float32), -soft, soft)
            image[:] += share * (plain(colour) * (1 + rough * (grain + patches)) - image)

        lay(STREET, STREET_HALF_WIDTH_M - ground.street, 0.025)
        lay(BANK, 9 - ground.water, 0.06)
        lay(WATER, -ground.water, 0.03)
        lay(BANK, ROAD_HALF_WIDTH_M + 2.2 - ground.road, 0.05)
        lay(ASPHALT, ROAD_HALF_WIDTH_M - ground.road, 0.025)
        return image.astype(np.float32)

    def _roofs(
        self, ground: Ground, reach_m: float
    ) -> tuple[Float32[np.ndarray, "*s"], Float32[np.ndarray, "4 *s"]]:
        """Cover (0 to 1) and colour of roofs at points `reach_m` towards the sun, inside the
        points' own plots.
        """

        def uniform(attribute: int) -> Float[np.ndarray, "*s"]:
            return keyed_uniform(self.seed, 140 + attribute, ground.house_row, ground.house_column)

        sun_v, sun_u = self.cover.turn(*SUN)
        depth, width = 3.4 + 1.6 * uniform(1), 4.4 + 2.2 * uniform(2)
        from_v = ground.house_v + reach_m * sun_v - 5 * (uniform(3) - 0.5)
        from_u = ground.house_u + reach_m * sun_u - 5 * (uniform(4) - 0.5)
        turned = uniform(5) < 0.5
        across, along = np.where(turned, from_u, from_v), np.where(turned, from_v, from_u)
        inside_m = np.minimum(depth - np.abs(across), width - np.abs(along))
        built = (ground.kind == VILLAGE) & (uniform(0) < 0.85) & (ground.water > 20)
        built &= (ground.house_row >= 0) & (ground.house_column >= 0)
        share = smoothstep(inside_m, -self.gsd / 2, self.gsd / 2) * built
        sunny = 1 + 0.16 * np.sign(across) * np.where(turned, sun_u, sun_v)
        colour = np.moveaxis(ROOFS[(uniform(6) * len(ROOFS)).astype(np.int64)], -1, 0)
        return share.astype(np.float32), (colour * sunny).astype(np.float32)

    def _trees(self, y: Float[np.ndarray, "h w"], x: Float[np.ndarray, "h w"]) -> Trees:
        """Every tree that may show or throw a shadow in the window of positions `y`, `x`."""
        reach = 2 * TREE_PITCH_M + 5
        box = (y[0, 0] - reach, x[0, 0] - reach, y[-1, -1] + reach, x[-1, -1] + reach)
        sites = jittered_sites(self.seed, 150, TREE_PITCH_M, 0.7, box)
        frame = self.cover.frame(sites.y, sites.x)
        ground = self.cover.ground(frame)
        density = np.select(
            [ground.is_forest, ground.kind == VILLAGE, ground.kind == MEADOW],
            [0.97, 0.13, 0.03],
            0.002,
        )
        hedge = (ground.kind == FARMLAND) & (ground.edge < 4) & (ground.road > 9)
        hedge &= keyed_uniform(self.seed, 151, ground.parcel_row, ground.parcel_column) < 0.4
        density = np.where(hedge, 0.55, density)
        density = np.where((ground.water > 3) & (ground.water < 22), 0.42, density)
        clear = (ground.water > 3) & (ground.road > 6.5) & (ground.street > 4.5)
        house, _ = self._roofs(ground, 0.0)
        grows = clear & (sites.uniform(2) < density) & (house < 0.5)
        radius = np.where(grows, 1.9 + 3.0 * sites.uniform(3) ** 1.5, 0)
        shape = (int(sites.row[-1] - sites.row[0]) + 1, -1)
        y_table, x_table, radius_table, shade = (
            table.reshape(shape).astype(np.float32)
            for table in (sites.y, sites.x, radius, 0.8 + 0.45 * sites.uniform(4))
        )
        return Trees(
            int(sites.row[0]), int(sites.column[0]), y_table, x_table, radius_table, shade
        )
