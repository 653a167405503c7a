"What only a GPU can show is checked there; here the check runs at tiny size on a CPU, and says so where it is asked for without a GPU."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aimfair import gpu_check as check
from aimfair.gpu_check import CHECKS, TINY, Figure, cosine, gpu_check, gpu_table, main, overlap, ramps, write_figures
from aimfair.layouts import LAYOUTS, TINY_LAYOUTS, clip_tokenizer, made_on, modules_of, random_pipeline

CPU = torch.device("cpu")
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")


# ---- the command ----------------------------------------------------------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize("arguments, found", [([], "PyTorch sees no GPU on this machine"), (["--device", "cpu"], "PyTorch sees no GPU"),
                                              (["--device", "cuda:3"], "device is 'cuda:3', which this machine has not")])
def test_without_a_gpu_it_is_one_line_and_nothing_is_written(arguments, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert found in err and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


@needs_no_gpu
def test_make_gpu_check_says_that_there_is_no_gpu(repository):
    ran = subprocess.run(["make", "--silent", "--old-file", ".venv/.installed", "gpu-check", f"BIN={Path(sys.executable).parent}", "ARGS="],
                         cwd=repository, env={**NO_GPU, "PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and not ran.stdout
    first, *rest = ran.stderr.splitlines()
    assert first.startswith("aimfair: PyTorch sees no GPU") and "--device cpu --tiny" in first
    assert all(line.startswith("make") for line in rest)
    told = subprocess.run(["make", "help"], cwd=repository, capture_output=True, text=True, timeout=60).stdout
    assert "make gpu-check" in told


def test_a_cpu_that_is_asked_for_beside_a_gpu_is_named_as_such(monkeypatch, capsys):
    real = check.pick_device
    monkeypatch.setattr(check, "pick_device", lambda device=None: torch.device("cuda") if device is None else real(device))
    assert main(["--device", "cpu"]) == 2
    assert "a CPU was asked for" in capsys.readouterr().err


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    def broken(size, device): raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(check, "CHECKS", {"one": broken, "two": lambda size, device: [Figure("two", "speed", 7, "images a second")]})
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu")]) == 1
    out, err = capsys.readouterr()
    assert err.strip() == "aimfair: not as it should be: one: failed: no kernel image is available"
    assert "images a second" in out
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert [(f["check"], f["value"], f["holds"]) for f in told["figures"]] == [("one", None, False), ("two", 7, None)]


def test_an_interruption_is_no_failed_check(monkeypatch):
    def stopped(size, device): raise KeyboardInterrupt

    monkeypatch.setattr(check, "CHECKS", {"one": stopped})
    with pytest.raises(KeyboardInterrupt):
        gpu_check("cpu", tiny=True, progress=lambda text: None)


# ---- what is written down -------------------------------------------------------------------------------------------------------------


def test_the_files_name_the_machine_and_every_unit(tmp_path):
    figures = [Figure("training", "decoded faces", 12345.678, "images a second"), Figure("precision", "same", 0.5, "share", least=0.95),
               Figure("memory", "peak", float("nan"), "GiB")]
    table = write_figures(figures, tmp_path / "gpu", device=CPU, tiny=False)
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert {"Processor", "GPU", "device", "torch"} <= told["machine"].keys() and told["tiny"] is False
    assert [(f["value"], f["unit"], f["holds"]) for f in told["figures"]] == [(12345.7, "images a second", None), (0.5, "share", False),
                                                                             (None, "GiB", None)]
    text = (tmp_path / "gpu.md").read_text()
    assert "12,346" in text and "at least 0.95" in text and told["machine"]["torch"] in text and "tiny" not in text
    assert table.frame["Holds"].tolist() == ["", "no", ""]
    assert "tiny" in str(write_figures(figures, tmp_path / "tiny", device=CPU, tiny=True)) and "–" in str(gpu_table(figures))


@pytest.mark.parametrize("value, least, most, holds", [(1, None, None, None), (1, 1, None, True), (1, 2, None, False), (1, None, 1, True),
                                                       (2, None, 1, False), (2, 1, 3, True), (float("nan"), None, 3, False)])
def test_a_figure_holds_within_its_bounds(value, least, most, holds):
    assert Figure("c", "f", value, "s", least, most).holds is holds


# ---- the parts ------------------------------------------------------------------------------------------------------------------------


def test_ramps_show_class_and_group():
    faces = ramps(20, 16, brighter=30)
    x = faces.gather(slice(None)).numpy().astype(float)
    sideways, down = x.mean((1, 2)), x.mean((1, 3))  # N x W, N x H
    slope = [np.polyfit(np.arange(16), rows.T, 1)[0] for rows in (sideways, down)]
    assert ((slope[1] > slope[0]) == (faces.target == 1)).all()
    red = x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2))
    assert ((red > 25) == (faces.protected == 1)).all()
    assert x.mean() - ramps(20, 16).gather(slice(None)).numpy().mean() == 30


def test_cosine_and_overlap():
    g = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2)}
    flat = np.concatenate([g["w"].numpy().ravel(), g["b"].numpy()])
    other = {"w": g["w"] + 1, "b": -g["b"]}
    moved = np.concatenate([other["w"].numpy().ravel(), other["b"].numpy()])
    assert cosine(g, other) == pytest.approx(flat @ moved / np.linalg.norm(flat) / np.linalg.norm(moved), rel=1e-6)
    assert cosine(g, {n: -v for n, v in g.items()}) == pytest.approx(-1) and (overlap({1}, {1}), overlap({1}, {2})) == (1, 0)


