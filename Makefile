# make test: the whole suite; make demo: the whole pipeline on the embedded checkpoint. Both make .venv first.
PYTHON ?= python3
VENV := .venv
# What is imported is compiled then, beside other work; pip would compile all, one file after the other.
unexport PYTHONDONTWRITEBYTECODE
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS=1
TEST_PACKAGES := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 ruff==0.17.6 tensorboard==2.21.0 playwright==1.65.2

.PHONY: test demo lint clean

test: $(VENV)/installed lint
	$(RUN) pytest -n 2

demo: $(VENV)/installed
	$(RUN) python tools/demo.py

lint: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

$(VENV)/installed: requirements.txt tools/requirements.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-compile -r requirements.txt -r tools/requirements.txt $(TEST_PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) data/demo output
