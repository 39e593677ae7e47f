"""The report, opened from disk in a real browser: the right pictures, nothing from elsewhere."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_chromium
from chain import EVEN_SHARES, Chain, succeed, train_arguments
from PIL import Image
from processes import tree

import jobs.report
import jobs.report.command
import jobs.sample
import jobs.train
from jobs.report.progress import Progress
from jobs.run import Run
from pipeline.ome import OmeImage
from pipeline.store import Region, Store, StoreSpec

SIZE = (320, 512)
METRICS: dict[str, Any] = {
    "protocol": {"crop_px": 256, "description": "Crops at keyed places.", "real_split": "val"},
    "features": {"name": "own", "label": "an encoder of one's own", "conditions_images": True},
    "n": {"real": 31, "generated": 29},
    "crop_fid": {"value": 12.345, "interval": [11.5, 13.25], "floor": 4.56, "floor_n": 17},
    "kid": {"value": 0.0123, "interval": [0.01, 0.02], "floor": 0.00045},
    "spectrum": {
        "octaves": [
            {"level": 0, "cells_px": [1, 2], "real": 2.0, "generated": 1.0, "log2_ratio": -1.0},
            {"level": 1, "cells_px": [2, 4], "real": 0.5, "generated": 0.7, "log2_ratio": 0.485},
        ]
    },
    "seams": {"real": 1.01, "generated": 1.07, "period_px": 32},
    "condition_cosine": {"own": 0.876, "other": 0.543},
    "notes": ["few crops: read KID"],
    "failed": {"gone.zarr": "it is not whole"},
    "provenance": {"commit": "abc123", "hardware": {"cores": 3}},
    "of a later version": [1, {"a": None}],
}


@dataclass(frozen=True)
class Case:
    """A run, images that it painted, and the store that they were painted after."""

    run: Path
    images: Path
    store: Path


@dataclass(frozen=True)
class Written:
    """A written report: its folder, and the pictures of each painting by panel and kind."""

    case: Case
    out: Path

    def picture(self, painting: int, panel: str, kind: str) -> np.ndarray:
        (file,) = self.out.glob(f"files-*/image{painting}-{panel}-{kind}")
        with Image.open(file) as picture:
            return np.asarray(picture).astype(int)

    def text(self) -> str:
        return (self.out / "index.html").read_text()


def write_report(case: Case, out: Path, *more: str) -> Written:
    succeed(jobs.report.main([str(case.images), "--out", str(out), *more]))
    return Written(case, out)


def record_of(case: Case, painting: int) -> tuple[dict[str, Any], OmeImage, Region]:
    """The record, the image and the region of the painting that a page shows in this place."""
    file = sorted(case.images.glob("*.json"))[painting - 1]
    record = json.loads(file.read_text())
    region = Region(**record["identity"]["region"])
    return record, OmeImage.open(case.images / record["image"]), region


def rgb(image: OmeImage, y: int, x: int, height: int, width: int, level: int = 0) -> np.ndarray:
    return image.read(y, x, height, width, level).transpose(1, 2, 0).astype(int)


@pytest.fixture(scope="module")
def painted(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two images larger than their regions and not square, a third at half the scale."""
    folder = tmp_path_factory.mktemp("reported")
    case = Case(folder / "run", folder / "images", chain.store)
    succeed(jobs.train.main(train_arguments(chain, case.run, 5, *EVEN_SHARES)))
    common = [str(case.run), "--condition", str(chain.store), "--out", str(case.images)]
    common += ["--steps", "2", "--guidance", "1", "--format", "zarr"]
    size = f"{SIZE[0]}x{SIZE[1]}"
    succeed(jobs.sample.main([*common, "--region", "3", "0", "--size", size]))
    half = ["--region", "3", "--size", "256", "--scale", "0.5", "--seed", "1"]
    succeed(jobs.sample.main([*common, *half]))
    return case


