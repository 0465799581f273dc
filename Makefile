# stage_ray: every task of the project. Nothing here needs an active virtual environment.
# ARGS=...         more arguments, for example  make train ARGS="--set steps=20 --run-dir runs/short"
# VARIANT=cpu|gpu  what to install; by default nvidia-smi decides (deploy/install.sh)
# PYTHON=...       the interpreter that builds .venv; by default the first of Python 3.11 to 3.13 that works
# TORCH_INDEX=...  a package index with CPU builds of torch, for machines where pip would take the CUDA build:
#                  PyTorch's own CPU wheel index, see the README. Empty: pip as it is configured.
# MINUTES=10       how long  make chaos  goes on
# SEED=0           of its schedule: which process gets which signal when
# STUDY=...        study_shapeworld (the default), another that  stage-ray configs  lists, or a file
ARGS ?=
MINUTES ?= 10
SEED ?= 0
STUDY ?= study_shapeworld
VARIANT ?= auto
PYTHON ?=
TORCH_INDEX ?=
BIN := .venv/bin
# Three files at a time. Idle OpenMP threads sleep instead of spinning, and Ray's workers run at normal priority: by default they yield to
# everything else, so that a run starves while another file computes. Ray's agents look at all processes once a minute, not every 5 s,
# and a worker may take four minutes to start, not one. Processes share what was compiled, whatever the environment says,
# seldom collect garbage, and become workers of Ray without importing Ray twice (tests/site).
PYTEST := PYTHONPATH=$(CURDIR)/tests/site PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=PASSIVE REPORTER_UPDATE_INTERVAL_MS=60000 RAY_worker_register_timeout_seconds=240 \
	RAY_worker_niceness=0 RAY_prestart_worker_first_driver=0 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
ON_A_GPU := --set rollout.gpus=0.5 --set learner.gpus=0.5

export VARIANT PYTHON TORCH_INDEX
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help install train study test check chaos gpu-check clean

help: ## List the tasks
	@echo "stage_ray: make TASK"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 12
	@sed -n 's/^# \([A-Z_]*=.*\)/  \1/p' $(MAKEFILE_LIST)

install: .venv/installed ## Build .venv with everything in it (chooses CPU or GPU by itself)

.venv/installed: pyproject.toml deploy/locks/cpu.txt deploy/install.sh deploy/pip_settings.py
	@bash deploy/install.sh
	@touch $@

train: install ## Run the default job: STAGE on ShapeWorld, about ten minutes on two cores, ends with a report
	@$(BIN)/stage-ray train configs/stage_shapeworld.yaml $$([ ! -f .venv/gpu ] || echo "$(ON_A_GPU)") $(ARGS)

study: install ## Train and compare the arms of STUDY, hours to days on two cores; the same command goes on with it
	@$(BIN)/stage-ray study $(STUDY) $(ARGS)

test: install ## Run every test
	@$(PYTEST) $(ARGS)

check: install ## Format, lint, types and the fast tests, in about four minutes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -m "not slow" $(ARGS)

chaos: install ## Run the fault-injection soak for MINUTES; its ledger must show no group lost or trained twice
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

gpu-check: install ## Check on one GPU, in ten minutes, all that needs one; a report to paste in gpu-check.md
	@$(BIN)/stage-ray gpu-check $(ARGS)

clean: ## Remove .venv, caches and build output; runs stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find stage_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
