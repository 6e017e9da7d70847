# Short names for what the recipe does. Options are variables: `make stage1 REAL_SHARE=0.2`, `make demo SEED=1`.
# `make help` lists the targets; `bash run_experiment.sh` without arguments lists the options.
EXP_OUTPUT ?= exp_output
SEED ?= 0
FORCE ?= false
VENV := .venv/bin/python
DEMO = $(EXP_OUTPUT)/demo
CORPUS = $(DEMO)/corpus
# The demo is the same everywhere: options of a real experiment that are set in the environment are kept from it.
DEMO_ENV := env $(shell sed -n 's/^\([A-Z][A-Z0-9_]*\)=.*/-u \1/p' conf/experiment.conf)
# PYTHON is the interpreter of `make setup` here, but the one that runs the helpers in run_experiment.sh.
unexport PYTHON
.DEFAULT_GOAL := help
.PHONY: help setup doctor model stage0 stage1 stage2 stage3 stage4 stage5 all status tensorboard demo ablation-fs check-full-size \
  test test-full lint clean

help:  ## this list
	@sed -n 's/^\([a-z0-9 -]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup:  ## .venv with all that is needed; PYTHON= and TORCH= choose other ones
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash setup.sh

doctor: setup  ## what this machine has and lacks
	@bash setup.sh doctor

model: setup  ## stage -1: find or download the pretrained model, check it
	@bash run_experiment.sh -1

stage0 stage1 stage2 stage3 stage4 stage5: setup  ## data; encoder, adaptor, LoRA trained; scores; report
	@bash run_experiment.sh $(@:stage%=%)

all: setup  ## every stage, -1 to 5
	@bash run_experiment.sh -1 5

status:  ## what is done, running, left; also in $EXP_OUTPUT/README_EXPERIMENT_STATUS.md
	@$(VENV) local/stage_status.py show --output_root "$(EXP_OUTPUT)"

tensorboard: setup  ## curves of every training in $EXP_OUTPUT, on http://localhost:6006
	@$(VENV) -m tensorboard.main --logdir "$(EXP_OUTPUT)/exp/8k_telephone" --port 6006

demo: setup  ## the whole recipe on a corpus it speaks itself, on CPU, in minutes: $EXP_OUTPUT/demo
	@$(DEMO_ENV) $(VENV) local/demo_corpus.py --output "$(CORPUS)" --seed "$(SEED)"
	@$(DEMO_ENV) $(VENV) local/demo_base_model.py --train "$(CORPUS)/base_train.jsonl" --dev "$(CORPUS)/wideband_dev.jsonl" \
	  --alphabet "$(CORPUS)/wideband_train.jsonl" "$(CORPUS)/calls_train.jsonl" --output "$(DEMO)/base_model" \
	  --seed "$(SEED)"
	@$(DEMO_ENV) bash run_experiment.sh -1 5 --config conf/demo/experiment.conf --exp_output "$(DEMO)" --seed "$(SEED)" \
	  --force "$(FORCE)"
	@cat "$(DEMO)/eval/scores.txt" && echo "report: $(DEMO)/report/index.html"

ablation-fs: demo  ## the demo again with features at 8 kHz: docs/frontend_fs.md says which rate is better
	@$(DEMO_ENV) $(VENV) bench/ablation_fs.py --demo "$(DEMO)" --seed "$(SEED)" --table docs/frontend_fs.md

test: setup  ## the quick tests, under ten minutes
	@$(VENV) -m pytest -m "not full"

test-full: setup  ## all tests
	@$(VENV) -m pytest

check-full-size: setup  ## one step of each stage at the real model's size, random weights, on CPU: minutes, 24 GiB
	@$(VENV) bench/full_size.py --work "$(EXP_OUTPUT)/full_size"

lint: setup  ## ruff and shellcheck
	@.venv/bin/ruff check .
	@.venv/bin/shellcheck -x *.sh local/*.sh .ci/run

clean:  ## remove the demo and caches; the real experiment and .venv stay
	rm -rf "$(DEMO)" .pytest_cache .ruff_cache .hypothesis && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
