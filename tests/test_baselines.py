"Each baseline by the property that defines it, and what all of them promise: no group labels, the same weights from the same seed."
import copy
import inspect
import json
import string

import numpy as np
import pytest
import torch
from faults import interrupt_at
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import aimfair.training.loop as training
from aimfair import baselines
from aimfair.baselines import (
    BASELINES,
    CVaRSettings,
    EditSettings,
    GroupDRO,
    LearningFromFailure,
    alignment,
    balanced_head,
    balanced_sampling,
    baseline,
    cvar,
    edit_plan,
    edit_protected,
    error_set,
    gce,
    infer_environments,
    maple_scores,
    project_scores,
    scale_gradients,
    sparse_regression,
    train_cvar,
    train_dfr,
    train_dfr_synthetic,
    train_diga,
    train_eiil,
    train_erm,
    train_ffr,
    train_group_dro,
    train_jtt,
    train_jtt_synthetic,
    train_lff,
    train_maple,
    upsampled,
)
from aimfair.core import Settings
from aimfair.data import Faces, batches
from aimfair.groups import biased_counts, take_groups
from aimfair.models import classification_loss, create_model, logits_of, sample_losses
from aimfair.training import TrainConfig, fit, predict_logits

SHORT = TrainConfig(epochs=2, batch_size=32, lr=0.05, milestones=(), scale=(0.8, 1.0), flip=0.5)
QUIET = {"device": "cpu", "progress": False}
FAST = {"EIIL": {"inference_steps": 50, "inference_lr": 0.1}, "MAPLE-style": {"outer_steps": 2}, "DFR": {"draws": 2},
        "DFR, synthetic groups": {"draws": 2}}  # settings that make a method quick


def pictures(per_group, seed, classes=2, side=8, signal=16):
    "The target is the mean of the green channel, the group a cast of red; both noisy."
    rng = np.random.default_rng(seed)
    t, p = np.repeat(np.arange(classes), 2 * per_group), np.tile(np.repeat([0, 1], per_group), classes)
    x = rng.normal(100, 40, (len(t), 3, side, side))
    x[:, 1] += signal * t[:, None, None]
    x[:, 0] += 60 * p[:, None, None]
    order = rng.permutation(len(t))
    return Faces.from_arrays(x.clip(0, 255).astype(np.uint8)[order], t[order], protected=p[order], ids=[f"f{i}" for i in range(len(t))])


def biased(n, seed):
    return take_groups(pictures(n // 2, seed), biased_counts(n))


def network(seed=0, outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, outputs))


def edits(faces):
    "Stands for edited images where only the training is tested."
    return Faces.concat([Faces.from_arrays(255 - faces.gather(slice(None)).numpy(), faces.target, np.full(len(faces), p)) for p in (0, 1)])


def trained(name, train, val, *, model=None, config=SHORT, **given):
    given_to_some = {"edited": edits(train), "synthetic": edits(train), "groups": 2 * train.target + np.arange(len(train)) % 2,
                     "val_groups": None if val is None else 2 * val.target + np.arange(len(val)) % 2}
    extra = {n: given_to_some[n] for n in BASELINES[name].needs}
    return BASELINES[name].train(model or network(), train, val, config=config, **QUIET, **FAST.get(name, {}), **extra, **given)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


# ---- what all of them promise

@pytest.mark.parametrize("name", BASELINES)
def test_group_labels_change_nothing_and_the_seed_everything(name):
    train, val = biased(120, 0), biased(80, 1)
    start = network()
    before = copy.deepcopy(start.state_dict())
    fitted = trained(name, train, val, model=start)
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items()), "the model that is handed in is left untouched"
    assert all(p.grad is None for p in start.parameters())
    assert [*fitted.model.state_dict()] == [*before], "the result is a model like the one handed in"
    blind = trained(name, train.without_groups(), val.without_groups())
    assert same(fitted, blind) and fitted.history.equals(blind.history)
    rng = np.random.default_rng(0)
    for faces in (train, val):
        faces.protected = rng.permutation(faces.protected)
    assert same(fitted, trained(name, train, val))
    assert not same(fitted, trained(name, train, val, seed=1))
    assert fitted.val_accuracy == fitted.history.val_accuracy[fitted.best_epoch]
    if name.startswith("DFR"):  # whose last row is the last layer
        assert len(fitted.history) == SHORT.epochs + 1 and fitted.best_epoch == SHORT.epochs
    else:
        assert len(fitted.history) == SHORT.epochs and fitted.val_accuracy == fitted.history.val_accuracy.max()


@pytest.mark.parametrize("name", BASELINES)
def test_a_killed_run_continues_and_another_run_is_refused(name, tmp_path, monkeypatch):
    train, val, file = biased(120, 0), biased(80, 1), tmp_path / "run.pt"
    whole = trained(name, train, val)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        interrupt_at(m, training, "judge", 2)
        trained(name, train, val, checkpoint=file)
    continued = trained(name, train, val, checkpoint=file)
    assert same(whole, continued) and whole.history.equals(continued.history)
    with pytest.raises(ValueError, match="other settings"):
        trained(name, train, val, checkpoint=file, seed=1)


