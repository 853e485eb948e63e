#!/usr/bin/env bash
# The GPU comparison in one call of under 10 minutes, from a fresh checkout on a machine with an H100-class GPU.
#   bash tests/performance/gpu.sh [FOLDER FOR THE RESULT]
# PYTHON names an interpreter that has torch with CUDA; packages that are missing are installed with pip if it can.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${1:-${OUT:-tests/performance/results}}"
"$PYTHON" -c 'import trl, peft, finetune' 2>/dev/null || "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[peft,galore,liger,bench]'
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())'
exec "$PYTHON" tests/performance/gpu_suite.py --out "$OUT/gpu.json" --minutes "${MINUTES:-8.5}"
