"Batches that a background thread gathers are those of a program without one, and the thread ends with whoever asked for them."

import math
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimfair.data import Augment, Faces, Waited, batches, chosen_batches, synchronize
from aimfair.data.batching import worked_ahead


def some_faces(n, seed=0, groups=True):
    rng = np.random.default_rng(seed)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, 8, 8), np.uint8), rng.integers(0, 3, n), rng.integers(0, 2, n) if groups else None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def helpers():
    return [t for t in threading.enumerate() if t.name.startswith("aimfair-ahead")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not helpers()


@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_same_batches_ahead_and_not(n, size, shuffle, drop_last, augmented, groups, seed):
    "Rows, pixels, labels, and where the generator stands after every batch."
    faces, found = some_faces(n, seed, groups), []
    for ahead in (False, True):
        g, augment = generator(seed), Augment() if augmented else None
        several = batches(faces, size, shuffle=shuffle, drop_last=drop_last, augment=augment, generator=g, ahead=ahead)
        found.append([(*(part.clone() for part in batch), g.get_state()) for batch in several])
    assert len(found[0]) == len(found[1]) == (n // size if drop_last else math.ceil(n / size))
    assert all(torch.equal(a, b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 12))
def test_items_come_in_order_and_only_a_few_early(n, depth, taken):
    asked = []

    def items():
        for i in range(n):
            asked.append(i)
            yield i

    with closing(worked_ahead(lambda i: -i, items(), depth)) as several:
        got = [i for i, _ in zip(several, range(taken), strict=False)]
        assert got == [-i for i in range(min(n, taken))]
        assert asked == list(range(len(asked))) and len(asked) <= taken + 1 + depth
    assert not helpers()


def test_on_a_cpu_there_is_no_thread_unless_asked_for():
    for ahead, threads in ((None, 0), (False, 0), (True, 1)):
        with closing(batches(some_faces(30), 2, ahead=ahead)) as several:
            next(several)
            assert len(helpers()) == threads


def test_other_devices_are_served_ahead():
    "A device without memory stands for one: the batches are there, and so is the thread."
    with closing(batches(some_faces(30), 2, device="meta", augment=lambda x, g: x.float(), generator=generator())) as several:
        first = next(several)
        assert (first.images.device.type, first.target.device.type, first.rows.tolist()) == ("meta", "meta", [0, 1])
        assert len(helpers()) == 1


@pytest.mark.parametrize("error", [RuntimeError("the consumer broke"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"])
def test_a_broken_consumer_leaves_no_thread(error):
    "Even while the error, and with it the frames that it passed, is kept."
    with pytest.raises(type(error)) as kept:
        for i, _ in enumerate(batches(some_faces(40), 2, ahead=True)):
            assert len(helpers()) == 1
            if i == 2:
                raise error
    assert kept.value is error and not helpers()


def test_an_error_of_the_thread_is_the_consumers_own():
    "The very error, after the batches before it."
    class Broken(Faces):
        def gather(self, index):
            if 6 in index:
                raise error
            return super().gather(index)

    whole, error, seen = some_faces(20), OSError(5, "the disk is gone"), []
    faces = Broken(whole._sources, whole._source, whole._row, whole.target)
    for ahead in (False, True):
        seen.clear()
        with pytest.raises(OSError) as raised:
            for batch in batches(faces, 2, ahead=ahead):
                seen.append(batch.rows.tolist())
        assert raised.value is error and seen == [[0, 1], [2, 3], [4, 5]] and not helpers()


def test_rows_may_be_any_iterable():
    rows = [torch.tensor([3, 3, 0]), torch.tensor([1])]
    for ahead in (False, True):
        assert [b.rows.tolist() for b in chosen_batches(some_faces(5), iter(rows), ahead=ahead)] == [[3, 3, 0], [1]]
        assert not list(chosen_batches(some_faces(5), (), ahead=ahead))


def test_training_on_batches_from_ahead_is_the_same(monkeypatch):
    "The loop, gradients and predictions, bit by bit; and no thread outlives an epoch that breaks."
    import aimfair.sensitivity.gradients as gradients
    import aimfair.training.loop as loop
    import aimfair.training.predictions as predictions
    from aimfair.models import create_model
    from aimfair.sensitivity import gradient_pass, group_gradients
    from aimfair.training import TrainConfig, fit, predict_logits

    faces, quick = some_faces(24, 1), TrainConfig(epochs=2, batch_size=8, milestones=())
    faces = faces.relabelled(faces.target % 2, faces.protected)

    def numbers():
        model = fit(create_model("toy_resnet18", seed=0), faces, faces, config=quick, device="cpu", progress=False).model
        mean, groups = gradient_pass(model, faces, batch_size=8, augment=Augment(), passes=2, device="cpu"), group_gradients(
            model, faces, batch_size=4, augment=Augment(), device="cpu")
        return [predict_logits(model, faces, batch_size=5, device="cpu"), *(g.numpy() for g in mean.values()),
                *(g.numpy() for of in groups.mean.values() for g in of.values())]

    def early(function):
        used = []
        return lambda *args, **how: (used.append(1), function(*args, **{**how, "ahead": True}))[1], used

    plain, uses = numbers(), []
    for module, name in ((loop, "chosen_batches"), (predictions, "batches"), (gradients, "batches")):
        function, used = early(getattr(module, name))
        monkeypatch.setattr(module, name, function)
        uses.append(used)
    assert all(np.array_equal(a, b) for a, b in zip(plain, numbers(), strict=True)) and all(uses)

    def broken(logits, y, rows): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        fit(create_model("toy_resnet18", seed=0), faces, None, config=quick, loss_fn=broken, device="cpu", progress=False)
    assert kept.value.__traceback__ and not helpers()


def test_the_share_of_waiting_is_what_next_takes():
    "20 ms for a batch and 5 ms for the work: four fifths of the time is waiting; of the first batch, too."
    def slow():
        for i in range(8):
            time.sleep(0.02)
            yield i

    waited = Waited(slow())
    assert math.isnan(waited.share)
    for _ in waited:
        time.sleep(0.005)
    assert waited.waiting >= 8 * 0.02 and waited.total >= 8 * 0.025 and 0.5 < waited.share < 0.95
    synchronize("cpu")


def test_waiting_is_measured_to_the_end_and_leaves_no_thread():
    "Whole, and where the consumer breaks."
    waited = Waited(batches(some_faces(20), 2, ahead=True))
    assert sum(len(b.rows) for b in waited) == 20 and 0 < waited.share < 1
    broken = Waited(batches(some_faces(40), 2, ahead=True))
    with pytest.raises(ZeroDivisionError) as kept:
        for batch in broken:
            len(batch) // 0
    assert kept.value.__traceback__ and not helpers()
    assert [n for n in Waited([1, 2])] == [1, 2]