@pytest.mark.parametrize("name, other", [
    ("CVaR DRO", {"alpha": 0.25}), ("LfF", {"q": 0.5}), ("EIIL", {"group_step": 1.0}), ("JTT", {"upweight": 2}),
    ("MAPLE-style", {"size": 0.9})])
def test_a_checkpoint_of_other_settings_is_refused(name, other, tmp_path):
    train, val = biased(80, 0), biased(40, 1)
    trained(name, train, val, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="other settings"):
        trained(name, train, val, checkpoint=tmp_path / "run.pt", **other)


@pytest.mark.parametrize("name", ["CVaR DRO", "LfF"])
def test_a_checkpoint_of_another_method_is_refused(name, tmp_path):
    train = biased(80, 0)
    trained("ERM", train, None, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="other settings"):
        trained(name, train, None, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="other settings"):
        fit(network(), train, None, config=SHORT, checkpoint=tmp_path / "run.pt", **QUIET)


def test_a_new_method_is_one_function_and_its_settings(tmp_path):
    "What a reader of the chapter would write: it is in the register, is called as all are, and inherits what all promise."
    before = dict(BASELINES)

    class LouderSettings(Settings):
        factor: float = Field(2.0, gt=0)

    @baseline("Louder", LouderSettings, "a test", passes=lambda settings, config: settings.factor * config.epochs)
    def train_louder(model, train, val, run, *, company):
        "Losses by a factor, and company for the training images."
        assert train.protected is None and val.protected is None

        def loss_fn(logits, y, rows):
            return run.settings.factor * classification_loss(logits, y)
        return run.fit(copy.deepcopy(model), Faces.concat([train, company]), val, loss_fn=loss_fn)

    entry = BASELINES.pop("Louder")
    assert before == BASELINES and entry.train is train_louder and train_louder.__doc__.startswith("Losses by a factor")
    assert (entry.settings, entry.source, entry.group_labels, entry.needs) == (LouderSettings, "a test", "none", ("company",))
    assert entry.passes(LouderSettings(factor=3), SHORT) == 6
    train, val, company = biased(80, 0), biased(40, 1), pictures(5, 2).without_groups()
    start = network()
    kept = copy.deepcopy(start.state_dict())
    louder = entry.train(start, train, val, company=company, factor=4, config=SHORT, seed=3, checkpoint=tmp_path / "run.pt", **QUIET)
    assert all(torch.equal(v, kept[k]) for k, v in start.state_dict().items())
    plain = fit(network(), Faces.concat([train.without_groups(), company]), val, config=SHORT, seed=3, **QUIET)
    assert louder.history.loss.iloc[0] > 1.5 * plain.history.loss.iloc[0]
    same_loss = entry.train(network(), train, val, company=company, factor=1, config=SHORT, seed=3, **QUIET)
    assert same(same_loss, plain)
    with pytest.raises(ValueError, match="other settings"):
        entry.train(network(), train, val, company=company, config=SHORT, seed=3, checkpoint=tmp_path / "run.pt", **QUIET)
    with pytest.raises(TypeError, match="company"):
        entry.train(network(), train, val, config=SHORT, **QUIET)
    with pytest.raises(ValueError, match="no setting 'fcator'; did you mean factor?"):
        entry.train(network(), train, val, company=company, fcator=1, config=SHORT, **QUIET)
    shown = inspect.signature(entry.train).parameters
    assert [*shown] == ["model", "train", "val", "company", "config", "seed", "checkpoint", "device", "progress", "criteria", "settings"]


def test_what_a_method_costs():
    "In trainings by ERM: a first model and a second one, two models side by side, twice the images."
    of = {name: b.passes(b.settings(), SHORT) for name, b in BASELINES.items()}
    assert of == {"ERM": 1, "CVaR DRO": 1, "EIIL": 1.5, "LfF": 2, "JTT": 2, "MAPLE-style": 1 + 10 / 3, "DiGA-style": 2, "FFR": 1.5,
                  "JTT + synthetic": 2, "Group DRO": 1, "DFR": 1, "DFR, synthetic groups": 1}
    maple = BASELINES["MAPLE-style"]
    assert maple.passes(maple.settings(outer_steps=3), SHORT) == 2
    assert {b.passes(b.settings(), SHORT.model_copy(update={"steps": 40})) for b in BASELINES.values()} == {1}


@pytest.mark.parametrize("name", BASELINES)
def test_all_stages_together_take_the_steps_that_are_held(name):
    "Counted at the optimisers of networks; what else is optimised (assignments, scores) is no step of a network."
    counted, networks = [0], 2 if name == "LfF" else 1

    def count(optimizer, args, kwargs):
        counted[0] += networks * all(isinstance(p, nn.Parameter) for g in optimizer.param_groups for p in g["params"])

    hook = register_optimizer_step_post_hook(count)
    try:
        for n in (120, 60):
            counted[0] = 0
            held = SHORT.model_copy(update={"epochs": 3, "steps": 22})
            fitted = trained(name, biased(n, 0), biased(80, 1), config=held, criteria={"certainty": lambda z: np.abs(z).mean()})
            assert counted == [22]
            assert len(fitted.history) == 3 + name.startswith("DFR") and set(fitted.best) == {"val_accuracy", "certainty"}
            best = fitted.best["certainty"]
            assert best.value == fitted.history.certainty.max() or name.startswith("DFR")
            fitted.model.load_state_dict(best.state)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", BASELINES)
