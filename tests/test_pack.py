"""Laws of packs: exact means at the cells of the design, statistics, and what a kill leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from chain import Chain, pack_arguments, succeed
from scipy.ndimage import gaussian_filter

import pipeline.pack
from model.design import Extent, PointDesign
from model.haar import slope_detail
from pipeline.draws import Moments, RegionLevels, mollified
from pipeline.packfile import ABSENT, DrawnPoints, PackSet
from pipeline.store import Store


def cell_mean(pixels: np.ndarray, level: int, y: int, x: int) -> np.ndarray:
    """The definition: the mean over the square of pixels, in float64."""
    side = 1 << level
    square = pixels[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
    return square.astype(np.float64).mean(axis=(1, 2))


def test_packs_hold_area_means_of_the_stores_pixels(chain: Chain) -> None:
    packs, store = PackSet.open(chain.packs), Store.open(chain.store)
    settings, random = packs.settings, np.random.default_rng(0)
    for entry in packs.regions[:3]:
        region = store.regions()[entry.key]
        pixels = store.image(region.image).read(region.y, region.x, region.side, region.side)
        lattice = packs.lattice(entry)
        for y, x in random.integers(8, size=(10, 2)).tolist():
            expected = cell_mean(pixels, 5, y, x)
            assert abs(lattice[y, x] / settings.value_scale - expected).max() <= 1 / 512
        for pack in range(settings.packs_per_region):
            drawn = packs.draw(entry, pack)
            windows, origins = drawn.windows, drawn.origins
            for _ in range(100):
                chain_, level, i, j = (int(random.integers(n)) for n in windows.shape[:4])
                y, x = origins[chain_, level] + (i, j)
                value = windows[chain_, level, i, j]
                if min(y, x) >= 0 and max(y, x) < 256 >> level:
                    expected = cell_mean(pixels, level, y, x)
                    np.testing.assert_array_equal(value / settings.value_scale, expected)
                else:
                    assert (value == ABSENT).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["uniform", "mixed", "sobol"])
def test_points_are_area_means_where_the_metadata_says(
    chain: Chain, point_packs: dict[str, Path], name: str
) -> None:
    """Of the pixels, to half a step of the fixed point; of mollified ones, rounded before their
    means are, to one.
    """
    packs, store = PackSet.open(point_packs[name]), Store.open(chain.store)
    settings = packs.settings
    files = sorted(str(path) for path in point_packs[name].glob("*.tar"))
    samples = {int(s["__key__"]): s for s in webdataset.WebDataset(files, shardshuffle=False)}
    for entry in packs.regions[:3]:
        region = store.regions()[entry.key]
        pixels = store.image(region.image).read(region.y, region.x, 256, 256).astype(np.float64)
        if settings.mollifier_sigma_px:
            pixels = gaussian_filter(pixels, settings.mollifier_sigma_px, axes=(1, 2))
        means = [pixels]
        for _ in range(settings.coarse_level):
            means.append(means[-1].reshape(3, len(means[-1][0]) // 2, 2, -1, 2).mean(axis=(2, 4)))
        for pack in range(settings.packs_per_region):
            design = settings.make_design()
            assert isinstance(design, PointDesign)
            cells = design.cells(Extent(256, 256), (settings.seed, entry.key, pack))
            stored = np.frombuffer(samples[entry.key][f"p{pack:02d}.bin"], np.uint16)
            values = stored.reshape(-1, 3) / settings.value_scale
            expected = np.stack([means[level][:, y, x] for level, y, x in cells])
            steps = 1.0 if settings.mollifier_sigma_px else 0.5
            assert abs(values - expected).max() <= steps / 256 + 1e-4
            assert abs(values - expected)[cells[:, 0] == 0].max() <= 0.5 / 256 + 1e-4
            drawn = packs.draw(entry, pack)
            assert isinstance(drawn, DrawnPoints)
            np.testing.assert_array_equal(drawn.cells, cells)
            np.testing.assert_array_equal(drawn.values, stored.reshape(-1, 3))
            if design.lattice:
                lattice = drawn.lattice.transpose(2, 0, 1) / settings.value_scale
                assert abs(lattice - means[-1]).max() <= steps / 256 + 1e-4
            else:
                assert drawn.lattice.size == 0


def test_uniform_packs_use_a_region_up(chain: Chain, tmp_path: Path) -> None:
    """As many packs as there are slices, and a slice of the next epoch for the rest."""
    out = tmp_path / "packs"
    arguments = [str(chain.store), "--encoder", str(chain.encoder), "--out", str(out)]
    succeed(pipeline.pack.main([*arguments, "--design", "uniform", "--points", "20000"]))
    packs = PackSet.open(out)
    assert packs.settings.packs_per_region == 4
    for entry in packs.regions[:2]:
        drawn = [packs.draw(entry, pack).cells for pack in range(3)]
        assert len(np.unique(np.concatenate(drawn), axis=0)) == 60_000
        assert all(length == 2 * 3 * 20_000 for _, length in entry.offsets[2:])


def test_statistics_are_those_of_the_mollified_pixels(
    chain: Chain, point_packs: dict[str, Path]
) -> None:
    statistics, store = PackSet.open(point_packs["mixed"]).statistics, Store.open(chain.store)
    pixels, details = [], []
    for region in store.regions():
        if region.split == "train":
            read = store.image(region.image).read(region.y, region.x, 256, 256).astype(np.float64)
            smooth = gaussian_filter(read, 1.0, axes=(1, 2))
            pixels.append(smooth[:, ::2, ::2].reshape(3, -1))
            means = smooth.reshape(3, 128, 2, 128, 2).mean(axis=(2, 4))
            details.append((smooth - means.repeat(2, 1).repeat(2, 2)).reshape(3, -1))
    covariance, colour = np.cov(np.concatenate(pixels, axis=1), bias=True), statistics.colour
    np.testing.assert_allclose(np.array(colour) @ np.array(colour).T, covariance, rtol=1e-3)
    np.testing.assert_allclose(statistics.mean, np.concatenate(pixels, axis=1).mean(1), rtol=1e-5)
    whitened = np.linalg.inv(colour) @ np.concatenate(details, axis=1)
    np.testing.assert_allclose(statistics.signal[0], np.square(whitened).mean(), rtol=1e-3)


def test_what_is_not_valid_does_not_smear() -> None:
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (2, 40, 30), dtype=np.uint8)
    valid = random.random((40, 30)) < 0.8
    weight = gaussian_filter(valid.astype(np.float64), 1.5)
    expected = gaussian_filter(np.where(valid, pixels, 0.0), 1.5, axes=(1, 2)) / weight
    for garbage in (0, 255):
        given = np.where(valid, pixels, garbage).astype(np.uint8)
        fixed = mollified(given, valid, 1.5, 256)
        assert abs(fixed / 256 - expected)[:, valid].max() <= 1 / 512 + 1e-4


def test_points_are_the_cells_of_windows() -> None:
    """Inside and outside, valid or not, at every level."""
    random = np.random.default_rng(3)
    valid = random.random((64, 96)) < 0.97
    pixels = random.integers(0, 2**16, (2, 64, 96), dtype=np.uint16)
    levels = RegionLevels.of(pixels, valid, 3)
    for level in range(4):
        y, x = np.meshgrid(np.arange(-3, 70), np.arange(-2, 99), indexing="ij")
        cells = np.stack([np.full_like(y, level), y, x], axis=-1).reshape(-1, 3)
        order = random.permutation(len(cells))
        window = levels.fixed_point(level, (-3, -2), (73, 101), 1).reshape(-1, 2)
        np.testing.assert_array_equal(levels.points(cells[order], 1), window[order])


def test_tokens_come_back_with_their_places(chain: Chain) -> None:
    packs, store = PackSet.open(chain.packs), Store.open(chain.store)
    for entry in packs.regions:
        stored = store.region_tokens(packs.settings.encoder_key, store.regions()[entry.key])
        for lattice, expected in zip(packs.tokens(entry), stored, strict=True):
            np.testing.assert_array_equal(lattice.values, expected.values)
            assert (lattice.footprint_px, lattice.y_px, lattice.x_px) == (
                expected.footprint_px,
                expected.y_px,
                expected.x_px,
            )


# webdataset leaves its shards to be closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_webdataset_reader_can_stream_a_shard(chain: Chain) -> None:
    packs = PackSet.open(chain.packs)
    files = sorted(str(path) for path in chain.packs.glob("*.tar"))
    samples = {int(s["__key__"]): s for s in webdataset.WebDataset(files, shardshuffle=False)}
    assert sorted(samples) == [entry.key for entry in packs.regions]
    for entry in packs.regions:
        bytes_of_pack = samples[entry.key]["p01.bin"]
        assert bytes_of_pack == packs.draw(entry, 1).windows.tobytes()
        assert json.loads(samples[entry.key]["json"])["image"] == entry.image


def test_standardised_training_pixels_have_unit_covariance(chain: Chain) -> None:
    packs, store = PackSet.open(chain.packs), Store.open(chain.store)
    train = [e for e in packs.regions if e.split == "train"]
    pixels = [store.image(e.image).read(e.y, e.x, 256, 256)[:, ::2, ::2] for e in train]
    flat = np.concatenate([p.reshape(3, -1).T for p in pixels]).astype(np.float32)
    u = packs.statistics.standardise(flat)
    np.testing.assert_allclose(packs.statistics.to_pixels(u), flat, atol=1e-2)
    assert abs(u.mean(axis=0)).max() < 1e-3
    np.testing.assert_allclose(np.cov(u.T), np.eye(3), atol=2e-3)


def test_octave_variances_add_up_to_the_whole() -> None:
    """Details of all octaves and the mean's square are the pixels' mean square (Parseval)."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    levels = RegionLevels.of(pixels, np.ones((128, 128), bool), 3)
    moments = Moments.of(levels)
    total = sum(energy[1] / energy[0] for energy in moments.details)
    flat = pixels.reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(total, np.cov(flat, bias=True), rtol=1e-9)
    assert len(moments.details) == 7
    assert len(moments.residuals) == 3
    # The residual is what is left of the details without the slopes of exact parents.
    parents = torch.from_numpy(np.pad(levels.means(1), ((1, 1), (1, 1), (0, 0))))[None]
    inside = torch.from_numpy(np.pad(np.ones((64, 64)), 1))[None, :, :, None]
    detail = levels.means(0) - levels.means(1).repeat(2, 0).repeat(2, 1)
    left = (detail - slope_detail(parents, inside)[0].numpy()).reshape(-1, 3)
    np.testing.assert_allclose(moments.residuals[0][1], left.T @ left)


