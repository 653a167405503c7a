"One model in several processes: the numbers of one, and nobody left waiting. Run as a script, this file is one of them."
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faults import kill_when
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from aimfair.baselines import GroupDRO
from aimfair.data import Augment, Faces
from aimfair.device import seeded
from aimfair.models import narrow_resnet18
from aimfair.sensitivity import gradient_pass
from aimfair.training import TrainConfig, alone, current_ranks, distributed, fit, once, predict_logits

QUIET = {"device": "cpu", "progress": False}


def faces(n, seed=0, size=12):
    rng = np.random.default_rng(seed)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8), rng.integers(0, 2, n))


class Small(nn.Module):
    "Two layers with batch norm, in double precision; it notes the images that it is trained on by their mean."

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.Linear(4, 1))
        self.unused = nn.Parameter(torch.ones(2))
        self.seen = []

    def forward(self, x):
        if self.training:
            self.seen.append(x.detach().mean((1, 2, 3)))
        return self.head(self.body(x.double()).view(len(x), -1))


def small(**options):
    with seeded(0):
        return Small(**options).double()


def exact(logits, y, rows):
    "Cross-entropy in double precision."
    return F.binary_cross_entropy_with_logits(logits[:, 0].double(), y.double())


CONFIG = TrainConfig(epochs=3, batch_size=8, lr=0.1, momentum=0.9, weight_decay=1e-2, milestones=(2,), scale=(0.5, 1.0))
EVERYTHING = TrainConfig(epochs=3, batch_size=16, accumulate=3, clip=0.05, optimizer="adamw", lr=0.01, schedule="cosine", warmup=0.2,
                         layer_decay=0.8, steps=10)
PART = {"body.0.weight": (torch.arange(6) < 3).reshape(6, 1, 1, 1), "head.3.weight": torch.tensor(True)}


def found(fitted, **more):
    "What a training came to, as tensors."
    state = {f"weight {n}": v for n, v in fitted.model.state_dict().items()}
    best = {f"best {name} {n}": v for name, b in fitted.best.items() for n, v in b.state.items()}
    history = {f"history {c}": torch.tensor(fitted.history[c].to_numpy(float)) for c in fitted.history}
    return {**state, **best, **history, "epoch": torch.tensor(fitted.best_epoch), **more}


def plain():
    "The last batch holds two images, so that one of three processes has none."
    fitted = fit(small(), faces(34), faces(21, 1), config=CONFIG, loss_fn=exact, **QUIET)
    return found(fitted, logits=torch.from_numpy(predict_logits(fitted.model, faces(50, 2), batch_size=7, device="cpu")))


def everything():
    "Pieces, a largest gradient, unequal probabilities, a second figure, Adam."
    return found(fit(small(), faces(37), faces(21, 1), config=EVERYTHING, loss_fn=exact, sampling=np.arange(37) + 1.0,
                     criteria={"certainty": lambda z: float(abs(z).mean())}, **QUIET))


def part():
    return found(fit(small(), faces(34), None, config=CONFIG, loss_fn=exact, trainable=PART, **QUIET))


def frozen():
    return found(fit(small(), faces(34), None, config=CONFIG, loss_fn=exact, freeze_batchnorm=True, **QUIET))


def of_groups():
    "A loss that is no mean over images, and that remembers."
    dro = GroupDRO(small(), np.arange(34) % 4, step=0.5)
    return found(fit(dro, faces(34), None, config=CONFIG, loss_fn=lambda z, y, rows: dro.loss(z.double(), y, rows), **QUIET))


def penalised():
    "A loss that looks at the weights themselves."
    model = small()
    return found(fit(model, faces(34), None, config=CONFIG, **QUIET,
                     loss_fn=lambda z, y, rows: exact(z, y, rows) + model.head[3].weight.square().sum()))


def gradients():
    return gradient_pass(small(), faces(40), batch_size=13, augment=Augment(), passes=2, accumulate=2, device="cpu")


def in_float32():
    "Five steps of a deep network; many more of them blow up any last digit."
    with seeded(0):
        model = narrow_resnet18(8)
    config = TrainConfig(epochs=1, batch_size=16, lr=0.01, scale=(0.5, 1.0))
    return found(fit(model, faces(80, size=32), faces(21, 1, size=32), config=config, **QUIET))


def each_once():
    "Which images a pass has shown: those of the losses, and those that went through the network of this process."
    rows, model, number = [], small(), np.arange(34, dtype=np.uint8)
    shades = Faces.from_arrays(np.tile(number[:, None, None, None], (1, 3, 12, 12)), number % 2)

    def loss_fn(z, y, of):
        rows.append(of)
        return exact(z, y, of)

    fit(model, shades, None, config=CONFIG.model_copy(update={"epochs": 1, "scale": (1.0, 1.0), "flip": 0.0}), loss_fn=loss_fn, **QUIET)
    through = [((x + 1) * 127.5).round().long() for x in model.seen]
    return {"rows": rows, "through": through}


def other_seeds():
    "Noise of dropout differs between processes, the weights don't."
    model, kept = small(dropout=0.5), []
    model.head[2].register_forward_hook(lambda module, given, out: kept.append(out.detach() != 0) if module.training else None)
    fitted = fit(model, faces(16), None, config=CONFIG.model_copy(update={"epochs": 1}), loss_fn=exact, **QUIET)
    return {"kept": kept, **fitted.model.state_dict()}


def refusals():
    "What all processes are told alike."
    ranks = current_ranks()
    told = {}
    for name, ask in {
        "settings": lambda: fit(small(), faces(34), None, config=CONFIG, seed=ranks.rank, **QUIET),
        "images": lambda: fit(small(), faces(34, seed=ranks.rank), None, config=CONFIG, **QUIET),
        "batch": lambda: fit(small(), faces(34), None, config=CONFIG.model_copy(update={"batch_size": 4, "accumulate": 4}), **QUIET),
        "mask": lambda: fit(small(), faces(34), None, config=CONFIG, trainable={"nothing"}, **QUIET),
        "callback": lambda: fit(small(), faces(34), None, config=CONFIG, callback=lambda *told: 1 / 0, **QUIET),
        "device": lambda: fit(small(), faces(34), None, config=CONFIG, device="cuda"),
    }.items():
        try:
            ask()
            told[name] = "nothing"
        except (ValueError, ZeroDivisionError, ChildProcessError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    with alone():  # one process may do something by itself
        mine = fit(small(), faces(34), None, config=CONFIG, seed=ranks.rank, **QUIET)
    return {"told": told, "loss": mine.history.loss.tolist(), "first": once(lambda: ranks.rank)}


SAME = [plain, everything, part, frozen, of_groups, penalised, gradients, in_float32]
ALSO = [each_once, other_seeds, refusals]


# processes

def take_part(folder, *names):
    "What one of several processes does."
    torch.set_num_threads(1)
    made = {}
    for name in names:
        with distributed("cpu", timeout=60) as ranks:
            made[name] = globals()[name]()
    torch.save(made, Path(folder) / f"{ranks.rank}.pt")


def start(n, *words, program=(__file__,), **options):
    "Start processes as torchrun would."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, *program, *map(str, words)], stderr=subprocess.PIPE, text=True, **options,
                             env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]


def ended(processes, timeout=240):
    "Exit codes and last lines of what was said, without the rank that PyTorch writes before them."
    said = [p.communicate(timeout=timeout)[1] for p in processes]
    last = [(text.strip().splitlines() or [""])[-1] for text in said]
    return [(p.returncode, re.sub(r"^\[rank\d\]: ", "", line)) for p, line in zip(processes, last, strict=True)]


def together(n, folder, *names):
    folder.mkdir()
    ends = ended(start(n, "take_part", folder, *names))
    assert [code for code, _ in ends] == [0] * n, ends
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(n)]


@pytest.fixture(scope="module")
def one():
    return {f.__name__: f() for f in SAME}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, tmp_path_factory.mktemp("two") / "run", *(f.__name__ for f in SAME + ALSO))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return together(3, tmp_path_factory.mktemp("three") / "run", *(f.__name__ for f in SAME + ALSO))


def check_same_as_one(found, one, name):
    assert all(ours.keys() == one.keys() for ours in found)
    tolerance = 5e-5 if name == "in_float32" else 1e-9
    for key, value in one.items():
        assert all(np.array_equal(found[0][key], ours[key], equal_nan=True) for ours in found), f"processes differ in {key}"
        assert torch.allclose(found[0][key].double(), value.double(), rtol=tolerance, atol=tolerance, equal_nan=True), key


@pytest.mark.parametrize("name", [f.__name__ for f in SAME])
def test_two_processes_are_one(one, two, name):
    check_same_as_one([found[name] for found in two], one[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.__name__ for f in SAME])
def test_three_processes_are_one(one, three, name):
    check_same_as_one([found[name] for found in three], one[name], name)


