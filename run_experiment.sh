#!/usr/bin/env bash
# Adapts Fun-ASR-Nano to 8 kHz telephone speech and measures what it brought. Without arguments: usage.
# Each stage is one block, stage_N: what it reads and writes, then what it runs. `main`, at the end, calls them.
set -euo pipefail
shopt -s nullglob

# shellcheck source=local/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/local/parse_options.sh"

usage() {
  cat <<'EOF'
Usage: bash run_experiment.sh <stage> [stop_stage] [--option value ...]     one number runs that stage alone

  -1  MODEL -> checked model folder                      2  stage 1's data and model -> adaptor and CTC aligned
   0  16 kHz corpus, real calls -> training data         3  real calls, stage 2 -> LoRA on the LLM
   1  simulated calls, pretrained model -> encoder       4  all models, dev and test sets -> final model, scores
                                                         5  scores -> report, final model folder

`make plan` says what it will take. A stage that is up to date is not run again; a killed one goes on. What has
changed is said. Relative paths start at the repository. Options (--real_share 0.2, --real-share 0.2, or REAL_SHARE=0.2
in the environment; the command line beats the environment beats --config FILE beats conf/experiment.conf):

EOF
  option_help
}

# --- how a stage runs ----------------------------------------------------------------------------------------------
run_stage() {  # NUMBER FUNCTION: it, unless TITLE's work is done; READS SETTINGS WRITES FOLDERS LOG [CHECK] are set
  local stage=$1 body=$2 code=0 began=$SECONDS folder option
  local marker=("$PYTHON" local/stage_status.py) facts=(--stage "$stage" --output_root "$EXP_OUTPUT" --inputs
    "${READS[@]}" --config)
  for option in "${SETTINGS[@]}"; do facts+=("$option=${!option}"); done
  if ((NODE_RANK > 0 && (stage < 1 || stage > 3))); then echo "stage $stage: machine 0 does it"; return; fi
  "${marker[@]}" check "${facts[@]}" --force "$FORCE" --on_change "$ON_CHANGE" --after "${AFTER[@]}" || code=$?
  case $code in 0) return ;; 3 | 4) ;; *) exit "$code" ;; esac
  if ((NODE_RANK == 0)); then
    ((code == 3)) || "$CHECK" "$WORK/check" || fail "stage $stage would not start, see above; nothing was moved" $?
    for folder in "${FOLDERS[@]}" "$EXP_OUTPUT/status/stage$stage.json"; do
      if ((code == 4)) && [[ -e $folder ]]; then mv -- "$folder" "$folder.old.$(date +%Y%m%d_%H%M%S)"; fi
    done
    "${marker[@]}" start "${facts[@]}"
  fi
  mkdir -p "$(dirname "$LOG")"
  printf 'stage %s: %s\n' "$stage" "$TITLE" "$stage" "log in $LOG"
  set +e  # or the shell would end here without saying which stage failed
  (set -e; echo "# $COMMAND"; "$body") 2>&1 | tee -ia "$LOG"
  code=${PIPESTATUS[0]}
  set -e
  ((NODE_RANK > 0)) || "${marker[@]}" ended "${facts[@]:0:4}" --code "$code" --log "$LOG" --outputs "${WRITES[@]}" || ((code))
  ((code == 0)) || fail "stage $stage failed with exit code $code; its last lines above and $LOG say why" "$code"
  echo "stage $stage: took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
}

