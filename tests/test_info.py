"""What `gigabrush info` says is what is there, read without torch."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import Chain
from processes import WITHOUT_TORCH
from safetensors.numpy import save_file

import jobs.info
import jobs.train
from jobs.info.describe import describe_run
from jobs.run import Run
from pipeline.ome import OmeImage
from pipeline.packfile import PackSet
from pipeline.store import Store

ASK_ALL = """
import jobs.info
for path in sys.argv[1:]:
    assert jobs.info.main([path, "--json"]) == 0
    print("\\0")
"""
PLACE = {
    "proj:code": "EPSG:26911",
    "spatial:transform": [0.6, 0.0, 431000.5, 0.0, -0.6, 3779000.0],
}


@pytest.fixture(scope="module")
def run(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as a process leaves it that was killed at step 7."""
    folder = tmp_path_factory.mktemp("run") / "run"
    options = jobs.train.Train(chain.packs, folder, preset="tiny", steps=20)
    claimed = Run(folder)
    config = jobs.train.make_config(options, PackSet.open(chain.packs))
    claimed.claim(config, "python -m jobs.train packs --run run")
    for step, part in ((1, "B"), (2, "C"), (6, "C"), (7, "B")):
        line = {"step": step, "part": part, "part_step": step - 1, "loss": 10.0 / step}
        levels = {"B": [2, 3, 4], "C": [0, 1]}[part]
        claimed.append_metrics({**line, "levels": levels, "seconds": 2.0 * step})
        errors = {"split": "val", "levels": levels, "held_out": [[0.5 / step] * len(levels)] * 5}
        claimed.append_metrics({"step": step, "part": part, **errors})
    weights = claimed.checkpoint_folder(7) / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(4, np.float32)}, weights)
    claimed.update(step=7, checkpoint="step-00000007", seconds=14.0)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    return folder


