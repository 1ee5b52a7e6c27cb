"How many threads compute and how they wait: by the machine, the work and the user; recorded, and kept by a run."

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from ltnb import progress, threads
from ltnb.baseline import BaselineConfig
from ltnb.cli import COMPUTING, threads_for
from ltnb.cli import main as command
from ltnb.config import Config, limited, valid_threads
from ltnb.core import UsageError
from ltnb.data import LongTail
from ltnb.generator import DiffusionConfig
from ltnb.ldmlr import LDMLRConfig
from ltnb.progress import Progress
from ltnb.runs import Run
from ltnb.threads import (
    SPIN,
    Machine,
    busy_cores,
    choose_threads,
    computing_threads,
    cpu_quota,
    look_at_machine,
    step_work,
    thread_variables,
    users_variables,
)

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "LTNB_THREADS", "LOCAL_WORLD_SIZE")
TWO, MANY = Machine((0, 1), 2, busy=0.0), Machine(tuple(range(32)), 16, busy=0.1)  # the second with hyper-threads


@pytest.fixture
def bare(monkeypatch):
    "An environment that says nothing of threads"
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "machine, how, number, why",
    [
        (TWO, {}, 2, "2 of 2 processors to spare"),
        (Machine((0, 1), 2, busy=1.0), {}, 1, "to spare"),  # beside a busy core
        (Machine((0, 1), 2, busy=0.2), {}, 2, "to spare"),  # a little of everything runs everywhere
        (Machine((0, 1), 2, busy=2.0), {}, 1, "to spare"),
        (Machine((3,), 1, busy=0.0), {}, 1, "to spare"),  # taskset, or a job scheduler
        (MANY, {}, 16, "to spare"),  # physical cores
        (Machine(tuple(range(32)), 16, quota=3.5, busy=0.0), {}, 3, "to spare"),  # a container
        (Machine(tuple(range(32)), 16, quota=0.5, busy=0.0), {}, 1, "to spare"),
        (Machine(tuple(range(32)), 16, quota=3.0, busy=15.0), {}, 1, "to spare"),
        (Machine((0, 1), 2), {}, 2, "to spare"),  # where nobody says how busy they are
        (MANY, dict(work=40_000), 1, "do not pay"),
        (MANY, dict(work=2**18), 2, "do not pay"),
        (MANY, dict(work=2**24), 16, "to spare"),
        (TWO, dict(work=2**18), 2, "to spare"),
        (Machine((0, 1), 2, busy=1.0), dict(work=2**24), 1, "to spare"),
        (TWO, dict(begun=2, work=10), 2, "began"),
        (TWO, dict(begun=1), 1, "began"),
        (Machine((0, 1), 2, busy=2.0), dict(begun=2), 2, "began"),  # the same numbers go before speed
        (TWO, dict(begun=4), 2, "to spare"),
        (Machine((0, 1), 2, quota=1.0), dict(begun=2), 1, "to spare"),
        (MANY, dict(processes=4), 4, "4 processes"),
        (TWO, dict(processes=4), 1, "4 processes"),
    ],
)
def test_auto(machine, how, number, why):
    n, said = choose_threads("auto", machine, {}, **how)
    assert n == number and why in said


