"""A run's latent model on disk, and the loop that fits it.

    run/latents.json            the latent model's configuration, the checkpoint whose encoder it
                                belongs to, and what was measured
    run/latents.safetensors     its averaged weights, with mean and deviation of z
    run/.latents/encodings/     z of every draw, part by part
    run/.latents/fit/           where fitting stands: weights, averages, moments, step

Every batch is a function of (seed, step), so that fitting which was killed ends as if it had not
been. What is in `.latents` is kept: with other options the encodings are used again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from jobs.run import Run
from model.latent import LatentConfig, LatentDenoiser
from pipeline import console

RECORD_NAME, WEIGHTS_NAME, WORK_NAME = "latents.json", "latents.safetensors", ".latents"
SAVE_EVERY = 500
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class FitOptions:
    """What decides a fit, given the vectors."""

    steps: int
    batch: int
    learning_rate: float
    ema: float
    seed: int


class LatentFit:
    """AdamW on random vectors, with averaged weights; resumes from `folder`."""

    def __init__(
        self,
        z: Float[Tensor, "n d"],
        config: LatentConfig,
        options: FitOptions,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.z, self.options, self.folder = z.to(device), options, folder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = LatentDenoiser(config)
        self.model.measure(z)
        self.model.to(device)
        self.averages = {k: p.detach().clone() for k, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, weight_decay=0.01
        )

    @property
    def file(self) -> Path:
        return self.folder / "state.safetensors"

    def run(self, progress: Callable[..., Iterable[int]] = console.progress) -> float:
        """Fit on to the end; the final weights' mean loss on the last batches, at most 100: the
        same however often the fit was killed.
        """
        steps, first = self.options.steps, self._resume()
        if first:
            console.say(f"latents: resuming at step {first}")
        for step in progress(range(first, steps), total=steps - first, desc="latents: fit"):
            self._step(step)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                self._save(step + 1)
        with torch.no_grad():
            losses = [float(self._loss(step)) for step in range(max(steps - 100, 0), steps)]
        return float(np.mean(losses))

    def _loss(self, step: int) -> Float[Tensor, ""]:
        """Of the batch of a step; noise levels are stratified."""
        batch, random = self.options.batch, np.random.Philox
        generator = np.random.Generator(
            random(np.random.SeedSequence((self.options.seed, 2, step)))
        )
        rows = torch.from_numpy(generator.integers(len(self.z), size=batch)).to(self.z.device)
        noise = generator.standard_normal((batch, self.z.shape[1]), np.float32)
        uniform = ((np.arange(batch) + generator.random(batch)) / batch).astype(np.float32)
        return self.model.loss(
            self.z[rows],
            torch.from_numpy(noise).to(self.z.device),
            torch.from_numpy(uniform).to(self.z.device),
        )

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * _schedule(step, self.options.steps)
        self.optimizer.zero_grad()
        loss = self._loss(step)
        loss.backward()
        self.optimizer.step()
        decay = min(self.options.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.averages[name].lerp_(parameter, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, with mean and deviation."""
        return {**self.averages, "mean": self.model.mean, "std": self.model.std}

    def _save(self, done: int) -> None:
        tensors = {"done": torch.tensor(done)}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight.{name}"] = parameter
            tensors[f"average.{name}"] = self.averages[name]
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        write_tensors(self.file, tensors)

    @torch.no_grad()
    def _resume(self) -> int:
        """The steps that were done before."""
        if not self.file.is_file():
            return 0
        tensors = load_file(self.file)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            self.averages[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to(
                    "cpu" if moment == "step" else parameter.device
                )
                for moment in MOMENTS
            }
        return int(tensors["done"])


def _schedule(step: int, steps: int) -> float:
    """A rise over the first steps, then a fall by a cosine to a tenth."""
    rise = min((step + 1) / min(100, steps), 1.0)
    return rise * (0.55 + 0.45 * float(np.cos(np.pi * step / steps)))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file in one step."""
    payload = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    console.write_bytes_atomic(file, payload)


def write_latents(run: Run, config: LatentConfig, weights: dict[str, Tensor], record: Any) -> None:
    """The latent model of a run, its record last."""
    (run.path / RECORD_NAME).unlink(missing_ok=True)
    write_tensors(run.path / WEIGHTS_NAME, weights)
    console.write_json_atomic(run.path / RECORD_NAME, {**record, "config": asdict(config)})


def latents_record(run: Run) -> dict[str, Any]:
    """What latents.json says; a `ValueError` where there is none or its encoder has moved on."""
    file, state = run.path / RECORD_NAME, run.state()
    if not file.is_file():
        raise ValueError(
            f"{run.path} has no latent model, so nothing can be painted without a condition; run "
            f"python -m jobs.latents {run.path} PACKS"
        )
    record = json.loads(file.read_text())
    checkpoint = state.checkpoint if state else None
    if record["checkpoint"] != checkpoint:
        raise ValueError(
            f"the latent model of {run.path} was fitted to {record['checkpoint']}, the run is at "
            f"{checkpoint}, whose encoder makes other vectors; run python -m jobs.latents again"
        )
    return dict(record)


def load_latents(run: Run) -> LatentDenoiser:
    """The fitted latent model of a run."""
    model = LatentDenoiser(LatentConfig(**latents_record(run)["config"]))
    model.load_state_dict(load_file(run.path / WEIGHTS_NAME))
    return model.eval().requires_grad_(False)
