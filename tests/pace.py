"Bounds in seconds that hold on a slow or busy machine too: measured beside what they bound."
import hashlib
import json
import time

REFERENCE = 0.05  # seconds that `_work` takes on the machine for which bounds are written, with nobody else at work


def _work():
    for i in range(10_000):
        hashlib.sha256(json.dumps({"name": i, "after": [i - 1, i - 2]}, sort_keys=True).encode()).hexdigest()


def slowness() -> float:
    "How many times longer Python takes here and now than on the machine for which bounds are written; at least 1."
    start = time.process_time()
    _work()
    return max(1.0, (time.process_time() - start) / REFERENCE)