PUBLISHED = {  # weights of the parts, as the published files have them
    "Stable Diffusion 2.1": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "Stable Diffusion XL": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "Stable Diffusion 3": {"transformer": 2_028_328_000, "vae": 83_819_683, "text_encoder": 123_060_480 + 768 * 768,
                           "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_have_the_published_numbers_of_weights(name):
    with made_on("meta", torch.bfloat16):
        parts = modules_of(LAYOUTS[name], [clip_tokenizer()] * 2)
    assert {n: sum(p.numel() for p in part.parameters()) for n, part in parts.items()} == PUBLISHED[name]
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", TINY_LAYOUTS)
def test_generators_are_the_same_every_time_and_draw_in_bfloat16(name):
    one, other = (random_pipeline(TINY_LAYOUTS[name], CPU, torch.bfloat16) for _ in range(2))
    assert type(one).__name__ == LAYOUTS[name].pipeline and one.dtype == torch.bfloat16
    parts = [n for n, part in one.components.items() if isinstance(part, torch.nn.Module)]
    assert all(torch.equal(a, b) for n in parts for a, b in zip(getattr(one, n).parameters(), getattr(other, n).parameters(), strict=True))
    assert check._rendered(one, 2, 2, TINY)[0] == 2


def test_a_batch_is_halved_until_it_fits_and_the_pipeline_is_as_before():
    pipe = random_pipeline(TINY_LAYOUTS["Stable Diffusion 2.1"], CPU)
    with check.little_memory(pipe, CPU, 0) as tried:
        assert check._rendered(pipe, 10, 8, TINY)[0] == 10
    assert list(dict.fromkeys(tried)) == [8, 4, 2] and tried[-1] == 2
    before = len(tried)
    assert check._rendered(pipe, 4, 4, TINY)[0] == 4 and len(tried) == before


def test_steps_are_timed_and_no_hook_stays():
    weights = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    with check.step_times() as times:
        optimizer.step(), optimizer.step()
    optimizer.step()
    assert len(times) == 2 and times == sorted(times)


# ---- the whole ------------------------------------------------------------------------------------------------------------------------


def test_training_is_measured_with_both_loaders():
    found = {f.figure: f for f in check.training_check(replace(TINY, files=32), CPU)}
    assert all(f.value > 0 for f in found.values())
    assert found["decoded faces to published loader"].value == pytest.approx(
        found["decoded faces"].value / found["published loader"].value)
    assert all(0 < found[f"{name}: the device waits"].value < 1 for name in ("decoded faces", "published loader"))


@pytest.mark.slow
def test_everything_runs_at_tiny_size_on_a_cpu(repository, tmp_path):
    "As `make gpu-check` runs it, in a folder that has no figures: nothing is written unless asked for."
    how = dict(cwd=tmp_path, env={**NO_GPU, "PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=570)
    ran = subprocess.run([sys.executable, "-m", "aimfair.gpu_check", "--device", "cpu", "--tiny", "--out", "there/gpu"], **how)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr.strip() and {p.name for p in (tmp_path / "there").iterdir()} == {"gpu.json", "gpu.csv", "gpu.md", "gpu.tex"}
    told = json.loads((tmp_path / "there" / "gpu.json").read_text())
    assert told["tiny"] and told["machine"]["device"] == "cpu" and {f["check"].split(",")[0] for f in told["figures"]} == {*CHECKS}
    assert all(f["unit"] and f["holds"] is not False for f in told["figures"])
    rows = (tmp_path / "there" / "gpu.md").read_text().splitlines()
    assert sum(row.startswith("| ") for row in rows) == len(told["figures"]) + 1
    printed = subprocess.run([sys.executable, "-m", "aimfair.gpu_check", "--device", "cpu", "--tiny", "--only", "text to image"], **how)
    assert printed.returncode == 0 and "steps a second" in printed.stdout and [p.name for p in tmp_path.iterdir()] == ["there"]
