PYTHON ?= python3

.PHONY: kernels demo test engines style quality docs dist figures

# The library in C, as `pip install -e .` builds it, anew after a change of its sources.
kernels:
	$(PYTHON) setup.py build_ext --inplace

demo:
	hf-dirembed demo

test:
	$(PYTHON) -m pytest

style:
	ruff check --fix .
	ruff format .

engines:
	tests/engines/make.sh
	$(PYTHON) -m pytest -n 0 -m engines tests/engines

quality:
	ruff check .
	ruff format --check .
	mypy

# The site of the documentation, into build/site; every warning is an error.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# What a release uploads, into dist: sdist and wheel, checked as PyPI reads them.
dist:
	rm -rf dist
	$(PYTHON) -m build --outdir dist
	$(PYTHON) -m twine check --strict dist/*

# The commands that make each page of figures; `make figures PAGE=benchmarks/paper.md` runs those of one.
figures:
	$(PYTHON) tools/figures.py $(PAGE)
