# Short names for what the recipe does. Options are variables: `make stage1 REAL_SHARE=0.2`; CONFIG=my.conf is a file of
# them. `make demo SEED=1 EXP_OUTPUT=exp_output/seed1` is a demo beside the first.
# `make help` lists the targets; `bash run_experiment.sh` without arguments lists the options.
ifeq ($(strip $(EXP_OUTPUT)),)  # not `?=`: of one that is set and empty, `make clean` would remove /demo
ifdef CONFIG
override EXP_OUTPUT := $(shell bash -c 'source local/parse_options.sh; unset EXP_OUTPUT; parse_options 0 --config "$$1"; \
  echo "$$EXP_OUTPUT"' make '$(subst ','\'',$(CONFIG))')
ifneq ($(.SHELLSTATUS),0)  # else `make clean` would remove the demo of another experiment
$(error CONFIG=$(CONFIG) cannot be read)
endif
endif
endif
ifeq ($(strip $(EXP_OUTPUT)),)
override EXP_OUTPUT := exp_output
endif
SEED ?= 0
FORCE ?= false
MODEL_DIR ?= $(EXP_OUTPUT)/final_model
VENV := .venv/bin/python
DEMO = $(EXP_OUTPUT)/demo
CORPUS = $(DEMO)/corpus
# The demo is the same everywhere: no GPU, and none of a real experiment's options that the environment sets.
DEMO_ENV := env $(shell sed -n 's/^\([A-Z][A-Z0-9_]*\)=.*/-u \1/p' conf/experiment.conf) CUDA_VISIBLE_DEVICES=
# A file of tests in one process, so that what it builds is built once; one thread each, as they run side by side. Of
# numbers that a CPU gives: on a GPU they would be others.
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --maxprocesses 4 --dist loadfile
# PYTHON is the interpreter of `make setup` here, but the one that runs the helpers in run_experiment.sh.
unexport PYTHON
.DEFAULT_GOAL := help
.PHONY: help setup wheels doctor model plan stage0 stage1 stage2 stage3 stage4 stage5 all status demo test test-full lint \
  clean bench transcribe tensorboard ablation ablation-fs check-full-size traps listen \
  test-deepspeed

help:  ## this list
	@sed -n 's/^\([a-z0-9 -]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup:  ## .venv with all that is needed; PYTHON= and TORCH= choose other ones, WHEELS=folder needs no network
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" WHEELS="$(WHEELS)" bash setup.sh

wheels:  ## everything `make setup` installs, collected in WHEELS=folder for a machine without a network
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" WHEELS="$(WHEELS)" PLATFORM="$(PLATFORM)" bash setup.sh wheels

doctor: setup  ## what this machine has and lacks
	@bash setup.sh doctor

plan: setup  ## what your data and options will take: rows, hours, disk, memory, time; CONFIG=my.conf
	@$(VENV) local/plan.py

model: setup  ## stage -1: find or download the pretrained model, check it
	@bash run_experiment.sh -1

stage0 stage1 stage2 stage3 stage4 stage5: setup  ## data; encoder, adaptor, LoRA trained; scores; report
	@bash run_experiment.sh $(@:stage%=%)

all: setup  ## every stage, -1 to 5
	@bash run_experiment.sh -1 5

status:  ## what is done, running, left; also in $EXP_OUTPUT/README_EXPERIMENT_STATUS.md
	@$(VENV) local/stage_status.py show --output_root "$(EXP_OUTPUT)"

transcribe: setup  ## AUDIO=call.wav, a folder, a wav.scp -> dialogue in TRANSCRIBED=; MODEL_DIR=, HOTWORDS= as you like
	@$(VENV) local/transcribe.py --audio "$(or $(AUDIO),$(error which recording? make transcribe AUDIO=call.wav))" \
	  --model_dir "$(MODEL_DIR)" --hotwords "$(HOTWORDS)" --output_dir "$(or $(TRANSCRIBED),$(EXP_OUTPUT)/transcribed)"

