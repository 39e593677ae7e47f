"""Output files that are whole or not there, and that know what they were made from.

A file is written under a temporary name beside its place and renamed when it is complete. Its
`Software` tag carries a stamp: a hash of everything that decided its content. The same command
again finds the stamp and keeps the file; a file that this project did not make is never replaced.
"""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tifffile

MAKER = "gigabrush"
SOFTWARE_TAG = 305


def stamp_of(content: Any) -> str:
    """A stamp for what `content` (anything JSON can hold) decides."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{MAKER} {digest[:24]}"


def is_made(out: Path, stamp: str) -> bool:
    """Whether the TIFF at `out` carries `stamp`.

    Raises a `ValueError` when another program made what is there.
    """
    if not out.exists():
        return False
    try:
        with tifffile.TiffFile(out) as file:
            tag = file.pages.first.tags.get(SOFTWARE_TAG)
    except (tifffile.TiffFileError, IsADirectoryError):
        tag = None
    found = str(tag.value) if tag else ""
    if not found.startswith(MAKER):
        raise ValueError(
            f"{out} exists and {MAKER} did not make it; remove it or choose another --out"
        )
    return found == stamp


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that takes its place when the block ends, and is removed when
    it fails.

    What killed processes of this machine left beside `out` is swept first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.{socket.gethostname()}."
    for leftover in out.parent.iterdir():
        if not (leftover.name.startswith(prefix) and leftover.name.endswith(".partial")):
            continue
        process = leftover.name[len(prefix) :].split(".")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            leftover.unlink(missing_ok=True)
    temporary = out.with_name(f"{prefix}{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
