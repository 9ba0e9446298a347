#!/usr/bin/env bash
# Makes the environments of the engines' tests: make.sh [node] [sentence-transformers] [fastembed]; by default all.
# Each stands in a folder of its own below $HF_DIREMBED_ENGINES, .engines by default; what is there is left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${HF_DIREMBED_ENGINES:-.engines}
mkdir -p "$folder"

for engine in "${@:-node sentence-transformers fastembed}"; do for name in $engine; do
    test -e "$folder/$name/ready" && continue
    rm -rf "${folder:?}/$name"
    case $name in
    node) # transformers.js, and what drives a Chromium that is installed; neither fetches a browser or CUDA
        mkdir "$folder/node"
        cp examples/browser/package.json "$folder/node"
        ONNXRUNTIME_NODE_INSTALL=skip ONNXRUNTIME_NODE_INSTALL_CUDA=skip \
            npm install --prefix "$folder/node" --no-audit --no-fund --loglevel error playwright-core@1
        ;;
    sentence-transformers) # its ONNX backend wants an older transformers than hf_dirembed
        "${PYTHON:-python3}" -m venv "$folder/$name"
        "$folder/$name/bin/pip" install --quiet torch==2.13.0
        "$folder/$name/bin/pip" install --quiet "sentence-transformers[onnx]"
        ;;
    fastembed)
        "${PYTHON:-python3}" -m venv "$folder/$name"
        "$folder/$name/bin/pip" install --quiet fastembed
        ;;
    *)
        echo "$name is none of node, sentence-transformers, fastembed" >&2
        exit 2
        ;;
    esac
    touch "$folder/$name/ready"
done; done