def test_candidates_are_settings_and_train(name):
    method = BASELINES[name]
    assert 1 < len(method.candidates) <= 3 and method.selects and method.slug.isidentifier()
    held = SHORT.model_copy(update={"steps": 20})
    for candidate in method.candidates:
        fast = {k: v for k, v in FAST.get(name, {}).items() if k not in candidate}
        assert method.settings(**candidate, **fast)
        assert np.isfinite(trained(name, biased(80, 0), biased(40, 1), config=held, **candidate).val_accuracy)


def test_a_method_may_have_its_own_optimiser():
    train, val = biased(80, 0), biased(40, 1)
    own = train_erm(network(), train, val, config=SHORT, optimizer="adam", lr=0.01, weight_decay=0.1, **QUIET)
    adam = SHORT.model_copy(update={"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1})
    assert same(own, fit(network(), train, val, config=adam, **QUIET))
    heads = trained("LfF", train, val, head_only=True).model.state_dict()
    before = network().state_dict()
    assert {k for k in heads if "weight" in k and not torch.equal(heads[k], before[k])} == {"5.weight"}


@pytest.mark.parametrize("name", BASELINES)
def test_three_classes(name):
    train, val = pictures(15, 0, classes=3), pictures(10, 1, classes=3)
    fitted = trained(name, train, val, model=network(outputs=3))
    assert np.isfinite(fitted.history.loss[:SHORT.epochs]).all() and predict_logits(fitted.model, val, device="cpu").shape == (60, 3)


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_is_called_alike_and_refuses_what_it_does_not_know(name):
    method = BASELINES[name]
    parameters = inspect.signature(method.train).parameters
    common = ["config", "seed", "checkpoint", "device", "progress", "criteria", "settings"]
    assert [*parameters][:3] == ["model", "train", "val"] and [n for n in parameters if n in common] == common
    assert all(parameters[n].default is inspect.Parameter.empty for n in method.needs)
    assert method.settings().model_dump() == {n: f.default for n, f in method.settings.model_fields.items()}
    with pytest.raises(ValueError, match="no setting 'alhpa'") as e:
        trained(name, biased(40, 0), biased(40, 1), alhpa=3)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, given", [
    ("CVaR DRO", {"alpha": 0.0}), ("CVaR DRO", {"alpha": 1.1}), ("LfF", {"q": 0}), ("LfF", {"decay": 1}), ("JTT", {"upweight": 0}),
    ("JTT", {"upweight": 1.5}), ("MAPLE-style", {"size": 2}), ("EIIL", {"inference_steps": 0}),
    ("FFR", {"pretraining": 0.9}), ("DFR", {"c": 0})])
def test_impossible_settings(name, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        BASELINES[name].settings(**given)


# ---- CVaR DRO

def dual_cvar(losses, alpha):
    "The minimum over eta of Rockafellar and Uryasev's formula: convex and piecewise linear, so a loss is a minimiser."
    values = [eta + np.maximum(losses - eta, 0).mean() / alpha for eta in losses]
    return min(values)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40), st.floats(0.001, 1))
def test_cvar_is_the_minimum_of_its_dual(losses, alpha):
    losses = np.array(losses)
    assert np.isclose(cvar(torch.from_numpy(losses), alpha).item(), dual_cvar(losses, max(alpha, 1 / len(losses))), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40))
