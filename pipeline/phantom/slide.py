"""A section of tissue, stained with haematoxylin and eosin, drawn by code.

Two maps say how much of each stain lies at a pixel; colour follows by Beer and Lambert, I = I₀
exp(−(h H + e E)), with the optical-density vectors H and E that Macenko et al. (2009) fitted to
real slides. Structure has four scales: compartments of a millimetre (`architecture`), glands,
nests, vessels and fat cells of tens of µm (`rings`, `nodes`), nuclei (`cells`), and fibres,
chromatin and grain at the pixel. Everything is a pure function of (seed, size of the slide,
position): any window equals the crop of the whole.
"""

import numpy as np
from jaxtyping import Float, Float32, UInt8

from pipeline.phantom.architecture import (
    ADIPOSE,
    GLANDULAR,
    LYMPHOID,
    STROMA,
    TUMOUR,
    Architecture,
)
from pipeline.phantom.cells import (
    EPITHELIAL,
    ERYTHROCYTE,
    FIBROBLAST,
    LYMPHOCYTE,
    REACH_UM,
    TUMOUR_CELL,
    CellKind,
    Cells,
    SpriteBank,
)
from pipeline.phantom.matrix import VESSEL_WALL_UM, Fields, Matrix, Textures, fat_cells
from pipeline.phantom.nodes import NodeGrid
from pipeline.phantom.noise import SmoothNoise, Texture, jittered_sites, keyed_number, smoothstep
from pipeline.phantom.rings import RingKind, Rings, rings_near

HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062], np.float32)
EOSIN = np.array([0.2159, 0.8012, 0.5581], np.float32)
GLASS = np.array([243.0, 242.0, 244.0], np.float32)

GLANDS = RingKind(20, 96.0, (22.0, 54.0), 0.22, 0.95)
VESSELS = RingKind(21, 260.0, (9.0, 26.0), 0.14, 0.6)
NODE_UM = 2.0


