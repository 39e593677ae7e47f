"""The main job on a real SLURM of two nodes: ingest, training, preemption, and the whole chain.

Jobs are submitted side by side before the first test, and each test waits for its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from chain import POINTS, Chain, ingest_arguments, train_arguments
from processes import run, start
from safetensors.torch import load_file
from slurm_cluster import NODES, Cluster, start_cluster, wait_until

import pipeline.ingest
import slurm.submit
from jobs.cli import STAGES
from pipeline.console import EXIT_PREEMPTED
from pipeline.store import Store
from slurm.requeue import after_training

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parent.parent
STEPS = 16
EXACT = ("--precision", "fp32", "--optimizer", "adamw", "--learning-rate", "2e-3")
"""Muon makes its matrices orthogonal in bfloat16, which shows the order in which floats are
summed: weights differ by 1e-3 after 16 steps, with AdamW by 3e-6.
"""

MAIN = """
# The main job of the tests, on regions of a small phantom. One input is no slide: ingest says so.
ingest   -- broken.tif {ingest}
pretrain -- dataset.zarr --out encoder --steps 2 --batch-size 8 --input-size 32 --dim 16 \
            --footprints 64 256
embed    -- dataset.zarr --encoder encoder --footprint 64 256
pack     -- dataset.zarr --encoder encoder --out packs --points {points} --packs-per-region 2
train    -- packs --run run --preset tiny --steps 2 --batch 2
sample   --array 2 -- run --condition dataset.zarr --region 1 3 --out images --steps 2 --guidance 1
{evaluate}
"""


@dataclass(frozen=True)
class Jobs:
    """What is submitted: numbers of jobs, and the process that submits Dask workers itself."""

    main: dict[str, str]
    training: str
    ingest: str
    ingest_by_jobs: subprocess.Popen[str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with start_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that jobs are submitted from, laid out as a clone is."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / ".venv").symlink_to(sys.prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment[name])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield folder


@pytest.fixture(scope="module")
def tall_slide(desk: Path) -> Path:
    """A slide of three shards, all tissue."""
    pixels = np.random.default_rng(0).integers(60, 90, (9000, 512, 3), np.uint8)
    pixels[..., 1] //= 2
    layout = {"tile": (256, 256), "compression": "zlib", "resolutionunit": "CENTIMETER"}
    file = desk / "tall.tif"
    tifffile.imwrite(
        file, pixels, metadata=None, photometric="rgb", resolution=(2e4, 2e4), **layout
    )
    return file


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, desk: Path, tall_slide: Path, chain: Chain) -> Iterator[Jobs]:
    """Everything that runs, submitted side by side."""
    (desk / "broken.tif").write_bytes(b"II*\0 but nothing follows")
    words = ingest_arguments(chain.slide, Path("dataset.zarr"))
    text = MAIN.format(
        ingest=" ".join(words[: words.index("--cluster")]),
        points=POINTS,
        evaluate="evaluate -- --real dataset.zarr --generated images --out metrics.json"
        if "evaluate" in STAGES
        else "",
    )
    (desk / "main.chain").write_text(text.replace("\\\n", ""))
    one_core = ["--cpus-per-task", "1", "--time", "30"]
    assert slurm.submit.main(["--chain", "main.chain", *one_core]) == 0
    main = {record["stage"]: record["job_id"] for record in records(desk)}
    two_nodes = ["--nodes", "2", "--gpus-per-node", "0", "--logs", "training-logs"]
    words = train_arguments(chain, desk / "trained", STEPS, *EXACT)
    assert slurm.submit.main(["train", *two_nodes, *one_core, "--", *words]) == 0
    (training,) = (record["job_id"] for record in records(desk, "training-logs"))
    # As the README says, without slurm.submit.
    ingest = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "slurm/ingest.sbatch"),
        *(str(tall_slide), "--out", "by-nodes/dataset.zarr", "--region", "512"),
    ).strip()
    words = [str(tall_slide), "--out", "by-jobs/dataset.zarr", "--region", "512"]
    by_jobs = start(
        "pipeline.ingest",
        [*words, "--cluster", "slurm", "--workers", "2"],
        more={**os.environ, "SBATCH_TIMELIMIT": "10"},
    )
    yield Jobs(main, training, ingest, by_jobs)
    by_jobs.kill()
    by_jobs.communicate()


def records(desk: Path, logs: str = "slurm-logs") -> list[dict[str, str]]:
    return [json.loads(file.read_text()) for file in (desk / logs).glob("*.json")]


def arrays(store: Path) -> dict[str, np.ndarray]:
    """Every array in a store, by its place."""
    return {
        str(item.parent.relative_to(store)): np.asarray(
            zarr.open_array(item.parent, mode="r")[...]
        )
        for item in sorted(store.rglob("zarr.json"))
        if json.loads(item.read_text())["node_type"] == "array"
    }


def state(run_folder: Path) -> dict[str, object]:
    file = run_folder / "state.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def test_a_preempted_training_on_two_nodes_ends_like_one_rank_undisturbed(
    cluster: Cluster, desk: Path, chain: Chain, jobs: Jobs
) -> None:
    trained, alone = desk / "trained", desk / "alone"
    wait_until((trained / "metrics.jsonl").is_file, 800)
    # What SLURM does two minutes before the time limit (#SBATCH --signal).
    cluster.run("scancel", "--signal=TERM", jobs.training)
    wait_until(lambda: state(trained).get("status") == "preempted", 60)
    assert 1 <= int(str(state(trained)["step"])) < STEPS
    run("jobs.train", train_arguments(chain, alone, STEPS, *EXACT))
    assert cluster.wait([jobs.training]) == {jobs.training: {"COMPLETED"}}
    ended = state(trained)
    assert (ended["status"], ended["restarts"], ended["job_id"]) == ("done", 1, jobs.training)
    log = (desk / "training-logs" / f"train-{jobs.training}.log").read_text()
    assert f"requeueing job {jobs.training}" in log
    assert "resuming at step" in log
    assert cluster.job(jobs.training)["NodeList"] == "brush[0-1]"
    # Only the order of float sums differs.
    expected, found = weights(alone), weights(trained)
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name], values, rtol=0, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = run_folder / "checkpoints" / str(state(run_folder)["checkpoint"])
    return load_file(checkpoint / "weights.safetensors")


def test_ingest_on_two_nodes_equals_ingest_in_one_process(
    cluster: Cluster, desk: Path, tall_slide: Path, jobs: Jobs
) -> None:
    words = [str(tall_slide), "--out", "inline/dataset.zarr", "--region", "512"]
    assert pipeline.ingest.main([*words, "--cluster", "inline"]) == 0
    expected, log = arrays(desk / "inline" / "dataset.zarr"), desk / f"ingest-{jobs.ingest}.log"
    assert cluster.wait([jobs.ingest]) == {jobs.ingest: {"COMPLETED"}}, log.read_text()
    output, _ = jobs.ingest_by_jobs.communicate(timeout=400)
    assert jobs.ingest_by_jobs.returncode == 0, output
    for place in ("by-nodes", "by-jobs"):
        found = arrays(desk / place / "dataset.zarr")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, name)
    store = Store.open(desk / "by-nodes" / "dataset.zarr")
    (image,) = store.image_states().values()
    assert image["nodes"] == list(NODES)
    assert len(list((desk / "by-jobs" / "slurm-logs").glob("*.err"))) == 2
    assert not list(desk.glob(".dask-scheduler-*"))


def test_a_chain_of_jobs_ends_with_painted_images(
    cluster: Cluster, desk: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    states = cluster.wait(list(jobs.main.values()))
    logs = "\n".join(log.read_text()[-2000:] for log in (desk / "slurm-logs").glob("*.log"))
    assert set.union(*states.values()) == {"COMPLETED"}, logs
    painted = sorted((desk / "images").glob("*.ome.tif"))
    assert ["_region1_" in painted[0].name, "_region3_" in painted[1].name] == [True, True]
    for file in painted:
        pixels = tifffile.imread(file)
        assert pixels.shape == (256, 256, 3)
        assert pixels.std() > 0
    assert len(list((desk / "slurm-logs").glob(f"sample-{jobs.main['sample']}_*.log"))) == 2
    assert (desk / "metrics.json").is_file() == ("evaluate" in STAGES)
    assert slurm.submit.main(["--status"]) == 0
    said = capsys.readouterr().out
    assert "ingest   done, but some inputs failed; slurm-logs/ingest-" in said
    assert "train    done; slurm-logs/train-" in said
    assert "sample   2 done; slurm-logs/sample-" in said


def test_what_waits_for_a_failed_job_is_cancelled_and_said(
    cluster: Cluster, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--cpus-per-task", "1", "--time", "5", "--logs", "failed-logs"]
    (desk / "failing.chain").write_text(
        "pack -- nowhere.zarr --encoder e --out p\nembed -- nowhere.zarr --encoder e\n"
    )
    assert slurm.submit.main(["--chain", "failing.chain", *common]) == 0
    numbers = {record["stage"]: record["job_id"] for record in records(desk, "failed-logs")}
    states = cluster.wait(list(numbers.values()))
    assert states == {numbers["pack"]: {"FAILED"}, numbers["embed"]: {"CANCELLED"}}
    capsys.readouterr()
    assert slurm.submit.main(["--status", "--logs", "failed-logs"]) == 0
    said = capsys.readouterr().out
    assert "pack     failed with exit code 2" in said
    assert "embed    never began" in said
    # A run that says it was preempted does not bring a job back that has ended.
    preempted = {"job_id": numbers["pack"], "status": "preempted", "step": 1}
    assert after_training(1, preempted, numbers["pack"]) == EXIT_PREEMPTED
    assert cluster.job(numbers["pack"])["JobState"] == "FAILED"
    assert after_training(1, {**preempted, "job_id": "1"}, numbers["pack"]) == 1


def test_a_dry_run_shows_the_command_and_mistakes_are_refused(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "site.env").write_text("SBATCH_PARTITION=nowhere  # this site's\n")
    (desk / "two.chain").write_text("pack -- d --encoder e --out p\ntrain -- p --run r\n")
    options = ["--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--after", "7", "8"]
    words = ["p", "--run", "a run"]
    before = len(records(desk))
    assert slurm.submit.main(["train", *options, "--time", "8:00:00", "--", *words]) == 0
    said = capsys.readouterr().out
    assert "export SBATCH_PARTITION=nowhere" in said
    script = Path(slurm.submit.__file__).parent / "train.sbatch"
    assert (
        "sbatch --parsable --export=ALL --nodes=2 --gpus-per-node=4 --time=8:00:00 "
        "--ntasks-per-node=4 --dependency=afterok:7:8 --kill-on-invalid-dep=yes "
        f"--output=slurm-logs/train-%j.log {script} p --run 'a run'\n"
        "  # runs python -m jobs.train p --run 'a run', 8 ranks\n"
    ) in said
    assert slurm.submit.main(["--chain", "two.chain", "--dry-run", "--mem", "9G"]) == 0
    assert "--dependency=afterok:<pack>" in capsys.readouterr().out
    for words, sentence in (
        (["train", "--", "p", "--rnu", "r"], "Unrecognized options"),
        (["pack", "--nodes", "2", "--", "d"], "pack runs on one node"),
        (["sample", "--gpus-per-node", "4", "--", "r"], "take --array"),
        (["paint", "--", "r"], "is nothing to submit"),
        (["pack", "--after", "x", "--", "d"], "--after takes numbers"),
        (["pack", "--", "d", "--encoder", "e", "--out", "p"], "invalid partition"),
        (["--chain", "two.chain"], "invalid partition"),
        (["--status", "--logs", "none"], "has no records"),
    ):
        assert slurm.submit.main(words) == 2
        assert sentence in capsys.readouterr().err
    assert len(records(desk)) == before
    (desk / "site.env").unlink()