@pytest.fixture(scope="module")
def written(painted: Case, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A report with metrics."""
    folder = tmp_path_factory.mktemp("report #1 100%")
    (folder / "measured.json").write_text(json.dumps(METRICS))
    return write_report(painted, folder / "out", "--metrics", str(folder / "measured.json"))


@pytest.fixture(scope="module")
def unmeasured(painted: Case, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A report of the same images before they were evaluated."""
    return write_report(painted, tmp_path_factory.mktemp("unmeasured") / "out")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("chromium is not installed, so no page was opened")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def open_well(browser: Browser, page: Path, width: int, dark: bool = False) -> None:
    """Open a page; it must be right in every respect that a browser can tell."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(page, width, 900, dark)
    browser.ask("[...document.images].forEach(image => image.loading = 'eager')")
    browser.ask("Promise.all([...document.images].map(image => image.decode()))")
    folder = page.parent.absolute().as_uri()
    assert len(browser.requests) > 1
    assert all(url.startswith((folder, "data:")) for url in browser.requests)
    assert browser.ask("[...document.images].every(image => image.naturalWidth > 0 && image.alt)")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert not browser.complaints


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_opens_from_disk_without_a_complaint(
    browser: Browser, written: Written, unmeasured: Written, width: int, dark: bool
) -> None:
    for report, count in ((written, 3 * 6 + 5 + 3), (unmeasured, 3 * 6 + 3 + 3)):
        open_well(browser, report.out / "index.html", width, dark)
        assert browser.ask("document.images.length") == count
        background = browser.ask("getComputedStyle(document.body).backgroundColor")
        light = int(background[4:].partition(",")[0]) > 128
        assert light is not dark


def test_curves_are_dark_on_light_and_light_on_dark(browser: Browser, written: Written) -> None:
    """A style sheet inside of each SVG exchanges its ink."""
    darkest = {}
    for dark in (False, True):
        open_well(browser, written.out / "index.html", 1280, dark)
        box = browser.ask(
            "(() => {const r = document.querySelector('#spectra img').getBoundingClientRect();"
            "return [r.x + scrollX, r.y + scrollY, r.width, r.height]})()"
        )
        shot = browser.screenshot(**dict(zip(("x", "y", "width", "height"), box, strict=True)))
        grey = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
        background = float(np.median(grey))
        darkest[dark] = (background, float(grey.min()), float(grey.max()))
    assert darkest[False][0] > 240 and darkest[False][1] < 60
    assert darkest[True][0] < 60 and darkest[True][2] > 180


def test_crops_are_the_very_pixels(written: Written) -> None:
    """Condition and painting at one place, inside the region and pixel for pixel."""
    store = Store.open(written.case.store)
    for painting in (1, 2, 3):
        record, image, region = record_of(written.case, painting)
        level = record["identity"]["recipe"]["level"]
        side = min(region.side >> level, *image.shape[1:])
        real = rgb(
            store.image(region.image), region.y >> level, region.x >> level, side, side, level
        )
        assert side <= 512  # so the crop is all of the square that the region conditioned
        np.testing.assert_array_equal(written.picture(painting, "condition", "crop.png"), real)
        np.testing.assert_array_equal(
            written.picture(painting, "generated", "crop.png"), rgb(image, 0, 0, side, side)
        )
        assert abs(real - rgb(image, 0, 0, side, side)).mean() > 5


def test_full_pictures_have_every_pixel_and_mirror_the_condition(written: Written) -> None:
    store = Store.open(written.case.store)
    for painting in (1, 2):
        _, image, region = record_of(written.case, painting)
        side = region.side
        assert side < SIZE[0] < SIZE[1]
        full = written.picture(painting, "generated", "full.jpg")
        assert abs(full - rgb(image, 0, 0, *SIZE)).mean() < 4
        real = rgb(store.image(region.image), region.y, region.x, side, side)
        shown = written.picture(painting, "condition", "full.jpg")
        assert shown.shape == full.shape
        for y, x in ((0, 0), (0, side), (side, 0), (side, side)):
            part = shown[y : y + side, x : x + side]
            turned = real[:: -1 if y else 1, :: -1 if x else 1][: part.shape[0], : part.shape[1]]
            assert abs(part - turned).mean() < 4
        whole = written.picture(painting, "generated", "whole.jpg")
        assert abs(whole - rgb(image, 0, 0, *SIZE)).mean() < 4


def test_pointing_at_a_place_shows_it_in_every_picture(browser: Browser, written: Written) -> None:
    """The loupe: the page's own pixels are those of the store and of the painting there."""
    open_well(browser, written.out / "index.html", 1280)
    _, image, region = record_of(written.case, 1)
    y, x = 190, 330
    canvases = "[...document.querySelectorAll('#image1 canvas')]"
    frame = browser.ask(
        "(() => {const f = document.querySelector('#image1 .whole'); f.scrollIntoView();"
        "const r = f.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]})()"
    )
    to = (frame[0] + frame[2] * (x + 0.5) / SIZE[1], frame[1] + frame[3] * (y + 0.5) / SIZE[0])
    browser.mouse("mouseMoved", *to)
    browser.ask(
        f"new Promise(done => {{const look = () => {canvases}.slice(0, 2).every(c => !c.hidden)"
        " ? requestAnimationFrame(() => done(0)) : setTimeout(look, 20); look()})"
    )
    shown_y, shown_x = (
        int(browser.ask(f"document.querySelector('#image1 output.{name}').value")) for name in "yx"
    )
    assert abs(shown_y - y) <= 1 and abs(shown_x - x) <= 1
    store = Store.open(written.case.store)
    side = region.side
    real = rgb(store.image(region.image), region.y, region.x, side, side)
    mirrored = np.pad(real, ((0, side), (0, side), (0, 0)), mode="symmetric")[: SIZE[0], : SIZE[1]]
    for number, expected in ((0, mirrored), (1, rgb(image, 0, 0, *SIZE))):
        box = browser.ask(
            f"(() => {{const r = {canvases}[{number}].getBoundingClientRect();"
            "return [r.x + scrollX, r.y + scrollY, r.width, r.height]})()"
        )
        corner_x, corner_y = (centre - int(box[2]) // 2 for centre in (shown_x, shown_y))
        # A square in the middle of the pane: clear of the scale bar and of the picture's edges.
        inner = 64
        shift_y, shift_x = (y - inner // 2 - corner_y, x - inner // 2 - corner_x)
        shot = browser.screenshot(
            x=round(box[0]) + shift_x, y=round(box[1]) + shift_y, width=inner, height=inner
        )
        seen = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)
        offsets = [(dy, dx) for dy in range(-3, 4) for dx in range(-3, 4)]
        errors = {
            (dy, dx): abs(
                seen
                - expected[
                    y - inner // 2 + dy : y + inner // 2 + dy,
                    x - inner // 2 + dx : x + inner // 2 + dx,
                ]
            ).mean()
            for dy, dx in offsets
        }
        best = min(errors, key=lambda offset: errors[offset])
        assert errors[best] < 6
        assert max(abs(best[0]), abs(best[1])) <= 1  # the page's own position may be fractional
    browser.ask("document.querySelector('#image1 .reset').click()")
    browser.ask("new Promise(requestAnimationFrame)")
    assert browser.ask(f"{canvases}.every(c => c.hidden)")
    assert not browser.complaints


def test_metrics_are_told_with_floor_interval_and_space(
    browser: Browser, written: Written, unmeasured: Written
) -> None:
    open_well(browser, written.out / "index.html", 1280)
    table = browser.ask("document.querySelector('#metrics').innerText")
    for told in ("12.3", "11.5 to 13.2", "4.56 (n = 17)", "29 generated and 31 real crops"):
        assert told in table
    for told in ("0.0123", "0.00045", "1.07", "0.876", "0.543", "an encoder of one's own"):
        assert told in table
    for told in ("few crops: read KID", "gone.zarr could not be measured: it is not whole"):
        assert told in table
    assert "encoder that also conditions" in browser.ask("document.body.innerText")
    assert "of a later version" in written.text()
    assert "python -m jobs.evaluate --real" in unmeasured.text()
    assert "0.0123" not in unmeasured.text()


def test_any_part_of_the_metrics_may_be_missing(painted: Case, tmp_path: Path) -> None:
    few = Case(painted.run, tmp_path / "images", painted.store)
    record, image, _ = record_of(painted, 3)
    shutil.copytree(image.path, few.images / record["image"])
    (few.images / "one.json").write_text(json.dumps(record))
    parts = [{}, *({name: METRICS[name]} for name in METRICS)]
    parts += [{name: {} for name in METRICS}, {name: None for name in METRICS}]
    for part in parts:
        (tmp_path / "metrics.json").write_text(json.dumps(part))
        text = write_report(few, tmp_path / "out").text()
        assert ("12.3" in text) is (part.get("crop_fid") not in (None, {}))


def test_what_was_measured_of_neighbours_is_believed(painted: Case, tmp_path: Path) -> None:
    names = [file.stem for file in sorted(painted.images.glob("*.json"))]
    measured = {
        "layout": {
            names[0]: {"own": 77.25, "nearest_other": 66.5, "nearest_other_region": 5},
            names[1]: {"own": 70, "nearest_other": None, "nearest_other_region": 3},
            "gone": {},
        },
        "nearest_train": {names[1]: {"region": 4, "distance": 55.125}},
    }
    (tmp_path / "m.json").write_text(json.dumps(measured))
    written = write_report(painted, tmp_path / "out", "--metrics", str(tmp_path / "m.json"))
    assert "77.2 grey levels from its own region and 66.5" in " ".join(written.text().split())
    assert "55.1 grey levels away" in written.text()
    store = Store.open(painted.store)
    region = store.regions()[4]
    _, _, own = record_of(painted, 2)
    expected = rgb(store.image(region.image), region.y, region.x, own.side, own.side)
    np.testing.assert_array_equal(written.picture(2, "nearest", "crop.png"), expected)


def fabricate(
    folder: Path, bands: tuple[str, ...], dtype: str, config_of: Path
) -> tuple[Case, Store]:
    """A store of two images with four regions, three of them for training, and a run that was
    never trained, with nothing painted yet.
    """
    rng = np.random.default_rng(len(bands))
    top = np.iinfo(dtype).max
    store = Store.create(folder / "dataset.zarr", StoreSpec("m", 0.6, bands, dtype, 192))
    for name in ("a", "b"):
        coarse = rng.integers(0, top // 2, (len(bands), 24, 48))
        fine = rng.integers(0, top // 2, (len(bands), 192, 384))
        pixels = (coarse.repeat(8, axis=1).repeat(8, axis=2) + fine).astype(dtype)
        write_image(store.image_path(name), pixels, bands)
    splits = {("a", 0): "val", ("a", 192): "train", ("b", 0): "train", ("b", 192): "train"}
    store.write_regions(
        [Region(0, name, 0, x, 192, 1.0, split) for (name, x), split in splits.items()]
    )
    config = Run(config_of).config()
    statistics = replace(
        config.statistics,
        mean=(top / 3,) * len(bands),
        colour=tuple(tuple(map(float, row)) for row in top / 8 * np.eye(len(bands))),
    )
    packs = replace(config.packs, store=str(store.path), bands=bands, dtype=dtype, unit="m")
    Run(folder / "run").claim(replace(config, packs=packs, statistics=statistics))
    return Case(folder / "run", folder / "images", store.path), store


def write_image(path: Path, pixels: np.ndarray, bands: tuple[str, ...]) -> None:
    image = OmeImage.create(path, pixels.shape, str(pixels.dtype), 0.6, "meter", bands)
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        image.write_shard(key, pixels[:, y : y + height, x : x + width])
    image.finish()


def pretend(case: Case, store: Store, name: str, region: Region, pixels: np.ndarray) -> None:
    """Put pixels in place of a painting after a region."""
    write_image(case.images / f"{name}.zarr", pixels, store.spec.bands)
    recipe = {"height": pixels.shape[1], "width": pixels.shape[2], "seed": 0, "level": 0}
    identity = {"run": str(case.run), "checkpoint": None, "recipe": recipe}
    identity |= {"store_fingerprint": store.fingerprint(), "region": asdict(region)}
    identity |= {"size_px": list(pixels.shape[1:])}
    record = {"image": f"{name}.zarr", "identity": identity, "seconds": 1.0}
    (case.images / f"{name}.json").write_text(json.dumps(record))


def test_copies_are_found_out(painted: Case, tmp_path: Path) -> None:
    """A copy of its condition follows it; a copy of a training region is nearest to that one."""
    case, store = fabricate(tmp_path, ("red", "green", "blue"), "uint8", painted.run)
    regions = store.regions()
    pixels = [store.image(r.image).read(r.y, r.x, r.side, r.side) for r in regions]
    condition = next(r for r in regions if r.split == "val")
    for number, copied in enumerate(pixels):
        pretend(case, store, f"copy{number}", condition, copied)
    written = write_report(case, tmp_path / "out")
    text = " ".join(written.text().split())
    assert text.count("Follows its condition") == 1
    assert text.count("Does not follow its condition") == len(regions) - 1
    for number, (region, copied) in enumerate(zip(regions, pixels, strict=True), 1):
        nearest = written.picture(number, "nearest", "crop.png")
        same = bool((nearest == copied.transpose(1, 2, 0)).all())
        assert same is (region.split == "train")


@pytest.mark.parametrize(
    ("bands", "dtype"),
    [(("grey",), "uint8"), (("red", "green", "blue", "nir"), "uint16")],
    ids=["one band", "four bands of 16 bits"],
)
def test_other_bands_and_depths_are_shown(
    browser: Browser, painted: Case, tmp_path: Path, bands: tuple[str, ...], dtype: str
) -> None:
    case, store = fabricate(tmp_path, bands, dtype, painted.run)
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(9).integers(0, top + 1, (len(bands), 130, 170)).astype(dtype)
    pretend(case, store, "noise", store.regions()[0], pixels)
    written = write_report(case, tmp_path / "out")
    open_well(browser, written.out / "index.html", 390)
    shown = written.picture(1, "generated", "crop.png")
    square = pixels[[0, 1, 2] if len(bands) > 2 else [0, 0, 0], :130, :130].transpose(1, 2, 0)
    high = 255 if dtype == "uint8" else top / 3 + 3 * top / 8
    expected = np.clip(square * (255 / high), 0, 255)
    assert abs(shown - expected).max() <= 1
    if len(bands) == 4:
        assert "red, green, blue are shown" in written.text()
    assert "has no losses yet" in written.text()
    assert "has no sample pictures yet" in written.text()


def test_losses_of_any_number_of_levels(painted: Case, tmp_path: Path) -> None:
    case, store = fabricate(tmp_path, ("grey",), "uint8", painted.run)
    pretend(case, store, "one", store.regions()[0], np.full((1, 64, 64), 9, np.uint8))
    lines = [json.dumps({"step": k, "loss": 1.0 / k, "level_losses": [1.0 / k]}) for k in (1, 2)]
    (case.run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    written = write_report(case, tmp_path / "out")
    assert list(written.out.glob("files-*/loss.svg"))
    assert not list(written.out.glob("files-*/level-losses.svg"))
    lines = [json.dumps({"step": k, "loss": 3.0, "level_losses": [2, 1.0]}) for k in range(50)]
    (case.run / "metrics.jsonl").write_text("\n".join(lines))
    write_report(case, tmp_path / "out")
    (levels,) = written.out.glob("files-*/level-losses.svg")
    assert ">2 px<" in levels.read_text() and ">4 px<" not in levels.read_text()


def test_losses_and_held_out_errors_of_every_block(
    browser: Browser, painted: Case, written: Written, tmp_path: Path
) -> None:
    """One curve a level, named by its block, and the last measurement as a table."""
    (levels,) = written.out.glob("files-*/level-losses.svg")
    text = levels.read_text()
    for label in ("T 256 px", "A 128 px", "A 64 px", "B 16 px", "C 4 px", "D 2 px", "D 1 px"):
        assert f">{label}<" in text
    (errors,) = written.out.glob("files-*/held-out.svg")
    assert all(f">{name}<" in errors.read_text() for name in "TABCD")
    page = " ".join(written.text().split())
    assert "1, the dashed line, is the linear (Wiener) estimate" in page
    assert "on validation regions, over valid cells alone" in page
    last = {line.part: line for line in Progress.read(painted.run / "metrics.jsonl").held_out}
    open_well(browser, written.out / "index.html", 1280)
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    table = browser.ask(
        "[...document.querySelector('#held-out ~ details table').tBodies[0].rows]"
        ".map(row => [...row.cells].map(cell => cell.innerText))"
    )
    assert [row[0] for row in table] == [*"TAABBCCDD"]
    assert [row[1] for row in table][:2] == ["256 and more", "128 to 256"]
    assert table[-1][1] == "1 to 2"
    found = last["D"].errors
    assert table[-1][2:7] == [f"{row[0]:.3f}" for row in found]
    assert table[-2][7] == f"{np.mean([row[1] for row in found]):.3f}"
    assert all(f"{name} {last[name].mean:.2f}" in page for name in "TABCD")


def test_a_report_is_replaced_at_once_or_not_at_all(
    painted: Case, unmeasured: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unmeasured.out, out)
    (out / "notes.txt").write_text("mine")
    (out / ".999999999.partial").mkdir()
    (out / "files-0123456789ab").mkdir()
    (out / "files-of-mine").mkdir()
    write_report(painted, out)
    (out / "notes.txt").unlink()
    (out / "files-of-mine").rmdir()
    expected = {k: v for k, v in tree(unmeasured.out).items() if k != "index.html"}
    again = {k: v for k, v in tree(out).items() if k != "index.html"}
    assert again == expected
    before = tree(out)
    page = (out / "index.html").read_text()
    (folder,) = out.glob("files-*")
    assert folder.name in page

    def full_disk(*_: object) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.report.command, "_draw_plots", full_disk)
    assert jobs.report.main([str(painted.images), "--out", str(out)]) == 2
    assert tree(out) == before
    assert sorted(p.name for p in out.iterdir()) == sorted([folder.name, "index.html"])


def test_moved_things_are_named_by_options(
    painted: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence says what is missing and which option gives it; with it, the page is written."""
    moved = Case(tmp_path / "run", tmp_path / "images", tmp_path / "store.zarr")
    for name in ("run", "images", "store"):
        shutil.copytree(getattr(painted, name), getattr(moved, name))
    config = json.loads((moved.run / "config.json").read_text())
    config["config"]["packs"]["store"] = "not/here.zarr"
    (moved.run / "config.json").write_text(json.dumps(config))
    for file in moved.images.glob("*.json"):
        record = json.loads(file.read_text())
        record["identity"]["run"] = "not/here/run"
        file.write_text(json.dumps(record))
    command = [str(moved.images), "--out", str(tmp_path / "out")]
    assert jobs.report.main(command) == 2
    assert "say where it is now with --run" in capsys.readouterr().err
    command += ["--run", str(moved.run)]
    assert jobs.report.main(command) == 2
    assert "say where it is now with --store" in capsys.readouterr().err
    command += ["--store", str(moved.store)]
    assert jobs.report.main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert jobs.report.main(command) == 0
    assert str(tmp_path / "out" / "index.html") in capsys.readouterr().out


def test_mistakes_are_sentences(
    painted: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert jobs.report.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "holds no painted images" in refused(str(tmp_path))
    assert "holds no painted images" in refused(str(tmp_path / "absent"))
    images = str(painted.images)
    assert "does not exist" in refused(images, "--metrics", str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    assert "is not JSON" in refused(images, "--metrics", str(tmp_path / "broken.json"))
    assert "is not a dataset store" in refused(images, "--store", str(tmp_path))
    assert not (tmp_path / "out").exists()
    other = tmp_path / "images"
    other.mkdir()
    record, _, _ = record_of(painted, 1)
    for name in ("one", "two"):
        record["identity"]["run"] = name
        (other / f"{name}.json").write_text(json.dumps(record))
    assert "images of 2 runs" in refused(str(other))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("<title>A page of mine</title>")
    assert "choose another --out" in refused(images)
