"""A real Slurm cluster of several nodes on one machine; see `local-cluster` beside this file.

Each machine (the login node, called ctl, which also holds the controller, and node1, node2, ...) is a process
tree in namespaces of its own: network, hostname, processes, mounts, shared memory. Files are shared, as a
cluster's are. The network is a bridge inside ctl's namespace with a cable to each node, so that nothing of it
can be reached from outside, and killing the first process of a machine is pulling its plug.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter")
CONTROLLER = "ctl"
NETWORK = "10.213.7"
CPUS = 4
SOCKET_PATH = 107
"""Bytes (unix(7))."""
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")

CONFIG = """\
ClusterName=local
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The shortest life of a credential, which is also how long a requeued job has to wait.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
# Namespaces, not control groups, hold the processes of a node together.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Trouble(Exception):
    """What is in the way, and what to do about it."""


def install() -> None:
    """Install what is missing where that is possible: as root, with apt-get, recommendations left out."""
    if not missing() or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(PACKAGES)} ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *words], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        print(f"apt-get: {done.stderr.strip()[-500:]}", file=sys.stderr)


def missing() -> str:
    """Why this machine cannot have a cluster; empty where it can."""
    if os.geteuid() != 0:
        return "a local cluster needs root, for namespaces and a network of its own"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"missing: {', '.join(absent)}; on Debian or Ubuntu: apt-get install {' '.join(PACKAGES)}"
    return _not_allowed()


