"""Inputs as a table: a CSV with the columns path, mpp, gsd, patient, split and label.

Only path is needed. Paths are relative to the CSV; a path may be a folder with the DICOM files of
one slide. A mistake in the table is told with its line before anything is opened.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.sources import Labels, Source, find_files, folder_label, one_of_each

COLUMNS = ("path", "mpp", "gsd", "patient", "split", "label")
SPLITS = ("train", "val", "test")


def find_sources(
    inputs: Sequence[str],
    source_mpp: float | None,
    source_gsd: float | None,
    plain: bool = False,
    labels: Labels = "csv",
) -> list[Source]:
    """The files that `inputs` mean, in order; a `ValueError` for an input that means nothing.

    With `labels` "folders" the folder that a file lies in is its class, unless a CSV says another.
    """
    given = {
        name: value
        for name, value in {
            "--source-mpp": source_mpp,
            "--source-gsd": source_gsd,
            "--pixels": 1.0 if plain else None,
        }.items()
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both given, and an image has one unit; give the one that "
            "fits"
        )
    sources: list[Source] = []
    for text in inputs:
        path = Path(text)
        if path.is_file() and path.suffix.lower() == ".csv":
            sources += _read(path, source_mpp, source_gsd, plain, labels)
            continue
        for item in find_files(text):
            label = folder_label(item) if labels == "folders" else None
            sources.append(Source(item, source_mpp, source_gsd, label=label, plain=plain))
    return one_of_each(sources)


def _read(
    table: Path,
    source_mpp: float | None,
    source_gsd: float | None,
    plain: bool,
    labels: Labels,
) -> list[Source]:
    sources: list[Source] = []
    lines: dict[Path, tuple[int, Source]] = {}
    for number, cells in _rows(table):
        source = _source(f"{table}, line {number}", table, cells, source_mpp, source_gsd, plain)
        if labels == "folders" and source.label is None:
            source = replace(source, label=folder_label(source.path))
        before, first = lines.setdefault(source.path.absolute(), (number, source))
        if first != source:
            differs = next(k for k, v in vars(source).items() if v != getattr(first, k))
            raise ValueError(
                f"{table} names {source.path} in lines {before} and {number} with {differs} "
                f"{getattr(first, differs)} and {getattr(source, differs)}, and one image has "
                "one; remove one of the lines"
            )
        sources.append(source)
    if not sources:
        raise ValueError(f"{table} has no line with a path; fill it, or name the files themselves")
    return sources


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The number and the cells of every line that is not empty."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            _check_columns(table, columns)
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) > len(columns):
                    raise ValueError(
                        f"{table}, line {reader.line_num}: {len(row)} cells and {len(columns)} "
                        "columns; put a path that holds commas in quotes"
                    )
                cells = zip(columns, (cell.strip() for cell in row), strict=False)
                yield reader.line_num, dict(cells)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{table} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{table} cannot be read as a CSV ({error}); save it again") from error


def _check_columns(table: Path, columns: Sequence[str]) -> None:
    unknown = sorted(set(columns) - set(COLUMNS))
    twice = sorted(name for name in set(columns) if columns.count(name) > 1)
    if "path" not in columns:
        problem = "has no column path"
    elif unknown:
        problem = f"has the unknown columns {', '.join(unknown)}"
    elif twice:
        problem = f"has the column {twice[0]} twice"
    else:
        return
    raise ValueError(
        f"{table} {problem}; the columns are {', '.join(COLUMNS)}, with commas between them"
    )


def _source(
    where: str,
    table: Path,
    cells: dict[str, str],
    source_mpp: float | None,
    source_gsd: float | None,
    plain: bool,
) -> Source:
    if not cells.get("path"):
        raise ValueError(f"{where}: the path is empty; name a file")
    if "\0" in cells["path"]:
        raise ValueError(f"{where}: the path holds a NUL byte, as no file's does; name a file")
    if cells.get("split") and cells["split"] not in SPLITS:
        raise ValueError(
            f"{where}: split is {cells['split']!r} and must be one of {', '.join(SPLITS)}"
        )
    mpp, gsd = (_length(where, key, cells.get(key, "")) for key in ("mpp", "gsd"))
    given = [
        name
        for name, value in {"mpp": mpp, "gsd": gsd, "--pixels": plain or None}.items()
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(
            f"{where}: {' and '.join(given)} are both given, and an image has one unit; keep one"
        )
    return Source(
        path=_file(where, table.parent / cells["path"]),
        mpp=mpp if mpp is not None or gsd is not None else source_mpp,
        gsd=gsd if mpp is not None or gsd is not None else source_gsd,
        patient=cells.get("patient") or None,
        split=cells.get("split") or None,
        label=cells.get("label") or None,
        plain=plain,
    )


def _length(where: str, key: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}: {key} is {text!r} and must be a positive number")
    return value


def _file(where: str, path: Path) -> Path:
    """A path of the table, of a folder the one slide in it."""
    if not path.is_dir():
        return path
    found = find_files(str(path))
    if len(found) != 1:
        raise ValueError(
            f"{where}: folder {path} holds {len(found)} images and a line is one; name the files"
        )
    return found[0]
