# make test: the whole suite; make demo: the whole pipeline on the embedded checkpoint. Both make .venv first.
PYTHON ?= python3
VENV := .venv
# What is imported is compiled then, beside other work; pip would compile all, one file after the other.
unexport PYTHONDONTWRITEBYTECODE
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1
TEST_PACKAGES := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.17.6 tensorboard==2.21.0 playwright==1.65.2
# For tests/kernels. torch for GPUs brings its own Triton and requires that version; torch for CPUs comes without.
TRITON := triton==3.9.0

.PHONY: test demo lint clean

# tests/kernels are a process of their own, see tests/kernels/conftest.py. Both run, whichever fails.
test: $(VENV)/installed lint
	$(RUN) pytest -n 2; others=$$?; $(RUN) pytest tests/kernels && exit $$others

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
