#!/usr/bin/env bash
# CIFAR-10 from the archive to the report on two CPU cores: the commands behind docs/results.md, with their times.
#   benchmarks/cifar10.sh ARCHIVE.tar.xz      (train/CLASS/*.jpg and test/CLASS/*.jpg inside)
set -euo pipefail

ARCHIVE="$1"
RUNS="${RUNS:-runs/cifar10}"
export DIST_KD_DATA="${DIST_KD_DATA:-.data/cifar10}"
export OMP_NUM_THREADS=1 # a core for each run: two go side by side

said() { echo "[$SECONDS s] $*"; }

mkdir -p .data/cifar10-jpeg "$RUNS"
tar -xJf "$ARCHIVE" -C .data/cifar10-jpeg
dist-kd pack .data/cifar10-jpeg "$DIST_KD_DATA"
said "packed"
dist-kd train --config cifar10_teacher --save-path "$RUNS/teacher" >"$RUNS/teacher.log"
said "teacher trained"

student() { # KIND SEED
    local more=()
    [[ "$1" == kd ]] && more=(--teacher-weights "$RUNS/teacher")
    exec dist-kd train --config "cifar10_$1" --seed "$2" --save-path "$RUNS/$1-$2" "${more[@]}" >>"$RUNS/$1-$2.log"
}
for seed in 0 1 2; do
    student ce "$seed" &
    plain=$!
    student kd "$seed" &
    distilled=$!
    if [[ "$seed" == 2 ]]; then
        # the last distilled run is killed in the middle of an epoch, and the same command goes on
        until grep -q "^step 2[0-9]*50/" "$RUNS/kd-2.log" 2>/dev/null; do sleep 0.2; done
        kill -9 "$distilled"
        wait "$distilled" || said "seed 2 distilled: killed with SIGKILL after $(grep -c '^step' "$RUNS/kd-2.log") log lines"
        student kd "$seed" &
        distilled=$!
    fi
    wait "$plain"
    wait "$distilled"
    said "seed $seed trained, alone and distilled"
done
for run in teacher ce-0 ce-1 ce-2 kd-0 kd-1 kd-2; do
    dist-kd evaluate "$RUNS/$run" | sed "s/^/$run: /"
done
dist-kd report "$RUNS/teacher" "$RUNS"/{ce,kd}-[0-9] -o "$RUNS/report.html"
said "evaluated and reported"
