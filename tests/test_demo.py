"""The whole chain by one command, killed at several stages: it ends, and repeats no stage."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from openslide import OpenSlide
from processes import run, start, stop_when

from pipeline.phantom import draw_slide

SIZE = 640


@pytest.mark.timeout(600)
def test_a_demo_killed_at_every_turn_still_paints(tmp_path: Path) -> None:
    slide, out = tmp_path / "my slide.tif", tmp_path / "out"
    draw_slide(slide, height_px=768, width_px=800, mpp=0.5, seed=1)
    command = [
        *("--slides", str(slide), "--out", str(out), "--size", str(SIZE), "--steps", "3"),
        *("--train-minutes", "0.15", "--pretrain-steps", "3", "--draws", "12"),
        *("--cluster", "inline", "--min-tissue", "0"),
    ]

    def done() -> dict[str, object]:
        file = out / "demo.json"
        recorded = json.loads(file.read_text()) if file.is_file() else {}
        return {name: record for name, record in recorded.items() if name != "slides"}

    turns = (
        lambda: "pipeline.ingest" in done(),
        lambda: "conditioning.embed" in done(),
        lambda: (out / "run" / "state.json").is_file(),
        lambda: bool(list(out.glob("images/.work-*/state.json"))),
    )
    for turn in turns:
        before = done()
        stop_when(start("jobs.demo", command), turn, signal.SIGKILL)
        after = done()
        assert {name: after[name] for name in before} == before
    # Trained for seconds, the image may not follow its condition: exit 3 says so.
    output = run("jobs.demo", command, good=(0, 3))
    assert output.count("is already done") >= 6
    assert "from its own region" in output
    (ome,) = out.glob("images/*.ome.tif")
    (plain,) = [p for p in out.glob("images/*.tif") if p != ome]
    with tifffile.TiffFile(ome) as file, OpenSlide(plain) as opened:
        shown = np.asarray(opened.read_region((0, 0), 0, (SIZE, SIZE)).convert("RGB"))
        np.testing.assert_array_equal(file.series[0].levels[0].asarray(), shown)
        assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(0.5)
    assert list(out.glob("*.png"))
    again = run("jobs.demo", command, good=(0, 3))
    assert again.count("is already done") == len(done())
    assert "python -m" not in again
