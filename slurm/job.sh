# shellcheck shell=bash
# What every batch script of this folder starts with. Nothing of a site stands here or there: what a
# site wants comes from the environment (SBATCH_PARTITION, SBATCH_ACCOUNT ...; see README.md).

cd "$SLURM_SUBMIT_DIR"

python=${GIGABRUSH_PYTHON:-$PWD/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  echo "$SLURM_JOB_NAME: there is no Python at $python; submit from the folder with the .venv," \
    "or export GIGABRUSH_PYTHON" >&2
  exit 2
fi
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# The last line of the log says how the job ended: many sites have no sacct. A stage that finished
# although some inputs failed (3; each is named in the log) must not cancel what waits for it. A
# script names in `leftover` the file that nothing needs after it.
finish() {
  local code=$?
  rm -f -- ${leftover:+"$leftover"}
  echo "$SLURM_JOB_NAME: ended with exit code $code"
  if ((code == 3)); then exit 0; fi
}
trap finish EXIT
trap 'exit 143' TERM
