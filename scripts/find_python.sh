#!/bin/sh
# Prints a Python 3.11 to 3.13 that runs and can make virtual environments; otherwise says on stderr what is missing.
# Candidates are the arguments, or the usual names.
set -u

version_fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
makes_venvs='import ensurepip, venv'
without_venv=

[ "$#" -gt 0 ] || set -- python3 python3.13 python3.12 python3.11 python
for candidate in "$@"; do
    # a name on the PATH proves nothing: version managers leave shims that fail when called
    "$candidate" -c "$version_fits" >/dev/null 2>&1 || continue
    if "$candidate" -c "$makes_venvs" >/dev/null 2>&1; then
        echo "$candidate"
        exit 0
    fi
    without_venv="${without_venv:-$candidate}"
done

if [ -n "$without_venv" ]; then
    echo "error: $without_venv has no venv or ensurepip module; on Debian and Ubuntu: apt install python3-venv" >&2
else
    echo "error: no Python 3.11, 3.12 or 3.13 found (tried: $*)." >&2
    echo "       Install one, or name it: make PYTHON=/path/to/python3" >&2
fi
exit 1
