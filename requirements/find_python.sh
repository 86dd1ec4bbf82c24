#!/bin/sh
# Prints the path of an interpreter that really runs.
#
#   find_python.sh VERSION...    the first of these versions (such as 3.13) found
#   find_python.sh default       python3 if it is 3.11 or newer, else the oldest found
#   find_python.sh oldest        3.11 if there is one, else the oldest newer one
#
# A name on the PATH is no proof: version managers put stand-ins there that fail
# until a version is chosen. So each candidate is run, and asked for its real path.
set -eu

# probe VERSION COMMAND...: the real path, if COMMAND is a usable Python VERSION.
# VERSION may be "any". Some systems package venv and pip apart, so ask for both.
probe() {
    wanted=$1
    shift
    "$@" -c '
import ensurepip, ssl, sys, venv
found = sys.version_info[:2]
if found < (3, 11) or sys.argv[1] not in ("any", "%d.%d" % found):
    sys.exit(1)
print(sys.executable)
' "$wanted" 2>/dev/null
}

find_version() {
    probe "$1" "python$1" && return
    probe "$1" python3 && return
    if command -v pyenv >/dev/null 2>&1; then
        pattern="^$(echo "$1" | sed 's/\./\\./')\.[0-9][0-9]*\$"
        # The newest patch release comes last.
        release=$(pyenv versions --bare | grep "$pattern" | sort -t. -k3n | tail -n 1)
        [ -n "$release" ] && probe "$1" env PYENV_VERSION="$release" "python$1" && return
    fi
    return 1
}

first_of() {
    for version in "$@"; do
        find_version "$version" && return
    done
    return 1
}

none() {
    echo "No working Python 3.11 or newer was found; set PYTHON=/path/to/python." >&2
    exit 1
}

case ${1:-} in
    '')
        echo "usage: $0 default | oldest | VERSION..." >&2
        exit 2
        ;;
    default)
        probe any python3 || first_of 3.11 3.12 3.13 3.14 || none
        ;;
    oldest)
        find_version 3.11 && exit
        python=$(first_of 3.12 3.13 3.14) || none
        echo "No Python 3.11 was found: the oldest versions run on $python." >&2
        echo "$python"
        ;;
    *)
        first_of "$@"
        ;;
esac