def test_cvar_runs_from_the_mean_to_the_maximum(losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    assert torch.isclose(cvar(losses, 1.0), losses.mean()) and cvar(losses, 1e-9) == losses.max()


def test_cvar_trains_on_the_worst_samples_alone():
    losses = torch.tensor([0.1, 3.0, 2.0, 0.5, 1.0], requires_grad=True)
    assert torch.allclose(torch.autograd.grad(cvar(losses, 0.5), losses)[0], torch.tensor([0, 1, 1, 0, 0.5]) / 2.5)


def test_cvar_of_everything_is_erm():
    train, val = biased(120, 0), biased(80, 1)
    def weights(fitted):
        return torch.cat([p.detach().flatten() for p in fitted.model.parameters()])

    erm = weights(train_erm(network(), train, val, config=SHORT, **QUIET))
    gaps = [(erm - weights(train_cvar(network(), train, val, config=SHORT, alpha=alpha, **QUIET))).abs().max() for alpha in (1, 0.2)]
    assert gaps[0] < 1e-5 and gaps[1] > 1e-3


# ---- EIIL

def coloured_labels(n=500, seed=0, classes=2):
    "Labels whose colour agrees with them in one environment and not in the other, and logits of a model that sees the colour alone."
    rng = np.random.default_rng(seed)
    y, environment = rng.integers(0, classes, n), (rng.random(n) < 0.25).astype(int)
    colour = (y + environment) % classes
    strength = rng.uniform(1, 3, n)
    logits = (2 * colour - 1) * strength if classes == 2 else F.one_hot(torch.tensor(colour), classes).numpy() * strength[:, None]
    return logits.reshape(n, -1).astype(np.float32), y, environment


@pytest.mark.parametrize("classes", [2, 3])
def test_environments_of_coloured_labels_are_recovered(classes):
    logits, y, environment = coloured_labels(classes=classes)
    found = infer_environments(logits, y, steps=400, lr=0.05) > 0.5
    assert (found == environment).mean() > 0.9
    rng = np.random.default_rng(1)
    guess = infer_environments(rng.normal(size=logits.shape), y, steps=400, lr=0.05) > 0.5
    assert abs((guess == environment).mean() - 0.5) < 0.15


def test_inferred_environments_have_a_larger_penalty_than_random_ones():
    logits, y, _ = coloured_labels()
    z = torch.from_numpy(logits)

    def penalty(a):  # from the definition: the gradient of each environment's risk by the scale
        total = 0
        for weight in (a, 1 - a):
            scale = torch.tensor(1.0, requires_grad=True)
            risk = (torch.tensor(weight).float() * sample_losses(z * scale, torch.from_numpy(y))).mean()
            total += torch.autograd.grad(risk, scale)[0].item() ** 2
        return total

    best = penalty(infer_environments(logits, y, steps=400, lr=0.05))
    assert best > 3 * max(penalty(np.random.default_rng(i).random(len(y))) for i in range(20))


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_with_one_logit_the_environments_are_the_references_errors(seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 80)
    logits = rng.choice([-1, 1], 80) * rng.uniform(0.5, 3, 80)
    if not 0 < len(error_set(logits[:, None], y)) < 80:
        return
    found = np.flatnonzero(infer_environments(logits[:, None], y, steps=600, lr=0.1, seed=seed) > 0.5)
    assert np.array_equal(found, error_set(logits[:, None], y))


@pytest.mark.parametrize("outputs", [1, 3])
def test_scale_gradients_are_derivatives(outputs):
    z, y = torch.randn(20, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(20) % max(outputs, 2)
    h = 1e-6
    difference = (sample_losses(z * (1 + h), y) - sample_losses(z * (1 - h), y)) / (2 * h)
    assert torch.allclose(scale_gradients(z, y), difference, atol=1e-8)


def test_group_dro_by_hand():
    rng = np.random.default_rng(0)
    groups, y = rng.choice([3, 5, 8], 60), rng.integers(0, 2, 60)
    dro, q = GroupDRO(network(), groups, step=0.3), np.ones(3) / 3
    assert "log_weights" in dro.state_dict()
    for _ in range(5):
        index = rng.choice(60, 9, replace=False)
        z = rng.normal(size=9)
        hard = np.log1p(np.exp(-(2 * y[index] - 1) * z))
        of = [hard[groups[index] == g].mean() if (groups[index] == g).any() else 0.0 for g in (3, 5, 8)]
        q = q * np.exp(0.3 * np.array(of))
        q /= q.sum()
        loss = dro.loss(torch.tensor(z)[:, None], torch.tensor(y[index]), torch.tensor(index))
        assert np.isclose(loss.item(), (q * of).sum(), rtol=1e-5) and np.allclose(dro.log_weights.exp(), q, rtol=1e-5)


def test_eiil_trains_on_classes_and_environments(monkeypatch):
    seen, train = [], biased(120, 0)
    original = GroupDRO.__init__

    def spy(self, model, groups, step):
        seen.append(groups)
        original(self, model, groups, step)

    monkeypatch.setattr(GroupDRO, "__init__", spy)
    train_eiil(network(), train, None, config=SHORT, inference_steps=600, inference_lr=0.1, **QUIET)
    reference = fit(network(), train, None, config=SHORT.model_copy(update={"epochs": 1}), **QUIET).model
    wrong = np.isin(np.arange(120), error_set(predict_logits(reference, train, device="cpu"), train.target))
    assert (seen[0] // 2 == train.target).all() and (seen[0] % 2 == wrong).mean() > 0.98


# ---- LfF

@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("q", [0.2, 0.7, 1.0])
def test_gce_and_its_gradient(outputs, q):
    z = torch.randn(30, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.arange(30) % max(outputs, 2)
    two = torch.cat([torch.zeros_like(z), z], 1) if outputs == 1 else z
    p = two.softmax(1)[torch.arange(30), y]
    assert torch.allclose(gce(z, y, q), (1 - p**q) / q)
    slope = torch.autograd.grad(gce(z, y, q).sum(), z)[0]
    plain = torch.autograd.grad(F.cross_entropy(two, y, reduction="sum"), z)[0]
    assert torch.allclose(slope, p.detach()[:, None] ** q * plain)


def test_lff_weights_by_hand():
    "A sample at a time, in plain Python: averages that start at the first loss, divided by the largest of the class."
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 30)
    pair, average = LearningFromFailure(network(), target), [{}, {}]
    for _ in range(6):
        index = rng.choice(30, 8, replace=False)
        zb, zd, y = rng.normal(size=8), rng.normal(size=8), target[index]
        losses = [np.log1p(np.exp(-(2 * y - 1) * z)) for z in (zb, zd)]
        for memory, new in zip(average, losses, strict=True):
            for i, value in zip(index, new, strict=True):
                memory[i] = 0.7 * memory[i] + 0.3 * value if i in memory else value
        b, d = [[m[i] / max(v for j, v in m.items() if target[j] == target[i]) for i in index] for m in average]
        weight = np.array(b) / (np.array(b) + np.array(d))
        pair.biased_logits = torch.tensor(zb)[:, None].float()
        loss = pair.loss(torch.tensor(zd)[:, None].float(), torch.tensor(y), torch.tensor(index))
        p = np.exp(-losses[0])
        assert np.allclose(pair.weights(index), weight, atol=1e-5)
        assert np.isclose(loss.item(), ((1 - p**0.7) / 0.7).mean() + (weight * losses[1]).mean(), rtol=1e-5)


def test_lff_gives_weight_to_samples_that_contradict_the_bias():
    train = biased(400, 0)
    pair = LearningFromFailure(network(), train.target)
    fit(pair, train, None, config=SHORT.model_copy(update={"epochs": 4}), loss_fn=pair.loss, **QUIET)
    conflicting = train.target == train.protected
    weights = pair.weights().numpy()
    assert (weights >= 0).all() and (weights <= 1).all()
    for t in (0, 1):
        assert weights[conflicting & (train.target == t)].mean() > weights[~conflicting & (train.target == t)].mean() + 0.15


def test_the_gradient_of_each_lff_model_stays_its_own():
    pair = LearningFromFailure(network(), np.array([0, 1, 1, 0])).train()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pair.loss(pair(x), torch.tensor([0, 1, 1, 0]), torch.arange(4)).backward()
    first = [p.grad.clone() for p in pair.biased.parameters()]
    pair.zero_grad()
    torch.manual_seed(0)
    gce(logits_of(pair.biased.eval(), x), torch.tensor([0, 1, 1, 0])).mean().backward()
    assert all(g is not None for g in first) and all(p.grad is None for p in pair.debiased.parameters())


# ---- JTT

def test_jtt_is_two_trainings():
    train, val = biased(150, 0), biased(80, 1)
    fitted = train_jtt(network(), train, val, config=SHORT, upweight=5, identification_epochs=1, **QUIET)
    first = fit(network(), train, None, config=SHORT.model_copy(update={"epochs": 1}), **QUIET).model
    wrong = [i for i in range(150) if (predict_logits(first, train.select(np.array([i])), device="cpu")[0, 0] > 0) != train.target[i]]
    assert 0 < len(wrong) < 75
    repeated = Faces.concat([train] + 4 * [train.select(np.array(wrong))])
    assert same(fitted, fit(network(), repeated, val, config=SHORT, **QUIET))


@given(st.integers(1, 30), st.sets(st.integers(0, 29)), st.integers(1, 7))
def test_upsampled_counts(n, errors, upweight):
    errors = np.array(sorted(e for e in errors if e < n), int)
    ids = list(upsampled(Faces.from_arrays(np.zeros((n, 3, 2, 2), np.uint8), np.zeros(n)), errors, upweight).ids)
    assert [ids.count(str(i)) for i in range(n)] == [upweight if i in errors else 1 for i in range(n)]
    assert ids[:n] == [str(i) for i in range(n)]


def test_jtt_without_upweighting_is_erm():
    train, val = biased(120, 0), biased(80, 1)
    assert same(trained("ERM", train, val), trained("JTT", train, val, upweight=1))


# ---- MAPLE

@pytest.mark.parametrize("outputs", [1, 3])
def test_alignment_is_the_inner_product_of_gradients(outputs):
    model, faces = network(outputs=outputs).eval(), biased(12, 0)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    expected = []
    for x, y, *_ in batches(faces, 1):
        loss = sample_losses(model(x), y).sum()
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(sum((s * v).sum() for s, v in zip(slopes, direction.values(), strict=True)).item())
    found = alignment(model, faces, direction, radius=1e-3, device="cpu")
    assert np.allclose(found, expected, atol=0.03 * np.abs(expected).max())
    assert (alignment(model, faces, {n: 0 * v for n, v in direction.items()}, device="cpu") == 0).all()


@given(st.lists(st.floats(-1, 3), min_size=1, max_size=20), st.floats(0.05, 1), st.integers(0, 100))
def test_the_projection_is_the_nearest_point_allowed(scores, share, seed):
    scores, size = np.array(scores), share * len(scores)
    s = project_scores(scores, size)
    assert (s >= 0).all() and (s <= 1).all() and s.sum() <= size + 1e-6
    rng = np.random.default_rng(seed)
    for _ in range(20):  # no allowed point is nearer
        other = rng.random(len(scores))
        other *= min(1, size / other.sum())
        other = s + rng.random() * (other - s)
        assert ((scores - s) ** 2).sum() <= ((scores - other) ** 2).sum() + 1e-6


def test_maple_drops_samples_with_planted_wrong_labels():
    train, val = pictures(60, 0, signal=60), pictures(40, 1, signal=60)
    bad = np.random.default_rng(0).random(len(train)) < 0.2
    train.target = np.where(bad, 1 - train.target, train.target)
    config = SHORT.model_copy(update={"scale": (1.0, 1.0), "flip": 0.0})
    scores = maple_scores(network(), train, val, np.zeros(len(val)), config=config, outer_steps=8, size=0.7, **QUIET)
    assert scores.sum() <= 0.7 * len(train) + 1e-6
    assert scores[bad].mean() < 0.4 < 0.7 < scores[~bad].mean()


def test_maple_with_labelled_validation_groups_prefers_rare_groups():
    train, val = biased(400, 0), biased(200, 1)
    scores = maple_scores(network(), train, val, val.protected, config=SHORT, **QUIET)
    rare = train.target == train.protected
    assert scores[rare].mean() > scores[~rare].mean() + 0.05
    given_groups = train_maple(network(), train, val, val_groups=val.protected, config=SHORT, **QUIET)
    assert not same(given_groups, train_maple(network(), train, val, val_groups=1 - val.target, config=SHORT, **QUIET))


def test_maple_needs_validation_faces():
    with pytest.raises(ValueError, match="needs validation faces.* found 0 faces"):
        train_maple(network(), biased(40, 0), None, **QUIET)
    with pytest.raises(ValueError, match="40 faces and 3 groups"):
        train_maple(network(), biased(40, 0), biased(40, 1), val_groups=[0, 1, 0], **QUIET)
    with pytest.raises(ValueError, match="choose a larger size"):
        train_maple(network(), biased(40, 0), biased(40, 1), val_groups=[0, 1] * 20, size=1e-6, **QUIET)


# ---- DiGA's idea

@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A Stable Diffusion pipeline with small random networks for 32 pixels, and a tokenizer that spells."
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder, letters = tmp_path_factory.mktemp("tokenizer"), string.ascii_lowercase + string.digits + ",.-"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
            text_encoder=CLIPTextModel(text),
            vae=AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                              up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32),
            unet=UNet2DConditionModel(sample_size=16, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16,
                                      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4, norm_num_groups=4,
                                      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)


def portraits(n=6, side=32):
    rng = np.random.default_rng(0)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), np.arange(n) % 2, protected=rng.integers(0, 2, n),
                             ids=[f"{i:06d}.jpg" for i in range(n)])


