"""`launch/slurm/`: real daemons on two nodes stop a job by its time limit, requeue and resume it (`make slurm`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, play
from named_nodes import NamedCluster, kill_all, on, start
from nodes import obstacle

from lars.recipe.launched import environment_of
from lars.run.reading import read_result

SCRIPTS = ROOT / "launch/slurm"
A_LONG_TIME = 1800  # seconds; a hang ends the test, a busy machine does not
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
missing = [name for name in DAEMONS if not shutil.which(name)]
no_slurm = obstacle() or f"{', '.join(missing)}: not installed (Debian's packages slurm-wlm and munge)" * bool(missing)
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=worker-a
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=worker-a CPUs=1
NodeName=worker-b CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian's package shellcheck)")
def test_the_scripts_pass_shellcheck() -> None:
    files = [SCRIPTS / "train.sbatch", *sorted(SCRIPTS.glob("*.sh"))]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert len(files) == 3 and done.returncode == 0, done.stdout


def script(folder: Path, name: str, body: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("engine", ["plain", "zero0", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_task_tells_what_the_launch_file_says(engine: str, tmp_path: Path) -> None:
    """Without Slurm: what `srun` sets, and what train.py then sees."""
    given = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS_PER_NODE": "3"}
    told = {"PATH": os.environ["PATH"], "ENGINE": engine, "PYTHON": str(script(tmp_path, "python", "env")), **given}
    task = subprocess.run([SCRIPTS / "task.sh"], env=told, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = dict(line.split("=", 1) for line in task.stdout.splitlines())
    assert [seen[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["5", "6", "2", "3"]
    for name, value in environment_of(ROOT / f"launch/{'gpu' if engine == 'plain' else engine}.yaml").items():
        assert seen.get(name, "False").lower() == value.lower(), name


def test_an_unknown_engine_is_one_line() -> None:
    given = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), "0") | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    task = subprocess.run([SCRIPTS / "task.sh"], env={**given, "ENGINE": "zero4"}, capture_output=True, text=True)
    assert task.returncode == 2 and task.stderr.startswith("error: ENGINE=zero4 is no engine"), task.stderr


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False), (143, False)])
def test_a_job_is_requeued_on_75_alone_and_an_array_s_number_is_the_seed(
    status: int, requeued: bool, tmp_path: Path
) -> None:
    """Stand-ins for `srun` and `scontrol`; the real ones are in the long test."""
    script(tmp_path, "srun", f'echo "srun $*"; case "$*" in *stage.sh*) ;; *) exit {status} ;; esac')
    script(tmp_path, "scontrol", 'if [ "$2" = hostnames ]; then printf "one\\ntwo\\n"; else echo "scontrol $*"; fi')
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123456"}
    told |= {"SLURM_JOB_NODELIST": "one,two", "SLURM_NNODES": "2", "SLURM_ARRAY_TASK_ID": "3", "STAGE": "/from:/to"}
    job = subprocess.run(["bash", SCRIPTS / "train.sbatch", "a.yaml", "k=v"], env=told, capture_output=True, text=True)
    staged, trained, *rest = job.stdout.splitlines()
    assert staged.endswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 launch/slurm/stage.sh /from /to")
    assert trained.endswith("launch/slurm/task.sh --config a.yaml k=v seed=3 data.path=/to")
    assert ("scontrol requeue 123456" in rest) == requeued and (requeued or job.returncode == status), job.stderr


def test_a_copy_that_was_cut_off_is_copied_again_and_a_whole_one_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "disk/target"
    source.mkdir()
    for name in ("train-0.parquet", "validation-0.parquet"):
        (source / name).write_bytes(os.urandom(1000))
    for touched in ("train-0.parquet", "validation-0.parquet"):
        subprocess.run([SCRIPTS / "stage.sh", source, target], check=True, capture_output=True)
        assert {f.name: f.read_bytes() for f in target.iterdir()} == {f.name: f.read_bytes() for f in source.iterdir()}
        before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}
        os.truncate(target / touched, 400)
        subprocess.run([SCRIPTS / "stage.sh", source, target], check=True, capture_output=True)
        assert (target / touched).read_bytes() == (source / touched).read_bytes()
        kept = {file.name for file in target.iterdir() if file.stat().st_mtime_ns == before[file.name]}
        assert kept == set(before) - {touched}


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    done = subprocess.run([SCRIPTS / "stage.sh", tmp_path / "source", tmp_path / "to"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


class Slurm:
    """A controller on worker-a and a daemon on each node, one task a node."""

    def __init__(self, cluster: NamedCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        self.variables |= {"GLOO_SOCKET_IFNAME": "veth", "PYTHONDONTWRITEBYTECODE": "1"}

    def ask(self, *words: str, **variables: str) -> str:
        """Run a command of Slurm's on worker-a; what it prints."""
        told = {**os.environ, **self.variables, **variables}
        done = subprocess.run(on(self.cluster.a, *words), env=told, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", number).split() if "=" in word)

    def is_idle(self) -> bool:
        """Whether both nodes wait for jobs; the controller may not listen yet."""
        command = on(self.cluster.a, "sinfo", "--noheader", "--format=%T %D")
        return subprocess.run(command, env={**os.environ, **self.variables}, capture_output=True).stdout == b"idle 2\n"

    @property
    def logs(self) -> str:
        return "".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))


