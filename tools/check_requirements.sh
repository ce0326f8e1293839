#!/bin/sh
# Usage: check_requirements.sh [PYTHON]
# Checks what pip cannot install: Python 3.11 or newer with venv and its C headers, and a C++ compiler (torch.compile
# builds its CPU kernels with it). Names each missing thing with the line that installs it; exit code 1 if any is.

python=${1:-python3}
packages=""

missing() { # WHAT PACKAGE
    echo "missing: $1" >&2
    echo "    sudo apt-get install -y $2" >&2
    packages="$packages $2"
}

if ! "$python" -c "" 2>/dev/null; then
    missing "$python, a Python 3.11 or newer that runs" python3
    missing "Python's venv module" python3-venv
    missing "Python's C headers (Python.h)" python3-dev
elif ! "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
    echo "missing: Python 3.11 or newer; $python is $("$python" -c 'import platform; print(platform.python_version())')" >&2
    echo "    sudo apt-get install -y python3 python3-venv python3-dev" >&2
    echo "    or name a newer one: make PYTHON=python3.12" >&2
    packages="$packages python3 python3-venv python3-dev"
else
    "$python" -c "import ensurepip, venv" 2>/dev/null ||
        missing "the venv module of $python" python3-venv
    "$python" -c "import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')))" ||
        missing "the C headers (Python.h) of $python" python3-dev
fi

compiler=${CXX:-g++}
# CXX may hold flags or a launcher, as in "ccache g++".
command -v ${compiler%% *} >/dev/null 2>&1 || missing "a C++ compiler ($compiler)" g++

[ -z "$packages" ] && exit 0
set -- $packages
[ $# -gt 1 ] && echo "all at once: sudo apt-get install -y $*" >&2
exit 1
