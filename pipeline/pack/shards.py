"""Tar shards of drawn regions, each with a side file that marks it done, and the index of all."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from model.design import CascadeDesign, PatchDesign, PointDesign
from pipeline import console
from pipeline.draws import CascadeLevels, RegionLevels, mollified
from pipeline.moments import Energy, Moments
from pipeline.pack.plan import Plan
from pipeline.packfile import (
    INDEX_NAME,
    PackSettings,
    PackStatistics,
    RegionEntry,
    extent_of,
    index_content,
)
from pipeline.store import Region, Store


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def side_file(out: Path, number: int) -> Path:
    """What is written last of a shard: where its regions lie, and their moments."""
    return out / f"shard-{number:06d}.json"


def write_shard(store: Store, plan: Plan, out: Path, number: int) -> None:
    """All draws of a shard's regions, under a temporary name until they are whole."""
    settings = plan.settings
    temporary = out / f".{_shard_name(number)}.partial"
    entries: list[dict[str, Any]] = []
    moments: dict[str, Any] = {}
    with webdataset.TarWriter(str(temporary), mtime=0, user="", group="") as shard:
        for region in plan.shards[number]:
            label = plan.labels.get(region.image)
            sample, first_px, measured = _sample(store, settings, region, label)
            shard.write(sample)
            entries.append({**asdict(region), "label": label, "first_px": first_px})
            moments[str(region.index)] = measured
    offsets = _member_offsets(temporary)
    for entry in entries:
        key = f"{entry['index']:09d}"
        members = [f"{key}.tokens.npy", f"{key}.coarse.npy"]
        members += [f"{key}.{_pack_name(p)}" for p in range(settings.packs_per_region)]
        entry["offsets"] = [offsets[name] for name in members]
    temporary.replace(out / _shard_name(number))
    console.write_json_atomic(side_file(out, number), {"entries": entries, "moments": moments})


def _pack_name(pack: int) -> str:
    return f"p{pack:02d}.bin"


def _sample(
    store: Store, settings: PackSettings, region: Region, label: str | None
) -> tuple[dict[str, Any], list[tuple[float, float]], dict[str, Any]]:
    """One region as a WebDataset sample, the places of its tokens, and its moments."""
    side = region.side
    image = store.image(region.image)
    pixels = image.read(region.y, region.x, side, side)
    valid = np.ones((side, side), bool)
    if store.mask_kind(region.image) == "valid":
        valid = store.mask(region.image, region.y, region.x, side, side)
    design, scale = settings.make_design(), settings.value_scale
    levels: RegionLevels | CascadeLevels
    if isinstance(design, CascadeDesign):
        levels = CascadeLevels.of(pixels, valid, settings.coarse_level)
        moments = Moments.of(levels.levels, design.blocks)
    else:
        unit = 1
        if settings.mollifier_sigma_px:
            pixels = mollified(pixels, valid, settings.mollifier_sigma_px, scale)
            unit = scale
        levels = RegionLevels.of(pixels, valid, settings.coarse_level, unit)
        moments = Moments.of(levels)
    wanted = {footprint for footprint, _, _ in settings.lattices}
    lattices = sorted(
        (t for t in store.region_tokens(settings.encoder_key, region) if t.footprint_px in wanted),
        key=lambda lattice: lattice.footprint_px,
    )
    tokens = np.concatenate([t.values.reshape(-1, t.values.shape[2]) for t in lattices])
    coarse = levels.lattice(scale)
    first_px = [(t.y_px, t.x_px) for t in lattices]
    sample: dict[str, Any] = {
        "__key__": f"{region.index:09d}",
        "json": json.dumps({**asdict(region), "label": label}).encode(),
        "tokens.npy": _npy(tokens),
        "coarse.npy": _npy(coarse),
    }
    extent = extent_of(side, lattices[0].footprint_px, first_px[0], coarse)
    for number in range(settings.packs_per_region):
        key = (settings.seed, region.index, number)
        if isinstance(levels, CascadeLevels):
            assert isinstance(design, CascadeDesign)
            payload = levels.payload(design, extent, key, scale)
        else:
            assert isinstance(design, PointDesign | PatchDesign)
            payload = levels.payload(design, extent, key, scale)
        sample[_pack_name(number)] = payload
    return sample, first_px, _measure(moments, tokens)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _measure(moments: Moments, tokens: np.ndarray) -> dict[str, Any]:
    """A region's moments, and its tokens' (count, sum, sum of squares), as JSON."""
    values = tokens.astype(np.float64)
    return {
        "pixels": _to_json(moments.pixels),
        "total": moments.total.tolist(),
        "details": [_to_json(energy) for energy in moments.details],
        "residuals": [_to_json(energy) for energy in moments.residuals],
        "region_means": [mean.tolist() for mean in moments.region_means],
        "low": moments.low.tolist(),
        "high": moments.high.tolist(),
        "tokens": (len(values), values.sum(0).tolist(), np.square(values).sum(0).tolist()),
    }


def _to_json(energy: Energy) -> tuple[float, list[list[float]]]:
    return energy[0], energy[1].tolist()


def _from_json(pair: Sequence[Any]) -> Energy:
    return pair[0], np.array(pair[1])


def _member_offsets(tar: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar) as members:
        return {member.name: (member.offset_data, member.size) for member in members}


def _moments(measured: dict[str, Any]) -> Moments:
    return Moments(
        _from_json(measured["pixels"]),
        np.array(measured["total"]),
        [_from_json(pair) for pair in measured["details"]],
        [_from_json(pair) for pair in measured["residuals"]],
        [np.array(mean) for mean in measured["region_means"]],
        np.array(measured["low"]),
        np.array(measured["high"]),
    )


def write_index(out: Path, plan: Plan) -> None:
    """One index of all shards, with the statistics of the training regions."""
    entries, train = [], []
    for number, content in enumerate(_side_contents(out, len(plan.shards))):
        for item in content["entries"]:
            entries.append(
                RegionEntry(
                    key=item["index"],
                    image=item["image"],
                    y=item["y"],
                    x=item["x"],
                    split=item["split"],
                    shard=_shard_name(number),
                    first_px=tuple(tuple(place) for place in item["first_px"]),
                    offsets=tuple(tuple(place) for place in item["offsets"]),
                    label=item.get("label"),
                )
            )
            if item["split"] == "train":
                train.append(content["moments"][str(item["index"])])
    moments = _moments(train[0])
    for measured in train[1:]:
        moments = moments + _moments(measured)
    count = sum(measured["tokens"][0] for measured in train)
    total = sum(np.array(measured["tokens"][1]) for measured in train)
    squares = sum(np.array(measured["tokens"][2]) for measured in train)
    token_mean = total / count
    token_std = np.sqrt(np.maximum(squares / count - token_mean**2, 1e-8))
    statistics = PackStatistics(
        mean=tuple(moments.mean().tolist()),
        colour=tuple(tuple(row) for row in moments.colour().tolist()),
        signal=moments.signal(),
        residual=moments.residual(),
        token_mean=tuple(token_mean.tolist()),
        token_std=tuple(token_std.tolist()),
        low=tuple(map(tuple, moments.low.tolist())),
        high=tuple(map(tuple, moments.high.tolist())),
    )
    console.write_json_atomic(out / INDEX_NAME, index_content(plan.settings, statistics, entries))


def _side_contents(out: Path, shards: int) -> Iterator[dict[str, Any]]:
    for number in range(shards):
        yield json.loads(side_file(out, number).read_text())