@contextmanager
def daemons(cluster: NamedCluster) -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has at most 107 bytes
    slurm, munged = Slurm(cluster, folder), None
    try:
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "seed", "log")]
        with open(folder / "munged.log", "w") as log:
            munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
            munged = subprocess.Popen(munge, stdout=log, stderr=log)
        until(lambda: (folder / "munge.socket").exists(), slurm)
        cluster.a.started.append(start(cluster.a, "slurmctld", "-D", where=folder, **slurm.variables))
        for node in cluster.nodes:
            node.started.append(start(node, "slurmd", "-D", "-N", node.name, where=folder, **slurm.variables))
        until(slurm.is_idle, slurm)
        yield slurm
    finally:
        for node in cluster.nodes:
            kill_all(node)
        if munged:
            munged.terminate()
            munged.wait()
        shutil.rmtree(folder, ignore_errors=True)


def until(happened: Callable[[], bool], slurm: Slurm) -> None:
    end = time.monotonic() + A_LONG_TIME
    while not happened():
        alive = all(daemon.poll() is None for node in slurm.cluster.nodes for daemon in node.started)
        assert alive and time.monotonic() < end, slurm.logs
        time.sleep(0.2)


def minutes(clock: str) -> int:
    """Whole minutes of Slurm's [hours:]minutes:seconds."""
    *hours, minute, _ = map(int, clock.split(":"))
    return 60 * sum(hours) + minute


@pytest.mark.long
@pytest.mark.skipif(bool(no_slurm), reason=no_slurm)
def test_a_job_is_stopped_by_its_time_limit_requeued_and_ends_with_the_undisturbed_hash(
    tiny: tuple[str, ...], tmp_path: Path
) -> None:
    recipe, run, log = tmp_path / "recipes/demo/resnet50.yaml", tmp_path / "run", tmp_path / "job.log"
    for model in ("alexnet/model.py", "demo/model.py"):
        (tmp_path / "recipes" / model).parent.mkdir(parents=True)
        shutil.copy(DEMO.parent / model, tmp_path / "recipes" / model)
    data, target = Path(tiny[0].removeprefix("data.path=")), tmp_path / "disk/data"

    def last_step(step: int) -> None:
        recipe.write_text(f"{(DEMO / 'resnet50.yaml').read_text()}\nmax_steps: {step}\n")

    last_step(100_000)  # so that it is the time limit that ends the first life, on a machine of any speed
    with NamedCluster(tmp_path, data, tag=str(os.getpid())) as cluster, daemons(cluster) as slurm:
        options = ("--parsable", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=600")
        words = (str(recipe), *tiny[1:], f"run_dir={run}", "checkpoint.every_steps=1000", "epochs=1000")
        job = slurm.ask(
            "sbatch", *options, f"--output={log}", "launch/slurm/train.sbatch", *words, STAGE=f"{data}:{target}"
        )
        metrics = run / "metrics.jsonl"
        steps = lambda: metrics.read_text().count('"train"') if metrics.exists() else 0  # noqa: E731
        until(lambda: steps() >= 3 or slurm.job(job)["JobState"] == "FAILED", slurm)
        assert steps() >= 3, log.read_text()
        limit = minutes(slurm.job(job)["RunTime"]) + 4  # USR1 comes three to four minutes before
        slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        print(f"\njob {job} on {slurm.job(job)['NodeList']}: its limit is now {limit} minutes, USR1 180 s before")
        until(lambda: slurm.job(job)["JobState"] == "PENDING", slurm)
        stopped = read_result(run)
        assert stopped["status"] == "preempted" and stopped["steps"] >= 3, slurm.logs
        print(f"stopped after step {stopped['steps']}, requeued")
        last_step(stopped["steps"] + 4)
        slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=600")  # Slurm keeps the limit for the next life
        until(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), slurm)
        ended, said = slurm.job(job), log.read_text()
    print(f"JobState={ended['JobState']} Restarts={ended['Restarts']} ExitCode={ended['ExitCode']}")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "1", "0:0"), said
    assert said.count("requeued: job") == 1 and f"resuming after step {stopped['steps']}" in said, said
    assert {line.split(":")[0] for line in re.findall(r"worker-[ab]: .* has 3 files", said)} == {"worker-a", "worker-b"}

    calm = tmp_path / "calm"
    play(1, recipe, *tiny, "epochs=1000", f"run_dir={calm}", log=tmp_path / "calm.log")
    ours, theirs = read_result(run), read_result(calm)
    print(f"one machine {theirs['weights_sha256'][:16]}  requeued {ours['weights_sha256'][:16]}")
    for key in ("status", "steps", "weights_sha256", "samples_hash", "data_fingerprint", "reproducibility"):
        assert ours[key] == theirs[key], key
    assert (ours["world_size"], theirs["world_size"]) == (2, 1)
