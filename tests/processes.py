"""Commands of the project as processes of their own, to be run, killed and run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

WITHOUT_TORCH = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""
"""Code that makes Python behave as where torch is not installed."""

_started: list[subprocess.Popen[str]] = []


def start(
    module: str,
    arguments: Sequence[str],
    launcher: Sequence[str] = ("-m",),
    more: Mapping[str, str] = {},
) -> subprocess.Popen[str]:
    """Start `python -m module`, or the module under a launcher, in a session of its own.

    `more` goes into its environment.
    """
    command = [sys.executable, *launcher, module, *arguments]
    process = subprocess.Popen(
        command,
        env={**ENVIRONMENT, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


@contextmanager
def none_left_running() -> Iterator[None]:
    """Kill what was started in this context and still runs, as after a failed assertion: it would
    take time from the tests after it.
    """
    before = len(_started)
    yield
    for process in _started[before:]:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    del _started[before:]


def run(
    module: str,
    arguments: Sequence[str],
    launcher: Sequence[str] = ("-m",),
    good: Sequence[int] = (0,),
    more: Mapping[str, str] = {},
) -> str:
    """Run a command to its end; its output. It must end with one of the exit codes `good`."""
    process = start(module, arguments, launcher, more)
    output, _ = process.communicate(timeout=240)
    assert process.returncode in good, output
    return output


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait, while the command runs, until `condition` holds."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the command never came to that point"
        time.sleep(0.02)


def stop_when(
    process: subprocess.Popen[str], condition: Callable[[], bool], how: signal.Signals
) -> str:
    """Send a signal to the command once `condition` holds; its output."""
    wait_for(process, condition)
    os.killpg(process.pid, how)
    return process.communicate(timeout=120)[0]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
