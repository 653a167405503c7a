"Machines that share a store: processes which make, share and copy artifacts, and may be killed at any moment."
import json
import os
import random
import time
import uuid
from contextlib import suppress
from pathlib import Path

from aimfair.repro.store import Artifact, RemoteStore, Store

SIZES = {"empty": 0, "note.txt": 3, "deep/table": 1000, "deep/er/weights": 70_000, "images": 300_000}  # bytes
MAKER = ("maker-1", "deep/maker-2")  # both name who made the artifact: the files of an artifact are of one attempt


def artifacts(turn, n=6):
    "Some artifacts of a turn, the later made from earlier ones."
    first = [Artifact("draw", {"turn": turn, "n": i}) for i in range(n)]
    return first + [Artifact("join", {"turn": turn, "n": i}, (first[i], first[i - 1])) for i in range(n // 2)]


def content(artifact, name):
    "What a file has to contain."
    return random.Random(f"{artifact.hash}/{name}").randbytes(SIZES[name])


def make(artifact, store, pause=0.0):
    "What makes an artifact, slowly, and after what it is made from."
    def write(folder):
        for other in artifact.inputs:
            check(read(store.get(other, make(other, store, pause))), other)
        who = uuid.uuid4().hex.encode()
        for name in (MAKER[0], *SIZES, MAKER[1]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as f:
                f.write((who if name in MAKER else content(artifact, name))[:100])
                f.flush()
                time.sleep(pause)
                f.write((who if name in MAKER else content(artifact, name))[100:])
    return write


def read(folder):
    "{name: bytes} of all files of a folder."
    found = {}
    for p in sorted(Path(folder).rglob("*")):
        with suppress(FileNotFoundError, IsADirectoryError):  # given up in between
            found[p.relative_to(folder).as_posix()] = p.read_bytes()
    return found


def check(files, artifact):
    "The files of an artifact are all there, with the right bytes, of one attempt."
    assert set(files) == {*SIZES, *MAKER, "artifact.json"}, f"{artifact.config}: {sorted(files)}"
    wrong = [name for name in SIZES if files[name] != content(artifact, name)]
    assert not wrong, f"{artifact.config}: {wrong} differ"
    assert files[MAKER[0]] == files[MAKER[1]] and len(files[MAKER[0]]) == 32, f"{artifact.config}: parts of two attempts"
    assert json.loads(files["artifact.json"])["config"] == artifact.config


def work(where, copies, turn, seed, pause, environment):
    "What a machine does: ask for all artifacts of a turn, in an order of its own, and look at each."
    os.environ.update(environment)
    store = RemoteStore(where, copies=copies) if copies else Store(where)
    for artifact in random.Random(seed).sample(artifacts(turn), len(artifacts(turn))):
        check(read(store.get(artifact, make(artifact, store, pause))), artifact)
