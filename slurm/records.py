"""What was submitted, and how it fares, without an accounting database.

    slurm-logs/STAGE-JOBID.json     what was submitted
    slurm-logs/STAGE-JOBID.log      what it said; its last line is how it ended

A job that squeue lists is what squeue says. Any other has ended, and the last line of its log,
which every batch script of this folder writes, says with which exit code; where that line is
missing the job was killed, and where there is no log it never began.
"""

import json
import re
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import console

ENDED = re.compile(r": ended with exit code (\d+)\s*\Z")
MEANINGS = {
    console.EXIT_DONE: "done",
    console.EXIT_PARTIAL: "done, but some inputs failed",
    console.EXIT_PREEMPTED: "preempted, not done; submit it again",
    143: "stopped before its end",
}
TAIL_BYTES = 500


@dataclass(frozen=True)
class Record:
    """One submitted job; `log` is its log's path as SLURM was told, `%` for numbers."""

    job_id: str
    stage: str
    command: str
    after: tuple[str, ...]
    log: str

    def write(self, folder: Path) -> None:
        console.write_json_atomic(folder / f"{self.stage}-{self.job_id}.json", asdict(self))

    @property
    def log_pattern(self) -> str:
        """The log's path, with a star where an array has many."""
        named = self.log.replace("%j", self.job_id).replace("%A", self.job_id)
        return named.replace("%a", "*")

    def describe(self) -> str:
        waits = f" after {', '.join(self.after)}" if self.after else ""
        return f"job {self.job_id} ({self.stage}){waits}; log {self.log_pattern}"

    def ending(self) -> str:
        """How the job ended, from its logs."""
        pattern = Path(self.log_pattern)
        ends = Counter(_ending(log) for log in pattern.parent.glob(pattern.name))
        if not ends:
            return "never began (cancelled, or a job that it waited for failed)"
        if ends.total() == 1:
            return next(iter(ends))
        return ", ".join(f"{count} {end}" for end, count in ends.items())


def _ending(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - TAIL_BYTES, 0))
        found = ENDED.search(stream.read().decode(errors="replace"))
    if found is None:
        return "killed (its time limit, its memory, or its node)"
    code = int(found[1])
    return MEANINGS.get(code, f"failed with exit code {code}")


def print_status(folder: Path) -> None:
    """One line for every job that was submitted from here."""
    contents = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    records = [Record(**{**content, "after": tuple(content["after"])}) for content in contents]
    if not records:
        raise ValueError(f"{folder} has no records; nothing was submitted from this folder")
    waiting = _queue()
    for record in sorted(records, key=lambda record: int(record.job_id)):
        where = waiting.get(record.job_id) or record.ending()
        console.say(f"{record.job_id:>9}  {record.stage:<9}{where}; {record.log_pattern}")


def _queue() -> dict[str, str]:
    """What squeue says of this user's jobs, arrays counted together."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F|%T|%M|%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"squeue does not answer on this machine ({error})") from error
    states: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        job_id, state, elapsed, where = line.split("|", 3)
        text = f"running for {elapsed} on {where}"
        if state != "RUNNING":
            text = f"{state.lower()} {where}".strip()
        states.setdefault(job_id, Counter())[text] += 1
    return {
        job_id: ", ".join(f"{n} {text}" if n > 1 else text for text, n in counted.items())
        for job_id, counted in states.items()
    }
