#!/bin/sh
# Makes or refreshes a virtual environment: make_env.sh FOLDER PYTHON PIP_ARGUMENT...
set -eu

folder=$1
python=$2
shift 2

version() {
    "$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null
}

if [ "$(version "$folder/bin/python" || true)" != "$(version "$python")" ]; then
    echo "Making $folder with $python"
    "$python" -m venv --clear "$folder"
fi

echo "Installing what $folder needs (a minute or more the first time)"
# Dependency groups need pip 25.1.
"$folder/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
"$folder/bin/python" -m pip install --quiet "$@"
touch "$folder/.stamp"
