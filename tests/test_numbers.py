"Numbers as loops over NumPy's ranges and columns of tables hand them on: they mean what Python's mean, and no run is another for them"
import numpy as np
import pytest
import torch

from aimfair.data import Faces, batches, faces_table, load_faces
from aimfair.data.reading import parse_bins
from aimfair.finetuning import finetune
from aimfair.models import create_model
from aimfair.pipeline import AIMFair
from aimfair.prompts import GrammarBackend, write_prompts
from aimfair.sensitivity import gradient_pass
from aimfair.synthesis import SynthesisConfig, synthesize
from aimfair.t2i import T2IConfig, train_t2i
from aimfair.toyfaces import write_celeba, write_groups
from aimfair.training import TrainConfig, fit

BOTH = [(int, float), (np.int64, np.float64)]


@pytest.fixture(scope="module")
def faces():
    rng, n = np.random.default_rng(0), 48
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), np.arange(n) % 2, np.arange(n) // 2 % 2)


def config(i, f):
    return TrainConfig(epochs=i(1), batch_size=i(16), lr=f(0.01), milestones=())


def pixels(f):
    return (0.5, 0.5, 0.5) if f is float else np.full(3, 0.5)


def weights(model):
    return {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("learn", [
    lambda i, f, faces, **how: fit(create_model("toy_resnet18", seed=i(3)), faces, faces, config=config(i, f), seed=i(2), **how),
    lambda i, f, faces, **how: finetune(create_model("toy_resnet18", seed=i(3)), faces, faces, strategy="full", config=config(i, f),
                                        seed=i(2), **how),
], ids=["fit", "finetune"])
def test_a_training_goes_on_where_one_with_other_numbers_was(learn, faces, tmp_path):
    epochs = []
    how = {"checkpoint": tmp_path / "run.pt", "callback": lambda *of: epochs.append(of), "progress": False, "device": "cpu"}
    first, second = (learn(*numbers, faces, **how) for numbers in BOTH)
    assert len(epochs) == 1 and weights(first.model) == weights(second.model)


def test_bins_begin_at_the_same_numbers():
    assert parse_bins([18, 40]) == parse_bins(np.array([18, 40])) == parse_bins([np.float64(18), 40])


def test_gradients_and_batches(faces):
    one, other = (gradient_pass(create_model("toy_resnet18"), faces, batch_size=i(16), seed=i(1), device="cpu") for i, _ in BOTH)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [len(batch[1]) for batch in batches(faces, np.int64(20))] == [20, 20, 8]


def test_the_method_goes_on_and_is_saved(faces, tmp_path):
    def done(i, f):
        aim = AIMFair(create_model("toy_resnet18"), config=config(i, f), k=i(40), bias=f(0.1), seed=i(1), gradient_batch_size=i(8),
                      majority="0_1,1_0", mean=pixels(f), std=pixels(f), device="cpu", progress=False)
        return aim.fit(real=faces, synthetic=faces, val=faces, checkpoint=tmp_path / "checkpoint")

    first, second = (done(*numbers) for numbers in BOTH)
    assert weights(first.model) == weights(second.model)
    one, other = (result.save(tmp_path / name) / "report.json" for name, result in (("one", first), ("other", second)))
    assert one.read_text() == other.read_text()


def test_a_set_of_images_is_the_same_set(tmp_path):
    def made(i, f):
        drawn = SynthesisConfig(steps=i(1), guidance_scale=f(1.5), batch_size=i(2))
        return synthesize({"1_0": ["a face"]}, per_group=i(2), out=tmp_path, seed=i(1), max_attempts=f(3), config=drawn, shard=(i(0), i(1)),
                          device="cpu", progress=False)

    first, times = made(*BOTH[1]), {p: p.stat().st_mtime_ns for p in tmp_path.glob("*_*/*.png")}
    assert first.equals(made(*BOTH[0])) and len(times) == 2
    assert all(p.stat().st_mtime_ns == t for p, t in times.items()), "images that were there are not made again"


def test_files_have_the_same_bytes(tmp_path):
    for name, (i, f) in zip(("one", "other"), BOTH, strict=True):
        write_groups(tmp_path / name / "groups", per_group=i(2), size=i(32), seed=i(1))
        write_celeba(tmp_path / name / "celeba", n_train=i(4), n_val=i(2), n_test=i(2), size=i(32), seed=i(1), gap=f(1.0))
        write_prompts("toy-smiling-male", backend=GrammarBackend(), per_group=i(2), seed=i(1)).save(tmp_path / name / "prompts.json")
    one, other = ({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
                  for name in ("one", "other"))
    assert one == other and len(one) > 16
    table = faces_table(tmp_path / "one/groups", groups=True)
    assert load_faces(table, size=np.int64(32), cache=tmp_path / "cache", progress=False).size == (32, 32)


def test_a_generator_goes_on(faces, tmp_path):
    def trained(i, f):
        how = T2IConfig(size=i(32), steps=i(1), decoder_steps=i(1), batch_size=i(4), decoder_batch=i(4), lr=f(1e-4))
        images = faces.gather(slice(0, 8)).numpy()
        return train_t2i(images, [["a face"]] * 8, out=tmp_path, config=how, seed=i(1), device="cpu", progress=False)

    one, other = (weights(trained(*numbers).unet) for numbers in BOTH)
    assert one == other
