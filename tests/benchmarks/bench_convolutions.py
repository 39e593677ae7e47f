"""Why the cascade's networks are made of dense 3x3 convolutions on coarse places: the rates at
which a core does the arithmetic of dense and of depthwise ones.

All have the same values, (8, c, h, w) with c h w = 2^17. A training step's operations are three
times those of its forward pass. CPU seconds of one thread in a process of its own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.bench_costs import in_a_process_of_its_own, interleaved, report
from torch import nn

BATCH, VALUES, ROUNDS = 8, 1 << 17, 6
Kind = tuple[str, int, int, bool, bool]
KINDS: tuple[Kind, ...] = tuple(
    (kind, width, kernel, last, bf16)
    for kind, width, kernel in (
        ("dense", 64, 3),
        ("dense", 96, 3),
        ("dense", 128, 3),
        ("dense", 256, 3),
        ("depthwise", 64, 7),
    )
    for last in (True, False)
    for bf16 in (False, True)
)


class DepthwiseBlock(nn.Module):
    """Depthwise 7x7, a norm of each place, a layer of twice the width and back: ConvNeXt's."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


def rates() -> dict[Kind, float]:
    """GFLOP/s of a forward and a backward pass, by kind of layer."""
    torch.set_num_threads(1)
    works: dict[Any, Callable[[], object]] = {}
    operations = {}
    for key in KINDS + tuple(("block", 64, 7, True, bf16) for bf16 in (False, True)):
        kind, width, kernel, last, bf16 = key
        side = int((VALUES // width) ** 0.5)
        torch.manual_seed(0)
        x = torch.randn(BATCH, width, side, side, requires_grad=True)
        groups = width if kind == "depthwise" else 1
        layer: nn.Module = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=groups)
        if kind == "block":
            layer = DepthwiseBlock(width, kernel)
        if last:
            layer = layer.to(memory_format=torch.channels_last)
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        each = kernel**2 * (width if kind == "dense" else 1)
        each += 4 * width if kind == "block" else 0
        operations[key] = 3 * 2 * each * x.numel() / 1e9

        def work(layer: nn.Module = layer, x: torch.Tensor = x, bf16: bool = bf16) -> None:
            with torch.autocast("cpu", torch.bfloat16, bf16):
                y = layer(x)
            y.backward(torch.ones_like(y))

        work()
        works[key] = work
    least = interleaved(works, ROUNDS)
    return {key: operations[key] / cost for key, cost in least.items()}


@pytest.mark.timeout(1200)
def test_dense_convolutions_run_at_many_times_the_rate_of_depthwise_ones() -> None:
    found, rows = in_a_process_of_its_own(rates), []
    for (kind, width, kernel, last, bf16), rate in found.items():
        if not bf16:
            half = found[kind, width, kernel, last, True]
            order = "channels-last" if last else "channels-first"
            rows.append(
                (
                    f"{kind} {kernel}x{kernel}, {width} channels, {order}",
                    f"{rate:.0f} GFLOP/s in float32, {half:.0f} in bfloat16",
                )
            )
    report("rates of layers, forward and backward, one thread", rows)
