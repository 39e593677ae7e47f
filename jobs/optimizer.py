"""What steps the weights: AdamW, or Muon for the matrices of a network and AdamW for the rest.

Muon (Jordan et al., 2024) moves a matrix by the orthogonal part of its momentum. Scaled to the
root mean square of AdamW's moves (Liu et al., 2025), both take one learning rate. It is torch's
own `torch.optim.Muon`; convolutions of a cascade keep their kernels as matrices for it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["muon", "adamw"]
BETAS = (0.9, 0.99)
LEAST_MATRIX = 2048
"""Smaller matrices are left to AdamW, and so are those named here: last layers, and what modulates
features."""
NO_MATRICES = ("head", "gain", "film", "embedding", "label")


class Joint(torch.optim.Optimizer):
    """Several optimizers of disjoint parameters as one."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        # The parts' own groups and states, so that whoever changes one changes what steps.
        self.param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(
    module: nn.Module, name: OptimizerName, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a module's parameters, without weight decay; AdamW has the betas of
    ∞-Diff's code.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for path, parameter in module.named_parameters():
        muon = name == "muon" and parameter.ndim == 2 and parameter.numel() >= LEAST_MATRIX
        muon = muon and not any(part in path for part in NO_MATRICES)
        (matrices if muon else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    if not matrices:
        return adamw
    muon_part = torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    return Joint([muon_part, adamw])
