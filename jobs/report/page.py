"""The page: what was gathered, drawn and measured, put into the template beside this module."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.report import facts
from jobs.report.material import Material, Painting
from jobs.report.neighbours import Neighbourhood, is_same, overlap
from jobs.report.pictures import Panel, Panels, StepPicture
from model.lattice import coarser
from pipeline.store import Region

GENERATOR = "gigabrush jobs.report"
EXPORTS = {
    ".ome.tif": "OME-TIFF for QuPath, napari, Bio-Formats",
    ".tif": "pyramidal TIFF for OpenSlide",
    ".cog.tif": "GeoTIFF for GIS",
    ".zarr": "OME-Zarr, the pixels that metrics read",
}


@dataclass(frozen=True)
class Drawn:
    """Files that were written for the page, by name: of each painting, plots, pictures of the
    training.
    """

    panels: dict[str, Panels]
    plots: dict[str, str]
    steps: list[StepPicture]


def render(
    material: Material,
    neighbours: dict[str, Neighbourhood],
    drawn: Drawn,
    folder: str,
    arguments: list[str],
) -> str:
    """The page, whose pictures lie in `folder` beside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = material.metrics or {}
    paintings = [
        _painting(material, painting, neighbours[painting.name], drawn.panels[painting.name])
        for painting in material.paintings
    ]
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        folder=folder,
        title="/".join(material.run.path.resolve().parts[-2:]),
        glance=_glance(material, neighbours),
        notices=_notices(material),
        paintings=paintings,
        measures=facts.measures(metrics),
        measuring_notes=facts.measuring_notes(metrics),
        protocol=facts.protocol(metrics),
        octaves=[
            {key: facts.number(octave.get(key)) for key in ("real", "generated", "log2_ratio")}
            | {"px": " to ".join(facts.number(n) for n in octave.get("cells_px") or ("?",))}
            for octave in (metrics.get("spectrum") or {}).get("octaves") or []
        ],
        evaluate=facts.evaluate_command(material),
        plots=drawn.plots,
        blocks=len(material.progress.parts) > 1,
        held_out=facts.held_out_rows(material.progress),
        held_out_split=facts.held_out_split(material.progress),
        log_snrs=_log_snrs(material),
        steps=drawn.steps,
        training=facts.training_facts(material),
        report=facts.report_facts(),
        commands=facts.commands(material, arguments),
        settings=_json(material.config.to_json()),
        measured="" if material.metrics is None else _json(metrics),
        metrics_file=str(material.metrics_file),
        measuring=facts.flat(metrics.get("provenance") or {}),
        several_bands=_shown_bands(material.store.spec.bands),
    )


def _shown_bands(bands: tuple[str, ...]) -> str:
    """Which bands pictures show, where that is not all."""
    return ", ".join(bands[:3]) if len(bands) > 3 else bands[0] if len(bands) == 2 else ""


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)


def _log_snrs(material: Material) -> list[str]:
    """The noise levels of the table of held-out errors."""
    last = material.progress.last_held_out()
    return [f"{value:g}".replace("-", "−") for value in last[0].log_snrs] if last else []


def _glance(material: Material, neighbours: dict[str, Neighbourhood]) -> facts.Facts:
    """The first things to know."""
    count, spec = len(material.paintings), material.store.spec
    glance = [("images", facts.number(count))]
    layouts = [n.layout for n in neighbours.values() if n.layout is not None]
    if layouts:
        follow = sum(layout.follows for layout in layouts)
        glance.append(("follow their condition", f"{follow} of {len(layouts)}"))
    fid = (material.metrics or {}).get("crop_fid") or {}
    if "value" in fid:
        floor = f" (floor {facts.number(fid['floor'])})" if "floor" in fid else ""
        glance.append(("Crop FID", f"{facts.number(fid['value'])}{floor}"))
    if material.state is not None:
        spent = f"{facts.number(material.state.step)} steps"
        glance.append(("trained", f"{spent}, {facts.seconds(material.state.seconds)}"))
    if last := material.progress.last_held_out():
        glance.append(("held-out error", ", ".join(f"{h.part} {h.mean:.2f}" for h in last)))
    glance.append(("preset", material.config.preset))
    glance.append(("resolution", f"{spec.spacing:g} {facts.unit_name(spec.unit)} a pixel"))
    return glance


