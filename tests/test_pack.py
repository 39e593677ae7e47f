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
from model.design import CascadeDesign, Extent, PointDesign, WindowsBelow
from model.haar import predicted, up
from pipeline.draws import CascadeLevels, RegionLevels, filled, mollified
from pipeline.moments import Moments
from pipeline.packfile import (
    ABSENT,
    PART_SCALE,
    DrawnPoints,
    DrawnWindow,
    PackSet,
    window_layouts,
)
from pipeline.store import Store


def means_of(pixels: np.ndarray, coarse: int) -> list[np.ndarray]:
    """The definition of every level, (h, w, c) in float64."""
    found = [pixels.transpose(1, 2, 0).astype(np.float64)]
    for _ in range(coarse):
        h, w, c = found[-1].shape
        found.append(found[-1].reshape(h // 2, 2, w // 2, 2, c).mean(axis=(1, 3)))
    return found


def inside(first: int, side: int, extent: int) -> np.ndarray:
    """Rows of a window, those outside replaced by the nearest inside."""
    return np.clip(np.arange(first, first + side), 0, extent - 1)


def check_window(
    drawn: DrawnWindow, means: list[np.ndarray], valid: np.ndarray, scale: int, margin: int
) -> None:
    """Fine cells and parents are the levels' own, continued from the border; weights are the parts
    of the parents that are valid.
    """
    block, n, (y, x) = drawn.block, drawn.block.octaves, drawn.origin.tolist()
    h, w = drawn.weight.shape
    fine, parents = means[block.fine], means[block.parents]
    rows, columns = inside(y << n, h << n, len(fine)), inside(x << n, w << n, fine.shape[1])
    assert abs(drawn.fine / scale - fine[np.ix_(rows, columns)]).max() <= 0.5 / scale + 1e-9
    rows, columns = (
        inside(first - margin, side + 2 * margin, extent)
        for first, side, extent in zip((y, x), (h, w), parents.shape[:2], strict=True)
    )
    assert abs(drawn.parents / scale - parents[np.ix_(rows, columns)]).max() <= 0.5 / scale + 1e-9
    part = means_of(valid[None], block.parents)[-1][y : y + h, x : x + w, 0]
    assert abs(drawn.weight / PART_SCALE - part).max() <= 0.5 / PART_SCALE + 1e-9


def test_packs_hold_area_means_of_the_stores_pixels(chain: Chain) -> None:
    packs, store = PackSet.open(chain.packs), Store.open(chain.store)
    settings, design = packs.settings, packs.design
    assert isinstance(design, CascadeDesign)
    for entry in packs.regions[:3]:
        region = store.regions()[entry.key]
        pixels = store.image(region.image).read(region.y, region.x, region.side, region.side)
        means, valid = means_of(pixels, 8), np.ones(pixels.shape[1:])
        assert abs(packs.lattice(entry) / settings.value_scale - means[8]).max() <= 1 / 512
        for pack in range(settings.packs_per_region):
            origins = design.draw(Extent(256, 256), (settings.seed, entry.key, pack))
            for block, (kind, of_block) in enumerate(zip(design.blocks, origins, strict=True)):
                assert len(of_block) == packs.windows(block).number
                for number, origin in enumerate(of_block):
                    drawn = packs.window(entry, pack, block, number)
                    assert drawn.block == kind
                    np.testing.assert_array_equal(drawn.origin, origin)
                    check_window(drawn, means, valid, settings.value_scale, design.margin)


BLOCKS = (WindowsBelow(3, 5, 2), WindowsBelow(1, 3, 3), WindowsBelow(0, 1, 5))


@pytest.mark.parametrize("holes", [False, True])
def test_windows_of_every_block_are_those_of_the_filled_region(holes: bool) -> None:
    """Windows whose margin sticks out and windows over holes, in the order that `WindowLayout`
    says.
    """
    random = np.random.default_rng(4)
    pixels = random.integers(0, 2**16 - 2, (2, 160, 192), dtype=np.uint16)
    valid = np.ones((160, 192), bool)
    if holes:
        valid[random.random(valid.shape) < 0.1] = False
        valid[40:130, 50:90] = False
    levels, image = CascadeLevels.of(pixels, valid, 5), Extent(160, 192)
    whole = filled(pixels, valid, 5)
    np.testing.assert_array_equal(whole[:, valid], pixels[:, valid])
    means, seen = means_of(whole, 5), 0
    design = CascadeDesign(points=20_000, coarse_level=5, blocks=BLOCKS)
    for draw in range(4):
        key = (7, 0, draw)
        values = np.frombuffer(levels.payload(design, image, key, 1), np.uint16)
        origins = design.draw(image, key)
        for layout, of_block in zip(window_layouts(design, image, 2), origins, strict=True):
            assert layout.number == len(of_block)
            for number, origin in enumerate(of_block):
                start = (layout.start + number * layout.window_bytes) // 2
                parts = np.split(values[start:], np.cumsum(layout.sizes))[:3]
                (h, w), n, more = layout.shape, layout.block.octaves, 2 * design.margin
                drawn = DrawnWindow(
                    layout.block,
                    parts[0].reshape(h << n, w << n, 2),
                    parts[1].reshape(h + more, w + more, 2),
                    parts[2].reshape(h, w),
                    origin,
                )
                check_window(drawn, means, valid, 1, design.margin)
                seen += int((origin < design.margin).any())
        assert start + sum(layout.sizes) == len(values)
    assert seen > 10


def test_holes_have_the_mean_of_what_is_valid_around_them() -> None:
    """Of the smallest dyadic cell that has any; the top lattice leaves out what is mostly hole."""
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (2, 64, 64), dtype=np.uint8)
    valid = np.ones((64, 64), bool)
    valid[8:16, 8:16] = False
    valid[3, 5] = False
    valid[32:, 32:] = False
    valid[:32, 32:][random.random((32, 32)) < 0.49] = False
    whole = filled(pixels, valid, 5)

    def mean(y: int, x: int, side: int) -> np.ndarray:
        kept = valid[y : y + side, x : x + side]
        return pixels[:, y : y + side, x : x + side][:, kept].mean(axis=1)

    np.testing.assert_array_equal(whole[:, 3, 5], np.rint(mean(2, 4, 2)))
    for y, x in ((8, 8), (15, 11)):
        np.testing.assert_array_equal(whole[:, y, x], np.rint(mean(0, 0, 16)))
    # No pixel of the last top cell is valid: it has the region's mean.
    everything = pixels[:, valid].mean(axis=1)[:, None, None]
    assert abs(whole[:, 32:, 32:] - everything).max() <= 0.5 + 1e-9
    levels = CascadeLevels.of(pixels, valid, 5)
    for level, part in enumerate(levels.parts):
        expected = means_of(valid[None], level)[-1][..., 0]
        np.testing.assert_allclose(part, expected, atol=1e-7)
        np.testing.assert_array_equal(levels.levels.means(level), means_of(whole, level)[-1])
    lattice = levels.lattice(256)
    present = lattice[..., 0] != ABSENT
    np.testing.assert_array_equal(present, means_of(valid[None], 5)[-1][..., 0] >= 0.5)
    assert present.tolist() == [[True, True], [True, False]]
    assert abs(lattice[present] / 256 - means_of(whole, 5)[-1][present]).max() <= 1 / 512


def test_a_sample_reads_its_own_bytes_only(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window of one block: its fine cells, its parents and their weights, in uint16."""
    packs = PackSet.open(chain.packs)
    read: list[int] = []
    honest = packs._range

    def counted(*arguments: object, **named: object) -> bytes:
        payload = honest(*arguments, **named)  # type: ignore[arg-type]
        read.append(len(payload))
        return payload

    monkeypatch.setattr(packs, "_range", counted)
    for block, fine in enumerate((4, 16, 64, 128)):
        parents = (1, 4, 16, 32)[block]
        packs.window(packs.regions[0], 1, block, 0)
        expected = 3 * fine**2 + 3 * (parents + 6) ** 2 + parents**2
        assert read.pop() == 2 * expected and not read


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
        windows = (packs.window(entry, 1, block, 0) for block in range(4))
        parts = (part for w in windows for part in (w.fine, w.parents, w.weight))
        assert bytes_of_pack == b"".join(part.tobytes() for part in parts)
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
    assert moments.residuals == []


def test_residuals_are_what_parents_leave_of_the_details() -> None:
    """Of every octave below the top, on the central square, without what bicubic interpolation of
    the parents of its block predicts; of a plane that leaves a twentieth of the power at most.
    """
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (3, 160, 192), dtype=np.uint8)
    levels, side = RegionLevels.of(pixels, np.ones((160, 192), bool), 5), 96
    moments = Moments.of(levels, BLOCKS, side)
    assert len(moments.residuals) == 5
    means = [torch.from_numpy(m.transpose(2, 0, 1).copy())[None] for m in means_of(pixels, 5)]
    for block in BLOCKS:
        # Of the whole image, from which the central square is cut.
        around = torch.nn.functional.pad(means[block.parents], (2, 2, 2, 2), mode="replicate")
        n, told = block.octaves, predicted(around, block.octaves, 2)
        for level in range(block.fine, block.parents):
            down = level - block.fine
            finer = torch.nn.functional.avg_pool2d(means[block.fine] - told, 1 << down)
            detail = finer - up(torch.nn.functional.avg_pool2d(finer, 2), 1)
            h, w = (min(side >> n, extent >> block.parents) for extent in (160, 192))
            y, x = ((160 >> block.parents) - h) // 2, ((192 >> block.parents) - w) // 2
            k = n - down
            cut = detail[0, :, y << k : (y + h) << k, x << k : (x + w) << k].flatten(1).numpy()
            count, energy = moments.residuals[level]
            np.testing.assert_allclose(energy / count, cut @ cut.T / cut.shape[1], rtol=1e-6)
    plane = np.mgrid[:320, :384].astype(np.uint16)  # its border is no plane
    smooth = Moments.of(RegionLevels.of(plane, np.ones((320, 384), bool), 5), BLOCKS, 8)
    for (count, left), (_, before) in zip(smooth.residuals, smooth.details, strict=False):
        assert np.trace(left) / count < 0.05 * np.trace(before) / count


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
        (["--design", "spiral"], "'spiral' does not exist; choose one of cascade, uniform, mixed"),
        (["--lattice"], "do not depend on --lattice"),
        (["--mollifier", "-1"], "--mollifier takes a width from 0"),
        (["--mollifier", "nan"], "--mollifier takes a width from 0"),
        (["--coarse-level", "0"], "--coarse-level takes a level from 1 to 8"),
        (["--coarse-level", "7"], "first block's parents are cells of level 8"),
        (["--design", "zoom"], "'zoom' does not exist; choose one of cascade"),
        (["--blocks", "8:6"], "--blocks takes PARENTS:FINE:WINDOW, as 6:2:4"),
        (["--blocks", "6:8:4"], "--blocks takes PARENTS:FINE:WINDOW, as 6:2:4"),
        (["--blocks", "8:6:8", "4:0:4"], "do not join: each begins where the one before it ends"),
        (["--design", "uniform", "--blocks", "8:0:4"], "do not depend on --blocks"),
    ):
        assert pipeline.pack.main([*arguments, *options]) == 2
        assert said in capsys.readouterr().err
    assert pipeline.pack.main([*arguments, "--encoder", "nobody"]) == 2
    assert "conditioning.embed" in capsys.readouterr().err
    assert pipeline.pack.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no finished packs"):
        PackSet.open(tmp_path)


@pytest.mark.parametrize(("lost", "known"), [("blocks", "[]"), ("windows_inside", "False")])
def test_packs_of_an_older_version_are_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str, known: str
) -> None:
    """They do not say which blocks they hold, or their windows stick out; neither are they
    finished nor trained on.
    """
    for file in chain.packs.iterdir():
        if file.suffix == ".json":
            content = json.loads(file.read_text())
            content.get("settings", content).pop(lost, None)
            (tmp_path / file.name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"drawn by an older version, .* pack again"):
        PackSet.open(tmp_path)
    assert pipeline.pack.main(pack_arguments(chain, tmp_path)) == 2
    assert f"was packed with {lost} = {known}" in " ".join(capsys.readouterr().err.split())


def test_packs_of_the_pyramid_that_was_before_are_refused(chain: Chain, tmp_path: Path) -> None:
    content = json.loads((chain.packs / "index.json").read_text())
    content["settings"] |= {"design": "zoom", "halo": 4, "coarse_level": 5, "window": 32}
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cascade of octave blocks has replaced; pack and train"):
        PackSet.open(tmp_path)
