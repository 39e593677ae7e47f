"""The whole chain by one command, killed at several stages: it ends, and repeats no stage."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from chain import Chain
from openslide import OpenSlide
from processes import run, start, stop_when

from jobs.demo import LARGE_REGIONS, TRAINED_ON, Demo, _footprints, _stride, _train_arguments
from pipeline.phantom import draw_slide
from pipeline.regions import Region
from pipeline.store import Store, StoreSpec

SIZE = 640


@pytest.mark.timeout(600)
def test_a_demo_killed_at_every_turn_still_paints(tmp_path: Path) -> None:
    slide, out = tmp_path / "my slide.tif", tmp_path / "out"
    draw_slide(slide, height_px=768, width_px=800, mpp=0.5, seed=1)
    command = [
        *("--slides", str(slide), "--out", str(out), "--size", str(SIZE), "--steps", "3"),
        *("--train-minutes", "0.15", "--pretrain-steps", "3"),
        *("--cluster", "inline", "--min-tissue", "0"),
    ]
    other_draws, other_region = [*command, "--draws", "9000"], [*command, "--region", "999"]
    command += ["--draws", "12"]

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
    output = run("jobs.demo", command)
    assert output.count("is already done") >= 6
    assert "from its own region" in output
    (ome,) = out.glob("images/*.ome.tif")
    (plain,) = [p for p in out.glob("images/*.tif") if p != ome]
    with tifffile.TiffFile(ome) as file, OpenSlide(plain) as opened:
        shown = np.asarray(opened.read_region((0, 0), 0, (SIZE, SIZE)).convert("RGB"))
        np.testing.assert_array_equal(file.series[0].levels[0].asarray(), shown)
        assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(0.5)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"]["generated"] == (SIZE // 256) ** 2
    assert f"Crop FID {metrics['crop_fid']['value']:.4g}" in output
    assert ome.name.removesuffix(".ome.tif") in (out / "report" / "index.html").read_text()
    again = run("jobs.demo", command)
    assert again.count("is already done") == len(done())
    assert "python -m" not in again
    assert "was packed with" in run("jobs.demo", other_draws, good=(2,))
    assert "--region 999" in run("jobs.demo", other_region, good=(2,))
    assert run("jobs.demo", command).count("is already done") == len(done())
    # An older version of the project trained another model by another command.
    recorded = json.loads((out / "demo.json").read_text())
    recorded["jobs.train"]["command"] += ["--seed", "7"]
    (out / "demo.json").write_text(json.dumps(recorded))
    model = json.loads((out / "run" / "config.json").read_text())
    model["config"]["training"]["seed"] = 7
    (out / "run" / "config.json").write_text(json.dumps(model))
    assert "another --out" in run("jobs.demo", command, good=(2,))
    assert ome.is_file()


@pytest.mark.parametrize(
    ("side", "stride"), [(4096, 1024), (8192, 1024), (12288, 2048), (20480, 4096), (40960, 8192)]
)
def test_the_grid_of_a_demo_has_enough_regions_and_not_too_many(
    tmp_path: Path, side: int, stride: int
) -> None:
    """A slide that is all tissue has (side / 4096)^2 regions apart; 16 to 64 are wanted."""
    rgb = ("red", "green", "blue")
    spec = StoreSpec("um", 0.5, rgb, "uint8", 4096)
    store = Store.create(tmp_path / "o.zarr", spec, {"min_tissue": 0.25})
    store.write_coverage("a", np.full((side // 16, side // 16), 256, np.uint16))
    store.write_image_state("a", {"state": "ok", "shape": [3, side, side]})
    assert _stride(store) == stride


def test_models_of_large_regions_are_wide_where_they_are_all_trained_on() -> None:
    for side, splits, said in (
        (4096, ("train", "train"), (*LARGE_REGIONS, *TRAINED_ON)),
        (4096, ("train", "val"), LARGE_REGIONS),
        (512, ("train", "train"), ()),
    ):
        regions = [Region(k, "a", 0, 0, side, 1.0, split) for k, split in enumerate(splits)]
        arguments = _train_arguments(Demo(), "packs", "run", regions)
        assert tuple(arguments[arguments.index("--set") + 1 :] if said else ()) == said
        assert said or "--set" not in arguments


def test_small_regions_get_several_tokens(chain: Chain) -> None:
    """One token is no layout: regions of 256 px have 4 by 4 and one over all."""
    assert _footprints(Store.open(chain.store)) == ["64", "256"]
