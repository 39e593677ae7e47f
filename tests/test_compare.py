"""Comparisons: what their files may say, whom they paint, what they print, and how they resume."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chain import POINTS, SIDE_PX, Chain
from PIL import Image

import jobs.compare
import jobs.train
from jobs.compare.command import held_out
from jobs.compare.contest import read_comparison
from jobs.compare.table import to_markdown
from jobs.record import RunState, generated_by_others
from jobs.stages import Progress
from pipeline import console
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
    "condition_cosine": {"own": 0.75, "other": 0.25, "footprint_px": 256},
    "spectrum": {
        "octaves": [
            {"level": 0, "cells_px": [1, 2], "real": 8.0, "generated": 4.0, "log2_ratio": -1.0},
            {"level": 1, "cells_px": [2, 4], "real": 0.0, "generated": 0.5, "log2_ratio": None},
        ]
    },
    "seams": {
        "periods": [
            {"period_px": 8, "real": 1.5, "generated": 1.5},
            {"period_px": 32, "real": 1.0, "generated": 1.1},
            {"period_px": 256, "real": 1.0, "generated": None},
        ]
    },
}


def run(seed: int, **changes: object) -> dict[str, object]:
    return {
        "seed": seed,
        "commit": "0" * 40,
        "cpu_minutes": 15.9,
        "minutes": 8.02,
        "steps": 700,
        "images": 3,
        "seconds_per_image": 21.4,
        "recipe": {"steps": 20, "solver": "ddim", "guidance": 1.5, "overlap": 0.5},
        "metrics": METRICS,
        **changes,
    }


def score(name: str, *runs: dict[str, object], **changes: object) -> dict[str, object]:
    return {
        "name": name,
        "preset": "patch",
        "parameters": 5_690_000,
        "batch": 8,
        "design": "patch",
        "options": {"pack": [], "train": ["--batch", "8"], "sample": []},
        "runs": runs or (run(0),),
        **changes,
    }


FACTS = {
    "hardware": "two cores",
    "cpu_minutes": 16,
    "seeds": [0, 1],
    "size_px": 1024,
    "regions": [{"index": i, "split": s} for i, s in enumerate(("test", "val", "test"))],
    "pairs": [
        {
            "ours": "ours",
            "theirs": "patch",
            "crop_fid": {
                "value": -20.5,
                "interval": [-30.0, -11.0],
                "in_words": "zero is outside",
            },
            "kid": {"value": 0.001, "interval": None, "in_words": "interval not known"},
        }
    ],
}


def test_the_table_says_every_number_with_its_floor_interval_and_n() -> None:
    far = {**METRICS, "crop_fid": {**METRICS["crop_fid"], "value": 133.456, "interval": None}}
    recipe = {"solver": "ddim", "guidance": 1.0}
    ours = score("ours", run(0, recipe=recipe), run(1, recipe=recipe), design="cascade")
    theirs = score("patch", run(0), run(1, metrics=far, steps=800, seconds_per_image=23.4))
    table = to_markdown({**FACTS, "contestants": [ours, theirs]})
    rows = [line for line in table.splitlines() if line.startswith("| patch")]
    assert rows == [
        "| patch (`patch`) | 5.7M | 15.9 | 750 of 8 | 22 | 48, 96 |",
        "| patch | 128.5 | 7.1 | 123.5 [101.2, 149.5] | 133.5 (interval not known) | "
        "21.5 (n = 48) |",
        "| patch | 0.0125 | 0 | 0.0125 (interval not known) | 0.0125 (interval not known) | "
        "0.0005 |",
        "| patch | -1.00 | – |",
        "| patch | 1.100 | – | 0.750 | 0.250 |",
    ]
    assert "| ours − patch | Crop FID | -20.5 | [-30, -11] | zero is outside |" in table
    assert "| ours − patch | KID | +0.001 | (interval not known) | interval not known |" in table
    assert "| real, log2 of power | 3.00 | – |" in table
    assert "| real | 1.000 | 1.000 |" in table
    assert "16 CPU minutes" in table and "with seeds 0, 1;" in table
    assert "3 regions that were held out (2 of test and 1 of val)" in table
    assert "condition cosine at 256 px" in table
    assert "CLIP ViT-B/32, 224 px" in table
    assert "Commit 000000000000." in table
    assert "guidance 1.5, windows overlapping by 0.5 (published: 0.75)" in table
    assert table.count("overlapping") == 1
    assert "20 steps of ddim" in table and "the preset's own steps of ddim" in table
    assert "no headline number" not in table
    own = {**METRICS, "features": {**METRICS["features"], "conditions_images": True}}
    single = [score("a", run(0, metrics=own)), score("b")]
    table = to_markdown({**FACTS, "seeds": [0], "contestants": single})
    assert "no headline number" in table
    assert "| b | 123.5 | – |" in table


def test_the_shipped_comparison_gives_all_the_same() -> None:
    comparison = read_comparison(SHIPPED)
    contestants = comparison.contestants
    assert [c.preset for c in contestants] == ["tiny", "patch", "paper-tiny"]
    for contestant in contestants:
        shared = {"--guidance", "--seed", "--region", "--size", "--solver"}
        assert not shared & {*contestant.sample}
        assert not {"--seed", "--max-minutes", "--max-cpu-minutes"} & {*contestant.train}
    assert comparison.images * (comparison.size // 256) ** 2 >= 250
    assert jobs.compare.main([str(SHIPPED), "--out", "nowhere", "--dry-run"]) == 0
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            ("cpu_minutes = 1", "minutes = 1"),
            "unknown keys \\['minutes'\\]; known are contestants",
        ),
        (("cpu_minutes = 1", ""), "lacks cpu_minutes"),
        (("cpu_minutes = 1", 'cpu_minutes = "1"'), "cpu_minutes must be a number"),
        (("cpu_minutes = 1", "cpu_minutes = true"), "cpu_minutes must be a number"),
        (("seeds = [0, 1]", "seeds = []"), "at least one seed"),
        (("seeds = [0, 1]", "seeds = [1, 1]"), "none twice"),
        (("seeds = [0, 1]", "seeds = [-1]"), "none below 0"),
        (("seeds = [0, 1]", "seeds = [0.5]"), "seeds must be a list of whole numbers"),
        (("seeds = [0, 1]", 'seeds = ["0"]'), "seeds must be a list of whole numbers"),
        (("seeds = [0, 1]", "seeds = 0"), "seeds must be a list of whole numbers"),
        (("images = 1", "images = 1.5"), "images must be a whole number"),
        (("images = 1", "images = 0"), "must be positive"),
        (('name = "b"', 'name = "a"'), "different names"),
        (('name = "b"', 'name = "../b"'), "letters, digits"),
        (
            ('preset = "patch"', 'preset = "patch"\npack = ["a", 1]'),
            "pack must be a list of texts",
        ),
        (('preset = "patch"', 'preset = "patch"\nspeed = 1'), "contestant has unknown keys"),
        (("cpu_minutes = 1", "cpu_minutes ="), "is not TOML"),
    ],
)
def test_mistakes_in_a_file_are_sentences(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    good = (
        "cpu_minutes = 1\nseeds = [0, 1]\nimages = 1\nsize = 256\n"
        '[[contestants]]\nname = "a"\npreset = "tiny"\n'
        '[[contestants]]\nname = "b"\npreset = "patch"\n'
    )
    file = tmp_path / "c.toml"
    file.write_text(good)
    assert read_comparison(file).seeds == (0, 1)
    file.write_text(good.replace("seeds = [0, 1]", ""))
    assert read_comparison(file).seeds == (0,)
    file.write_text(good.replace(*change))
    with pytest.raises(ValueError, match=sentence):
        read_comparison(file)


def test_held_out_regions_are_apart_not_trained_on_and_test_before_val() -> None:
    places = [(0, 0, "train", 1.0), (0, 8, "val", 0.5), (4, 8, "val", 0.9), (8, 8, "val", 0.4)]
    places += [(32, 4, "test", 0.9), (32, 0, "test", 0.3), (32, 8, "test", 0.3)]
    regions = [Region(i, "a", y, x, 8, t, split) for i, (y, x, split, t) in enumerate(places)]
    # Of the test regions those on one lattice, though a fuller one lies between them; of val too.
    assert [r.index for r in held_out(regions, 1)] == [5]
    assert [r.index for r in held_out(regions, 2)] == [5, 6]
    assert [r.index for r in held_out(regions, 3)] == [1, 5, 6]
    assert [r.index for r in held_out(regions, 4)] == [1, 3, 5, 6]
    regions.append(Region(7, "b", 4, 8, 8, 0.3, "test"))
    assert [r.index for r in held_out(regions, 3)] == [5, 6, 7]
    with pytest.raises(ValueError, match=r"has 5 regions apart .* wants 6; .* larger --held-out"):
        held_out(regions, 6)


@pytest.fixture
def chain_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A chain of a shared stage and two contestants' ones; which commands it ran."""
    ran: list[str] = []
    codes = {
        "refused": console.EXIT_USAGE,
        "partly": console.EXIT_PARTIAL,
        "stopped": console.EXIT_PREEMPTED,
    }

    def main(arguments: Sequence[str]) -> int:
        ran.extend(arguments if arguments[1:] != ["--dry-run"] else ())
        return codes.get(arguments[0], console.EXIT_DONE)

    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(main=main))

    def chain(shared: str, pack: str, seeds: str = "xx", code: int = 0) -> list[str]:
        ran.clear()
        progress = Progress(tmp_path / "stages.json", "test")
        progress.run("a_stage", [shared], "shared")
        progress.run("a_stage", [pack], "pack one", "one")
        for seed, one in enumerate(seeds):
            progress.run("a_stage", [one], f"one {seed}", f"one/{seed}")
            progress.run("a_stage", ["two"], f"two {seed}", f"two/{seed}")
        assert progress.code == code
        return [*ran]

    return chain


