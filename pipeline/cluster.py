"""Where work runs: in this process, on this machine's cores, on SLURM, or on a Dask scheduler at
an address.

All four are a `Workers`: tasks go in, results come out in the order in which they end, and the
caller keeps no more of them in flight than `capacity`. A task is a picklable function of picklable
arguments and may run twice (a worker died), so it must be idempotent. An error in a task is its
result.

On SLURM every worker is a job of its own. It leaves before its time is up, handing on what it has
not done, and another job takes its place. Partition, account and limits are what the SBATCH_
variables say, which sbatch reads itself; what else a site needs (the network interface, say) is
dask-jobqueue's configuration, a file or DASK_JOBQUEUE__SLURM__ variables.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

WORKER_MEMORY = "8GB"
WORKERS_WITHIN_S = 600
IN_FLIGHT_PER_WORKER = 2
# The profiler looks a hundred times a second, and a task is one call into a C library.
SETTINGS = {
    "distributed.comm.timeouts.connect": "30s",
    "distributed.worker.profile.interval": "200ms",
}


@runtime_checkable
class Workers(Protocol):
    """Something that runs tasks."""

    @property
    def capacity(self) -> int:
        """How many tasks to keep in flight."""

    @property
    def dashboard(self) -> str | None:
        """The address of a page that shows what the workers do, where there is one."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a task."""

    def next_result(self) -> tuple[tuple[Any, ...], Any]:
        """Wait for a task to end; its arguments and its result, or the exception it raised."""


class InlineWorkers:
    """Runs one task at a time in this process, when its result is asked for."""

    capacity = 1
    dashboard = None

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a task."""
        self._waiting.append((function, arguments))

    def next_result(self) -> tuple[tuple[Any, ...], Any]:
        """Run the oldest task."""
        function, arguments = self._waiting.popleft()
        try:
            return arguments, function(*arguments)
        except Exception as error:
            return arguments, error


class DaskWorkers:
    """Runs tasks on the workers of a Dask client."""

    def __init__(self, client: Any) -> None:
        from distributed import as_completed

        self._client = client
        self._done = as_completed()
        self._arguments: dict[str, tuple[Any, ...]] = {}

    @property
    def capacity(self) -> int:
        """Two tasks for every thread that is there now."""
        return IN_FLIGHT_PER_WORKER * max(1, sum(self._client.nthreads().values()))

    @property
    def dashboard(self) -> str | None:
        """Where the scheduler's dashboard is."""
        try:
            link: str | None = self._client.dashboard_link
        except KeyError:  # a scheduler that was started without one
            return None
        return link or None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Send a task to the scheduler."""
        future = self._client.submit(function, *arguments, pure=False)
        self._arguments[future.key] = arguments
        self._done.add(future)

    def next_result(self) -> tuple[tuple[Any, ...], Any]:
        """Wait for any task to end."""
        future = next(self._done)
        arguments = self._arguments.pop(future.key)
        error = future.exception()
        return arguments, future.result() if error is None else error


@contextlib.contextmanager
def connect(
    where: str, workers: int | None = None, logs: Path = Path("slurm-logs")
) -> Iterator[Workers]:
    """Open the workers that `where` names: inline, local, slurm, or tcp://HOST:PORT.

    `workers` is the number of processes (local: the cores this process may use; slurm: one job
    each, 1 unless given; an address: how many to wait for). `logs` is the folder for what the
    workers on SLURM say.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers} and must be at least 1")
    if where == "inline":
        yield InlineWorkers()
        return
    if where not in ("local", "slurm") and "://" not in where:
        raise ValueError(
            f"--cluster is {where!r} and must be inline, local, slurm or the address of a Dask "
            "scheduler "
            "(tcp://HOST:PORT)"
        )
    import dask
    from distributed import Client

    with contextlib.ExitStack() as stack:
        stack.enter_context(_unchanged_environment())
        stack.enter_context(dask.config.set(SETTINGS))
        address: Any = where
        if where == "local":
            address = stack.enter_context(_local_cluster(workers))
        elif where == "slurm":
            address = stack.enter_context(_slurm_cluster(workers or 1, logs))
        try:
            client = stack.enter_context(Client(address))
        except OSError as error:
            raise ValueError(
                f"no Dask scheduler answers at {where} ({error}); start one there"
            ) from error
        if where == "local":
            from pipeline.worker_log import QuietHeartbeat

            client.register_plugin(QuietHeartbeat())
        if address == where and workers is not None:
            try:
                client.wait_for_workers(workers, timeout=WORKERS_WITHIN_S)
            except TimeoutError as error:
                raise ValueError(
                    f"{len(client.nthreads())} of {workers} Dask workers came to {where} within "
                    f"{WORKERS_WITHIN_S} s; see what the others say, or ask for fewer --workers"
                ) from error
        yield DaskWorkers(client)


