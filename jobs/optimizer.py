"""What steps the weights: AdamW, or Muon for the matrices of a network and AdamW for the rest.

Muon (Jordan et al., 2024) moves a matrix by the orthogonal part of its momentum. Scaled to the
root mean square of AdamW's moves (Liu et al., 2025), both take one learning rate. It is torch's
own `torch.optim.Muon`, which takes matrices only: convolutions of a cascade keep their kernels as
matrices for it, those of diffusers' U-Net are moved as matrices (`Kernels`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["muon", "adamw"]
BETAS = (0.9, 0.99)
LEAST_MATRIX = 2048
"""Smaller matrices are left to AdamW, and so are those named here: last layers, and what modulates
features."""
NO_MATRICES = ("head", "gain", "film", "embedding", "label", "conv_out", "time_emb_proj")


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


class Kernels(torch.optim.Optimizer):
    """Muon for the kernels of convolutions, (out, in, h, w): each moves exactly as the matrix
    (out, in h w) of the same values would.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], learning_rate: float) -> None:
        self.kernels = list(kernels)
        self.muon = make_muon([nn.Parameter(_matrix(k)) for k in kernels], learning_rate)
        super().__init__(self.kernels, {})
        self.param_groups = self.muon.param_groups

    def _matrices(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Kernels, and what Muon moves: views of where a kernel's values lie now, which is another
        place once its module has been moved to a device.
        """
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            matrix.data = _matrix(kernel)
            yield kernel, matrix

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for kernel, matrix in self._matrices():
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad)
        self.muon.step()
        for _, matrix in self._matrices():
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        return self.muon.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        list(self._matrices())  # the state goes where the kernels are
        self.muon.load_state_dict(state_dict)
        self.param_groups = self.muon.param_groups


def _matrix(kernel: Tensor) -> Tensor:
    """(out, in, h, w) as (out, in h w), in the same place."""
    return kernel.detach().view(len(kernel), -1)


def make_muon(matrices: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Muon:
    """Muon without weight decay, at AdamW's learning rates."""
    return torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )


def is_matrix(path: str, parameter: nn.Parameter) -> bool:
    """Whether Muon moves a parameter: the matrix of a layer, or the kernel of a convolution."""
    fits = parameter.ndim in (2, 4) and parameter.numel() >= LEAST_MATRIX
    return fits and not any(part in path for part in NO_MATRICES)


def make_optimizer(
    module: nn.Module, name: OptimizerName, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of a module's parameters, without weight decay; AdamW has the betas of
    ∞-Diff's code.
    """
    matrices: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for path, parameter in module.named_parameters():
        if name != "muon" or not is_matrix(path, parameter):
            others.append(parameter)
        else:
            (matrices if parameter.ndim == 2 else kernels).append(parameter)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(make_muon(matrices, learning_rate))
    if kernels:
        parts.append(Kernels(kernels, learning_rate))
    parts.append(torch.optim.AdamW(others, lr=learning_rate, betas=BETAS, weight_decay=0.0))
    return Joint(parts) if len(parts) > 1 else parts[0]