@functools.cache
def _not_allowed() -> str:
    """Why root here may not do what a cluster needs, as in most containers; empty where it may."""
    script = (
        "ip link add one type veth peer name two && ip link add br0 type bridge && "
        "mount -t tmpfs none /dev/shm"
    )
    words = ["unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return f"root may not make namespaces, networks or mounts here: {done.stderr.strip()}"


class Cluster:
    """The cluster whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    # --- processes that are ours: a number is only believed with the time at which its process began ---

    def _remember(self, name: str, pid: int) -> None:
        (self.folder / f"{name}.process").write_text(f"{pid} {_began(pid)}")

    def process_of(self, name: str) -> int | None:
        """The process of a machine (its first one) or of munged, if it lives."""
        with contextlib.suppress(OSError, ValueError):
            pid, began = (self.folder / f"{name}.process").read_text().split()
            if _began(int(pid)) == began:
                return int(pid)
        return None

    def _kill(self, name: str) -> None:
        pid = self.process_of(name)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            _wait(lambda: self.process_of(name) is None, 10, f"{name} does not end")
        (self.folder / f"{name}.process").unlink(missing_ok=True)

    @property
    def nodes(self) -> list[str]:
        """The nodes that it was made with."""
        found = (self.folder / "nodes").read_text() if (self.folder / "nodes").exists() else "0"
        return [f"node{i + 1}" for i in range(int(found))]

    # --- machines ---

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a machine."""
        pid = self.process_of(name)
        if pid is None:
            raise Trouble(f"{name} is off, or there is no cluster; start it with: local-cluster up N")
        return ["nsenter", "--target", str(pid), *NAMESPACES, *command]

    def run(self, name: str, *command: str) -> str:
        """Run a command on a machine and return what it printed."""
        words = self.inside(name, command)
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise Trouble(f"on {name}: {' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _start(self, name: str) -> None:
        """Start a machine without a network. Its first process does nothing but bury the dead."""
        words = [*NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        outer = subprocess.Popen(
            ["unshare", *words, "bash", "-c", "while :; do sleep 1000; done"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ["PATH"]},
        )
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        _wait(lambda: bool(children.read_text().strip()), 10, f"{name} does not start")
        pid = int(children.read_text().split()[0])
        _wait(lambda: _program(pid) == "bash", 10, f"{name} does not start")
        self._remember(name, pid)
        self.run(name, "hostname", name)
        self.run(name, "mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        self.run(name, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
        self.run(name, "ip", "link", "set", "lo", "up")

    def boot(self, name: str) -> None:
        """Start a node, plug its cable in, and start its Slurm daemon."""
        if self.process_of(name) is not None:
            return
        (self.folder / name / "spool").mkdir(parents=True, exist_ok=True)
        self._start(name)
        cable = ("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0")
        # ctl sees processes of its own only, so the cable is laid from outside, with its network.
        network = ["nsenter", "--target", str(self.process_of(CONTROLLER)), "--net"]
        subprocess.run([*network, *cable, "netns", str(self.process_of(name))], check=True)
        self.run(CONTROLLER, "ip", "link", "set", name, "master", "br0", "up")
        self.run(name, "ip", "address", "add", f"{address(name)}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")
        self.run(name, "slurmd", "-b", "-N", name)

    def off(self, name: str) -> None:
        """Pull a node's plug."""
        self._kill(name)

    def link(self, name: str, what: str, mbit: str = "") -> None:
        """Cut a node's cable, mend it, or let no more than so many Mbit/s through to the node."""
        if what == "rate":
            limit = ("rate", f"{mbit}mbit", "burst", "64kb", "latency", "100ms")
            self.run(CONTROLLER, "tc", "qdisc", "replace", "dev", name, "root", "tbf", *limit)
        else:
            self.run(CONTROLLER, "ip", "link", "set", name, what)

    # --- the whole ---

    def up(self, nodes: int) -> None:
        """Start everything and wait until every node is idle. Does nothing where it is up already."""
        if self.process_of(CONTROLLER) is not None:
            if len(self.nodes) != nodes:
                raise Trouble(f"a cluster of {len(self.nodes)} nodes is up; take it down first")
            return
        self.down()  # what a crash may have left
        try:
            self._configure(nodes)
            self._start_munge()
            self._start_controller()
            for name in self.nodes:
                self.boot(name)
            _wait(lambda: self.idle() == len(self.nodes), 60, f"nodes do not come up; logs: {self.folder}")
        except BaseException:
            self.down()
            raise

    def idle(self) -> int:
        """How many nodes wait for work."""
        with contextlib.suppress(Trouble):
            said = self.run(CONTROLLER, "sinfo", "-h", "-N", "-p", "main", "-o", "%T")
            return said.split().count("idle")
        return 0

    def _configure(self, nodes: int) -> None:
        # Slurm's daemon makes a socket for each step, and a path of one has room for so many bytes.
        socket = self.folder / f"node{nodes}" / "spool" / f"node{nodes}_100000.100"
        excess = len(os.fsencode(socket)) - SOCKET_PATH
        if excess > 0:
            raise Trouble(
                f"--dir {self.folder} is too long by {excess} bytes: no socket could be made below it, and "
                "steps would end as they begin; choose a shorter one"
            )
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        for name in ("state", "munge"):
            (self.folder / name).mkdir()
        machines = [CONTROLLER, *(f"node{i + 1}" for i in range(nodes))]
        hosts = ["127.0.0.1 localhost", *(f"{address(name)} {name}" for name in machines)]
        config = CONFIG.format(folder=self.folder, nodes=nodes, cpus=CPUS)
        files = {
            "nodes": str(nodes),
            "hosts": "\n".join(hosts) + "\n",
            "slurm.conf": config,
            "gres.conf": f"Name=gpu File={self.folder}/gpu[0-1]\n",
            "cgroup.conf": "CgroupAutomount=no\n",
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        for number in range(2):  # what a job is given in the place of GPUs: two more /dev/null
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def _start_munge(self) -> None:
        """Munge proves who asks; it listens on a socket in the folder alone."""
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        places = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        places |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        words = [f"--{name}={place}" for name, place in places.items()]
        subprocess.run(["munged", "--force", *words], check=True, capture_output=True)
        _wait((folder / "pid").exists, 10, "munged does not start")
        self._remember("munged", int((folder / "pid").read_text()))

    def _start_controller(self) -> None:
        self._start(CONTROLLER)
        self.run(CONTROLLER, "ip", "link", "add", "br0", "type", "bridge")
        self.run(CONTROLLER, "ip", "address", "add", f"{address(CONTROLLER)}/24", "dev", "br0")
        self.run(CONTROLLER, "ip", "link", "set", "br0", "up")
        self.run(CONTROLLER, "slurmctld", "-f", self.environment["SLURM_CONF"])

    def down(self) -> None:
        """End every process of the cluster and remove its folder. Its network goes with its processes."""
        for name in [*self.nodes, CONTROLLER, "munged"]:
            self._kill(name)
        if (self.folder / "slurm.conf").exists() or not self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)


def address(name: str) -> str:
    """The address of a machine inside the cluster."""
    return f"{NETWORK}.{254 if name == CONTROLLER else name.removeprefix('node')}"


def _began(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return "gone"


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _wait(condition: Callable[[], bool], limit_s: float, otherwise: str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise Trouble(otherwise)
        time.sleep(0.05)


def act(cluster: Cluster, given: argparse.Namespace) -> None:
    """Do what the command line says."""
    word, rest = given.word, given.rest
    if word == "install":
        install()
    elif word == "up":
        install()
        if missing():
            raise Trouble(missing())
        cluster.up(int(rest[0]) if rest else 2)
        print(f"up: {len(cluster.nodes)} nodes; try: slurm/local-cluster exec sinfo")
    elif word == "down":
        cluster.down()
    elif word == "status":
        print(cluster.run(CONTROLLER, "sinfo", "-N", "-l") + cluster.run(CONTROLLER, "squeue", "-l"), end="")
    elif word in ("exec", "on"):
        name, command = (CONTROLLER, rest) if word == "exec" else (rest[0], rest[1:])
        words = cluster.inside(name, ["env", f"--chdir={Path.cwd()}", *command])
        os.execvpe(words[0], words, cluster.environment)
    else:
        {"off": cluster.off, "boot": cluster.boot, "link": cluster.link}[word](*rest)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Slurm cluster on this machine.")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/distdl-local-cluster"))
    parser.add_argument(
        "word", choices=["install", "up", "down", "status", "exec", "on", "off", "boot", "link"]
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        act(Cluster(given.dir.absolute()), given)
    except (Trouble, subprocess.SubprocessError) as trouble:
        print(f"error: {trouble}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
