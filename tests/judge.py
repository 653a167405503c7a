"""A judge of drawn studio faces: smile, gender cue and age, learnt from balanced faces that no generator has seen.

`python tests/judge.py FOLDER[:STEPS[:GUIDANCE]] ...` compares generators: what they follow, by group and tone, diversity and rate.
"""
import sys
import time

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from aimfair import toyfaces
from aimfair.data import Faces
from aimfair.synthesis import features, load_generator, make_config, pairwise_distance, resolve_config
from aimfair.training import TrainConfig, create_model, fit, predict_logits

NAMES = ("Smiling", "Male", "Young")
PHRASES = {"Smiling": ("non-smiling", "smiling"), "Male": ("female", "male"), "Young": ("older", "young")}


def balanced(n, seed):
    "Studio faces with every combination equally often: uint8 images, labels n x 3, tone bands."
    rng = np.random.default_rng(seed)
    labels = np.stack([(np.arange(n) >> i) & 1 for i in range(3)], 1)[rng.permutation(n)]
    factors = toyfaces.sample_factors(n, seed=seed, style="studio", **{name: labels[:, i] for i, name in enumerate(NAMES)})
    return toyfaces.draw(factors), labels, np.minimum((factors["tone"].to_numpy() * 5).astype(int), 4)


def train_judge(n=7000, epochs=10, seed=91):
    "One network with three logits."
    images, labels, _ = balanced(n, seed)
    wanted = torch.from_numpy(labels).float()
    config = TrainConfig(epochs=epochs, batch_size=64, lr=0.05, milestones=(epochs - 2, epochs - 1), scale=(0.8, 1.0))
    model = create_model("toy_resnet18", weights="bundled", n_outputs=3)

    def three_questions(logits, _, rows):
        return F.binary_cross_entropy_with_logits(logits, wanted[rows])
    return fit(model, Faces.from_arrays(images, np.zeros(n)), None, config=config, loss_fn=three_questions, progress=False).model


def right(model, images, labels):
    "Whether each of the three is as labelled, n x 3."
    faces = Faces.from_arrays(images, np.zeros(len(images)))
    return (predict_logits(model, faces, device="cpu") > 0) == (np.asarray(labels) > 0)


def asked(per_cell):
    "Prompts for every combination and skin tone, with what they ask for: texts, labels n x 3, tone bands."
    texts, labels, tones = [], [], []
    for band, tone in enumerate(toyfaces.TONES):
        for code in range(8):
            bits = [(code >> i) & 1 for i in range(3)]
            words = [PHRASES[name][bit] for name, bit in zip(NAMES, bits, strict=True)]
            for _ in range(per_cell):
                texts.append(f"Portrait face photo of a {words[0]} {words[2]} {words[1]} with {tone} skin")
                labels.append(bits)
                tones.append(band)
    return texts, np.array(labels), np.array(tones)


def draw(pipe, texts, seed=0, batch=32, **settings):
    "uint8 images of some prompts, each from noise of its own; settings that are not given are the pipeline's own."
    config, parts = resolve_config(pipe, make_config(**settings)), []
    for i in range(0, len(texts), batch):
        noise = [torch.Generator().manual_seed(seed + j) for j in range(i, min(i + batch, len(texts)))]
        out = pipe(texts[i:i + batch], num_inference_steps=config.steps, guidance_scale=config.guidance_scale, generator=noise,
                   output_type="np").images
        parts.append((out * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))
    return np.concatenate(parts)


def cpu_rate(pipe, texts, repeats):
    "Images a second of CPU time, at best."
    draw(pipe, texts[:8])
    times = []
    for _ in range(repeats):
        start = time.process_time()
        draw(pipe, texts)
        times.append(time.process_time() - start)
    return len(texts) / min(times)


def compare(generators, per_cell=40, repeats=5, space="efficientnet-lite0"):
    "A column a generator: percent of images that show what was asked, diversity, and images a second of one core, timed in turn."
    torch.set_num_threads(1)
    judge, (texts, labels, tones), columns = train_judge(), asked(per_cell), {}
    pipes = {name: load_generator(name.split(":")[0], device="cpu") for name in generators}
    given = {name: dict(zip(("steps", "guidance_scale"), map(float, name.split(":")[1:]), strict=False)) for name in generators}
    given = {name: {k: int(v) if k == "steps" else v for k, v in settings.items()} for name, settings in given.items()}
    for name, pipe in pipes.items():
        images = draw(pipe, texts, 10_000, **given[name])
        seen = pd.DataFrame(100 * right(judge, images, labels), columns=NAMES)
        groups = {f"group {t}_{p}": (labels[:, 0] == t) & (labels[:, 1] == p) for t in (0, 1) for p in (0, 1)}
        parts = {"all": np.full(len(labels), True), **groups, **{f"tone {t}": tones == i for i, t in enumerate(toyfaces.TONES)}}
        columns[name] = {(part, n): seen[n][where].mean() for part, where in parts.items() for n in NAMES}
        columns[name] |= {("diversity", s): pairwise_distance(features(images, s)) for s in ("pixels", space)}
    times = {name: [] for name in pipes}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            start = time.perf_counter()
            draw(pipe, texts[:64], **given[name])
            times[name].append(time.perf_counter() - start)
    return pd.DataFrame({name: c | {("rate", "images a second"): 64 / min(times[name])} for name, c in columns.items()})


if __name__ == "__main__":
    print(compare(sys.argv[1:]).round(2).to_string())
