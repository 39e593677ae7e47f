"""How every command of the project behaves at a terminal.

A command is a frozen dataclass (its fields are the options, their docstrings the help) and a body.
The dataclass's docstring is one sentence, then commands to copy, indented, then what else there is
to know. The body returns an exit code: 0 all done, 3 finished but some inputs failed, 75 told to
stop and saved, to be run again. A `ValueError` is the user's mistake: its sentence goes to
standard error and the exit code is 2. Long work begins with a plan that says what disk it needs
and what is free, and stops there if that is too little. It shows progress, and files that mark
progress are replaced by rename so that a killed process never leaves half of one.
"""

import errno
import inspect
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
from tqdm import tqdm

T = TypeVar("T")
C = TypeVar("C")

REPORT_EVERY_S = 30.0
EXIT_DONE, EXIT_USAGE, EXIT_PARTIAL, EXIT_PREEMPTED = 0, 2, 3, 75
HELP = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)


def parse(config: type[C], argv: Sequence[str] | None, *, prog: str) -> C:
    """Read `argv` into `config`; says what is wrong and exits with 2, or with 0 after --help."""
    return tyro.cli(config, args=argv, prog=prog, description=inspect.getdoc(config), config=HELP)


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


def command_line(prog: str, options: Any) -> str:
    """The shortest command that `run` parses into `options`, a flat dataclass: what differs from
    the defaults.
    """
    positional, named = [], []
    hints = get_type_hints(type(options), include_extras=True)
    for item in fields(options):
        value = getattr(options, item.name)
        if value == item.default:
            continue
        values = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
        flag = item.name.replace("_", "-")
        if tyro.conf.Positional in getattr(hints[item.name], "__metadata__", ()):
            positional += values
        elif isinstance(value, bool):
            named.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            named += [f"--{flag}", *values]
    return f"{prog} {shlex.join([*positional, *named])}"


def say(message: str) -> None:
    """Print one line at once, also when standard output is a file."""
    print(message, flush=True)


def size(num_bytes: int) -> str:
    """Bytes for people, such as 1.2 GB."""
    for unit, worth in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= worth:
            return f"{num_bytes / worth:.{0 if num_bytes >= 99.5 * worth else 1}f} {unit}"
    return f"{num_bytes:.0f} bytes"


def say_plan(plan: str, folder: Path, needed_bytes: int) -> None:
    """Print a plan and the disk that it takes where `folder` lies; a `ValueError` when less is
    free.
    """
    free = free_bytes(folder)
    say(f"{plan}\ndisk: {size(needed_bytes)} needed at most, {size(free)} free at {folder}")
    check_free_disk(folder, needed_bytes)


def progress(items: Iterable[T], *, total: int, desc: str) -> Iterator[T]:
    """Yield `items` under a bar on a terminal, or a line every 30 s elsewhere."""
    bar = tqdm(total=total, desc=desc, disable=not sys.stderr.isatty())
    started = reported = time.monotonic()
    with bar:
        for done, item in enumerate(items):
            now = time.monotonic()
            if bar.disable and now - reported >= REPORT_EVERY_S:
                reported = now
                left_s = (now - started) / max(done, 1) * (total - done)
                say(f"{desc}: {done} of {total}, about {left_s:.0f} s left")
            yield item
            bar.update()


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
    try:
        with temporary.open("wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_tree(path: Path) -> None:
    """Flush a folder and all that is below it to disk."""
    for item in (path, *path.rglob("*")):
        opened = os.open(item, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def is_disk_full(error: BaseException) -> bool:
    """Whether what went wrong is that a disk, or what one may use of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_free_disk(folder: Path, needed_bytes: int) -> None:
    """Raise a `ValueError` when the disk that will hold `folder` has less than `needed_bytes`
    free.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise ValueError(
            f"{folder} needs about {size(needed_bytes)} but its disk has {size(free)} free; "
            "make room or choose another folder"
        )


def free_bytes(folder: Path) -> int:
    """What is free on the disk that holds, or will hold, `folder`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
