"""The first stages of the chain on a small phantom, run once for all tests that need them."""

from dataclasses import dataclass
from pathlib import Path

import conditioning.embed
import conditioning.pretrain
import pipeline.ingest
import pipeline.pack
from pipeline.phantom import draw_slide

SIDE_PX = 256
POINTS = 22_830


@dataclass(frozen=True)
class Chain:
    """Paths of a small chain: a phantom slide of 768 px, regions of 256 px, packs, no run."""

    slide: Path
    store: Path
    encoder: Path
    packs: Path


def succeed(code: int) -> None:
    assert code == 0


def ingest_arguments(slide: Path, store: Path) -> list[str]:
    return [
        *(str(slide), "--out", str(store), "--region", str(SIDE_PX), "--stride", "128"),
        *("--min-tissue", "0", "--cluster", "inline"),
    ]


def pack_arguments(chain: Chain, out: Path) -> list[str]:
    return [
        *(str(chain.store), "--encoder", str(chain.encoder), "--out", str(out)),
        *("--points", str(POINTS), "--packs-per-region", "2"),
    ]


def pack_points(chain: Chain, folder: Path) -> dict[str, Path]:
    """Packs by every design of points; the mixed ones mollified."""
    packs = {name: folder / name for name in ("uniform", "mixed", "sobol")}
    mixed = ["--window", "16", "--lattice", "--mollifier", "1"]
    for name, out in packs.items():
        arguments = [*pack_arguments(chain, out), "--design", name]
        succeed(pipeline.pack.main(arguments + mixed * (name == "mixed")))
    return packs


def train_arguments(chain: Chain, run: Path, steps: int, *more: str) -> list[str]:
    return [
        *(str(chain.packs), "--run", str(run), "--preset", "tiny", "--steps", str(steps)),
        *("--batch", "2", "--warmup", "2", "--save-every", "2", "--log-every", "1", *more),
    ]


EVEN_SHARES = ("--set", "T.share=1", "A.share=1", "B.share=1", "C.share=1", "D.share=1")
"""Every block is trained as long as any other."""


def build(folder: Path) -> Chain:
    """Draw, ingest, pretrain, embed and pack, each by its command."""
    chain = Chain(*(folder / name for name in ("slide.tif", "dataset.zarr", "encoder", "packs")))
    draw_slide(chain.slide, height_px=768, width_px=768, mpp=0.5, seed=0)
    succeed(pipeline.ingest.main(ingest_arguments(chain.slide, chain.store)))
    store, encoder = str(chain.store), str(chain.encoder)
    arguments = ["--steps", "2", "--batch-size", "8", "--input-size", "32", "--dim", "16"]
    succeed(
        conditioning.pretrain.main(
            [store, "--out", encoder, *arguments, "--footprints", "64", "256"]
        )
    )
    footprints = ["--footprint", "64", "256"]
    succeed(conditioning.embed.main([store, "--encoder", encoder, *footprints]))
    succeed(pipeline.pack.main(pack_arguments(chain, chain.packs)))
    return chain
