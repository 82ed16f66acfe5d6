#!/usr/bin/env bash
# Make an environment of its own for the libraries we read, write and race against.
#
#     tools/make_peers.sh [FOLDER]        default: .venv-peers
#
# They pin each other's dependencies, so they never enter the environment of the package.
# `lapx` is what Overcomplete needs to import; sae-lens brings transformers and pandas along.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-peers}
test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 torchvision==0.28.0 sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 \
    Overcomplete==0.3.0 lapx==0.11.1
# These pin what the others do not allow, and run beside them all the same.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    circuit-tracer==0.5.0 saev==0.1.0 sae-bench==0.6.0 llamascopium==2.0.0b34 zstandard \
    more-itertools loguru pymongo json-repair pydantic-settings opentelemetry-api opentelemetry-sdk \
    opentelemetry-semantic-conventions opentelemetry-proto \
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http \
    googleapis-common-protos cattrs \
    sae-dashboard==0.8.0 dataclasses-json==0.6.7 marshmallow==3.26.1 typing-inspect==0.9.0 \
    mypy-extensions eindex-callum==0.1.2 decode-clt==0.0.1
"$folder/bin/python" -m pip freeze >"$folder/versions.txt"
touch "$folder/.ready"
echo "peers are in $folder"