def spoken(target, protected):
    return f"photo of a {('neutral', 'smiling')[target]} {('woman', 'man')[protected]}"


def pixels(faces):
    return faces.gather(slice(None)).numpy().astype(int)


def test_long_prompts_of_edits_are_told_in_one_line(pipeline, caplog):
    def at_length(target, protected): return spoken(target, protected) + ", in a photograph of the highest quality" * 20

    short = {f"{t}_{p}": [spoken(t, p)] * 3 for t in (0, 1) for p in (0, 1)}
    for prompts, of in ((at_length, "4 of 4"), (short | {"1_1": [at_length(1, 1)] * 2}, "2 of 11")):
        with pytest.warns(UserWarning, match=of + " prompts are longer than the [0-9]+ tokens") as caught:
            edit_protected(portraits(), pipeline, prompts, steps=4, strength=0.6, progress=False)
        assert len([w for w in caught if "longer" in str(w.message)]) == 1
    assert "truncated" not in caplog.text  # as the pipeline would say of every batch


def test_every_face_is_edited_towards_every_class_with_its_target_kept(pipeline, monkeypatch):
    from diffusers import StableDiffusionImg2ImgPipeline
    asked, original = [], StableDiffusionImg2ImgPipeline.__call__

    def spy(self, *args, **kwargs):
        asked.extend(kwargs["prompt"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionImg2ImgPipeline, "__call__", spy)
    faces = portraits()
    edited = edit_protected(faces, pipeline, spoken, steps=4, strength=0.6, progress=False)
    assert edited.size == faces.size and len(set(edited.ids)) == 12
    assert (edited.target == np.tile(faces.target, 2)).all() and (edited.protected == np.repeat([0, 1], 6)).all()
    assert asked == [spoken(t, p) for p in (0, 1) for t in faces.target]
    images = pixels(edited)
    assert (images[:6] != images[6:]).any((1, 2, 3)).all(), "the two edits of a face differ"
    only = edit_protected(faces, pipeline, spoken, protected=(1,), steps=4, strength=0.6, progress=False)
    assert np.abs(pixels(only) - images[6:]).max() <= 1 and (only.protected == 1).all()


def test_an_edit_depends_on_neither_batch_nor_company(pipeline):
    faces, how = portraits(), {"steps": 5, "progress": False, "strength": (0.2, 1.0)}
    images = pixels(edit_protected(faces, pipeline, spoken, **how))
    assert np.abs(pixels(edit_protected(faces, pipeline, spoken, batch_size=1, **how)) - images).max() <= 1
    assert np.abs(pixels(edit_protected(faces, pipeline, spoken, batch_size=4, **how)) - images).max() <= 1
    some = pixels(edit_protected(faces.select(np.array([4, 1])), pipeline, spoken, **how))
    assert np.abs(some - images[[4, 1, 10, 7]]).max() <= 1
    blind = faces.without_groups()
    assert (pixels(edit_protected(blind, pipeline, spoken, **how)) == images).all()
    assert (pixels(edit_protected(faces, pipeline, spoken, seed=1, **how)) != images).any((1, 2, 3)).all()


def test_an_edit_of_no_strength_is_the_autoencoders_reconstruction(pipeline):
    faces = portraits()
    edited = pixels(edit_protected(faces, pipeline, spoken, strength=0.0, progress=False))
    with torch.no_grad():
        x = faces.gather(slice(None)).float() / 127.5 - 1
        decoded = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(edited - np.tile(expected, (2, 1, 1, 1))).max() <= 1
    weak = pixels(edit_protected(faces, pipeline, spoken, strength=0.04, steps=20, progress=False))
    assert (weak == edited).all(), "less than one step"


def test_faces_of_another_size_come_back_in_their_own(pipeline):
    faces = portraits(2, side=24)
    assert edit_protected(faces, pipeline, spoken, steps=2, progress=False).size == (24, 24)
    assert edit_protected(faces, pipeline, spoken, steps=2, size=16, progress=False).size == (24, 24)


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 30), st.integers(0, 5))
def test_the_plan(a, b, steps, seed):
    low, high = sorted((a, b))
    prompts = {f"{t}_{p}": [f"{t}{p} {i}" for i in range(3)] for t in (0, 1) for p in (0, 1)}
    plan = edit_plan(portraits(), prompts, strength=(low, high), steps=steps, seed=seed)
    assert plan.strength.between(low, high).all() and (plan.steps == (steps * plan.strength).astype(int)).all()
    assert plan.seed.is_unique and (plan.prompt.str[:2] == plan.target.astype(str) + plan.protected.astype(str)).all()
    assert (plan.target == portraits().target[plan.row]).all()


