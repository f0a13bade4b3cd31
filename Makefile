# Everything that noisOut needs: `make run`, `make test`. Another Python: `make run PYTHON=python3.13`.
PYTHON ?= python3
READY := .venv/.ready

help:  ## this list
	@awk -F ':.*## +' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## the whole path on one page: flowers, network, training, samples (NOISOUT_PROFILE=quick unless set)
	.venv/bin/python .ci/notebooks.py run test

test: $(READY)  ## execute every notebook and compare its outputs; doctests; the repository's own checks
	.venv/bin/python -m pytest

browser: $(READY)  ## run every notebook in a headless Chromium and move its widgets (Debian: apt install chromium chromium-driver)
	.venv/bin/python -m pytest .ci/browser.py -s

lab: $(READY)  ## open the notebooks in JupyterLab
	.venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks/01_data.ipynb

record: $(READY)  ## execute the notebooks from their scripts and store the outputs (NAME=01_data for one)
	.venv/bin/python .ci/notebooks.py record $(NAME)

check: $(READY)  ## does every notebook agree with its script?
	.venv/bin/python .ci/notebooks.py check $(NAME)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "noisOut needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "If you have a newer one, name it: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	@.venv/bin/python -c 'import matplotlib.font_manager'  # the font cache takes seconds: build it once, here
	@touch $@

.PHONY: help run test browser lab record check
