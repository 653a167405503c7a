"""A judge of faces: gender, race and age as FairFace annotates them, learnt from photos that the generator has not seen.

`python tests/judge_faces.py FAIRFACE GENERATOR[:STEPS[:GUIDANCE]] [--out FOLDER]` trains the judge, says how good it is on photos,
has a generator draw every combination of gender, race and age, and writes how many faces are as asked, group by group, how near they
come to the photos that were learnt from, and how much they differ.
"""
import argparse
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judge import draw
from torch.nn import functional as F

from aimfair.core import write_whole
from aimfair.data import Faces, fairface, load_faces
from aimfair.prompts import with_article
from aimfair.synthesis import features, load_generator, nearest_distance, pairwise_distance
from aimfair.t2i import learnt_from
from aimfair.training import TrainConfig, create_model, fit, predict_logits

AGES = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
GENDERS = ("Female", "Male")
RACES = ("Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian", "White")
WORDS = {"Latino_Hispanic": "Hispanic"}
TASKS = {"gender": (GENDERS, slice(0, 2)), "race": (RACES, slice(2, 9)), "age": (AGES, slice(9, 18))}


def photos(table, seen, size=64, cache=None):
    "Photos of a face table that the generator has not seen, to learn from and to test on, with what is annotated: (Faces, frame) each."
    seen = set(seen)
    other = table[[i not in seen for i in table["id"]]]
    # a fifth to test on, by the number in the name
    number = other["id"].map(lambda i: int(re.search(r"(\d+)\D*$", i)[1]))
    parts = {}
    for name, rows in (("train", other[number % 5 != 0]), ("test", other[number % 5 == 0])):
        faces = load_faces(rows, size=size, cache=cache, progress=False)
        parts[name] = faces, rows.set_index("id").loc[list(faces.ids), ["age", "gender", "race"]].reset_index()
    return parts


def codes(frame):
    "int64 N x 3: gender, race and age as numbers."
    return np.stack([frame[name].map(list(words).index).to_numpy() for name, (words, _) in TASKS.items()], 1)


class Enlarged(torch.nn.Module):
    "A network that sees images at a size of its own."

    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        return self.net(F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False))


def new_judge(size=96, weights=None, n_outputs=18):
    "The network with the logits of all questions, before it has learnt."
    return Enlarged(create_model("timm/tf_efficientnet_lite0", weights=weights, n_outputs=n_outputs), size)


def teach(faces, loss, epochs, size=96, n_outputs=18):
    "A new judge, taught by a loss of its logits and the numbers of the faces; it sees the images enlarged."
    judge = new_judge(size, "imagenet-lite0", n_outputs)
    config = TrainConfig(epochs=epochs, batch_size=64, optimizer="adamw", lr=1e-3, schedule="cosine", warmup=0.05, scale=(0.7, 1.0))
    return fit(judge, faces, None, config=config, loss_fn=lambda logits, _, rows: loss(logits, rows), seed=11, device="cpu",
               progress=False).model


def train_judge(faces, frame, epochs=6, size=96):
    "One network with the logits of all three questions."
    wanted = torch.from_numpy(codes(frame))

    def three_questions(logits, rows):
        asked = wanted[rows]
        return sum(F.cross_entropy(logits[:, part], asked[:, i], label_smoothing=0.05) for i, (_, part) in enumerate(TASKS.values()))
    return teach(faces, three_questions, epochs, size)


def answers(judge, images):
    "int64 N x 3, what the judge sees in uint8 images."
    faces = images if isinstance(images, Faces) else Faces.from_arrays(images, np.zeros(len(images)))
    logits = torch.as_tensor(predict_logits(judge, faces, device="cpu"))
    return np.stack([logits[:, part].argmax(1).numpy() for _, part in TASKS.values()], 1)


def asked(per_cell):
    "Prompts for every gender, race and age, in the words of the tasks: texts and what they ask for."
    texts, wanted, rng = [], [], np.random.default_rng(0)
    ends = {age: [int(n) for n in re.findall(r"\d+", age)] for age in AGES}
    for age, (low, *high) in ends.items():
        for race in RACES:
            for gender in GENDERS:
                for _ in range(per_cell):
                    years = rng.integers(max(low, 1), high[0] + 1) if high else rng.integers(71, 86)
                    who = with_article(f"{years}-year-old {WORDS.get(race, race)} {gender.lower()}")
                    texts.append(f"Portrait face photo of {who}")
                    wanted.append({"gender": gender, "race": race, "age": age})
    return texts, pd.DataFrame(wanted)


