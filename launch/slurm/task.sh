#!/usr/bin/env bash
# What each task of a Slurm job runs: Slurm's numbers under the names that torch knows, then the training.
set -euo pipefail
trap '' USR1 # until the training listens; it then stops in order
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node, one task a GPU}
case "${ENGINE:-plain}" in # what accelerate's launcher makes of launch/$ENGINE.yaml
plain) ;;
zero[0-3]) export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE="launch/$ENGINE.json" ;;
fsdp2) export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_RESHARD_AFTER_FORWARD=true ;;
*)
    echo "error: ENGINE=$ENGINE is no engine: plain, zero0, zero1, zero2, zero3 or fsdp2" >&2
    exit 2
    ;;
esac
exec "${PYTHON:-.venv/bin/python}" recipes/train.py "$@"
