"""Shared by the tests: the modules one folder up, few threads, and a small labelled folder."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two threads on busy cores wait for each other
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # no test waits for a network

from common import cpu  # noqa: E402


@pytest.fixture(autouse=True)
def plain_products():
    """The scripts may have switched to cpu.py's: every test begins with torch's own."""
    cpu.use(False)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of ten 20×16 colour pictures: red ones and blue ones, in three formats."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(["blue", "red"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 60, (16, 20, 3), dtype=np.uint8)
            pixels[..., 2 - 2 * k] += 180
            suffix = ("png", "jpg", "bmp")[i % 3]
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.{suffix}")
    return tmp_path / "images"
