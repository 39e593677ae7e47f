"""Variants of a cascade at equal CPU seconds, from a table to JSON lines.

    python tests/benchmarks/recipe.py docs/recipe/blocks.toml --out recipe --workers 2

The table (TOML) names stores and variants. A variant trains some blocks of a cascade, on one
thread, for so many CPU seconds (of the process, so that a busy machine changes nothing), once for
every store and seed. What stays the same is taken from elsewhere: blocks that follow from the
first variant above it in the table that trained such a block on this store, parents of its first
block from the real image. Then its regions are generated, those that were held out where there are
any: under the real means of the parents of its first block, or from tokens alone where that is the
top block.

A line of OUT/results.jsonl holds the error of F by block, log-SNR and octave on held-out windows;
power per octave and seams, generated and real; Crop FID in the middle features of
EfficientNet-lite0 and KID in its last ones against the real crops of the same places
(jobs.evaluate has the protocol); steps, parameters, seconds, peak memory, hardware and commit.
Errors compare variants of the same blocks; what was generated compares all. A line that is there
is not made again, and a killed command goes on where it was. A variant that names another one as
`against` is stopped where two seeds on one store have a higher Crop FID than that: its other jobs
are not done. --show prints what is there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from recipe_table import Job, Study, Table
from recipe_trial import Trial

from pipeline import console


@dataclass(frozen=True)
class RecipeOptions:
    """Try the variants of a table on one thread each, and measure them.

    python tests/benchmarks/recipe.py table.toml --out recipe --workers 2
    """

    table: Annotated[Path, tyro.conf.Positional]
    """The TOML file of stores and variants."""
    out: Path
    """Folder of everything that it makes; results.jsonl has a line for each job."""
    workers: int = 1
    """Jobs at a time, each on one thread."""
    only: tuple[str, ...] = ()
    """Names of variants; by default all of the table."""
    job: str | None = None
    """One job, VARIANT/STORE/SEED, in this process."""
    show: bool = False
    """Print the results as a table and stop."""


def recipe(options: RecipeOptions) -> int:
    """Run the command; returns its exit code."""
    study = Study(Table.read(options.table), options.out)
    if options.show:
        console.say(to_markdown(study))
        return console.EXIT_DONE
    if options.job is not None:
        variant, store, seed = options.job.split("/")
        job = Job(variant, store, int(seed))
        line = Trial(study, job).line()
        with study.results.open("ab", buffering=0) as file:  # one write, beside other jobs'
            file.write(f"{json.dumps(line)}\n".encode())
        return console.EXIT_DONE
    for name in options.only:
        study.table.variant(name)
    done, wanted = study.done(), options.only or [variant.name for variant in study.table.variants]
    jobs = [job for job in study.jobs() if job.variant in wanted and job not in done]
    needed = {job: {*study.sources(job).values()} - {job} for job in jobs}
    for job, others in needed.items():
        for other in others - {*jobs}:
            if not study.is_trained(other):
                raise ValueError(
                    f"{job} needs the run of {other}, which is not there; add it to --only, or "
                    "its store and seed to its variant"
                )
    for job in jobs:  # stores and packs are shared, so that they are made here
        _, config = study.config_of(study.table.variant(job.variant))
        study.packs_of(job, config)
    running: dict[Job, Future[int]] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        for job in jobs:  # what a job needs stands above it, so that it has begun before it
            first = [running[other] for other in needed[job] if other in running]
            running[job] = pool.submit(_work, study, job, options, first)
    console.say(to_markdown(study))
    failed = any(future.result() for future in running.values())
    return console.EXIT_PARTIAL if failed else console.EXIT_DONE


def _work(study: Study, job: Job, options: RecipeOptions, first: Sequence[Future[int]]) -> int:
    """A job in a process of its own, once those that it needs have ended."""
    wait(first)
    if study.is_refuted(study.table.variant(job.variant)):
        console.say(f"recipe: {job} is not done: two seeds were worse")
        return 0
    log = study.out / "logs" / f"{str(job).replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(options.table), "--out", str(study.out)]
    with log.open("a") as file:
        code = subprocess.run(
            [*command, "--job", str(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    console.say(f"recipe: {job} {'done' if code == 0 else f'failed, see {log}'}")
    return code


def to_markdown(study: Study) -> str:
    """A row for each variant and store: the seeds' values side by side."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in study.lines():
        rows.setdefault((row["store"], row["variant"]), []).append(row)
    lines = [
        "| store | variant | steps | error of F by octave, fine to coarse | Crop FID | KID | "
        "log2 power, fine to coarse | seams at 8, 32 px (real) | CPU s a Mpx |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (store, variant), found in sorted(rows.items()):
        first = found[0]
        steps = ", ".join(f"{k} {v}" for k, v in first["steps"].items())
        errors = "; ".join(f"{part} {_mean_errors(part, found)}" for part in first["errors"])
        ratios = [[o["log2_ratio"] for o in row["octaves"]] for row in found]
        power = np.mean(np.array(ratios, float), axis=0)  # None, where there is none, is nan
        cells = [
            store,
            variant,
            steps,
            errors,
            " ".join(f"{row['crop_fid']['value']:.0f}" for row in found),
            " ".join(f"{row['kid']['value']:.3f}" for row in found),
            " ".join("–" if np.isnan(value) else f"{value:+.2f}" for value in power),
            " ".join(
                f"{np.mean([row['seams'][i]['generated'] for row in found]):.3f} "
                f"({first['seams'][i]['real']:.3f})"
                for i in (0, 1)
            ),
            f"{np.mean([row['seconds_per_mpx'] for row in found]):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_errors(part: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Over seeds and log-SNRs, octave by octave."""
    means = np.mean([row["errors"][part]["held_out"] for row in found], axis=(0, 1))
    return " ".join(f"{value:.3f}" for value in means)


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(RecipeOptions, recipe, argv, prog="python tests/benchmarks/recipe.py")


if __name__ == "__main__":
    raise SystemExit(main())
