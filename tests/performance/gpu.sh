#!/usr/bin/env bash
# The GPU comparison in one call of under 10 minutes, from a fresh checkout on a machine with an H100-class GPU.
#   bash tests/performance/gpu.sh [FOLDER FOR THE RESULT]
# PYTHON names an interpreter that has torch with CUDA. Missing packages are taken from wheels in .whl/ (for machines
# without a network: python -m pip download -d .whl ...), or else installed with pip. MINUTES is when the last run begins.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${1:-${OUT:-tests/performance/results}}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G '.whl/*.whl' >/dev/null; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$PYTHON" -c 'import trl, peft, galore_torch, finetune' 2>/dev/null ||
  "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[peft,galore,liger,bench]'
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())'
exec "$PYTHON" tests/performance/gpu_suite.py --out "$OUT/gpu.json" --minutes "${MINUTES:-8.5}"
