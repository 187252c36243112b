#!/bin/sh
# Make a virtual environment that holds the packages of requirements.lock and this clone.
# usage: sh .ci/install.sh FOLDER [PYTHON]   (make calls it)
set -eu
cd "$(dirname "$0")/.."
venv=$1
start=$(date +%s)
cpu_index=https://download.pytorch.org/whl/cpu

fits() { "$1" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; }

python=${2:-}
if [ -n "$python" ]; then
    fits "$python" || { echo "PYTHON=$python is no Python 3.11 to 3.14 with venv; name another" >&2; exit 1; }
else
    # 3.11 first, which made the digits of the guide; else the newest
    for name in python3.11 python3.14 python3.13 python3.12 python3; do
        if fits "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || { echo "no Python 3.11 to 3.14 with venv was found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
fi

has_gpu=no
if nvidia-smi -L >/dev/null 2>&1; then has_gpu=yes; fi
torch=$(grep '^torch==' requirements.lock)
size="2.1 GB, with PyTorch's CPU build, as no NVIDIA GPU is here"
if [ $has_gpu = yes ]; then size="7 GB, with PyTorch's CUDA build"; fi
if [ "$(uname)" = Darwin ]; then size="2 GB"; fi
echo "$("$python" --version) ($python); installing $(grep -c == requirements.lock) packages into $venv: about $size"

step() { echo "  $1: $(du -sm "$venv" | cut -f1) MB, $(($(date +%s) - start)) s"; }

"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
by=pip
if pip install uv==0.13.9 2>/dev/null; then by=uv; fi
step "environment"

# uv does not read pip's configuration; of several indexes pip takes the best match
configured() { pip config list | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | head -n 1 | sed 's/\\n/ /g'; }
index=$(configured index-url) more=$(configured extra-index-url) links=$(configured find-links)
if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
if [ -n "$more" ]; then export UV_INDEX="$more" UV_INDEX_STRATEGY=unsafe-best-match; fi
if [ -n "$links" ]; then export UV_FIND_LINKS="$links"; fi

# what is compiled here, on all cores, no process compiles again where PYTHONDONTWRITEBYTECODE is set
install() {
    if [ $by = uv ] && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
        --compile-bytecode "$@" 2>/dev/null; then return; fi
    pip install "$@"
}

if [ $has_gpu = no ] && [ "$(uname)" = Linux ]; then
    # the index that pip is configured with, then PyTorch's own; the lock brings what torch needs
    install --no-deps "$torch+cpu" 2>/dev/null \
        || PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=20 UV_HTTP_TIMEOUT=20 \
            install --no-deps --index-url $cpu_index "$torch" 2>/dev/null \
        || echo "  no CPU build of $torch was found, so its CUDA build comes: 5 GB more on disk"
    step "torch"
fi

install -r requirements.lock
step "packages, by $by"
install --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m compileall -q mig_kit
step "mig-kit"