def check_each_once(found):
    for of_rank in found:
        assert all(torch.equal(a, b) for a, b in zip(of_rank["rows"], found[0]["rows"], strict=True))
    rows = found[0]["rows"]
    assert [len(r) for r in rows] == [8, 8, 8, 8, 2] and sorted(torch.cat(rows).tolist()) == list(range(34))
    for step, whole in enumerate(rows):
        shares = [len(whole) * (r + 1) // len(found) - len(whole) * r // len(found) for r in range(len(found))]
        own = [of_rank["through"][step][:n] for of_rank, n in zip(found, shares, strict=True)]
        assert torch.equal(torch.cat(own), whole)
        assert all(len(of_rank["through"][step]) == max(n, 1) for of_rank, n in zip(found, shares, strict=True))


def test_each_image_goes_through_one_process_once_a_pass(two):
    check_each_once([found["each_once"] for found in two])


@pytest.mark.slow
def test_three_processes_cover_the_set_once(three):
    check_each_once([found["each_once"] for found in three])


def test_a_mask_holds_still_every_bit(two):
    before = small().state_dict()
    for found in two:
        after = {n: found["part"][f"weight {n}"] for n in before}
        assert torch.equal(after["body.0.weight"][3:], before["body.0.weight"][3:])
        assert not torch.equal(after["body.0.weight"][:3], before["body.0.weight"][:3])
        still = [n for n in before if n not in PART and "running" not in n and "batches" not in n]
        assert still and all(torch.equal(after[n], before[n]) for n in still)


def test_frozen_statistics_stay(two):
    assert all(torch.equal(two[0]["frozen"][f"weight {n}"], v) for n, v in small().named_buffers())


def test_each_process_draws_dropout_of_its_own(two):
    first, second = (found["other_seeds"] for found in two)
    assert not all(torch.equal(a, b) for a, b in zip(first["kept"], second["kept"], strict=True))
    assert all(torch.equal(first[n], second[n]) for n in small(dropout=0.5).state_dict())


def test_what_cannot_be_shared_is_refused_in_a_line(two):
    first, second = (found["refusals"] for found in two)
    for told in (first["told"], second["told"]):
        assert all("\n" not in line for line in told.values())
        assert told["settings"].startswith("ValueError: the 2 processes differ in what they train; all of them have to make the same calls")
        assert told["images"].startswith("ValueError: the 2 processes differ in what they train")
        assert told["batch"].startswith("ValueError: batch_size = 4 in 4 pieces is shared by 2 processes, and each needs an image")
        assert told["mask"].startswith("ValueError: Small has no parameter 'nothing'")
        assert told["device"].startswith("ValueError: device is ")
    assert first["told"]["callback"] == "ZeroDivisionError: division by zero"
    assert second["told"]["callback"] == "ChildProcessError: the first process stopped: division by zero"
    assert first["loss"] != second["loss"] and first["first"] == second["first"] == 0


# killed, and gone on with

def go_on(checkpoint, out, stop):
    "A run that the callback ends after so many epochs, or that ends by itself."
    torch.set_num_threads(1)
    left = iter(range(int(stop)))

    def callback(*told):
        if next(left, None) is None:
            os._exit(9)

    with distributed("cpu", timeout=60) as ranks:
        fitted = fit(small(), faces(34), faces(21, 1), config=CONFIG.model_copy(update={"epochs": 5}), loss_fn=exact, checkpoint=checkpoint,
                     callback=callback, **QUIET)
    torch.save(found(fitted), f"{out}{ranks.rank}.pt")


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path):
    whole = found(fit(small(), faces(34), faces(21, 1), config=CONFIG.model_copy(update={"epochs": 5}), loss_fn=exact, **QUIET))
    file, out = tmp_path / "run.pt", tmp_path / "out"
    for n, epochs in ((2, 1), (1, 1), (3, 9)):
        ends = ended(start(n, "go_on", file, out, epochs))
        stopped = epochs < 9
        assert ends[0][0] == (9 if stopped else 0), ends
        assert all(code == (1 if stopped else 0) for code, _ in ends[1:]), ends
        assert all(said.startswith("ChildProcessError: another process has failed or left") for code, said in ends if code == 1)
        assert len(torch.load(file, weights_only=True)["history"]) == (5 if not stopped else 2 if n == 2 else 4)
    check_same_as_one([torch.load(f"{out}{rank}.pt", weights_only=True) for rank in range(3)], whole, "resumed")


