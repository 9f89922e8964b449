#!/usr/bin/env bash
# Fuzzes the parsers, two at a time, for so many seconds each; needs nightly and `cargo install cargo-fuzz --locked`.
#
#     bash scripts/fuzz.sh 1800                  # all
#     bash scripts/fuzz.sh 600 tar parquet       # these
#
# It starts from fuzz/corpus, from fuzz/found and from what earlier runs here found, which stays under target/fuzz/found; logs
# lie beside it. What fails is kept under fuzz/artifacts: fix it, and add the input to fuzz/corpus. `cargo +nightly fuzz run
# TARGET FILE` repeats one. `--merge` instead of seconds packs what reaches more code than fuzz/corpus, small inputs first, into
# fuzz/found. `cargo test --test fuzz` replays both.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:?how many seconds for each target?}
shift
[ $# -gt 0 ] || set -- $(ls fuzz/corpus)
host=$(rustc -vV | sed -n 's/^host: //p')
cargo +nightly fuzz build --target-dir target/fuzz
export what programs=target/fuzz/$host/release ASAN_OPTIONS=detect_leaks=0
mkdir -p target/fuzz/log

one() {
    found=target/fuzz/found/$1 pack=fuzz/found/$1.tar.gz
    mkdir -p "$found" "fuzz/artifacts/$1"
    [ ! -f "$pack" ] || tar -xzf "$pack" -C "$found"
    if [ "$what" = --merge ]; then
        keep "$1"
    else
        "$programs/$1" -max_total_time="$what" -rss_limit_mb=1024 -timeout=10 -artifact_prefix="fuzz/artifacts/$1/" \
            "$found" "fuzz/corpus/$1"
    fi > "target/fuzz/log/$1" 2>&1 && state=clean || state="ended with $?, see target/fuzz/log/$1"
    rmdir --ignore-fail-on-non-empty "fuzz/artifacts/$1"
    echo "$1: $state; $(grep -E '#[0-9]+.*cov:' "target/fuzz/log/$1" | tail -n 1)"
}

# Packs a set cover.
keep() {
    kept=target/fuzz/kept/$1
    rm -rf "$kept"
    mkdir -p "${kept%/*}" fuzz/found
    cp -r "fuzz/corpus/$1" "$kept"
    "$programs/$1" -set_cover_merge=1 -max_len=16384 -artifact_prefix="fuzz/artifacts/$1/" "$kept" "$found" || return
    for own in "fuzz/corpus/$1"/*; do rm "$kept/${own##*/}"; done
    ls "$kept" | tar --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=644 -C "$kept" -cT - | gzip -9n > "$pack"
}
export -f one keep
printf '%s\n' "$@" | xargs -P 2 -I{} bash -c 'one {}'