@contextlib.contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Undo what Dask writes into this process's environment for its workers to inherit.

    It sets OMP_NUM_THREADS=1 and its like, which would hold torch, imported later in the same
    process, to one core.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _local_cluster(workers: int | None) -> Any:
    from distributed import LocalCluster

    return LocalCluster(
        n_workers=workers or len(os.sched_getaffinity(0)),
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",
    )


def _slurm_cluster(workers: int, logs: Path) -> Any:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ValueError(
            "--cluster slurm needs dask-jobqueue, which is not installed: pip install "
            "dask-jobqueue"
        ) from error
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--cluster slurm submits jobs and there is no sbatch here; run it where there is, or "
            "submit slurm/ingest.sbatch, whose workers are part of its own job"
        )
    import dask

    configured = dask.config.get("jobqueue.slurm")
    walltime = os.environ.get("SBATCH_TIMELIMIT") or configured["walltime"]
    limit_s = slurm_seconds(walltime)
    logs.mkdir(parents=True, exist_ok=True)
    cluster = SLURMCluster(
        cores=1,
        processes=1,
        memory=configured["memory"] or WORKER_MEMORY,
        walltime=walltime,
        log_directory=str(logs),
        worker_extra_args=[
            "--no-dashboard",
            *lifetime_arguments(limit_s),
            *configured["worker-extra-args"],
        ],
        scheduler_options={"dashboard_address": ":0", **configured["scheduler-options"]},
    )
    # A site that refuses these jobs would otherwise be asked again and again, without a word.
    trial = subprocess.run(
        ["sbatch", "--test-only"], input=cluster.job_script(), text=True, capture_output=True
    )
    if trial.returncode != 0:
        cluster.close()
        raise ValueError(
            f"SLURM refuses the jobs of Dask workers: {trial.stderr.strip()}; export what your "
            "site wants, such as SBATCH_PARTITION, SBATCH_ACCOUNT or SBATCH_TIMELIMIT"
        )
    cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)  # replaces those that end
    return cluster


def lifetime_arguments(limit_s: int) -> list[str]:
    """Options by which Dask workers leave one by one within the last part of their time limit: at
    three quarters of it, give or take an eighth.
    """
    return ["--lifetime", f"{limit_s * 3 // 4}s", "--lifetime-stagger", f"{limit_s // 8}s"]


def slurm_seconds(limit: str) -> int:
    """The seconds of a time limit as SLURM writes them: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if len(parts) > 3:
            raise ValueError
        if dash:
            hours, minutes, seconds = [*parts, 0, 0][:3]
            return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    except ValueError:
        raise ValueError(
            "the time limit of SLURM jobs (SBATCH_TIMELIMIT, or Dask's own walltime) is "
            f"{limit!r}; write minutes, H:MM:SS or D-HH:MM:SS"
        ) from None
    if len(parts) < 3:
        parts = [0, *parts, *[0] * (2 - len(parts))]
    hours, minutes, seconds = parts
    return (hours * 60 + minutes) * 60 + seconds
