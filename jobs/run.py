"""A training run on disk: what it resolved to, where it stands, and the weights it made.

    run/config.json             resolved configuration, the commit and the command it was made with
    run/state.json              running, preempted, done or failed; step; owner; heartbeat
    run/metrics.jsonl           one line every few steps
    run/tensorboard/            the same as TensorBoard events
    run/samples/                a small picture at every checkpoint
    run/checkpoints/step-N/     weights.safetensors, ema.safetensors and other averages
                                (`jobs.averages`), deepspeed/

Sampling reads config.json and safetensors only. A run has one owner: a process that finds another
name in state.json has been superseded and stops before it writes.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from conditioning.tokens import TokenScale
from jobs.record import (
    CONFIG_NAME,
    METRICS_NAME,
    STATE_NAME,
    RunState,
    commit,
    read_record,
    read_state,
)
from model.cascade.config import NETWORK
from model.cascade.range import ValueRange
from model.config import DenoiserConfig, config_from_dict
from model.family import Denoiser, make_denoiser
from model.process import Octaves
from model.spectrum import NoiseSpectrum
from pipeline import console
from pipeline.packfile import PackSettings, PackStatistics, tuples_from_json

CHECKPOINTS_KEPT = 2
TRAINED = "trained"
"""In a file of weights: the parts of the denoiser that its run trains."""
FORM = "network"
"""In a file of weights: the form of a cascade's networks that they are of."""
CHECKPOINT_BYTES_PER_PARAMETER = 28
"""Weights, three averages, and DeepSpeed's weights with two moments, all in float32."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run trains, and what sampling needs to know of it.

    training: the options that change the trajectory of training (see `jobs.train`).
    """

    preset: str
    denoiser: DenoiserConfig
    octaves: Octaves
    packs: PackSettings
    statistics: PackStatistics
    training: dict[str, Any]

    def token_scale(self) -> TokenScale:
        return TokenScale(
            np.array(self.statistics.token_mean, np.float32),
            np.array(self.statistics.token_std, np.float32),
        )

    def value_range(self) -> ValueRange | None:
        """What values generated images can have, where the packs say so."""
        found = self.statistics
        if not found.low:
            return None
        parts = (found.colour, found.mean, found.low, found.high)
        return ValueRange(*(torch.tensor(part, dtype=torch.float64) for part in parts))

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunConfig":
        values = tuples_from_json(content)
        octaves = values["octaves"]
        return cls(
            preset=values["preset"],
            denoiser=config_from_dict(values["denoiser"]),
            octaves=Octaves(octaves["signal"], octaves["residual"], _spectrum(octaves["noise"])),
            packs=PackSettings.from_json(values["packs"], "the packs of this run"),
            statistics=PackStatistics(**values["statistics"]),
            training=values["training"],
        )


class SupersededError(RuntimeError):
    """Another process owns this run now."""