needs() {  # STAGE FILE...: what an earlier stage has to have written, and, as machine 0's books say, to the end
  local file
  ((NODE_RANK > 0)) || AFTER+=("$1")
  for file in "${@:2}"; do [[ -s $file ]] || fail "no $file; run stage $1 first: bash run_experiment.sh $1"; done
}
refuse_if() { if (($#)); then echo refuse; else echo redo; fi; }  # FILE...: work not to be replaced unasked

needs_model() {  # -> MODEL_DIR
  needs -1 "$EXP_OUTPUT/model/model_dir.txt"
  MODEL_DIR=$(<"$EXP_OUTPUT/model/model_dir.txt")
  needs -1 "$MODEL_DIR/config.yaml" "$MODEL_DIR/model.pt"
}

# --- stage -1: the pretrained model ---------------------------------------------------------------------------------
stage_-1() {
  TITLE="$MODEL -> checked model folder, named in $EXP_OUTPUT/model/model_dir.txt"
  READS=("$MODEL/config.yaml" "$MODEL/model.pt") SETTINGS=(MODEL) FOLDERS=()
  WRITES=("$EXP_OUTPUT"/model/{model_dir.txt,check.json}) LOG=$EXP_OUTPUT/logs/stage-1.log; run_stage -1 get_model
}
get_model() { "$PYTHON" local/download_model.py --model "$MODEL" --output "$EXP_OUTPUT/model"; }

# --- stage 0: data --------------------------------------------------------------------------------------------------
stage_0() {
  needs_model
  TITLE="$RAW_16K_TRAIN, $REAL_8K_TRAIN and their dev and test sets -> $DATA"
  READS=("$RAW_16K_TRAIN" "$RAW_16K_DEV" "$RAW_16K_TEST" "$REAL_8K_TRAIN" "$REAL_8K_DEV" "$REAL_8K_TEST"
    "$CHANNEL_CONF" "$FILTER_CONF" "$BG_NOISE_SCP" "$MODEL_DIR/config.yaml" "$MODEL_DIR/Qwen3-0.6B/tokenizer.json")
  SETTINGS=(TEXT_STYLE FRONTEND_FS MAX_SPEECH_LENGTH SEED ONLINE_CHANNEL) LOG=$EXP_OUTPUT/logs/stage0.log
  WRITES=("${TRAIN_DATA[@]}" "${TEST_DATA[@]}" "$DATA/STAGE0_COMPLETION_REPORT.md") FOLDERS=("$DATA")
  ON_CHANGE=$(refuse_if "$DATA"/*/train_formatted.jsonl); run_stage 0 prepare_data
}

prepare_data() {
  local split sources=() raw=("$WORK"/raw_{dev,test}.jsonl) real=("$WORK"/real_{dev,test}.jsonl); local -A on=([train1]=1)
  rm -f "$WORK"/rejected_*  # of a run that was stopped; every step writes its own again
  held_out raw "$RAW_16K_DEV" "$RAW_16K_TEST"
  held_out real "$REAL_8K_DEV" "$REAL_8K_TEST" --against_audio "${raw[@]}"
  filter raw train "$RAW_16K_TRAIN" --against "${raw[@]}" --against_audio "${real[@]}"
  filter real train "$REAL_8K_TRAIN" --against "${real[@]}" --against_audio "${raw[@]}"
  local simulate=("$PYTHON" local/data_simulation.py --config "$CHANNEL_CONF" --output_fs "$FRONTEND_FS"
    --seed "$SEED" "${LIMITED[@]}" ${BG_NOISE_SCP:+--bg_noise_scp "$BG_NOISE_SCP"})
  for split in train dev test; do
    "${simulate[@]}" --input "$WORK/raw_$split.jsonl" --output "$WORK/simulated_$split.jsonl" --split "$split" \
      --output_audio_dir "$SIM/audio" ${on[$split$ONLINE_CHANNEL]:+--online}
    convert "$WORK/simulated_$split.jsonl" "$SIM" "$split" audio "$WORK"/rejected_{raw,simulated}_"$split"*.jsonl
    convert "$WORK/real_$split.jsonl" "$REAL" "$split" audio_upsampled "$WORK"/rejected_real_"$split"*.jsonl
    convert "$WORK/raw_$split.jsonl" "$WIDE" "$split" audio "$WORK"/rejected_raw_"$split"*.jsonl
  done
  no_speech train 300; no_speech test 60; validate "${TRAIN_DATA[@]}" "${TEST_DATA[@]}"
  "${PREPARE[@]}" stats --data_dir "$DATA" --source "${sources[@]}"
}
validate() { "${PREPARE[@]}" validate --fs "$FRONTEND_FS" --input "$@"; }
no_speech() {  # SPLIT COUNT -> calls on which nobody speaks
  "${simulate[@]}" --no_speech_probe "$2" --split "$1" --output "$WORK/no_speech_$1.jsonl" \
    --output_audio_dir "$SILENCE/audio"
  convert "$WORK/no_speech_$1.jsonl" "$SILENCE" "$1" audio "$WORK/rejected_no_speech_$1.jsonl"
}

held_out() {  # NAME DEV TEST [option...] -> work/NAME_{dev,test}.jsonl: no speaker is in both
  if [[ -n $3 ]]; then
    filter "$1" test "$3" "${@:4}"
    filter "$1" dev "$2" "${@:4}" --against "$WORK/$1_test.jsonl"
  else
    filter "$1" dev,test "$2" "${@:4}"
    "${PREPARE[@]}" split --input "$WORK/$1_dev,test.jsonl" --dev "$WORK/$1_dev.jsonl" --test "$WORK/$1_test.jsonl"
  fi
}

filter() {  # NAME SPLIT IN [option...] -> work/NAME_SPLIT.jsonl
  local -A band=([raw]=wideband [real]=telephone) folder=([raw]=$SIM [real]=$REAL)
  sources+=("${folder[$1]##*/}/$2=$3")
  "${PREPARE[@]}" filter --conf "$FILTER_CONF" --expect_band "${band[$1]}" --max_speech_length "$MAX_SPEECH_LENGTH" \
    --split "${2%,*}" --input "$3" --output "$WORK/$1_$2.jsonl" "${LIMITED[@]}" "${@:4}"
}

convert() {  # IN FOLDER SPLIT AUDIO_DIR REJECTED... -> FOLDER/SPLIT_formatted.jsonl, the rejects of all steps
  "${PREPARE[@]}" convert --input "$1" --output "$2/$3_formatted.jsonl" --output_audio_dir "$2/$4" --do_upsample \
    "${LIMITED[@]}" --output_fs "$FRONTEND_FS" --tokenizer "$MODEL_DIR/Qwen3-0.6B" --text_style "$TEXT_STYLE"
  cat "${@:5}" "$2/rejected_$3_formatted.jsonl" >"$2/rejected_$3.jsonl"
}

# --- stages 1-3: training -------------------------------------------------------------------------------------------
stage_1() { train_stage 1 "simulated calls, base model -> encoder" REAL_SHARE; }
stage_2() { train_stage 2 "the same data, stage 1 -> adaptor and CTC" REAL_SHARE; }
stage_3() { train_stage 3 "real calls, stage 2 -> LoRA on the LLM" SIMULATED_SHARE; }

train_stage() {  # NUMBER TITLE SHARE
  needs_model; needs 0 "${TRAIN_DATA[@]}"
  N=$1 TITLE=$2 DIR=$EXP/${NAMES[$1]} LOG=$EXP/${NAMES[$1]}/train.log PARENT=$EXP/${NAMES[$1 - 1]}/averaged.pt
  if ((N == 1)); then PARENT=$MODEL_DIR/model.pt; fi
  if [[ -n $INIT_CHECKPOINT ]] && ((N == (STAGE > 1 ? STAGE : 1))); then PARENT=$INIT_CHECKPOINT; fi
  LISTS=$DIR; ((NODE_RANK == 0)) || LISTS=$WORK/machine$NODE_RANK LOG=$EXP_OUTPUT/logs/stage$1.machine$NODE_RANK.log
  if [[ $PARENT == "$INIT_CHECKPOINT" ]]; then TITLE+=", from $PARENT"; else needs $((N > 1 ? N - 1 : -1)) "$PARENT"; fi
  CONFS=(--stage_conf "conf/${NAMES[$1]}.yaml") CHECK=prepare
  [[ -f $STAGE_OVERLAY_DIR/${NAMES[$1]}.yaml ]] && CONFS+=(--overlay "$STAGE_OVERLAY_DIR/${NAMES[$1]}.yaml")
  READS=("${CONFS[1]}" "${CONFS[3]:-}" "$PARENT" "$MODEL_DIR/config.yaml" "${TRAIN_DATA[@]}")
  ((N > 1)) || READS+=("$MODEL_DIR/model.pt")  # stage 4 compares with it, whatever INIT_CHECKPOINT is
  SETTINGS=(FRONTEND_FS SEED MAX_SPEECH_LENGTH WIDEBAND_REPLAY NO_SPEECH_SHARE "$3")
  WRITES=("$DIR"/{averaged.pt,run.json,trainlist.jsonl}) FOLDERS=("$DIR") ON_CHANGE=$(refuse_if "$DIR"/model.pt*)
  run_stage "$N" train
}

prepare() {  # LISTS [OUTPUT] -> the lists in that folder, with which the stage would start
  FACTS=("${CONFS[@]}" --model_dir "$MODEL_DIR" --init_checkpoint "$PARENT" --train_list "$1/trainlist.jsonl"
    --valid_list "$1/valid.jsonl" --output_dir "${2:-$1}" --frontend_fs "$FRONTEND_FS")
  [[ ! ${PARENT%/*} -ef $DIR ]] || fail "--init_checkpoint $PARENT lies in the folder to be written; copy it elsewhere"
  GPUS=${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')} GPUS=$((GPUS > 0 ? GPUS : 1))
  validate "${TRAIN_DATA[@]}" "${TEST_DATA[@]}" &&
    "$PYTHON" local/make_train_list.py --stage "$N" --data_dir "$DATA" --real_share "$REAL_SHARE" --seed "$SEED" \
      --wideband_replay "$WIDEBAND_REPLAY" --simulated_share "$SIMULATED_SHARE" --no_speech_share "$NO_SPEECH_SHARE" \
      --output "$1/trainlist.jsonl" --valid_output "$1/valid.jsonl" --max_speech_length "$MAX_SPEECH_LENGTH" &&
    LOCAL_WORLD_SIZE=$GPUS "$PYTHON" local/check_training.py before "${FACTS[@]}"
}

train() {
  prepare "$LISTS" "$DIR"
  local launch=("$PYTHON" local/launch.py --nproc_per_node "$GPUS" --nnodes "$NNODES" --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  if ((GPUS == 1 && NNODES == 1)); then launch=("$PYTHON"); fi
  ((NNODES == 1)) || echo "machine $NODE_RANK waits for all $NNODES at $MASTER_ADDR:$MASTER_PORT, 15 minutes at most"
  "${launch[@]}" local/train.py "${FACTS[@]}" --seed "$SEED"
  "$PYTHON" local/check_training.py after "${FACTS[@]}"
}

# --- stage 4: final model and scores --------------------------------------------------------------------------------
stage_4() {
  needs_model; needs 0 "${TEST_DATA[@]}"; STEPS=() LAST=$EXP/${NAMES[3]}/averaged.pt
  for N in 1 2 3; do STEP=$EXP/${NAMES[N]}/averaged.pt  # stage 3 may have begun from an INIT_CHECKPOINT, not from 2
    [[ -s $LAST && ! -e $STEP && ! -e $EXP_OUTPUT/status/stage$N.json ]] || { needs "$N" "$STEP"; STEPS+=("stage$N=$STEP"); }
  done
  TITLE="base, stages 1-3, dev and test sets -> final model, transcripts, $EVAL/summary.json"
  READS=("$MODEL_DIR"/{config.yaml,model.pt} "${STEPS[@]#*=}" "${TEST_DATA[@]}" conf/decode.yaml "$KEYWORDS")
  SETTINGS=(ALPHAS MAX_WIDEBAND_LOSS FRONTEND_FS) LOG=$EXP_OUTPUT/logs/stage4.log
  WRITES=("$EVAL"/{checkpoints/final.pt,summary.json,interpolation.json}) FOLDERS=("$EVAL"); run_stage 4 evaluate
}

evaluate() {
  local points=$EVAL/checkpoints base="$MODEL_DIR/model.pt" alpha models=()
  validate "${TEST_DATA[@]}"; rm -rf "$points" "$EVAL"/*.json "$EVAL/scores.txt"  # of earlier options
  local mix=("$PYTHON" local/final_model.py mix --base "$base" --adapted "$LAST")
  for alpha in $ALPHAS; do
    "${mix[@]}" --alpha "$alpha" --output "$points/alpha_$alpha.pt"
    models+=("alpha_$alpha=$points/alpha_$alpha.pt")
  done
  decode dev "$EVAL/dev" "base=$base" "${models[@]}"
  score "$EVAL/dev" "$EVAL/dev_summary.json" --choose "$EVAL/interpolation.json" \
    --max_wideband_loss "$MAX_WIDEBAND_LOSS" --models base "${models[@]%%=*}"
  "${mix[@]}" --alpha "$EVAL/interpolation.json" --output "$points/final.pt"
  models=("${STEPS[@]}" "final=$points/final.pt")
  decode test "$EVAL/transcripts" "base=$base" "${models[@]}"
  score "$EVAL/transcripts" "$EVAL/summary.json" --models base "${models[@]%%=*}" | tee "$EVAL/scores.txt"
}

decode() {  # SPLIT OUTPUT_DIR NAME=CHECKPOINT...
  local models=("${@:3}") sets=("simulated_$1=$SIM" "real_$1=$REAL" "wideband_$1=$WIDE")
  [[ $1 == test ]] && sets+=("no_speech=$SILENCE")
  sets=("${sets[@]/%//$1_formatted.jsonl}")
  "$PYTHON" local/decode.py --model_dir "$MODEL_DIR" "${models[@]/#/--checkpoint=}" "${sets[@]/#/--test_set=}" \
    --output_dir "$2" --frontend_fs "$FRONTEND_FS"
}
score() { "$PYTHON" local/score.py --transcripts "$1" --output "$2" --keywords "$KEYWORDS" "${@:3}"; }

# --- stage 5: report and final model folder -------------------------------------------------------------------------
stage_5() {
  needs_model; needs 4 "$EVAL/summary.json" "$EVAL/checkpoints/final.pt"
  TITLE="$EVAL -> $EXP_OUTPUT/report/index.html, $EXP_OUTPUT/final_model" LOG=$EXP_OUTPUT/logs/stage5.log
  READS=("$EVAL"/{summary.json,interpolation.json,checkpoints/final.pt}) FOLDERS=("$EXP_OUTPUT"/{report,final_model})
  WRITES=("$EXP_OUTPUT"/report/{index.html,report.md} "$EXP_OUTPUT"/final_model/{model.pt,config.yaml})
  SETTINGS=(REPORT_AUDIO FRONTEND_FS TEXT_STYLE); run_stage 5 finish
}

finish() {
  "$PYTHON" local/final_model.py export --model_dir "$MODEL_DIR" --frontend_fs "$FRONTEND_FS" --text_style "$TEXT_STYLE" \
    --checkpoint "$EVAL/checkpoints/final.pt" --summary "$EVAL/summary.json" --output "$EXP_OUTPUT/final_model"
  "$PYTHON" local/report.py --exp_output "$EXP_OUTPUT" --output "$EXP_OUTPUT/report" --report_audio "$REPORT_AUDIO"
}

# --- main -----------------------------------------------------------------------------------------------------------
main() {
  COMMAND="bash run_experiment.sh ${*@Q}"
  cd "$(dirname "${BASH_SOURCE[0]}")"
  if (($# == 0)) || [[ " $* " == *" --help "* ]]; then usage; exit 0; fi
  parse_options "$@"; check_options
  DATA=$EXP_OUTPUT/data WORK=$EXP_OUTPUT/data/work EXP=$EXP_OUTPUT/exp/8k_telephone EVAL=$EXP_OUTPUT/eval
  SIM=$DATA/simulated_8k_telephone REAL=$DATA/real_8k_telephone WIDE=$DATA/wideband_16k SILENCE=$DATA/no_speech
  TRAIN_DATA=({"$SIM","$REAL","$WIDE"}/{train,dev}_formatted.jsonl "$SILENCE/train_formatted.jsonl")
  TEST_DATA=({"$SIM","$REAL","$WIDE"}/{dev,test}_formatted.jsonl "$SILENCE/test_formatted.jsonl")
  NAMES=("" stage1_encoder_adapt stage2_adapter_align stage3_lora_domain)
  WORKERS=(--num_workers "${NUM_WORKERS:-$(nproc)}" ${DASK_SCHEDULER:+--dask_scheduler "$DASK_SCHEDULER"})
  LIMITED=("${WORKERS[@]}" --max_reject_ratio "$MAX_REJECT_RATIO") PREPARE=("$PYTHON" local/prepare_training_data.py)
  mkdir -p "$EXP_OUTPUT" || exit 1
  # Everything started from here inherits the lock, so what a killed run left behind still holds it.
  exec 9>"$EXP_OUTPUT/.lock$NODE_RANK"
  flock -w 1 9 || fail_locked "$EXP_OUTPUT/.lock$NODE_RANK"
  for ((stage = STAGE; stage <= STOP_STAGE; stage++)); do ON_CHANGE=redo AFTER=() CHECK=true; "stage_$stage"; done
}
main "$@"
