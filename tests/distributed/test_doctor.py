"""`lars doctor` on a healthy machine, and on set-ups that are really broken; two network namespaces play two nodes."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import DEMO, RANKS, ROOT, Ranks, free_port, speak_into
from nodes import PORT, Cluster, Node, obstacle

from lars.commands import gpu
from lars.commands.checkup import Checkup
from lars.commands.claims import Claim, faults_of
from lars.commands.doctor import differences, rows
from lars.commands.roll_call import COME, RollCall

RECIPE = DEMO / "resnet50.yaml"
NODES = pytest.mark.skipif(bool(obstacle()), reason=obstacle())
LONG = pytest.mark.long
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000  # linux/sched.h


class Doctor(Ranks):
    """The processes of one `lars doctor`, forked from a server that has imported torch."""

    def __init__(self, folder: Path) -> None:
        super().__init__([], folder / "log")
        self.log.write_text("")

    def start(self, variables: dict[str, str], *words: str, first: Callable[[], None] | None = None) -> None:
        """One process with a launcher's variables; `first` is called in it before it begins."""
        arguments = ("--config", str(RECIPE), *words) if "--config" not in words else words
        self.processes.append(RANKS.Process(target=_process, args=(variables, arguments, str(self.log), first)))
        self.processes[-1].start()

    @property
    def faults(self) -> list[str]:
        assert "Traceback" not in self.output, self.output
        return [line.removeprefix("error: ") for line in self.output.splitlines() if line.startswith("error: ")]


