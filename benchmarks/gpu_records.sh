#!/usr/bin/env bash
# Make the GPU records from the repository alone: set up, check, measure, train, gather.
#
#     bash benchmarks/gpu_records.sh [--dry_run] [--output FOLDER] [--stages "check measure ..."]
#
# --dry_run   all stages at tiny sizes, on the CPU, on the synthetic shapes
# --output    output folder (default: gpu-records; with --dry_run gpu-records-dry)
# --stages    some of: setup check measure train gather (default: all, in this order)
#
# PYTHON      interpreter (default: python3); an environment is created if it lacks a package
# WHEELS      folder of wheels, for a machine without access to a package index
# PEERS       environment made by benchmarks/peers.sh, to compare other systems
# DATA        folder of CIFAR-10 (default: data)
#
# Run it again after an interruption: finished runs are kept, the interrupted one is resumed.
# docs/how-to/gpu-records.md explains the runs.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=no output='' stages='setup check measure train gather'
while [ $# -gt 0 ]; do
    case $1 in
    --dry_run) dry=yes ;;
    --output) output=$2 && shift ;;
    --stages) stages=$2 && shift ;;
    *) echo "gpu_records.sh: unknown argument $1 (see the top of the script)" >&2 && exit 2 ;;
    esac
    shift
done
python=${PYTHON:-python3} data=${DATA:-data} device=cuda
bench=() peers=() tiny=() check=(--steps 100) seeds='1 2 3' budgets='240 120 60 30'
[ -z "${PEERS:-}" ] || peers=(--peers "$PEERS" --data_path "$data")
if [ $dry = yes ]; then
    device=cpu seeds='1 2' budgets='240 120'
    shape=(--embed_dim 16 --n_layers 1 --n_attention_heads 2)
    bench=("${shape[@]}" --batch_size 8 --quick --rounds 1)
    tiny=("${shape[@]}" --dataset shapes --num_train_images 80 --num_test_images 40
        --validation_images 50 --batch_size 40 --warmup_epochs 0)
    check=(--steps 40 --batch_size 40 --embed_dim 32 --n_layers 2)
fi
output=${output:-gpu-records$([ $dry = no ] || echo -dry)}
mkdir -p "$output/logs"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

vitrail() { "$python" -m vitrail "$@"; }

say() { printf '\n== %s\n' "$*"; }

complete() { # does this interpreter have all dependencies?
    "$1" -c 'import torch, numpy, PIL, tyro, rich, safetensors, matplotlib, pooch' \
        2>/dev/null
}

preset() { # the preset's name; a dry run replaces a missing preset
    if "$python" -c "import sys; from vitrail.config.presets import PRESETS; sys.exit('$1' not in PRESETS)"
    then echo "$1"
    elif [ $dry = yes ]; then echo reference
    else echo "gpu_records.sh: there is no preset $1" >&2 && return 1
    fi
}

setup() {
    if ! complete "$python"; then
        "$python" -m venv --system-site-packages "$output/venv"
        "$output/venv/bin/python" - >"$output/needed.txt" <<'PYTHON'
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")
PYTHON
        "$output/venv/bin/python" -m pip install --quiet \
            ${WHEELS:+--no-index --find-links "$WHEELS"} -r "$output/needed.txt"
    fi
}

measure() { # NAME PRESET [FLAGS]: keep the table and the JSON line
    local name=$1 && shift
    "$python" benchmarks/bench.py --preset "$@" --device $device "${peers[@]}" "${bench[@]}" |
        tee "$output/bench-$name.txt"
    tail -n 1 "$output/bench-$name.txt" >"$output/bench-$name.json"
}

run() { # NAME FLAGS: train or resume, unless finished
    local name=$1 folder=$output/runs/$1 && shift
    [ ! -f "$folder/result.json" ] || return 0
    say "train $name: $*"
    local words=("$@" --output_path "$output/runs" --folder_name "$name" --data_path "$data"
        --device $device "${tiny[@]}")
    if [ -d "$folder/checkpoints" ]; then words=(--resume "$folder"); else rm -rf "$folder"; fi
    vitrail train "${words[@]}" 2>&1 | tee -a "$output/logs/$name.log"
}

epochs_in() { # SECONDS NAME: epochs that fit into a time at the speed in bench-NAME.json
    [ $dry = no ] || { echo 1 && return; }
    "$python" - "$1" "$output/bench-$2.json" <<'PYTHON'
import json, sys
rows = json.load(open(sys.argv[2]))["rows"]
ours = [row for row in rows if row["system"] == "vitrail" and row["workload"] == "epoch"]
print(max(1, int(float(sys.argv[1]) * max(row["images_per_second"] for row in ours) / 50_000)))
PYTHON
}

reached() { # NAME ACCURACY: did the run reach this validation accuracy?
    "$python" - "$output/runs/$1/metrics.jsonl" "$2" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
sys.exit(max(row["validation_accuracy"] for row in rows) < float(sys.argv[2]))
PYTHON
}

train() {
    local epochs=(--epochs 200) seed goal=0.94 fastest='' budget stop=()
    [ $dry = no ] || epochs=(--epochs 1) goal=0
    for name in reference reference12; do
        for seed in $seeds; do run "$name-s$seed" --preset $name --seed $seed "${epochs[@]}"; done
    done
    local base rest=()
    base=$(preset base)
    [ $dry = no ] || rest=(--epochs 1 --monitor validation)
    for seed in $seeds; do run "base-s$seed" --preset "$base" --seed $seed "${rest[@]}"; done
    run strongest-s1 --preset "$base" --seed 1 "${rest[@]}" --epochs "$(epochs_in 1700 base)"
    # Time to 94%: halve the time until 94% is missed, then run two more seeds at the shortest.
    if vitrail train --help | grep -q stop_at_accuracy; then stop=(--stop_at_accuracy $goal)
    elif [ $dry = no ]; then echo "gpu_records.sh: train has no --stop_at_accuracy" >&2 && exit 1
    fi
    for budget in $budgets; do
        epochs=(--epochs "$(epochs_in $budget base)")
        run "to-94-in-$budget-s1" --preset "$base" --seed 1 "${rest[@]}" "${epochs[@]}" "${stop[@]}"
        reached "to-94-in-$budget-s1" $goal || break
        fastest=$budget
    done
    [ -n "$fastest" ] || return 0
    epochs=(--epochs "$(epochs_in "$fastest" base)")
    for seed in ${seeds#1}; do
        run "to-94-in-$fastest-s$seed" --preset "$base" --seed $seed \
            "${rest[@]}" "${epochs[@]}" "${stop[@]}"
    done
}

for stage in $stages; do
    say "$stage"
    ! [ -x "$output/venv/bin/python" ] || python=$output/venv/bin/python
    case $stage in
    setup) setup ;;
    check) "$python" benchmarks/check_device.py --device $device --preset reference "${check[@]}" |
        tee "$output/check.txt" ;;
    measure)
        measure reference reference
        measure small "$(preset small)" --workloads step epoch
        measure base "$(preset base)" --workloads step epoch
        measure vit-s4 reference --workloads step epoch inference --embed_dim 384 --n_layers 12 \
            --n_attention_heads 6 --forward_mul 4
        ;;
    train) train ;;
    gather) "$python" benchmarks/gather.py "$output/runs" "$output/record" ;;
    *) echo "gpu_records.sh: unknown stage $stage" >&2 && exit 2 ;;
    esac
done
