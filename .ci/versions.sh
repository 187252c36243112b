#!/bin/sh
# Which versions of TRL, transformers and PEFT the trainer's gradient tests pass with: the newest
# minor of each that the registry has and the two before it, one package changed at a time.
# usage: sh .ci/versions.sh PYTHON   (make versions calls it; the table is in guide/trainer.md)
set -eu
cd "$(dirname "$0")/.."
python=$1
tests="test_a_training_ends_and_logs_as_stock_trls or test_an_update_learns_from or test_callbacks_and"

minors() { # of a package: the newest version of each of its three newest minors
    "$python" -m pip index versions "$1" 2>/dev/null | sed -n 's/^Available versions: //p' \
        | tr -d ',' | tr ' ' '\n' | awk -F. '!seen[$1 "." $2]++' | head -n 3
}

failed=0
for package in trl transformers peft; do
    for version in $(minors $package); do
        folder=$(mktemp -d)
        "$python" -m pip install --quiet --no-deps --target "$folder" "$package==$version"
        if PYTHONPATH=$folder OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider \
            tests/shared_prefix/test_trainer.py -k "$tests" >"$folder/log" 2>&1
        then echo "$package $version: $(tail -n 1 "$folder/log")"
        else failed=1; echo "$package $version FAILS: $(tail -n 1 "$folder/log")"
        fi
        rm -rf "$folder"
    done
done
exit $failed
