"""Shared by the tests: the modules one folder up, and few threads."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two threads on busy cores wait for each other
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # no test waits for a network

from common import cpu  # noqa: E402


@pytest.fixture(autouse=True)
def plain_products():
    """The scripts may have switched to cpu.py's: every test begins with torch's own."""
    cpu.use(False)
