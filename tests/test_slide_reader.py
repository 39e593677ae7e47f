"""Laws of slides: only what was scanned is the image, its coordinates lead back to the file; the
files of one DICOM series are one slide.
"""

from pathlib import Path

import numpy as np
import openslide
import pytest
from scanners import MPP_UM, write_dicom, write_scn
from test_ingest import draw_slide, ingest

from pipeline.places import to_source
from pipeline.readers import UnreadableError, open_reader
from pipeline.readers.slide import SlideReader
from pipeline.sources import find_files
from pipeline.store import Store
from pipeline.table import find_sources

AREAS = ((300, 200, (256, 384)), (700, 704, (128, 256)))
GLASS = (1600, 1920)


def scanned(folder: Path, steps: tuple[int, ...]) -> Path:
    areas = [(y, x, draw_slide(*shape, seed=y)) for y, x, shape in AREAS]
    return write_scn(folder / "s.scn", areas, GLASS, steps)


def painted() -> np.ndarray:
    """The whole glass (3, h, w): what was scanned on white."""
    glass = np.full((*GLASS, 3), 255, np.uint8)
    for y, x, shape in AREAS:
        glass[y : y + shape[0], x : x + shape[1]] = draw_slide(*shape, seed=y)
    return np.moveaxis(glass, 2, 0)


@pytest.mark.parametrize("steps", [(1,), (1, 4, 16)])
def test_the_image_is_what_was_scanned_widened_to_whole_pixels_of_the_levels(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    path, glass = scanned(tmp_path, steps), painted()
    mask = np.zeros(GLASS, bool)
    for y, x, shape in AREAS:
        mask[y : y + shape[0], x : x + shape[1]] = True
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.bounds-x"] == "200"
        assert slide.dimensions == GLASS[::-1] and slide.level_count == len(steps)
    with open_reader(path) as reader:
        assert isinstance(reader, SlideReader) and reader.downsamples == steps
        step = max(steps)
        top, left = 300 // step * step, 200 // step * step
        assert reader.attributes["slide:origin"] == [top, left]
        assert reader.shape == (3, 828 - top, 960 - left)
        rng = np.random.default_rng(0)
        for _ in range(10):
            y, x = int(rng.integers(0, 500)), int(rng.integers(0, 700))
            box = glass[:, top + y : top + y + 28, left + x : left + x + 50]
            assert np.array_equal(reader.read(y, x, 28, 50), box)
            held = mask[top + y : top + y + 28, left + x : left + x + 50]
            assert np.array_equal(reader.read_valid(y, x, 28, 50), held)
        for level, step in enumerate(steps):
            height, width = reader.level_shape(level)
            part = glass[:, top:, left:][:, : height * step, : width * step]
            means = part.reshape(3, height, step, width, step).mean(axis=(2, 4))
            found = reader.read(0, 0, height, width, level)
            # OpenSlide moves an area that does not begin at a whole pixel of its level.
            if all(y % step == x % step == 0 for y, x, _ in AREAS):
                assert np.abs(found - means).max() <= 0.5


def test_what_was_not_scanned_is_not_ingested_and_places_lead_back_to_the_glass(
    tmp_path: Path,
) -> None:
    path, out = scanned(tmp_path, (1, 4)), tmp_path / "o.zarr"
    command = (path, "--out", out, "--region", 64, "--cluster", "inline", "--min-tissue", 0.5)
    assert ingest(*command, "--mpp", 2 * MPP_UM) == 0
    store, glass = Store.open(out), painted().astype(np.float64)
    (name,) = store.image_ids()
    image = store.image(name)
    assert image.shape == (3, (828 - 300) // 2, (960 - 200) // 2)
    assert len(store.regions()) >= 3
    for region in store.regions():
        y, x = to_source(image.attributes, region.y, region.x)
        bottom, right = to_source(image.attributes, region.y + 64, region.x + 64)
        assert (bottom - y, right - x) == (128, 128)
        box = glass[:, int(y) : int(bottom), int(x) : int(right)]
        means = box.reshape(3, 64, 2, 64, 2).mean(axis=(2, 4))
        assert np.abs(image.read(region.y, region.x, 64, 64) - means).max() <= 0.5
    assert image.read(250, 0, 1, 1).tolist() == [[[255]]] * 3


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"openslide.bounds-x": "-5"},
        {"openslide.bounds-width": "0"},
        {"openslide.bounds-y": "99999"},
        {"openslide.bounds-height": "many"},
    ],
)
def test_bounds_that_cannot_be_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str]
) -> None:
    path = scanned(tmp_path, (1,))
    honest = openslide.OpenSlide.properties.fget  # type: ignore[attr-defined]

    def changed(slide: openslide.OpenSlide) -> dict[str, str]:
        return {**honest(slide), **(properties or {"openslide.bounds-x": ""})}

    monkeypatch.setattr(openslide.OpenSlide, "properties", property(changed))
    with open_reader(path) as reader:
        assert reader.shape == (3, *GLASS) and reader.attributes["slide:origin"] == [0, 0]
        assert np.array_equal(reader.read(290, 190, 30, 40), painted()[:, 290:320, 190:230])


