"""Stages of a chain of commands, each run once.

What a stage finished is recorded with its command, so that the same chain after a kill goes on in
the middle of the stage it was in, one that is done repeats nothing, and a stage whose command has
changed is run again with all that follow it: once a dry run has accepted that command, so that a
mistake loses nothing.
"""

import importlib
import io
import json
import shlex
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pipeline import console


class Progress:
    """Which stages are done, with the commands that did them. code: 3 if any of them ended with it
    in this chain, else 0.
    """

    def __init__(self, file: Path, prog: str) -> None:
        self.file, self.prog, self.code = file, prog, console.EXIT_DONE
        self.done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        name: str | None = None,
        branch: str | None = None,
    ) -> None:
        """Run a command unless it is done.

        `name` tells two runs of one module apart, `branch` a part of the chain whose results only
        branches below it see (`ours/seed 0` is below `ours`). Stages are imported one by one:
        Dask's workers import this module again, without torch.
        """
        name = name or module
        command = [module, *arguments]
        if self.is_done(name, arguments, module):
            recorded = self.done[name]
            console.say(f"{self.prog}: {name} is already done ({recorded['seconds']:.0f} s)")
            self.code = max(self.code, recorded["code"])
            return
        self.check(name, arguments, module)
        console.say(f"\n$ python -m {shlex.join(command)}")
        self.forget_after(name)
        started = time.monotonic()
        code = int(importlib.import_module(module).main(arguments))
        if code == console.EXIT_PREEMPTED:
            console.say(f"{self.prog}: stopped in {name}; the same command goes on from there")
            raise SystemExit(code)
        if code not in (console.EXIT_DONE, console.EXIT_PARTIAL):
            raise ValueError(f"{name} ended with exit code {code}; its message stands above")
        self.code, seconds = max(self.code, code), round(time.monotonic() - started, 1)
        orders = [r["order"] for r in self.done.values() if isinstance(r, dict)]
        order = max(orders, default=-1) + 1
        self.done[name] = {"command": command, "code": code, "seconds": seconds, "order": order}
        self.done[name] |= {"branch": branch} if branch else {}
        console.write_json_atomic(self.file, self.done)

    def is_done(self, name: str, arguments: Sequence[str], module: str | None = None) -> bool:
        """Whether this very command has ended."""
        recorded = self.done.get(name)
        return recorded is not None and recorded["command"] == [module or name, *arguments]

    def has_changed(self, name: str, arguments: Sequence[str], module: str | None = None) -> bool:
        """Whether the stage has ended by another command than this one."""
        return name in self.done and not self.is_done(name, arguments, module)

    def check(self, name: str, arguments: Sequence[str], module: str | None = None) -> None:
        """A `ValueError` where the stage has ended by another command and would refuse it."""
        if not self.has_changed(name, arguments, module):
            return
        with redirect_stdout(io.StringIO()):
            code = int(importlib.import_module(module or name).main([*arguments, "--dry-run"]))
        if code not in (console.EXIT_DONE, console.EXIT_PARTIAL):
            raise ValueError(
                f"{self.file.parent} holds a {self.prog} whose {name} had other options, and this "
                "command is refused, as said above; repeat the first one or choose another --out "
                "(make: OUT=...)"
            )

    def claim(self, name: str, value: Any) -> None:
        """Record what all is made from; refuse a folder made from something else."""
        self.check_claim(name, value)
        if name not in self.done:
            self.done[name] = value
            console.write_json_atomic(self.file, self.done)

    def check_claim(self, name: str, value: Any) -> None:
        """A `ValueError` where the folder is made from something else."""
        if self.done.get(name, value) != value:
            raise ValueError(
                f"{self.file.parent} holds a {self.prog} of {name} "
                f"{self.done[name] or 'of its own'}, this command asks for "
                f"{value or 'its own'}; choose another --out (make: OUT=...)"
            )

    def forget_after(self, name: str) -> None:
        """Forget a stage that is run again and what follows it: all later stages of its branch and
        of those below it, or of a stage in no branch all later ones.
        """
        recorded = self.done.pop(name, None)
        if recorded is not None:
            stages = {k: v for k, v in self.done.items() if isinstance(v, dict)}
            branch = recorded.get("branch")
            for stage, later in stages.items():
                follows = branch is None or f"{later.get('branch')}/".startswith(f"{branch}/")
                if follows and later["order"] > recorded["order"]:
                    del self.done[stage]
            console.write_json_atomic(self.file, self.done)
