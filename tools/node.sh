#!/usr/bin/env bash
# Captioned images → a text-to-image model of 0.2 billion parameters, on one machine with 8 GPUs.
#
#   SOURCE=owner/images OUT=runs/my tools/node.sh --samples 20480000
#
# SOURCE: a data set of the hub, or what else tools/prepare.py reads. What comes after it goes to
# train_t2i.py. Each step goes on where it was stopped: start the same line again.
set -euo pipefail
cd "$(dirname "$0")/.."
SOURCE=${SOURCE:?give the images: SOURCE=owner/name, a folder, tar files, a parquet file}
OUT=${OUT:-runs/node} DATA=${DATA:-data/node} SIZE=${SIZE:-256} GPUS=${GPUS:-8}
T5=${T5:-google/t5-v1_1-xl} VAE=${VAE:-stabilityai/sdxl-vae} CLIP=${CLIP:-openai/clip-vit-base-patch32}
TOKENS=${TOKENS:-128} PRESET=${PRESET:-0.2b} PROMPTS=${PROMPTS:-}

# share COMMAND …: one process for each GPU, of which each makes its part. All must succeed.
share() {
  local pids=() i
  for ((i = 0; i < GPUS; i++)); do
    CUDA_VISIBLE_DEVICES=$i "$@" --part "$i/$GPUS" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i"; done
}

# 1. Encode every image and caption once: a T5 and a VAE would cost more than the training step.
share python -m tools.prepare "$SOURCE" --out "$DATA" --size "$SIZE" --vae "$VAE" \
  --text-encoder "$T5" --text-tokens "$TOKENS" --text-bits 8

# 2. Train. The evaluations draw held-out captions and compare them with held-out pictures.
deepspeed --master_port "${MASTER_PORT:-29500}" --num_accelerators "$GPUS" \
  train_t2i.py --preset "$PRESET" --residual auraflow --data "$DATA" --judge "$CLIP" --out "$OUT" --resume "$@"

# 3. GenEval's prompts, if its evaluation_metadata.jsonl is here: a folder for its evaluator.
if [ -n "$PROMPTS" ]; then
  share python -m tools.geneval "$OUT" "$PROMPTS" --out "$OUT-geneval"
fi

# 4. For everybody else: a pipeline of diffusers, one for each length of the run.
SEEN=$(grep -o '"samples": [0-9]*' "$OUT/config.json" | grep -o '[0-9]*$')
[ -e "$OUT-diffusers-$SEEN/model_index.json" ] || python sample_t2i.py "$OUT" --export diffusers "$OUT-diffusers-$SEEN"
