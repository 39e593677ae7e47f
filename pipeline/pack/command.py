"""python -m pipeline.pack: the random draws of training, done once.

65,536 random pixels touch every chunk of a 4096^2 region in a tiled store, nested windows most, so
drawing them at training time would read 48 MiB to use a fraction of one. Packing reads every
region once, in order, smooths it where that is asked for (smoothing needs neighbours, which a draw
has not), and writes many draws of it side by side (`pipeline.packfile`). A tar shard
and its side file are written under temporary names and renamed, shard by shard: the same command
after a kill writes only what is missing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from model.design import Extent
from pipeline import console
from pipeline.pack.plan import Pack, make_plan
from pipeline.pack.shards import side_file, write_index, write_shard
from pipeline.packfile import (
    INDEX_NAME,
    PLAN_NAME,
    PackSettings,
)
from pipeline.store import Store


def pack(options: Pack) -> int:
    """Run the command; returns its exit code."""
    plan = make_plan(options)
    settings = plan.settings
    total = plan.region_bytes * len(plan.regions)
    design, extent = settings.make_design(), Extent(settings.side_px, settings.side_px)
    smooth = settings.mollifier_sigma_px
    missing = [i for i in range(len(plan.shards)) if not side_file(options.out, i).is_file()]
    console.say_plan(
        f"pack: {len(plan.regions)} regions of {settings.side_px} px, "
        f"{settings.packs_per_region} draws each, {design.num_values(extent)} values a draw "
        f"({design.describe(extent)}{f', smoothed by {smooth:g} px' if smooth else ''}), "
        f"tokens of {settings.encoder_key} at "
        f"{', '.join(str(f) for f, _, _ in settings.lattices)} px; {console.size(total)} "
        f"in {len(plan.shards)} shards",
        options.out,
        total * len(missing) // len(plan.shards),
    )
    _check_same(options.out, settings)
    if options.dry_run:
        return console.EXIT_DONE
    if not (options.out / PLAN_NAME).is_file():
        console.write_json_atomic(options.out / PLAN_NAME, asdict(settings))
    if (options.out / INDEX_NAME).is_file():
        console.say(f"pack: {options.out} is already done")
        return console.EXIT_DONE
    for leftover in options.out.glob(".*.partial"):
        leftover.unlink()
    store = Store.open(options.store)
    for number in console.progress(missing, total=len(missing), desc="pack"):
        write_shard(store, plan, options.out, number)
    write_index(options.out, plan)
    console.say(f"pack: done, {options.out / INDEX_NAME}")
    return console.EXIT_DONE


def _check_same(out: Path, settings: PackSettings) -> None:
    """A `ValueError` for a folder that was packed with other settings."""
    recorded = out / PLAN_NAME
    wanted = json.loads(json.dumps(asdict(settings)))
    if recorded.is_file():
        there = asdict(PackSettings.from_json(json.loads(recorded.read_text()), str(out)))
        there = json.loads(json.dumps(there))
        for name, value in wanted.items():
            if there.get(name) != value and name != "store":
                raise ValueError(
                    f"{out} was packed with {name} = {there.get(name)!r}, this command asks for "
                    f"{value!r}; "
                    "choose another --out or delete the folder"
                )


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(Pack, pack, argv, prog="python -m pipeline.pack")