def followed(found, wanted):
    "Whether gender, race, and age (within one range) are as asked: a frame of booleans."
    wanted = codes(wanted)
    return pd.DataFrame({"gender": found[:, 0] == wanted[:, 0], "race": found[:, 1] == wanted[:, 1],
                         "age": np.abs(found[:, 2] - wanted[:, 2]) <= 1})


def by_group(right, frame):
    "Percent of each race and gender, of each age, and of all."
    right = right.reset_index(drop=True) * 100
    return pd.concat({"group": right.groupby([frame["race"] + ", " + frame["gender"]]).mean(), "age": right.groupby(frame["age"]).mean(),
                      "race": right.groupby(frame["race"]).mean(), "all": right.mean().to_frame("all").T})


def memorised(drawn, learnt, other, space="efficientnet-lite0", share=0.01):
    """How near drawn faces come to the photos that were learnt from (and their mirror images), measured by how near other photos come.

    Numbers: the distance that 1 % of other photos fall below, how many drawn faces do, and how many may by chance (99.9 %)."""
    from scipy.stats import binom
    known = np.concatenate([features(learnt, space), features(np.ascontiguousarray(learnt[..., ::-1]), space)])
    ours, theirs = (nearest_distance(features(x, space), known) for x in (drawn, other))
    limit = float(np.quantile(theirs, share))
    return {"limit": limit, "below": int((ours < limit).sum()), "of": len(ours), "by chance": int(binom.ppf(0.999, len(ours), share)),
            "median drawn": float(np.median(ours)), "median other": float(np.median(theirs))}


def variety(images, frame, space="efficientnet-lite0", most=8):
    "Mean distance of two faces of the same gender, race and age, over all of these that have two; of so many faces each at most."
    seen, cells = features(images, space), frame.reset_index(drop=True).groupby(list(TASKS)).indices.values()
    return float(np.mean([pairwise_distance(seen[rows[:most]]) for rows in cells if len(rows) > 1]))


def questions(about, **defaults):
    "What every judge of photos is asked on the command line."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("root")
    parser.add_argument("generator")
    parser.add_argument("--per-cell", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--cache", help="folder of decoded photos")
    parser.add_argument("--out")
    parser.set_defaults(**defaults)
    return parser


def report(out, columns, near, drawn):
    "Write and print what is right of photos and drawn images, and how near these come to what was learnt from."
    out, result = Path(out), pd.concat(columns, axis=1).round(1)
    out.mkdir(parents=True, exist_ok=True)
    result.to_csv(out / "judge.csv")
    write_whole(out / "memory.json", near)
    np.save(out / "drawn.npy", drawn)
    print(result.to_string(), near, sep="\n")


def main():
    parser = questions(__doc__, per_cell=8, epochs=6, out="figures/faces")
    parser.add_argument("--judge", help="file that keeps the judge")
    options = parser.parse_args()
    name, *given = options.generator.split(":")
    settings = {key: kind(value) for (key, kind), value in zip((("steps", int), ("guidance_scale", float)), given, strict=False)}
    pipe = load_generator(name, device="cpu")
    seen, table = learnt_from(pipe.config._name_or_path), fairface(options.root)
    parts = photos(table, seen, cache=options.cache)
    if options.judge and Path(options.judge).is_file():
        judge = new_judge()
        judge.load_state_dict(torch.load(options.judge, weights_only=True))
    else:
        judge = train_judge(*parts["train"], epochs=options.epochs)
        if options.judge:
            torch.save(judge.state_dict(), options.judge)
    test, annotated = parts["test"]
    texts, wanted = asked(options.per_cell)
    started = time.perf_counter()
    drawn = draw(pipe, texts, **settings)
    print(f"{len(texts) / (time.perf_counter() - started):.1f} images a second")
    columns = {"photos": by_group(followed(answers(judge, test), annotated), annotated),
               "drawn": by_group(followed(answers(judge, drawn), wanted), wanted)}
    learnt = load_faces(table[table["id"].isin(seen)], size=drawn.shape[-1], cache=options.cache, progress=False)
    photographed = test.gather(slice(None)).numpy()
    near = memorised(drawn, learnt.gather(slice(None)).numpy(), photographed)
    near |= {"variety drawn": variety(drawn, wanted), "variety photos": variety(photographed, annotated)}
    report(options.out, columns, near, drawn)


if __name__ == "__main__":
    main()
