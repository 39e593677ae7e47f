# Everything a newcomer needs: `make demo` and `make test`. Each sets up the environment it needs.
# The first Python that really runs, is recent enough and can make environments.
FIT    := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.11,\
            $(shell $(name) -c '$(FIT)' 2>/dev/null && echo $(name))))
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?=
# Slides, GeoTIFFs or folders; one path may hold spaces, several are quoted for the shell:
# make demo SLIDES="'a slide.svs' 'another.svs'". The other variables are options of jobs.demo.
SLIDES ?=
SIZE ?=
MPP ?=
GSD ?=
SOURCE_MPP ?=
SOURCE_GSD ?=
SLIDE_PATHS  = $(if $(shell test -e "$(SLIDES)" && echo one),"$(SLIDES)",$(SLIDES))
DEMO_OPTIONS = $(if $(SLIDES),--slides $(SLIDE_PATHS)) $(if $(SIZE),--size $(SIZE)) \
               $(if $(MPP),--mpp $(MPP)) $(if $(SOURCE_MPP),--source-mpp $(SOURCE_MPP)) \
               $(if $(GSD),--gsd $(GSD)) $(if $(SOURCE_GSD),--source-gsd $(SOURCE_GSD))

.PHONY: setup demo compare test lint bench lock clean

setup: $(VENV)/.done

$(VENV)/.done: requirements.lock pyproject.toml
	$(if $(PYTHON),,$(error gigabrush needs Python 3.11 or 3.12 with venv; name one with make PYTHON=...))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo --out "$(or $(OUT),demo)" $(DEMO_OPTIONS)

# Ours against patch diffusion and the papers' denoiser on equal terms, three seeds: some hours on
# two cores.
compare: setup
	$(BIN)/python -m jobs.compare docs/compare/two_cores.toml --out "$(or $(OUT),compare)" \
		$(if $(SLIDES),--slides $(SLIDE_PATHS))

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py' -q -s

lock: setup
	$(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
		--all-extras --no-header pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV)
