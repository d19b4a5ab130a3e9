# make test: the linter and the whole suite. make demo: the whole pipeline on the embedded checkpoint. Both install .venv.
PYTHON ?= python3
VENV := .venv
# Python compiles a module when it is first imported; pip would compile every module, one after another.
unexport PYTHONDONTWRITEBYTECODE
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1
TEST_PACKAGES := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.17.6 tensorboard==2.21.0 playwright==1.65.2
# For tests/kernels, whose cases pass with 3.7.1, 3.8.0 and 3.9.0. torch for CPUs comes without Triton; torch for GPUs
# requires a version of its own, which stays.
TRITON := triton==3.9.0

.PHONY: test demo lint clean

# tests/kernels needs a process of its own (tests/kernels/conftest.py). It runs, and fails, whatever the others do.
test: $(VENV)/installed lint
	$(RUN) pytest -n 2; others=$$?; $(RUN) pytest -n 2 tests/kernels && exit $$others

demo: $(VENV)/installed
	$(RUN) python tools/demo.py

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

$(VENV)/installed: requirements.txt tools/requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-compile -r requirements.txt -r tools/requirements.txt $(TEST_PACKAGES)
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/pip install -q --no-compile $(TRITON)
	touch $@

clean:
	rm -rf $(VENV) data/demo output
