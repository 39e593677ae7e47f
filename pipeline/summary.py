"""What an ingest leaves to be read: `images.jsonl` for programs, `summary.md` for people."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pipeline.console import say, size, write_bytes_atomic
from pipeline.store import Store

SPLITS = ("train", "val", "test")
SIGNS = {"um": "µm", "m": "m", "px": "px"}
MAX_ROWS = 1000


def write_log(store: Store) -> None:
    """Replace `images.jsonl`: one line an image, the same keys in each, null where unknown."""
    lines = [json.dumps(state, sort_keys=True) for state in store.image_states().values()]
    write_bytes_atomic(store.path / "images.jsonl", ("\n".join(lines) + "\n").encode())


def summarise(store: Store, ours: Set[str], auto: str, how: str) -> int:
    """Write `summary.md` and say what it begins with and where to look.

    `ours` are the images of this run, of which those that failed are named; returns their number.
    """
    states, regions = store.image_states(), store.regions()
    ends = Counter(state["state"] for state in states.values())
    splits = Counter(region.split for region in regions)
    counted = ", ".join(f"{splits[s]} {s}" for s in SPLITS if splits[s]) or "none"
    lines = [
        f"images: {ends['ok']} ok, {ends['empty']} empty, {ends['failed']} failed",
        f"regions of {store.spec.region} px{auto}: {len(regions)} ({counted}); {how}",
    ]
    failed = sorted(
        (s for name, s in states.items() if s["state"] == "failed" and name in ours),
        key=lambda s: str(s["source"]),
    )
    notable = [f"- {s['state']}: {_reason(s)}" for s in states.values() if s["state"] != "ok"]
    text = ["# What is in this store", "", *(f"- {line}" for line in lines), *notable, ""]
    text += ["![All images](contact-sheet.jpg)", "", *_table(store, states, regions)]
    write_bytes_atomic(store.path / "summary.md", (os.linesep.join(text) + os.linesep).encode())
    for line in lines + [f"failed: {_reason(s)}" for s in failed]:
        say(line)
    say(
        f"look at {store.contact_sheet_path} (train green, val blue, test orange), then at "
        f"{store.path / 'summary.md'}"
    )
    return len(failed)


def _table(store: Store, states: Mapping[str, Mapping[str, Any]], regions: list[Any]) -> list[str]:
    """A row for every image, of the first 1,000."""
    counts = Counter(region.image for region in regions)
    sign = SIGNS[store.spec.unit]
    rows = [
        "| image | state | px (height × width) | native pixel | from | tissue | regions | seconds "
        "| on disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, state in list(states.items())[:MAX_ROWS]:
        shape, tissue, spacing = state["shape"], state["tissue"], state["native_spacing"]
        label = Path(state["source"]).name.replace("|", "\\|")
        cells = [
            f"[{label}](previews/{name}.png)" if store.preview_path(name).is_file() else label,
            state["state"],
            f"{shape[1]} × {shape[2]}" if shape else "",
            f"{spacing:g} {sign}" if spacing else "",
            str(state["spacing_source"] or "").replace("|", "\\|"),
            f"{tissue['tissue']:.0%}" if tissue else "",
            str(counts[name]),
            f"{state['seconds']:.1f}" if state["seconds"] is not None else "",
            size(state["bytes"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    if len(states) > MAX_ROWS:
        rows += ["", f"{len(states) - MAX_ROWS} more are in images.jsonl."]
    return rows


def _reason(state: Mapping[str, Any]) -> str:
    """Why an image ended as it did, with its path, which most reasons already name."""
    source, reason = str(state["source"]), str(state["reason"])
    return reason if source in reason else f"{source}: {reason}"
