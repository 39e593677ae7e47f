"""Data at rest: slides and aerial images in, a zarr store, pixel packs, exported images out."""
