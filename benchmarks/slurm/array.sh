#!/bin/bash
# A SLURM array: sixteen jobs share one matrix. Each takes cells that nobody is at, and ends when none is left; a job
# that is killed leaves its cell to the others. Run it once more for tables and page when all have ended.
#   sbatch array.sh plan.yaml runs/compare
#SBATCH --job-name=ltnb
#SBATCH --array=0-15
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail
plan=${1:?usage: array.sh PLAN OUT [options of ltnb compare]}
out=${2:?usage: array.sh PLAN OUT [options of ltnb compare]}
shift 2
exec ltnb compare --plan "$plan" --out "$out" --workers 1 --wait=false "$@"
