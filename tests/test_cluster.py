"""On a Ray cluster of two nodes on this machine: the same bytes as without, whatever is killed.

`AIMFAIR_KILLS=200 pytest -m slow tests/test_cluster.py -k random` kills ten times as often as the suite does."""

import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pace import slowness
from PIL import Image

from aimfair import cli
from aimfair.device import ClusterError, ray_address
from aimfair.repro import InProcess, Resources, Train, fitting, learning_memory, load_profile, resources_of, run_jobs
from aimfair.synthesis import SynthesisConfig, synthesize

ROOT = Path(__file__).resolve().parent.parent
TINY = {"data.n": 80, "data.n_train": 200, "data.n_val": 40, "data.n_test": 80, "synthetic.kind": "studio", "synthetic.pool": 44,
        "synthetic.per_group": 20, "train.epochs": 2, "finetune.epochs": 1, "train.batch_size": 16, "finetune.batch_size": 16,
        "train.steps": None, "finetune.steps": None, "mask.batch_size": 16, "synthetic.held_out": 4, "run.tune": False}
RUN = f"""
import sys
from aimfair.experiments import run
run("toy", seeds=2, settings={TINY!r}, store=sys.argv[1], on=sys.argv[2] or None, workers=2, progress=False)
"""


def without_ray():
    "The environment, without what other tests have said of Ray."
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


DRIVERS = []


def driver(store, on=""):
    "A process that computes the strategies of the tiny profile."
    env = without_ray() | {"OMP_NUM_THREADS": "1"}
    DRIVERS.append(subprocess.Popen([sys.executable, "-c", RUN, str(store), on], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    return DRIVERS[-1]


def finish(process):
    errors = process.communicate(timeout=500)[1]
    assert process.returncode == 0, errors[-2000:]


def done(store):
    "When each artifact that is there was finished, and what was noted of it."
    return {p.parent.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(store).glob("*/*/artifact.json")
            if p.parent.suffix != ".partial"}


def contents(store):
    "A digest of every file of every artifact, but of what is noted of the time it took."
    files = [p for stage in ("faces", "train", "gradients", "finetune", "predictions") for p in sorted(Path(store).glob(f"{stage}/*/**/*"))]
    return {p.relative_to(store).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
            if p.is_file() and p.name != "artifact.json" and not p.relative_to(store).parts[1].endswith((".partial", ".lock"))}


def wait_for(ready, process=None, seconds=300):
    end = time.monotonic() + seconds
    while not ready() and (process is None or process.poll() is None):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A store that this machine filled by itself."
    store = tmp_path_factory.mktemp("alone") / "runs"
    finish(driver(store))
    assert len(done(store)) > 20
    return store


def patiently(start, times=4):
    "What `start` returns. Ray waits half a minute for a node, which is little on a busy machine; what is left of one that came late ends."
    import psutil
    for turn in range(times):
        before = set(psutil.Process().children())
        try:
            return start()
        except Exception:
            for process in set(psutil.Process().children()) - before:
                process.kill()
            if turn == times - 1:
                raise


class TwoNodes:
    "A head and one more node, each with one core."

    def __init__(self):
        from ray.cluster_utils import Cluster
        self.how = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**self.how, "include_dashboard": False}))
        self.on, self.second = f"ray={self.cluster.address}", None
        self.mend()

    def lose_a_node(self):
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def mend(self):
        if self.second is None:
            self.second = patiently(lambda: self.cluster.add_node(**self.how))

    def workers(self):
        "Processes of these nodes that run a job or an actor, by what they run."
        import psutil
        found = {}
        for node in filter(None, (self.cluster.head_node, self.second)):
            raylet = node.all_processes["raylet"][0].process.pid
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end meanwhile
                for process in psutil.Process(raylet).children():
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") and not re.search("IDLE|Agent", title):
                        found[process] = title
        return found


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    nodes = TwoNodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def two_nodes(cluster):
    "Both are there and idle, however the test before ended."
    yield cluster
    for process in DRIVERS:
        process.kill()
        process.wait()
    DRIVERS.clear()
    cluster.mend()


