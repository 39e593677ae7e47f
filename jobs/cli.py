"""`gigabrush STAGE ...`: every stage's module by name, from one command.

`gigabrush ingest slides/` is `python -m pipeline.ingest slides/`. A stage is imported only when it
is asked for, so that ingest runs on a machine without torch.
"""

import importlib
import sys
from collections.abc import Sequence

STAGES = {
    "phantom": ("pipeline.phantom", "draw a slide or an aerial scene by code"),
    "ingest": ("pipeline.ingest", "slides and aerial images into a dataset store"),
    "pretrain": ("conditioning.pretrain", "a self-supervised encoder from the store's own tiles"),
    "embed": ("conditioning.embed", "embeddings of every image on lattices of tiles"),
    "pack": ("pipeline.pack", "the random draws of training, done once"),
    "train": ("jobs.train", "the denoiser, on one device or many"),
    "sample": ("jobs.sample", "large images after the conditions of regions"),
    "export": ("pipeline.export", "an image as pyramidal TIFF, OME-TIFF or COG"),
    "submit": ("slurm.submit", "any of these, or a chain of them, to SLURM"),
    "demo": ("jobs.demo", "the whole chain on one small input"),
}


def usage() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in STAGES.items()]
    return "\n".join(
        ["usage: gigabrush STAGE [OPTIONS]", "", *lines, "", "gigabrush STAGE --help says more."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
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
