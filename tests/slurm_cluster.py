"""A real SLURM of two nodes on this machine, for the tests: munged, slurmctld and two slurmd.

Everything, from munge's key to the ports, is its own, so that several can run side by side; it
needs root, but neither systemd nor anything of the machine's own SLURM. A node has eight CPUs and
two GPUs that exist only for the scheduler, so that batch scripts run as they are.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NODES = ("brush0", "brush1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
SBIN = os.pathsep.join(("/usr/sbin", "/sbin", "/usr/local/sbin"))
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "TIMEOUT"}

CONFIGURATION = """\
ClusterName=gigabrush
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
FirstJobId={first_job}
MinJobAge=3600
KillWait=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; `environment` is what its commands need."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a command of SLURM prints; it must succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller says of a job."""
        words = self.run("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_ids: Sequence[str], seconds: float = 400) -> dict[str, set[str]]:
        """The states in which jobs end, and in which the elements of arrays do."""

        def states() -> dict[str, set[str]]:
            shown = {i: self.run("scontrol", "-o", "show", "job", i) for i in job_ids}
            return {i: set(re.findall(r"\bJobState=(\S+)", text)) for i, text in shown.items()}

        try:
            wait_until(lambda: all(found <= ENDED for found in states().values()), seconds)
        except AssertionError as error:
            raise AssertionError(self.run("squeue") + self.logs()) from error
        return states()

    def logs(self) -> str:
        """What the daemons say, for a test that fails."""
        return "\n".join(f"{p}\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log"))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "SLURM did not come to that point"
        time.sleep(0.2)


@contextlib.contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start the daemons, wait until both nodes are idle, and end them all afterwards."""
    path = os.pathsep.join((os.environ["PATH"], SBIN))
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent or os.geteuid() != 0:
        reason = f"{', '.join(absent)} not installed" if absent else "it needs root"
        pytest.skip(f"no SLURM can be started on this machine: {reason}")
    # A short path: munge's is a Unix socket.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        folder.chmod(0o755)
        _configure(folder)
        for command in _commands(folder):
            with (folder / "daemons.log").open("ab") as log:
                # Not even a killed test run leaves a daemon behind.
                daemon = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            daemons.append(daemon)
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists, 20)
        cluster = Cluster(folder, environment)
        try:
            wait_until(lambda: _idle(cluster), 60)
        except AssertionError as error:
            raise AssertionError(cluster.logs()) from error
        yield cluster
        with contextlib.suppress(AssertionError):
            cluster.run("scancel", "--user=root")
            wait_until(lambda: cluster.run("squeue", "--noheader") == "", 30)
    finally:
        for daemon in reversed(daemons):
            _end(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
        "CPUs=8 RealMemory=16000 Gres=gpu:2 State=UNKNOWN"
        for name, port in zip(NODES, node_ports, strict=True)
    ]
    configuration = CONFIGURATION.format(
        host=socket.gethostname(),
        controller_port=controller_port,
        folder=folder,
        # Ports of jobs follow from their numbers, and another cluster may run here.
        first_job=secrets.randbelow(60_000_000) + 1,
        nodes="\n".join(nodes),
    )
    (folder / "slurm.conf").write_text(configuration)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")


def _commands(folder: Path) -> list[list[str]]:
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
    munged += [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file")]
    munged += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    nodes = [["slurmd", "-D", "-N", name] for name in NODES]
    return [munged, ["slurmctld", "-D"], *nodes]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _idle(cluster: Cluster) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "-N", "-o", "%T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split() == ["idle"] * len(NODES)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
            return
