# Two commands to know: `make reproduce` and `make test`. Each sets everything up in .venv first; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# further arguments: for pip, for `aimfair reproduce` or JupyterLab, for pytest
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
# 1: the slow tests too (kill and resume, a wheel in an empty environment, real faces)
AIMFAIR_SLOW ?=
WORKERS ?= 2
README ?= README.md

BIN ?= $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
PATHS := PATH="$$(cd $(BIN) && pwd):$$PATH"
# many small processes are faster than threads that fight over two cores
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce figures photos worlds bench gpu-check test lab lint export readme docs dist clean distclean FORCE

# a checkout that was moved, or whose Python is gone, needs a new environment: its scripts hold absolute paths
ifneq "$(shell $(BIN)/python -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null)" "$(CURDIR)"
RENEW := FORCE
endif

help:
	@echo 'make reproduce  set up, then regenerate all tables and figures, one seed (ARGS="--profile celeba64 --only tradeoff")'
	@echo 'make figures    the same with five seeds, ten for claims, into figures/ (hours)'
	@echo 'make photos     the same of photos, into figures/PROFILE (PROFILE=fairface64; hours)'
	@echo 'make worlds     what the results of photos in figures/ say beside those of the drawn world'
	@echo 'make test       set up, then run the notebooks and the fast tests (AIMFAIR_SLOW=1: the slow ones too)'
	@echo 'make bench      time every stage on one core, and say what became slower'
	@echo 'make gpu-check  precision, throughput and memory on a GPU (ARGS="--device cpu --tiny" tries it without one)'
	@echo 'make lab        set up, then open JupyterLab on the notebooks'
	@echo 'make export     write the modules and README.md from the notebooks, and clean the notebooks'
	@echo 'make lint       check the style of modules and tests'
	@echo 'make docs       build the documentation site from the notebooks into _docs/html'
	@echo 'make dist       build a wheel and an sdist into dist/'
	@echo 'make clean      remove what was built (distclean: .venv too); runs/ stays'

setup: $(STAMP)

# The stamp comes last and by renaming: an interrupted installation is thrown away and done again.
$(STAMP): setup.py settings.ini constraints.txt $(RENEW)
	@command -v $(PYTHON) >/dev/null || { echo 'aimfair: no such Python: $(PYTHON); name one: make PYTHON=python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "aimfair: Python 3.10 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv' 2>/dev/null || { \
	  echo 'aimfair: $(PYTHON) has no venv module; install it (Debian, Ubuntu: python3-venv)' >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then echo 'aimfair: removing an unfinished $(VENV)'; rm -rf $(VENV); \
	elif [ -e $(STAMP) ] && ! { $(BIN)/python -c '' && [ "$$(cat $(STAMP))" = "$(CURDIR)" ]; } 2>/dev/null; then \
	  echo 'aimfair: $(VENV) belongs to another place or Python; removing it'; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && echo '$(CURDIR)' > $(UNFINISHED) && rm -f $(STAMP)
	@[ -x $(BIN)/python ] || { echo "aimfair: 1/3 creating $(VENV) with $$($(PYTHON) -V)"; \
	  if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	  else $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip install --quiet --disable-pip-version-check --target \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; fi; }
	@echo 'aimfair: 2/3 installing torch and torchvision (the largest part; some minutes)'
	@$(PIP) torch torchvision
	@echo 'aimfair: 3/3 installing aimfair and what it needs'
	@$(PIP) --editable '.[dev,lab]'
	@mv $(UNFINISHED) $(STAMP) && touch $(STAMP)
	@echo 'aimfair: $(VENV) is ready'

reproduce: $(STAMP)
	$(BIN)/aimfair reproduce $(ARGS)

# settings are chosen anew, and selection is looked at in more places; claims, the choice of k and other starts over ten seeds
THOROUGH := --out figures --set run.tune=true --set 'selection.gaps=[0.5,1,2,3]' --set selection.sizes=none
figures: $(STAMP)
	$(BIN)/aimfair reproduce --seeds 5 $(THOROUGH) $(ARGS)
ifeq "$(findstring --only,$(ARGS))" ""
	$(BIN)/aimfair reproduce --seeds 10 --only finetuning_strategies --only ablation_top_k --only two_starts $(THOROUGH) $(ARGS)
endif

# photos are read from AIMFAIR_DATA, or from where --set data.root=FOLDER says; no photo is in what is written
PROFILE ?= fairface64
OF_PHOTOS := --shareable --out figures/$(PROFILE)
photos: $(STAMP)
	$(BIN)/aimfair reproduce --profile $(PROFILE) --seeds 5 $(OF_PHOTOS) $(ARGS)
ifeq "$(findstring --only,$(ARGS))" ""
	$(BIN)/aimfair reproduce --profile $(PROFILE) --seeds 10 --only two_starts $(OF_PHOTOS) $(ARGS)
endif

# from the folders of results alone: figures/ and those of photos in it, such as figures/celeba64
worlds: $(STAMP)
	@$(BIN)/python -c 'from aimfair.report import write_worlds; print(*write_worlds("figures") or ["no results of photos in figures/"], sep="\n")'

# one core each, compared with the last record in figures/
bench: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m aimfair.bench figures/bench.json

# what only a GPU can show, into figures/gpu.json and a table beside it; exits with 2 where there is none
gpu-check: $(STAMP)
	@$(BIN)/python -m aimfair.gpu_check $(ARGS)

# a notebook that fails does not keep the tests from running
test: $(STAMP)
	@echo 'aimfair: 1/3 notebooks and modules in sync?'
	@$(BIN)/python -m pytest -q -k in_sync tests/test_notebooks.py
	@echo 'aimfair: 2/3 running the notebooks'
	@failed=; \
	PYTHONWARNINGS='ignore:Failed to create YAML dict' $(ONE_THREAD) $(PATHS) $(BIN)/nbdev_test --n_workers $(WORKERS) --timing || failed=1; \
	echo 'aimfair: 3/3 running the tests'; \
	$(ONE_THREAD) $(PATHS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(if $(AIMFAIR_SLOW),-m "") $(PYTEST_ARGS) || exit 1; \
	[ -z "$$failed" ] || { echo 'aimfair: the tests passed, but notebooks failed: see 2/3 above' >&2; exit 1; }

lab: $(STAMP)
	$(PATHS) JUPYTER_CONFIG_PATH="$(CURDIR)/nbs/site/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check aimfair tests setup.py

export: $(STAMP)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

# what index and experiments quote of figures/ is put in first; README.md lies one folder above its notebook, so its links are turned accordingly
readme:
	@$(BIN)/python nbs/quote_results.py
	@$(BIN)/jupyter nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb \
	  | sed -e 's#](\([a-z0-9_/]*\.ipynb\))#](nbs/\1)#g' -e 's#](\.\./#](#g' -e 's#src="\.\./#src="#g' > $(README)

# offline, from the notebooks as they are committed: nothing is executed, and a warning is an error
docs: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python nbs/site/build.py
	@echo 'aimfair: the site is in _docs/html/index.html'

dist: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist _docs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find aimfair tests nbs -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