def fail_alone(kind):
    "One process fails in the middle of an epoch, or does not come; the others are in a collective call."
    torch.set_num_threads(1)
    left, rank = iter(range(3)), int(os.environ["RANK"])

    def loss_fn(logits, y, rows):
        if next(left, None) is None and rank == 1:
            if kind == "late":
                time.sleep(15)
            raise KeyError("memory of an image")
        return exact(logits, y, rows)

    with distributed("cpu", timeout=600 if kind == "early" else 5):
        try:
            fit(small(), faces(34), None, config=CONFIG, loss_fn=loss_fn, **QUIET)
        except ChildProcessError as error:
            sys.exit(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("kind, said", [("early", "has failed or left (Connection closed"), ("late", "did not come in time (Timed out")])
def test_nobody_waits_for_a_process_that_failed(kind, said):
    first, second = ended(start(2, "fail_alone", kind))
    assert first[0] == 1 and first[1].startswith(f"another process {said}"), first
    assert second == (1, "KeyError: 'memory of an image'")


def of_the_program():
    "A process group that the program has made is used, and left as it is."
    dist.init_process_group("gloo")
    with distributed("cpu") as ranks:
        assert (ranks.size, current_ranks()) == (2, ranks)
        with distributed() as same:
            assert same == ranks
    assert dist.is_initialized() and current_ranks().size == 1
    fit(small(), faces(34), None, config=CONFIG, seed=ranks.rank, **QUIET)  # outside, each works by itself
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_group_of_the_program_is_used():
    assert [code for code, _ in ended(start(2, "of_the_program"))] == [0, 0]


# the command

@pytest.fixture
def photos(tmp_path):
    "Photos of noise by class, synthetic ones by group, and a network that knows nothing of them."
    def noise(folder, n, light):
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng([light, i]).integers(0, 156, (32, 32, 3)) + light
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")

    for t in (0, 1):
        noise(tmp_path / "real" / str(t), 32, 40 * t)
        for p in (0, 1):
            noise(tmp_path / "synthetic" / f"{t}_{p}", 52, 40 * t + 50 * p)
    with seeded(0):
        torch.save(narrow_resnet18(8).state_dict(), tmp_path / "biased.pt")
    (tmp_path / "net.py").write_text("from aimfair.models import narrow_resnet18\n\ndef build():\n    return narrow_resnet18(8)\n")
    return tmp_path


DEBIAS = ("debias --model net.py:build --weights biased.pt --real real --val real --synthetic synthetic --majority 0_1,1_0 --size 32 "
          "--epochs 2 --batch-size 16 --lr 0.001 --crop 0.5 --device cpu --out").split()


def command(home, processes, *words):
    "An `aimfair` command, started by torchrun where there are several processes; paths are those of its folder."
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.run([sys.executable, *by, "-m", "aimfair.cli", *words], cwd=home, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "AIMFAIR_CACHE": str(home / "cache")})


def check_same_model(home, ours, theirs):
    "In float32 last digits grow from step to step: what training changed has to be the same but for a hundredth."
    before = torch.load(home / "biased.pt", weights_only=True)
    ours, theirs = (load_file(home / out / "model.safetensors") for out in (ours, theirs))
    moved, apart = (sum(float((a[n].double() - b[n].double()).square().sum()) for n in before) ** 0.5
                    for a, b in ((ours, before), (ours, theirs)))
    assert apart < moved / 100


@pytest.mark.slow
def test_debias_under_torchrun_writes_once_what_one_process_writes(photos):
    done = {out: command(photos, n, *DEBIAS, out) for out, n in (("alone", 1), ("shared", 2))}
    assert all(run.returncode == 0 for run in done.values()), done
    assert [run.stdout.count(f"{out} is done") for out, run in done.items()] == [1, 1]
    assert done["shared"].stderr.count("aimfair: warning") == done["alone"].stderr.count("aimfair: warning") > 0
    names = [sorted(p.name for p in (photos / out).iterdir()) for out in done]
    assert names[0] == names[1] and not (photos / "shared.partial").exists()
    check_same_model(photos, "alone", "shared")
    assert (photos / "alone" / "mask.json").read_text() == (photos / "shared" / "mask.json").read_text()
    again = command(photos, 2, *DEBIAS, "shared")
    assert again.returncode == 0 and again.stdout.count("shared was done already") == 1
    other = command(photos, 2, *DEBIAS, "shared", "--seed", "1")
    assert other.returncode == 1 and "aimfair, process 0 of 2: shared holds a result with other options (seed was 0, is 1)" in other.stderr
    assert "aimfair/cli" not in other.stderr  # no traceback of ours


@pytest.mark.slow
def test_a_killed_debias_goes_on_in_another_number_of_processes(photos):
    auto = [*DEBIAS[:-1], "--k", "auto", "--epochs", "1", "--out"]
    assert command(photos, 1, *auto, "whole").returncode == 0
    processes = start(2, *auto, "out", program=("-m", "aimfair.cli"), cwd=photos)
    candidates = photos / "out.partial" / "checkpoint" / "candidates"
    assert kill_when(processes[0], lambda: candidates.is_dir() and len(list(candidates.glob("*.pt"))) > 1)
    assert ended(processes[1:])[0][1].startswith("aimfair, process 1 of 2: another process has failed or left")
    done = command(photos, 3, *auto, "out")
    assert done.returncode == 0, done.stderr
    check_same_model(photos, "whole", "out")


@pytest.mark.slow
def test_other_commands_are_not_shared(tmp_path):
    refused = command(tmp_path, 2, "prompts", "list")
    assert "aimfair prompts is work for one process, and torchrun has started 2; they share debias alone" in refused.stderr
    assert refused.returncode == 1 and not refused.stdout and not list(tmp_path.iterdir())


def test_without_torchrun_nothing_is_shared():
    with distributed("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
    assert not dist.is_initialized()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
