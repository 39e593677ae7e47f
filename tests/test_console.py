"""How every command behaves: its disk is planned first, the time left is the nearer end's."""

import importlib
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, ingest_arguments, pack_arguments, train_arguments

import jobs.sample
import jobs.train
from jobs.run import Run
from jobs.sample.options import Sample
from pipeline import console
from pipeline.packfile import PackSet
from pipeline.store import Store

Usage = namedtuple("Usage", "total used free")
FREE, PLENTY = 17, 10**12
COMPARISON = Path(__file__).parent.parent / "docs" / "compare" / "two_cores.toml"


def fake_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(PLENTY, PLENTY - free, free))


@pytest.fixture
def commands(chain: Chain, tmp_path: Path) -> dict[str, list[str]]:
    """Every command that writes much, with work to do in a folder of its own."""
    run, store = tmp_path / "run", str(chain.store)
    packs = PackSet.open(chain.packs)
    options = jobs.train.Train(chain.packs, run, preset="tiny")
    Run(run).claim(jobs.train.make_config(options, packs))
    image = Store.open(chain.store).image(Store.open(chain.store).image_ids()[0]).path
    out = {name: str(tmp_path / name) for name in ("new.zarr", "e", "p", "r", "i", "x", "d")}
    slide = ["slide", "--height-px", "600", "--width-px", "600"]
    return {
        "pipeline.phantom slide": [*slide, "--out", out["x"] + ".tif"],
        "pipeline.phantom aerial": ["aerial", "--out", out["x"] + ".tif"],
        "pipeline.ingest": ingest_arguments(chain.slide, Path(out["new.zarr"])),
        "conditioning.pretrain": [store, "--out", out["e"], "--steps", "2"],
        "conditioning.embed": [store, "--encoder", str(chain.encoder), "--footprint", "128"],
        "pipeline.pack": pack_arguments(chain, Path(out["p"])),
        "jobs.train": train_arguments(chain, Path(out["r"]), 2),
        "jobs.sample": [str(run), "--condition", store, "--out", out["i"]],
        "pipeline.export": [str(image), "--out", out["x"] + ".ome.tif"],
        "jobs.demo": ["--out", out["d"]],
        "jobs.compare": [str(COMPARISON), "--out", out["d"]],
    }


def test_every_plan_says_its_disk_and_stops_where_it_is_too_small(
    chain: Chain,
    commands: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = (tmp_path, chain.store)
    before = [sorted(place.rglob("*")) for place in places]
    for name, arguments in commands.items():
        main = importlib.import_module(name.split()[0]).main
        for free, dry, code in (
            (FREE, [], 2),
            (FREE, ["--dry-run"], 2),
            (PLENTY, ["--dry-run"], 0),
        ):
            fake_disk(monkeypatch, free)
            assert main([*arguments, *dry]) == code, name
            said = capsys.readouterr()
            assert "needed at most" in said.out and f"{console.size(free)} free" in said.out, name
            if code:
                (mistake,) = said.err.splitlines()
                assert " needs about " in mistake and f" has {FREE} bytes free" in mistake, name
    assert [sorted(place.rglob("*")) for place in places] == before


def test_what_is_done_needs_no_disk(
    commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline.phantom slide", "pipeline.export", "pipeline.pack"):
        main = importlib.import_module(name.split()[0]).main
        assert main(commands[name]) == 0
        fake_disk(monkeypatch, 0)
        assert main(commands[name]) == 0, name
        monkeypatch.undo()


def test_a_command_line_is_parsed_into_what_it_was_made_from(tmp_path: Path) -> None:
    made = [
        jobs.train.Train(Path("my packs"), Path("run"), preset="tiny", augment=False),
        jobs.train.Train(
            Path("p"), Path("r"), max_minutes=1.5, init_from=(Path("w.safetensors"),)
        ),
        Sample(Path("r"), Path("s"), Path("o"), region=(1, 2), dry_run=True),
    ]
    for options in made:
        seen: list[object] = []
        prog, *arguments = console.shlex.split(console.command_line("command", options))
        assert (
            console.run(
                type(options), lambda o, seen=seen: seen.append(o) or 0, arguments, prog=prog
            )
            == 0
        )
        assert seen == [options]


def test_the_time_left_follows_from_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """100 items of 3 s each: after the tenth, 270 s are left."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)

    def items() -> Iterator[int]:
        nonlocal now
        for number in range(100):
            now = 3.0 * number
            yield number

    for number in console.progress(items(), total=100, desc="work"):
        if number == 10:
            break
    assert capsys.readouterr().out == "work: 10 of 100, about 270 s left\n"
