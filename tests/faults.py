"Faults that tests cause: an interruption at a chosen call, and `kill -9` at a chosen moment."

import signal
import time


def interrupt_at(monkeypatch, owner, name, call):
    "From now on the given call of `owner.name`, counted from 1, is interrupted as if by Ctrl-C; `monkeypatch.undo()` ends it."
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def kill_when(process, ready, pause=0.0, timeout=120):
    "Kill a process as soon as `ready()` holds, and `pause` seconds later; whether it was still running. Waits for its end."
    end = time.monotonic() + timeout
    while process.poll() is None and not ready() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL
