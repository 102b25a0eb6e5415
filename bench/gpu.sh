#!/usr/bin/env bash
# Everything that wants a GPU, in one command that needs no network: tests on the device, verify, ops, training, what
# torch.compile makes of it, loss against seconds, generation, tuning. Writes result files and a report to bench/results, to be committed.
#
#   bash bench/gpu.sh                         all of it
#   bash bench/gpu.sh train compile           parts of it: tests verify ops train compile race generate tune report
#   bash bench/gpu.sh --dry-run [PART...]     prints the commands and runs none
#   NANOGPT=../nanoGPT/model.py bash bench/gpu.sh      compares with nanoGPT too
#   RACE_S=300 DATA=shards bash bench/gpu.sh race      trains longer, on other text than Python's library
#   OUT=elsewhere bash bench/gpu.sh           writes elsewhere
#   LIMIT_S=0 bash bench/gpu.sh               lets a part take as long as it wants
#
# Where a GPU is lent for minutes, run a part at a time: each needs nothing of the others, and writes files of its own. A
# part that takes longer than LIMIT_S is ended, with what it had measured in its file. On an H200 the tests took 78
# seconds in 14 processes, verify 40, training's plain variants 50 and generation 90; the rest has not been timed.
set -euo pipefail
cd "$(dirname "$0")/.."

all=(tests verify ops train compile race generate tune report)
dry_run=false
parts=()
for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then
        dry_run=true
    elif [[ " ${all[*]} " == *" $argument "* ]]; then
        parts+=("$argument")
    else
        echo "gpu.sh: unknown argument: $argument; allowed are --dry-run and the parts ${all[*]}" >&2
        exit 2
    fi
done
if [[ ${#parts[@]} -eq 0 ]]; then parts=("${all[@]}"); fi
python=${PYTHON:-python}
out=${OUT:-bench/results}
limit_s=${LIMIT_S:-540} # 60 less than ten minutes: to start, and to write what there is
nanogpt=()
if [[ -n ${NANOGPT:-} ]]; then nanogpt=(--nanogpt "$NANOGPT"); fi
data=()
if [[ -n ${DATA:-} ]]; then data=(--data "$DATA"); fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Runs a command, or prints it. SIGTERM makes `fastgpt2 bench` write what it has measured.
step() {
    echo "+ $*"
    $dry_run || timeout --kill-after=30 "$limit_s" "$@"
}

if ! $dry_run && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: PyTorch sees no GPU here; --dry-run prints what would run" >&2
    exit 2
fi

run_tests() {
    local tests=(attention_masks cases column_sum decode_model decode_operator decoder fold_columns
        folded_sums graphed graphed_changes graphed_training layer_norm_dropout matmul parity timing train whole_model)
    local op # each has its description in bench/cases/ops/ and its tests
    for op in bench/cases/ops/*.py; do tests+=("$(basename "$op" .py)"); done
    tests=("${tests[@]/#/tests/test_}")
    step "$python" -m pytest -q -x -n 8 "${tests[@]/%/.py}"
}
run_verify() { step "$python" -m fastgpt2.gpt2 verify; }
run_ops() { step "$python" -m fastgpt2.gpt2 bench ops --shape 1024x768,4096x768 --out "$out"; }
run_train() {
    step "$python" -m fastgpt2.gpt2 bench train --quick --sweep --road launched,graph --out "$out" \
        ${nanogpt[@]+"${nanogpt[@]}"}
}
run_compile() {
    step "$python" -m fastgpt2.gpt2 bench train --quick --road compile,reduce-overhead,max-autotune --out "$out" \
        ${nanogpt[@]+"${nanogpt[@]}"}
}
run_race() {
    step "$python" -m fastgpt2.gpt2 bench race --seconds "${RACE_S:-150}" --out "$out" ${data[@]+"${data[@]}"} \
        ${nanogpt[@]+"${nanogpt[@]}"}
}
run_generate() {
    step "$python" -m fastgpt2.gpt2 bench generate --quick --batch 1,8,32 --out "$out" ${nanogpt[@]+"${nanogpt[@]}"}
}
run_tune() { step "$python" -m fastgpt2.gpt2 bench tune --dry-run --seconds 120 --out "$out"; }
run_report() {
    shopt -s nullglob # a kind that was not measured has no file
    local reports=("$out"/{train,ops,race,generate}-*.json)
    shopt -u nullglob
    step "$python" -m fastgpt2.gpt2 bench report "${reports[@]}" --out "$out"
}

# The rest does not run after one that fails: no numbers of wrong kernels. It does after a measurement that was cut off.
cut_off=()
for part in "${parts[@]}"; do
    status=0
    "run_$part" || status=$?
    if [[ $status -eq 124 && $part != tests && $part != verify ]]; then
        cut_off+=("$part")
    elif [[ $status -ne 0 ]]; then
        exit "$status"
    fi
done
if [[ ${#cut_off[@]} -gt 0 ]]; then
    echo "gpu.sh: took longer than $limit_s seconds, so that only a part of it is in $out: ${cut_off[*]}" >&2
    exit 124
fi
