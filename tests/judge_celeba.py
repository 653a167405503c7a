"""A judge of portraits: Smiling, Male and Young as CelebA annotates them, learnt from photos that the generator has not seen.

`python tests/judge_celeba.py CELEBA GENERATOR LEARNT [--out FOLDER]` trains the judge, says how good it is on photos, has a
generator draw every combination of the three, and writes how many faces are as asked, group by group, and how near they come to the
photos in the folder LEARNT that it has learnt from.
"""
import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judge import NAMES, PHRASES, draw
from judge_faces import memorised, new_judge
from torch.nn import functional as F

from aimfair.core import write_whole
from aimfair.data import Faces, celeba, celeba_attributes, load_faces
from aimfair.synthesis import load_generator
from aimfair.t2i import learnt_from
from aimfair.training import TrainConfig, fit, predict_logits


def load(rows, root, cache=None, size=64):
    "The photos of a face table, and 0/1 of each of `NAMES`."
    faces = load_faces(rows, size=size, cache=cache, progress=False)
    return faces, celeba_attributes(root, list(NAMES)).loc[list(faces.ids)].to_numpy()


def photos(root, seen, cache=None):
    "Photos to learn from, and to test on: every fifth of those that the generator has not seen."
    table = celeba(root, available_only=True).sort_values("id")
    table = table[~table["id"].isin(set(seen))]
    fifth = np.arange(len(table)) % 5 == 0
    return load(table[~fifth], root, cache), load(table[fifth], root, cache)


def train_judge(faces, labels, epochs=4, seed=11):
    "One network with three logits; it sees the images enlarged."
    wanted = torch.tensor(labels, dtype=torch.float32)
    config = TrainConfig(epochs=epochs, batch_size=64, optimizer="adamw", lr=1e-3, schedule="cosine", warmup=0.05, scale=(0.7, 1.0))

    def three_questions(logits, _, rows):
        return F.binary_cross_entropy_with_logits(logits, wanted[rows])
    judge = new_judge(weights="imagenet-lite0", n_outputs=len(NAMES))
    return fit(judge, faces, None, config=config, loss_fn=three_questions, seed=seed, device="cpu", progress=False).model


def asked(per_cell):
    "Prompts for every combination, and what they ask for: texts, 0/1 N x 3."
    cells = [bits for bits in itertools.product((0, 1), repeat=3) for _ in range(per_cell)]
    words = [[PHRASES[name][bit] for name, bit in zip(NAMES, bits, strict=True)] for bits in cells]
    return [f"Portrait face photo of a {smile} {age} {gender}" for smile, gender, age in words], np.array(cells)


def percent_right(logits, labels):
    "Percent as labelled of each attribute: within each combination of the three, and of all."
    right = pd.DataFrame((np.asarray(logits) > 0) == (labels > 0), columns=list(NAMES)) * 100
    cells = [", ".join(PHRASES[name][bit] for name, bit in zip(NAMES, bits, strict=True)) for bits in labels]
    return pd.concat([right.groupby(cells).mean(), right.mean().to_frame("all").T])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("generator")
    parser.add_argument("learnt")
    parser.add_argument("--per-cell", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cache", help="folder of decoded photos")
    parser.add_argument("--out", default="runs/judge-celeba")
    options = parser.parse_args()
    pipe = load_generator(options.generator, device="cpu")
    seen, table = learnt_from(pipe.config._name_or_path), celeba(options.learnt, available_only=True)
    train, (test, annotated) = photos(options.root, seen, options.cache)
    judge = train_judge(*train, epochs=options.epochs)
    texts, wanted = asked(options.per_cell)
    drawn = draw(pipe, texts)
    columns = {"photos": (test, annotated), "drawn": (Faces.from_arrays(drawn, np.zeros(len(drawn))), wanted)}
    result = pd.concat({name: percent_right(predict_logits(judge, faces, device="cpu"), labels)
                        for name, (faces, labels) in columns.items()}, axis=1).round(1)
    learnt, _ = load(table[table["id"].isin(set(seen))], options.learnt, options.cache)
    near = memorised(drawn, *(faces.gather(slice(None)).numpy() for faces in (learnt, test)))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    result.to_csv(out / "judge.csv")
    write_whole(out / "memory.json", near)
    np.save(out / "drawn.npy", drawn)
    print(result.to_string(), near, sep="\n")


if __name__ == "__main__":
    main()