def _process(variables: dict[str, str], arguments: tuple[str, ...], log: str, first: Callable | None) -> None:
    speak_into(log)
    os.environ.update(variables, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if first:
        first()
    sys.argv = ["lars doctor", *arguments]
    from lars.commands.doctor import main

    sys.exit(main())


def launched(rank: int, port: int, address: str = "127.0.0.1", processes: int = 2, here: int = 2) -> dict[str, str]:
    """A launcher's variables for one of `processes` processes, `here` of them on this node."""
    place = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


@pytest.fixture
def keys(tmp_path: Path, tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny, f"run_dir={tmp_path / 'run'}")


# --- one machine ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_is_ready(doctor: Doctor, keys: tuple[str, ...], tmp_path: Path) -> None:
    port = free_port()
    for rank in range(2):
        doctor.start(launched(rank, port), *keys)
    assert doctor.wait() == [0, 0], doctor.output
    assert doctor.faults == [] and doctor.output.splitlines()[-1] == "doctor: OK: demo/resnet50 can start"
    for row in ("processes", "gloo, round trip", "gloo, bandwidth", "clocks", "run folder, writes", "loader"):
        assert f"│ {row}" in doctor.output, doctor.output
    assert "2 of 2 on " in doctor.output and doctor.output.count("what") == 1  # rank 0 alone speaks
    assert not (tmp_path / "run").exists()


def without_its_data(folder: Path, tiny: tuple[str, ...]) -> str:
    """`data.path` of a copy with a row group of the validation split that cannot be read; its footer is as it was."""
    shutil.copytree(tiny[0].removeprefix("data.path="), folder)
    with open(folder / "validation-00000-of-00001.parquet", "r+b") as file:
        file.seek(4)
        file.write(os.urandom(20_000))
    return f"data.path={folder}"


def with_another_timm(folder: Path) -> None:
    (folder / "timm-0.0.1.dist-info").mkdir()
    (folder / "timm-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    sys.path.insert(0, str(folder))


def test_two_faults_are_both_named(
    doctor: Doctor, keys: tuple[str, ...], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """Another version on one process, data that cannot be read on the other."""
    port = free_port()
    doctor.start(launched(0, port), *keys, without_its_data(tmp_path / "damaged", tiny))
    (other := tmp_path / "site").mkdir()
    doctor.start(launched(1, port), *keys, first=partial(with_another_timm, other))
    assert doctor.wait() == [2, 2], doctor.output
    assert len(doctor.faults) == 2, doctor.output
    assert "rank 1 on " in doctor.faults[0] and "timm=0.0.1" in doctor.faults[0], doctor.output
    assert "install the same versions" in doctor.faults[0]
    assert "rank 0 on " in doctor.faults[1] and "validation-00000-of-00001.parquet" in doctor.faults[1], doctor.output
    assert doctor.output.splitlines()[-1] == "doctor: 2 faults, named above: demo/resnet50 is not ready"


def test_two_processes_with_rank_0_are_named(doctor: Doctor, keys: tuple[str, ...]) -> None:
    port = free_port()
    for _ in range(2):
        doctor.start(launched(0, port), *keys)
    assert doctor.wait(COME + 90) == [2, 2], doctor.output
    assert len(doctor.faults) == 2, doctor.output
    assert "rank 0 is there 2 times" in doctor.faults[0] and "give each process a RANK of its own" in doctor.faults[0]
    assert all(f"process {process.pid} on" in doctor.faults[0] for process in doctor.processes)
    assert "rank 1 of 2 did not come" in doctor.faults[1]


@LONG
def test_another_source_is_named(doctor: Doctor, keys: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("data", "results", "__pycache__"))
    with open(tmp_path / "demo/model.py", "a") as file:
        file.write("\n# another line\n")
    shutil.copytree(ROOT / "recipes/alexnet", tmp_path / "alexnet", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "recipes/train.py", tmp_path / "train.py")
    port = free_port()
    doctor.start(launched(0, port), *keys)
    doctor.start(launched(1, port), "--config", str(tmp_path / "demo/resnet50.yaml"), *keys)
    assert doctor.wait() == [2, 2], doctor.output
    assert len(doctor.faults) == 1 and "recipe/model.py=" in doctor.faults[0], doctor.output
    assert "bring all nodes to the same commit" in doctor.faults[0]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@LONG
@pytest.mark.parametrize(("taken", "words"), [(0, "checkpoints"), (1, "takes no 1 MiB")])
def test_a_full_disk_is_named(taken: int, words: str, doctor: Doctor, keys: tuple[str, ...], tmp_path: Path) -> None:
    """One without room for the checkpoints, and one that takes nothing."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        (disk / "other").write_bytes(b"\0" * taken * (2 * 2**20 - 4096))
        doctor.start({}, *keys, f"run_dir={disk / 'run'}")
        assert doctor.wait() == [2], doctor.output
    assert any(words in fault and "make room" in fault for fault in doctor.faults), doctor.output
    assert all(str(disk) in fault for fault in doctor.faults), doctor.output


@LONG
def test_one_process_looks_at_what_is_planned_for_several(doctor: Doctor, keys: tuple[str, ...]) -> None:
    doctor.start({}, *keys, "--launch", "zero2")
    assert doctor.wait() == [0], doctor.output
    assert "(zero2, for 2)" in doctor.output and "doctor: OK" in doctor.output
    doctor.start({}, *keys, "--launch", "no-such-file")
    assert doctor.wait() == [0, 2], doctor.output
    assert "no launch file launch/no-such-file.yaml" in doctor.faults[0]


# --- two nodes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path, tiny: tuple[str, ...]) -> Iterator[Cluster]:
    with Cluster(tmp_path, Path(tiny[0].removeprefix("data.path=")), tag=str(os.getpid())) as made:
        yield made


def move_to(namespace: str, name: str, hosts: str) -> None:
    """From now on this process is on a node: its network, its name, its /etc/hosts."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS | CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "this process cannot be moved to a node")
    socket.sethostname(name)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)


def start_on(
    doctor: Doctor, node: Node, rank: int, master: str, keys: tuple[str, ...], entry: str, **more: str
) -> None:
    hosts = doctor.log.with_name(f"hosts-of-{node.name}")
    hosts.write_text(f"127.0.0.1 localhost\n{entry}\n")
    variables = launched(rank, PORT, master, here=1) | more
    doctor.start(variables, *keys, first=partial(move_to, node.namespace, node.name, str(hosts)))


def start_both(doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]) -> None:
    """Rank 0 on worker-a, rank 1 on worker-b, each with its address in /etc/hosts."""
    for rank, node in enumerate(cluster.nodes):
        start_on(doctor, node, rank, cluster.a.address, keys, f"{node.address} {node.name}")


def rule(node: Node, *words: str) -> None:
    """Let this node's kernel drop some packets."""
    subprocess.run(["ip", "-n", node.namespace, "rule", "add", *words], check=True)


@NODES
@LONG
def test_two_healthy_nodes_are_ready(doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]) -> None:
    start_both(doctor, cluster, keys)
    assert doctor.wait() == [0, 0], doctor.output
    assert "2 of 2 on worker-a, worker-b" in doctor.output and "doctor: OK" in doctor.output, doctor.output