def test_faults_of_a_plan():
    with pytest.raises(ValueError, match="no prompt for group 1_0; there are 0_0"):
        edit_plan(portraits(), {"0_0": ["a woman"]})
    for strength in (1.2, (0.6, 0.4), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="strength is"):
            edit_plan(portraits(), spoken, strength=strength)


def test_settings_of_edits():
    assert EditSettings(images="3", strength=[0, 1]).strength == (0.0, 1.0) and EditSettings().images is None
    for wrong, message in (({"images": 0}, "images = 0"), ({"denoising_steps": 0}, "steps = 0"), ({"strength": (0.5, 1.5)}, "strength is"),
                           ({"strengh": 1}, "did you mean strength")):
        with pytest.raises(ValueError, match=message) as caught:
            EditSettings(**wrong)
        assert "\n" not in str(caught.value)
    plan = edit_plan(portraits(), spoken)
    assert plan.strength.between(*EditSettings().strength).all()


def test_the_users_pipeline_keeps_its_bar(pipeline):
    from diffusers import AutoPipelineForImage2Image
    for own in (pipeline, AutoPipelineForImage2Image.from_pipe(pipeline)):
        own.set_progress_bar_config(disable=True, desc="mine")
        parts = dict(own.components)
        edit_protected(portraits(2), own, spoken, steps=2, progress=False)
        assert own._progress_bar_config == {"disable": True, "desc": "mine"} and own.components == parts


