#!/usr/bin/env bash
# The options of run_experiment.sh: sourced by it, from the repository root. Every NAME=default line of
# conf/experiment.conf is an option --name; command line beats environment beats --config FILE beats that file.

option_help() {
  printf '  --config FILE\n      NAME=value lines, as conf/experiment.conf (in the environment, CONFIG=FILE)\n'
  awk '/^#/ { comment = substr($0, 3) }
       /^[A-Z]/ { value = $0; sub(/^[^=]*=/, "", value); name = $0; sub(/=.*/, "", name)
                  printf "  --%s %s\n      %s\n", tolower(name), value, comment }' conf/experiment.conf
}

fail() {  # one line for a mistake of the user's; nothing was done
  echo "error: $1" >&2
  exit "${2:-2}"
}

fail_locked() {  # LOCK: names the processes that hold it, where they are of this machine
  local fd pids=""
  exec 9>&-  # this shell is none of them
  for fd in /proc/[0-9]*/fd/*; do
    if [[ $fd -ef $1 ]]; then fd=${fd#/proc/} pids+=" ${fd%%/*}"; fi
  done
  pids=${pids:+: kill$pids}
  fail "another run, or what is left of one, is still working in $EXP_OUTPUT; wait for it or end it$pids" 1
}

parse_options() {  # -> STAGE STOP_STAGE and every variable of conf/experiment.conf
  local name config=${CONFIG:-} positional=()
  local -A given=()
  mapfile -t OPTIONS < <(sed -n 's/^\([A-Z][A-Z0-9_]*\)=.*/\1/p' conf/experiment.conf)
  for name in CONFIG "${OPTIONS[@]}"; do  # COMMAND is what the log says: who repeats it needs the environment's part
    if [[ -n ${!name+set} ]]; then given[$name]=${!name} COMMAND="$name=${!name@Q} ${COMMAND:-}"; fi
  done
  while (($#)); do
    if [[ $1 != --* ]]; then positional+=("$1"); shift; continue; fi
    if [[ $1 == *=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    name=${1#--} name=${name//-/_} name=${name^^}
    is_option "$name" || [[ $name == CONFIG ]] || fail "unknown option $1; --help lists them"
    (($# >= 2)) || fail "$1 needs a value"
    if [[ $name == CONFIG ]]; then config=$2; else given[$name]=$2; fi
    shift 2
  done
  ((${#positional[@]} >= 1)) || fail "no stage given; --help shows how"
  ((${#positional[@]} <= 2)) || fail "stray argument '${positional[2]}': expected <stage> [stop_stage] and options"
  STAGE=${positional[0]} STOP_STAGE=${positional[1]:-${positional[0]}}

  local file
  for file in conf/experiment.conf ${config:+"$config"}; do
    check_config "$file"
    set_given  # before, so that the file may build on them: RAW_16K_TRAIN="$EXP_OUTPUT/corpus/train.jsonl"
    # shellcheck source=conf/experiment.conf
    source "$file"
  done
  set_given
}

is_option() { [[ " ${OPTIONS[*]} " == *" $1 "* ]]; }

set_given() {
  local name
  for name in "${!given[@]}"; do printf -v "$name" %s "${given[$name]}"; done
}

check_config() {  # every line is a comment or sets a known option
  [[ -f $1 ]] || fail "--config $1 does not exist"
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line != $'\xef\xbb\xbf'* ]] || fail "$1 begins with a byte order mark; sed -i '1s/^\xEF\xBB\xBF//' $1"
    [[ $line =~ ^([A-Z][A-Z0-9_]*)= ]] || fail "$1: '$line' is not NAME=value"
    is_option "${BASH_REMATCH[1]}" || fail "$1: unknown option ${BASH_REMATCH[1]}; --help lists them"
    [[ $line != *$'\r' ]] || fail "$1 has the line ends of Windows; sed -i 's/\r$//' $1"
    [[ $line =~ ^[A-Z0-9_]+=([^[:space:]\"\'\;\&\|\<\>\(\)\\]|\"[^\"]*\"|\'[^\']*\')*([[:space:]]+(#.*)?)?$ ]] ||
      fail "$1: '$line': a value with spaces or any of ;&|<>()\\ needs quotes, a comment a space before #"
  done <"$1"
}

check_options() {  # all that can be checked before anything is done
  local name value
  local -A seen=()
  for value in "$STAGE" "$STOP_STAGE"; do
    [[ $value =~ ^(-1|[0-5])$ ]] || fail "stage '$value' is not an integer from -1 to 5"
  done
  ((STOP_STAGE >= STAGE)) || fail "stop stage $STOP_STAGE is before stage $STAGE"
  for name in EXP_OUTPUT MODEL ALPHAS; do [[ -n ${!name} ]] || fail "--${name,,} is empty"; done
  [[ ! -e $EXP_OUTPUT || (-d $EXP_OUTPUT && -w $EXP_OUTPUT) ]] ||
    fail "--exp_output $EXP_OUTPUT is no folder that may be written"
  for name in SEED NNODES NODE_RANK MASTER_PORT MAX_SPEECH_LENGTH ${NGPU:+NGPU} ${NUM_WORKERS:+NUM_WORKERS}; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "--${name,,} '${!name}' is not a whole number"
  done
  ((${#SEED} < 11 && SEED < 2 ** 32)) || fail "--seed $SEED is over $((2 ** 32 - 1)), the largest that numpy takes"
  ((${#MASTER_PORT} < 6 && MASTER_PORT < 2 ** 16)) || fail "--master_port $MASTER_PORT is over 65535, the last port"
  ((NODE_RANK < NNODES)) || fail "--node_rank $NODE_RANK: with --nnodes $NNODES it is 0 to $((NNODES - 1))"
  for name in REAL_SHARE WIDEBAND_REPLAY NO_SPEECH_SHARE SIMULATED_SHARE MAX_REJECT_RATIO MAX_WIDEBAND_LOSS; do
    [[ ${!name} =~ ^[0-9]*\.?[0-9]+$ ]] || fail "--${name,,} '${!name}' is not a number of at least 0"
  done
  [[ $MAX_REJECT_RATIO =~ ^(0*(\.[0-9]+)?|0*1(\.0+)?)$ ]] || fail "--max_reject_ratio $MAX_REJECT_RATIO is over 1"
  [[ ${NUM_WORKERS:-1} != 0 ]] || fail "--num_workers 0: at least 1 has to work"
  for value in $ALPHAS; do
    [[ $value =~ ^(0?\.[0-9]+|1|1\.0*)$ ]] || fail "--alphas '$ALPHAS': expected numbers over 0, up to 1"
    [[ -z ${seen[$value]:-} ]] || fail "--alphas '$ALPHAS': $value is there twice"
    seen[$value]=1
  done
  one_of FORCE true false; one_of REPORT_AUDIO true false
  one_of TEXT_STYLE written spoken; one_of FRONTEND_FS 16000 8000; one_of ONLINE_CHANNEL 0 1
  [[ $ONLINE_CHANNEL$FRONTEND_FS != 18000 ]] || fail "--online_channel 1 needs --frontend_fs 16000"
  if [[ -z $PYTHON ]]; then PYTHON=python3; [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python; fi
  command -v "$PYTHON" >/dev/null || fail "--python $PYTHON is not there; \`make setup\` makes .venv/bin/python"
  [[ -z $STAGE_OVERLAY_DIR || -d $STAGE_OVERLAY_DIR ]] || fail "--stage_overlay_dir $STAGE_OVERLAY_DIR is not a folder"
  for value in ${STAGE_OVERLAY_DIR:+"$STAGE_OVERLAY_DIR"/stage*.y*ml}; do
    [[ ! -e $value || -f conf/${value##*/} ]] || fail "$value: there is no conf/${value##*/} that it could be laid over"
  done
  ((${#MAX_SPEECH_LENGTH} < 6 && MAX_SPEECH_LENGTH <= 12000)) ||
    grep -qs max_source_length conf/stage*.yaml ${STAGE_OVERLAY_DIR:+"$STAGE_OVERLAY_DIR"/stage*.yaml} ||
    fail "--max_speech_length $MAX_SPEECH_LENGTH is over 12000, the model's max_source_length; raise it in each stage's YAML"
  needs_path INIT_CHECKPOINT CHANNEL_CONF FILTER_CONF KEYWORDS BG_NOISE_SCP
  [[ -z $KEYWORDS ]] || iconv -f UTF-8 -t UTF-8 "$KEYWORDS" >/dev/null 2>&1 ||
    fail "--keywords $KEYWORDS is not UTF-8; iconv -f GB18030 -t UTF-8 makes it so"
  if ((STAGE <= 0 && STOP_STAGE >= 0)); then
    for name in RAW_16K_TRAIN RAW_16K_DEV REAL_8K_TRAIN REAL_8K_DEV; do
      [[ -n ${!name} ]] || fail "stage 0 needs --${name,,}: a JSONL or a Kaldi folder"
    done
    needs_path RAW_16K_TRAIN RAW_16K_DEV RAW_16K_TEST REAL_8K_TRAIN REAL_8K_DEV REAL_8K_TEST
  fi
  check_packages
}

check_packages() {  # $PYTHON has what `make setup` installs, in versions that were tested
  "$PYTHON" - <<'EOF' || exit 2
import sys
from importlib.metadata import PackageNotFoundError, version

lines, wrong = open("requirements.txt", encoding="utf-8").read().splitlines(), []
for line in ["torch", *filter(None, (line.split("#")[0].strip() for line in lines))]:
    try:
        from packaging.requirements import Requirement  # comes with several of them

        need = Requirement(line)
        if not need.specifier.contains(there := version(need.name), prereleases=True):
            wrong.append(f"has {need.name} {there}, not {line}")
    except (ImportError, PackageNotFoundError) as error:
        wrong.append(f"lacks {error.name}")
if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    sys.exit(f"error: {sys.executable} {wrong[0]}{more}; run make setup, or install requirements.txt there")
EOF
}

one_of() { [[ ${!1} != *" "* && " ${*:2} " == *" ${!1} "* ]] || fail "--${1,,} '${!1}': expected ${*:2}"; }

needs_path() {  # each option, where it is set, names a file with something in it or a folder
  local name
  for name; do
    [[ -z ${!name} || -e ${!name} ]] || fail "--${name,,} ${!name} does not exist"
    [[ -z ${!name} || -d ${!name} || -s ${!name} ]] || fail "--${name,,} ${!name} is empty"
  done
}
