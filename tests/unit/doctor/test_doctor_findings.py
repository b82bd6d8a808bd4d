"""Checks on made-up facts: what is not in the list of misconfigurations, and the edges of what is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from distdl.cli.doctor import _cannot_begin
from distdl.doctor import measure
from distdl.doctor.checks.communication import bus_rate
from distdl.doctor.checks.gpus import too_old
from distdl.doctor.checks.network import matching
from distdl.doctor.collect.gpus import read
from distdl.doctor.collect.machine import share_of_a_core
from distdl.doctor.collect.network import interfaces_here
from distdl.doctor.facts import Facts, Interface, Measured, Torch
from distdl.doctor.run import report
from tests.unit.doctor.doctor_support import WANTED, changed, healthy, problems

ZERO = WANTED.model_copy(update={"engine": "zero2"})
DOWN = {"interfaces": {"lo": Interface(loopback=True), "ib0": Interface(up=False)}}
DOCKER = {"interfaces": {"docker0": Interface(address="172.17.0.1"), "eth0": Interface(address="10.0.0.1")}}
REPLICAS = WANTED.model_copy(update={"replicas": True})
COMPILED = WANTED.model_copy(update={"compile": True})
SHORT = WANTED.model_copy(update={"precision": "bf16"})
FAST = {"interfaces": {"eth0": Interface(speed_mbps=100_000)}}


def said(facts: list[Facts]) -> list[tuple[str, str]]:
    return [(f.check, f.status) for f in problems(facts)]


@pytest.mark.parametrize(
    ("check", "status", "nodes", "parts"),
    [
        ("torch", "fail", 1, {"software": {"torch": Torch(version=None, error="OSError: libcudart.so.12")}}),
        ("torch", "fail", 1, {"software": {"torch": Torch(gloo=False)}}),
        ("rendezvous", "fail", 2, {"network": {"master_addresses": ("127.0.0.1",)}}),
        ("interfaces", "fail", 1, {"network": DOWN, "env": {"GLOO_SOCKET_IFNAME": "ib0"}}),
        ("engine", "fail", 1, {"wanted": ZERO}),
        ("recipe", "fail", 1, {"wanted": WANTED.model_copy(update={"plan_error": "too many processes"})}),
        ("limits", "fail", 1, {"machine": {"open_files": 32}}),
        ("limits", "fail", 1, {"machine": {"address_space": 1_500_000 << 10}}),
        ("limits", "warn", 1, {"machine": {"open_files": 64}}),
        ("limits", "warn", 1, {"machine": {"cpu_time": 1800}}),
        ("CPU cores", "warn", 1, {"machine": {"share": 0.2}}),
        ("threads", "warn", 1, {"wanted": WANTED.model_copy(update={"threads": 9})}),
        ("arithmetic", "warn", 1, {"software": {"torch": Torch(slow=("bf16",))}, "wanted": SHORT}),
        ("shared memory", "fail", 1, {"machine": {"shm_free": 1 << 20}, "wanted": REPLICAS}),
        ("compiled ops", "fail", 1, {"software": {"cxx": "/opt/g++"}, "wanted": COMPILED}),
        ("compiled ops", "fail", 1, {"software": {"compiler": False}, "wanted": COMPILED}),
        ("host names", "fail", 2, {"network": {"host_local": False}}),
        ("rendezvous", "fail", 2, {"network": {"port_error": "refused", "elsewhere": "node0:29501"}}),
        ("interfaces", "fail", 2, {"network": DOCKER, "env": {"GLOO_SOCKET_IFNAME": "docker0"}}),
        ("CPU cores", "warn", 1, {"machine": {"cpu_quota": 1.0}}),
        ("memory", "fail", 1, {"machine": {"memory_free": 500 << 20}}),
        ("run directory", "fail", 1, {"storage": {"lock_error": "No locks available"}}),
        ("run directory", "fail", 1, {"storage": {"fsync_error": "Invalid argument"}}),
        ("disk space", "fail", 1, {"storage": {"free_files": 3}}),
        ("all-reduce", "warn", 2, {"network": FAST, "measured": Measured(all_reduce={1 << 24: 1.0})}),
        ("connections", "fail", 2, {"measured": Measured(stream_error="refused")}),
        ("connections", "fail", 2, {"network": {"stuck": {2: "rank 2 on node1"}}}),
        ("run directory", "fail", 1, {"storage": {"in_use": "process 7 on node0"}}),
        ("recipe", "fail", 1, {"wanted": WANTED.model_copy(update={"changed": ("model.width: 4 -> 8",)})}),
    ],
)  # fmt: skip
def test_what_is_found(check: str, status: str, nodes: int, parts: dict[str, Any]) -> None:
    assert (check, status) in said([changed(f, **parts) for f in healthy(nodes, 2)])


def test_data_that_are_missing_on_one_node_are_told_from_data_that_are_nowhere() -> None:
    there = WANTED.model_copy(update={"data": "abc"})
    gone = WANTED.model_copy(update={"data_error": "no such folder"})
    for first, second, found, todo in (
        (there, gone, "on node1: the data are there on node0, and not everywhere: no such folder", "copy"),
        (gone, gone, "recipe.yaml: no such folder", "see"),
        (
            there,
            there.model_copy(update={"data": "abd"}),
            "the data differ between nodes: abc on node0",
            "copy",
        ),
    ):
        node0, node1 = healthy(2, 1)
        (it,) = problems([changed(node0, wanted=first), changed(node1, wanted=second)])
        assert found in it.found
        assert it.todo.startswith(todo)


def test_a_process_by_itself_tells_its_troubles_alone() -> None:
    """Nothing of a comparison that nobody made, and no line for each thing that is well."""
    it = changed(healthy(2, 1)[1], software={"torch": Torch(gloo=False)})
    told = report([it], "no answer")
    assert told.label == "[rank 1 on node1] "
    assert [(f.check, f.status) for f in told.findings or ()] == [("torch", "fail"), ("processes", "fail")]


def test_srun_hands_on_a_master_addr_that_is_left_over() -> None:
    place = healthy(2, 1)[1].place.model_copy(update={"launcher": "srun"})
    network = {"master_addr": "localhost", "master_addresses": ("127.0.0.1",)}
    for env, found in (({"MASTER_ADDR": "localhost"}, True), ({}, False)):
        trouble = [
            f for f in problems([changed(healthy(2, 1)[1], place=place, network=network, env=env)])
            if f.check == "rendezvous"
        ]  # fmt: skip
        assert trouble
        assert all(("MASTER_ADDR=" in f.found) is found for f in trouble)
        assert all(f.todo.startswith("unset MASTER_ADDR") is found for f in trouble)


def test_large_messages_that_do_not_arrive_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is sent to and reads nothing, as behind a switch that drops long packets."""
    monkeypatch.setattr(measure, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        assert measure._is_stuck("127.0.0.1", port)
    assert not measure._is_stuck("127.0.0.1", port)  # closed: nothing passes at all


def test_two_processes_on_one_core_are_found_among_others_with_cores_of_their_own() -> None:
    cores = [(0,), (0,), (1, 2), (3, 4)]
    them = [changed(f, machine={"cores": c}) for f, c in zip(healthy(1, 4), cores, strict=True)]
    assert said(them) == [("CPU cores", "warn")]
    shared = [changed(f, machine={"cores": (0, 1, 2, 3)}) for f in healthy(1, 4)]
    assert said(shared) == []


@pytest.mark.parametrize(
    ("value", "prefixes", "found"),
    [
        ("eth0", False, ["eth0"]), ("eth", False, []), ("eth", True, ["eth0", "eth1"]), ("=eth", True, []),
        ("=eth1", True, ["eth1"]), ("^eth0", True, ["eth1"]), ("^lo,eth0", True, ["eth1"]),
    ],
)  # fmt: skip
def test_interfaces_are_named_as_gloo_and_nccl_read_them(
    value: str, prefixes: bool, found: list[str]
) -> None:
    there = {"lo": Interface(loopback=True), "eth0": Interface(), "eth1": Interface()}
    assert matching(value, there, prefixes=prefixes) == found


def test_a_driver_is_held_against_the_cuda_that_torch_was_built_for() -> None:
    drivers = ("470.82.01", "525.59", "525.60.13", "550.54")
    assert [too_old(driver, "12.8") for driver in drivers] == [True, True, False, False]
    assert too_old("550.54", "13.0")


def test_what_nvidia_smi_prints() -> None:
    answers = {
        "--query-gpu": "0, card, GPU-1, 81559, 4, 550.54.15\n1, card, GPU-2, 81559, 9000, 550.54.15\n",
        "--query-compute-apps": "GPU-2, 4242, 8990\nGPU-1, 7, [N/A]\n",
    }
    found = read(lambda arguments: answers[arguments[0].partition("=")[0]])
    assert (found.present, found.driver) == (2, "550.54.15")
    assert [card.others for card in found.cards] == [{7: 0}, {4242: 8990 << 20}]


def test_bus_bandwidth_is_what_a_link_carries() -> None:
    assert bus_rate(100, 1.0, 2) == 100
    assert bus_rate(100, 2.0, 4) == 75


@pytest.mark.parametrize(("nodes", "names"), [(1, "eth0, lo"), (2, "eth0")])
def test_loopback_is_not_offered_to_several_nodes(nodes: int, names: str) -> None:
    there = {"interfaces": {"eth0": Interface(), "lo": Interface(loopback=True)}}
    facts = [changed(f, network=there, env={"GLOO_SOCKET_IFNAME": "ib0"}) for f in healthy(nodes, 2)]
    assert {f.todo for f in problems(facts)} == {f"set GLOO_SOCKET_IFNAME to one of {names}, or unset it"}


def test_interfaces_are_those_of_this_process() -> None:
    it = interfaces_here()["lo"]
    assert (it.loopback, it.up, it.address) == (True, True, "127.0.0.1")
    assert it.mtu is not None
    assert it.mtu > 1000


def test_the_share_of_a_core_is_what_is_left_of_it() -> None:
    """Beside three others on one core at most a half is left, whatever else runs here."""
    core = str(max(os.sched_getaffinity(0)))
    busy = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", busy, core], stdout=subprocess.PIPE, start_new_session=True)
        for _ in range(3)
    ]
    before = os.sched_getaffinity(0)
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        os.sched_setaffinity(0, {int(core)})
        assert share_of_a_core(0.2, 1) < 0.6
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.communicate()


@pytest.mark.parametrize(
    ("said", "path", "todo"),
    [
        ("/x/libstdc++.so.6: version `GLIBCXX_3.4.18' not found", "/x", "do: unset LD_LIBRARY_PATH"),
        ("No module named 'pyarrow'", "", "do: install distdl's packages"),
    ],
)
def test_a_doctor_that_cannot_begin_says_why(
    said: str, path: str, todo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", path)
    assert _cannot_begin(ImportError(said)) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("[rank 1 on ")
    assert " fail    packages" in printed
    assert said in printed
    assert todo in printed
