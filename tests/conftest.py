"""One thread for everything: on a busy machine a second one costs more than it brings.

And a browser for the tests that look at pages.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Iterator

import chromium
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """A tab of a browser that all tests of a file share."""
    profile = tmp_path_factory.mktemp("profile")
    with chromium.browser(profile) as page:
        yield page
    shutil.rmtree(profile, ignore_errors=True)
