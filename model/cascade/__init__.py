"""Our denoiser: an image generated block of octaves by block of octaves, from coarse to fine.

docs/method.md has the equations and the reasons.
"""
