"""Averaged weights of a denoiser in training, in the three forms that a checkpoint keeps.

    average.safetensors   running exponential averages, with which training goes on
    early.safetensors     what they were when a tenth of the training was over, which autoguidance
                          leads away from (`model.cascade.painter`)
    ema.safetensors       what images are generated with: of every part the average that erred
                          least on regions that are not trained on; the running one where all are

A part with few regions learns them by heart and errs more on others from then on: in a slide of
8192 px a block of the layout does so within a minute (docs/experiments.md).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EARLY = 0.1
"""Part of the training after which the early weights are kept."""


@dataclass
class PartAverages:
    """The averages of one part's parameters, in their order, as views of the denoiser's.

    error: that of the weights in `best` on regions that are not trained on, None where there is
    none: `best` are the running averages then.
    """

    running: list[Tensor]
    early: list[Tensor]
    best: list[Tensor]
    is_early: bool = False
    error: float | None = None

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], step: int, decay: float, progress: float) -> None:
        """After a step: shorter averages at the start, and early ones until their time is over."""
        decay = min(decay, (1 + step) / (10 + step))
        self.is_early = self.is_early or step == 1
        torch._foreach_lerp_(self.running, [weight.float() for weight in weights], 1 - decay)
        if self.is_early and progress >= EARLY:
            torch._foreach_copy_(self.early, self.running)
            self.is_early = False

    def judge(self, error: float) -> None:
        """Keep the running averages where no earlier ones had less error."""
        if self.error is None or error < self.error:
            self.error = error
            torch._foreach_copy_(self.best, self.running)

    def settle(self) -> None:
        """Before they are written: what nothing has decided yet is as the running averages are."""
        if self.is_early:
            torch._foreach_copy_(self.early, self.running)
        if self.error is None:
            torch._foreach_copy_(self.best, self.running)


class Averages:
    """All averages of a denoiser, by the names of its parameters; float32."""

    def __init__(
        self, denoiser: nn.Module, device: torch.device, early: Mapping[str, Tensor] | None
    ) -> None:
        """early: those of the runs whose weights the denoiser begins with, where known."""
        given = dict(denoiser.named_parameters())
        self.running, self.early, self.best = (
            {name: weights[name].detach().to(device, torch.float32, copy=True) for name in given}
            for weights in (given, early or given, given)
        )

    def of(self, denoiser: nn.Module, part: nn.Module) -> PartAverages:
        """Of the parameters of a part of the denoiser."""
        names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
        own = [names[id(parameter)] for parameter in part.parameters()]
        running, early, best = (
            [kind[name] for name in own] for kind in (self.running, self.early, self.best)
        )
        return PartAverages(running, early, best)

    def files(self, *, chosen: bool) -> dict[str, dict[str, Tensor]]:
        """By the names of their files. chosen: whether `best` may be others than the running."""
        if not chosen:
            return {"ema": self.best}
        return {"average": self.running, "early": self.early, "ema": self.best}
