#!/usr/bin/env bash
# run.sh HOST [pytest arguments]: the tests of a framework, in an environment of its own for each constraints file of
# tests/integrations/HOST. An environment is made once and named by the hash of what goes into it.
set -euo pipefail
cd "$(dirname "$0")/../.."
host=$1
shift
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
for constraints in tests/integrations/"$host"/constraints*.txt; do
    hash=$(cat "$constraints" pyproject.toml setup.py "$0" | sha256sum | cut -c1-12)
    env=build/envs/$host-$hash
    if [ ! -e "$env/.installed" ]; then
        rm -rf "$env"
        "$python" -m venv "$env"
        "$env/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" -e ".[$host,trainer]" \
            $(grep -oP '^# with: \K.*' "$constraints")
        touch "$env/.installed"
    fi
    echo "$host with $constraints"
    PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/integrations/$host" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled \
        "$env/bin/python" -m pytest -q -n 2 --dist loadfile \
        -W ignore -o addopts="--import-mode=importlib --strict-markers" "$@" tests/integrations/"$host"
done
