"""Where work runs: in this process, on this machine's cores, on SLURM, or on a Dask scheduler at
an address.

All four are a `Workers`: tasks go in, results come out in the order in which they end, and the
caller keeps no more of them in flight than `capacity`. A task is a picklable function of picklable
arguments and may run twice (a worker died), so it must be idempotent. An error in a task is its
result.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

SLURM_JOB_MEMORY_GB = 8
IN_FLIGHT_PER_WORKER = 2


@runtime_checkable
class Workers(Protocol):
    """Something that runs tasks."""

    @property
    def capacity(self) -> int:
        """How many tasks to keep in flight."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a task."""

    def next_result(self) -> tuple[tuple[Any, ...], Any]:
        """Wait for a task to end; its arguments and its result, or the exception it raised."""


class InlineWorkers:
    """Runs one task at a time in this process, when its result is asked for."""

    capacity = 1

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
def connect(where: str, workers: int | None = None) -> Iterator[Workers]:
    """Open the workers that `where` names: inline, local, slurm, or tcp://HOST:PORT.

    `workers` is the number of processes (local: the cores this process may use; slurm: one job
    each, 1 unless given).
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
        stack.enter_context(dask.config.set({"distributed.comm.timeouts.connect": "30s"}))
        address = stack.enter_context(_cluster(where, workers)) if "://" not in where else where
        try:
            client = stack.enter_context(Client(address))
        except OSError as error:
            raise ValueError(
                f"no Dask scheduler answers at {where} ({error}); start one there"
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


def _cluster(where: str, workers: int | None) -> Any:
    if where == "local":
        from distributed import LocalCluster

        return LocalCluster(
            n_workers=workers or len(os.sched_getaffinity(0)),
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
        )
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ValueError(
            "--cluster slurm needs dask-jobqueue, which is not installed: pip install "
            "dask-jobqueue"
        ) from error
    cluster = SLURMCluster(cores=1, processes=1, memory=f"{SLURM_JOB_MEMORY_GB}GB")
    cluster.scale(jobs=workers or 1)
    return cluster
