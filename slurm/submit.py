"""python -m slurm.submit: submit a stage, or a chain of them, to SLURM.

    python -m slurm.submit train --nodes 2 --gpus-per-node 8 -- packs --run run
    python -m slurm.submit --chain main.chain
    python -m slurm.submit --status

What stands after `--` is the stage's own command line. It is read by the stage's own options
before anything is submitted, so that a typo costs seconds and not a wait in the queue. A chain is
a file with one such command a line, each job waiting for the one before it to end well. What is
submitted is one of the batch scripts of this folder; a site's wishes (account, partition, limits)
are SLURM's own variables, SBATCH_ACCOUNT and so on, exported by the shell or by the file site.env.
"""

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from jobs.cli import STAGES
from pipeline import console
from slurm.records import Record, print_status

FOLDER = Path(__file__).absolute().parent
SITE_FILE = Path("site.env")
SCRIPTS = {
    name: FOLDER / f"{name}.sbatch" for name in STAGES if (FOLDER / f"{name}.sbatch").is_file()
}
ON_MANY_NODES = ("ingest", "train")
PASSED_ON = ("nodes", "gpus_per_node", "cpus_per_task", "mem", "time", "partition", "account")


@dataclass(frozen=True)
class Submit:
    """Submit a stage, or a chain of them, to SLURM.

        python -m slurm.submit train --nodes 2 --gpus-per-node 8 -- packs --run run
        python -m slurm.submit --chain main.chain
        python -m slurm.submit --status

    What stands after -- is the stage's own command line, checked before it is queued. Options that
    are not given are the batch script's, or those of SBATCH_ variables in site.env.
    """

    stage: Annotated[str | None, tyro.conf.Positional] = None
    """What to run: ingest, pretrain, embed, pack, train, sample or evaluate."""
    chain: Path | None = None
    """Instead of a stage: a file with one STAGE [OPTIONS] -- ARGUMENTS a line, each to run after
    the one before it. Options of this command hold for all lines that do not give their own.
    """
    status: bool = False
    """Instead of a stage: what became of the jobs that were submitted from here."""
    nodes: int | None = None
    """Nodes of the job (ingest and train)."""
    gpus_per_node: int | None = None
    """GPUs on each node, for train one rank each; 0 on a cluster without."""
    cpus_per_task: int | None = None
    """CPU cores of each rank, or of each node for ingest."""
    mem: str | None = None
    """Memory of each node, as SLURM writes it: 64G."""
    time: str | None = None
    """Time limit, as SLURM writes it: 4:00:00 or 1-12 (a day and a half)."""
    partition: str | None = None
    """Partition of the cluster, as sinfo lists them."""
    account: str | None = None
    """Whom the time is charged to, where the site asks."""
    array: int | None = None
    """Jobs among which the regions are shared (sample)."""
    after: tuple[str, ...] = ()
    """Numbers of jobs that must end well first."""
    logs: Path = Path("slurm-logs")
    """Folder of the logs and of the records of what was submitted."""
    dry_run: bool = False
    """Print what would be submitted and stop."""


@dataclass(frozen=True)
class Job:
    """One job to submit: options, and the stage's own arguments."""

    stage: str
    options: Submit
    arguments: tuple[str, ...]

    def command(self, after: Sequence[str]) -> list[str]:
        """The sbatch command of the job, which waits for the jobs `after`."""
        options, command = self.options, ["sbatch", "--parsable", "--export=ALL"]
        for name in PASSED_ON:
            value = getattr(options, name)
            command += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
        if self.stage == "train" and options.gpus_per_node is not None:
            command.append(f"--ntasks-per-node={max(options.gpus_per_node, 1)}")
        if options.array is not None:
            command.append(f"--array=1-{options.array}")
        if after:
            command += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        return [*command, f"--output={self.log}", str(SCRIPTS[self.stage]), *self.arguments]

    @property
    def log(self) -> Path:
        """The log's path, with SLURM's signs for numbers of jobs."""
        number = "%j" if self.options.array is None else "%A_%a"
        return self.options.logs / f"{self.stage}-{number}.log"


def make_job(options: Submit, arguments: Sequence[str]) -> Job:
    """A job whose options and arguments have been checked.

    Raises a `ValueError`, or ends with the stage's own message as the stage itself would.
    """
    stage = options.stage
    if stage is None or stage not in SCRIPTS:
        raise ValueError(
            ("name what to submit" if stage is None else f"{stage!r} is nothing to submit")
            + f"; there are {', '.join(SCRIPTS)}, and --chain and --status"
        )
    if (options.nodes or 1) > 1 and stage not in ON_MANY_NODES:
        raise ValueError(f"{stage} runs on one node, not on {options.nodes}; leave --nodes out")
    if (options.gpus_per_node or 0) > 1 and stage != "train":
        raise ValueError(
            f"{stage} uses at most one GPU, and of {options.gpus_per_node} the others would idle; "
            "leave --gpus-per-node out" + (" and take --array" if stage == "sample" else "")
        )
    if options.array is not None and (stage != "sample" or options.array < 1):
        raise ValueError(f"--array takes a positive number, for sample; not {options.array}")
    strange = [number for number in options.after if not number.isdecimal()]
    if strange:
        raise ValueError(f"--after takes numbers of jobs, not {strange[0]!r}")
    console.parse(options_of(STAGES[stage][0]), arguments, prog=f"submit {stage}")
    return Job(stage, options, tuple(arguments))


