"Forks: they share what was imported, take over the environment of the day, and end with who started them."
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from aimfair.forks import FORKS, Forks

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
