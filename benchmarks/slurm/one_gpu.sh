#!/bin/bash
# One GPU: every cell after the other, each with the whole card.
#   sbatch one_gpu.sh plan.yaml runs/compare        or, without SLURM:  bash one_gpu.sh plan.yaml runs/compare
# What follows goes to ltnb compare, such as --seeds 3 or --dry-run. The same command goes on where it stopped.
#SBATCH --job-name=ltnb
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail
plan=${1:?usage: one_gpu.sh PLAN OUT [options of ltnb compare]}
out=${2:?usage: one_gpu.sh PLAN OUT [options of ltnb compare]}
shift 2
exec ltnb compare --plan "$plan" --out "$out" --workers 1 "$@"
