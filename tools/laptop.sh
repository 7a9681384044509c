#!/usr/bin/env bash
# A text-to-image model on a laptop, from nothing: shapes, two processes on the CPU, half an hour.
#
#   tools/laptop.sh                        into runs/laptop
#   OUT=runs/other tools/laptop.sh --seed 1       what comes after it goes to train_t2i.py
#
# Stop it and start it again whenever you like: it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/laptop} RANKS=${RANKS:-2} PER_TAG=${PER_TAG:-100}
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu

# 1. Train. Look at $OUT/progress.png and $OUT/curves.png meanwhile.
deepspeed --master_port "${MASTER_PORT:-29500}" --num_accelerators "$RANKS" \
  train_t2i.py --out "$OUT" --resume "$@"

# 2. Score what it has never seen: the six tags, from the run's own number of steps.
python sample_t2i.py "$OUT" --score --per-tag "$PER_TAG" --out "$OUT-scores.png"

# 3. Draw.
python sample_t2i.py "$OUT" "a red circle left of a blue square" "three green triangles" \
  --images 4 --gif --out "$OUT-pictures.png"
