"""A judge of portraits: Smiling, Male and Young as CelebA annotates them, learnt from photos that the generator has not seen.

`python tests/judge_celeba.py CELEBA GENERATOR LEARNT [--out FOLDER]` trains the judge, says how good it is on photos, has a
generator draw every combination of the three, and writes how many faces are as asked, group by group, and how near they come to the
photos in the folder LEARNT that it has learnt from.
"""
import itertools

import numpy as np
import pandas as pd
import torch
from judge import NAMES, PHRASES, draw
from judge_faces import memorised, questions, report, teach
from torch.nn import functional as F

from aimfair.data import Faces, celeba, celeba_attributes, load_faces
from aimfair.synthesis import load_generator
from aimfair.t2i import learnt_from
from aimfair.training import predict_logits


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


def train_judge(faces, labels, epochs=4):
    "One network with three logits."
    wanted = torch.tensor(labels, dtype=torch.float32)
    return teach(faces, lambda logits, rows: F.binary_cross_entropy_with_logits(logits, wanted[rows]), epochs, n_outputs=len(NAMES))


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
    parser = questions(__doc__, per_cell=40, epochs=4, out="runs/judge-celeba")
    parser.add_argument("learnt")
    options = parser.parse_args()
    pipe = load_generator(options.generator, device="cpu")
    seen, table = learnt_from(pipe.config._name_or_path), celeba(options.learnt, available_only=True)
    train, (test, annotated) = photos(options.root, seen, options.cache)
    judge = train_judge(*train, epochs=options.epochs)
    texts, wanted = asked(options.per_cell)
    drawn = draw(pipe, texts)
    looked_at = {"photos": (test, annotated), "drawn": (Faces.from_arrays(drawn, np.zeros(len(drawn))), wanted)}
    columns = {name: percent_right(predict_logits(judge, faces, device="cpu"), labels) for name, (faces, labels) in looked_at.items()}
    learnt, _ = load(table[table["id"].isin(set(seen))], options.learnt, options.cache)
    near = memorised(drawn, *(faces.gather(slice(None)).numpy() for faces in (learnt, test)))
    report(options.out, columns, near, drawn)


if __name__ == "__main__":
    main()
