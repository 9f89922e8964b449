#!/usr/bin/env bash
# The tests of the modules that hold `unsafe` (peft-adapters: ops), under AddressSanitizer. The sanitizer is not stable in
# rustc, so RUSTC_BOOTSTRAP lets a stable compiler take the flag; everything is compiled anew, into target/asan.
#
#     bash scripts/asan.sh              # peft-adapters
#     bash scripts/asan.sh -p peft --lib
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p')
[ $# -gt 0 ] || set -- -p peft-adapters
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1"
# With an explicit target build scripts and macros stay free of the flag.
cargo test --target "$host" --target-dir target/asan "$@"
