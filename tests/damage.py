"""Files with changed bytes, for the tests of every reader."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.readers import TileError, UnreadableError, open_reader


def read_damaged(path: Path, changes: Sequence[tuple[int, int]]) -> None:
    """Read every level of a copy with bytes (place, value) changed; nothing is raised but a
    refusal that names it.
    """
    payload = bytearray(path.read_bytes())
    for place, value in changes:
        payload[place % len(payload)] = value
    damaged = path.with_name("damaged.tif")
    damaged.write_bytes(payload)
    try:
        with open_reader(damaged, source_mpp=0.5) as reader:
            for level in range(len(reader.downsamples)):
                height, width = (min(side, 300) for side in reader.level_shape(level))
                reader.read(0, 0, height, width, level)
    except (UnreadableError, TileError) as error:
        assert damaged.name in str(error)
