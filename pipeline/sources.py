"""Which files a command means, and what each is called in the store.

An input is a file, a folder, a glob, or a CSV (`pipeline.table`). A folder is searched for names
that end like an image's and for files without an ending that begin like one. So are folders that
a glob matches, and the matches of one whose last part is `*` or `**`. What a file is, is then
decided by its content, whatever it is called. The pictures of a Hamamatsu VMS are no images of
their own, and the DICOM files of one series are one slide, named by the largest of them.

A file is known by its content: an image id is a safe piece of its name and a fingerprint of its
size and its first and last MiB, so equal names never collide, and the same file twice is one
image.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.readers import Reader, open_reader
from pipeline.readers.dicom import join_series
from pipeline.readers.header import begins_like_image

FINGERPRINT_BYTES = 1 << 20
STEM_LENGTH = 40
SLIDE_SUFFIXES = (
    *(".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"),
)
RASTER_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".img", ".vrt")
IMAGE_SUFFIXES = frozenset(SLIDE_SUFFIXES + RASTER_SUFFIXES)
INDEX_SUFFIXES = (".vms", ".vmu")
MAX_INDEX_BYTES = 1 << 20

Labels = Literal["csv", "folders"]


@dataclass(frozen=True)
class Source:
    """One input file and what the user says about it; mpp (µm) and gsd (m) replace what the file
    says, and a `plain` one is measured by pixels.
    """

    path: Path
    mpp: float | None = None
    gsd: float | None = None
    patient: str | None = None
    split: str | None = None
    label: str | None = None
    plain: bool = False

    def open(self) -> Reader:
        """A reader of the file; `UnreadableError` when there is none."""
        return open_reader(self.path, source_mpp=self.mpp, source_gsd=self.gsd, plain=self.plain)


def find_files(text: str) -> list[Path]:
    """The files that one input means, in order; a `ValueError` for an input that means nothing."""
    path = Path(text)
    if path.is_dir():
        found = list(join_series(_search(path)))
        if not found:
            raise ValueError(
                f"folder {path} holds no image file; name another folder or the files"
            )
        return found
    if path.is_file():
        return [path]
    matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
    files = [match for match in matches if match.is_file()]
    if Path(text).name in ("*", "**"):
        files = _without_parts([match for match in files if _is_candidate(match)])
    if "**" not in text:
        files += [file for match in matches if match.is_dir() for file in _search(match)]
    if not files:
        raise ValueError(f"there is no file, folder or match for {text!r}; check the path")
    return list(join_series(sorted(files)))


def image_id(path: Path) -> str:
    """A name for the image in `path`: letters, digits, - and _, at most 57 characters, one for
    each content. Of a slide in several files the one that tells it from others counts as well.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    for part in (path, path.with_suffix("") / "Slidedat.ini"):
        if part is not path and not (path.suffix.lower() == ".mrxs" and part.is_file()):
            continue
        with part.open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_BYTES))
            stream.seek(max(0, part.stat().st_size - FINGERPRINT_BYTES))
            digest.update(stream.read(FINGERPRINT_BYTES))
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", path.stem)[:STEM_LENGTH].strip("-") or "image"
    return f"{stem}-{digest.hexdigest()}"


def content_of(name: str) -> str:
    """The fingerprint in an image id, which two names of one content share."""
    return name.rpartition("-")[2]


def folder_label(path: Path) -> str | None:
    """The class that the folder of a file names."""
    return path.absolute().parent.name or None


def _search(folder: Path) -> list[Path]:
    """The images below a folder, sorted; links to folders are followed, none of them twice."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"folder {error.filename} cannot be searched: {error.strerror}")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        found += [path for path in (Path(place) / name for name in names) if _is_candidate(path)]
    return sorted(_without_parts(found))


def _is_candidate(path: Path) -> bool:
    if path.name.startswith(".") or path.is_dir():
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES or (
        not path.suffix and path.is_file() and begins_like_image(path)
    )


def _without_parts(paths: list[Path]) -> list[Path]:
    """`paths` without the pictures that an index among them (VMS, VMU) is made of."""
    parts = {part for path in paths for part in _parts(path)}
    return [path for path in paths if path not in parts]


def _parts(path: Path) -> Iterator[Path]:
    if path.suffix.lower() in INDEX_SUFFIXES and path.is_file():
        with path.open("rb") as stream:
            lines = stream.read(MAX_INDEX_BYTES).decode(errors="replace").splitlines()
        yield from (
            path.parent / value.strip() for _, _, value in (x.partition("=") for x in lines)
        )


def one_of_each(sources: Sequence[Source]) -> list[Source]:
    """`sources` without a file that was named before with the same words, and of the DICOM files
    of one slide, which a shell names one by one, only the largest.
    """
    kept = set(join_series([source.path for source in sources]))
    named: dict[Source, Source] = {}
    for source in sources:
        named.setdefault(replace(source, path=source.path.absolute()), source)
    return [source for source in named.values() if source.path in kept]
