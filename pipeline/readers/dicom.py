"""Which DICOM files are one slide.

A scanner writes a slide as a series: one file for each level, one for the label, one for the
overview. OpenSlide opens any one of them and finds the others beside it. So the files of one
series in one folder are one input, named by the largest, which holds level 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError

from pipeline.readers.header import is_dicom

SERIES = "SeriesInstanceUID"
SUFFIX = ".dcm"


def series_of(path: Path) -> str | None:
    """The series that a DICOM file belongs to; None for other and for damaged files."""
    try:
        if not is_dicom(path):
            return None
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[SERIES])
        return str(header[SERIES].value) or None
    # Damaged values make pydicom raise more than its own errors.
    except (InvalidDicomError, OSError, KeyError, ValueError, TypeError, AttributeError):
        return None


def join_series(paths: Sequence[Path]) -> Iterator[Path]:
    """`paths` in order, of the files of one series in one folder only the largest."""
    found: dict[tuple[Path, str], list[Path]] = {}
    keys: dict[Path, tuple[Path, str]] = {}
    for path in paths:
        is_possible = path.suffix.lower() == SUFFIX or not path.suffix
        series = series_of(path) if is_possible and path.is_file() else None
        if series is not None:
            keys[path] = (path.parent, series)
            found.setdefault(keys[path], []).append(path)
    chosen = {max(files, key=lambda p: (p.stat().st_size, p.name)) for files in found.values()}
    return (path for path in paths if path not in keys or path in chosen)
