# Everything that noisOut needs: `make run`, `make test`.
#   Another Python:                         make run PYTHON=python3.13
#   Linux without a GPU, 5 GB smaller:      make run CPU=1
PYTHON ?= python3
WORKERS ?= auto
CPU_WHEELS := https://download.pytorch.org/whl/cpu
READY := .venv/.ready
SITE := .venv/.site
PY := .venv/bin/python

help:  ## this list
	@awk -F ':.*## +' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

run: $(READY)  ## the whole path on one page: flowers, network, training, samples (NOISOUT_PROFILE=quick unless set)
	@$(PY) tools/notebooks.py run test

lab: $(READY)  ## open the notebooks in JupyterLab
	.venv/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

test: $(READY)  ## does everything work here? Executes the notebooks, compares their outputs, runs the tests
	$(PY) -m pytest -n $(WORKERS)

# --- for contributors: CONTRIBUTING.md ---

check: $(READY)  ## is the repository in order? Layout, lint, types, pairs of script and notebook, links
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -q tests/repository.py
	$(PY) tools/notebooks.py figures

sync: $(READY)  ## scripts -> notebooks; the outputs of unchanged cells are kept (NAME=01_data for one)
	$(PY) tools/notebooks.py sync $(NAME)

record: $(READY)  ## execute the notebooks from their scripts and store the outputs (NAME=01_data for one)
	$(PY) tools/notebooks.py record $(NAME)

browser: $(READY)  ## run every notebook in a headless Chromium and move its widgets (Debian: apt install chromium chromium-driver)
	$(PY) -m pytest tests/browser.py -s

site: $(SITE)  ## the web site from the recorded notebooks, in build/site/html
	$(PY) site/build.py

site-check: site  ## look at every page in a headless Chromium, and let one generate flowers
	$(PY) -m pytest -s tests/test_export.py tests/site_pages.py

fuzz: $(READY)  ## 10,000 odd calls of the package's functions (minutes)
	FUZZ_CALLS=10000 $(PY) -m pytest -q tests/test_fuzz.py

mutants: $(READY)  ## plant faults one by one: is each of them noticed? (NAME=word for some)
	$(PY) tools/mutants.py $(NAME)

address: $(READY)  ## write address and version wherever they are repeated (URL=https://github.com/OWNER/NAME, VERSION=0.3.0)
	$(PY) tools/address.py $(URL) $(VERSION)

$(READY): requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "noisOut needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "If you have a newer one, name it: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
ifdef CPU
	$(PY) -m pip install $$(sed -n 's/^\(torch\(vision\)\{0,1\}==[^ ]*\).*/\1/p' requirements.txt) --index-url $(CPU_WHEELS)
endif
	$(PY) -m pip install -r requirements.txt -c requirements.lock
	@$(PY) -c 'import matplotlib.font_manager'  # the font cache takes seconds: build it once, here
	@touch $@

$(SITE): $(READY) site/requirements.lock
	$(PY) -m pip install -e '.[site]' -c requirements.lock -c site/requirements.lock
	@touch $@

.PHONY: help run lab test check sync record browser site site-check fuzz mutants address