class Run:
    """A run's folder. Ranks other than 0 only read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{time.time():.3f}"
        self._events: SummaryWriter | None = None

    def config(self) -> RunConfig:
        """The resolved configuration; a `ValueError` where there is no run."""
        return RunConfig.from_json(read_record(self.path)["config"])

    def state(self) -> RunState | None:
        """The recorded state, None before the first."""
        return read_state(self.path)

    def claim(self, config: RunConfig, command: str | None = None) -> RunState:
        """Become the owner of a new run, or of one with the same configuration.

        `command` is kept for people, with the directory in which it was given.
        """
        before = self.state()
        if before is not None:
            self._refuse_other(before, config)
        else:
            record = {"commit": commit(), "command": command, "directory": os.getcwd()}
            console.write_json_atomic(
                self.path / CONFIG_NAME, {**record, "config": config.to_json()}
            )
        state = RunState(
            status="running",
            step=before.step if before else 0,
            owner=self.owner,
            heartbeat=time.time(),
            seconds=before.seconds if before else 0.0,
            cpu_seconds=before.cpu_seconds if before else 0.0,
            checkpoint=before.checkpoint if before else None,
            parts=before.parts if before else {},
            errors=before.errors if before else {},
            measured=before.measured if before else {},
            early=before.early if before else {},
            restarts=before.restarts + 1 if before else 0,
            job_id=os.environ.get("SLURM_JOB_ID"),
        )
        self._write_state(state)
        return state

    def _refuse_other(self, before: RunState, config: RunConfig) -> None:
        host, pid = before.host_and_process
        requeued = before.job_id is not None and before.job_id == os.environ.get("SLURM_JOB_ID")
        if before.is_alive() and not requeued:
            raise ValueError(
                f"{self.path} is being trained by process {pid} on {host}; "
                "wait for it, stop it, or choose another --run"
            )
        self.check_same(config)

    def check_same(self, config: RunConfig) -> None:
        """A `ValueError` that names what this run was started with otherwise than `config`."""
        recorded, wanted = self.config().to_json(), config.to_json()
        for name in ("preset", "denoiser", "packs", "training"):
            if recorded[name] != wanted[name]:
                there, here = _first_difference(recorded[name], wanted[name])
                raise ValueError(
                    f"{self.path} was started with {name}: {there}, this command asks for "
                    f"{here}; choose another --run or repeat the first command"
                )

    def update(self, **changes: Any) -> RunState:
        """Change fields of the state, unless another process has taken the run over."""
        state = replace(self.check_owner(), heartbeat=time.time(), **changes)
        self._write_state(state)
        return state

    def check_owner(self) -> RunState:
        """The state; a `SupersededError` when another process has taken the run over."""
        state = self.state()
        if state is None or state.owner != self.owner:
            raise SupersededError(f"{self.path} now belongs to {state and state.owner}")
        return state

    def fail(self) -> None:
        """Record that this process ended in an error, if the run is still its own."""
        state = self.state()
        if state is not None and state.owner == self.owner:
            self.update(status="failed")

    def _write_state(self, state: RunState) -> None:
        console.write_json_atomic(self.path / STATE_NAME, asdict(state))

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def write_weights(
        self, step: int, name: str, weights: Mapping[str, Tensor], trained: Sequence[str]
    ) -> None:
        """Write NAME.safetensors of a checkpoint, and in it the names of the parts of the denoiser
        that this run trains and the form of a cascade's networks.
        """
        folder = self.checkpoint_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{name}.partial"
        values = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(values, temporary, {TRAINED: " ".join(trained), FORM: str(NETWORK)})
        temporary.replace(folder / f"{name}.safetensors")

    def read_weights(self, step: int, name: str) -> dict[str, Tensor]:
        """Read NAME.safetensors of a checkpoint."""
        return load_file(self.checkpoint_folder(step) / f"{name}.safetensors")

    def checkpoint_bytes(self, parameters: int) -> int:
        """Most that checkpoints will add to the disk: those kept, and one being written."""
        there = len(list((self.path / "checkpoints").glob("step-*")))
        missing = max(CHECKPOINTS_KEPT + 1 - there, 1)
        return missing * CHECKPOINT_BYTES_PER_PARAMETER * parameters

    def own_engine_state(self, checkpoint: str) -> Path:
        """DeepSpeed's folder of a checkpoint; a `ValueError` when any of it is another user's.

        It holds pickles, and a pickle runs whatever code it holds.
        """
        folder = self.path / "checkpoints" / checkpoint / "deepspeed"
        foreign = [p for p in (folder, *folder.rglob("*")) if _is_foreign(p)]
        if foreign:
            raise ValueError(
                f"{foreign[0]} belongs to another user (number {foreign[0].stat().st_uid}, you "
                f"are {os.geteuid()}) and can run code when it is loaded, so this run is not "
                "resumed; start another --run with --init-from "
                f"{folder.parent / 'weights.safetensors'}"
            )
        return folder

    def drop_old_checkpoints(self) -> None:
        """Keep the newest checkpoints that state.json knows of; sweep the rest."""
        state = self.state()
        if state is None or state.checkpoint is None:
            return
        folders = sorted(p for p in (self.path / "checkpoints").glob("step-*") if p.is_dir())
        known = [p for p in folders if p.name <= state.checkpoint]
        for folder in {*folders} - {*known[-CHECKPOINTS_KEPT:]}:
            shutil.rmtree(folder)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line, unless another process has taken the run over."""
        self.check_owner()
        with (self.path / METRICS_NAME).open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step as TensorBoard events, by their tags."""
        if self._events is None:
            self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will repeat."""
        file = self.path / METRICS_NAME
        if file.is_file():
            lines = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
            console.write_bytes_atomic(file, "".join(f"{line}\n" for line in lines).encode())

    def load_denoiser(self, *, device: torch.device, weights: str = "ema") -> Denoiser:
        """The denoiser of the newest checkpoint, ready to be evaluated."""
        config, state = self.config(), self.state()
        if state is None or state.checkpoint is None:
            raise ValueError(f"{self.path} has no checkpoint yet; let python -m jobs.train run on")
        denoiser = make_denoiser(config.denoiser, config.octaves)
        file = self.path / "checkpoints" / state.checkpoint / f"{weights}.safetensors"
        denoiser.load_state_dict(load_file(file))
        return denoiser.to(device).eval().requires_grad_(False)

    def load_early(self, *, device: torch.device) -> Denoiser | None:
        """A cascade as it was early in its training, None where that was not kept."""
        return self.load_denoiser(device=device, weights="early") if self.keeps_early() else None

    def keeps_early(self) -> bool:
        """Whether the newest checkpoint holds weights early in the training."""
        state = self.state()
        if state is None or state.checkpoint is None:
            return False
        return (self.path / "checkpoints" / state.checkpoint / "early.safetensors").is_file()


def trained_parts(file: Path) -> tuple[str, ...]:
    """Which parts of a denoiser the run trained that wrote this file of weights."""
    return tuple(_metadata(file).get(TRAINED, "").split())


def network_form(file: Path) -> int:
    """Of which form of a cascade's networks the weights of a file are; the first said nothing."""
    return int(_metadata(file).get(FORM, 1))


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, "pt") as weights:
        return weights.metadata() or {}


def _spectrum(content: Mapping[str, Any]) -> NoiseSpectrum:
    """From JSON; older runs also name a floor, which only joint pyramids had."""
    return NoiseSpectrum(content["top_level"], content["mollifier_sigma_px"])


def _is_foreign(file: Path) -> bool:
    return file.exists() and file.stat().st_uid != os.geteuid()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the line that a kill cut short
        return 2**62


def _first_difference(a: Any, b: Any) -> tuple[str, str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key):
                return f"{key} = {a.get(key)!r}", f"{key} = {b.get(key)!r}"
    return repr(a), repr(b)
