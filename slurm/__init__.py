"""Batch scripts of every stage, and the command that submits them: python -m slurm.submit."""
