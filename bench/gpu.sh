#!/usr/bin/env bash
# Everything that wants a GPU, in one command that needs no network: tests on the device, verify, ops, training,
# generation, tuning. Writes result files and a report to bench/results, to be committed. Made for about ten minutes: on
# an H200 its tests took 78 seconds in 14 processes, verify 40, training's plain variants 50 and generation 90; the rest
# is estimated, the whole has not run yet.
#
#   bash bench/gpu.sh [--dry-run]             --dry-run prints the commands and runs none
#   NANOGPT=../nanoGPT/model.py bash bench/gpu.sh      compares with nanoGPT too
#   OUT=elsewhere bash bench/gpu.sh           writes elsewhere
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [[ $# -eq 1 && $1 == --dry-run ]]; then
    dry_run=true
elif [[ $# -gt 0 ]]; then
    echo "gpu.sh: unknown arguments: $*; the only one is --dry-run" >&2
    exit 2
fi
python=${PYTHON:-python}
out=${OUT:-bench/results}
nanogpt=()
if [[ -n ${NANOGPT:-} ]]; then nanogpt=(--nanogpt "$NANOGPT"); fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Runs a command, or prints it; the rest does not run after one that fails: no numbers of wrong kernels.
step() {
    echo "+ $*"
    $dry_run || "$@"
}

if ! $dry_run && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: PyTorch sees no GPU here; --dry-run prints what would run" >&2
    exit 2
fi

tests=(attention attention_masks cases column_sum decode_attention decode_linear decode_model decode_operator decoder
    embedding gelu graphed graphed_changes graphed_training layer_norm layer_norm_dropout linear_cross_entropy matmul
    mlp parity timing train whole_model)
tests=("${tests[@]/#/tests/test_}")
step "$python" -m pytest -q -x -n 8 "${tests[@]/%/.py}"
step "$python" -m fastgpt2.gpt2 verify
step "$python" -m fastgpt2.gpt2 bench ops --shape 1024x768,4096x768 --out "$out"
step "$python" -m fastgpt2.gpt2 bench train --quick --sweep --out "$out" ${nanogpt[@]+"${nanogpt[@]}"}
step "$python" -m fastgpt2.gpt2 bench generate --quick --batch 1,8,32 --out "$out" ${nanogpt[@]+"${nanogpt[@]}"}
step "$python" -m fastgpt2.gpt2 bench tune --dry-run --seconds 120 --out "$out"
reports=("$out"/{train,ops,generate}-*.json)
step "$python" -m fastgpt2.gpt2 bench report "${reports[@]}" --out "$out"
