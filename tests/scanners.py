"""Small files as scanners write them, which OpenSlide opens: a Leica SCN with areas that were
scanned on glass that was not, and a DICOM series of a slide.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

MPP_UM = 0.5
SCN = (
    '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
    '<collection name="c" uuid="c" sizeX="{width}" sizeY="{height}">{images}</collection></scn>'
)
SCN_IMAGE = (
    '<image name="i" uuid="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
    '<device model="Leica SCN400" version="1"/>'
    '<pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>'
    '<view sizeX="{width_nm}" sizeY="{height_nm}" offsetX="{x_nm}" offsetY="{y_nm}"'
    ' spacingZ="0"/><scanSettings><objectiveSettings><objective>20</objective>'
    "</objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>"
    "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
    "</image>"
)
NM = round(MPP_UM * 1000)


def box_means(pixels: np.ndarray, step: int) -> np.ndarray:
    """Means of (h, w, 3) over squares of `step` px."""
    height, width, _ = pixels.shape
    cells = pixels.reshape(height // step, step, width // step, step, 3)
    return np.floor(cells.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def write_scn(
    path: Path,
    areas: Sequence[tuple[int, int, np.ndarray]],
    shape: tuple[int, int],
    steps: Sequence[int] = (1,),
) -> Path:
    """A glass of `shape` (h, w) px with scanned `areas` (y, x, pixels) at every one of `steps`."""
    macro = np.full((128, 256, 3), 240, np.uint8)
    pages, images = [macro], [_scn_image("m", macro, [0], (0, 0), shape)]
    for y, x, pixels in areas:
        ifds = range(len(pages), len(pages) + len(steps))
        pages += [box_means(pixels, step) for step in steps]
        images.append(_scn_image(f"a{y}", pixels, ifds, (y, x), pixels.shape[:2], steps))
    sides = {"height": shape[0] * NM, "width": shape[1] * NM}
    text = SCN.format(images="".join(images), **sides)
    layout: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
    layout |= {"resolution": (1e4 / MPP_UM, 1e4 / MPP_UM), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, page in enumerate(pages):
            description = None if number else text
            tiff.write(page, metadata=None, description=description, **layout)
    return path


def _scn_image(
    name: str,
    pixels: np.ndarray,
    ifds: Sequence[int],
    corner: tuple[int, int],
    view: tuple[int, ...],
    steps: Sequence[int] = (1,),
) -> str:
    height, width = pixels.shape[:2]
    levels = "".join(
        f'<dimension sizeX="{width // step}" sizeY="{height // step}" r="{r}" ifd="{ifd}"/>'
        for r, (ifd, step) in enumerate(zip(ifds, steps, strict=True))
    )
    lengths = {"height_nm": view[0] * NM, "width_nm": view[1] * NM}
    lengths |= {"y_nm": corner[0] * NM, "x_nm": corner[1] * NM}
    return SCN_IMAGE.format(name=name, height=height, width=width, levels=levels, **lengths)


def write_dicom(
    path: Path, pixels: np.ndarray, series: str, number: int = 0, tile: int = 128
) -> Path:
    """Level `number` of the slide `series`: `pixels` (h, w, 3) in tiles of JPEG."""
    height, width, _ = pixels.shape
    down, across = -(-height // tile), -(-width // tile)
    margin = ((0, down * tile - height), (0, across * tile - width), (0, 0))
    padded = np.pad(pixels, margin, mode="edge")
    frames = []
    for row in range(down):
        for column in range(across):
            corner = (slice(i * tile, (i + 1) * tile) for i in (row, column))
            stream = io.BytesIO()
            Image.fromarray(padded[tuple(corner)]).save(stream, "jpeg", quality=95, subsampling=0)
            frames.append(stream.getvalue())
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    image.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    image.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    image.SeriesInstanceUID, image.StudyInstanceUID = series, f"{series}.1"
    image.Modality, image.InstanceNumber = "SM", number + 1
    origin = ["DERIVED", "RESAMPLED"] if number else ["ORIGINAL", "NONE"]
    image.ImageType = [origin[0], "PRIMARY", "VOLUME", origin[1]]
    image.Rows = image.Columns = tile
    image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns = height, width
    image.NumberOfFrames, image.DimensionOrganizationType = len(frames), "TILED_FULL"
    image.SamplesPerPixel, image.PhotometricInterpretation = 3, "YBR_FULL_422"
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation, image.PlanarConfiguration = 7, 0, 0
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [MPP_UM * 2**number / 1000] * 2
    measures.SliceThickness = 0.001
    shared.PixelMeasuresSequence = [measures]
    image.SharedFunctionalGroupsSequence = [shared]
    image.PixelData = encapsulate(frames)
    image["PixelData"].is_undefined_length = True
    image.save_as(path, enforce_file_format=True)
    return path