@NODES
def test_a_name_on_loopback_is_named(doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]) -> None:
    """As Debian writes it into /etc/hosts: gloo would meet at 127.0.1.1 and wait for ever."""
    start_on(doctor, cluster.a, 0, cluster.a.address, keys, f"{cluster.a.address} worker-a")
    start_on(doctor, cluster.b, 1, cluster.a.address, keys, "127.0.1.1 worker-b")
    assert doctor.wait() == [2, 2], doctor.output
    (fault,) = doctor.faults
    assert fault.startswith("rank 1 on worker-b: gloo would send the other nodes to 127.0.1.1"), doctor.output
    assert "GLOO_SOCKET_IFNAME=veth" in fault and "/etc/hosts" in fault


@NODES
@LONG
def test_a_master_on_loopback_is_named(doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]) -> None:
    start_on(doctor, cluster.b, 1, "localhost", keys, f"{cluster.b.address} worker-b")
    assert doctor.wait(COME + 90) == [2], doctor.output
    assert "rank 1 on worker-b: MASTER_ADDR=localhost is 127.0.0.1 on worker-b" in doctor.faults[0], doctor.output


@NODES
@LONG
def test_a_blocked_port_and_unreadable_data_are_both_named(
    doctor: Doctor, cluster: Cluster, keys: tuple[str, ...], tmp_path: Path
) -> None:
    """worker-a answers nobody on the port: packets are dropped, no connection is refused."""
    rule(cluster.a, "to", cluster.b.address, "ipproto", "tcp", "sport", str(PORT), "blackhole")
    (tmp_path / "empty").mkdir()
    start_on(doctor, cluster.a, 0, cluster.a.address, keys, f"{cluster.a.address} worker-a")
    own = (*keys, f"data.path={tmp_path / 'empty'}")
    start_on(doctor, cluster.b, 1, cluster.a.address, own, f"{cluster.b.address} worker-b")
    assert doctor.wait(COME + 90) == [2, 2], doctor.output
    theirs = [fault for fault in doctor.faults if fault.startswith("rank 1 on worker-b: ")]
    assert len(theirs) == 2 and len(doctor.faults) == 3, doctor.output
    assert f"{cluster.a.address}:{PORT} cannot be reached from worker-b" in theirs[0], doctor.output
    assert "open the port" in theirs[0] and "holds no .parquet file" in theirs[1], doctor.output
    assert any("rank 1 of 2 did not come" in fault for fault in doctor.faults), doctor.output


@NODES
@LONG
def test_a_network_that_opens_the_one_port_only_is_named(
    doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]
) -> None:
    """The processes meet at MASTER_PORT; on the ports that gloo would take no packet of worker-a comes through."""
    rule(cluster.a, "to", cluster.b.address, "ipproto", "tcp", "sport", "32768-60999", "blackhole")
    start_both(doctor, cluster, keys)
    assert doctor.wait() == [2, 2], doctor.output
    assert len(doctor.faults) == 2, doctor.output
    for fault, (here, there) in zip(doctor.faults, (("0 on worker-a", cluster.b), ("1 on worker-b", cluster.a))):
        assert f"rank {here}: cannot connect to {there.name} at {there.address}" in fault, doctor.output
        assert "open all ports between the nodes, both ways" in fault


@NODES
@LONG
@pytest.mark.parametrize("absent", [0, 1])
def test_a_missing_node_is_named(absent: int, doctor: Doctor, cluster: Cluster, keys: tuple[str, ...]) -> None:
    there = cluster.nodes[1 - absent]
    start_on(doctor, there, 1 - absent, cluster.a.address, keys, f"{there.address} {there.name}")
    assert doctor.wait(COME + 90) == [2], doctor.output
    assert len(doctor.faults) == 1, doctor.output
    words = "nobody listens at" if absent == 0 else "rank 1 of 2 did not come"
    assert words in doctor.faults[0] and "start " in doctor.faults[0], doctor.output


# --- a process that stands still, the Hub -----------------------------------------------------------------------------


def stand_still(seconds: float) -> None:
    from lars.commands import doctor, trials

    doctor._TRIALS = 8.0
    if seconds:
        trials.network = lambda device: time.sleep(seconds)


@LONG
def test_a_process_that_stands_still_keeps_nobody_waiting(doctor: Doctor, keys: tuple[str, ...]) -> None:
    port = free_port()
    for rank, seconds in enumerate((0, 600)):
        doctor.start(launched(rank, port), *keys, first=partial(stand_still, seconds))
    assert doctor.wait(120) == [2, 2], doctor.output
    assert any("the trial of network, data and loader has not ended after 8 s" in f for f in doctor.faults), (
        doctor.output
    )


