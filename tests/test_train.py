"""Training with real DeepSpeed ranks: neither kills nor the number of ranks change it."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import Chain, train_arguments
from processes import run, start, stop_when, wait_for
from safetensors.torch import load_file

import jobs.train
from jobs.run import Run
from pipeline.console import EXIT_PREEMPTED

STEPS = 6


def state(folder: Path) -> dict[str, object]:
    file = folder / "state.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def weights(folder: Path, name: str = "ema") -> dict[str, torch.Tensor]:
    return load_file(
        folder / "checkpoints" / str(state(folder)["checkpoint"]) / f"{name}.safetensors"
    )


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run("jobs.train", train_arguments(chain, folder, STEPS))
    return folder


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    assert state(undisturbed)["status"] == "done"
    assert [line["step"] for line in metrics(undisturbed)] == list(range(1, STEPS + 1))
    assert len(list((undisturbed / "samples").glob("*.png"))) == STEPS // 2
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2
    assert list((undisturbed / "tensorboard").iterdir())
    assert len(json.loads((undisturbed / "config.json").read_text())["commit"]) >= 7
    config = Run(undisturbed).config()
    assert type(config).from_json(config.to_json()) == config
    trained, averaged = weights(undisturbed, "weights"), weights(undisturbed)
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)


def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(
    chain: Chain, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = train_arguments(chain, folder, STEPS)
    process = start("jobs.train", arguments)
    stop_when(process, lambda: state(folder).get("step", 0) != 0, signal.SIGKILL)
    assert state(folder)["status"] == "running"
    assert state(folder)["step"] in (2, 4)
    output = run("jobs.train", arguments)
    assert "resuming at step" in output
    assert metrics(folder) == metrics(undisturbed)
    for name in ("weights", "ema"):
        expected = weights(undisturbed, name)
        for key, value in weights(folder, name).items():
            assert torch.equal(value, expected[key]), key
    assert "already done" in run("jobs.train", arguments)


def test_two_ranks_see_what_one_rank_sees(chain: Chain, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]
    run("jobs.train", train_arguments(chain, folder, STEPS), [*launcher, "--module"])
    expected = [line["level_losses"] for line in metrics(undisturbed)]
    np.testing.assert_allclose(
        [line["level_losses"] for line in metrics(folder)], expected, rtol=2e-3, atol=2e-4
    )


def test_sigterm_saves_first(chain: Chain, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("jobs.train", train_arguments(chain, folder, 10_000, "--save-every", "5000"))
    metrics_file = folder / "metrics.jsonl"
    output = stop_when(process, metrics_file.is_file, signal.SIGTERM)
    assert process.returncode == EXIT_PREEMPTED, output
    assert state(folder)["status"] == "preempted"
    assert int(str(state(folder)["step"])) >= 1
    assert weights(folder)


def test_a_run_is_not_changed_under_its_feet(
    chain: Chain, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of = Run(undisturbed)
    config = run_of.config()
    other = config.from_json({**config.to_json(), "training": {**config.training, "seed": 9}})
    with pytest.raises(ValueError, match="seed = 0, this command asks for seed = 9"):
        run_of.claim(other)
    first, second = Run(tmp_path / "live"), Run(tmp_path / "live")
    first.claim(config)
    second.owner = "elsewhere:1:0"
    taken = json.loads((tmp_path / "live" / "state.json").read_text())
    taken["owner"] = second.owner
    (tmp_path / "live" / "state.json").write_text(json.dumps(taken))
    with pytest.raises(RuntimeError, match="now belongs to elsewhere"):
        first.update(step=3)
    with pytest.raises(ValueError, match="is being trained by process 1 on elsewhere"):
        first.claim(config)
    arguments = train_arguments(chain, tmp_path / "x", 2)
    assert jobs.train.main([*arguments, "--preset", "huge"]) == 2
    assert "choose one of tiny, small, brush, paper" in capsys.readouterr().err
    assert jobs.train.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "x").exists()


def test_a_run_in_this_process_leaves_no_rank_to_later_ones(
    chain: Chain, undisturbed: Path
) -> None:
    before = dict(os.environ)
    finished = train_arguments(chain, undisturbed, STEPS)
    for arguments, code in ((finished, 0), ([*finished, "--seed", "9"], 2), (finished, 0)):
        assert jobs.train.main(arguments) == code
        assert dict(os.environ) == before


def test_engine_state_of_another_user_is_not_loaded(
    chain: Chain, undisturbed: Path, tmp_path: Path
) -> None:
    """It holds pickles. The user is another one here, instead of the files."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = {**state(folder), "status": "preempted", "step": 4, "checkpoint": "step-00000004"}
    (folder / "state.json").write_text(json.dumps(before))
    code = (
        "import os, sys; os.geteuid = lambda: 2**31 - 7; import jobs.train; "
        "sys.exit(jobs.train.main(sys.argv[2:]))"
    )
    arguments = train_arguments(chain, folder, STEPS)
    output = run("jobs.train", arguments, ["-c", code], good=(2,))
    assert "belongs to another user" in output
    assert "--init-from" in output and "Traceback" not in output
    assert state(folder)["step"] == 4


def test_all_ranks_of_a_superseded_run_stop_before_they_write(
    chain: Chain, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    arguments = train_arguments(chain, folder, 10_000, "--save-every", "5")
    ranks = [
        start("jobs.train", arguments, more={**meeting, "WORLD_SIZE": "2", "RANK": str(rank)})
        for rank in range(2)
    ]
    wait_for(ranks[0], lambda: state(folder).get("step", 0) != 0)
    while True:  # the old owner may be just about to write its heartbeat
        taken = {**state(folder), "owner": "elsewhere:1:0"}
        (folder / "state.json").write_text(json.dumps(taken))
        time.sleep(0.1)
        if state(folder) == taken:
            break
    lines = len(metrics(folder))
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=120)
        assert f"rank {rank} stops: another process has taken" in output
        assert process.returncode == EXIT_PREEMPTED
    assert state(folder) == taken
    assert len(metrics(folder)) == lines
