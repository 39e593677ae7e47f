"""The facts of a comparison as Markdown: costs, distances by seed, pairs, spectra and seams."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]
NAMES = {"crop_fid": "Crop FID", "kid": "KID"}
SEAMS_PX = (32, 256)


def to_markdown(facts: Facts) -> str:
    """All tables; `facts` is the content of compare.json."""
    scores = facts["contestants"]
    first = scores[0]["runs"][0]
    space, size = first["metrics"]["features"], facts["size_px"]
    commits = sorted({run["commit"][:12] for score in scores for run in score["runs"]})
    splits = [region["split"] for region in facts["regions"]]
    counts = " and ".join(f"{splits.count(s)} of {s}" for s in ("test", "val") if s in splits)
    lines = [
        f"Each trained for {facts['cpu_minutes']:g} CPU minutes on {facts['hardware']}, one after "
        f"the other, on the same store, with seeds {', '.join(map(str, facts['seeds']))}; "
        f"{first['images']} regions that were held out ({counts}), painted at {size} x {size} px. "
        f"Commit {', '.join(commits)}.",
        "",
        f"Features: {space['name']}, {space['dim']} dimensions: {space['label']}.",
    ]
    if space["conditions_images"]:
        lines += ["These features condition the images: no headline number."]
    lines += ["", *_costs(scores), "", *(_recipe(score) for score in scores)]
    for name in NAMES:
        lines += ["", *_distances(name, scores, facts["seeds"])]
    lines += ["", *_pairs(facts["pairs"]), "", *_spectra(scores), "", *_seams(scores)]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _mean(score: Facts, number: Callable[[Facts], float | None]) -> float | None:
    """The mean over seeds of a number of a run; None where one has none."""
    values = [number(run) for run in score["runs"]]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _costs(scores: Sequence[Facts]) -> list[str]:
    """Means over seeds."""

    def row(score: Facts) -> list[str]:
        cpu, steps, seconds = (
            statistics.fmean(run[key] for run in score["runs"])
            for key in ("cpu_minutes", "steps", "seconds_per_image")
        )
        n = score["runs"][0]["metrics"]["n"]
        return [
            f"{score['name']} (`{score['preset']}`)",
            f"{score['parameters'] / 1e6:.1f}M",
            f"{cpu:.1f}",
            f"{steps:.0f} of {score['batch']}",
            f"{seconds:.0f}",
            f"{n['generated']}, {n['real']}",
        ]

    heads = ["contestant", "parameters", "CPU minutes of training", "steps"]
    return _table([*heads, "seconds an image", "n painted, real"], [row(s) for s in scores])


def _distances(name: str, scores: Sequence[Facts], seeds: Sequence[int]) -> list[str]:
    """A distance: its mean over seeds and their standard deviation, then of each seed the value
    with its interval, and the floor.
    """

    def row(score: Facts) -> list[str]:
        found = [run["metrics"][name] for run in score["runs"]]
        values = [one["value"] for one in found]
        spread = f"{statistics.stdev(values):.2g}" if len(values) > 1 else "–"
        floor_n = f" (n = {found[0]['floor_n']})" if "floor_n" in found[0] else ""
        each = [f"{one['value']:.4g} {_interval(one['interval'])}" for one in found]
        mean, floor = statistics.fmean(values), f"{found[0]['floor']:.4g}{floor_n}"
        return [score["name"], f"{mean:.4g}", spread, *each, floor]

    heads = [NAMES[name], "mean", "spread over seeds", *(f"seed {seed}" for seed in seeds)]
    return _table([*heads, "floor"], [row(score) for score in scores])


def _interval(reach: Sequence[float] | None) -> str:
    return f"[{reach[0]:.4g}, {reach[1]:.4g}]" if reach else "(interval not known)"


def _pairs(pairs: Sequence[Facts]) -> list[str]:
    """The first contestant minus each other."""
    rows = [
        [
            f"{pair['ours']} − {pair['theirs']}",
            NAMES[name],
            f"{pair[name]['value']:+.4g}",
            _interval(pair[name]["interval"]),
            pair[name]["in_words"],
        ]
        for pair in pairs
        for name in NAMES
    ]
    return [
        "Differences, mean over seeds, with paired 95 % intervals: a held-out region is left out "
        "of both contestants' images of all seeds and of the real crops at once.",
        "",
        *_table(["pair", "distance", "difference", "95 % interval", "zero"], rows),
    ]


def _recipe(score: Facts) -> str:
    """How a contestant painted, in one line."""
    recipe = score["runs"][0]["recipe"]
    overlap = recipe.get("overlap")
    windows = "" if overlap is None else f", windows overlapping by {overlap:g} (published: 0.75)"
    eta = f" with eta {recipe['eta']:g}" if "eta" in recipe else ""
    steps = f"{recipe['steps']} steps" if "steps" in recipe else "the preset's own steps"
    return (
        f"- {score['name']}: draws `{score['design']}`; {steps} of "
        f"{recipe['solver']}{eta}, guidance {recipe['guidance']:g}{windows}; train "
        f"`{' '.join(score['options']['train'])}`"
    )


def _spectra(scores: Sequence[Facts]) -> list[str]:
    """log2 of power painted over real, octave by octave from the finest; of the real crops log2 of
    their power itself.
    """
    octaves = scores[0]["runs"][0]["metrics"]["spectrum"]["octaves"]
    heads = [f"{_cells(row['cells_px'])} px" for row in octaves]
    rows = [["real, log2 of power", *(_log2(row["real"]) for row in octaves)]]
    for score in scores:
        ratios = [_mean(score, _ratio(level)) for level in range(len(octaves))]
        rows.append(
            [score["name"], *("–" if ratio is None else f"{ratio:+.2f}" for ratio in ratios)]
        )
    return ["log2 of power painted / real, by octave:", "", *_table(["", *heads], rows)]


def _ratio(level: int) -> Callable[[Facts], float | None]:
    return lambda run: run["metrics"]["spectrum"]["octaves"][level]["log2_ratio"]


def _log2(power: float) -> str:
    return f"{math.log2(power):.2f}" if power > 0 else "–"


def _cells(cells_px: Any) -> str:
    """The sides of the cells between which an octave lies."""
    return (
        "–".join(str(side) for side in cells_px) if isinstance(cells_px, list) else f"{cells_px}"
    )


def _seams(scores: Sequence[Facts]) -> list[str]:
    """Seams of all beside the real ones, and whether conditions are followed."""

    def contrast(side: str, period_px: int) -> Callable[[Facts], float | None]:
        return lambda run: next(
            row[side]
            for row in run["metrics"]["seams"]["periods"]
            if row["period_px"] == period_px
        )

    def cosine(key: str) -> Callable[[Facts], float | None]:
        return lambda run: run["metrics"].get("condition_cosine", {}).get(key)

    def cells(score: Facts, numbers: Sequence[Callable[[Facts], float | None]]) -> list[str]:
        means = [_mean(score, number) for number in numbers]
        return ["–" if mean is None else f"{mean:.3f}" for mean in means]

    rows = [["real", *cells(scores[0], [contrast("real", px) for px in SEAMS_PX]), "", ""]]
    for score in scores:
        numbers = [contrast("generated", px) for px in SEAMS_PX]
        rows.append([score["name"], *cells(score, [*numbers, cosine("own"), cosine("other")])])
    known = scores[0]["runs"][0]["metrics"].get("condition_cosine", {})
    footprint = f" at {known['footprint_px']} px" if "footprint_px" in known else ""
    heads = ["", *(f"seams at {px} px" for px in SEAMS_PX)]
    return _table([*heads, f"condition cosine{footprint}", "of other tokens"], rows)