def _notices(material: Material) -> list[str]:
    """What a reader must know before believing the page."""
    notices = []
    prints = {p.record["identity"].get("store_fingerprint") for p in material.paintings}
    if prints - {material.store.fingerprint(), None}:
        notices.append(
            "The store is not the one that these images were painted after, or its regions were "
            "chosen anew since: numbers of regions may mean other places now."
        )
    weights = {p.record["identity"].get("checkpoint") for p in material.paintings}
    if material.state is not None and weights - {material.state.checkpoint}:
        notices.append(
            "The run was trained on after some of these images were painted; each names the "
            "weights that painted it."
        )
    if ((material.metrics or {}).get("features") or {}).get("conditions_images"):
        notices.append(
            "The metrics are measured in the feature space of the encoder that also conditions "
            "the images. Compare them with each other, not with published numbers."
        )
    return notices


def _painting(
    material: Material, painting: Painting, neighbours: Neighbourhood, drawn: Panels
) -> dict[str, Any]:
    files = [
        {"path": str(material.images / f"{painting.name}{suffix}"), "what": what}
        for suffix, what in EXPORTS.items()
        if (material.images / f"{painting.name}{suffix}").exists()
    ]
    return {
        "name": painting.name,
        "facts": facts.painting_facts(painting, material.store.spec),
        "verdict": _verdict(neighbours),
        "panels": [_panel(material, painting, neighbours, p, drawn) for p in drawn.panels],
        "crop": asdict(drawn.crop),
        "files": files,
    }


def _verdict(neighbours: Neighbourhood) -> dict[str, Any] | None:
    layout = neighbours.layout
    if layout is None:
        return None
    return {
        "follows": layout.follows,
        "own": facts.number(layout.own),
        "other": facts.number(layout.nearest_other),
        "region": layout.nearest_other_region,
    }


def _panel(
    material: Material,
    painting: Painting,
    neighbours: Neighbourhood,
    panel: Panel,
    drawn: Panels,
) -> dict[str, Any]:
    spec = material.store.spec
    spacing = spec.spacing * 2**painting.level
    (height, width), crop = panel.size, drawn.crop
    bar_px, bar = facts.scale_bar(width, spacing, spec.unit)
    crop_px, crop_bar = facts.scale_bar(crop.width, spacing, spec.unit)
    if panel.role == "condition":
        title, caption = "Condition", _condition(painting, panel)
    elif panel.role == "generated":
        title, caption = "Generated", _generated(painting)
    else:
        title, caption = "Nearest training region", _nearest(painting, neighbours)
    return {
        **asdict(panel),
        "title": title,
        "caption": caption,
        "height": height,
        "width": width,
        "megabytes": f"{panel.full_bytes / 1e6:.1f} MB",
        "box": _percent(crop.y, crop.x, crop.height, crop.width, panel.size),
        "real_box": None if panel.real == panel.size else _percent(0, 0, *panel.real, panel.size),
        "bar": bar,
        "bar_percent": f"{100 * bar_px / width:.2f}",
        "crop_bar": crop_bar,
        "crop_bar_px": f"{crop_px:.1f}",
    }


def _percent(y: int, x: int, height: int, width: int, size: tuple[int, int]) -> str:
    """A box of a panel as CSS."""
    values = {"top": y / size[0], "left": x / size[1]}
    values |= {"height": height / size[0], "width": width / size[1]}
    return ";".join(f"{name}:{100 * value:.3f}%" for name, value in values.items())


def _place(region: Region) -> str:
    return (
        f"Region {region.index} ({region.split}) of {region.image}, {region.side} px a side, at "
        f"y {region.y}, x {region.x}."
    )


def _condition(painting: Painting, panel: Panel) -> str:
    region = painting.region
    caption = _place(region)
    if panel.real != panel.size:
        caption += (
            " The image is larger: beyond the dashed line its condition is continued by "
            "reflection, as shown."
        )
    elif coarser(max(painting.size), -painting.level) < region.side:
        caption += " Its top left corner, which the image covers."
    if region.split == "train":
        caption += " The run was trained on it."
    return caption


def _generated(painting: Painting) -> str:
    scale = f" at scale {2.0**-painting.level:g}" if painting.level else ""
    seed = painting.record["identity"]["recipe"]["seed"]
    return f"Painted after the condition{scale}, from seed {seed}."


def _nearest(painting: Painting, neighbours: Neighbourhood) -> str:
    region = neighbours.nearest
    assert region is not None, "a panel without a region"
    caption = (
        f"{_place(region)} {facts.number(neighbours.distance)} grey levels away at 64 × 64 px."
    )
    if is_same(region, painting.region):
        return f"{caption} It is the condition itself."
    shared = overlap(painting.region, region)
    return f"{caption} It shares {shared:.0%} of the condition's area." if shared else caption