@pytest.mark.parametrize(
    "asked, given, how, number",
    [
        ("3", None, {}, 3),
        ("64", None, {}, 64),
        ("3", None, dict(begun=2, work=1), 3),  # asked for is asked for
        ("auto", "5", {}, 5),
        ("auto", "4,2", {}, 4),
        ("auto", "1", dict(begun=2, work=2**24), 1),  # the user wins
        ("2", "1", {}, 1),
        ("auto", "", {}, 2),
        ("auto", "0", {}, 2),
        ("auto", "many", {}, 2),  # what says no number
        ("4", "1", dict(processes=2), 4),
        ("4", "2", dict(processes=2), 2),  # torchrun itself says 1
        ("auto", "1", dict(processes=2), 1),
    ],
)
def test_asked_for_and_the_users_environment(asked, given, how, number):
    assert choose_threads(asked, TWO, {} if given is None else {"OMP_NUM_THREADS": given}, **how)[0] == number


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "sys/fs/cgroup/slurm/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/slurm/job_1/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/slurm/job_1/step_0/cpu.max": "max 100000\n",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/other\n4:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
                "proc/self/mountinfo": "31 23 0:28 /docker/abc /mnt/groups/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
                "mnt/groups/cpu/cpu.cfs_quota_us": "50000\n",
                "mnt/groups/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "half\n"}, None),
    ],
)
def test_quota_of_control_groups(tmp_path, files, quota):
    assert cpu_quota(written(tmp_path, files)) == quota


def test_what_others_use_at_this_moment(tmp_path, monkeypatch):
    "Of four processors, one works for others, one half; the third is idle, the last is not ours"

    def stat(*idle):  # hundredths of a second: user, nice, system, idle, waiting for a disk, and three more
        lines = [f"cpu{n} {100 - i} 0 0 {i} 0 0 0 0 0 0" for n, i in enumerate(idle)]
        written(tmp_path, {"proc/stat": "\n".join(["cpu  1 2 3 4 5 6 7 8", *lines, "intr 5"])})

    stat(0, 0, 0, 0)

    def sleep(seconds):
        written(
            tmp_path,
            {
                "proc/stat": "\n".join(
                    f"cpu{n} {100 + 20 - i} 0 0 {i} 0 0 0 0 0 0" for n, i in enumerate((0, 10, 20, 0))
                )
            },
        )

    monkeypatch.setattr(progress.time, "sleep", sleep)
    assert busy_cores([0, 1, 2], root=tmp_path) == 1.5
    assert busy_cores([0, 1, 2], root=tmp_path) is None, "no time has passed: nobody knows"
    assert busy_cores([7], root=tmp_path) is None and busy_cores([0], root=tmp_path / "no") is None


def test_hyper_threads_are_one_core(tmp_path):
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    assert look_at_machine(0, tmp_path).cores == len(cpus)  # nobody says which belong together
    at = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    machine = look_at_machine(0, written(tmp_path, {at.format(n): f"{cpus[0]}-{cpus[-1]}\n" for n in cpus}))
    assert (machine.cores, machine.cpus, machine.busy) == (1, tuple(cpus), None)


# the work
def test_larger_steps_take_more_threads():
    digits = LongTail.digits()
    features = type("Features", (), {"train": torch.zeros(10, 64)})
    photographs = type("Photographs", (), {"train": type("Set", (), {"images": np.zeros((1, 3, 224, 224))})})
    small = step_work(LDMLRConfig(), digits), step_work(BaselineConfig(), digits), step_work(LDMLRConfig(), features)
    large = step_work(BaselineConfig(), photographs), step_work(DiffusionConfig(diff_bs=512), photographs)
    middle = step_work(DiffusionConfig(), digits)
    assert max(small) < threads.WORK_A_THREAD <= middle // 2 and min(large) > 100 * threads.WORK_A_THREAD
    assert step_work(BaselineConfig(), object()) is None


