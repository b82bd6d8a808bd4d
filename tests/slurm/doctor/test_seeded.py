"""Misconfigurations that people meet, really made on a Slurm cluster: the doctor names each, with its fix.

What is wrong, and what a right diagnosis says, is in seeded.yaml. Here is how each is made and undone.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

import distdl
from distdl.data.catalogue import CATALOGUE
from slurm.local_cluster import missing
from tests.faults.mounts import small_disk
from tests.faults.support import wait_for_event, write_recipe
from tests.runs import train_here
from tests.slurm.conftest import TestCluster, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.campaign]

KINDS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("seeded.yaml").read_text())
NODES = ("node1", "node2")

# Two tasks, one a node. Slurm ends the job where the doctor itself would hang.
SRUN = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=4"]
PATIENCE_S = 300.0


@dataclass
class Bench:
    """What a seed has to work with. `disk` is a small file system that both nodes see."""

    cluster: TestCluster
    folder: Path
    disk: Path

    def done(self, node: str, *words: str) -> None:
        """A command on a node that has to succeed: a seed that is not really made proves nothing."""
        code, said = self.cluster.say(*words, on=node)
        assert code == 0, f"{' '.join(words)} on {node}: {said}"

    @contextmanager
    def mounted(self, node: str, place: Path | str, *how: str) -> Iterator[None]:
        """`mount HOW PLACE` on one node, which the others do not see."""
        self.done(node, "mount", *how, str(place))
        try:
            yield
        finally:
            self.done(node, "umount", "--lazy", str(place))  # lazily: a process may still look at it

    def own_disk(self, node: str, place: Path) -> AbstractContextManager[None]:
        """An empty disk of the node's own at a place that the others have another at."""
        place.mkdir(parents=True, exist_ok=True)
        return self.mounted(node, place, "-t", "tmpfs", "tmpfs")

    def examine(self, job: Job) -> tuple[int, str]:
        """The doctor's exit code, and all it printed, without the paths of this test, which have its name."""
        code, said = self.cluster.say(*job.words("doctor"), timeout_s=PATIENCE_S)
        return code, said.replace(str(self.folder), "/here").replace(str(self.disk), "/small")


@dataclass
class Job:
    """What is started on both nodes: a recipe, more environment, and shell commands that come before."""

    recipe: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: str = ""

    def words(self, *command: str) -> list[str]:
        """`python -m distdl COMMAND RECIPE` as a job of two tasks."""
        shell = ["bash", "-c", f'{self.before}\nexec "$@"', "bash"]
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        return [
            *SRUN,
            "env",
            *environment,
            *shell,
            sys.executable,
            "-m",
            "distdl",
            *command,
            str(self.recipe),
        ]


Seed = Callable[[Bench], AbstractContextManager[Job]]
SEEDS: dict[str, Seed] = {}


def seed(make: Callable[[Bench], Iterator[Job]]) -> Seed:
    """A generator that makes a problem, yields the job that meets it, and undoes it."""
    SEEDS[make.__name__] = contextmanager(make)
    return SEEDS[make.__name__]


# --- names and network ---


@seed
def own_name_is_loopback(bench: Bench) -> Iterator[Job]:
    known = (bench.cluster.cluster.folder / "hosts").read_text().splitlines()
    with ExitStack() as stack:
        for node in NODES:
            others = [line for line in known if node not in line.split()]
            hosts = bench.folder / f"hosts-{node}"
            hosts.write_text("\n".join([*others, f"127.0.1.1 {node}"]) + "\n")
            stack.enter_context(bench.mounted(node, "/etc/hosts", "--bind", str(hosts)))
        yield Job(write_recipe(bench.folder))


@seed
def nodes_do_not_reach_each_other(bench: Bench) -> Iterator[Job]:
    # A hardware address that nobody has: what is sent there is lost without an answer.
    peers = {node: (f"10.213.7.{3 - int(node[-1])}", "dev", "eth0") for node in NODES}
    nowhere = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
    try:
        for node, peer in peers.items():
            bench.done(node, "ip", "neigh", "replace", *peer, *nowhere)
        yield Job(write_recipe(bench.folder))
    finally:
        for node, peer in peers.items():
            bench.done(node, "ip", "neigh", "del", *peer)


