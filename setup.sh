#!/usr/bin/env bash
# Makes .venv with everything the recipe needs: `make setup` calls it. No root, pip only; nothing to do when
# requirements, TORCH and interpreter are those of the last time. `bash setup.sh doctor` looks at the machine.
#   PYTHON=python3.11          interpreter, 3.10 to 3.12
#   TORCH="torch==2.9.1 --index-url https://download.pytorch.org/whl/cu126"     another torch than the default
#   WHEELS=folder              install from this folder alone, without a network; `bash setup.sh wheels` fills it for
#                              the interpreter's version of Python and PLATFORM (manylinux_2_28_x86_64)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=.venv LOG=.venv/setup.log CPU_INDEX=https://download.pytorch.org/whl/cpu
WHEELS=${WHEELS:+$(realpath -m -- "$WHEELS")} PLATFORM=${PLATFORM:-manylinux_2_28_$(uname -m)}
# Chosen once, kept: `make demo` after `PYTHON=python3.10 TORCH=… make setup` must not set up something else.
PYTHON=${PYTHON:-$("$VENV/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null || echo python3)}
TORCH=${TORCH:-$(cat ${WHEELS:+"$WHEELS/torch.txt"} "$VENV/torch_given" 2>/dev/null | head -n 1 || true)}

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
    if [[ -z ${PIP_NO_INDEX:-} ]] && answers "$CPU_INDEX/torch/"; then printf '%s\n' --extra-index-url "$CPU_INDEX"; fi
  fi
}

collect_wheels() {  # what `make setup` would install for $PYTHON on PLATFORM, with checksums -> WHEELS
  local want=(-r requirements.txt -r requirements-dev.txt) spec=() target=() glibc name machine
  [[ $PLATFORM =~ ^manylinux_2_([0-9]+)_(.+)$ ]] ||
    fail "PLATFORM=$PLATFORM: want manylinux_2_<minor version of glibc>_<machine>, as manylinux_2_28_x86_64"
  machine=${BASH_REMATCH[2]}
  target=(--platform "linux_$machine")  # what is built here
  for ((glibc = BASH_REMATCH[1]; glibc >= 5; glibc--)); do target+=(--platform "manylinux_2_${glibc}_$machine"); done
  for name in 2014 2010 1; do target+=(--platform "manylinux${name}_$machine"); done
  mapfile -t spec < <(torch_spec)
  mkdir -p "$WHEELS"
  new_venv "$WHEELS/.pip"
  VENV=$WHEELS/.pip LOG=$WHEELS/wheels.log
  : >"$LOG"
  echo "wheels: for $("$PYTHON" -V) on $PLATFORM, ${spec[*]}: some minutes (log in $LOG)"
  pip download --no-deps --only-binary=:all: "${target[@]}" --dest "$WHEELS" "${spec[@]}" || unreachable "${spec[*]}"
  # Packages published as source only become wheels here: the other machine need not build anything.
  pip install --dry-run --ignore-installed --report "$VENV/all.json" --find-links "$WHEELS" "${spec[@]}" "${want[@]}" ||
    unreachable "the requirements"
  "$VENV/bin/python" -c '
import json, sys
for item in json.load(open(sys.argv[1]))["install"]:
    if not item["download_info"]["url"].endswith(".whl"):
        print(item["metadata"]["name"], item["metadata"]["version"], sep="==")' "$VENV/all.json" >"$VENV/sources.txt"
  pip wheel --no-deps --wheel-dir "$WHEELS" -r "$VENV/sources.txt" || fail "cannot build wheels ($(reason)); see $LOG"
  pip download --only-binary=:all: "${target[@]}" --find-links "$WHEELS" --dest "$WHEELS" "${spec[@]}" "${want[@]}" ||
    fail "no wheels of everything for $PLATFORM ($(reason)); see $LOG"
  rm -r "$VENV"
  echo "${spec[*]}" >"$WHEELS/torch.txt"
  (cd "$WHEELS" && sha256sum -- *.whl >SHA256SUMS)
  echo "wheels: $(wc -l <"$WHEELS/SHA256SUMS") wheels, $(du -sh "$WHEELS" | cut -f1) in $WHEELS"
  echo "wheels: copy that folder and this repository to the other machine, and there: make setup WHEELS=folder"
}

answers() { "$PYTHON" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null; }

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@" >>"$LOG" 2>&1; }

without_network() {  # from here on pip takes nothing but the wheels in WHEELS, whatever its own configuration says
  [[ -s $WHEELS/SHA256SUMS ]] ||
    fail "WHEELS=$WHEELS has no SHA256SUMS; fill it on a connected machine: make wheels WHEELS=folder"
  (cd "$WHEELS" && sha256sum --check --quiet SHA256SUMS >&2) || fail "WHEELS=$WHEELS is damaged; copy it again"
  unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL
  export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
}

refuse_cuda_build() {  # SPEC...: GBs of CUDA libraries on a machine without a GPU; told before they are downloaded
  local report=$VENV/torch.json
  pip install --dry-run --no-deps --ignore-installed --report "$report" "$@" || unreachable "$*"
  if ! has_gpu && grep -qE '"(nvidia|cuda)-' "$report"; then
    fail "'$*' is a CUDA build and this machine has no GPU; try TORCH='torch==2.13.0 --index-url $CPU_INDEX' make setup"
  fi
}

reason() { { grep -m1 '^ERROR' "$LOG" || tail -n1 "$LOG"; } | sed 's/ (from versions.*//'; }

unreachable() { fail "pip cannot get '$1' ($(reason)); name another: TORCH='torch==… --index-url …' make setup"; }

new_venv() {  # [--clear] FOLDER
  "$PYTHON" -m venv "$@" >/dev/null || fail "$PYTHON -m venv failed; install python3-venv, or name another PYTHON"
}

stamp() {  # cpu|gpu: what an environment for such a machine is made from; where TORCH is given, the same for both
  cat requirements*.txt setup.sh <("$PYTHON" -V) <(echo "${TORCH:-$1}") | sha256sum
}

made_for() { [[ -x $VENV/bin/python && $(cat "$VENV/stamp" 2>/dev/null) == "$(stamp "$1")" ]]; }

install() {
  local spec=() venv=$VENV
  [[ -z $WHEELS ]] || without_network
  # An environment that is there is not touched before it is known that the new one can be.
  if [[ ! -e $VENV/bin/python ]]; then
    new_venv --clear "$VENV"
  elif [[ $("$VENV/bin/python" -V 2>&1) != "$("$PYTHON" -V)" ]]; then
    VENV=$VENV/next; new_venv --clear "$VENV"
  fi
  : >"$LOG"
  mapfile -t spec < <(torch_spec)
  echo "setup: 1/2 ${spec[*]} (log in $LOG)"
  refuse_cuda_build "${spec[@]}"
  if [[ $VENV != "$venv" ]]; then VENV=$venv; new_venv --clear "$VENV"; fi
  rm -f "$VENV/stamp"
  echo "$TORCH" >"$VENV/torch_given"
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
  local conf name train valid folder over verdict model="" start="" before="" init=$INIT_CHECKPOINT
  local exp=$EXP_OUTPUT/exp/8k_telephone data=$EXP_OUTPUT/data/simulated_8k_telephone
  if [[ -s $EXP_OUTPUT/model/model_dir.txt ]]; then model=$(<"$EXP_OUTPUT/model/model_dir.txt"); start=$model/model.pt; fi
  for conf in conf/stage[1-3]_*.yaml; do
    name=$(basename "$conf" .yaml) folder=$exp/$name over=()
    [[ -f $STAGE_OVERLAY_DIR/$name.yaml ]] && over=(--overlay "$STAGE_OVERLAY_DIR/$name.yaml")
    train=$folder/trainlist.jsonl valid=$folder/valid.jsonl
    [[ $name == stage3* ]] && data=$EXP_OUTPUT/data/real_8k_telephone
    if [[ ! -s $train ]]; then train=$data/train_formatted.jsonl valid=$data/dev_formatted.jsonl; fi
    # INIT_CHECKPOINT is for the stage that began with it, or the first that is still to come.
    if [[ -n $init ]] && { [[ ! -s $folder/averaged.pt ]] ||
      grep -qsF "\"$(realpath -ms -- "$init")\"" "$EXP_OUTPUT/status/${name:0:6}.json"; }; then
      start=$init before="" init=""
    fi
    if [[ ! -s $model/model.pt || ! -s $train || ! -s $valid ]]; then
      echo "$name: not checked, no model (stage -1) or no data (stage 0) in $EXP_OUTPUT"
    elif [[ ! -s $start ]]; then
      echo "$name: not checked, INIT_CHECKPOINT $start is not there"
    elif "$VENV/bin/python" local/check_training.py before --stage_conf "$conf" --model_dir "$model" \
      --init_checkpoint "$start" --train_list "$train" --valid_list "$valid" --output_dir "$folder" \
      --frontend_fs "$FRONTEND_FS" "${over[@]}"; then
      verdict="ready to train from $start"
      [[ -z $before ]] || verdict="its data and config are in order; it starts from $before, which is not done yet"
      echo "$name: $verdict"
    else
      echo "$name: would not start${before:+ from $start}, the line above says why"
    fi
    # What a stage that was stopped or has failed left behind feeds no other.
    if [[ -s $folder/averaged.pt ]] && ! grep -qsE '"state": "(started|failed)"' "$EXP_OUTPUT/status/${name:0:6}.json"; then
      start=$folder/averaged.pt before=""
    else
      before=$name
    fi
  done
}

command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not there; name a Python of 3.10 to 3.12"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
  fail "$("$PYTHON" -V 2>&1 | head -n1): this recipe needs Python 3.10 to 3.12: PYTHON=python3.11 make setup"
case ${1:-} in
  --help | -h) sed -n '2,8s/^# //p' setup.sh; exit 0 ;;
  doctor) doctor; exit 0 ;;
  wheels) WHEELS=${WHEELS:-$PWD/wheels} && collect_wheels; exit 0 ;;
esac
here=cpu
if has_gpu; then here=gpu; fi
# What was made for a GPU works without one: a cluster's nodes with and without share this folder.
if ! made_for gpu && ! made_for "$here"; then
  install
  stamp "$here" >"$VENV/stamp"
  echo "setup: done, $VENV/bin/python is ready"
fi
