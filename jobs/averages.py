"""Averaged weights of a denoiser in training, in the three forms that a checkpoint keeps.

    average.safetensors   running exponential averages, with which training goes on
    early.safetensors     what they were when a tenth of the training was over, which autoguidance
                          leads away from (`model.cascade.painter`)
    ema.safetensors       what images are generated with: of every part the average that erred
                          least on validation regions; the running one where there are none

A part with few regions learns them by heart and errs more on others from then on: in a slide of
8192 px a block of the layout does so within a minute (docs/experiments.md).

Of a run that begins with the weights of others, the early weights are those of the others, if they
kept them: a tenth of a second training makes no weaker weights.
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

    knows_early: whether `early` are such weights. follows: whether their time is still to come.
    error: that of the weights in `best` on validation regions, None where there is none: `best`
    are the running averages then.
    """

    running: list[Tensor]
    early: list[Tensor]
    best: list[Tensor]
    knows_early: bool
    follows: bool = False
    error: float | None = None

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], step: int, decay: float, progress: float) -> None:
        """After a step: shorter averages at the start, and early ones until their time is over."""
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.running, [weight.float() for weight in weights], 1 - decay)
        if step == 1 and not self.knows_early:
            self.knows_early = self.follows = True
        if self.follows and progress >= EARLY:
            torch._foreach_copy_(self.early, self.running)
            self.follows = False

    def judge(self, error: float) -> None:
        """Keep the running averages where no earlier ones had less error."""
        if self.error is None or error < self.error:
            self.error = error
            torch._foreach_copy_(self.best, self.running)

    def settle(self) -> None:
        """Before they are written: what nothing has decided yet is as the running averages are."""
        if self.follows:
            torch._foreach_copy_(self.early, self.running)
        if self.error is None:
            torch._foreach_copy_(self.best, self.running)


class Averages:
    """All averages of a denoiser, by the names of its parameters; float32."""

    def __init__(
        self, denoiser: nn.Module, device: torch.device, early: Mapping[str, Tensor] | None
    ) -> None:
        """early: those of the runs whose weights the denoiser begins with, where known."""
        self.early_is_given, self.parts = early is not None, list[PartAverages]()
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
        self.parts.append(PartAverages(running, early, best, self.early_is_given))
        return self.parts[-1]

    def files(self, *, cascade: bool) -> dict[str, dict[str, Tensor]]:
        """By the names of their files; only cascades have an early form and a best one. Parts that
        do not know early weights hold those that they began with as early ones.
        """
        if not cascade:
            return {"ema": self.running}
        early = {"early": self.early} if any(p.knows_early for p in self.parts) else {}
        return {"average": self.running, **early, "ema": self.best}