def test_diga_trains_on_real_and_edited_faces():
    train, val = biased(80, 0), biased(40, 1)
    made = train_diga(network(), train, val, edited=edits(train), config=SHORT, **QUIET)
    both = Faces.concat([train, edits(train)])
    assert len(both) == 240 and same(made, fit(network(), both, val, config=SHORT, **QUIET))


# ---- methods that are offered synthetic images

def test_ffr_is_two_trainings():
    train, val, synthetic = biased(100, 0), biased(60, 1), pictures(20, 2)
    config = SHORT.model_copy(update={"epochs": 4})
    fitted = train_ffr(network(), train, val, synthetic=synthetic, config=config, **QUIET)
    adam = config.model_copy(update={"optimizer": "adam", "lr": 0.001, "weight_decay": 1e-5})
    first = fit(network(), synthetic, val, config=adam.model_copy(update={"epochs": 2}), **QUIET).model
    assert same(fitted, fit(first, train, val, config=adam, **QUIET))


def test_jtt_with_synthetic_images_sees_each_once():
    train, val, synthetic = biased(100, 0), biased(60, 1), pictures(20, 2)
    alone = train_jtt_synthetic(network(), train, val, synthetic=synthetic, upweight=1, config=SHORT, **QUIET)
    assert same(alone, fit(network(), Faces.concat([train, synthetic]), val, config=SHORT, **QUIET))


# ---- methods that read group labels

def test_group_dro_draws_groups_equally_often(monkeypatch):
    train, rows = biased(300, 0), []
    original = GroupDRO.loss
    monkeypatch.setattr(GroupDRO, "loss", lambda self, z, y, r: (rows.extend(r.tolist()), original(self, z, y, r))[1])
    groups = 2 * train.target + train.protected
    train_group_dro(network(), train, None, groups=groups, config=SHORT.model_copy(update={"steps": 60}), **QUIET)
    share = np.bincount(groups[rows]) / len(rows)
    assert np.bincount(groups).min() < 20 and np.abs(share - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(rows))
    assert len(balanced_sampling(groups)) == 300
    with pytest.raises(ValueError, match="each of 300 training images; found 3"):
        train_group_dro(network(), train, None, groups=[0, 1, 2], config=SHORT, **QUIET)


