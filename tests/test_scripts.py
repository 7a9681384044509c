"""The pipelines of tools/, from first line to last, with tiny networks and few samples."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_encoders import tiny_clip, tiny_t5, tiny_vae
from test_prepare import pictures
from test_prepare import run as prepare
from test_ranks import free_port

from common.pipeline import Pipeline, checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
QUICK = """--samples 32 --batch-size 8 --eval-every-samples 16 --save-every-samples 16 --threads 1
--eval-prompts 1 --sample-steps 1 --warmup-samples 8 --cooldown-samples 8"""
ONE_LINE = " ".join(QUICK.split())


def script(name, *options, path="", **values):
    """Run tools/NAME → what it said. The programs are those of this environment."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env |= {"PATH": f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"MASTER_PORT": str(free_port())} | {key: str(value) for key, value in values.items()}
    command = ["bash", str(ROOT / "tools" / name), *map(str, options)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_laptop(tmp_path):
    out = tmp_path / "run"
    script("laptop.sh", *QUICK.split(), OUT=out, PER_TAG=1)
    for file in ("run-scores.png", "run-scores.csv", "run-pictures.png", "run-pictures.gif"):
        assert (tmp_path / file).exists()


def test_node(tmp_path):
    """Two processes in place of eight GPUs; together they fill one folder."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"number {i}"}) for i in range(3)))
    names = {
        "SOURCE": pictures(tmp_path / "pictures", sizes=[(48, 48)]),
        "OUT": tmp_path / "run",
        "DATA": tmp_path / "rows",
        "T5": tiny_t5(tmp_path / "t5"),
        "VAE": tiny_vae(tmp_path / "vae"),
        "CLIP": tiny_clip(tmp_path / "clip"),
        "PROMPTS": prompts,
    }
    how = {"SIZE": 32, "GPUS": 2, "TOKENS": 8, "PRESET": "tiny"}
    script("node.sh", *QUICK.split(), **names, **how)
    drawn = list((tmp_path / "run-geneval").glob("*/samples/*.png"))
    assert len({file.parents[1] for file in drawn}) == 3
    (pipeline,) = tmp_path.glob("run-diffusers-*/model_index.json")
    shutil.rmtree(pipeline.parent)
    pipeline.parent.mkdir()
    (pipeline.parent / "made_by.txt").write_text("sample_t2i.py --export")  # it was killed
    script("node.sh", *QUICK.split(), **names, **how)  # all else is there
    assert pipeline.exists()


SRUN = """#!/usr/bin/env bash
# Slurm's, on one machine: two tasks. Every call is written down.
echo "srun" >> "$CALLS"
pids=()
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$CALLS"; fi
"""


def test_cluster(tmp_path):
    """Three stages, each on larger pictures and from the one before. A job that was stopped asks to
    be put back into the queue, and the next one goes on."""
    source = pictures(tmp_path / "pictures", sizes=[(48, 48)])
    for size in (16, 32, 48):
        prepare(source, tmp_path / f"data-{size}", "--size", size)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    slurm = {
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2,
        "SLURM_JOB_NODELIST": "a",
        "SLURM_JOB_ID": 7,
    }
    calls = tmp_path / "calls"
    how = {"PRESET": "tiny", "DATA": tmp_path / "data", "OUT": tmp_path / "runs", "CALLS": calls}
    how |= {"SIZES": "16 32 48", "STAGE": tmp_path / "stage", "path": bin_}
    # Reached at its first evaluation: the first stage ends early, as if it had been stopped.
    early = f"{ONE_LINE} --target-eval-loss 1e9"
    script("cluster.slurm", **slurm, **how, OPTIONS=early)
    assert calls.read_text() == "srun\nrequeue 7\n"
    script("cluster.slurm", **slurm, **how, OPTIONS=f"{ONE_LINE} --target-eval-loss 0")
    assert calls.read_text() == "srun\nrequeue 7\n" + 3 * "srun\n"
    for size in (16, 32, 48):
        run = tmp_path / "runs" / f"tiny-{size}"
        assert int(checkpoints(run / "checkpoints")[-1].name) == 32
        assert Pipeline.open(run).facts["size"] == size
