PYTHON ?= python3

.PHONY: demo test style quality

demo:
	hf-dirembed demo

test:
	$(PYTHON) -m pytest

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .
	mypy
