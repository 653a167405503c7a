"""Hands everything in the library that takes a path one in the home folder, as a person would write it.

Prints a line for each call that failed or left something in the working folder, and ends with 1 if there was any."""
import os
import shutil
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from aimfair import data, experiments, finetuning, models, pipeline, prompts, report, repro, synthesis, t2i, toyfaces, training
from aimfair.core import asset
from aimfair.data.reading import image_names
from aimfair.debias import debias
from aimfair.explore import explore
from aimfair.fix import saved_report

HOME, WRONG = Path(os.environ["HOME"]), []
TRAINING = training.TrainConfig(epochs=1, batch_size=16, milestones=())
FILES = {"size": 32, "cache": "~/cache", "progress": False}


def call(function, *args, **how):
    "What a function returns, or None where it failed."
    name = f"{function.__module__}.{function.__qualname__}"
    try:
        result = function(*args, **how)
    except Exception as error:
        WRONG.append(f"{name}: {type(error).__name__}: {error}")
        return None
    if left := sorted(os.listdir()):
        WRONG.append(f"{name} left {left} in the working folder")
        os.rename(left[0], HOME / f"left by {name}")
    return result


def there(*names):
    "Note those that nobody wrote into the home folder."
    WRONG.extend(f"nothing at ~/{name}" for name in names if not (HOME / name).exists())


call(toyfaces.write_celeba, "~/celeba", n_train=40, n_val=20, n_test=20, size=32)
call(toyfaces.write_utkface, "~/utkface", n=40, size=32)
call(toyfaces.write_groups, "~/groups", per_group=12, size=32)
there("celeba", "utkface", "groups")
call(data.celeba, "~/celeba", target="Smiling", protected="Male")
call(data.celeba_attributes, "~/celeba")
call(data.utkface, "~/utkface")
if not call(data.is_celeba, "~/celeba"):
    WRONG.append("data.is_celeba does not see ~/celeba")
with warnings.catch_warnings():
    warnings.simplefilter("error")  # such as that its folders look like no images
    call(image_names, "~/groups")
table = call(data.faces_table, "~/groups", groups=True)
faces = call(data.load_faces, table, **FILES)
table.assign(image=table.path)[["image", "target"]].to_csv(HOME / "real.csv", index=False)
real = call(data.load_faces, call(data.faces_table, "~/real.csv", groups=False), **FILES)

network = models.create_model("toy_resnet18")
torch.save(network.state_dict(), HOME / "weights.pt")
(HOME / "network.py").write_text("from aimfair.models import create_model\n\n\ndef made(): return create_model('toy_resnet18')\n")
call(models.create_model, "toy_resnet18", weights="~/weights.pt")
call(models.model_from, "toy_resnet18", "~/weights.pt")
call(models.model_from, "~/network.py:made", "~/weights.pt")
call(training.save_backbone, network, "~/backbone.safetensors")
seen = []
for _ in range(2):
    call(training.fit, models.create_model("toy_resnet18"), real, real, config=TRAINING, checkpoint="~/checkpoints/fit.pt",
         callback=lambda *of: seen.append(of), progress=False)
WRONG += ["the second training did not find the checkpoint of the first"] * (len(seen) != 1)
call(finetuning.finetune, network, faces, real, strategy="full", config=TRAINING, checkpoint="~/checkpoints/tuned.pt", progress=False)
aim = pipeline.AIMFair(network, config=TRAINING, gradient_batch_size=8, majority="0_1,1_0", progress=False)
done = call(aim.fit, real=real, synthetic=faces, val=real, checkpoint="~/checkpoints/aim")
there("backbone.safetensors", "checkpoints/fit.pt", "checkpoints/tuned.pt", "checkpoints/aim")
call(done.save, "~/saved") if done else None
call(models.model_from, "toy_resnet18", "~/saved")
how = {"real": "~/real.csv", "val": "~/real.csv", "synthetic": "~/groups", "majority": "0_1,1_0", "epochs": 1, "batch_size": 16}
call(debias, model="toy_resnet18", weights="~/weights.pt", out="~/debiased", **how, **FILES)
call(debias, model=Path("~/network.py:made"), weights="~/weights.pt", out="~/debiased too", **how, **FILES)
there("saved", "debiased/run.json", "debiased too/run.json")
call(explore, "~/debiased")
call(saved_report, "~/debiased")

grammar = prompts.GrammarBackend()
call(prompts.write_file, "~/prompts.json", "toy-smiling-male", backend=grammar, per_group=2)
try:
    prompts.write_file("~/prompts.json", "toy-smiling-male", backend=grammar, per_group=2)
    WRONG.append("prompts that are there are written over")
except prompts.PromptError:
    pass
written = call(prompts.write_prompts, "toy-smiling-male", backend=grammar, per_group=2, checkpoint="~/prompts.jsonl")
call(written.save, "~/prompts too.json") if written else None
call(prompts.load_prompts, "~/prompts.json")
shutil.copy(asset("tasks/fairface-gender-race.toml"), HOME / "task.toml")
call(prompts.load_task, "~/task.toml")
call(prompts.write_prompts, "~/task.toml", backend=grammar, per_group=1)
call(synthesis.synthesize, "~/prompts.json", per_group=1, out="~/images", progress=False)
call(synthesis.attempts, "~/images")
call(synthesis.rejection_report, "~/images")
config = t2i.T2IConfig(size=32, steps=1, decoder_steps=1, batch_size=4, decoder_batch=4)
call(t2i.train_t2i, faces.gather(slice(0, 8)).numpy(), [["a face"]] * 8, out="~/generator", config=config, progress=False)
call(synthesis.synthesize, "~/prompts.json", generator="~/generator", per_group=1, out="~/images of mine", progress=False)
there("prompts.json", "prompts too.json", "images/manifest.parquet", "generator/model_index.json", "images of mine/manifest.parquet")

(HOME / "profile.toml").write_text("[data]\nkind = 'celeba'\nroot = '~/celeba'\nsize = 32\nn = 18\nn_train = 24\n")
call(repro.diagnose, "~/profile.toml", store="~/runs")
call(experiments.make_plan, "~/profile.toml", store="~/runs")
figure = plt.figure()
call(report.write_figure, figure, "~/figures/one")
call(report.remove_figure, "~/figures/one")
WRONG += ["the figure is still there"] * (HOME / "figures" / "one.pdf").exists()
call(report.write_csv, pd.DataFrame({"a": [1]}), "~/figures/two.csv")
there("figures/two.csv")
call(report.write_worlds, "~/figures")
print(*WRONG, sep="\n")
sys.exit(bool(WRONG))