@seed
def jumbo_frames(bench: Bench) -> Iterator[Job]:
    # Each packet by itself: a cable inside a kernel would otherwise pass many as one, whatever their length.
    card = ("ip", "link", "set", "dev", "eth0")
    try:
        for node in NODES:
            bench.done(node, *card, "mtu", "9000")
            bench.done(node, *card, "gso_max_segs", "1")
        yield Job(write_recipe(bench.folder))
    finally:
        for node in NODES:
            bench.done(node, *card, "mtu", "1500")
            bench.done(node, *card, "gso_max_segs", "65535")


@seed
def stale_address_in_hosts(bench: Bench) -> Iterator[Job]:
    known = (bench.cluster.cluster.folder / "hosts").read_text()
    hosts = bench.folder / "hosts"
    hosts.write_text(known.replace("10.213.7.1 node1", "10.213.7.77 node1"))
    assert hosts.read_text() != known
    with bench.mounted("node2", "/etc/hosts", "--bind", str(hosts)):
        yield Job(write_recipe(bench.folder))


@seed
def high_ports_closed(bench: Bench) -> Iterator[Job]:
    # Connections from a port that the system has handed out to another such go by way of a machine that is
    # not there. Those to a port that was chosen, and the answers to them, go straight.
    ports = "-".join(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    nobody = ("10.213.7.99", "dev", "eth0")
    with ExitStack() as stack:
        for node, peer in (("node1", "10.213.7.2"), ("node2", "10.213.7.1")):
            detour = (peer, "via", *nobody, "table", "100")
            handed_out = ("to", peer, "ipproto", "tcp", "sport", ports, "dport", ports, "table", "100")
            bench.done(
                node, "ip", "neigh", "replace", *nobody, "lladdr", "02:00:00:00:00:98", "nud", "permanent"
            )
            stack.callback(bench.done, node, "ip", "neigh", "del", *nobody)
            bench.done(node, "ip", "route", "add", *detour)
            stack.callback(bench.done, node, "ip", "route", "del", *detour)
            bench.done(node, "ip", "rule", "add", *handed_out)
            stack.callback(bench.done, node, "ip", "rule", "del", *handed_out)
        yield Job(write_recipe(bench.folder))


@seed
def slow_link(bench: Bench) -> Iterator[Job]:
    bench.cluster.cluster.link("node2", "rate", "10")
    try:
        yield Job(write_recipe(bench.folder, model={"width": 32}))
    finally:
        bench.done("ctl", "tc", "qdisc", "del", "dev", "node2", "root")


# --- environment variables ---


@seed
def interface_that_is_not_there(bench: Bench) -> Iterator[Job]:
    yield Job(write_recipe(bench.folder), {"GLOO_SOCKET_IFNAME": "ib0"})


@seed
def master_addr_is_localhost(bench: Bench) -> Iterator[Job]:
    yield Job(write_recipe(bench.folder), {"MASTER_ADDR": "localhost"})


@seed
def world_of_one_left_over(bench: Bench) -> Iterator[Job]:
    left = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    yield Job(write_recipe(bench.folder), left)


_LISTEN = """
import socket, sys
with socket.create_server(("", 29500)):
    print("listening", flush=True)
    sys.stdin.read()
"""


@seed
def master_port_taken(bench: Bench) -> Iterator[Job]:
    # It ends with its standard input, as the block does.
    words = bench.cluster.cluster.inside("node1", [sys.executable, "-c", _LISTEN])
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listening\n"
        yield Job(write_recipe(bench.folder), {"MASTER_PORT": "29500"})


# --- file systems ---


@seed
def run_directory_not_shared(bench: Bench) -> Iterator[Job]:
    local = bench.folder / "local"
    with bench.own_disk("node2", local):
        yield Job(write_recipe(bench.folder, run={"dir": str(local / "run")}))


@seed
def disk_full(bench: Bench) -> Iterator[Job]:
    occupied = bench.disk / "occupied"
    try:
        free = shutil.disk_usage(bench.disk).free
        occupied.write_bytes(bytes(free - 16 * 1024))
        yield Job(write_recipe(bench.folder, run={"dir": str(bench.disk / "run")}))
    finally:
        occupied.unlink(missing_ok=True)
        shutil.rmtree(bench.disk / "run", ignore_errors=True)


@seed
def read_only_on_one_node(bench: Bench) -> Iterator[Job]:
    shared = bench.folder / "shared"
    shared.mkdir()
    with bench.mounted("node2", shared, "--bind", "-o", "ro", str(shared)):
        yield Job(write_recipe(bench.folder, run={"dir": str(shared / "run")}))


@seed
def store_that_does_not_answer(bench: Bench) -> Iterator[Job]:
    # A hardware address that nobody has, as above.
    store = ("10.213.7.200", "dev", "eth0")
    access = {
        "AWS_ENDPOINT_URL": "http://10.213.7.200:9000",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with ExitStack() as stack:
        for node in NODES:
            nowhere = ("lladdr", "02:00:00:00:00:97", "nud", "permanent")
            bench.done(node, "ip", "neigh", "replace", *store, *nowhere)
            stack.callback(bench.done, node, "ip", "neigh", "del", *store)
        yield Job(write_recipe(bench.folder, checkpoint={"dir": "s3://runs/mine"}), access)


# --- limits ---


@seed
def few_open_files(bench: Bench) -> Iterator[Job]:
    yield Job(write_recipe(bench.folder), before='test "$SLURMD_NODENAME" = node1 || ulimit -n 64')


@seed
def address_space_limited(bench: Bench) -> Iterator[Job]:
    # Enough for the libraries, and too little for 40 million weights with gradients, momentum and buffers.
    limit = 'test "$SLURMD_NODENAME" = node1 || ulimit -v 1500000'
    yield Job(write_recipe(bench.folder, model={"width": 64, "hidden": 40_000}), before=limit)


# --- versions and code ---


@seed
def older_code_on_one_node(bench: Bench) -> Iterator[Job]:
    (package,) = distdl.__path__
    own = bench.folder / "distdl"
    shutil.copytree(package, own, ignore=shutil.ignore_patterns("__pycache__"))
    with (own / "train" / "schedule.py").open("a") as file:
        file.write("\n\nWARM_UP_STEPS = 100\n")
    with bench.mounted("node2", package, "--bind", str(own)):
        yield Job(write_recipe(bench.folder))


@seed
def file_named_like_a_module(bench: Bench) -> Iterator[Job]:
    (bench.folder / "random.py").write_text("SEED = 7\n\n\ndef draw():\n    return SEED\n")
    # `python -m` looks into the folder where it starts before all others.
    yield Job(write_recipe(bench.folder), before=f"cd '{bench.folder}'")


_OWN_TASK = """
from distdl.tasks.image_classification import ImageClassification


class OwnTask(ImageClassification):
    def loss_sum(self, model, batch):
        return SHARE * super().loss_sum(model, batch)
"""


@seed
def own_task_differs(bench: Bench) -> Iterator[Job]:
    here, older = bench.folder / "code", bench.folder / "older"
    for folder, share in ((here, "1.0"), (older, "0.1")):
        folder.mkdir()
        (folder / "own_task.py").write_text(_OWN_TASK.replace("SHARE", share))
    path = f"{here}:{bench.cluster.environment['PYTHONPATH']}"
    # Python would take what it has compiled of one for the other, which is as long and as old.
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with bench.mounted("node2", here, "--bind", str(older)):
        yield Job(write_recipe(bench.folder, task={"name": "own_task:OwnTask"}), environment)


@seed
def library_missing_on_one_node(bench: Bench) -> Iterator[Job]:
    spec = find_spec("accelerate")
    if spec is None or spec.origin is None:
        pytest.skip("Accelerate is not installed")
    installed, without = Path(spec.origin).parents[1], bench.folder / "without"
    without.mkdir()
    for place in installed.glob("accelerate*"):  # the package, and what pip knows of it
        # To an overlay, a device of number 0 says that what has its name below is not there.
        os.mknod(without / place.name, 0o600 | stat.S_IFCHR, os.makedev(0, 0))
    layers = f"lowerdir={without}:{installed}"
    with bench.mounted("node2", installed, "-t", "overlay", "-o", layers, "overlay"):
        yield Job(write_recipe(bench.folder, hardware={"engine": "accelerate"}))


# --- devices ---


@seed
def cuda_without_gpu(bench: Bench) -> Iterator[Job]:
    yield Job(write_recipe(bench.folder, hardware={"device": "cuda"}))


# --- processes ---


@seed
def run_directory_in_use(bench: Bench) -> Iterator[Job]:
    job = Job(write_recipe(bench.folder, train={"max_steps": 1_000_000}))
    forgotten = subprocess.Popen(
        bench.cluster.cluster.inside("ctl", ["env", f"--chdir={Path.cwd()}", *job.words("train")]),
        env=bench.cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_event(bench.folder / "run", "save")
        yield job
    finally:
        cancel_all(bench.cluster)
        forgotten.wait(60)


# --- recipe and data ---


@seed
def data_missing_on_one_node(bench: Bench) -> Iterator[Job]:
    source, copy = CATALOGUE["fashion_mnist"].embedded, bench.folder / "data"
    assert source is not None
    shutil.copytree(source, copy)
    with bench.own_disk("node2", copy):
        yield Job(write_recipe(bench.folder, data={"name": None, "path": str(copy)}))


@seed
def data_of_another_version(bench: Bench) -> Iterator[Job]:
    source, copy, older = CATALOGUE["fashion_mnist"].embedded, bench.folder / "data", bench.folder / "older"
    assert source is not None
    shutil.copytree(source, copy)
    shutil.copytree(source, older)
    rows = parquet.read_table(older / "train.parquet")
    labels = rows.column("label")
    at = rows.column_names.index("label")
    turned = pa.array(labels.to_pylist()[::-1], labels.type)
    parquet.write_table(rows.set_column(at, rows.field(at), turned), older / "train.parquet")
    recipe = write_recipe(bench.folder, data={"name": None, "path": str(copy)})
    with bench.mounted("node2", copy, "--bind", str(older)):
        yield Job(recipe, {"DISTDL_CACHE": str(bench.folder / "cache")})


@seed
def checkpoints_of_another_model(bench: Bench) -> Iterator[Job]:
    train_here(write_recipe(bench.folder, train={"max_steps": 10}), 1)
    yield Job(write_recipe(bench.folder, model={"width": 8}))


# --- written last ---


@seed
def interface_that_leads_nowhere(bench: Bench) -> Iterator[Job]:
    with ExitStack() as stack:
        for node in NODES:
            bench.done(node, "ip", "link", "add", "docker0", "type", "bridge")
            stack.callback(bench.done, node, "ip", "link", "del", "docker0")
            bench.done(node, "ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
            bench.done(node, "ip", "link", "set", "docker0", "up")
        yield Job(write_recipe(bench.folder), {"GLOO_SOCKET_IFNAME": "docker0"})


@seed
def cloned_with_its_name(bench: Bench) -> Iterator[Job]:
    try:
        bench.done("node2", "hostname", "node1")
        yield Job(write_recipe(bench.folder))
    finally:
        bench.done("node2", "hostname", "node2")


@seed
def port_drawn_by_each_task(bench: Bench) -> Iterator[Job]:
    # For $((20000 + RANDOM % 10000)), which might draw the same twice.
    yield Job(write_recipe(bench.folder), before="export MASTER_PORT=$((29500 + SLURM_PROCID))")


@seed
def old_library_in_the_path(bench: Bench) -> Iterator[Job]:
    # To the loader it is a libstdc++ without the versions that are asked for, as one of an old compiler is.
    (bench.folder / "lib64").mkdir()
    some = re.search(r"/\S*/libm(-[\d.]+)?\.so\S*", Path("/proc/self/maps").read_text())
    assert some, "Python itself has loaded this one"
    shutil.copy(some[0], bench.folder / "lib64" / "libstdc++.so.6")
    path = f"export LD_LIBRARY_PATH='{bench.folder / 'lib64'}'"
    yield Job(write_recipe(bench.folder), before=f'test "$SLURMD_NODENAME" = node1 || {path}')


@seed
def another_torch_on_one_node(bench: Bench) -> Iterator[Job]:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    installed, other = Path(spec.origin).parents[1], bench.folder / "other"
    here = version("torch")
    major, minor, _ = here.split(".", 2)
    older = f"{major}.{int(minor) - 1}.1"
    (metadata,) = installed.glob("torch-*.dist-info/METADATA")
    for file, before, after in (
        (installed / "torch" / "version.py", f"__version__ = '{here}'", f"__version__ = '{older}'"),
        (metadata, f"\nVersion: {here}\n", f"\nVersion: {older}\n"),
    ):
        text = file.read_text()
        assert before in text
        copy = other / file.relative_to(installed)
        copy.parent.mkdir(parents=True)
        copy.write_text(text.replace(before, after))
    layers = f"lowerdir={other}:{installed}"
    with bench.mounted("node2", installed, "-t", "overlay", "-o", layers, "overlay"):
        yield Job(write_recipe(bench.folder))


@seed
def recipe_changed_on_one_node(bench: Bench) -> Iterator[Job]:
    recipe = write_recipe(bench.folder)
    older = write_recipe(bench.folder / "older", optim={"lr": 0.2}, run={"dir": str(bench.folder / "run")})
    with bench.mounted("node2", recipe, "--bind", str(older)):
        yield Job(recipe)


@seed
def no_more_files(bench: Bench) -> Iterator[Job]:
    # Room for the run directory and two files in it. What is set of a tmpfs holds wherever it is mounted.
    found = os.statvfs(bench.disk)
    limit = found.f_files - found.f_ffree + 3
    try:
        bench.done("ctl", "mount", "-o", f"remount,nr_inodes={limit}", str(bench.disk))
        assert os.statvfs(bench.disk).f_ffree == 3
        yield Job(write_recipe(bench.folder, run={"dir": str(bench.disk / "run")}))
    finally:
        shutil.rmtree(bench.disk / "run", ignore_errors=True)
        bench.done("ctl", "mount", "-o", f"remount,nr_inodes={found.f_files}", str(bench.disk))


@seed
def little_shared_memory(bench: Bench) -> Iterator[Job]:
    # node1 has a new one too, so that nothing of it is left there. A snapshot here has some megabytes.
    small = ("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    with bench.own_disk("node1", Path("/dev/shm")), bench.mounted("node2", "/dev/shm", *small):
        model = {"width": 32, "hidden": 4000}
        yield Job(write_recipe(bench.folder, model=model, checkpoint={"replicas": "node"}))


@seed
def processor_time_limited(bench: Bench) -> Iterator[Job]:
    # A million steps, of 10 ms or more each, take several times as long.
    yield Job(write_recipe(bench.folder, train={"max_steps": 1_000_000}), before="ulimit -t 1800")


_BUSY = """
import os, signal, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent, children = os.getpid(), []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os.setsid()  # the kernel may share its time among sessions
        while os.getppid() == parent:
            pass
        os._exit(0)
    children.append(child)
print("busy", flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@seed
def forgotten_processes_on_one_node(bench: Bench) -> Iterator[Job]:
    # On one processor, which the task is bound to, so that the other node has its own. They end with their
    # standard input, as the block does.
    cpu = str(max(os.sched_getaffinity(0)))
    words = bench.cluster.cluster.inside("node2", [sys.executable, "-c", _BUSY, cpu])
    bound = f'test "$SLURMD_NODENAME" = node1 || taskset -cp {cpu} $$ > /dev/null'
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as others:
        assert others.stdout is not None
        assert others.stdout.readline() == "busy\n"
        yield Job(write_recipe(bench.folder), before=bound)


@seed
def compiler_that_is_not_there(bench: Bench) -> Iterator[Job]:
    compilers = {"CC": "/opt/gcc/12.2.0/bin/gcc", "CXX": "/opt/gcc/12.2.0/bin/g++"}
    assert not Path(compilers["CXX"]).exists()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "compiled")}
    yield Job(write_recipe(bench.folder, hardware={"compile": True}), compilers | cache)


@seed
def one_processor_for_eight_threads(bench: Bench) -> Iterator[Job]:
    # As task/affinity binds a task that has not asked for more.
    cpus = sorted(os.sched_getaffinity(0))
    own = f'test "$SLURMD_NODENAME" = node1 && cpu={cpus[0]} || cpu={cpus[-1]}'
    recipe = write_recipe(bench.folder, model={"width": 32}, hardware={"threads": 8})
    yield Job(recipe, before=f"{own}\ntaskset -cp $cpu $$ > /dev/null")


# --- what the doctor says ---

# A process that could not meet the others speaks for itself, behind its rank and node in brackets.
_LABEL = re.compile(r"\[[^\]]*\] ?")
_LEVEL = re.compile(r"(fail|warn|ok|pass|skip|note|info|unknown)\w*\b")


@dataclass
class Finding:
    """One finding: its level, and all it says before its first line of fix, and from there on."""

    level: str
    diagnosis: str = ""
    fix: str = ""


def findings_of(said: str) -> list[Finding]:
    """The findings in what the doctor printed, in lower case. A line of fix begins with `do:`."""
    found: list[Finding] = []
    inside = False
    for line in said.lower().splitlines():
        if line.startswith("srun: "):  # it says so of a task that has ended, in the middle of its last lines
            continue
        text = _LABEL.sub("", line, count=1) if line.startswith("[") else line
        level = _LEVEL.match(text)
        if level:
            found.append(Finding(level[1]))
        inside = bool(level) or (inside and text.startswith(" "))
        if not inside:
            continue
        if found[-1].fix or text.strip().startswith("do:"):
            found[-1].fix += line + "\n"
        else:
            found[-1].diagnosis += line + "\n"
    return found


def troubles_of(said: str) -> list[Finding]:
    return [finding for finding in findings_of(said) if finding.level in ("fail", "warn")]


def has(text: str, wanted: list[str]) -> bool:
    """Whether it contains, of each entry, one of the alternatives."""
    return all(any(word in text for word in entry.split("|")) for entry in wanted)


def cancel_all(cluster: TestCluster) -> None:
    for job in cluster.say("squeue", "--noheader", "--format=%i")[1].split():
        cluster.say("scancel", job)
    wait_until(lambda: not cluster.queue(), 60, "all jobs end")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system. Mounted before the nodes start, so that all of them have it."""
    if missing():
        pytest.skip(missing())
    with small_disk(tmp_path_factory.mktemp("disk") / "small", "4m") as made:
        yield made


@pytest.fixture(scope="module")
def cluster(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """A cluster of this module's own: it has the small disk, and no other test meets what is broken here."""
    with running(tmp_path_factory.mktemp("cluster"), nodes=2) as made:
        yield made


@pytest.fixture
def bench(cluster: TestCluster, tmp_path: Path, disk: Path) -> Iterator[Bench]:
    try:
        yield Bench(cluster, tmp_path, disk)
    finally:
        cancel_all(cluster)
        idle = cluster.cluster.idle
        wait_until(lambda: idle() == len(NODES), 60, "both nodes are idle again")


def test_every_kind_has_a_seed() -> None:
    assert list(KINDS) == list(SEEDS)
    assert len(KINDS) == 37


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_names_it(kind: str, bench: Bench) -> None:
    with SEEDS[kind](bench) as job:
        code, said = bench.examine(job)
    print(said)
    troubles = troubles_of(said)
    named = [finding for finding in troubles if has(finding.diagnosis, KINDS[kind]["words"])]
    assert named, said
    assert any(has(finding.fix, KINDS[kind]["fix_words"]) for finding in named), said
    assert code == (3 if any(finding.level == "fail" for finding in troubles) else 0), said


def test_a_healthy_cluster_has_no_trouble(bench: Bench) -> None:
    code, said = bench.examine(Job(write_recipe(bench.folder)))
    print(said)
    assert findings_of(said), said
    assert not troubles_of(said), said
    assert code == 0, said