def test_a_stage_that_has_changed_is_followed_by_its_own_branch(
    chain_of: Callable[..., list[str]],
) -> None:
    assert chain_of("s", "p") == ["s", "p", "x", "two", "x", "two"]
    assert chain_of("s", "p") == []
    assert chain_of("s", "p", "yx") == ["y"]
    assert chain_of("s", "q", "yx") == ["q", "y", "x"]
    assert chain_of("t", "q", "yx") == ["t", "q", "y", "two", "x", "two"]
    assert chain_of("partly", "q", "yx", 3) == ["partly", "q", "y", "two", "x", "two"]
    assert chain_of("partly", "q", "yx", 3) == []


def test_a_chain_that_is_told_to_stop_goes_on_from_there(
    chain_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        chain_of("s", "stopped")
    assert stop.value.code == console.EXIT_PREEMPTED
    assert chain_of("s", "p")[:1] == ["p"]


@pytest.mark.parametrize("newest", ["step-2", None])
def test_images_of_other_weights_are_told_from_those_of_the_newest(
    tmp_path: Path, newest: str | None
) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    assert not generated_by_others(images, run)
    images.mkdir()
    (images / "a.json").write_text(json.dumps({"identity": {"checkpoint": "step-2"}}))
    assert generated_by_others(images, run)
    run.mkdir()
    state = RunState("done", 2, "", 0.0, 0.0, newest, 0, None)
    (run / "state.json").write_text(json.dumps(asdict(state)))
    assert generated_by_others(images, run) == (newest is None)


def test_a_changed_command_that_is_refused_loses_nothing(
    chain_of: Callable[..., list[str]],
) -> None:
    chain_of("s", "p")
    with pytest.raises(ValueError, match="shared had other options"):
        chain_of("refused", "p")
    assert chain_of("s", "p") == []


@pytest.mark.timeout(600)
def test_a_small_comparison_resumes_between_seeds_and_repeats_nothing(
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("jobs.evaluate")
    file, out = tmp_path / "small.toml", tmp_path / "out"
    train = '["--steps", "2", "--batch", "2"]'
    file.write_text(
        f"""
        cpu_minutes = 10
        seeds = [0, 3]
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
    # Killed while the second contestant trains with the second seed.
    train_main = jobs.train.main

    def killed(arguments: list[str]) -> int:
        if {"--seed", "3", "patch"} <= {*arguments}:
            raise KeyboardInterrupt
        return train_main(arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs.train, "main", killed)
        jobs.compare.main(command)
    facts = json.loads((out / "compare.json").read_text())
    assert facts["seeds"] == [0]
    first = [one["runs"][0] for one in facts["contestants"]]
    assert (out / "compare.md").read_text() in capsys.readouterr().out
    assert jobs.compare.main(command) == 0
    stages = [line for line in capsys.readouterr().out.splitlines() if "python -m" in line]
    assert [line.split()[3] for line in stages] == ["jobs.train", "jobs.sample", "jobs.evaluate"]
    facts = json.loads((out / "compare.json").read_text())
    ours, patches = facts["contestants"]
    assert facts["seeds"] == [0, 3]
    assert [one["runs"][0] for one in facts["contestants"]] == first
    for one in (ours, patches):
        assert one["batch"] == 2
        assert [r["seed"] for r in one["runs"]] == [0, 3]
        for r in one["runs"]:
            assert (r["steps"], r["images"], len(facts["regions"])) == (2, 2, 2)
            assert 0 < r["cpu_minutes"] < 10
            assert r["metrics"]["condition_cosine"]["footprint_px"] == 256
            assert r["metrics"]["n"] == ours["runs"][0]["metrics"]["n"]
    assert patches["runs"][0]["recipe"]["overlap"] == 0.0
    # Each computes as suits its layers; only patches overlap.
    shared = [
        {k: v for k, v in one["runs"][1]["recipe"].items() if k not in ("bf16", "overlap")}
        for one in (ours, patches)
    ]
    assert shared[0] == shared[1]
    (pair,) = facts["pairs"]
    for name in ("crop_fid", "kid"):
        means = [
            np.mean([r["metrics"][name]["value"] for r in one["runs"]]) for one in (ours, patches)
        ]
        assert pair[name]["value"] == pytest.approx(means[0] - means[1], rel=1e-4)
    with Image.open(out / "compare.png") as picture:
        assert picture.size == (3 * 512 + 16, 2 * 512 + 8)
    assert jobs.compare.main(command) == 0
    assert "python -m" not in capsys.readouterr().out
