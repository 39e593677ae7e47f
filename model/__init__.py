"""The mathematics: cells, noise, process, denoiser, solver; no files, no Dask, no DeepSpeed."""
