#!/usr/bin/env bash
# The first half hour on a GPU, in three parts of less than ten minutes, from the repository's root and with nothing
# installed: bash bench/first_hour.sh PART COMMIT. Results are written under $OUT as they come. What each answer decides
# is in docs/kernels.md, section 8. Part 2 wants wheels in .whl/ (see there).
set -u
part=${1:?part 1, 2 or 3} commit=${2:?the commit of this tree} out=${OUT:?a folder for the results}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/site
python=${PYTHON:-python3}

gpu() { # name, seconds, then arguments of bench.gpu; a minute less than the time limit is planned
    local name=$1 seconds=$2 minutes
    shift 2
    minutes=$(awk "BEGIN { print ($seconds - 40) / 60 }")
    timeout "$seconds" "$python" -W ignore -m ipvrm_core.bench.gpu "$@" --minutes "$minutes" --commit "$commit" \
        --json "$out/$name.json" --markdown "$out/$name.md" > "$out/$name.log" 2>&1
    echo "$name: exit $?"
}

"$python" -c "import torch, triton, numpy; print(torch.__version__, triton.__version__, numpy.__version__, torch.cuda.get_device_name())"
case $part in
1) # is it right, and what do the products cost
    nvidia-smi --query-gpu=clocks.max.sm,power.limit,clocks.sm --format=csv
    timeout 190 "$python" -W ignore -m ipvrm_core.bench.probe > "$out/probe.jsonl" 2> "$out/probe.err"
    echo "probe: exit $?"; tail -5 "$out/probe.err"; cat "$out/probe.jsonl"
    gpu correct 370 --only rates correctness --peers
    grep FAILED "$out/correct.md" | head -20 ;;
2) # the table of the README, with peers
    [ -d .whl ] && "$python" -m pip install -q --no-index --no-deps --no-compile --target site .whl/*.whl
    gpu loss 560 --only rates loss step
    sed -n 1,70p "$out/loss.md"; tail -15 "$out/loss.log" ;;
3) # given logits, the largest N, launch table and budgets, a profile, the memory checker
    gpu rest 400 --only rates logits largest tuning variants --peers
    tail -90 "$out/rest.md"
    if command -v ncu > /dev/null; then
        timeout 70 ncu --clock-control none -k regex:policy_rows -c 1 --set full "$python" -W ignore -m ipvrm_core.bench.probe one_loss > "$out/ncu.txt" 2>&1
        grep -E "DRAM Throughput|Issue Slots Busy|L2 Hit|Registers|Achieved Occ|Duration" "$out/ncu.txt"
    fi
    if command -v compute-sanitizer > /dev/null; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 70 compute-sanitizer --tool memcheck --print-limit 5 "$python" -W ignore -m ipvrm_core.bench.gpu --toy --only correctness > "$out/memcheck.log" 2>&1
        tail -4 "$out/memcheck.log"
    fi ;;
*) echo "part must be 1, 2 or 3; got $part" >&2; exit 2 ;;
esac