class GatedHub(BaseHTTPRequestHandler):
    """What the Hub answers of a data set whose licence was not accepted."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *words: object) -> None:
        return


@pytest.mark.parametrize("hub", [True, False])
def test_the_hub_is_asked_for_a_data_set_of_the_hub_alone(
    hub: bool, keys: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatedHub, "asked", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    checkup = Checkup(RollCall())
    try:
        checkup.recipe_and_machine(RECIPE, [*keys, *["data.path=ILSVRC/imagenet-1k"] * hub], None)
        checkup.disks_and_data()
    finally:
        server.shutdown()
        server.server_close()
    if hub:
        (fault,) = checkup.faults
        assert "accept its licence at huggingface.co/datasets/ILSVRC/imagenet-1k" in fault
        assert any(path.endswith("/auth-check") for path in GatedHub.asked)
    else:
        assert checkup.faults == GatedHub.asked == []


# --- the page ---------------------------------------------------------------------------------------------------------


@LONG
def test_the_command_of_the_page_prints_its_table() -> None:
    """With a real launcher; the figures are another machine's, the rows are the same."""
    page = (ROOT / "docs/doctor.md").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("accelerate launch")]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(command)[1:]]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=600, cwd=ROOT, env=hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert names_of_rows(done.stdout) == names_of_rows(page) and len(names_of_rows(page)) > 10
    assert done.stdout.splitlines()[-1] in page


def names_of_rows(text: str) -> list[str]:
    return [name for line in text.splitlines() if line.startswith("│") and (name := line.split("│")[1].strip())]


# --- what cannot be broken here ---------------------------------------------------------------------------------------


def claim(rank: int, local: int, host: str, **other: int) -> Claim:
    facts = {"processes": 4, "local_processes": 2, "boot": "", "pid": rank, "address": host, "port": 1, **other}
    return Claim(rank=rank, local_rank=local, host=host, **facts)


def test_ranks_at_the_wrong_place_of_their_node_are_named() -> None:
    right = {0: [claim(0, 0, "a")], 1: [claim(1, 1, "a")], 2: [claim(2, 0, "b")], 3: [claim(3, 1, "b")]}
    assert faults_of(right, 4, "there", 1) == []
    (fault,) = faults_of({**right, 3: [claim(3, 0, "b")]}, 4, "there", 1)
    assert fault.startswith("b has 2 processes") and "3 (0 of 2)" in fault
    (fault,) = faults_of({**right, 3: [claim(3, 1, "b", processes=8)]}, 4, "there", 1)
    assert "rank 3 on b was told of 8 processes" in fault


def test_who_came_and_does_not_report_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lars.commands.roll_call.REPORT", 0.2)
    roll = RollCall()
    assert roll.meet() == ([], [])
    roll.claims += [claim(rank, rank, "b") for rank in (1, 2)]
    for rank in (0, 2):
        roll.tell(f"state {rank}", {"of": rank})
    found, (late,) = roll.reports("state")
    assert found == {rank: {"of": rank} for rank in (0, 2)}
    assert late.startswith("rank 1 on b came, but has not reported its state")


def test_a_thousand_equal_differences_are_one_fault_a_node_and_the_slowest_is_named() -> None:
    facts = [
        {"facts": {"versions": {"torch": "2" if rank < 8 else "1"}}, "seen": {"x": [rank, "MB/s"]}}
        for rank in range(16)
    ]
    names = {rank: f"rank {rank} on {'ab'[rank // 8]}" for rank in range(16)}
    reports = dict(enumerate(facts))
    (fault,) = differences(reports, names)
    assert fault.startswith("rank 8 on b has torch=1, rank 0 on a has 2: install")
    assert rows(reports, names) == {"x": "0 (rank 0 on a) to 15 (rank 15 on b) MB/s"}


def test_what_nvidia_smi_says_of_a_sick_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here, so a script answers in the words of the real one; tests/gpu has the real one."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n[ $1 = nvlink ] && printf 'GPU 0: X\\n\\t Link 0: 26.562 GB/s\\n\\t Link 1: <inactive>\\n' || "
        "echo '550.1, 3, Not Active, Active, Not Active, Not Active'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told, faults = gpu.health("GPU-1")
    assert told["driver"] == "550.1" and len(faults) == 2
    assert "3 uncorrected memory errors" in faults[0] and "slowdown by heat" in faults[1]
    assert gpu.nvlinks("GPU-1") == "1 of 2"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu.health("GPU-1") == ({}, []) and gpu.nvlinks("GPU-1") == ""
