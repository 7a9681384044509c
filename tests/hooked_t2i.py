"""train_t2i.py, after running what a test wants to break or record: Python code in $HOOK."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report_t2i as report  # noqa: F401
import rf  # noqa: F401
import train_t2i
import zero  # noqa: F401

exec(os.environ.get("HOOK", ""))
train_t2i.main()
