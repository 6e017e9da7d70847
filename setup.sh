#!/usr/bin/env bash
# Makes .venv with everything the recipe needs: `make setup` calls it. No root, pip only; nothing to do when
# requirements, TORCH and interpreter are those of the last time. `bash setup.sh doctor` looks at the machine.
#   PYTHON=python3.11          interpreter, 3.10 to 3.12
#   TORCH="torch==2.9.1 --index-url https://download.pytorch.org/whl/cu126"     another torch than the default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=.venv LOG=.venv/setup.log CPU_INDEX=https://download.pytorch.org/whl/cpu
# Chosen once, kept: `make demo` after `PYTHON=python3.10 TORCH=… make setup` must not set up something else.
PYTHON=${PYTHON:-$("$VENV/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null || echo python3)}
TORCH=${TORCH:-$(cat "$VENV/torch_given" 2>/dev/null || true)}

fail() {
  echo "error: $1" >&2
  exit 1
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

torch_spec() {  # what pip installs as torch, one word a line
  if [[ -n $TORCH ]]; then
    tr -s ' ' '\n' <<<"$TORCH"
  elif has_gpu; then
    printf '%s\n' -r requirements-gpu.txt
  else
    echo torch==2.13.0
    # Here 2.13.0+cpu is found, which pip prefers to PyPI's CUDA build of 2.13.0.
    if answers "$CPU_INDEX/torch/"; then printf '%s\n' --extra-index-url "$CPU_INDEX"; fi
  fi
}

answers() { "$PYTHON" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null; }

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@" >>"$LOG" 2>&1; }

refuse_cuda_build() {  # SPEC...: GBs of CUDA libraries on a machine without a GPU; told before they are downloaded
  local report=$VENV/torch.json
  pip install --dry-run --no-deps --ignore-installed --report "$report" "$@" || unreachable "$*"
  if ! has_gpu && grep -qE '"(nvidia|cuda)-' "$report"; then
    fail "'$*' is a CUDA build and this machine has no GPU; try TORCH='torch==2.13.0 --index-url $CPU_INDEX' make setup"
  fi
}

reason() { { grep -m1 '^ERROR' "$LOG" || tail -n1 "$LOG"; } | sed 's/ (from versions.*//'; }

unreachable() { fail "pip cannot get '$1' ($(reason)); name another: TORCH='torch==… --index-url …' make setup"; }

install() {
  local spec=()
  if [[ $("$VENV/bin/python" -V 2>&1) != "$("$PYTHON" -V)" ]]; then
    "$PYTHON" -m venv --clear "$VENV" >/dev/null ||
      fail "$PYTHON -m venv failed; install python3-venv, or name another PYTHON"
  fi
  rm -f "$VENV/stamp"
  : >"$LOG"
  mapfile -t spec < <(torch_spec)
  echo "setup: 1/2 ${spec[*]} (log in $LOG)"
  refuse_cuda_build "${spec[@]}"
  pip install "${spec[@]}" || unreachable "${spec[*]}"
  # Alone and first, then held: or a dependency would exchange it for PyPI's newest CUDA build.
  "$VENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$VENV/torch.txt"
  echo "setup: 2/2 requirements.txt, requirements-dev.txt beside $(<"$VENV/torch.txt"): some minutes"
  pip install -c "$VENV/torch.txt" -r requirements.txt -r requirements-dev.txt ||
    fail "pip cannot install the requirements ($(reason)); all of it is in $LOG"
  "$VENV/bin/python" -c 'import funasr, torch, kaldi_native_fbank' >>"$LOG" 2>&1 ||
    fail "the new environment does not work, see the end of $LOG"
}

doctor() {  # what a run will find here; says what to do about what is missing, and never fails
  local tool host
  "$VENV/bin/python" - <<'EOF'
import os, shutil, sys
import funasr, torch
print(f"python     {sys.version.split()[0]}, torch {torch.__version__}, funasr {funasr.__version__}")
print(f"machine    {len(os.sched_getaffinity(0))} cores, {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
for index in range(torch.cuda.device_count()):
    gpu = torch.cuda.get_device_properties(index)
    print(f"GPU {index}      {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
if not torch.cuda.is_available():
    print("GPU        none that torch can use: good for the demo; the full model wants one of 40 GB or more")
EOF
  for tool in sox ffmpeg; do
    command -v "$tool" >/dev/null && echo "$tool: $(command -v "$tool")" ||
      echo "$tool: missing; only odd input formats (sox) and some tests (both) need it: apt install $tool"
  done
  echo "models     MODELSCOPE_CACHE is ${MODELSCOPE_CACHE:-not set (~/.cache/modelscope)}"
  for host in https://www.modelscope.cn https://huggingface.co; do
    answers "$host" && echo "network    $host answers" || echo "network    $host does not answer: give MODEL a folder"
  done
  (preflight)
}

preflight() {  # what stages 1-3 check before they train, on the model and data that are there
  # shellcheck source=local/parse_options.sh
  source local/parse_options.sh
  parse_options 1
  local conf name train valid folder over model="" start=""
  local exp=$EXP_OUTPUT/exp/8k_telephone data=$EXP_OUTPUT/data/simulated_8k_telephone
  if [[ -s $EXP_OUTPUT/model/model_dir.txt ]]; then model=$(<"$EXP_OUTPUT/model/model_dir.txt"); start=$model/model.pt; fi
  for conf in conf/stage[1-3]_*.yaml; do
    name=$(basename "$conf" .yaml) folder=$exp/$name over=()
    [[ -f $STAGE_OVERLAY_DIR/$name.yaml ]] && over=(--overlay "$STAGE_OVERLAY_DIR/$name.yaml")
    train=$folder/trainlist.jsonl valid=$folder/valid.jsonl
    [[ $name == stage3* ]] && data=$EXP_OUTPUT/data/real_8k_telephone
    if [[ ! -s $train ]]; then train=$data/train_formatted.jsonl valid=$data/dev_formatted.jsonl; fi
    if [[ ! -s $start || ! -s $train || ! -s $valid ]]; then
      echo "$name: not checked, no model (stage -1) or no data (stage 0) in $EXP_OUTPUT"
    elif "$VENV/bin/python" local/check_training.py before --stage_conf "$conf" --model_dir "$model" \
      --init_checkpoint "$start" --train_list "$train" --valid_list "$valid" --output_dir "$folder" \
      --frontend_fs "$FRONTEND_FS" "${over[@]}"; then
      echo "$name: ready to train from $start"
    else
      echo "$name: would not start, the line above says why"
    fi
    if [[ -s $folder/averaged.pt ]]; then start=$folder/averaged.pt; fi
  done
}

command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not there; name a Python of 3.10 to 3.12"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
  fail "$("$PYTHON" -V 2>&1 | head -n1): this recipe needs Python 3.10 to 3.12: PYTHON=python3.11 make setup"
if [[ ${1:-} == doctor ]]; then doctor; exit 0; fi
stamp=$(cat requirements*.txt setup.sh <("$PYTHON" -V) <(echo "$TORCH"; has_gpu && echo gpu) | sha256sum)
if [[ ! -x $VENV/bin/python || $(cat "$VENV/stamp" 2>/dev/null) != "$stamp" ]]; then
  install
  echo "$TORCH" >"$VENV/torch_given"
  echo "$stamp" >"$VENV/stamp"
  echo "setup: done, $VENV/bin/python is ready"
fi
