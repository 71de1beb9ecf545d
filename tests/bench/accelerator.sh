#!/usr/bin/env bash
# Every measurement that needs an accelerator, in less than 8 minutes on one GPU: bash tests/bench/accelerator.sh [DIFFUSERS]
# Random weights in the shape of SD 1.5 and SDXL. Each line has its own time limit, writes as it goes, and stops no other.
# DIFFUSERS is a checkout of diffusers, or its train_dreambooth_lora.py; it needs torchvision.
cd "$(dirname "$0")/../.." || exit 2
python="${PYTHON:-python}" out="${OUT:-runs/bench/accelerator}"
bench() {  # bench SECONDS ARGUMENTS …
    timeout "$1" "$python" -m tests.bench.speed --output_dir "$out/$2-${3//,/-}" --base "$2" --mixed_precision bf16 \
        --only ${3//,/ } "${@:4}" || echo "left out or cut short: ${*:2}"
}
nvidia-smi --query-gpu=name,clocks.sm,power.draw --format=csv,noheader
bench 65 sd15 jobs --batch 10 --groups 8 --seconds 15
bench 45 sd15 ceiling --groups 10 --seconds 20
bench 60 sd15 together,lora,passes,layout --batch 10 --groups 12 --calls 3 --seconds 10
bench 60 sd15 batches,graph,adapters --groups 8 --calls 3 --seconds 5
bench 45 sd15 call,pictures,grid --groups 12 --seconds 8
bench 45 sd15 memory --batch 2
bench 60 sdxl together,graph --batch 1 --groups 6 --seconds 10
bench 45 sdxl memory --batch 1
[ -n "$1" ] && bench 50 sd15 reference --batch 10 --groups 5 --steps 12 --reference "$1"
nvidia-smi --query-gpu=name,clocks.sm,power.draw --format=csv,noheader
cat "$out"/*/*.md
