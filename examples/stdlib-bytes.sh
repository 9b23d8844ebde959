#!/bin/sh
# Prepare the studies' corpus if it is missing: Python's own standard library as bytes, 11 MB.
set -eu
data=data/stdlib/bytes
if [ ! -e "$data.idx" ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    mkdir -p data/stdlib
    megahp preprocess --input "$stdlib" --extensions .py --exclude site-packages dist-packages test idlelib \
        lib2to3 --tokenizer bytes --output "$data" --workers 2
fi
