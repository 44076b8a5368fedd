#!/usr/bin/env bash
# All GPUs of this machine, or PROCESSES processes on its CPU. Everything after -- goes to the trainer:
#   launch/local.sh -- --arch efficientnet_b0 --teacher-arch resnet152 --kd --T 4 --w 0.9 --data SHARDS
set -euo pipefail

PROCESSES="${PROCESSES:-}"                  # default: one per GPU, or 1
export PET_MAX_RESTARTS="${RESTARTS:-0}"    # how often torchrun starts all of them again, from the last checkpoint
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart would look for processes of the one before (torch 2.15)

[[ "${1:-}" == "--" ]] && shift
if [[ -z "$PROCESSES" ]]; then
    PROCESSES="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
    [[ "$PROCESSES" -gt 0 ]] || PROCESSES=1
fi
cd "$(dirname "$0")/.."
exec torchrun --nproc-per-node "$PROCESSES" --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 dist_kd/train.py "$@"
