"""What every test runs under: no network, no user's cache, and property tests that are the same on every machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

import hypothesis
import pytest

# No deadline: a slow machine is no bug. Derandomized: a red test is red for everyone.
hypothesis.settings.register_profile("clue", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("clue")

_cache = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A shell ignores Ctrl-C on behalf of what it starts in the background, and tests of Ctrl-C would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The first process makes one cache folder for trained models; the others of a parallel run inherit it.
    if "CLUE_CACHE" not in os.environ:
        config.stash[_cache] = os.environ["CLUE_CACHE"] = tempfile.mkdtemp(prefix="clue-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_cache, ""):
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["CLUE_CACHE"]
