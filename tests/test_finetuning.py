"Fine-tuning strategies: what may move, what may not."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimfair.data import Faces
from aimfair.finetuning import FINETUNE, finetune, real_and_synthetic, repair
from aimfair.sensitivity import biased_counts, group_indices, take_groups
from aimfair.training import TrainConfig, narrow_resnet18

SHORT = TrainConfig(epochs=1, batch_size=16, lr=0.1, weight_decay=0.1)
NAMES = [n for n, _ in narrow_resnet18(8).named_parameters()]


def faces(per_group=8, seed=0, size=32):
    rng = np.random.default_rng(seed)
    t, p = np.repeat([0, 0, 1, 1], per_group), np.tile(np.repeat([0, 1], per_group), 2)
    return Faces.from_arrays(rng.integers(0, 256, (len(t), 3, size, size), dtype=np.uint8), t, protected=p)


def test_the_defaults_are_the_papers():
    assert (FINETUNE.epochs, FINETUNE.lr, FINETUNE.batch_size, FINETUNE.momentum, FINETUNE.weight_decay) == (10, 0.06, 128, 0.9, 1e-4)


@settings(deadline=None, max_examples=10)
@given(mask=st.sets(st.sampled_from(NAMES), min_size=1), freeze=st.booleans())
def test_only_the_mask_moves_and_not_by_one_bit_more(mask, freeze):
    model = narrow_resnet18(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = finetune(model, faces(), None, mask=mask, config=SHORT, freeze_batchnorm=freeze, device="cpu", progress=False).model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) == (name not in mask)
        assert p.grad is None
    drifted = any(not torch.equal(v, before[k]) for k, v in tuned.named_buffers() if "running" in k)
    assert drifted != freeze


def test_frozen_tensors_get_no_gradient(monkeypatch):
    import aimfair.training as training
    seen = []
    original = training._train_mode

    def spy(model, freeze):
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        return original(model, freeze)

    monkeypatch.setattr(training, "_train_mode", spy)
    finetune(narrow_resnet18(8), faces(), None, mask={"fc.weight"}, config=SHORT, device="cpu", progress=False)
    assert seen == [["fc.weight"]]


@settings(deadline=None, max_examples=20)
@given(n=st.integers(10, 60).map(lambda i: 2 * i), bias=st.sampled_from([1 / 9, 0.25, 0.5, 1.0]))
def test_repaired_data_is_balanced_and_keeps_every_real_face(n, bias):
    real, pool = take_groups(faces(120, size=4), biased_counts(n, bias)), faces(60, seed=1, size=4)
    repaired = repair(real, pool)
    counts = [len(i) for i in group_indices(repaired).values()]
    assert len(set(counts)) == 1 and counts[0] == max(len(i) for i in group_indices(real).values())
    assert torch.equal(repaired.gather(slice(0, len(real))), real.gather(slice(None)))


def test_mixing_carries_no_group_labels():
    assert real_and_synthetic(faces(), faces()).protected is None


def test_an_unknown_tensor_in_the_mask_is_named():
    with pytest.raises(ValueError, match="layer9"):
        finetune(narrow_resnet18(8), faces(), None, mask={"layer9.weight"}, config=SHORT, device="cpu", progress=False)
