PYTHON ?= python3
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: environment  ## a realistic decode batch: its schedule, explained, checked and timed
	@.venv/bin/fa3-metadata demo

test: environment  ## every test that can run here; the others say why they are skipped
	@.venv/bin/python -m pytest -n $(WORKERS) $(ARGS)

bench:  ## the metadata stage beside the wheel's own, timed and drawn; needs a CUDA GPU
	@$(PYTHON) .ci/environment.py bench test
	@.venv/bin/python -m bench metadata $(ARGS)
	@.venv/bin/python -m bench plot

lint:  ## ruff and mypy on both packages
	@$(PYTHON) .ci/environment.py test lint
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@rm -rf .venv/typed && mkdir -p .venv/typed && cp -r integration .venv/typed/fa3_metadata
	@cp -r triton_kernels .venv/typed/fa3_metadata/  # the folders as the import names have them
	@MYPYPATH=.venv/typed .venv/bin/python -m mypy -p fa3_metadata

docs:  ## docs/ as a site in site/, every link checked; docs/api.md from the docstrings
	@$(PYTHON) .ci/environment.py docs
	@.venv/bin/python .ci/api_page.py --write
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict
	@echo "docs: site/index.html"

package:  ## wheel and sdist in dist/, tried in fresh environments
	@$(PYTHON) .ci/environment.py test lint package
	@.venv/bin/python .ci/package.py dist

environment:
	@$(PYTHON) .ci/environment.py test

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info build dist site

.PHONY: help demo test bench lint docs package environment clean
