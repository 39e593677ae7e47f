"""What is compared, as a TOML file read into frozen dataclasses; unknown keys are errors.

Everything that is not named after a contestant is shared by all of them: the store, the encoder,
the CPU time of training, the seeds, the regions and sizes that are painted, and how they are
evaluated.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Contestant:
    """One system: a preset of jobs.train and its own options of the stages' commands."""

    name: str
    preset: str
    pack: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    cpu_minutes: CPU time of each training. seeds: by each, every contestant trains and paints
    once. images: how many regions that were not trained on are painted; size: side of the painted
    images. slides: what to ingest; none draws a phantom.
    encoder: a name for conditioning.embed; none trains one on the store. The others are options of
    the commands of their names.
    """

    contestants: tuple[Contestant, ...]
    cpu_minutes: float
    images: int
    size: int
    seeds: tuple[int, ...] = (0,)
    slides: tuple[str, ...] = ()
    encoder: str | None = None
    ingest: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [contestant.name for contestant in self.contestants]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"a comparison needs at least two contestants of different names, not {names}"
            )
        if not all(name.replace("-", "").replace("_", "").isalnum() for name in names):
            raise ValueError(
                f"contestants {names} name folders: use letters, digits, hyphens and underscores"
            )
        if self.cpu_minutes <= 0 or self.images < 1 or self.size < 1:
            raise ValueError(
                f"cpu_minutes = {self.cpu_minutes}, images = {self.images} and size = {self.size} "
                "must be positive"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds = {list(self.seeds)} must name at least one seed, none twice and none "
                "below 0"
            )


def read_comparison(path: Path) -> Comparison:
    """Read a TOML file; every mistake in it is a `ValueError`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; docs/compare has comparisons to start from")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as mistake:
        raise ValueError(f"{path} is not TOML: {mistake}") from None
    contestants = content.pop("contestants", [])
    if not isinstance(contestants, list):
        raise ValueError(f"{path}: contestants must be tables, [[contestants]]")
    named = tuple(read_table(Contestant, table, f"{path}, contestant") for table in contestants)
    return read_table(Comparison, {**content, "contestants": named}, str(path))


def read_table(kind: type[Any], content: Mapping[str, Any], where: str) -> Any:
    """A TOML table as a frozen dataclass; a `ValueError` for what does not fit its fields."""
    wanted = get_type_hints(kind)
    unknown = sorted(set(content) - set(wanted))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known are {', '.join(wanted)}")
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    values = {name: _value(item, wanted[name], name, where) for name, item in content.items()}
    return kind(**values)


def _value(item: Any, wanted: Any, name: str, where: str) -> Any:
    """An item of a TOML file as the type of its field."""
    if get_origin(wanted) is tuple:
        (part, *_) = get_args(wanted)
        words = {str: "a list of texts", int: "a list of whole numbers"}.get(part, "tables")
        if isinstance(item, list | tuple) and all(type(one) is part for one in item):
            return tuple(item)
        raise ValueError(f"{where}: {name} must be {words}, not {item!r}")
    if get_origin(wanted) is dict:
        if isinstance(item, dict):
            return item
        raise ValueError(f"{where}: {name} must be a table, not {item!r}")
    if wanted is float and type(item) is int:
        item = float(item)
    for words, kind in {"a text": str, "a whole number": int, "a number": float}.items():
        if kind in (wanted, *get_args(wanted)) and type(item) is not kind:
            raise ValueError(f"{where}: {name} must be {words}, not {item!r}")
    return item
