"""Smooth fields on a coarse grid of nodes, two µm or two pixels apart, interpolated linearly to
the pixels.

Nodes lie at fixed places of the scene, whatever window is drawn, so an interpolated pixel is the
same in every window; and a field costs a sixteenth of what it would at every pixel.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32


@dataclass(frozen=True)
class NodeGrid:
    """The nodes that cover a window of pixels: node (i, j) lies at pixel position (top + i, left +
    j) × `step_px`.
    """

    top: int
    left: int
    rows: int
    columns: int
    step_px: int
    spacing: float
    """Size of a pixel in the scene's unit."""

    @classmethod
    def covering(
        cls, y_px: int, x_px: int, height_px: int, width_px: int, step_px: int, spacing: float
    ) -> "NodeGrid":
        """The smallest grid with one node to spare on every side of the window."""
        top, left = y_px // step_px - 1, x_px // step_px - 1
        bottom = -(-(y_px + height_px) // step_px) + 1
        right = -(-(x_px + width_px) // step_px) + 1
        return cls(top, left, bottom - top + 1, right - left + 1, step_px, spacing)

    @property
    def pitch(self) -> float:
        """Distance between nodes, in the scene's unit."""
        return self.step_px * self.spacing

    @property
    def box(self) -> tuple[float, float, float, float]:
        """First and last node's position: y0, x0, y1, x1."""
        bottom, right = self.top + self.rows - 1, self.left + self.columns - 1
        return (
            self.top * self.pitch,
            self.left * self.pitch,
            bottom * self.pitch,
            right * self.pitch,
        )

    def positions(self) -> tuple[Float[np.ndarray, "i j"], Float[np.ndarray, "i j"]]:
        """y and x of every node, in the scene's unit."""
        y = (self.top + np.arange(self.rows)) * self.pitch
        x = (self.left + np.arange(self.columns)) * self.pitch
        grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
        return grid_y, grid_x

    def nearest(
        self,
        field: Float[np.ndarray, "i j"],
        y: Float[np.ndarray, "n"],
        x: Float[np.ndarray, "n"],
    ) -> Float[np.ndarray, "n"]:
        """`field` at the node nearest to each position; beyond the grid its border is repeated."""
        row = np.clip(np.rint(y / self.pitch).astype(np.int64) - self.top, 0, self.rows - 1)
        column = np.clip(np.rint(x / self.pitch).astype(np.int64) - self.left, 0, self.columns - 1)
        return field[row, column]

    def to_pixels(
        self, field: Float[np.ndarray, "i j"], y_px: int, x_px: int, height_px: int, width_px: int
    ) -> Float32[np.ndarray, "h w"]:
        """`field` interpolated at the centres of a window's pixels."""
        row, weight_y = self._taps(y_px, height_px, self.top)
        column, weight_x = self._taps(x_px, width_px, self.left)
        values = field.astype(np.float32)
        strip = values[row]
        strip += weight_y[:, None] * (values[row + 1] - strip)
        steps = np.diff(strip, axis=1)
        pixels = steps.take(column, axis=1)
        pixels *= weight_x
        pixels += strip.take(column, axis=1)
        return pixels

    def _taps(
        self, start_px: int, length_px: int, first_node: int
    ) -> tuple[np.ndarray, Float32[np.ndarray, "n"]]:
        pixel = start_px + np.arange(length_px)
        node = pixel // self.step_px
        weight = ((pixel - node * self.step_px) + 0.5) / self.step_px
        return node - first_node, weight.astype(np.float32)