class Slide:
    """A slide of `height_px` × `width_px` pixels of `mpp` µm; the same `seed` and size in µm show
    the same section.
    """

    def __init__(self, height_px: int, width_px: int, mpp: float, seed: int) -> None:
        self.height_px, self.width_px, self.mpp, self.seed = height_px, width_px, mpp, seed
        self.architecture = Architecture(height_px * mpp, width_px * mpp, seed)
        self.bank = SpriteBank.drawn(mpp, seed)
        self.step_px = max(1, round(NODE_UM / mpp))
        self.margin_px = int(np.ceil(2 * REACH_UM / mpp)) + 2
        self.textures = Textures(Texture.drawn(seed, 30), Texture.drawn(seed, 31))
        self.fibre_angle = float(np.pi * keyed_number(seed, 32))

    def draw(self, y: int, x: int, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """The window of `height` × `width` pixels whose first pixel is (`y`, `x`)."""
        margin = self.margin_px
        nodes = NodeGrid.covering(
            y - margin, x - margin, height + 2 * margin, width + 2 * margin, self.step_px, self.mpp
        )
        rings = {kind: self._rings(kind, nodes) for kind in (GLANDS, VESSELS)}
        fields = self._fields(nodes, rings[GLANDS], rings[VESSELS])
        window = Matrix(self.textures, self.mpp, self.seed, nodes, fields, y, x, height, width)
        nuclei, blood = self._stamp_cells(window, rings[GLANDS], rings[VESSELS])
        haematoxylin, eosin = window.stains()
        covered = smoothstep(nuclei, 0.0, 0.7)
        eosin = eosin * (1 - 0.55 * covered) + blood
        in_tissue = smoothstep(window.pixels(fields.depth), 0.0, 2.5)
        haematoxylin = (haematoxylin * (1 - covered) + nuclei) * in_tissue
        haematoxylin *= window.pixels(fields.haematoxylin_gain)
        eosin *= in_tissue * window.pixels(fields.eosin_gain)
        return self._develop(haematoxylin, eosin, y, x)

    def _rings(self, kind: RingKind, nodes: NodeGrid) -> Rings:
        rings = rings_near(kind, self.seed, nodes.box)
        y, x = rings.sites.y, rings.sites.x
        shares = self.architecture.shares(y, x)
        belongs = self.architecture.depth_um(y, x) > 45
        if kind is GLANDS:
            belongs &= shares[GLANDULAR] > 0.6
        else:
            belongs &= (shares[STROMA] + shares[ADIPOSE] > 0.7) | (rings.sites.uniform(50) < 0.25)
            belongs &= shares[GLANDULAR] < 0.2
        return Rings(rings.sites.where(belongs), rings.profiles[belongs])

    def _fields(self, nodes: NodeGrid, glands: Rings, vessels: Rings) -> Fields:
        y, x = nodes.positions()
        shares = self.architecture.shares(y, x)

        def noise(stream: int, wavelength_um: float) -> Float[np.ndarray, "i j"]:
            return SmoothNoise(self.seed, stream, wavelength_um).at(y, x)

        nest = 0.30 + 0.85 * noise(40, 62.0) + 0.35 * noise(41, 24.0)
        nest = np.minimum(nest, 6 * (shares[TUMOUR] - 0.45))
        cos, sin = np.cos(self.fibre_angle), np.sin(self.fibre_angle)
        across = y * cos - x * sin + 95 * noise(42, 260.0) + 13 * noise(43, 70.0)
        along = x * cos + y * sin + 70 * noise(44, 260.0) + 9 * noise(45, 70.0)
        return Fields(
            depth=self.architecture.depth_um(y, x),
            shares=shares,
            gland=glands.depth_um(nodes),
            vessel=vessels.depth_um(nodes),
            nest=nest,
            across=across,
            along=along,
            infiltrate=noise(46, 120.0),
            pallor=smoothstep(noise(51, 110.0), 0.2, 1.0),
            eosin_gain=1 + 0.10 * noise(47, 700.0) + 0.05 * noise(48, 150.0),
            haematoxylin_gain=1 + 0.08 * noise(49, 800.0),
        )

    def _stamp_cells(
        self, window: Matrix, glands: Rings, vessels: Rings
    ) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
        """Haematoxylin of the nuclei and eosin of the red blood cells, over the window."""
        nodes, fields = window.nodes, window.fields
        margin = self.margin_px
        origin = (window.y - margin, window.x - margin)
        shape = (window.height + 2 * margin, window.width + 2 * margin)
        canvas, blood = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

        def at(field: Float[np.ndarray, "i j"], cells: Cells) -> Float[np.ndarray, "n"]:
            return nodes.nearest(field, cells.y, cells.x)

        def lattice(stream: int, pitch_um: float) -> tuple[Cells, Float[np.ndarray, "n"]]:
            sites = jittered_sites(self.seed, stream, pitch_um, 0.85, nodes.box)
            angle, strength = np.pi * sites.uniform(2), 0.75 + 0.4 * sites.uniform(3)
            return Cells(sites.y, sites.x, angle, sites.uniform(4), strength), sites.uniform(5)

        def put(kind: CellKind, cells: Cells, keep: np.ndarray, on: np.ndarray) -> None:
            chosen = keep & (at(fields.depth, cells) > 3)
            self.bank.stamp(on, origin, kind, cells.where(chosen))

        lining = glands.lining(22, 6.2, (4.5, 8.5), radial=True)
        put(EPITHELIAL, lining, at(fields.gland, lining) < 11, canvas)
        endothelium = vessels.lining(23, 13.0, (0.5, 2.0), radial=False)
        put(FIBROBLAST, endothelium, at(fields.vessel, endothelium) < 4, canvas)

        open_space = ((fields.gland < -3) & (fields.vessel < -2)).astype(np.float64)
        tumour, chance = lattice(24, 10.6)
        put(TUMOUR_CELL, tumour, (at(fields.nest, tumour) > 0.10) & (chance < 0.93), canvas)

        fibroblasts, chance = lattice(25, 13.5)
        slope_y, slope_x = np.gradient(fields.across)
        uphill = np.arctan2(at(slope_y, fibroblasts), at(slope_x, fibroblasts))
        fibroblasts = fibroblasts.turned(
            uphill + np.pi / 2 + 0.25 * (fibroblasts.angle - np.pi / 2)
        )
        density = 0.36 * (fields.shares[STROMA] + fields.shares[GLANDULAR] + fields.shares[TUMOUR])
        density = np.where(fields.nest < -0.05, density * open_space, 0)
        put(FIBROBLAST, fibroblasts, chance < at(density, fibroblasts), canvas)

        adipocytes, chance = self._fat_cell_nuclei(nodes)
        in_fat = (at(fields.shares[ADIPOSE], adipocytes) > 0.6) & (at(open_space, adipocytes) > 0)
        put(FIBROBLAST, adipocytes, in_fat & (chance < 0.4), canvas)

        lymphocytes, chance = lattice(26, 6.3)
        density = 0.95 * fields.shares[LYMPHOID] ** 2 * (
            1 - 0.6 * fields.pallor
        ) + 0.3 * smoothstep(fields.infiltrate, 0.9, 2.2)
        density = (density + 0.012) * open_space * np.where(fields.nest > 0, 0.15, 1)
        density *= 1 - 0.93 * fields.shares[ADIPOSE]
        put(LYMPHOCYTE, lymphocytes, chance < at(density, lymphocytes), canvas)

        red_cells, chance = lattice(27, 5.6)
        in_lumen = at(fields.vessel, red_cells) > VESSEL_WALL_UM + 2.5
        put(ERYTHROCYTE, red_cells, in_lumen & (chance < 0.8), blood)
        kept = (slice(margin, -margin), slice(margin, -margin))
        return canvas[kept], blood[kept]

    def _fat_cell_nuclei(self, nodes: NodeGrid) -> tuple[Cells, Float[np.ndarray, "n"]]:
        """A flat nucleus on the border between each fat cell and the next in its row, and a chance
        for each.
        """
        sites = fat_cells(self.seed, nodes.box)
        follows = np.flatnonzero(np.diff(sites.row) == 0)
        dy, dx = np.diff(sites.y)[follows], np.diff(sites.x)[follows]
        first = sites.where(follows)
        y, x = first.y + dy / 2, first.x + dx / 2
        angle = np.arctan2(dy, dx) + np.pi / 2
        return Cells(y, x, angle, first.uniform(2), 0.8 + 0.2 * first.uniform(3)), first.uniform(4)

    def _develop(
        self,
        haematoxylin: Float32[np.ndarray, "h w"],
        eosin: Float32[np.ndarray, "h w"],
        y: int,
        x: int,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Colours of stain concentrations, by Beer and Lambert, with a camera's grain."""
        height, width = eosin.shape
        size = self.textures.grain.table.shape[0]
        rows, columns = (y + np.arange(height)) % size, (x + np.arange(width)) % size
        grain = 0.8 * self.textures.grain.table[np.ix_(rows, columns)]
        colours = np.empty((height, width, 3), np.uint8)
        for band in range(3):
            density = HAEMATOXYLIN[band] * haematoxylin + EOSIN[band] * eosin
            light = GLASS[band] * np.exp(-density) + grain
            colours[..., band] = np.clip(np.rint(light), 0, 255)
        return colours