@pytest.fixture(scope="module")
def painted(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("painted") / "a_region3_seed0.zarr"
    identity = {
        **{"run": "run", "checkpoint": "step-00000007", "store_fingerprint": "f"},
        **{"region": {"index": 3, "split": "val"}, "recipe": {"steps": 4, "seed": 0}},
    }
    attributes = {**PLACE, "gigabrush": identity}
    shape, bands = (4, 80, 60), ("red", "green", "blue", "nir")
    image = OmeImage.create(path, shape, "uint8", 0.6, "meter", bands, attributes)
    image.write_shard((0, 0), np.zeros(shape, np.uint8))
    image.finish()
    return path


def say(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert jobs.info.main([str(path)]) == 0
    return capsys.readouterr().out


def test_packs_say_how_they_were_drawn(
    point_packs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "design mixed, seed 0, of pixels smoothed by 1 px" in say(point_packs["mixed"], capsys)
    plain = say(point_packs["uniform"], capsys)
    assert "design uniform, seed 0" in plain
    assert "smoothed" not in plain


def test_everything_describes_itself_without_torch(chain: Chain, run: Path, painted: Path) -> None:
    store = Store.open(chain.store)
    (name,) = store.image_ids()
    paths = [chain.store, chain.packs, run, chain.encoder, painted, store.image(name).path]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + ASK_ALL, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(part) for part in done.stdout.split("\0")[:-1]]
    of_store, of_packs, of_run, of_encoder, of_painted, of_image = answers
    for path, answer in zip(paths, answers, strict=True):
        sizes = [p.stat().st_size for p in path.rglob("*") if p.is_file()]
        assert answer["bytes"] == sum(sizes)
        assert answer["path"] == str(path)
    assert of_store["images"] == {"ok": 1}
    assert of_store["fingerprint"] == store.fingerprint()
    assert sum(of_store["regions"]["splits"].values()) == len(store.regions())
    ((key, encoder),) = of_store["encoders"].items()
    assert key == store.encoders()[0]
    assert encoder["images_by_footprint_px"] == {"64": 1, "256": 1}
    packs = PackSet.open(chain.packs)
    assert of_packs["settings"]["encoder_key"] == key
    assert sum(of_packs["splits"].values()) == len(packs.regions)
    assert of_run["parameters"] == 3 * 5 + 4
    assert of_run["last_metrics"]["loss"] == 10 / 7
    assert {name: line["step"] for name, line in of_run["held_out"].items()} == {"B": 7, "C": 6}
    assert {n: line["loss"] for n, line in of_run["last_by_part"].items()} == {
        "B": 10 / 7,
        "C": 10 / 6,
    }
    assert of_run["state"]["checkpoint"] == "step-00000007"
    assert of_encoder["bands"] == list(store.spec.bands)
    assert of_painted["identity"]["region"]["index"] == 3
    assert of_painted["georeference"] == PLACE
    assert of_image["identity"] is None
    assert of_image["shape"] == list(store.image(name).shape)


def test_a_store_names_what_failed_and_why(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.create(tmp_path / "s.zarr", Store.open(chain.store).spec)
    store.write_image_state("a", {"state": "failed", "reason": "a.svs is cut off; copy it again"})
    store.write_image_state("b", {"state": "empty", "reason": "no tissue in b.svs"})
    said = say(store.path, capsys)
    assert "1 empty, 1 failed" in said
    assert "a.svs is cut off; copy it again" in said
    assert "no tissue in b.svs" in said
    assert "run python -m pipeline.ingest to its end" in said


def test_a_run_says_whether_it_is_alive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the process that owns it and by its heartbeat."""

    def status(**changes: Any) -> str:
        state = replace(Run(run).state(), **changes)
        (run / "state.json").write_text(json.dumps(state.__dict__))
        return dict(describe_run(run).lines)["status"]

    ours = f"{socket.gethostname()}:{os.getpid()}:1"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    now = time.time()
    assert status(owner=ours, heartbeat=now).startswith("running: ")
    assert status(owner=f"{socket.gethostname()}:{ended.pid}:1").startswith("died: ")
    assert status(owner="elsewhere:1:1", heartbeat=now - 30).startswith("running: ")
    assert "0:10:0" in status(owner="elsewhere:1:1", heartbeat=now - 600)
    assert status().startswith("died: ")
    assert status(status="preempted", job_id="17", restarts=2).startswith("preempted ")
    said = say(run, capsys)
    assert "job 17, restarted 2 times" in said
    assert "7 of 20 steps of 16 windows" in said and "0:00:14" in said
    assert "B 1.429 at step 6; it was 10 at step 0" in said
    assert "C 1.667 at step 5; it was 5 at step 1" in said
    assert "B 0.071, C 0.083 on validation regions; 1 is the linear estimate" in said
    assert f"python -m jobs.train packs --run run\n{'':<14}in {os.getcwd()}" in said


def test_a_run_of_one_part_says_its_loss(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also an older one, whose lines name no part."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    lines = [{"step": step, "loss": 10.0 / step, "seconds": 2.0 * step} for step in (1, 7)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    said = say(folder, capsys)
    assert "loss        1.429 at step 7; it was 10 at step 1" in said
    assert "held out" not in said


def test_an_image_says_where_it_lies_and_what_is_missing(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = say(painted, capsys)
    assert "80 × 60 px, 48 m × 36 m" in said
    assert "EPSG:26911, upper left corner at x 431000.5, y 3779000" in said
    assert "after region 3 (val)" in said
    begun = OmeImage.create(tmp_path / "x.zarr", (1, 9, 9), "uint8", 1.0, "micrometer", ("grey",))
    assert "unfinished" in say(begun.path, capsys)


def test_anything_else_is_refused_with_what_was_looked_for(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, sentence in (
        (tmp_path, "is neither a store nor an image (zarr.json), packs (index.json)"),
        (chain.slide, "is neither a store"),
        (tmp_path / "nothing", "does not exist"),
        (chain.store.parent, "it contains dataset.zarr, encoder, packs, name one of them"),
    ):
        assert jobs.info.main([str(path)]) == 2
        said = capsys.readouterr()
        assert sentence in said.err
        assert len(said.err.splitlines()) == 1 and not said.out
