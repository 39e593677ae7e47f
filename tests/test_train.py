"""Training with real DeepSpeed ranks: neither kills, ranks nor threads change what it becomes."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from chain import EVEN_SHARES, Chain, train_arguments
from processes import run, start, stop_when, wait_for
from safetensors.torch import load_file, save_file

import jobs.sample
import jobs.train
from jobs.averages import PartAverages
from jobs.data import Batch, Batches
from jobs.optimizer import Joint, make_optimizer
from jobs.parts import HELD_OUT_WINDOWS, Part
from jobs.run import Run
from jobs.trainer import CpuClock
from model.cascade.objective import HELD_OUT_LOG_SNRS, BlockObjective
from model.draw import BlockDraw, TopDraw
from model.family import make_denoiser, make_objectives
from pipeline.console import EXIT_PREEMPTED, write_json_atomic
from pipeline.packfile import PackSet

STEPS = 10  # two of every block
EXACT = (*EVEN_SHARES, "B.turned=false", "--precision", "fp32")


KINDS = ("weights", "average", "early", "ema")


def state(folder: Path) -> dict[str, object]:
    file = folder / "state.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def weights(folder: Path, name: str = "ema") -> dict[str, torch.Tensor]:
    return load_file(
        folder / "checkpoints" / str(state(folder)["checkpoint"]) / f"{name}.safetensors"
    )


def metrics(folder: Path, kind: str = "loss") -> list[dict[str, object]]:
    """Lines of training or, of another kind, of the held-out error, without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if kind in line]


def same(folder: Path, other: Path, names: tuple[str, ...] = KINDS) -> None:
    """Bit for bit."""
    for name in names:
        expected = weights(other, name)
        for key, value in weights(folder, name).items():
            assert torch.equal(value, expected[key]), key


@pytest.fixture(scope="module")
def undisturbed(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert jobs.train.main(train_arguments(chain, folder, STEPS, *EXACT)) == 0
    return folder


def initial(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run of seed 0 starts from."""
    config = Run(folder).config()
    torch.manual_seed(0)
    return make_denoiser(config.denoiser, config.octaves).state_dict()


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    assert state(undisturbed)["status"] == "done"
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name, levels in (("T", [8]), ("A", [6, 7]), ("B", [4, 5]), ("C", [2, 3]), ("D", [0, 1])):
        own = [line for line in lines if line["part"] == name]
        assert [line["part_step"] for line in own] == [1, 2]
        for line in own:
            losses = line["level_losses"]
            assert line["levels"] == levels
            assert line["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    parts = state(undisturbed)["parts"]
    assert isinstance(parts, dict)
    assert {name: steps for name, (steps, _) in parts.items()} == dict.fromkeys("TABCD", 2)
    assert state(undisturbed)["seconds"] == pytest.approx(sum(s for _, s in parts.values()))
    assert 0 < state(undisturbed)["cpu_seconds"] < process_time()
    assert len(list((undisturbed / "samples").glob("*.png"))) == STEPS // 2
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2
    assert list((undisturbed / "tensorboard").iterdir())
    assert len(json.loads((undisturbed / "config.json").read_text())["commit"]) >= 7
    config = Run(undisturbed).config()
    assert type(config).from_json(config.to_json()) == config
    trained, averaged = weights(undisturbed, "weights"), weights(undisturbed)
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)
    first = initial(undisturbed)
    for name in "TABCD":
        own = [key for key in first if key.startswith(f"blocks.{name}.")]
        assert any(not torch.equal(trained[key], first[key]) for key in own)


def test_the_held_out_error_is_that_of_the_averaged_weights_on_the_validation_split(
    chain: Chain, undisturbed: Path
) -> None:
    """Measured anew from the checkpoint: on fixed windows, at fixed noise and clean parents."""
    lines = {str(line["part"]): line for line in metrics(undisturbed, "held_out")}
    assert lines.keys() == set("TABCD")
    packs = PackSet.open(chain.packs)
    denoiser = Run(undisturbed).load_denoiser(device=torch.device("cpu"))
    objectives = make_objectives(denoiser)
    for part, (name, objective) in enumerate(objectives.items()):
        line = lines[name]
        assert (line["split"], line["part_step"]) == ("val", 2)
        assert line["log_snrs"] == list(HELD_OUT_LOG_SNRS)
        options = {"split": "val", "part": part, "top_window": denoiser.config.top.training_side}
        batches = Batches(packs, HELD_OUT_WINDOWS, 0, 0.0, augment=False, **options)
        batch = batches.at(0)
        assert isinstance(objective, BlockObjective)
        assert isinstance(batch.draw, TopDraw | BlockDraw)
        errors = objective.held_out(batch.draw, batch.condition, batch.seeds)
        errors /= batch.draw.weight.mean()
        np.testing.assert_allclose(line["held_out"], errors.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["A", "B", "C", "D"])
def test_samples_are_turned_in_the_blocks_that_say_so(
    chain: Chain, undisturbed: Path, name: str
) -> None:
    """B is not here; the first loss of each block is that of its batch under the first
    weights, and of no other batch.
    """
    packs, config = PackSet.open(chain.packs), Run(undisturbed).config()
    denoiser = make_denoiser(config.denoiser, config.octaves)
    denoiser.load_state_dict(initial(undisturbed))
    line = next(line for line in metrics(undisturbed) if line["part"] == name)
    found = []
    for turned in (name != "B", name == "B"):
        batches = Batches(
            packs,
            config.training["batch"],
            config.training["seed"],
            augment=turned,
            part="TABCD".index(name),
            tokens=name != "D",
            top_window=config.denoiser.top.training_side,
        )
        batch = batches.at(0)
        objective = make_objectives(denoiser)[name]
        with torch.no_grad():
            losses = objective(batch.draw, batch.condition, batch.seeds, batch.uniform)
        found.append(losses.numpy())
    np.testing.assert_allclose(line["level_losses"], found[0], atol=2e-5)
    assert abs(found[1] - found[0]).max() > 1e-3


def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(
    chain: Chain, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = train_arguments(chain, folder, STEPS, *EXACT)
    process = start("jobs.train", arguments)
    stop_when(process, lambda: state(folder).get("step", 0) != 0, signal.SIGKILL)
    assert state(folder)["status"] == "running"
    assert state(folder)["step"] in (2, 4, 6, 8)
    known = {**state(folder), "cpu_seconds": 5000.0}
    (folder / "state.json").write_text(json.dumps(known))
    assert jobs.train.main(arguments) == 0
    assert "resuming at step" in capsys.readouterr().out
    assert metrics(folder) == metrics(undisturbed)
    same(folder, undisturbed)
    assert 5000 < state(folder)["cpu_seconds"] < 6000
    assert jobs.train.main(arguments) == 0
    assert "already done" in capsys.readouterr().out


def test_the_clock_of_cpu_time_counts_while_it_runs() -> None:
    def busy() -> None:
        until = process_time() + 0.2
        while process_time() < until:
            pass

    clock = CpuClock()
    busy()
    for _ in range(2):
        clock.start()
        busy()
        clock.stop()
        busy()
    assert 0.4 <= clock.seconds < 0.6


def test_two_lanes_train_what_one_trains(chain: Chain, undisturbed: Path, tmp_path: Path) -> None:
    """Side by side, one thread each: bit for bit, whatever the order of their steps."""
    folder = tmp_path / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments = train_arguments(chain, folder, STEPS, *EXACT, "--save-every", "99")
        assert jobs.train.main(arguments) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    same(folder, undisturbed)

    def of_part(of: Path, name: str) -> list[dict[str, object]]:
        lines = [line for line in metrics(of) if line["part"] == name]
        return [{k: v for k, v in line.items() if k != "step"} for line in lines]

    for name in "TABCD":
        assert of_part(folder, name) == of_part(undisturbed, name)
    assert sorted(int(str(line["step"])) for line in metrics(folder))[-1] == STEPS


def test_two_ranks_see_what_one_rank_sees(chain: Chain, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]
    arguments = train_arguments(chain, folder, STEPS, *EXACT, "--save-every", "99")
    run("jobs.train", arguments, [*launcher, "--module"])
    pairs = zip(metrics(folder), metrics(undisturbed), strict=True)
    for found, expected in pairs:
        losses, wanted = found.pop("level_losses"), expected.pop("level_losses")
        np.testing.assert_allclose(losses, wanted, rtol=2e-3, atol=2e-4)
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=2e-3, abs=2e-4)
        assert found == expected


def test_blocks_are_trained_apart_and_joined(
    chain: Chain, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes share the work: each block becomes what it becomes beside the others."""
    files = []
    for number, blocks in enumerate((["B"], ["D", "C", "A"])):
        folder = tmp_path / str(number)
        steps = STEPS // 5 * len(blocks)
        arguments = train_arguments(chain, folder, steps, *EXACT, "--blocks", *blocks)
        assert jobs.train.main(arguments) == 0
        files.append(str(folder / "checkpoints" / f"step-{steps:08d}" / "weights.safetensors"))
        found, first, whole = (
            weights(folder, "weights"),
            initial(folder),
            weights(undisturbed, "weights"),
        )
        for key, value in found.items():
            expected = whole if key.split(".")[1] in blocks else first
            assert torch.equal(value, expected[key]), key
    joined = tmp_path / "joined"
    arguments = train_arguments(chain, joined, 0, *EXACT, "--seed", "5")
    assert jobs.train.main([*arguments, "--init-from", *files]) == 0
    assert state(joined)["status"] == "done"
    for key, value in weights(joined).items():
        if not key.startswith("blocks.T."):
            assert torch.equal(value, weights(undisturbed, "weights")[key]), key
    older = str(tmp_path / "older.safetensors")
    save_file(load_file(files[0]), older)  # as weights were written before networks had a form
    for more, sentence in (
        (["--init-from", older], "holds weights of a network of form 1"),
        (["--init-from", files[0], files[0]], "were both trained on block B"),
        (["--init-from", files[0], "--set", "D.widths=32"], "holds weights of another denoiser"),
        (["--init-from", str(tmp_path / "none.safetensors")], "does not exist"),
        ([], "--steps takes a positive number, not 0 (0 only with --init-from)"),
    ):
        command = [*train_arguments(chain, tmp_path / "x", 0, *EXACT), *more]
        assert jobs.train.main(command) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_zero_needs_adamw(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is also what it takes by default."""
    command = train_arguments(chain, tmp_path / "run", 1, "--blocks", "T", "--zero", "1")
    assert jobs.train.main([*command, "--optimizer", "muon"]) == 2
    assert "take --zero 0 or --optimizer adamw" in " ".join(capsys.readouterr().err.split())
    assert jobs.train.main(command) == 0
    training = Run(tmp_path / "run").config().training
    assert (training["optimizer"], training["learning_rate"]) == ("adamw", 1e-4)
    assert jobs.train.main([*command, "--optimizer", "adamw"]) == 0
    assert "already done" in capsys.readouterr().out


def test_muons_momentum_comes_back(undisturbed: Path) -> None:
    """Both optimizers of a block step on as if they had never been written."""
    config = Run(undisturbed).config()
    generator = torch.Generator().manual_seed(0)

    def block() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = make_objectives(make_denoiser(config.denoiser, config.octaves))["B"]
        optimizer = make_optimizer(module, "muon", 1e-2)
        return list(module.parameters()), optimizer

    (one, first), (other, second) = block(), block()
    assert isinstance(first, Joint)
    muon, adamw = first.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    moved = {id(p) for part in first.parts for g in part.param_groups for p in g["params"]}
    assert moved == {id(p) for p in one}
    for step in range(4):
        if step == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            with torch.no_grad():
                for mine, theirs in zip(other, one, strict=True):
                    mine.copy_(theirs)
            assert any(
                value.abs().max() > 0
                for state in muon.state.values()
                for value in state.values()
                if isinstance(value, torch.Tensor)
            )
        gradients = [torch.randn(p.shape, generator=generator) for p in one]
        for parameters, optimizer in ((one, first), (other, second)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, one, strict=True))


def test_the_averaged_weights_of_a_tenth_of_the_training_are_kept(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For autoguidance."""
    seen: dict[str, list[torch.Tensor]] = {}
    step = Part._step

    def observed(part: Part, batch: Batch) -> torch.Tensor:
        losses = step(part, batch)
        seen.setdefault(part.name, []).append(part.averages.running[0].clone())
        return losses

    monkeypatch.setattr(Part, "_step", observed)
    folder = tmp_path / "run"
    arguments = train_arguments(chain, folder, 10, "--blocks", "C", "--save-every", "100")
    assert jobs.train.main(arguments) == 0
    early, late = weights(folder, "early"), weights(folder, "average")
    parameters = Run(folder).load_denoiser(device=torch.device("cpu")).named_parameters()
    name = next(name for name, _ in parameters if name.startswith("blocks.C."))
    assert torch.equal(early[name], seen["C"][0]) and torch.equal(late[name], seen["C"][-1])
    assert not torch.equal(early[name], late[name])


def test_images_are_generated_with_the_weights_that_erred_least_on_held_out_regions(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the running averages become; measured at steps that do not depend on time."""
    errors = iter([3.0, 2.0, 5.0, 6.0, 4.0])
    seen: dict[int, torch.Tensor] = {}

    def judged(averages: PartAverages, error: float) -> None:
        found = next(errors)
        seen[int(found)] = averages.running[0].clone()
        judge(averages, found)

    judge = PartAverages.judge
    monkeypatch.setattr(PartAverages, "judge", judged)
    folder = tmp_path / "run"
    arguments = train_arguments(chain, folder, 16, "--blocks", "C", "--save-every", "100")
    assert jobs.train.main(arguments) == 0
    lines = metrics(folder, "held_out")
    assert [line["part_step"] for line in lines] == [
        8,
        10,
        12,
        15,
        16,
    ]  # a quarter more each, and the end
    parameters = Run(folder).load_denoiser(device=torch.device("cpu")).named_parameters()
    name, value = next((k, v) for k, v in parameters if k.startswith("blocks.C."))
    assert torch.equal(value, seen[2]) and torch.equal(weights(folder, "average")[name], seen[4])
    assert state(folder)["errors"] == {"C": 2.0}


def test_a_limit_of_time_counts_training_alone(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not previews and checkpoints; each block has its share; and the learning rate knows it."""
    folder, seconds = tmp_path / "run", 2.0
    often = ["--save-every", "25", "--max-minutes"]
    arguments = train_arguments(chain, folder, 100_000, *often, str(seconds / 60))
    assert jobs.train.main(arguments) == 0
    parts = state(folder)["parts"]
    assert isinstance(parts, dict)
    shares = Run(folder).config().denoiser.shares
    for name, (steps, spent) in parts.items():
        assert steps >= 1 and spent >= seconds * shares[name]
    lines = [line for line in metrics(folder) if line["part"] == "B"]
    # The last of several steps began within the limit.
    longest = 3 * parts["B"][1] / len(lines)
    assert parts["B"][1] <= seconds * shares["B"] + longest
    assert lines[-1]["learning_rate"] == pytest.approx(0.05 * 2e-3)
    capsys.readouterr()
    assert jobs.train.main(arguments) == 0
    assert "already done" in capsys.readouterr().out
    longer = train_arguments(chain, folder, 100_000, *often, str(2 * seconds / 60))
    assert jobs.train.main(longer) == 0
    assert "resuming at step" in capsys.readouterr().out
    after = state(folder)["parts"]
    assert isinstance(after, dict)
    assert after["B"][0] > parts["B"][0] and after["C"][0] > parts["C"][0]


def test_a_limit_of_cpu_time_is_of_all_threads_together(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever sleeps, or waits for a core, loses nothing; and two limits are a mistake."""
    folder, seconds = tmp_path / "run", 2.0
    limit = ["--max-cpu-minutes", str(seconds / 60)]
    assert jobs.train.main(train_arguments(chain, folder, 100_000, *limit)) == 0
    found = state(folder)
    spent, cpu = found["seconds"], found["cpu_seconds"]
    assert isinstance(spent, float) and isinstance(cpu, float)
    # `seconds` are CPU seconds over threads; held-out errors and logs are counted in CPU alone.
    assert seconds <= spent * torch.get_num_threads() <= cpu
    assert spent * torch.get_num_threads() < 5 * seconds  # steps of all parts begin within it
    both = train_arguments(chain, folder, 100_000, *limit, "--max-minutes", "1")
    assert jobs.train.main(both) == 2
    assert "two limits of one kind" in capsys.readouterr().err


def test_without_held_out_regions_the_error_is_that_of_training_ones(
    chain: Chain, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(chain.packs, packs)
    index = json.loads((packs / "index.json").read_text())
    for region in index["regions"]:
        region["split"] = "train"
    (packs / "index.json").write_text(json.dumps(index))
    folder = tmp_path / "run"
    arguments = train_arguments(chain, folder, 1, "--blocks", "T")
    assert jobs.train.main([str(packs), *arguments[1:]]) == 0
    (line,) = metrics(folder, "held_out")
    assert line["split"] == "train"


def test_runs_of_the_pyramid_that_was_before_are_refused(
    chain: Chain, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(undisturbed, old)
    content = json.loads((old / "config.json").read_text())
    content["config"]["denoiser"] = {"channels": 3, "token_dim": 16, "lattice_patch": 2}
    content["config"]["packs"] |= {"design": "zoom", "halo": 4}
    (old / "config.json").write_text(json.dumps(content))
    paint = [str(old), "--condition", str(chain.store), "--out", str(tmp_path / "out")]
    train = train_arguments(chain, old, STEPS, *EXACT)
    for command, arguments in ((jobs.sample, paint), (jobs.train, train)):
        assert command.main(arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "cascade of octave blocks has replaced; pack and train again" in said


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
    assert jobs.train.main([*arguments, "--blocks", "B", "E"]) == 2
    assert "--blocks E does not exist; this preset has T, A, B, C, D" in capsys.readouterr().err
    assert jobs.train.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "x").exists()


def test_a_run_in_this_process_leaves_no_rank_to_later_ones(
    chain: Chain, undisturbed: Path
) -> None:
    before = dict(os.environ)
    finished = train_arguments(chain, undisturbed, STEPS, *EXACT)
    for arguments, code in ((finished, 0), ([*finished, "--seed", "9"], 2), (finished, 0)):
        assert jobs.train.main(arguments) == code
        assert dict(os.environ) == before


def test_engine_state_of_another_user_is_not_loaded(
    chain: Chain,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It holds pickles. The user is another one here, instead of the files."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = {**state(folder), "status": "preempted", "step": 8, "checkpoint": "step-00000008"}
    (folder / "state.json").write_text(json.dumps(before))
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 7)
    assert jobs.train.main(train_arguments(chain, folder, STEPS, *EXACT)) == 2
    said = capsys.readouterr().err
    assert "belongs to another user" in said and "--init-from" in said
    assert state(folder)["step"] == 8


def test_a_run_that_diverges_stops_with_a_sentence(
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it saves: by its loss, or by its weights where the next loss is not known yet."""
    arguments = train_arguments(chain, tmp_path / "loss", 50, "--optimizer", "adamw")
    assert jobs.train.main([*arguments, "--learning-rate", "1e30", "--save-every", "1000"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"loss has diverged: . is no longer finite .* lower than 1e\+30", said)
    assert (state(tmp_path / "loss")["status"], state(tmp_path / "loss")["checkpoint"]) == (
        "failed",
        None,
    )
    step = Part.train

    def spoil(part: Part, *options: Any) -> tuple[torch.Tensor, float]:
        found = step(part, *options)
        if part.step == 2:
            next(part.objective.parameters()).data.fill_(torch.nan)
        return found

    monkeypatch.setattr(Part, "train", spoil)
    arguments = train_arguments(chain, tmp_path / "weights", 50, "--save-every", "1")
    assert jobs.train.main(arguments) == 2
    said = capsys.readouterr().err
    kept = state(tmp_path / "weights")["checkpoint"]
    assert f"--init-from {tmp_path}/weights/checkpoints/{kept}/weights.safetensors" in said
    weights = load_file(tmp_path / "weights" / "checkpoints" / kept / "weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


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
        write_json_atomic(folder / "state.json", taken)  # the ranks read it all the time
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
