#!/usr/bin/env bash
# Ten utterances of each configured corpus through all of stage 0, in a minute, and what the whole will take:
#   bash test_data_prep.sh [--option value ...]      options as of run_experiment.sh; ROWS=20 takes twenty
# Reads RAW_16K_*, REAL_8K_*; writes $EXP_OUTPUT/test_data_prep, made anew each time, and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=local/parse_options.sh
source local/parse_options.sh
if [[ " $* " == *" --help "* ]]; then sed -n 's/^# //p' "${BASH_SOURCE[0]}" | head -3; exit 0; fi
parse_options 0 "$@"
[[ $STOP_STAGE == 0 ]] || fail "this is a trial of stage 0 alone; for another: bash run_experiment.sh $STOP_STAGE"
check_options

trial=$EXP_OUTPUT/test_data_prep
[[ -s $EXP_OUTPUT/model/model_dir.txt ]] || fail "no model yet; run stage -1 first: bash run_experiment.sh -1"
rm -rf -- "$trial"
mkdir -p "$trial/model"
cp "$EXP_OUTPUT/model/model_dir.txt" "$trial/model/"

corpora=() wholes=()
take() {  # NAME CORPUS/SPLIT PATH: ten rows of a corpus, in place of the corpus
  "$PYTHON" local/prepare_training_data.py sample --input "$3" --output "$trial/sample/$1.jsonl" --rows "${ROWS:-10}"
  corpora+=("--$1" "$trial/sample/$1.jsonl")
  wholes+=("$2=$3")
}
for kind in raw_16k:simulated_8k_telephone real_8k:real_8k_telephone; do
  name=${kind%:*} folder=${kind#*:} dev=dev,test
  for split in test dev train; do
    option=${name}_$split path=${name^^}_${split^^}
    [[ -n ${!path} ]] || continue
    if [[ $split == test ]]; then dev=dev; fi
    splits=$split
    if [[ $split == dev ]]; then splits=$dev; fi
    take "$option" "$folder/$splits" "${!path}"
    if [[ $name == raw_16k ]]; then wholes+=("wideband_16k/$splits=${!path}"); fi
  done
done

# Options given come first: those of the trial win.
bash run_experiment.sh 0 "$@" --exp_output "$trial" --max_reject_ratio 1 --num_workers 1 --force false "${corpora[@]}"

simulate() {  # ROWS: prints the processor seconds that it takes
  local TIMEFORMAT='%U %S'
  head -n "$1" "$trial/data/work/raw_train.jsonl" >"$trial/sample/first_$1.jsonl"
  { time "$PYTHON" local/data_simulation.py --config "$CHANNEL_CONF" --seed "$SEED" --max_reject_ratio 1 \
    --num_workers 1 --input "$trial/sample/first_$1.jsonl" --output "$trial/again/$1.jsonl" \
    --output_audio_dir "$trial/again/audio" >"$trial/again.log" 2>&1; } 2>&1
}
rows=$(wc -l <"$trial/data/work/raw_train.jsonl")
# What the first utterance costs is mostly start-up.
seconds=$(echo "$(simulate 1) $(simulate "$rows") $rows" |
  awk '{ one = $1 + $2; all = $3 + $4; n = $5; s = n > 1 ? (all - one) * n / (n - 1) : one; print (s > 0 ? s : 0) }')

echo
echo "The whole would take (time on one core; it falls with the number of cores):"
"$PYTHON" local/prepare_training_data.py stats --data_dir "$trial/data" --estimate "$seconds" \
  --source "${wholes[@]}" 2>"$trial/again.log"
echo "Listen to the examples named in $trial/data/STAGE0_COMPLETION_REPORT.md, then: bash run_experiment.sh 0 ${*@Q}"