# the environment
def test_variables_of_the_user_stay(bare):
    assert thread_variables("1").keys() == {"OMP_NUM_THREADS", *SPIN, "LTNB_THREADS"} and not users_variables()
    bare.setenv("GOMP_SPINCOUNT", "7")
    assert {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}.isdisjoint(thread_variables("1"))
    bare.setenv("OMP_WAIT_POLICY", "passive")
    assert thread_variables("1").keys() == {"OMP_NUM_THREADS", "LTNB_THREADS"}, "a policy says it of every runtime"
    bare.setenv("OMP_NUM_THREADS", "3")
    assert thread_variables("auto").keys() == {"LTNB_THREADS"}
    assert users_variables() == {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"}


def test_what_the_command_set_is_not_the_users(bare):
    for k, v in thread_variables("2").items():
        bare.setenv(k, v)
    assert os.environ["OMP_NUM_THREADS"] == "2" and not users_variables()
    bare.setenv("OMP_NUM_THREADS", "5")  # changed since
    assert users_variables() == {"OMP_NUM_THREADS": "5"}


def test_only_commands_that_compute_choose(bare):
    assert set(COMPUTING) < set(progress.sys.modules["ltnb.cli"].COMMANDS)

    def own(*args):
        facts = json.loads(threads_for(list(args)).get("LTNB_THREADS", "{}"))
        return facts.get("own", {}).get("OMP_NUM_THREADS")

    assert own("list") is own("data") is own() is own("run", "--help") is own("demo", "--threads", "none") is None
    for args in (["--threads", "3"], ["--threads=3"], ["--threads", "1", "--threads", "3"]):
        assert own("demo", *args) == "3"
    bare.setattr(threads, "busy_cores", lambda *a: 0.0)
    assert int(own("run", "ldmlr")) >= 1
    before = dict(os.environ)
    assert command(["predict"]) == 2 and dict(os.environ) == before


def test_a_number_is_given_back(bare):
    before = torch.get_num_threads()
    for asked, number in (("3", 3), ("1", 1)):
        with computing_threads(asked) as facts:
            assert torch.get_num_threads() == number == facts["number"]
        assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), computing_threads("2"):
        1 / 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "value, right",
    [("auto", "auto"), (2, "2"), ("16", "16"), ("1024", "1024")]
    + [(wrong, None) for wrong in ("0", 0, -1, "-1", "1025", "two", "", "1.5", 1.5, True, None, "²")],
)
def test_values(value, right):
    if right:
        assert valid_threads(value) == BaselineConfig(threads=value).threads == right
    else:
        with pytest.raises(UsageError, match="threads must be auto, or a whole number"):
            BaselineConfig(threads=value)


@pytest.mark.parametrize(
    "args",
    [
        ["demo"],
        *(["run", r] for r in ("baseline", "ldmlr", "diffusion", "diffult")),
        ["generate"],
        ["encode"],
        ["predict"],
        ["export"],
    ],
)
def test_every_command_that_computes_has_the_flag(main, args):
    assert "--threads auto|N" in main(*args, "--help")[1]
    code, _, err = main(*args, "--threads", "none")
    assert code == 2 and "threads must be auto, or a whole number from 1 to 1024, got 'none'" in err


# runs
@dataclass(frozen=True)
class Idle(Config):
    "A recipe that does nothing"

    recipe: ClassVar[str] = "idle"
    not_identity: ClassVar[tuple] = ("out", "seeds", "threads")
    seed: int = 0  # the first seed
    seeds: int = limited(1, 1, 1000)  # how many seeds
    device: str = "cpu"  # where
    precision: str = "fp32"  # how
    threads: str = "auto"  # how many
    out: str | None = None  # where the run is kept


def idle(out, **settings):
    "What environment.json says of threads, and torch's number while it ran"
    seen, data = [], SimpleNamespace(fingerprint=lambda: "a1b2")

    def one_seed(cfg, data, seed, *where):
        seen.append(torch.get_num_threads())
        return [{"method": "m", "seed": seed}]

    run = Run(Idle(out=str(out), **settings))
    run.carry_out(lambda seed: data, lambda cfg, data: cfg, one_seed, lambda *what: None)
    there = json.loads((out / "environment.json").read_text())
    assert set(seen) == {there["torch_threads"]} == {there["threads"]["number"]}
    return there["threads"]


