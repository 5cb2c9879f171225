"""A real Slurm of four nodes on this machine, for tests: no munge, no systemd, loopback only.

Two nodes with four a5000 each, two with four a100 each; the GPUs are device files without a driver. A node is a
`slurmd` in namespaces of its own, with its own host name: killing it is a node that crashes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

NODES = {"a5n1": "a5000", "a5n2": "a5000", "a1n1": "a100", "a1n2": "a100"}
"""Node -> type of its GPUs."""

GPUS = 4
PORTS = (1, 2, 3, 11, 12, 13, 14)
"""Ports in use, behind the cluster's first: controller, accounting, its database, one a node."""

PORT_STEP, JOBS_PER_PORT = 20, 1000
"""First ports of clusters lie so far apart, and so do, times the second, the numbers of their jobs."""

CGROUPS = Path("/sys/fs/cgroup")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "unshare")
DATABASE_PROGRAMS = ("slurmdbd", "sacct", "mariadbd", "mariadb-install-db")

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
FirstJobId={first_job}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
{tracking}
{accounting}
JobAcctGatherFrequency=task=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=10000
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MinJobAge=86400
MaxArraySize=1001
MaxJobCount=20000
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=100
NodeName=DEFAULT CPUs=16 RealMemory=16000
{nodes}
PartitionName=a5000 Nodes=a5n[1-2] Default=YES DefaultTime=5 MaxTime=1-0 PriorityTier=10 PreemptMode=OFF
PartitionName=a100 Nodes=a1n[1-2] DefaultTime=5 MaxTime=1-0 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=a5n[1-2],a1n[1-2] DefaultTime=5 MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 LLN=YES
"""

CGROUP_TRACKING = """\
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup"""

PLAIN_TRACKING = """\
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStorageTRES=gres/gpu,gres/gpu:a5000,gres/gpu:a100"""

DATABASE = """\
AuthType=auth/none
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=lab
StorageLoc=slurm_acct_db
"""

NODE_UP = """\
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
slurmd -D -N "$1" & wait
"""


def missing(accounting: bool = False) -> str:
    """What this machine lacks for a cluster, for a skipped test to say; empty where it lacks nothing."""
    if os.geteuid() != 0:
        return "a Slurm cluster of its own needs root (namespaces, devices, cgroups)"
    lacking = [name for name in (*PROGRAMS, *(DATABASE_PROGRAMS if accounting else ())) if shutil.which(name) is None]
    if not lacking:
        return ""
    packages = "slurmctld slurmd slurm-client" + (" slurmdbd mariadb-server" if accounting else "")
    return f"no {', '.join(lacking)} here (Debian: apt-get install --no-install-recommends {packages})"


def has_cgroups() -> bool:
    """Whether Slurm can use cgroup v1 here; only then are memory limits and devices those of a real cluster."""
    needed = ("freezer", "memory", "devices", "cpuset")
    return all((CGROUPS / name / "tasks").exists() and os.access(CGROUPS / name, os.W_OK) for name in needed)


def wait_for(what: str, met: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when `met()`; AssertionError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


class Lab:
    """The cluster, in a folder of its own."""

    def __init__(self, root: Path, accounting: bool = False) -> None:
        self.root = root
        self.accounting = accounting
        self.base = _free_ports()
        self.environment = os.environ | {"SLURM_CONF": str(root / "etc" / "slurm.conf")}

    def __call__(self, *line: str, check: bool = True) -> str:
        """Run a program with this cluster as its Slurm; what it printed."""
        answer = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or answer.returncode == 0, f"{line}: {answer.stderr}"
        return answer.stdout

    def up(self) -> None:
        """Start controller and nodes; returns when all nodes are idle."""
        for name in ("etc", "state", "log", "spool", "dev", "run"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._configure()
        if self.accounting:
            self._start_database()
        subprocess.run(["slurmctld"], env=self.environment, stdin=subprocess.DEVNULL, check=True, capture_output=True)
        for name in NODES:
            self.node_up(name)
        wait_for("all nodes are idle", lambda: self.idle_nodes() == set(NODES), 30)

    def down(self) -> None:
        """Stop everything, by the process ids that were noted."""
        _stop([self._pid("slurmctld")], signal.SIGTERM)
        _stop([self._pid(f"node.{name}") for name in NODES], signal.SIGKILL)
        _stop([self._pid("slurmdbd")], signal.SIGTERM)
        _stop([self._pid("mariadbd")], signal.SIGTERM)
        own = range(self.base * JOBS_PER_PORT, (self.base + PORT_STEP) * JOBS_PER_PORT)
        for job in CGROUPS.glob("*/slurm_*/uid_*/job_*"):
            if int(job.name.removeprefix("job_")) in own:  # those of other clusters are theirs
                for folder in sorted(job.glob("**/"), reverse=True):
                    with suppress(OSError):
                        folder.rmdir()

    def node_up(self, name: str) -> None:
        """Start a node."""
        (self.root / "spool" / name).mkdir(exist_ok=True)
        line = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            [*line, "sh", "-c", NODE_UP, "sh", name, str(self.root)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        (self.root / "run" / f"node.{name}.pid").write_text(str(process.pid))

    def node_crash(self, name: str) -> None:
        """Kill a node with all that runs on it; the controller misses it after its SlurmdTimeout."""
        _stop([self._pid(f"node.{name}")], signal.SIGKILL)

    def up_nodes(self) -> set[str]:
        """Nodes that the controller has not missed."""
        return set(self("sinfo", "-h", "-N", "-r", "-o", "%N").split())

    def idle_nodes(self) -> set[str]:
        """Nodes without a job, and up."""
        return set(self("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def queue(self) -> dict[str, str]:
        """Job -> its state, of all jobs that are not over; elements of arrays are jobs."""
        rows = self("squeue", "-h", "-r", "-o", "%i %T").split()
        return dict(zip(rows[::2], rows[1::2], strict=True))

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of one job."""
        words = self("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until_empty(self, seconds: float) -> None:
        """Until no job is left."""
        wait_for("the queue is empty", lambda: not self.queue(), seconds)

    def _configure(self) -> None:
        etc = self.root / "etc"
        facts = {
            "root": self.root,
            "host": socket.gethostname().partition(".")[0],
            "controller": self.base + 1,
            # Nodes of several clusters on one machine have the same names, and so the same cgroups: their jobs must not.
            "first_job": self.base * JOBS_PER_PORT,
            "tracking": CGROUP_TRACKING if has_cgroups() else PLAIN_TRACKING,
            "accounting": ACCOUNTING.format(port=self.base + 2) if self.accounting else "",
            "nodes": "\n".join(
                f"NodeName={name} NodeHostname={socket.gethostname().partition('.')[0]} NodeAddr=127.0.1.{number}"
                f" Port={self.base + 10 + number} Gres=gpu:{kind}:{GPUS}"
                for number, (name, kind) in enumerate(NODES.items(), 1)
            ),
        }
        (etc / "slurm.conf").write_text(CONF.format(**facts))
        if has_cgroups():
            (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainDevices=yes\n")
        devices = [self.root / "dev" / f"nvidia{number}" for number in range(GPUS)]
        for number, device in enumerate(devices):
            if not device.exists():
                os.mknod(device, 0o20666, os.makedev(195, number))  # NVIDIA's numbers, no driver behind them
        (etc / "gres.conf").write_text(
            "".join(
                f"NodeName={name} Name=gpu Type={kind} File={self.root}/dev/nvidia[0-{GPUS - 1}]\n"
                for name, kind in NODES.items()
            )
        )
        own = [line for line in Path("/etc/hosts").read_text().splitlines() if not set(NODES) & set(line.split())]
        hosts = [*own, *(f"127.0.1.{number} {name}" for number, name in enumerate(NODES, 1))]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_database(self) -> None:
        """MariaDB and slurmdbd, so that sacct has something to tell."""
        folder, port = self.root / "db", self.base + 3
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}", "--skip-test-db"]
        install += ["--auth-root-authentication-method=normal", "--skip-name-resolve"]
        subprocess.run(install, check=True, **quiet)
        socket_file = self.root / "run" / "db.sock"
        serve = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}", f"--socket={socket_file}"]
        serve += [f"--port={port}", "--bind-address=127.0.0.1", f"--pid-file={self.root}/run/mariadbd.pid"]
        serve += ["--skip-log-bin", "--innodb-buffer-pool-size=64M", "--skip-name-resolve", "--performance-schema=0"]
        subprocess.Popen(serve, start_new_session=True, **quiet)
        client = ["mariadb", "--no-defaults", "-S", str(socket_file), "-e"]
        make = "create database if not exists slurm_acct_db; create user if not exists slurm@'127.0.0.1' identified by 'lab';"
        make += " grant all on slurm_acct_db.* to slurm@'127.0.0.1'"
        wait_for("the database answers", lambda: subprocess.run([*client, make], check=False, **quiet).returncode == 0)
        conf = self.root / "etc" / "slurmdbd.conf"
        conf.write_text(DATABASE.format(root=self.root, port=self.base + 2, database=port))
        conf.chmod(0o600)
        subprocess.run(["slurmdbd"], env=self.environment, check=True, **quiet)
        wait_for("slurmdbd answers", lambda: _in_use(self.base + 2))

    def _pid(self, name: str) -> int | None:
        file = self.root / "run" / f"{name}.pid"
        return int(file.read_text()) if file.is_file() and file.read_text().strip() else None


def _stop(pids: Iterable[int | None], number: signal.Signals) -> None:
    """Signal processes and wait until they are gone."""
    known = [pid for pid in pids if pid is not None and _lives(pid)]
    for pid in known:
        os.kill(pid, number)
    wait_for(f"processes {known} end", lambda: not any(map(_lives, known)), 15)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _free_ports() -> int:
    """A first port with all of PORTS behind it free, so that several clusters can live side by side."""
    for base in range(7100, 9000, PORT_STEP):
        if not any(_in_use(base + port) for port in PORTS):
            return base
    raise AssertionError("no free ports between 7100 and 9000")


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
