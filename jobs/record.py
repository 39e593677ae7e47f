"""What a run's folder says of itself, read without torch (`jobs.run` has the layout).

`gigabrush info` runs on login nodes, where importing torch takes longer than reading the answer.
"""

import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_NAME, STATE_NAME, METRICS_NAME = "config.json", "state.json", "metrics.jsonl"
HEARTBEAT_S = 30.0
STALE_AFTER_S = 4 * HEARTBEAT_S
SPLIT_NAMES = {"val": "validation", "test": "test", "train": "training"}
"""Of the regions on which a held-out error was measured, for people."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands: `checkpoint` is what to resume from, `seconds` the training so far,
    `cpu_seconds` what that took of all cores of the first rank, `parts` the steps and seconds of
    every part of the denoiser that is trained on its own, `errors` the least held-out error of
    each so far and `measured` the last step at which it was measured, `early` of the
    parts that know their early weights whether these are still to come (`jobs.averages`).
    """

    status: str
    step: int
    owner: str
    heartbeat: float
    seconds: float
    checkpoint: str | None
    restarts: int
    job_id: str | None
    parts: dict[str, list[int | float]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    early: dict[str, bool] = field(default_factory=dict)

    @property
    def host_and_process(self) -> tuple[str, str]:
        """Where the process that owns the run is, or was."""
        host, process, _ = self.owner.split(":")
        return host, process

    def is_alive(self) -> bool:
        """Whether a process is training the run now, as far as can be told from here."""
        host, process = self.host_and_process
        fresh = time.time() - self.heartbeat < STALE_AFTER_S
        alive = host != socket.gethostname() or Path(f"/proc/{process}").exists()
        return self.status == "running" and fresh and alive


def read_record(run: Path) -> dict[str, Any]:
    """What config.json holds: the configuration, the commit, the command and its directory; a
    `ValueError` where there is no run.
    """
    file = run / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{run} is not a run; train one with python -m jobs.train")
    return json.loads(file.read_text())


def read_state(run: Path) -> RunState | None:
    """The recorded state, None before the first."""
    file = run / STATE_NAME
    return RunState(**json.loads(file.read_text())) if file.is_file() else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / METRICS_NAME
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def generated_by_others(images: Path, run: Path) -> bool:
    """Whether a folder holds a finished image of another checkpoint than the run's newest."""
    state = read_state(run)
    found = (json.loads(file.read_text())["identity"] for file in images.glob("*.json"))
    return any(state is None or one["checkpoint"] != state.checkpoint for one in found)


def commit() -> str:
    """The commit of the working copy that runs, or "unknown" outside one."""
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
