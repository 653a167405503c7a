import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings

# before numpy and torch are imported, and for the processes that tests start: workers of pytest-xdist share the cores
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="agg")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it runs in the background, and to their processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("aimfair", deadline=None, derandomize=bool(os.environ.get("CI")))  # a busy machine is no failure
settings.load_profile("aimfair")


def real_data_folder():
    "The folder with real faces, or why there is none."
    folder = os.environ.get("AIMFAIR_DATA")
    if not folder:
        return None, "AIMFAIR_DATA is not set: no real faces here"
    if not Path(folder).is_dir():
        return None, f"AIMFAIR_DATA={folder} is not a folder"
    return Path(folder), ""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the long ones first: short ones fill the gaps at the end
    folder, reason = real_data_folder()
    for item in items:
        if folder is None and item.get_closest_marker("real_data"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item):
    "Where time is short, slow tests begin only until a moment, in seconds since 1970; others are told as skipped."
    until = float(os.environ.get("AIMFAIR_SLOW_UNTIL") or "inf")
    if item.get_closest_marker("slow") and time.time() > until:
        pytest.skip("no time left for slow tests: AIMFAIR_SLOW_UNTIL is over")


@pytest.fixture(scope="session")
def real_data():
    "Folder of the real data sets: celeba-10k, celeba-6k, utkface-dev, sdfd."
    folder, reason = real_data_folder()
    if folder is None:
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def repository():
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "The same sums on every machine. Only where a test module imported torch: importing it here would slow all others."
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    "Chromium, driven by playwright."
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
