"""The rooms: imports go one way, ingest needs no torch, and an empty folder shadows nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("model", "pipeline", "conditioning", "jobs", "slurm")
NUMPY_ONLY = ("model.lattice", "model.design", "model.mollifier")
WITHOUT_TORCH = ("pipeline.ingest", "pipeline.export", "jobs.cli", "jobs.info", "jobs.doctor")


def imports_of(source: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    later = ROOMS[ROOMS.index(room) + 1 :]
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for source in files:
        upward = {name for name in imports_of(source) if name.split(".")[0] in (*later, "tests")}
        assert not upward, f"{source.relative_to(ROOT)} imports {sorted(upward)}"


@pytest.mark.parametrize("module", [*NUMPY_ONLY, *WITHOUT_TORCH])
def test_what_runs_on_a_node_without_torch(module: str) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; import importlib; "
        f"importlib.import_module({module!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_model_opens_no_files() -> None:
    forbidden = {"pathlib", "os", "dask", "distributed", "deepspeed", "zarr", "shutil", "tifffile"}
    for source in (ROOT / "model").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(source)}
        assert not roots & forbidden, source.name


def test_empty_folders_of_the_same_names_shadow_nothing(tmp_path: Path) -> None:
    for name in ("model", "pipeline", "conditioning", "jobs", "slurm"):
        (tmp_path / name).mkdir()
    code = "import model, pipeline, conditioning, jobs; print(model.__file__, jobs.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    places = [Path(place) for place in done.stdout.split()]
    assert places == [ROOT / "model" / "__init__.py", ROOT / "jobs" / "__init__.py"]
    script = Path(sys.executable).with_name("gigabrush")
    done = subprocess.run(
        [script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "usage: gigabrush STAGE" in done.stdout


def test_every_stage_has_a_main_and_explains_its_options(tmp_path: Path) -> None:
    from jobs.cli import STAGES, main

    for stage in STAGES:
        assert main([stage, "--help"]) == 0
    assert main(["nothing"]) == 2
    assert main([]) == 2
