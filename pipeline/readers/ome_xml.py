"""What the OME-XML of an OME-TIFF says: which images a file holds, where their planes lie and how
large a pixel is.

Of everything that the OME model can describe, one image of one plane in depth and time is of use
here: the largest of the file (the others are thumbnails, labels, macros). Its colours are either
the samples of one plane, or planes of their own, which then are red, green, blue (and
near-infrared) in the order in which the file names them. Planes of fluorescence have other names
and are no colours: they are refused, not guessed at. Nothing is looked up in the TIFF itself, so
that an XML that claims a billion planes costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from pipeline.readers.protocol import BANDS, NIR_NAMES, UnreadableError, number

UM_PER = {
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0},
    **{"mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "in": 25400.0, "mil": 25.4, "pt": 25400 / 72},
}
SHORT_NAMES = {"r": "red", "g": "green", "b": "blue", **dict.fromkeys(NIR_NAMES, "nir")}
NO_LENGTHS = ("pixel", "reference frame")
SHOWN_NAMES = 6


@dataclass(frozen=True)
class OmeDescription:
    """The largest image of a file.

    planes: the index in the file's chain of pages of each plane, either of one, which holds all
    colours, or one for each of `bands`. mpp_yx: (y, x) in µm as the file says it, NaN for what is
    no number or unit, None where it says nothing. image, images: its number and how many there
    are.
    """

    height: int
    width: int
    bands: tuple[str, ...]
    planes: tuple[int, ...]
    mpp_yx: tuple[float, float] | None
    image: int
    images: int


def describe_ome(path: Path, xml: str) -> OmeDescription:
    """The largest image of the OME-TIFF at `path`; `UnreadableError` when it is none of colour."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UnreadableError(
            f"{path} has OME-XML that is broken ({error}), so that its planes cannot be told "
            "apart; write it again"
        ) from error
    found = root.findall("{*}Image/{*}Pixels")
    if not found:
        raise UnreadableError(
            f"{path} is a part of an OME-TIFF whose description is in another file, and only "
            "files that describe themselves are supported; convert it (bfconvert)"
        )
    sizes = [_side(path, pixels, "Y") * _side(path, pixels, "X") for pixels in found]
    image = sizes.index(max(sizes))
    pixels = found[image]
    _refuse_stack(path, pixels)
    bands, in_one_plane = _bands(path, pixels)
    return OmeDescription(
        height=_side(path, pixels, "Y"),
        width=_side(path, pixels, "X"),
        bands=bands,
        planes=_planes(path, pixels, root.get("UUID"), 1 if in_one_plane else len(bands)),
        mpp_yx=_pixel_size(pixels),
        image=image,
        images=len(found),
    )


def _side(path: Path, pixels: ElementTree.Element, axis: str) -> int:
    text = pixels.get(f"Size{axis}", "")
    if not text.isdecimal() or int(text) < 1:
        raise UnreadableError(
            f"{path} has OME-XML with Size{axis} {text!r}, which is no number of pixels or "
            "planes; write it again"
        )
    return int(text)


def _refuse_stack(path: Path, pixels: ElementTree.Element) -> None:
    for axis, what in (("Z", "planes in depth"), ("T", "points in time")):
        count = _side(path, pixels, axis)
        if count > 1:
            raise UnreadableError(
                f"{path} has {count} {what} and an image here has one; write the wanted one to a "
                f"file of its own (bfconvert -{axis.lower()} 0)"
            )


def _bands(path: Path, pixels: ElementTree.Element) -> tuple[tuple[str, ...], bool]:
    """The names of the colours, and whether one plane holds them all."""
    channels = pixels.findall("{*}Channel")
    count = _side(path, pixels, "C")
    names = [(c.get("Name") or "").strip().lower() for c in channels]
    if count == 3 and [c.get("SamplesPerPixel") for c in channels] == ["3"]:
        return BANDS[:3], True
    colours = tuple(SHORT_NAMES.get(name, name) for name in names)
    if len(colours) == count and colours in (BANDS[:3], BANDS):
        return colours, False
    if count == 3 and not any(colours) and len(channels) in (0, 3):
        return BANDS[:3], False
    shown = ", ".join(name or "without a name" for name in names[:SHOWN_NAMES]) or "without names"
    raise UnreadableError(
        f"{path} has {count} channel(s) ({shown}) and images of colour are supported: red, green, "
        "blue, or these and nir, by name or three without names; what fluorescence means cannot "
        "be told from its channels, so write an RGB view of it (bfconvert -merge)"
    )


def _planes(
    path: Path, pixels: ElementTree.Element, uuid: str | None, count: int
) -> tuple[int, ...]:
    """The page of every plane; by default they follow one another from the file's beginning."""
    pages: dict[int, int] = {}
    data = pixels.findall("{*}TiffData")
    for item in data:
        other = item.find("{*}UUID")
        if other is not None and other.text != uuid and other.get("FileName") != path.name:
            raise UnreadableError(
                f"{path} is spread over several files, such as {other.get('FileName')}, and one "
                "file has to hold an image; convert it to one (bfconvert)"
            )
        first, page = (int(number(item.get(n, "0"), 0.0)) for n in ("FirstC", "IFD"))
        listed = item.get("PlaneCount", item.get("NumPlanes", "1" if "IFD" in item.attrib else ""))
        for step in range(min(int(number(listed, float(count))), count)):
            pages.setdefault(first + step, page + step)
    if not data:
        pages = {plane: plane for plane in range(count)}
    missing = [plane for plane in range(count) if plane not in pages]
    if missing or min(pages.values()) < 0:
        raise UnreadableError(
            f"{path} has OME-XML that names no page for plane {(missing or [0])[0]} of {count}; "
            "write it again"
        )
    return tuple(pages[plane] for plane in range(count))


def _pixel_size(pixels: ElementTree.Element) -> tuple[float, float] | None:
    if not {"PhysicalSizeX", "PhysicalSizeY"} <= pixels.attrib.keys():
        return None
    if pixels.get("PhysicalSizeXUnit") in NO_LENGTHS:
        return None
    y, x = (
        number(pixels.get(f"PhysicalSize{axis}", ""))
        * UM_PER.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
        for axis in "YX"
    )
    return y, x
