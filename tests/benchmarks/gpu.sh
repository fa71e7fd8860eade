#!/usr/bin/env bash
# GPU tests and benchmarks in one call; without a GPU the same commands run in their small form on the CPU.
# usage: tests/benchmarks/gpu.sh MODEL_FOLDER [RESULTS_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
model=${1:?folder of the base model}
results=${2:-tests/benchmarks/results}
python=${PYTHON:-python}
mkdir -p "$results"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" -m pytest -m gpu tests
    "$python" tests/benchmarks/against_peft.py --model "$model" --batch 8 --length 1024 --steps 20 --rounds 2 \
        --out "$results/against_peft_gpu.md"
    "$python" tests/benchmarks/roofline.py --tokens 8192 --rounds 50 --out "$results/roofline_gpu.md"
    "$python" tests/benchmarks/qat_step.py --batch 8 --length 1024 --rounds 20 --out "$results/qat_step_gpu.md"
    "$python" tests/benchmarks/head_loss.py --tokens 4096 --hidden 4096 --vocabulary 32000 --out "$results/head_loss_gpu.md"
else
    "$python" tests/benchmarks/against_peft.py --model "$model" --steps 3 --rounds 1 --batch 1 --length 64
    "$python" tests/benchmarks/roofline.py --tokens 128 --rounds 2
    "$python" tests/benchmarks/qat_step.py --model "$model" --batch 1 --length 64 --rounds 1
fi
