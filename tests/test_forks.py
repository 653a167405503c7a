"Forks: they share what was imported, take over the environment of the day, and end with who started them."
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from aimfair.forks import FORKS, Forks, show_warnings, tell_warnings
from aimfair.repro.scheduler import Processes

KERNEL = """
import asyncio, time
from aimfair.repro.kernels import Kernels, own_kernel

async def start():
    with own_kernel() as name:
        manager = Kernels(kernel_name=name)
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=100)
        print(manager.provisioner.pid, flush=True)
        time.sleep(100)

asyncio.run(start())
"""
linux = pytest.mark.skipif(not FORKS, reason="processes start anew here")


def memory(end):
    "MB of this process, and of these what no other one has."
    parts = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    end.send((int(parts["Rss:"]) / 1024, int(parts["Private_Dirty:"]) / 1024, "torch" in sys.modules))


@linux
def test_they_share_what_was_imported():
    context = Forks()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=memory, args=(theirs,))
    process.start()
    has, alone, imported = ours.recv()
    process.join()
    assert imported and has > 200 and alone < has / 4, (has, alone)


@linux
def test_a_kernel_ends_with_who_started_it_and_is_deaf_to_its_terminal():
    starter = subprocess.Popen([sys.executable, "-c", KERNEL], stdout=subprocess.PIPE, text=True)
    try:
        kernel = psutil.Process(int(starter.stdout.readline()))
        assert os.getsid(kernel.pid) == kernel.pid != os.getsid(starter.pid)
        starter.send_signal(signal.SIGKILL)
        starter.communicate(timeout=30)  # which lasts as long as somebody has its output open, such as the kernel
        assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    finally:
        starter.kill()


@pytest.mark.parametrize("at_once", [False, True])
def test_what_workers_warn_of_is_said_once_and_as_the_parent_says_it(at_once):
    two = Processes(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = [two.pool.submit(warnings.warn, "3 images are left out", FutureWarning) for _ in range(8)]
        asked += [two.pool.submit(warnings.warn, "3 images are left out", UserWarning), two.pool.submit(warnings.warn, "z" * 9999)]
        for future in asked:
            future.result(timeout=100)
        two.close(at_once)
    said = sorted((w.category.__name__, str(w.message)) for w in caught)
    assert said == [("FutureWarning", "3 images are left out"), ("UserWarning", "3 images are left out"), ("UserWarning", "z" * 600)]


def test_no_warning_stops_who_gives_it_or_who_shows_it():
    class Unknown(UserWarning):
        "Of no module, so that it cannot be sent as it is."

    of, to = Forks().Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        tell_warnings(to)
        to.send("no warning")  # cannot be taken apart
        to.send_bytes(b"not even an object")
        warnings.warn("of an unknown kind", Unknown, stacklevel=1)
    to.close()
    with warnings.catch_warnings(record=True) as caught:
        show_warnings(of)
    assert [(w.category, str(w.message)) for w in caught] == [(UserWarning, "of an unknown kind")]


BAR = """
from pathlib import Path
import nbformat
from aimfair.repro.kernels import own_kernel
from aimfair.repro.notebooks import execute

cells = [nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
         nbformat.v4.new_code_cell("from tqdm.auto import tqdm; print(sum(tqdm(range(n))))")]
spec = {"name": "python3", "display_name": "", "language": "python"}
nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": spec}), "a.ipynb")
if __name__ == "__main__":
    with own_kernel() as kernel:
        print(execute(Path("a.ipynb"), Path("b.ipynb"), {"n": 4}, kernel))
    print([output.text for cell in nbformat.read("b.ipynb", 4).cells for output in cell.outputs if output.get("name") == "stdout"])
"""


def test_a_notebook_with_a_progress_bar_leaves_nothing_behind(tmp_path):
    ran = subprocess.run([sys.executable, "-c", BAR], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "None\n['6\\n']\n" and "leaked" not in ran.stderr, (ran.stdout, ran.stderr)


HERE = """
import sys
from aimfair import experiments
from aimfair.forks import Forks, prepare
from {tests} import memory, nested

if {thread}:
    import threading
    threading.Thread(target=threading.Event().wait, daemon=True).start()
prepare(here={here})
of, to = Forks().Pipe(duplex=False)
for ask in (memory, nested):
    fork = Forks().Process(target=ask, args=(to,))
    fork.start()
    print(*of.recv(), flush=True)
    fork.join()
memory(to)
print(*of.recv(), flush=True)
sys.stdin.readline()
"""


def nested(end):
    "What a fork of a fork has to tell."
    of, to = Forks().Pipe(duplex=False)
    fork = Forks().Process(target=to.send, args=(("of a fork",),))
    fork.start()
    end.send(of.recv())
    fork.join()


@linux
@pytest.mark.parametrize("here, thread", [(False, False), (True, False), (True, True)], ids=["anew", "here", "threaded"])
def test_a_server_that_is_a_fork_shares_what_the_program_has_imported(here, thread):
    code = HERE.format(here=here, thread=thread, tests=__name__)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}) as program:
        try:
            _, alone, imported = program.stdout.readline().split()
            assert program.stdout.readline() == "of a fork\n"
            has, own, _ = map(float, program.stdout.readline().replace("True", "1").split())
            others = psutil.Process(program.pid).children(recursive=True)
            assert imported == "True" and float(alone) < has / 4 and len(others) == 2  # the server, and who keeps track of what is shared
            assert (own < has / 4) == (here and not thread), (own, has)
            program.kill()
            assert not psutil.wait_procs(others, 30)[1]
        finally:
            program.kill()


def test_what_is_imported_before_a_fork_asks_for_no_gpu():
    "A process that has used CUDA leaves its forks without."
    code = ("import torch\ndef no(*_): raise RuntimeError('a GPU was asked for')\n"
            "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = no\n"
            "from importlib import import_module\nfrom aimfair.forks import PRELOADED\n"
            "for name in ('aimfair.cli.commands', *PRELOADED):\n    import_module(name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "asked for" not in done.stderr, done.stderr
