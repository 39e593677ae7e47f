"""Images of the store, or generated ones, as files that viewers open: OME-TIFF, pyramidal TIFF,
COG.
"""

from pipeline.export.command import Compression, Format, export_image, infer_format, main

__all__ = ["Compression", "Format", "export_image", "infer_format", "main"]
