"""What becomes of a training job whose ranks have ended: python -m slurm.requeue CODE ARGUMENTS.

CODE is srun's exit code, ARGUMENTS are those of jobs.train. Exit codes do not tell all, since a
launcher has its own; the run's state.json does. A run that this job trained and that was preempted
is requeued, to go on from its checkpoint; a job that is being cancelled is not.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.console import EXIT_DONE, EXIT_PREEMPTED, say


def after_training(code: int, state: dict[str, Any] | None, job_id: str) -> int:
    """Requeue the job if its run was preempted; returns the job's exit code."""
    if state is None or state["job_id"] != job_id:
        return code  # refused before it began, or superseded
    if state["status"] == "done":
        return EXIT_DONE
    if state["status"] != "preempted":
        return code
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id],
        capture_output=True,
        text=True,
        check=True,
    )
    if re.search(r"\bJobState=RUNNING\b", shown.stdout):
        say(f"train: preempted at step {state['step']}, requeueing job {job_id}")
        # This ends the job, and with it this process.
        if subprocess.run(["scontrol", "requeue", job_id], check=False).returncode != 0:
            say("train: it cannot be requeued here; the same command goes on with the run")
    return EXIT_PREEMPTED


def main(argv: Sequence[str] | None = None) -> int:
    code, *arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="slurm.requeue", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    file = parser.parse_known_args(arguments)[0].run / "state.json"
    state = json.loads(file.read_text()) if file.is_file() else None
    return after_training(int(code), state, os.environ["SLURM_JOB_ID"])


if __name__ == "__main__":
    raise SystemExit(main())