tensorboard: setup  ## curves of every training in $EXP_OUTPUT, on http://localhost:6006
	@$(VENV) -m tensorboard.main --logdir "$(EXP_OUTPUT)/exp/8k_telephone" --port 6006

demo: setup  ## the whole recipe on a corpus it speaks itself, on CPU, in half an hour: $EXP_OUTPUT/demo
	@$(DEMO_ENV) $(VENV) demo/speak_corpus.py --output "$(CORPUS)" --seed "$(SEED)"
	@$(DEMO_ENV) $(VENV) demo/train_base.py --train "$(CORPUS)/base_train.jsonl" --dev "$(CORPUS)/wideband_dev.jsonl" \
	  --alphabet "$(CORPUS)/wideband_train.jsonl" "$(CORPUS)/calls_train.jsonl" --output "$(DEMO)/base_model" \
	  --seed "$(SEED)"
	@$(DEMO_ENV) bash run_experiment.sh -1 5 --config conf/demo/experiment.conf --exp_output "$(DEMO)" --seed "$(SEED)" \
	  --force "$(FORCE)"
	@cat "$(DEMO)/eval/scores.txt" && echo "report: $(DEMO)/report/index.html"

ablation: demo  ## the demo without CTC, SpecAugment, replay, at 8 kHz: docs/ablation.md says what each brings
	@$(DEMO_ENV) $(VENV) bench/ablation.py --demo "$(DEMO)" --table docs/ablation.md

ablation-fs: demo  ## the demo again with features at 8 kHz: docs/frontend_fs.md says which rate is better
	@$(DEMO_ENV) $(VENV) bench/ablation.py --demo "$(DEMO)" --only fs_8000 --table docs/frontend_fs.md

test: setup  ## the quick tests, under ten minutes
	@$(PYTEST) -m "not full"

test-full: setup  ## all tests but those of DeepSpeed
	@$(PYTEST)

test-deepspeed: setup  ## the tests of use_deepspeed, skipped by the others; puts DeepSpeed into .venv
	@.venv/bin/pip install -q "deepspeed>=0.18,<1" && $(PYTEST) -k deepspeed tests/test_distributed.py

check-full-size: setup  ## one step of each stage at the real model's size, random weights, on CPU: minutes, 24 GiB
	@$(VENV) bench/full_size.py --work "$(EXP_OUTPUT)/full_size"

traps: setup  ## docs/traps.md anew: FunASR's silent traps, and what is said here
	@PYTHONPATH=local:demo:tests $(VENV) tests/test_traps.py

lint: setup  ## ruff and shellcheck
	@.venv/bin/ruff check .
	@.venv/bin/shellcheck -x *.sh local/*.sh bench/*.sh .ci/run

bench: setup  ## speed of simulation (beside its peers), stage 0, training (beside stock FunASR): $EXP_OUTPUT/bench
	@test -d "$(EXP_OUTPUT)/bench/peers" || $(VENV) -m venv "$(EXP_OUTPUT)/bench/peers"
	@"$(EXP_OUTPUT)/bench/peers/bin/pip" install -q -r bench/requirements.txt || echo "peers that are missing are null"
	@$(VENV) bench/simulation.py --peers "$(EXP_OUTPUT)/bench/peers/bin/python" \
	  --output "$(EXP_OUTPUT)/bench/simulation.json"
	@$(VENV) bench/stage0.py --output "$(EXP_OUTPUT)/bench/stage0.json"
	@$(VENV) bench/training.py --output "$(EXP_OUTPUT)/bench/training.json"

listen: setup  ## calls before and after, to hear and see: $EXP_OUTPUT/listen/index.html; CONFIG=my.conf, LISTEN=corpus
	@$(VENV) local/listen.py $(if $(LISTEN),--input "$(LISTEN)")

clean:  ## remove the demo and caches; the real experiment and .venv stay
	rm -rf "$(DEMO)" .pytest_cache .ruff_cache .hypothesis && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
