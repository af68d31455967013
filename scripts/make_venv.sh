#!/usr/bin/env bash
# Make a virtual environment: make_venv.sh PYTHON FOLDER. Does nothing when it is there.
# Debian splits `ensurepip` off Python: without it the environment is made bare and the caller's
# own pip installs pip into it.
set -euo pipefail
python=$1
venv=$2

if [ -x "$venv/bin/pip" ]; then
    exit 0
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "vLLM and diffusers need Python 3.11 or newer; $("$python" --version) is older." \
        "Set PYTHON, such as: make PYTHON=python3.12 ..." >&2
    exit 1
fi
if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
else
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install pip
fi
