"""VICReg, one optimizer step at a time, with checkpoints that hold no pickles.

For the vectors z and z' of two views of each tile the loss is 25 · mean |z - z'|² + 25 · hinge on
each dimension's deviation + 1 · squared off-diagonal covariance (Bardes et al., ICLR 2022). It
acts on the vectors themselves, without the paper's expander: they are what is used, they should be
decorrelated, and in a short run their effective rank is then higher (10 against 5 on one slide
after 100 steps). What step s draws is a function of (seed, s), so a run restored from a checkpoint
goes where it would have gone: on a CPU, at the same number of threads, bit for bit.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from lightly.loss.vicreg_loss import VICRegLoss
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from conditioning.encoders import build_network
from conditioning.views import random_view
from pipeline.console import write_bytes_atomic

WEIGHT_DECAY = 1e-4
WARMUP_FRACTION = 0.1
STREAM_VIEWS = 2


@dataclass(frozen=True)
class Objective:
    """What is trained, for how long, and from which seed."""

    architecture: str
    num_bands: int
    dim: int
    input_px: int
    num_steps: int
    learning_rate: float
    seed: int


class Trainer:
    """Network and optimizer after `step` steps of an `Objective`."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(objective.seed)
            network = build_network(
                objective.architecture,
                num_bands=objective.num_bands,
                dim=objective.dim,
                input_px=objective.input_px,
            )
        self.objective = objective
        self.device = device
        self.network = network.to(device).train()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=objective.learning_rate, weight_decay=WEIGHT_DECAY
        )
        self.loss = VICRegLoss()
        self.step = 0

    def advance(self, tiles: Float32[Tensor, "n c s s"]) -> float:
        """One optimizer step on two views of the standardised `tiles`; the loss before it."""
        objective = self.objective
        rng = np.random.default_rng([objective.seed, STREAM_VIEWS, self.step])
        views = torch.cat([random_view(tiles, objective.input_px, rng) for _ in range(2)])
        for group in self.optimizer.param_groups:
            group["lr"] = objective.learning_rate * schedule(self.step, objective.num_steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=views.is_cuda):
            vectors = self.network(views)
        loss = self.loss(*vectors.float().chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: weights and two moments in float32."""
        return 3 * 4 * sum(parameter.numel() for parameter in self.network.parameters())

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Replace the checkpoint at `path`; `settings` are what the run that continues from it
        must agree on.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        metadata = {"step": str(self.step), "settings": json.dumps(settings)}
        write_bytes_atomic(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))

    def restore(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Continue from the checkpoint at `path`; `ValueError` when it was made with other
        settings.
        """
        model: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, "pt") as checkpoint:
            metadata = checkpoint.metadata()
            refuse_other_settings(path.parent, json.loads(metadata["settings"]), settings)
            for name in checkpoint.keys():  # noqa: SIM118
                kind, _, rest = name.partition(".")
                if kind == "model":
                    model[rest] = checkpoint.get_tensor(name)
                else:
                    index, _, moment = rest.partition(".")
                    moments.setdefault(int(index), {})[moment] = checkpoint.get_tensor(name)
        self.network.load_state_dict(model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = int(metadata["step"])


def schedule(step: int, num_steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up over a tenth of the run, then half a
    cosine to zero.
    """
    warmup = max(round(WARMUP_FRACTION * num_steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


def refuse_other_settings(
    folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """`ValueError` naming the first setting in which the encoder in `folder` differs from what is
    `wanted`.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds an encoder made with {name} = {found.get(name)} where the "
                f"command has {value}; "
                "choose another --out, or remove that folder"
            )


def effective_rank(vectors: Float32[np.ndarray, "n d"]) -> float:
    """exp(entropy of the eigenvalues of the covariance, normalised to sum 1): 1 on a line, d when
    isotropic.

    Roy and Vetterli, EUSIPCO 2007. It is 0 when all vectors are equal.
    """
    eigenvalues = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False).astype(float) ** 2
    if eigenvalues.sum() == 0:
        return 0.0
    shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def view_retrieval(first: Float32[np.ndarray, "n d"], second: Float32[np.ndarray, "n d"]) -> float:
    """Fraction of rows of `first` whose nearest row of `second`, by cosine, is their own; chance
    is 1 / n.
    """
    unit_first, unit_second = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        for vectors in (first, second)
    )
    nearest = (unit_first @ unit_second.T).argmax(axis=1)
    return float((nearest == np.arange(len(first))).mean())