def test_a_cell_with_an_invalid_pixel_is_absent_at_every_level() -> None:
    valid = np.ones((64, 64), bool)
    valid[37, 11] = False
    pixels = np.full((1, 64, 64), 255, np.uint8)
    levels = RegionLevels.of(pixels, valid, 5)
    for level in range(6):
        extent = 64 >> level
        fixed = levels.fixed_point(level, (0, 0), (extent, extent), 256)
        absent = np.argwhere(fixed[..., 0] == ABSENT)
        assert absent.tolist() == [[37 >> level, 11 >> level]]
        assert (np.delete(fixed.ravel(), np.argmax(fixed)) == 255 * 256).all()


def test_a_second_command_finishes_and_repeats_nothing(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "packs"
    shutil.copytree(chain.packs, out)
    (out / "index.json").unlink()
    (out / ".shard-000000.tar.12345.partial").write_bytes(b"half")
    (shard,) = out.glob("*.tar")
    before = shard.stat().st_mtime_ns
    succeed(pipeline.pack.main(pack_arguments(chain, out)))
    assert shard.stat().st_mtime_ns == before
    assert (out / "index.json").read_bytes() == (chain.packs / "index.json").read_bytes()
    assert not list(out.glob(".*.partial"))
    shard.unlink()
    (out / "shard-000000.json").unlink()
    (out / "index.json").unlink()
    succeed(pipeline.pack.main(pack_arguments(chain, out)))
    for name in ("index.json", "shard-000000.tar"):
        assert (out / name).read_bytes() == (chain.packs / name).read_bytes()


def test_other_settings_are_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.pack.main([*pack_arguments(chain, chain.packs), "--seed", "3"]) == 2
    assert "seed = 0, this command asks for 3" in capsys.readouterr().err
    arguments = pack_arguments(chain, tmp_path / "new")
    assert pipeline.pack.main([*arguments, "--points", "5000"]) == 2
    assert "ask for --points" in capsys.readouterr().err
    for options, said in (
        (["--design", "uniform", "--points", "70000"], "70000 points are more than the 65536"),
        (["--design", "spiral"], "'spiral' does not exist; choose one of zoom, uniform, mixed"),
        (["--lattice"], "do not depend on --lattice"),
        (["--mollifier", "-1"], "--mollifier takes a width from 0"),
        (["--mollifier", "nan"], "--mollifier takes a width from 0"),
        (["--coarse-level", "0"], "--coarse-level takes a level from 1 to 8"),
    ):
        assert pipeline.pack.main([*arguments, *options]) == 2
        assert said in capsys.readouterr().err
    assert pipeline.pack.main([*arguments, "--encoder", "nobody"]) == 2
    assert "conditioning.embed" in capsys.readouterr().err
    assert pipeline.pack.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no finished packs"):
        PackSet.open(tmp_path)
