"""What `gigabrush doctor` finds is what is there, and what it does not find it explains."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import WITHOUT_TORCH
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

import jobs.doctor
import jobs.doctor.machine
from jobs.doctor.machine import DEMO_BYTES
from jobs.weights import CLIP_FILE, CLIP_REPOSITORY, clip_weights, inception_place

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room, whatever this one has, and no cluster that could be slow to answer."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, 2**50))
    monkeypatch.setattr(jobs.doctor.machine, "_free_memory", lambda: 2**40)
    monkeypatch.setattr(jobs.doctor.machine, "_answer", lambda command: None)


def ask(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, dict[str, Any]]:
    assert jobs.doctor.main(["--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_run"] == (code == 0)
    assert len(answer["items"]) == len({item["name"] for item in answer["items"]})
    for item in answer["items"]:
        if item["state"] != "ok":
            assert item["purpose"] and item["remedy"], item["name"]
            assert "://" not in item["remedy"]
    return {item["name"]: item for item in answer["items"]}


def test_what_is_installed_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    items = ask(capsys, 0)
    for name in ("zarr", "deepspeed", "torch-fidelity"):
        assert items[name]["found"].startswith(importlib.metadata.version(name))
    assert ">=3.1.3" in items["zarr"]["found"]
    assert torch.__version__ in items["torch loads"]["found"]
    assert all(items[name]["state"] == "ok" for name in ("OpenSlide", "GDAL", "CPU", "disk"))


def test_lines_are_aligned_and_say_their_state_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert jobs.doctor.main([]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) > 40
    for line in lines:
        assert re.fullmatch(r"  (ok     |missing|absent )  .{32}  \S.*", line), line
    assert "\x1b" not in text


@pytest.mark.parametrize(("version", "found"), [(None, "not installed"), ("0.1", "0.1 (>=1.0")])
def test_what_the_chain_needs_is_missing_when_absent_or_too_old(
    version: str | None,
    found: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = importlib.metadata.version

    def fake(name: str) -> str:
        if name != "timm":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    items = ask(capsys, 3)
    assert items["timm"]["state"] == "missing"
    assert items["timm"]["found"].startswith(found)
    assert [name for name, item in items.items() if item["state"] == "missing"] == ["timm"]
    assert jobs.doctor.main([]) == 3
    assert "for embedding, training and painting; get it: make setup" in capsys.readouterr().out


def test_too_little_room_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, DEMO_BYTES - 1))
    monkeypatch.setattr(jobs.doctor.machine, "_free_memory", lambda: 17)
    items = ask(capsys, 3)
    assert items["disk"]["state"] == items["memory"]["state"] == "missing"
    assert "17 bytes free" in items["memory"]["found"]


def test_published_weights_are_found_where_their_libraries_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    assert inception_place().name == URL_INCEPTION_V3.rpartition("/")[2]
    assert inception_place().parent == Path(torch.hub.get_dir()) / "checkpoints"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert inception_place().parent == Path(torch.hub.get_dir()) / "checkpoints"
    before = ask(capsys, 0)
    assert before["CLIP ViT-B/32"]["state"] == before["Inception v3"]["state"] == "absent"
    repository = tmp_path / "hub" / f"models--{CLIP_REPOSITORY.replace('/', '--')}"
    clip = repository / "snapshots" / ("0" * 40) / CLIP_FILE
    for file in (clip, inception_place(), repository / "refs" / "main"):
        file.parent.mkdir(parents=True)
        file.write_text("0" * 40)
    assert clip_weights() == clip
    after = ask(capsys, 0)
    assert after["EffNet-lite0"]["state"] == "ok"  # a package of the lock
    assert str(clip) in after["CLIP ViT-B/32"]["found"]
    assert str(inception_place()) in after["Inception v3"]["found"]


def test_programs_are_found_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    viewers = {"QuPath": "QuPath", "napari": "napari", "browser": "firefox", "Fiji": "fiji"}
    monkeypatch.setattr(jobs.doctor.machine, "VIEWER_FOLDERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = ask(capsys, 0)
    assert absent["SLURM"]["found"] == "no sbatch, srun, sinfo"
    for name in ("sbatch", "srun", "sinfo", *viewers.values()):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(jobs.doctor.machine, "_answer", lambda command: "a\nb\na\n")
    found = ask(capsys, 0)
    assert found["controller"]["found"] == "answers, 2 nodes"
    for viewer, program in viewers.items():
        assert absent[viewer]["state"] == "absent"
        assert found[viewer]["found"] == str(tmp_path / program)


def test_a_node_without_torch_is_told_so(tmp_path: Path) -> None:
    code = f"{WITHOUT_TORCH}\nimport jobs.doctor; sys.exit(jobs.doctor.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.returncode == 3, done.stderr
    assert re.search(r"^  missing  torch loads +no: ", done.stdout, re.MULTILINE)
    assert "cannot run here" in done.stdout
