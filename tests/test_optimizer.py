"""Laws of Muon for kernels: they move as the matrices of the same values would."""

import copy

import pytest
import torch
from torch import Tensor, nn

from jobs.optimizer import Joint, Kernels, is_matrix, make_muon, make_optimizer


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    """A kernel, a matrix and what AdamW moves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3)
        self.linear = nn.Linear(64, 40)
        self.head = nn.Linear(64, 40)
        self.conv_out = nn.Conv2d(16, 24, 3)


def step(optimizer: torch.optim.Optimizer, gradients: list[tuple[Tensor, Tensor]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient.clone()
    optimizer.step()


def test_a_kernel_moves_as_the_matrix_of_its_values() -> None:
    values = normal(24, 16, 3, 3, seed=0)
    kernel, matrix = nn.Parameter(values.clone()), nn.Parameter(values.flatten(1).clone())
    ours, muon = Kernels([kernel], 1e-2), make_muon([matrix], 1e-2)
    for i in range(4):
        gradient = normal(24, 16, 3, 3, seed=i + 1)
        for optimizer in (ours, muon):
            optimizer.param_groups[0]["lr"] = 1e-2 / (i + 1)
        step(ours, [(kernel, gradient)])
        step(muon, [(matrix, gradient.flatten(1))])
        assert torch.equal(kernel.flatten(1), matrix)
        assert (kernel - values).abs().max() > 1e-4
        # Its module is moved to a device, as engines do after the optimizer was made.
        kernel.data = kernel.data.clone()


def test_the_optimizers_of_a_module_share_its_parameters_and_their_state_comes_back() -> None:
    modules, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(Two())
        optimizers.append(make_optimizer(modules[-1], "muon", 1e-2))
    assert isinstance(optimizers[0], Joint)
    assert [type(part).__name__ for part in optimizers[0].parts] == ["Muon", "Kernels", "AdamW"]
    moved = [p for group in optimizers[0].param_groups for p in group["params"]]
    places = sorted(p.data_ptr() for p in modules[0].parameters())
    assert sorted(p.data_ptr() for p in moved) == places
    one, other = ([*module.parameters()] for module in modules)
    for i in range(4):
        if i == 2:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            modules[1].load_state_dict(modules[0].state_dict())
        for group in (*optimizers[0].param_groups, *optimizers[1].param_groups):
            group["lr"] = 1e-3 * (i + 1)
        gradients = [normal(*p.shape, seed=7 * i + k) for k, p in enumerate(one)]
        step(optimizers[0], list(zip(one, gradients, strict=True)))
        if i >= 2:
            step(optimizers[1], list(zip(other, gradients, strict=True)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, one, strict=True))


@pytest.mark.parametrize(
    ("path", "shape", "moved"),
    [
        ("unet.conv_in.weight", (48, 48, 3, 3), True),
        ("unet.mid_block.attentions.0.proj_in.weight", (128, 128, 1, 1), True),
        ("blocks.B.body.net.stem.weight", (64, 300), True),
        ("unet.conv_out.weight", (48, 48, 3, 3), False),
        ("unet.mid_block.resnets.0.time_emb_proj.weight", (128, 192), False),
        ("unet.time_embedding.linear_1.weight", (192, 48), False),
        ("unet.conv_in.bias", (4096,), False),
        ("content.weight", (8, 8), False),
    ],
)
def test_what_muon_moves(path: str, shape: tuple[int, ...], moved: bool) -> None:
    """Large matrices and kernels, but no last layers and nothing that modulates features."""
    assert is_matrix(path, nn.Parameter(torch.zeros(shape))) == moved