def test_a_run_keeps_its_number(bare, tmp_path, capsys):
    "`auto` goes on as the run began; another number is said; the user's own is recorded"
    bare.setattr(threads, "look_at_machine", lambda *a: TWO)
    bare.setattr(Progress, "quiet", False)
    there = idle(tmp_path, threads="1")
    assert there["number"] == 1 and there["why"] == "asked for"
    there = idle(tmp_path, seeds=2)
    assert there["number"] == 1 and there["why"] == "as the run began" and "note" not in capsys.readouterr().err
    there = idle(tmp_path, seeds=3, threads="2")
    assert "was begun with 1 thread and goes on with 2 (asked for): results may differ" in capsys.readouterr().err
    assert there["number"] == 2 and there["begun_with"] == 1
    bare.setenv("OMP_NUM_THREADS", "1")
    there = idle(tmp_path, seeds=4, threads="3")
    assert there["number"] == 1 and there["user"] == {"OMP_NUM_THREADS": "1"}
    assert "OMP_NUM_THREADS=1 decides, not --threads 3" in capsys.readouterr().err
    assert {"number", "asked", "why", "waiting", "user", "cpus", "cores", "quota", "busy"} <= there.keys()
    assert set(there["waiting"]) == {"OMP_WAIT_POLICY", *SPIN}


@pytest.mark.parametrize(
    "text, number",
    [
        ('{"torch_threads": 2}', 2),
        ('{"torch_threads": 1}', 1),
        ("[]", 2),
        ("{", 2),
        ('{"threads": {"number": "x"}}', 2),
    ],
)
def test_an_environment_of_an_earlier_version(bare, tmp_path, text, number):
    bare.setattr(threads, "look_at_machine", lambda *a: TWO)
    bare.setattr(Progress, "quiet", True)
    idle(tmp_path, threads="1")
    (tmp_path / "environment.json").write_text(text)
    assert idle(tmp_path, seeds=2)["number"] == number


@pytest.mark.slow_process
def test_through_the_kernel(tmp_path):
    "The variables reach the kernel before torch, but for those of the user"
    args = [
        "run",
        "baseline",
        "--n-max",
        "30",
        "--imb-ratio",
        "10",
        "--n-epochs",
        "1",
        "--heads",
        "false",
        "--device",
        "cpu",
        "--threads",
        "2",
    ]
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | {"KMP_BLOCKTIME": "5"}
    done = subprocess.run(
        [sys.executable, "-m", "ltnb", *args, "--out", "run"],
        cwd=tmp_path,
        env=env,
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert there["torch_threads"] == there["threads"]["number"] == 2 and there["threads"]["asked"] == "2"
    assert there["threads"]["waiting"] == {"OMP_WAIT_POLICY": None, **SPIN, "KMP_BLOCKTIME": "5"}
    assert there["threads"]["user"] == {"KMP_BLOCKTIME": "5"} and there["threads"]["cpus"]
    notebook = json.loads((tmp_path / "run" / "91_run_baseline.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if "".join(c["source"]) == "start_threads(threads);")
    assert cell["execution_count"], "it ran, before torch was imported"


@pytest.mark.slow_process
def test_a_notebook_of_ones_own():
    "`import ltnb` and its recipes change no variable; `start_threads` does, and says what torch has read of it"
    code = """
import os, json
before = dict(os.environ)
import ltnb, ltnb.core, ltnb.threads, ltnb.data
assert dict(os.environ) == before
early = ltnb.threads.start_threads(2)
for name in {*os.environ} - {*before}: del os.environ[name]
import ltnb.baseline
late = ltnb.threads.start_threads(2)
print(json.dumps([early, late]))
"""
    env = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [SPIN, {}]


def test_files_are_read_by_as_many_threads_as_there_are_processors(monkeypatch):
    from ltnb import threads

    for cpus, quota, want in ((range(64), None, 8), (range(2), None, 2), (range(64), 1.5, 2), (range(1), 0.2, 1)):
        machine = threads.Machine(tuple(cpus), len(cpus), quota)
        monkeypatch.setattr(threads, "look_at_machine", lambda seconds=0, machine=machine: machine)
        assert threads.reading_threads() == want