@pytest.mark.slow
class TestTwoNodes:
    def test_they_compute_the_same_bytes(self, alone, two_nodes, tmp_path):
        finish(driver(tmp_path, two_nodes.on))
        assert contents(tmp_path) == contents(alone)

    def test_a_lost_node_changes_nothing(self, alone, two_nodes, tmp_path):
        process = driver(tmp_path, two_nodes.on)
        wait_for(lambda: len(done(tmp_path)) >= 8, process)
        before = done(tmp_path)
        two_nodes.lose_a_node()
        finish(process)
        two_nodes.mend()
        assert contents(tmp_path) == contents(alone)
        assert before.items() <= done(tmp_path).items(), "what was finished is not made again"

    def test_a_killed_driver_goes_on(self, alone, two_nodes, tmp_path):
        process = driver(tmp_path, two_nodes.on)
        wait_for(lambda: len(done(tmp_path)) >= 8, process)
        process.kill()
        process.communicate()
        wait_for(lambda: not two_nodes.workers(), seconds=60)
        before = done(tmp_path)
        assert 8 <= len(before) < len(done(alone))
        finish(driver(tmp_path, two_nodes.on))
        assert contents(tmp_path) == contents(alone)
        assert before.items() <= done(tmp_path).items(), "what was finished is not made again"

    def test_random_kills_change_no_byte_and_leave_no_lock(self, alone, two_nodes, tmp_path):
        "Drivers, workers and nodes, with both executors, at any moment; a store that is full is compared, and a new one begun."
        kills, chance, whole, store = int(os.environ.get("AIMFAIR_KILLS", 20)), random.Random(5), contents(alone), tmp_path / "0"
        counts = {"driver": 0, "worker": 0, "node": 0}
        while sum(counts.values()) < kills:
            on = chance.choice(["", two_nodes.on])
            process = driver(store, on)
            while process.poll() is None:  # a job that was lost again and again ends it, too
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(1, 12))
                    break
                victim = chance.choice(["driver", "worker", "worker", "node"] if on else ["driver"])
                counts[victim] += 1
                if victim == "worker":
                    for worker in list(two_nodes.workers())[:1]:
                        worker.kill()
                elif victim == "node":
                    two_nodes.lose_a_node()
                    two_nodes.mend()
                else:
                    process.kill()
            process.communicate()
            if len(done(store)) == len(done(alone)):
                assert contents(store) == whole, f"{store} after {counts}"
                store = tmp_path / str(int(store.name) + 1)
        finish(driver(store))
        assert contents(store) == whole, f"{store} after {counts}"
        print(f"{counts}, {int(store.name) + 1} stores, no byte differs")

    def test_a_failed_job_is_told_as_on_this_machine(self, two_nodes, tmp_path):
        settings = [f"{k}={'none' if v is None else str(v).lower()}" for k, v in (TINY | {"mask.ks": [1]}).items()]
        out = subprocess.run([sys.executable, "-m", "aimfair.cli", "reproduce", "--only", "ablation_top_k", "--only", "layer_sensitivity",
                              "--seeds", "1", *(part for text in settings for part in ("--set", text)), "--on", two_nodes.on,
                              "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
        assert out.returncode == 1 and "failed: ablation_top_k" in out.stderr and "k=1 selects no tensor" in out.stderr, out.stderr[-3000:]
        (log,) = (tmp_path / "out" / "failed").glob("*.log")
        assert f"in full: {log}" in out.stderr
        text = log.read_text()
        assert ", in run_job" in text and "k=1 selects no tensor" in text and '"batch_size"' in text
        assert (tmp_path / "out" / "layer_sensitivity.md").is_file()


SET = """
import sys, warnings
from aimfair.synthesis import SynthesisConfig, crew, synthesize
with crew("bundled", on=sys.argv[2], config=SynthesisConfig(batch_size=4, steps=12)) as actors:
    synthesize("toy-smiling-male", generator=actors, per_group=24, out=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_a_lost_actor_is_replaced_and_the_set_is_that_of_one_process(two_nodes, tmp_path):
    alone = synthesize("toy-smiling-male", per_group=24, out=tmp_path / "one", config=SynthesisConfig(batch_size=4, steps=12),
                       progress=False, device="cpu")
    made = tmp_path / "two"
    process = subprocess.Popen([sys.executable, "-c", SET, str(made), two_nodes.on], env=without_ray(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(made.glob("*_*/*.png"))) >= 16, process)
    before = {p: p.stat().st_mtime_ns for p in made.glob("*_*/*.png")}
    assert 16 <= len(before) < 96
    next(process for process, title in two_nodes.workers().items() if "Renderer" in title).kill()
    finish(process)
    assert pd.read_parquet(made / "manifest.parquet").equals(alone)
    for file in alone.file:
        pair = [np.asarray(Image.open(tmp_path / name / file), int) for name in ("one", "two")]
        assert np.abs(pair[0] - pair[1]).max() <= 2, file  # other sums, in another order
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "images that were there are not made again"
    lines = [json.loads(line) for f in made.rglob("*.jsonl") for line in f.read_text().splitlines() if line]
    assert len(lines) == len({(r["group"], r["index"], r["attempt"]) for r in lines}) == 96


NOTHING = """
from dataclasses import dataclass

from aimfair.repro import Artifact, Job, Work


@dataclass(frozen=True)
class Nothing(Job):
    number: int
    stage, work = "nothing", Work(seen=1)

    @property
    def artifact(self):
        return Artifact("nothing", {"number": self.number})

    def make(self, folder, store):
        (folder / "number").write_text(str(self.number))
"""
OVERHEAD = NOTHING + """
import sys, time
from aimfair.device import ray_cluster
from aimfair.repro import OnRay, run_jobs
with ray_cluster(sys.argv[2]) as ray:
    for turn in range(4):
        jobs = {job.artifact.hash: job for job in map(Nothing, range(100 * turn, 100 * turn + 100))}
        start = time.perf_counter()
        failed = run_jobs(jobs, dict.fromkeys(jobs, 1.0), sys.argv[1], OnRay(ray))
        assert not failed, next(iter(failed.values()))
        print((time.perf_counter() - start) / 100)
"""  # the first turn starts the workers


def test_an_empty_job_costs_little(tmp_path):
    names, took = {"__name__": "nothing"}, []
    exec(NOTHING, names)
    for turn in range(3):
        jobs = {job.artifact.hash: job for job in map(names["Nothing"], range(50 * turn, 50 * turn + 50))}
        start = time.perf_counter()
        assert run_jobs(jobs, dict.fromkeys(jobs, 1.0), tmp_path, InProcess()) == {}
        took.append((time.perf_counter() - start) / 50)
    assert min(took) < 0.02 * slowness()


@pytest.mark.slow
def test_an_empty_job_costs_little_on_a_cluster(two_nodes, tmp_path):
    out = subprocess.run([sys.executable, "-c", OVERHEAD, str(tmp_path), two_nodes.on], env=without_ray(), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert min(map(float, out.stdout.split())) < 0.05 * slowness(), out.stdout


class TestWhatAJobAsksFor:
    train = Train(load_profile("toy").protocol, "real", 100)

    def test_small_networks_share_a_gpu_and_large_ones_have_it_alone(self):
        takes = learning_memory(self.train)
        assert [resources_of(self.train, int(takes * times)).gpus for times in (1.0, 2.6, 5.2)] == [1.0, 0.5, 0.25]
        assert resources_of(self.train) == (1, 0.0, resources_of(self.train).memory)

    def test_memory_is_at_least_what_the_activations_of_a_batch_take(self):
        "Counted anew, by torch's own hooks for tensors that are saved for the backward pass."
        import torch

        from aimfair.models import create_model
        model, protocol = create_model("toy_resnet18"), self.train.protocol
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t):
            model(torch.rand(4, 3, protocol.data.size, protocol.data.size)).sum().backward()
        needed = 4 * sum(kept.values()) / 4 * self.train.configuration.batch_size
        assert needed <= learning_memory(self.train) <= 8 * needed

    def test_nobody_asks_for_more_than_the_largest_node_has(self):
        assert fitting(Resources(8, 0.5, 10**10), [{"CPU": 4.0, "memory": 2e9}, {"CPU": 2.0, "memory": 4e9}]) == (4, 0.5, 4 * 10**9)


class TestPlaces:
    @pytest.mark.parametrize("on", ["slurm", "ray=", "=ray", "rays=auto", "ray:auto"])
    def test_a_place_that_is_none_is_told_in_a_line(self, on):
        with pytest.raises(ClusterError, match="expected ray, or ray=ADDRESS"):
            ray_address(on)

    @pytest.mark.parametrize("command", [["reproduce"], ["synthesize", "--prompts", "toy-smiling-male", "--per-group", "1", "--out", "x"]])
    def test_no_ray_and_no_cluster_are_told_in_a_line(self, tmp_path, command, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
        for on, words in {"ray": "pip install 'aimfair[ray]'", "ray=localhost:9": "no Ray cluster answers at localhost:9"}.items():
            assert cli.main([*command, "--on", on]) == 2
            said = capsys.readouterr().err
            assert words in said.strip().splitlines()[-1] and "Traceback" not in said, said
