# Every target does all of its own set-up. `make` alone lists them.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
BENCH := .venv-bench
BENCH_PY := $(BENCH)/bin/python
# A page says when the book last changed, not when it was built.
BOOK = SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date +%s) $(PY) -c 'from jupyter_book.cli.main import main; main()' build . -W -n --keep-going

# Nothing of the caller's own set-up leaks in: no other environment, no Python path, no matplotlib or IPython profile.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS VIRTUAL_ENV __PYVENV_LAUNCHER__
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_CONSTRAINT
unexport MPLBACKEND MATPLOTLIBRC PYTEST_ADDOPTS
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export JUPYTER_PREFER_ENV_PATH := 1
export IPYTHONDIR := $(CURDIR)/$(VENV)/ipython

# An environment that came here from another folder would run that folder's code: install again.
ifneq ("$(shell cat $(VENV)/home 2>/dev/null)","$(CURDIR)")
ANEW := anew
endif

# JupyterLab asks root, as whom a container runs, to say that it is meant.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help book test notebooks editions slides lab lab-source seeds seeds-fresh bench amd fuzz storm clean distclean anew
.DELETE_ON_ERROR:

help:  ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

book: $(VENV)/installed  ## render the book into _build/html
	@rm -rf _build
	@$(BOOK)
	@printf '\nThe book is ready. Open it in a browser:\n  file://%s/_build/html/index.html\n' '$(CURDIR)'

test: $(VENV)/installed  ## run the unit tests, every chapter, and the checks of the built site
	@echo '== Unit tests'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) tests
	@echo '== Every chapter, as its readers get it, run again and compared with the outputs it stores'
	@$(PY) book/_tools/editions.py _build/editions
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadscope --nbval --nbval-current-env \
		-p tests.kernels --nbval-sanitize-with=tests/sanitize.cfg --nbval-cell-timeout=120 _build/editions/reader
	@echo '== The site, built from nothing'
	@rm -rf _build
	@$(BOOK) --quiet
	@echo '== The built pages'
	@$(PY) book/_tools/check_site.py _build/html
	@echo '== The built pages in a browser'
	@$(PY) book/_tools/check_browser.py _build/html

seeds: $(VENV)/installed  ## run the checks of every notebook under other seeds (hours; what has not changed is kept)
	@nice $(PY) book/_tools/seeds.py run --workers $(WORKERS)

seeds-fresh: $(VENV)/installed  ## say whether results/seeds.csv is complete, up to date, and within the stated rates
	@$(PY) book/_tools/seeds.py fresh

notebooks: $(VENV)/installed  ## run every chapter in place and store its outputs
	@$(PY) book/_tools/run_notebooks.py book/*.ipynb

editions: $(VENV)/installed  ## make the notebooks that open anywhere: reader's, student's and teacher's
	@$(PY) book/_tools/editions.py _build/editions

slides: $(VENV)/installed  ## make slides of every chapter, with speaker's notes, that open without a network
	@$(PY) book/_tools/slides.py _build/slides

# Of extensions it finds none: that for MyST, which `lab-source` has, leaves out what is folded.
lab: editions  ## open the reader's notebooks in JupyterLab, as copies of your own in work/
	@$(VENV)/bin/vaelib book work
	@$(PY) -m jupyterlab $(AS_ROOT) --LabApp.labextensions_path=work work

lab-source: $(VENV)/installed  ## open the sources of the chapters in JupyterLab
	@$(PY) -m jupyterlab $(AS_ROOT) book

bench:  ## measure speed beside Pyro, NumPyro and pythae (its own environment; minutes)
	@$(PYTHON) book/_tools/environment.py $(BENCH)
	@$(BENCH_PY) -m pip install -c constraints.txt -r benchmarks/requirements.txt -e .
	@$(BENCH_PY) benchmarks/steps.py

amd: mkl-amd.so  ## let torch use fast matrix products on an AMD processor (Linux, a C compiler)
	@printf 'Put this before a command:\n  LD_PRELOAD=%s\n' '$(CURDIR)/$<'

mkl-amd.so: benchmarks/mkl-amd.c
	@$(CC) -shared -fPIC -o $@ $<

MINUTES ?= 15

fuzz: $(VENV)/installed  ## try the command line, files and tables with examples that nobody thought of (MINUTES=15)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
		FUZZ=1 $(PY) -m pytest -n $(WORKERS) -q tests/test_fuzz.py || exit 1; done

storm: $(VENV)/installed  ## kill runs of every kind at random moments, and see that nothing is lost (MINUTES=15)
	@OMP_NUM_THREADS=1 $(PY) tests/storm.py $(MINUTES)

clean:  ## remove what was built
	@rm -rf _build .pytest_cache .hypothesis .ruff_cache mkl-amd.so
	@find . -name .venv -prune -o -name .venv-bench -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove the environments too
	@rm -rf $(VENV) $(BENCH)

$(VENV)/installed: pyproject.toml constraints.txt $(ANEW)
	@command -v $(PYTHON) >/dev/null || { echo 'Python 3.11 or newer is needed; "$(PYTHON)" was not found.' >&2; exit 2; }
	@$(PYTHON) book/_tools/environment.py $(VENV)
	@echo 'Installing into $(VENV): a few minutes the first time.'
	@$(PY) -m pip install -c constraints.txt -e '.[book,test,lab,source,ray]'
	@printf '%s\n' '$(CURDIR)' > $(VENV)/home
	@touch $@
