#!/usr/bin/env bash
# run.sh HOST [pytest arguments]: the tests of a framework, in an environment of its own for each constraints file of
# tests/integrations/HOST. An environment is made once and named by the hash of what goes into it. A constraints file
# says in comments which extra of ours has the host, if it is not called so, what else the tests need, and what the host
# asks for and cannot load (torchvision's wheel looks for CUDA).
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
        extra=$(grep -oP '^# extra: \K.*' "$constraints" || echo "$host")
        "$env/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" -e ".[$extra,trainer]" \
            $(grep -oP '^# with: \K.*' "$constraints")
        without=$(grep -oP '^# without: \K.*' "$constraints" || true)
        [ -z "$without" ] || "$env/bin/python" -m pip uninstall -q -y $without
        touch "$env/.installed"
    fi
    echo "$host with $constraints"
    PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/integrations/$host" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled \
        "$env/bin/python" -m pytest -q -n 2 --dist loadfile \
        -W ignore -o addopts="--import-mode=importlib --strict-markers" "$@" tests/integrations/"$host"
done