def series(folder: Path, name: str, seed: int) -> list[Path]:
    """Three files of one slide, in an order that says nothing."""
    folder.mkdir(exist_ok=True)
    levels = [draw_slide(512, 640, seed)]
    for _ in range(2):
        h, w, _ = levels[-1].shape
        means = levels[-1].reshape(h // 2, 2, w // 2, 2, 3).mean(axis=(1, 3))
        levels.append(means.round().astype(np.uint8))
    return [
        write_dicom(folder / f"{8 - n}-{name}.dcm", pixels, f"1.2.{seed}", n)
        for n, pixels in enumerate(levels)
    ]


def test_the_files_of_one_dicom_series_are_one_slide_named_by_the_largest(tmp_path: Path) -> None:
    folder = tmp_path / "scan"
    first, second = series(folder, "a", 1), series(folder, "b", 2)
    assert find_files(str(folder)) == [first[0], second[0]]
    assert find_files(str(folder / "*.dcm")) == [first[0], second[0]]
    assert find_files(str(second[1])) == [second[1]]
    named = find_sources([str(path) for path in (*second, *first)], None, None)
    assert [source.path for source in named] == [second[0], first[0]]  # as a shell names them
    bare = first[0].rename(folder / "IM1")
    assert find_files(str(folder)) == [second[0], bare]
    (folder / "cut.dcm").write_bytes(bare.read_bytes()[:300])
    assert len(find_files(str(folder))) == 3
    with open_reader(bare) as reader:
        assert (reader.shape, reader.spacing, reader.downsamples) == (
            (3, 512, 640),
            0.5,
            (1, 2, 4),
        )
    with pytest.raises(UnreadableError, match="DICOM"):
        open_reader(folder / "cut.dcm")


def test_a_dicom_folder_is_ingested_once_also_as_a_line_of_a_table(tmp_path: Path) -> None:
    files = series(tmp_path / "scan", "a", 1)
    table, out = tmp_path / "t.csv", tmp_path / "o.zarr"
    table.write_text("path,patient\nscan,p1\n")
    assert ingest(table, "--out", out, "--region", 128, "--cluster", "inline") == 0
    (state,) = Store.open(out).image_states().values()
    assert state["source"] == str(files[0]) and state["group"] == "patient p1"
    with open_reader(files[0]) as reader:
        (name,) = Store.open(out).image_ids()
        assert np.array_equal(
            Store.open(out).image(name).read(0, 0, 512, 640), reader.read(0, 0, 512, 640)
        )
    assert ingest(tmp_path / "scan", "--out", out, "--region", 128, "--cluster", "inline") == 0
    assert len(Store.open(out).image_states()) == 1
