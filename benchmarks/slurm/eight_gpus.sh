#!/bin/bash
# Eight GPUs of one machine: a worker for each, so eight cells at once. For cells that need several GPUs each,
# WORKERS=2 LAUNCH="torchrun --standalone --nproc-per-node 4" runs two cells at once on four GPUs each.
#   sbatch eight_gpus.sh plan.yaml runs/compare     or, without SLURM:  bash eight_gpus.sh plan.yaml runs/compare
#SBATCH --job-name=ltnb
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
plan=${1:?usage: eight_gpus.sh PLAN OUT [options of ltnb compare]}
out=${2:?usage: eight_gpus.sh PLAN OUT [options of ltnb compare]}
shift 2
more=()
if [ -n "${LAUNCH:-}" ]; then more=(--launch "$LAUNCH"); fi
exec ltnb compare --plan "$plan" --out "$out" --workers "${WORKERS:-8}" ${more[@]+"${more[@]}"} "$@"
