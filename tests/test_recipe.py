"""The table of variants (tests/benchmarks/recipe.py): lines, resumption, and what is stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chain import Chain

from pipeline.phantom import draw_slide

SCRIPT = Path(__file__).parent / "benchmarks" / "recipe.py"
TABLE = """
seeds = {seeds}
train = ["--batch", "2", "--warmup", "2"]

[[variants]]
name = "D"
blocks = ["D"]
cpu_seconds = 1

[[variants]]
name = "far from early"
blocks = ["D"]
cpu_seconds = 1
weights = "D"
against = "D"
autoguidance = {{ D = 30.0 }}
evaluations = {{ D = 3 }}
"""
STORE = """
[stores.{name}]
store = "{store}"
encoder = "{encoder}"
packs_per_region = 1
"""


SMALL = """
[stores.small]
inputs = ["{slide}"]
ingest = [
    "--region", "256", "--min-tissue", "0", "--held-out", "0.4", "--cluster", "inline",
]
pretrain = [
    "--steps", "2", "--batch-size", "8", "--input-size", "32", "--dim", "16",
    "--footprints", "64", "256",
]
embed = ["--footprint", "64", "256"]
packs_per_region = 1
"""


def recipe(table: Path, out: Path, *more: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(table), "--out", str(out), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_table(chain: Chain, file: Path, seeds: list[int], *stores: str) -> Path:
    text = TABLE.format(seeds=seeds)
    for name in stores:
        text += STORE.format(name=name, store=chain.store, encoder=chain.encoder)
    file.write_text(text)
    return file


IN_STUDY = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from recipe_table import Job, Study, Table
study = Study(Table.read(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def in_study(table: Path, out: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Code on a study, where the benchmarks' modules can be imported."""
    command = [sys.executable, "-c", IN_STUDY + code, str(SCRIPT.parent), str(table), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_every_variant_leaves_a_line_and_is_not_repeated(tmp_path: Path) -> None:
    """Trained for its CPU seconds, generated with and measured; the same weights under another
    way of sampling make another picture of the same training.
    """
    slide, table, out = (tmp_path / name for name in ("slide.tif", "table.toml", "out"))
    draw_slide(slide, height_px=1280, width_px=1024, mpp=0.5, seed=0)
    table.write_text(TABLE.format(seeds=[0]) + SMALL.format(slide=slide))
    said = recipe(table, out)
    first, second = lines_of(out)
    assert [first["variant"], second["variant"]] == ["D", "far from early"]
    assert first["steps"] == second["steps"] and 1 <= first["cpu_seconds"] < 60
    assert first["errors"] == second["errors"] and first["errors"]["D"]["split"] == "val"
    assert first["parameters"]["D"] > 100_000
    assert first["split"] != "train" and first["regions"]
    values = [line["crop_fid"]["value"] for line in (first, second)]
    assert 0 < values[0] < values[1]
    assert "| small | far from early | D " in said
    recipe(table, out)
    assert lines_of(out) == [first, second]


def test_a_line_that_two_seeds_refute_is_stopped(chain: Chain, tmp_path: Path) -> None:
    """Not where one seed does, nor for a variant that is against nothing."""
    table = write_table(chain, tmp_path / "table.toml", [0, 1], "one", "two")
    out = tmp_path / "out"
    out.mkdir()
    known = [("D", store, seed, 100.0) for store in ("one", "two") for seed in (0, 1)]
    known += [("far from early", "one", seed, 110.0) for seed in (0, 1)]
    asked = [(variant, store, seed) for variant, store, seed, _ in known]
    code = f"import json; print(json.dumps([study.tried(Job(*job)) for job in {asked}]))"
    tried = json.loads(in_study(table, out, code).stdout)
    rows = [
        {
            "variant": variant,
            "store": store,
            "seed": seed,
            "crop_fid": {"value": value},
            "tried": t,
        }
        for (variant, store, seed, value), t in zip(known, tried, strict=True)
    ]
    file = out / "results.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code = "print([study.is_refuted(variant) for variant in study.table.variants])"

    def refuted() -> str:
        return in_study(table, out, code).stdout

    assert refuted() == "[False, True]\n"
    rows[-1]["crop_fid"] = {"value": 90.0}
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert refuted() == "[False, False]\n"


def test_what_a_job_needs_follows_from_the_table_above_it(chain: Chain, tmp_path: Path) -> None:
    table = write_table(chain, tmp_path / "table.toml", [3, 4], "one")
    c = '[[variants]]\nname = "C"\nblocks = ["C"]\ncpu_seconds = 1\n'
    code = 'print({k: str(v) for k, v in study.sources(Job("C", "one", 4)).items()})'
    below, above = (
        table.read_text() + c,
        table.read_text().replace("[[variants]]", f"{c}[[variants]]", 1),
    )
    table.write_text(below)
    said = in_study(table, tmp_path / "out", code)
    assert said.stdout == "{'C': 'C/one/4', 'D': 'D/one/3'}\n"
    code_two = 'print(study.sources(Job("far from early", "one", 4))["D"])'
    assert in_study(table, tmp_path / "out", code_two).stdout == "D/one/4\n"
    table.write_text(above)
    assert "no variant above it in the table" in in_study(table, tmp_path / "out", code).stderr
    table.write_text(below)
    said = subprocess.run(
        [sys.executable, str(SCRIPT), str(table), "--out", str(tmp_path / "out"), "--only", "C"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2 and "needs the run of D/one/3, which is not there" in said.stderr


def test_a_line_of_another_definition_is_not_taken_for_this_one(
    chain: Chain, tmp_path: Path
) -> None:
    table, out = write_table(chain, tmp_path / "table.toml", [0], "one"), tmp_path / "out"
    out.mkdir()
    code = 'import json; print(json.dumps(study.tried(Job("far from early", "one", 0))))'
    tried = json.loads(in_study(table, out, code).stdout)
    assert tried["sources"] == {"D": "D/one/0"}
    row = {"variant": "far from early", "store": "one", "seed": 0, "tried": tried}
    (out / "results.jsonl").write_text(f"{json.dumps(row)}\n")
    assert in_study(table, out, "print(len(study.done()))").stdout == "1\n"
    table.write_text(table.read_text().replace("D = 30.0", "D = 31.0"))
    assert "give the variant another name" in in_study(table, out, "study.done()").stderr


def test_errors_are_of_the_weights_that_generate(chain: Chain, tmp_path: Path) -> None:
    """The least one on validation regions, of other splits the last one."""
    table = write_table(chain, tmp_path / "table.toml", [0], "one")
    code = "import sys, json; from recipe_trial import errors_of\n"
    code += "rows = [{'part': part, 'split': split, 'log_snrs': [0], 'levels': [0], "
    code += "'held_out': [[error]]} for part, split in (('A', 'val'), ('B', 'test')) "
    code += "for error in (0.9, 0.5, 0.7)]\n"
    code += "print([found['held_out'] for found in errors_of([{}, *rows]).values()])"
    assert in_study(table, tmp_path / "out", code).stdout == "[[[0.5]], [[0.7]]]\n"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('name = "far from early"', 'name = "D"'), "variants need different names, not D, D"),
        (('against = "D"', 'colour = "D"'), "a variant has unknown keys ['colour']"),
        (("packs_per_region = 1", "colour = 1"), "store chain has unknown keys ['colour']"),
        (('against = "D"', 'against = "C"'), "the table has no variant C"),
        (('weights = "D"', 'weights = "C"'), "and no variant above it is called that"),
        (("autoguidance = { D", "autoguidance = { E"), "names a block E, and has T, A, B, C, D"),
        (('blocks = ["D"]', "blocks = []"), "variant D names no block"),
        (('against = "D"', 'stores = ["C"]'), "far from early is tried on C, which is no store"),
        (("cpu_seconds = 1", 'cpu_seconds = "1"'), "cpu_seconds must be a number, not '1'"),
    ],
)
def test_a_mistake_in_a_table_is_a_sentence(
    chain: Chain, tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    table = write_table(chain, tmp_path / "table.toml", [0], "chain")
    table.write_text(table.read_text().replace(*change))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(table), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and sentence in done.stderr
