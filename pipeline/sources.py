"""Which files a command means, and what each is called in the store.

An input is a file, a folder, a glob, or a CSV with the columns path, mpp, gsd, patient, split and
label, of which only path is needed. A folder is searched for names that end like an image's and
for files without an ending that begin like one; what a file is, is then decided by its content,
whatever it is called. A file is known by its content:
an image id is a safe piece of its name and a fingerprint of its size and its first and last MiB,
so equal names never collide, and the same file twice is one image.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.readers.header import begins_like_image

FINGERPRINT_BYTES = 1 << 20
STEM_LENGTH = 40
SLIDE_SUFFIXES = (".svs", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi")
RASTER_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".img", ".vrt")
IMAGE_SUFFIXES = frozenset(SLIDE_SUFFIXES + RASTER_SUFFIXES)
CSV_COLUMNS = ("path", "mpp", "gsd", "patient", "split", "label")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """One input file and what the user says about it; mpp (µm) and gsd (m) replace what the file
    says.
    """

    path: Path
    mpp: float | None = None
    gsd: float | None = None
    patient: str | None = None
    split: str | None = None
    label: str | None = None


def find_sources(
    inputs: Sequence[str], source_mpp: float | None, source_gsd: float | None
) -> list[Source]:
    """The files that `inputs` mean, in order; a `ValueError` for an input that means nothing."""
    if source_mpp is not None and source_gsd is not None:
        raise ValueError(
            f"--source-mpp {source_mpp:g} and --source-gsd {source_gsd:g} are both given, and an "
            "image has one unit; "
            "give the one that fits"
        )
    sources: list[Source] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _is_candidate(p))
            if not found:
                raise ValueError(
                    f"folder {path} holds no image file; name another folder or the files"
                )
        elif path.is_file() and path.suffix.lower() == ".csv":
            sources += _read_csv(path, source_mpp, source_gsd)
            continue
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file())
            if not found:
                raise ValueError(f"there is no file, folder or match for {text!r}; check the path")
        sources += [Source(p, source_mpp, source_gsd) for p in found]
    return sources


def image_id(path: Path) -> str:
    """A name for the image in `path`: letters, digits, - and _, at most 57 characters, one for
    each content.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as stream:
        digest.update(stream.read(FINGERPRINT_BYTES))
        stream.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(stream.read(FINGERPRINT_BYTES))
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", path.stem)[:STEM_LENGTH].strip("-") or "image"
    return f"{stem}-{digest.hexdigest()}"


def content_of(name: str) -> str:
    """The fingerprint in an image id, which two names of one content share."""
    return name.rpartition("-")[2]


def _is_candidate(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES or (not path.suffix and begins_like_image(path))


def _read_csv(table: Path, source_mpp: float | None, source_gsd: float | None) -> list[Source]:
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        unknown = sorted(set(columns) - set(CSV_COLUMNS))
        if unknown or "path" not in columns:
            problem = (
                f"has the unknown columns {', '.join(unknown)}"
                if unknown
                else "has no column path"
            )
            raise ValueError(f"{table} {problem}; the columns are {', '.join(CSV_COLUMNS)}")
        return [
            _source_of_row(table, number, row, source_mpp, source_gsd)
            for number, row in enumerate(reader, start=2)
        ]


def _source_of_row(
    table: Path,
    number: int,
    row: dict[str, str],
    source_mpp: float | None,
    source_gsd: float | None,
) -> Source:
    cells = {key: (value or "").strip() for key, value in row.items() if key in CSV_COLUMNS}
    where = f"{table}, line {number}"

    def length(key: str) -> float | None:
        try:
            return float(cells[key]) if cells.get(key) else None
        except ValueError:
            raise ValueError(f"{where}: {key} is {cells[key]!r} and must be a number") from None

    if not cells.get("path"):
        raise ValueError(f"{where}: the path is empty; name a file")
    if cells.get("split") and cells["split"] not in SPLITS:
        raise ValueError(
            f"{where}: split is {cells['split']!r} and must be one of {', '.join(SPLITS)}"
        )
    mpp, gsd = length("mpp"), length("gsd")
    if mpp is not None and gsd is not None:
        raise ValueError(f"{where}: mpp and gsd are both given, and an image has one unit")
    return Source(
        path=table.parent / cells["path"],
        mpp=mpp if mpp is not None or gsd is not None else source_mpp,
        gsd=gsd if mpp is not None or gsd is not None else source_gsd,
        patient=cells.get("patient") or None,
        split=cells.get("split") or None,
        label=cells.get("label") or None,
    )
