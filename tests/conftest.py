"""Fixtures that several files share: made-up photographs, and real ones where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from samples import write_photos

TEST_DATA = "MNV2_TEST_DATA"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU here"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real photographs, weights and expected logits."""
    folder = os.environ.get(TEST_DATA)
    if folder is None:
        pytest.skip(f"{TEST_DATA} names no folder of real photographs and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A data folder of 23 training and 11 validation pictures in three classes."""
    root = tmp_path_factory.mktemp("photos with spaces")
    write_photos(root / "train", 23)
    write_photos(root / "val", 11, start=100)
    return root
