#!/usr/bin/env bash
# Training and decoding speed on this machine's GPU, in under 8 minutes. Installs and downloads nothing.
#
#   [CORPORA="long turns"] bash bench/gpu.sh [OUTPUT_DIR [STAGE...]]
#
# Default: corpus long, exp_output/bench, and stages 4 1 2 3. 4 is decoding, first because it is short: where time runs
# out, the end of stage 3 is lost, and gpu.log has what was measured of it. Both corpora take more than 8 minutes.
#
# Builds the model at the size of Fun-ASR-Nano-2512 with random weights; for stages 1-3 compares the losses of
# FunASR's class and ours on one batch in bf16, finds the largest batches, times ours, then FunASR's. Writes gpu.log
# there, and training.json and table.md row by row: cut short, the rows so far remain. What fails is null there and a
# line with "error:" here; the rest goes on, and the exit code is 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --help ]]; then sed -n '2,13s/^# \{0,1\}//p' bench/gpu.sh; exit 0; fi
OUTPUT=${1:-exp_output/bench}
if (($# < 2)); then set -- "$OUTPUT" 4 1 2 3; fi
read -ra corpora <<< "${CORPORA:-long}"
PYTHON=${PYTHON:-}
if [[ -z $PYTHON ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
mkdir -p "$OUTPUT"

"$PYTHON" - <<'CHECK' || exit 2
import importlib.util as find
import sys

missing = [name for name in ("torch", "funasr", "transformers", "soundfile", "omegaconf") if not find.find_spec(name)]
if not find.find_spec("torchaudio") and not find.find_spec("kaldi_native_fbank"):
    missing.append("torchaudio or kaldi-native-fbank")
if missing:
    sys.exit(f"error: {', '.join(missing)} is not installed; run make setup with TORCH= for this machine's CUDA")
import torch

if not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU; run python bench/training.py for the CPU's figures")
free, total = (value / 2**30 for value in torch.cuda.mem_get_info())
if free < 36:
    sys.exit(f"error: {free:.0f} of {total:.0f} GiB of GPU memory are free, 36 are needed; end other programs")
print(f"{torch.cuda.get_device_name()}, {total:.0f} GiB, torch {torch.__version__}")
CHECK

# As local/train.py sets it.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
printf '<!-- table -->\n<!-- end -->\n' > "$OUTPUT/table.md"
"$PYTHON" bench/training.py --stages "${@:2}" --corpora "${corpora[@]}" --rounds 1 --round_seconds 400 \
  --work "$OUTPUT/work" --output "$OUTPUT/training.json" --table "$OUTPUT/table.md" 2>&1 |
  tee "$OUTPUT/gpu.log" | grep -E --line-buffered 'round|error|Error|\| '