@pytest.mark.parametrize("outputs, c", [(1, 1.0), (1, 0.05), (3, 0.1)])
def test_sparse_regression_is_at_the_optimum(outputs, c):
    "The subgradient of C times the losses plus the absolute weights holds zero: an equality where a weight is not zero, else a bound."
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    y = (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 4).long() * (outputs > 1)
    y = torch.where(torch.rand(200, generator=generator) < 0.1, 0, y)
    w, b = sparse_regression(x, y, outputs, c=c, steps=20_000)
    z = x.double() @ w.double().T + b.double()
    p = torch.sigmoid(z) - y[:, None] if outputs == 1 else z.softmax(1) - F.one_hot(y, outputs)
    slope = c * p.T @ x.double()
    assert 0 < (w == 0).sum() < w.numel() and (c * p.sum(0)).abs().max() < 1e-2
    assert (slope + w.sign())[w != 0].abs().max() < 2e-2 and slope[w == 0].abs().max() < 1 + 2e-2


def test_the_last_layer_is_the_mean_over_balanced_sets_of_standardised_features():
    rng = np.random.default_rng(0)
    x, groups = torch.from_numpy(rng.normal(3, 2, (60, 5))).float(), np.repeat([0, 1, 2, 3], [30, 10, 10, 10])
    y = groups // 2
    w, b = balanced_head(x, y, groups, x, 1, c=0.5, draws=1, seed=3)
    kept = {g: int((groups == g).sum()) for g in range(4)}
    assert min(kept.values()) == 10
    shifted, scaled = balanced_head(x + 7, y, groups, x + 7, 1, c=0.5, draws=4), balanced_head(5 * x, y, groups, 5 * x, 1, c=0.5, draws=4)
    plain = balanced_head(x, y, groups, x, 1, c=0.5, draws=4)
    for other, moved in ((shifted, x + 7), (scaled, 5 * x)):  # units and origin of features do not matter
        assert torch.allclose(moved @ other[0].T + other[1], x @ plain[0].T + plain[1], atol=1e-3)
    assert w.shape == (1, 5) and b.shape == (1,)


@pytest.mark.parametrize("outputs", [1, 2])
def test_dfr_changes_the_last_layer_alone_and_judges_it_on_images_it_has_not_seen(outputs):
    train, val = biased(200, 0), pictures(40, 1, signal=0)  # nothing to learn in the validation images
    config = SHORT.model_copy(update={"steps": 20})
    erm = train_erm(network(outputs=outputs), train, val, config=config, **QUIET)
    dfr = train_dfr(network(outputs=outputs), train, val, val_groups=2 * val.target + val.protected, config=config, c=100, draws=2, **QUIET)
    a, b = erm.model.state_dict(), dfr.model.state_dict()
    assert {k for k in a if not torch.equal(a[k], b[k])} == {"5.weight", "5.bias"}
    seen = (predict_logits(dfr.model, val, device="cpu"))
    seen = (seen[:, 0] > 0 if outputs == 1 else seen.argmax(1)) == val.target
    assert seen.mean() > dfr.val_accuracy + 0.15 and abs(dfr.val_accuracy - 0.5) < 0.15
    with pytest.raises(ValueError, match="160 faces and 2 groups"):
        train_dfr(network(), train, val, val_groups=[0, 1], config=config, **QUIET)


def test_dfr_on_synthetic_groups_needs_them():
    train, val = biased(80, 0), biased(40, 1)
    with pytest.raises(ValueError, match="groups of its 80 synthetic faces"):
        train_dfr_synthetic(network(), train, val, synthetic=train.without_groups(), config=SHORT, **QUIET)
    fitted = train_dfr_synthetic(network(), train, val, synthetic=pictures(15, 3), config=SHORT, **QUIET)
    assert fitted.val_accuracy == ((predict_logits(fitted.model, val, device="cpu")[:, 0] > 0) == val.target).mean()


# ---- together, on drawn faces

@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_method_learns_on_drawn_faces(name):
    from aimfair.toyfaces import draw, sample_factors

    def faces(n, seed):
        t, p = np.repeat([0, 1], n // 2), np.arange(n) % 10
        p = np.where(p == 0, t, 1 - t)
        return Faces.from_arrays(draw(sample_factors(n, seed=seed, Smiling=t, Male=p)), t, protected=p)

    config = TrainConfig(epochs=5, batch_size=64, lr=0.05, milestones=(4,), scale=(0.7, 1.0), flip=0.5)
    start = create_model("toy_resnet18", weights="bundled")
    fitted = trained(name, faces(480, 11), faces(300, 12), model=start, config=config)
    assert np.isfinite(fitted.history.loss[:5]).all()
    assert all(torch.isfinite(v).all() for v in fitted.model.state_dict().values())
    assert fitted.val_accuracy > 0.6, f"{name}: {fitted.val_accuracy}"


def test_the_module_needs_no_diffusers_to_be_imported():
    assert CVaRSettings().alpha == 0.5 and not hasattr(baselines, "diffusers")
    assert train_lff is BASELINES["LfF"].train