def options_of(module: str) -> type[Any]:
    """The options of a stage: the dataclass of its own that its main's module knows and that has
    dry_run, as all commands do.
    """
    home = importlib.import_module(module).main.__module__
    (found,) = (
        value
        for value in vars(sys.modules[home]).values()
        if isinstance(value, type)
        and (value.__module__ + ".").startswith(module + ".")
        and is_dataclass(value)
        and any(field.name == "dry_run" for field in fields(value))
    )
    return found


def read_chain(common: Submit, file: Path) -> list[Job]:
    """The jobs of a chain; the options `common` hold for every line that takes them and has none
    of its own.
    """
    if not file.is_file():
        raise ValueError(f"--chain {file} does not exist; write one STAGE -- ARGUMENTS a line")
    jobs = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        own, arguments = split(words)
        options = console.parse(Submit, own, prog=f"{file}, line {number}")
        changed = {
            field.name: getattr(options, field.name)
            for field in fields(Submit)
            if getattr(options, field.name) != field.default
        }
        try:
            for name in ("chain", "status", "dry_run", "logs"):
                if name in changed:
                    raise ValueError(f"--{name.replace('_', '-')} stands beside --chain, not here")
            jobs.append(make_job(replace(shared(common, options.stage), **changed), arguments))
        except ValueError as mistake:
            raise ValueError(f"{file}, line {number}: {mistake}") from mistake
    if not jobs:
        raise ValueError(f"{file} is empty; write one STAGE [OPTIONS] -- ARGUMENTS a line")
    return jobs


def shared(common: Submit, stage: str | None) -> Submit:
    """The options beside --chain, as far as a stage takes them."""
    gpus = common.gpus_per_node
    return replace(
        common,
        chain=None,
        nodes=common.nodes if stage in ON_MANY_NODES else None,
        gpus_per_node=gpus if stage == "train" or gpus is None else min(gpus, 1),
        array=common.array if stage == "sample" else None,
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's words, and the stage's, which stand after the first `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def submit(options: Submit, arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    if options.status:
        print_status(options.logs)
        return console.EXIT_DONE
    if options.chain is None:
        jobs = [make_job(options, arguments)]
    elif options.stage is not None or arguments:
        raise ValueError(f"--chain {options.chain} names its stages itself; leave the others out")
    else:
        jobs = read_chain(options, options.chain)
    site = site_environment(SITE_FILE)
    # The interpreter and the scripts' folder are those of this process, unless the site's differ.
    ours = {"GIGABRUSH_PYTHON": sys.executable, "GIGABRUSH_SLURM": str(FOLDER), **site}
    if options.dry_run:
        _print_plan(jobs, ours)
        return console.EXIT_DONE
    options.logs.mkdir(parents=True, exist_ok=True)
    numbers: list[str] = []
    try:
        for job in jobs:
            after = [*job.options.after, *numbers[-1:]]
            command = job.command(after)
            numbers.append(_sbatch(command, {**os.environ, **ours}))
            text = shlex.join(command)
            record = Record(numbers[-1], job.stage, text, tuple(after), str(job.log))
            record.write(options.logs)
            console.say(f"submit: {record.describe()}")
    except ValueError:
        if numbers:  # half a chain is worth nothing
            subprocess.run(["scancel", *numbers], check=False)
            console.say(f"submit: cancelled {', '.join(numbers)} again")
        raise
    console.say("submit: see how they fare with python -m slurm.submit --status")
    return console.EXIT_DONE


def site_environment(file: Path) -> dict[str, str]:
    """What a shell that reads `file` exports that this process does not have already."""
    if not file.is_file():
        return {}
    done = subprocess.run(
        ["bash", "-c", 'set -aeu; source "$1"; env -0', "bash", str(file.absolute())],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"{file} cannot be read by bash: {done.stderr.decode().strip()}")
    entries = (entry.partition("=") for entry in done.stdout.decode().split("\0") if entry)
    own = {"_", "SHLVL", "PWD", "OLDPWD"}
    return {k: v for k, _, v in entries if os.environ.get(k) != v and k not in own}


def _print_plan(jobs: Sequence[Job], ours: Mapping[str, str]) -> None:
    console.say("submit: nothing is submitted; the commands are")
    for name, value in ours.items():
        console.say(f"export {name}={shlex.quote(value)}")
    before: list[str] = []
    for job in jobs:
        command = job.command([*job.options.after, *before])
        before = [f"<{job.stage}>"]
        ranks = (job.options.nodes or 1) * max(job.options.gpus_per_node or 1, 1)
        how = f", {ranks} ranks" if job.stage == "train" and ranks > 1 else ""
        run = shlex.join(["python", "-m", STAGES[job.stage][0], *job.arguments])
        console.say(f"{shlex.join(command)}\n  # runs {run}{how}")


def _sbatch(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Submit; returns the job's number."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as missing:
        raise ValueError(
            "there is no sbatch on this machine; log in to a node from which jobs are submitted"
        ) from missing
    if done.returncode != 0:
        raise ValueError(f"sbatch refused {shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def main(argv: Sequence[str] | None = None) -> int:
    own, arguments = split(sys.argv[1:] if argv is None else argv)
    return console.run(
        Submit, lambda options: submit(options, arguments), own, prog="python -m slurm.submit"
    )


if __name__ == "__main__":
    raise SystemExit(main())
