#!/usr/bin/env bash
# Every measurement that needs an accelerator, in at most 10 minutes on one GPU: bash tests/bench/accelerator.sh [DIFFUSERS]
# Random weights in the shape of SD 1.5 and SDXL. Each line has its own time limit, writes as it goes, and stops no other.
# Needs torch, diffusers, transformers, accelerate, peft, bitsandbytes, safetensors, msgspec, tyro and Pillow.
# DIFFUSERS is a checkout of diffusers, or its train_dreambooth_lora.py; it needs torchvision.
# Rehearsed without a GPU, in some minutes: MINIATURE=1 PYTHON="python -m tests.rehearsal" bash tests/bench/accelerator.sh
cd "$(dirname "$0")/../.." || exit 2
read -r -a python <<< "${PYTHON:-python}"
out="${OUT:-runs/bench/accelerator}" page=tests/bench/results/accelerator.md
sd15=sd15 sdxl=sdxl slower=1 small=() training=(--updates 20)
if [ -n "$MINIATURE" ]; then  # tiny bases, two groups of one call
    out="${OUT:-runs/bench/miniature}" page="$out/accelerator.md" sd15="$out/tiny-sd1" sdxl="$out/tiny-sdxl" slower=10
    small=(--groups 2 --calls 1 --steps 3 --batch 1 --force) training=(--updates 1 --batch 2 --arms eager)
    mkdir -p "$out"
    "${python[0]}" -c "from tests.support.tiny import tiny_folder as f; f('sd1', '$out'); f('sdxl', '$out')" || exit 2
fi
limited() { timeout $(($1 * slower)) "${python[@]}" -m "${@:2}" || echo "left out or cut short: ${*:2}"; }
bench() {  # bench SECONDS BASE PARTS ARGUMENTS …
    limited "$1" tests.bench.speed --output_dir "$out/$(basename "$2")-${3//,/-}" --base "$2" --mixed_precision bf16 \
        --only ${3//,/ } "${@:4}" "${small[@]}"
}
gpu() { command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,clocks.sm,power.draw --format=csv,noheader; }
gpu
bench 65 $sd15 jobs --batch 10 --groups 8 --seconds 15
bench 45 $sd15 ceiling --groups 10 --seconds 20
bench 60 $sd15 together,lora,passes,layout --batch 10 --groups 12 --calls 3 --seconds 10
bench 60 $sd15 batches,graph,adapters --groups 8 --calls 3 --seconds 5
bench 45 $sd15 call,pictures,grid --groups 12 --seconds 8
bench 45 $sd15 memory --batch 2
bench 60 $sdxl together,graph --batch 1 --groups 6 --seconds 10
bench 45 $sdxl memory --batch 1
[ -n "$1" ] && bench 50 $sd15 reference --batch 10 --groups 5 --steps 12 --reference "$1"
limited 60 tests.bench.pretraining_speed "${training[@]}" | tee "$out/embedded_model.txt"
gpu
"${python[@]}" -m tests.bench.speed.summary "$out" "$page"
