"""What one process knows about its machine. Plain values with the defaults of a healthy machine, torch-free.

Sizes are bytes, times seconds. A field named `..._error` is None where all is well, else what was said.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

STALE_LOCK_S = 900.0
"""A build's lock that nobody has touched for so long was left behind: a long build takes minutes."""


class Model(BaseModel):
    """Frozen, and JSON on its way to rank 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(Model):
    """Where the process stands among the others. `node`: the same for all that share a network and a kernel.
    `own_gpu`: it sees one GPU, which is its alone.

    `error`: why the launcher's variables make no sense; the other fields are those of a single process then.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    host: str = "node0"
    node: str = "node0"
    own_gpu: bool = False
    user: int = 0
    error: str | None = None


class Torch(Model):
    """What `import torch` gave. `cuda`: the version it was built for; `nccl`: that of its NCCL.

    `slow`: values of train.precision that the processor only imitates.
    """

    version: str | None = "2.6.0"
    error: str | None = None
    distributed: bool = True
    gloo: bool = True
    cuda: str | None = None
    nccl: str | None = None
    devices: int = 0
    slow: tuple[str, ...] = ()
    cuda_error: str | None = None


class Software(Model):
    """Versions and code. `distdl_hash` and `user_code` (file -> hash) are of contents, not of names.

    `copies`: folders on the import path with another distdl. `build_locks`: lock files in
    TORCH_EXTENSIONS_DIR -> seconds since they were written; `removed`: those that were taken away. `cxx`: the
    compiler that the environment names and that is not there.
    """

    python: str = "3.11.0"
    executable: str = "python"
    distdl_path: str = "distdl"
    distdl_hash: str = "0"
    copies: tuple[str, ...] = ()
    packages: dict[str, str] = {}
    user_code: dict[str, str] = {}
    torch: Torch = Torch()
    compiler: bool = True
    cxx: str | None = None
    ninja: bool = True
    build_locks: dict[str, float] = {}
    removed: tuple[str, ...] = ()


class Interface(Model):
    """A network interface. `speed_mbps`: megabits a second where a physical one tells. `mtu`: bytes of the
    longest packet that it sends. `address`: its first of IPv4, if it has one.
    """

    up: bool = True
    loopback: bool = False
    speed_mbps: int | None = None
    mtu: int | None = None
    address: str | None = None


class Network(Model):
    """Names, interfaces, and the rendezvous. `master_local`: MASTER_ADDR is an address of this machine.

    `host_local`: the host's own name leads to an address of this machine. `port_error`: why rank 0 cannot
    listen at MASTER_PORT, or another rank cannot reach it. `elsewhere`: where rank 0 says that it listens
    instead.
    `clock_skew`: this clock less that of rank 0, once they have met. `stuck`: rank -> label of the processes
    that this one reaches with small messages and not with large ones.
    """

    interfaces: dict[str, Interface] = {"lo": Interface(loopback=True), "eth0": Interface()}
    host_addresses: tuple[str, ...] = ("10.0.0.1",)
    host_error: str | None = None
    host_local: bool = True
    master_addr: str | None = None
    master_port: int | None = None
    master_addresses: tuple[str, ...] = ()
    master_error: str | None = None
    master_local: bool = True
    port_error: str | None = None
    elsewhere: str | None = None
    clock_skew: float = 0.0
    stuck: dict[int, str] = {}


class Gpu(Model):
    """One GPU as `nvidia-smi` has it. `others`: processes of others on it -> bytes that they hold."""

    index: int
    name: str = "GPU"
    uuid: str = ""
    memory: int = 80 << 30
    used: int = 0
    others: dict[int, int] = {}


class Gpus(Model):
    """`present`: what the node has; `driver`: its version. Without nvidia-smi, device files are counted."""

    present: int = 0
    driver: str | None = None
    cards: tuple[Gpu, ...] = ()
    error: str | None = None


class Machine(Model):
    """Limits and room of the node. `cores`: those that this process may use, by number.

    `cpu_quota`: cores that the control group grants, None: all. `clock`: seconds since 1970.
    `newest_file`: when the newest of distdl's own files was written. `cpu_time`: seconds of it after which a
    process is killed. `share`: of one core, what this process got when it asked for all of it.
    """

    cores: tuple[int, ...] = tuple(range(8))
    cpu_quota: float | None = None
    open_files: int = 65536
    open_files_hard: int = 65536
    processes: int = 65536
    address_space: int | None = None
    cpu_time: int | None = None
    share: float = 1.0
    locked_memory: int | None = None
    memory: int = 64 << 30
    memory_free: int = 48 << 30
    shm: int = 32 << 30
    shm_free: int = 32 << 30
    tmp: str = "/tmp"
    tmp_error: str | None = None
    tmp_free: int = 100 << 30
    cache: str = "~/.cache"
    cache_error: str | None = None
    clock: float = 1.8e9
    newest_file: float = 1.7e9


class Storage(Model):
    """The run directory and where checkpoints go. `clock_skew`: the file server's clock less this one's.

    `seen`: of the ranks that each left a file there, those whose file this one found; None: nobody looked.
    `in_use`: who holds the run directory.
    """

    run: str = "runs/unnamed"
    in_use: str | None = None
    error: str | None = None
    rename_error: str | None = None
    fsync_error: str | None = None
    lock_error: str | None = None
    free: int = 1 << 40
    free_files: int | None = None
    filesystem: str = "ext4"
    clock_skew: float = 0.0
    seen: tuple[int, ...] | None = None
    store: str | None = None
    store_error: str | None = None


class Wanted(Model):
    """What a recipe asks of the machine. `data`: the fingerprint of its data, where they are there.

    `save`: bytes of its last checkpoint, None before the first. `changed`: in what that is of another recipe
    or of other data, so that a run would not go on from it.
    """

    recipe: str
    hash: str
    engine: str
    device: str = "cpu"
    precision: str = "fp32"
    workers: int = 0
    keep: int = 3
    save: int | None = None
    changed: tuple[str, ...] = ()
    replicas: bool = False
    compile: bool = False
    threads: int | None = None
    data: str | None = None
    plan_error: str | None = None
    data_error: str | None = None
    code_error: str | None = None


class Measured(Model):
    """What communication gave. `all_reduce`: bytes of a tensor -> seconds; `stream`: bytes a second of one
    plain TCP connection from the process `peer` to rank 0. Each error says why there is no figure.
    """

    backend: str = "gloo"
    all_reduce: dict[int, float] = {}
    all_reduce_error: str | None = None
    peer: str = ""
    stream: float | None = None
    stream_error: str | None = None


class Facts(Model):
    """All that one process tells. `env`: the variables that matter, without secrets."""

    place: Place = Place()
    software: Software = Software()
    network: Network = Network()
    gpus: Gpus = Gpus()
    machine: Machine = Machine()
    storage: Storage = Storage()
    wanted: Wanted | None = None
    measured: Measured | None = None
    env: dict[str, str] = {}

    @property
    def label(self) -> str:
        """The process, for a person."""
        return f"rank {self.place.rank} on {self.place.host}"
