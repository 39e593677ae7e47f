"""Comparisons: what their files may say, whom they paint, and what they print."""

import json
from pathlib import Path

import pytest
from chain import POINTS, SIDE_PX, Chain
from PIL import Image

import jobs.compare
from jobs.compare.command import held_out
from jobs.compare.contest import Comparison, read_comparison
from jobs.compare.scoreboard import to_markdown
from pipeline.regions import Region

SHIPPED = Path(__file__).parent.parent / "docs" / "compare" / "two_cores.toml"
METRICS = {
    "features": {
        "name": "clip-vit-b-32",
        "label": "CLIP ViT-B/32, 224 px",
        "dim": 512,
        "conditions_images": False,
    },
    "n": {"real": 96, "generated": 48},
    "crop_fid": {"value": 123.456, "interval": [101.25, 149.5], "floor": 21.5, "floor_n": 48},
    "kid": {"value": 0.0125, "interval": None, "floor": 0.0005},
    "spectrum": {
        "octaves": [
            {"level": 0, "cells_px": [1, 2], "real": 1.0, "generated": 0.5, "log2_ratio": -1.0},
            {"level": 1, "cells_px": [2, 4], "real": 0.0, "generated": 0.5, "log2_ratio": None},
        ]
    },
}


def score(name: str, **changes: object) -> dict[str, object]:
    return {
        "name": name,
        "preset": "patch",
        "commit": "0" * 40,
        "parameters": 5_690_000,
        "minutes": 8.02,
        "cpu_minutes": 15.9,
        "steps": 700,
        "batch": 8,
        "design": "patch",
        "images": 3,
        "seconds_per_image": 21.4,
        "recipe": {"steps": 20, "solver": "ddim", "guidance": 1.5, "overlap": 0.5},
        "options": {"pack": [], "train": ["--batch", "8"], "sample": []},
        "metrics": METRICS,
        **changes,
    }


def test_the_table_says_every_number_with_its_floor_interval_and_n() -> None:
    ours = score("ours", recipe={"solver": "ddim", "guidance": 1.0}, design="cascade")
    facts = {"hardware": "two cores", "minutes": 8, "size_px": 1024}
    table = to_markdown({**facts, "contestants": [ours, score("patch")]})
    rows = [line for line in table.splitlines() if line.startswith("| patch")]
    assert rows == [
        "| patch (`patch`) | 5.7M | 8.0 min, 15.9 CPU min, 700 steps, batch 8 | 21 | "
        "123.5 [101.2, 149.5] | 21.5 (n = 48) | 0.0125 (interval not known) | 0.0005 | 48, 96 |",
        "| patch | -1.00 | – |",
    ]
    assert "CLIP ViT-B/32, 224 px" in table
    assert "Commit 000000000000." in table
    assert "guidance 1.5, windows overlapping by 0.5 (published: 0.75)" in table
    assert table.count("overlapping") == 1
    assert "20 steps of ddim" in table and "the preset's own steps of ddim" in table
    assert "no headline number" not in table
    own = {**METRICS, "features": {**METRICS["features"], "conditions_images": True}}
    table = to_markdown({**facts, "contestants": [score("a", metrics=own), score("b")]})
    assert "no headline number" in table


def test_the_shipped_comparison_gives_both_the_same() -> None:
    comparison = read_comparison(SHIPPED)
    ours, patch = comparison.contestants
    assert (ours.preset, patch.preset) == ("tiny", "patch")
    shared = {"--steps", "--guidance", "--seed", "--region", "--size", "--solver"}
    assert not shared & {*ours.sample, *patch.sample}
    assert jobs.compare.main([str(SHIPPED), "--out", "nowhere", "--dry-run"]) == 0
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("minutes = 1", "minuets = 1"), "unknown keys \\['minuets'\\]; known are contestants"),
        (("minutes = 1", ""), "lacks minutes"),
        (("minutes = 1", 'minutes = "1"'), "minutes must be a number"),
        (("images = 1", "images = 1.5"), "images must be a whole number"),
        (("images = 1", "images = 0"), "must be positive"),
        (('name = "b"', 'name = "a"'), "different names"),
        (('name = "b"', 'name = "../b"'), "letters, digits"),
        (
            ('preset = "patch"', 'preset = "patch"\npack = ["a", 1]'),
            "pack must be a list of texts",
        ),
        (('preset = "patch"', 'preset = "patch"\nspeed = 1'), "contestant has unknown keys"),
        (("minutes = 1", "minutes ="), "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_sentences(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    good = (
        'minutes = 1\nimages = 1\nsize = 256\n[[contestants]]\nname = "a"\npreset = "tiny"\n'
        '[[contestants]]\nname = "b"\npreset = "patch"\n'
    )
    file = tmp_path / "c.toml"
    file.write_text(good)
    assert isinstance(read_comparison(file), Comparison)
    file.write_text(good.replace(*change))
    with pytest.raises(ValueError, match=sentence):
        read_comparison(file)


def test_held_out_regions_are_apart_full_and_not_trained_on() -> None:
    places = [(0, 0, "train", 1.0), (0, 8, "val", 0.5), (4, 8, "val", 0.9), (8, 8, "test", 0.4)]
    regions = [Region(i, "a", y, x, 8, t, split) for i, (y, x, split, t) in enumerate(places)]
    regions.append(Region(4, "b", 4, 8, 8, 0.3, "test"))
    assert [r.index for r in held_out(regions, 1)] == [2]
    assert [r.index for r in held_out(regions, 2)] == [2, 4]
    with pytest.raises(ValueError, match=r"has 2 regions apart .* wants 3"):
        held_out(regions, 3)


@pytest.mark.timeout(600)
def test_a_small_comparison_ends_and_repeats_nothing(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jobs.evaluate")
    file, out = tmp_path / "small.toml", tmp_path / "out"
    train = '["--steps", "2", "--batch", "2"]'
    file.write_text(
        f"""
        minutes = 5
        images = 2
        size = {SIDE_PX}
        encoder = {json.dumps(str(chain.encoder))}
        ingest = ["--region", "{SIDE_PX}", "--min-tissue", "0", "--cluster", "inline"]
        embed = ["--footprint", "64", "256"]
        sample = ["--steps", "2", "--guidance", "1"]
        [[contestants]]
        name = "ours"
        preset = "tiny"
        pack = ["--points", "{POINTS}", "--packs-per-region", "1"]
        train = {train}
        [[contestants]]
        name = "patch"
        preset = "patch"
        pack = ["--design", "patch"]
        train = {train}
        sample = ["--overlap", "0"]
        """
    )
    command = [str(file), "--out", str(out), "--slides", str(chain.slide)]
    assert jobs.compare.main(command) == 0
    facts = json.loads((out / "compare.json").read_text())
    ours, patch = facts["contestants"]
    assert [(s["steps"], s["batch"]) for s in (ours, patch)] == [(2, 2), (2, 2)]
    assert min(ours["cpu_minutes"], patch["cpu_minutes"]) > 0
    assert ours["images"] == patch["images"] == len(facts["regions"]) == 2
    assert patch["recipe"]["overlap"] == 0.0
    # Each computes as suits its layers; only patches overlap.
    shared = [
        {k: v for k, v in one["recipe"].items() if k not in ("bf16", "overlap")}
        for one in (ours, patch)
    ]
    assert shared[0] == shared[1]
    assert ours["metrics"]["n"] == patch["metrics"]["n"]
    with Image.open(out / "compare.png") as picture:
        assert picture.size == (3 * 512 + 16, 2 * 512 + 8)
    table = (out / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert jobs.compare.main(command) == 0
    assert "python -m" not in capsys.readouterr().out
