#!/usr/bin/env bash
# Makes an environment with lm-eval, `transformers serve` and MLX for CPUs and this package in it, and runs the tests
# that are marked `commands` there:
#     tests/engines/commands.sh FOLDER [arguments of pytest]
# The environment in FOLDER is kept and taken again as it is. PyTorch's build for CPUs comes first, or gigabytes for
# CUDA would; where pip does not find it by itself, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu helps.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:?"say which folder the environment goes to"}
shift

if [ ! -e "$venv/ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet torch==2.13.0 'lm-eval[hf]==0.4.13' 'transformers[serving]==5.23.0' \
        'mlx[cpu]==0.32.4' mlx-lm==0.32.2 openai pytest pytest-xdist
    "$venv/bin/pip" install --quiet --editable .
    touch "$venv/ready"
fi

OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m pytest -m commands -n 0 tests/engines "$@"
