"""python -m jobs.evaluate: how near painted images are to the real ones of a store.

Protocol. Lossless pixels of level 0 only. Painted images are tiled by 256 px crops from their
corner. Real crops of 256 px tile the regions that were held out (val and test; all regions where
those give fewer than 4), without overlap. Crops of slides are taken as they are, glass included,
on both sides; crops of aerial images are wholly valid data, and a painted crop counts only where
99 % of what conditioned it is. At most --max-crops a side, chosen by the seed. The feature
network sees a crop as its own protocol demands (of EfficientNet-lite0 Crop FID reads the middle,
KID the end). Crop FID is the squared Frechet distance of the
two Gaussians fitted to all features; KID the unbiased squared maximum mean discrepancy with the
kernel (x.y / d + 1)^3 over all pairs. Their floor is what real crops score against other real
crops: one draw of as many as were painted (at most half of the real ones) against all that is left
of the real ones, no image or block of an image in both, the mean over 8 such splits. Their
interval is a 95 % delete-a-group jackknife over whole images, or over blocks of images where there
are fewer than 16 images, on both sides; it is of the value at these numbers of crops, so compare
values at equal n only, and with the floor. Spectrum: mean square of the Haar details of every
octave. Seams: mean step between pixels at multiples of a period over the mean step elsewhere.
Condition cosine: of each token with the embedding of what was painted under it, and of tokens that
do not belong together. Layout: root mean square distance of 64 x 64 px thumbnails.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from conditioning.encoders import choose_device, load_encoder
from jobs.evaluate.comparison import (
    FLOOR_DRAWS,
    MAX_THUMBNAILS,
    distances,
    layouts,
    octaves,
    seams,
)
from jobs.evaluate.condition import conditioning_of, cosines
from jobs.evaluate.crops import Crop, Painted, find_painted, group, painted_crops, real_crops
from jobs.evaluate.features import (
    EncoderSpace,
    FeatureChoice,
    FeatureSpace,
    choose_space,
    columns_of,
    store_encoder,
)
from jobs.evaluate.kept import CropFeatures
from jobs.evaluate.measure import Measured, cache_file, measure
from jobs.evaluate.metrics import Features
from jobs.evaluate.published import CLIP, INCEPTION
from jobs.evaluate.spectrum import CROP_PX
from jobs.run import commit
from pipeline import console
from pipeline.store import Store

Metric = Literal[
    "crop_fid", "kid", "spectrum", "seams", "condition_cosine", "layout", "nearest_train"
]
METRICS: tuple[Metric, ...] = (
    "crop_fid",
    "kid",
    "spectrum",
    "seams",
    "condition_cosine",
    "layout",
    "nearest_train",
)
FEW_BYTES = 1_000_000
OF_FEATURES, OF_CROPS = {"crop_fid", "kid"}, {"crop_fid", "kid", "spectrum", "seams"}


@dataclass(frozen=True)
class EvaluateOptions:
    """Compare painted images with the real ones of a store: Crop FID and more, with floors.

        python -m jobs.evaluate --real dataset.zarr --generated images --out metrics.json
        python -m jobs.evaluate --real d.zarr --generated images --out m.json --metrics crop_fid

    The protocol is written down in the output. A second run measures only what has changed.
    """

    real: Path
    """The dataset store."""
    generated: Path
    """Folder of the images that jobs.sample painted."""
    out: Path
    """The JSON file to write; what was measured on the real crops is kept beside it."""
    features: str = "auto"
    """clip-vit-b-32, inception-v3, efficientnet-lite0, an encoder's folder, or the name of one
    that embedded the store. auto takes the first of these whose weights are on this machine (those
    of efficientnet-lite0 come with the installation) and that sees the store's pixels."""
    weights: Path | None = None
    """The weight file of clip-vit-b-32 (safetensors) or inception-v3, where it is not in the usual
    cache. Nothing is fetched."""
    metrics: tuple[Metric, ...] = METRICS
    """Which to compute."""
    encoder: Path | None = None
    """Folder of the encoder that conditioned the images, where it has moved."""
    footprint: int | None = None
    """Side in px of the tokens whose condition cosine is measured; by default the finest that
    conditioned the images. Cosines at unlike footprints do not compare."""
    keep: Path | None = None
    """Also keep the features of all crops in this .npz file, for paired comparisons."""
    max_crops: int = 10_000
    """At most so many crops on either side."""
    white_level: float | None = None
    """For uint16 images and networks trained on 8 bits: the count that is white."""
    seed: int = 0
    """Another seed draws other crops, where there are more than --max-crops, and other floors."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dry_run: bool = False
    """Print the plan and stop."""


@dataclass
class Evaluation:
    """What is compared, and what was found so far."""

    options: EvaluateOptions
    store: Store
    painted: list[Painted]
    device: torch.device
    failures: dict[str, str]
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def wants(self, *metrics: str) -> bool:
        return bool(set(metrics) & set(self.options.metrics))

    def note(self, sentence: str) -> None:
        """Something that the reader of the numbers should know."""
        self.notes.append(sentence)
        console.say(f"evaluate: note: {sentence}")


def evaluate(options: EvaluateOptions) -> int:
    """Run the command; returns its exit code."""
    if options.weights is not None and options.features not in (CLIP, INCEPTION):
        raise ValueError(
            f"--weights belongs to --features {CLIP} or {INCEPTION}; name one of them"
        )
    if options.max_crops < 4:
        raise ValueError(f"--max-crops takes 4 or more, not {options.max_crops}")
    if options.keep is not None and not OF_FEATURES & {*options.metrics}:
        raise ValueError("--keep keeps features, which only crop_fid and kid need; ask for one")
    store = Store.open(options.real)
    painted, failures = find_painted(options.generated, store)
    run = Evaluation(options, store, painted, choose_device(options.device), failures)
    crops = choose_crops(run) if run.wants(*OF_CROPS) else None
    space = _choose_space(run) if run.wants(*OF_FEATURES) else None
    _say_plan(run, crops, space)
    if options.dry_run:
        return console.EXIT_DONE
    run.found["protocol"] = {
        "description": " ".join(str(__doc__).split()),
        "crop_px": CROP_PX,
        "real_split": crops and crops.real_split,
        "seed": options.seed,
        "max_crops": options.max_crops,
        "floor_draws": FLOOR_DRAWS,
    }
    run.found["provenance"] = {
        "store": str(options.real),
        "store_fingerprint": store.fingerprint(),
        "generated": str(options.generated),
        "images": [item.name for item in painted],
        "commit": commit(),
        "hardware": _hardware(run.device),
    }
    if crops is not None:
        _compare_crops(run, crops, space)
    if run.wants("condition_cosine"):
        _compare_conditions(run, space)
    if run.wants("layout", "nearest_train"):
        _compare_layouts(run)
    run.found |= {"notes": run.notes, "failed": run.failures}
    console.write_json_atomic(options.out, run.found)
    for name, reason in run.failures.items():
        console.say(f"evaluate: {name} failed: {reason}")
    console.say(summary(run.found, options.out))
    return console.EXIT_PARTIAL if run.failures else console.EXIT_DONE


@dataclass(frozen=True)
class CropPair:
    """The crops of both sides, and which splits the real ones are from."""

    painted: list[Crop]
    real: list[Crop]
    real_split: str


def choose_crops(run: Evaluation) -> CropPair:
    """The crops of the protocol; a `ValueError` where they are too few."""
    options = run.options
    painted = painted_crops(run.painted, run.store, options.max_crops, options.seed)
    if len(painted) < 2:
        raise ValueError(
            f"{options.generated} gives {len(painted)} crops of {CROP_PX} px and a distance needs "
            "at least 2; paint more or larger images"
        )
    return CropPair(painted, *real_crops(run.store, options.max_crops, options.seed))


def _choose_space(run: Evaluation) -> FeatureSpace:
    options = run.options
    known = conditioning_of(run.painted, run.store)
    conditioning = [known.encoder_key] if known else run.store.encoders()
    choice = FeatureChoice(options.features, options.weights, options.encoder, options.white_level)
    return choose_space(choice, run.store, conditioning, run.device)


def _say_plan(run: Evaluation, crops: CropPair | None, space: FeatureSpace | None) -> None:
    lines = [
        f"evaluate: {len(run.painted)} painted images against {run.options.real} on {run.device}",
        f"  metrics   {', '.join(run.options.metrics)}",
    ]
    if crops is not None:
        n, m = len(crops.painted), len(crops.real)
        lines.append(
            f"  crops     {n} painted, {m} real of {CROP_PX} px; real: {crops.real_split}"
        )
        if space is not None:
            # Features twice, and a handful of covariances while distances are computed.
            memory = 8 * (n + m) * space.dim + 8 * 8 * space.dim**2
            lines.append(f"  features  {space.name}, {space.dim} numbers: {space.label}")
            lines.append(f"  memory    {memory / 1e9:.2f} GB beside the network")
    lines.append(f"  to        {run.options.out}")
    kept_bytes = 4 * len(crops.real) * space.dim if crops and space else 0
    if crops and space and run.options.keep is not None:
        kept_bytes += 4 * (len(crops.painted) + len(crops.real)) * space.dim
    console.say_plan("\n".join(lines), run.options.out.parent, FEW_BYTES + kept_bytes)


def _compare_crops(run: Evaluation, crops: CropPair, space: FeatureSpace | None) -> None:
    real_images = {name: run.store.image(name) for name in {c.image for c in crops.real}}
    kept = cache_file(run.options.out, run.store.fingerprint(), crops.real, space)
    if kept.is_file():
        console.say(f"evaluate: the real crops are already measured ({kept})")
        real = Measured.read(kept)
    else:
        real = measure(crops.real, real_images, space, "real")
        console.write_bytes_atomic(kept, real.to_bytes())
    painted = measure(
        crops.painted, {item.name: item.image for item in run.painted}, space, "painted"
    )
    if space is not None and run.options.keep is not None:
        sides = (crops.painted, painted.features), run.painted, (crops.real, real.features)
        CropFeatures.of(*sides, space, run.store.fingerprint()).write(run.options.keep)
    run.found["n"] = {"real": len(crops.real), "generated": len(crops.painted)}
    if space is not None:
        _compare_features(run, crops, painted.features, real.features, space)
    if run.wants("spectrum"):
        run.found["spectrum"] = {"octaves": octaves(real, painted)}
    if run.wants("seams"):
        run.found["seams"] = seams(real, painted)


def _compare_features(
    run: Evaluation, crops: CropPair, painted: Features, real: Features, space: FeatureSpace
) -> None:
    run.found["features"] = {
        "name": space.name,
        "key": space.key,
        "label": space.label,
        "dim": space.dim,
        "fid_dim": space.fid_dim,
        "kid_dim": space.kid_dim,
        "conditions_images": space.conditions_images,
    }
    smaller = min(len(painted), len(real))
    if smaller <= space.fid_dim:
        run.note(
            f"{smaller} crops are no more than the {space.fid_dim} dimensions of {space.name} "
            "for Crop FID: covariances are singular and it is biased upward; read it against its "
            "floor, and read KID"
        )
    of_painted, of_real = group(crops.painted), group(crops.real)
    run.found["protocol"]["groups"] = {"generated": of_painted.how, "real": of_real.how}
    console.say("evaluate: distances, their floors and intervals")
    columns = {name: own for name, own in columns_of(space).items() if run.wants(name)}
    run.found |= distances(painted, of_painted, real, of_real, columns, run.options.seed)


def _compare_conditions(run: Evaluation, space: FeatureSpace | None) -> None:
    known = conditioning_of(run.painted, run.store)
    if known is None:
        run.note("no condition cosine: it is not known which one encoder conditioned the images")
        return
    if isinstance(space, EncoderSpace) and space.key == known.encoder_key:
        encoder = space.encoder
    elif run.options.encoder is not None:
        spec = run.store.spec
        encoder = load_encoder(
            run.options.encoder, bands=spec.bands, dtype=spec.dtype, device=run.device
        )
    else:
        try:
            encoder = store_encoder(run.store, known.encoder_key, run.device)
        except ValueError as mistake:
            run.note(f"no condition cosine: {mistake}")
            return
    if encoder.key != known.encoder_key:
        raise ValueError(
            f"--encoder {run.options.encoder} is {encoder.key} and the images were conditioned by "
            f"{known.encoder_key}; name that one"
        )
    footprints = run.store.footprints(encoder.key)
    footprint = run.options.footprint or known.footprint_px or min(footprints, default=None)
    if run.options.footprint not in (None, *footprints):
        raise ValueError(
            f"--footprint {footprint} has no tokens in {run.store.path}, which has those of "
            f"{', '.join(map(str, footprints))} px by {encoder.key}; name one of these"
        )
    total, left_out = cosines(run.painted, run.store, encoder, footprint)
    for name, reason in left_out.items():
        run.note(f"{name} is not in the condition cosine: {reason}")
    if total is not None:
        own, other = total.means()
        run.found["condition_cosine"] = {
            "own": own,
            "other": other,
            "tokens": total.count,
            "encoder": encoder.key,
            "footprint_px": footprint,
        }


def _compare_layouts(run: Evaluation) -> None:
    if len(run.store.regions()) > MAX_THUMBNAILS:
        run.note(f"layouts are compared with {MAX_THUMBNAILS} regions, drawn by the seed")
    for name in (item.name for item in run.painted if item.in_store is None):
        run.note(f"{name} has no layout: its region is no longer in the table of regions")
    found = layouts(run.painted, run.store, run.options.seed)
    run.found |= {name: value for name, value in found.items() if run.wants(name)}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def summary(found: dict[str, Any], out: Path) -> str:
    """The headline of a metrics.json."""
    lines = []
    for key, name in (("crop_fid", "Crop FID"), ("kid", "KID")):
        if key in found:
            part, n = found[key], found["n"]
            reach = part["interval"]
            shown = f"[{reach[0]:.4g}, {reach[1]:.4g}]" if reach else "not known, too few crops"
            lines.append(
                f"evaluate: {name} {part['value']:.4g}, 95 % interval {shown}, floor "
                f"{part['floor']:.4g} (n = {part['floor_n']}); n = {n['generated']} painted, "
                f"{n['real']} real; {found['features']['name']}"
            )
    if lines:
        lines.append(f"evaluate: features: {found['features']['label']}")
    if "spectrum" in found:
        ratios = (row["log2_ratio"] for row in found["spectrum"]["octaves"])
        shown = " ".join("-" if ratio is None else f"{ratio:+.2f}" for ratio in ratios)
        lines.append(f"evaluate: log2 power painted / real, finest octave first: {shown}")
    lines.append(f"evaluate: done, {out}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(EvaluateOptions, evaluate, argv, prog="python -m jobs.evaluate")
