"A judge of drawn studio faces: smile, gender cue and age, learnt from balanced faces that no generator has seen."
import numpy as np
import torch
from torch.nn import functional as F

from aimfair import toyfaces
from aimfair.data import Faces
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
