"""`gigabrush STAGE ...`: every stage's module by name, from one command.

`gigabrush ingest slides/` is `python -m pipeline.ingest slides/`. A stage is imported only when it
is asked for, so that ingest runs on a machine without torch.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

STAGES = {
    "phantom": ("pipeline.phantom", "draw a slide or an aerial scene by code"),
    "ingest": ("pipeline.ingest", "slides and aerial images into a dataset store"),
    "pretrain": ("conditioning.pretrain", "a self-supervised encoder from the store's own tiles"),
    "embed": ("conditioning.embed", "embeddings of every image on lattices of tiles"),
    "pack": ("pipeline.pack", "the random draws of training, done once"),
    "train": ("jobs.train", "the denoiser, on one device or many"),
    "latents": ("jobs.latents", "the latent model, for images without a condition"),
    "sample": ("jobs.sample", "large images after the conditions of regions, or after none"),
    "evaluate": ("jobs.evaluate", "Crop FID and more of painted images, with floors"),
    "report": ("jobs.report", "a page about painted images, their run and their metrics"),
    "export": ("pipeline.export", "an image as pyramidal TIFF, OME-TIFF or COG"),
    "compare": ("jobs.compare", "contestants on equal terms, with their Crop FIDs"),
    "submit": ("slurm.submit", "stages from ingest to evaluate, or a chain of them, to SLURM"),
    "demo": ("jobs.demo", "the whole chain on one small input"),
    "info": ("jobs.info", "what a store, run, packs, encoder or image holds"),
    "doctor": ("jobs.doctor", "what this machine has, what is missing and how to get it"),
}
CHAIN = ("ingest", "pretrain", "embed", "pack", "train", "sample", "evaluate", "report", "export")
LOOKING = ("info", "doctor")


def usage() -> str:
    """All stages: the chain in its order, then what looks at things, then the others."""
    others = tuple(name for name in STAGES if name not in CHAIN + LOOKING)
    lines = ["usage: gigabrush STAGE [OPTIONS]"]
    for title, names in (
        ("the chain, in order", CHAIN),
        ("looking at things", LOOKING),
        ("more", others),
    ):
        lines += ["", f"{title}:", *(f"  {name:<10}{STAGES[name][1]}" for name in names)]
    return "\n".join(
        [
            *lines,
            "",
            "gigabrush STAGE --help teaches a stage, gigabrush --version says which this is.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gigabrush {importlib.metadata.version('gigabrush')}")
        return 0
    stage, *rest = arguments
    if stage not in STAGES:
        print(f"gigabrush: there is no stage {stage!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(STAGES[stage][0])
    except ModuleNotFoundError as missing:
        print(
            f"gigabrush: {stage} needs {missing.name}, which is not installed; "
            "run pip install 'gigabrush[train]'",
            file=sys.stderr,
        )
        return 2
    return int(module.main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
