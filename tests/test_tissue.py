"""Laws of tissue detection: pale stroma stays; glass, ink and blur go; nothing else changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, gaussian_filter

from pipeline.ome import OmeImage
from pipeline.phantom.slide import GLASS, Slide
from pipeline.readers import open_reader
from pipeline.tissue import Tissue, TissueSettings, find_tissue

SIDE_PX, MPP = 1536, 0.5
PENS = {"blue": (60, 80, 190), "green": (50, 150, 90), "black": (35, 35, 40)}


def stored(path: Path, pixels: np.ndarray, mpp: float = MPP) -> OmeImage:
    """Pixels (h, w, 3) as an image of a store."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    bands = ["red", "green", "blue"]
    image = OmeImage.create(path, planes.shape, str(planes.dtype), mpp, "micrometer", bands)
    for key in image.shard_keys():
        y, x, height, width = image.shard_box(key)
        image.write_shard(key, planes[:, y : y + height, x : x + width])
    image.finish()
    return image


def find(path: Path, pixels: np.ndarray, mpp: float = MPP) -> Tissue:
    return find_tissue(stored(path, pixels, mpp))


def cells(pixels: np.ndarray) -> np.ndarray:
    """Means over cells of 16 px."""
    height, width = (n // 16 for n in pixels.shape[:2])
    return pixels[: height * 16, : width * 16].reshape(height, 16, width, 16, -1).mean((1, 3))


def stroke(height: int, width: int, thickness: float) -> np.ndarray:
    """How much ink a diagonal stroke of a pen leaves at each pixel, with soft edges."""
    y, x = np.mgrid[0.0:height, 0.0:width]
    away = np.abs(y * width - x * height) / np.hypot(height, width)
    return 0.93 / (1 + np.exp(np.clip((away - thickness / 2) / 10, -50, 50)))


def drawn_over(pixels: np.ndarray, ink: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """`pixels` seen through ink."""
    through = 1 - ink[..., None] * (1 - np.array(colour) / 255)
    return np.rint(pixels * through).astype(np.uint8)


def blurred(pixels: np.ndarray, sigma_um: float, mpp: float = MPP) -> np.ndarray:
    planes = [gaussian_filter(pixels[..., k].astype(float), sigma_um / mpp) for k in range(3)]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="module")
def phantom() -> np.ndarray:
    """A corner of a section, with its edge and some glass."""
    return Slide(2 * SIDE_PX, 2 * SIDE_PX, MPP, 3).draw(0, 0, SIDE_PX, SIDE_PX)


@pytest.fixture(scope="module")
def clean(phantom: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Tissue:
    return find(tmp_path_factory.mktemp("clean") / "i", phantom)


def test_a_section_is_found_and_glass_is_not(phantom: np.ndarray, clean: Tissue) -> None:
    stain = np.abs(cells(phantom) - GLASS).max(axis=-1)
    assert 0.2 < clean.mask.mean() < 0.95
    assert clean.mask[stain > 40].mean() > 0.98  # specks are dropped
    far_from_stain = ~binary_dilation(stain > 6, iterations=4)
    assert far_from_stain.any() and not clean.mask[far_from_stain].any()
    assert clean.facts["ink"] == clean.facts["blur"] == 0 and not clean.facts["blue_stain"]
    assert TissueSettings(**clean.facts["settings"]) == TissueSettings()


@pytest.mark.parametrize("pen", PENS)
def test_a_pen_mark_is_dropped_and_the_rest_stays(
    pen: str, phantom: np.ndarray, clean: Tissue, tmp_path: Path
) -> None:
    ink = stroke(SIDE_PX, SIDE_PX, 120)
    found = find(tmp_path / "i", drawn_over(phantom, ink, PENS[pen]))
    amount = cells(ink[..., None])[..., 0]
    assert clean.mask[amount > 0.8].sum() > 200, "the pen must cross tissue"
    assert found.mask[amount > 0.8].mean() < 0.02
    beside = ~binary_dilation(amount > 0.02, iterations=6)
    assert (found.mask == clean.mask)[beside].mean() > 0.995
    assert found.facts["ink"] > 0.01


@pytest.mark.parametrize("pen", [*PENS.values(), (200, 35, 45)])
def test_a_pen_mark_on_glass_is_dropped_whatever_its_colour(
    pen: tuple[int, ...], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    glass = (GLASS + rng.normal(0, 1, (800, 1000, 3))).clip(0, 255).round().astype(np.uint8)
    assert not find(tmp_path / "glass", glass).mask.any()
    assert not find(tmp_path / "i", drawn_over(glass, stroke(800, 1000, 90), pen)).mask.any()


def test_a_blurred_half_is_dropped_and_the_sharp_half_stays(
    phantom: np.ndarray, clean: Tissue, tmp_path: Path
) -> None:
    half = SIDE_PX // 2
    assert find(tmp_path / "all", blurred(phantom, 4)).mask.mean() < 0.01
    pixels = np.where(np.arange(SIDE_PX)[:, None, None] < half, phantom, blurred(phantom, 4))
    found, border = find(tmp_path / "half", pixels), half // 16
    window = round(TissueSettings().focus_window_um / MPP / 16)
    assert clean.mask[border + window :].sum() > 1000
    assert not found.mask[border + window :].any()
    assert np.array_equal(found.mask[: border - window], clean.mask[: border - window])


@pytest.mark.parametrize("strength", [0.6, 0.3])
def test_pale_stain_stays(
    strength: float, phantom: np.ndarray, clean: Tissue, tmp_path: Path
) -> None:
    """All stain thinned by Beer and Lambert, as in pale stroma."""
    density = -np.log(np.maximum(phantom, 1) / GLASS)
    pale = np.rint(GLASS * np.exp(-strength * density)).clip(0, 255).astype(np.uint8)
    found = find(tmp_path / "i", pale)
    assert found.mask[clean.mask].mean() > 0.9
    assert not (found.mask & ~binary_dilation(clean.mask, iterations=3)).any()


def test_tinted_light_changes_nothing(phantom: np.ndarray, clean: Tissue, tmp_path: Path) -> None:
    tinted = np.rint(phantom * np.array([1, 0.96, 0.86])).astype(np.uint8)
    found = find(tmp_path / "i", tinted)
    assert (found.mask == clean.mask).mean() > 0.995
    assert found.facts["glass"] == pytest.approx(GLASS * [1, 0.96, 0.86] / 255, abs=0.01)


def test_a_blue_stain_is_no_ink(phantom: np.ndarray, clean: Tissue, tmp_path: Path) -> None:
    """Red and green exchanged and blue let through, as by Giemsa."""
    density = -np.log(np.maximum(phantom, 1) / GLASS)
    density = np.stack([2 * density[..., 1], density[..., 0], 0.3 * density[..., 2]], axis=-1)
    blue = np.rint(GLASS * np.exp(-density)).clip(0, 255).astype(np.uint8)
    found = find(tmp_path / "i", blue)
    assert found.facts["blue_stain"] and found.facts["ink"] == 0
    assert found.mask[clean.mask].mean() > 0.97


@pytest.mark.parametrize("strip_cells", [2, 50])
def test_the_mask_does_not_depend_on_how_the_image_is_cut(
    strip_cells: int, phantom: np.ndarray, tmp_path: Path
) -> None:
    """Also where a rule's reach is all the margin there is: with pieces as long as are dropped."""
    ink = stroke(SIDE_PX, SIDE_PX, 60)
    pixels = drawn_over(phantom, ink, PENS["green"])
    for row in range(8, SIDE_PX // 16 - 8, 11):  # specks, holes and dashes of growing length
        pixels[16 * row : 16 * (row + 1), : 16 * row] = 255
        pixels[: 16 * row, 16 * row : 16 * (row + 1)] = PENS["blue"]
    image = stored(tmp_path / "i", pixels)
    rules = replace(TissueSettings(), speck_cells=9, hole_cells=12, ink_cells=15)
    whole = find_tissue(image, rules, 10_000)
    cut = find_tissue(image, rules, strip_cells)
    assert np.array_equal(cut.mask, whole.mask) and cut.facts == whole.facts
    assert 0.1 < whole.mask.mean() < 0.9


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_slide_of_one_kind_is_not_cut_in_two(level: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (700, 650, 3))
    gray = np.clip(level + noise, 0, 255).astype(np.uint8)
    assert not find(tmp_path / "gray", gray).mask.any()
    stain = (np.array([170, 90, 150]) + 10 * noise).astype(np.uint8)
    assert find(tmp_path / "stain", stain).mask.all()


@pytest.mark.parametrize(
    ("name", "mpp", "box", "share"),
    [
        ("pa_parasite_crop8192_mpp0.5037.svs", 0.5037, (2500, 2500, 2048, 2048), (0.75, 0.95)),
        ("CMU-1-Small-Region.svs", 0.499, (0, 0, 2967, 2220), (0.35, 0.43)),
        ("pa_helicobacter_HE_full.tif", 0.25, (6000, 8000, 2560, 2560), (0.9, 0.97)),
        (
            "pa_helicobacter_giemsa_crop3072x5000_nompp.svs",
            0.25,
            (0, 0, 2048, 2048),
            (0.98, 1.01),
        ),
    ],
)
def test_real_tissue_is_found_and_its_blurred_copy_is_not(
    name: str,
    mpp: float,
    box: tuple[int, int, int, int],
    share: tuple[float, float],
    shared_data: Path,
    tmp_path: Path,
) -> None:
    """The shares are those of masks that were looked at."""
    with open_reader(shared_data / "slides" / name, source_mpp=mpp) as reader:
        pixels = reader.read(*box).transpose(1, 2, 0)
    found = find(tmp_path / "i", pixels, mpp)
    assert share[0] < found.mask.mean() < share[1]
    assert found.facts["ink"] == found.facts["blur"] == 0
    assert find(tmp_path / "b", blurred(pixels, 4, mpp), mpp).mask.mean() < 0.01
