#!/usr/bin/env bash
# Makes an environment with Gradio, Playwright and this package in it, and runs the demo's test there, in a real browser:
#     tests/engines/demo.sh FOLDER [arguments of pytest]
# The environment in FOLDER is kept and taken again as it is. The browser is Debian's: apt-get install chromium; another
# one is named by CHROMIUM. Install PyTorch's build for CPUs first where pip does not: PIP_EXTRA_INDEX_URL says where.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:?"say which folder the environment goes to"}
shift

if [ ! -e "$venv/ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet -c constraints.txt torch
    "$venv/bin/pip" install --quiet -c constraints.txt -e '.[plot]' 'gradio>=6' playwright pytest
    touch "$venv/ready"
fi

OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m pytest -o addopts=-ra tests/engines/test_demo.py "$@"
