"""One coordinator per store.

The lock is a file with who holds it (host, process and when that began, job) that its holder
touches every few seconds. It is dead when the holder's process is gone from this host, also where
another has its number by now, or when it has not been touched for a minute; a dead lock is taken
over. A holder that was only stopped for that long finds out and must not go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEARTBEAT_S = 5.0
DEAD_AFTER_S = 60.0
START_FIELD = 18  # of /proc/PID/stat, counted from behind the state


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock file at `path`; a `ValueError` when somebody alive holds it.

    Yields a check that raises a `ValueError` once somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = json.dumps(owner)
    own = path.with_name(f"{path.name}.{os.getpid()}.partial")
    own.write_text(text)
    try:
        while True:
            try:
                os.link(own, path)  # whole from the start, and only if there is none
                break
            except FileExistsError:
                _remove_if_dead(path)
    finally:
        own.unlink()

    def check() -> None:
        if not path.is_file() or path.read_text() != text:
            raise ValueError(
                f"process {os.getpid()} has lost {path.parent} to another one, as it stood still "
                f"for more than {DEAD_AFTER_S:.0f} s; end the other, or let it finish"
            )

    released = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, released), daemon=True)
    heart.start()
    try:
        yield check
    finally:
        released.set()
        heart.join()
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == text:  # not taken over meanwhile
                path.unlink()


def _beat(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_S):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)


def _remove_if_dead(path: Path) -> None:
    try:
        age_s = time.time() - path.stat().st_mtime
        text = path.read_text()
    except FileNotFoundError:
        return
    holder = json.loads(text) if text.endswith("}") else {}
    here = holder.get("host") == socket.gethostname()
    if age_s > DEAD_AFTER_S or (here and _is_gone(holder)):
        aside = path.with_name(f"{path.name}.{os.getpid()}.dead")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)  # one of several that saw it dead succeeds
            aside.unlink()
        return
    raise ValueError(
        f"{path.parent} is being written by process {holder.get('pid')} on {holder.get('host')} "
        "since "
        f"{holder.get('since')} (last seen {age_s:.0f} s ago); wait for it, or end it first"
    )


def _is_gone(holder: dict[str, Any]) -> bool:
    began = _began(holder["pid"])
    return began is None or began != holder.get("began", began)


def _began(pid: int) -> str | None:
    """When a process of this host began, in ticks since the boot that is named; None where there
    is none, or only its remains wait to be collected.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else f"{fields[START_FIELD]} in {boot}"
