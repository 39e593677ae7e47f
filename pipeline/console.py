"""How every command of the project behaves at a terminal.

A command is a frozen dataclass (its fields are the options, their docstrings the help) and a body.
The body returns an exit code: 0 all done, 3 finished but some inputs failed. A `ValueError` is the
user's mistake: its sentence goes to standard error and the exit code is 2. Whatever takes long
shows progress, and files that mark progress are replaced by rename so that a killed process never
leaves half of one.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

T = TypeVar("T")
C = TypeVar("C")

REPORT_EVERY_S = 30.0
EXIT_DONE, EXIT_USAGE, EXIT_PARTIAL, EXIT_PREEMPTED = 0, 2, 3, 75


def parse(config: type[C], argv: Sequence[str] | None, *, prog: str) -> C:
    """Read `argv` into `config`; says what is wrong and exits with 2, or with 0 after --help."""
    return tyro.cli(config, args=argv, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))


def run(
    config: type[C], body: Callable[[C], int], argv: Sequence[str] | None = None, *, prog: str
) -> int:
    """Parse `argv` into `config` and run `body`; a user's mistake becomes one sentence and exit
    code 2.
    """
    try:
        return body(parse(config, argv, prog=prog))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except (ValueError, OSError) as mistake:
        print(f"{prog}: {mistake}", file=sys.stderr)
        return EXIT_USAGE


def say(message: str) -> None:
    """Print one line at once, also when standard output is a file."""
    print(message, flush=True)


def progress(items: Iterable[T], *, total: int, desc: str) -> Iterator[T]:
    """Yield `items` under a bar on a terminal, or a line every 30 s elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=desc)
        return
    started = reported = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - reported >= REPORT_EVERY_S:
            reported = now
            left_s = (now - started) / max(done, 1) * (total - done)
            say(f"{desc}: {done} of {total}, about {left_s:.0f} s left")
        yield item


@contextmanager
def counter(*, total: int, desc: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of a counted amount of work: call the result with (where to start from, amount
    done).

    The first number only moves the count forward, as when earlier work was found done.
    """
    bar = tqdm(total=total, desc=desc, unit_scale=True, disable=not sys.stderr.isatty())
    started = reported = time.monotonic()
    begun: int | None = None
    done = 0

    def count(start: int, amount: int) -> None:
        nonlocal begun, done, reported
        begun = start if begun is None else begun
        done = max(done, start) + amount
        bar.update(done - bar.n)
        now = time.monotonic()
        if bar.disable and now - reported >= REPORT_EVERY_S:
            reported = now
            left_s = (now - started) / max(done - begun, 1) * (total - done)
            say(f"{desc}: {done / total:.0%}, about {left_s:.0f} s left")

    with bar:
        yield count


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace the JSON file at `path` in one step."""
    write_bytes_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes_atomic(path: Path, payload: bytes) -> None:
    """Replace the file at `path` in one step: write beside it, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def check_free_disk(folder: Path, needed_bytes: int) -> None:
    """Raise a `ValueError` when the disk that will hold `folder` has less than `needed_bytes`
    free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder} needs about {needed_bytes / 1e9:.2f} GB but its disk has {free / 1e9:.2f} "
            "GB free; "
            "make room or choose another folder"
        )
