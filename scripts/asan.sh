#!/usr/bin/env bash
# The tests of what is `unsafe` (peft-adapters: ops; peft: alloc), under AddressSanitizer. The sanitizer is not stable in rustc, so
# RUSTC_BOOTSTRAP lets a stable compiler take the flag; everything is compiled anew, into target/asan.
#
#     bash scripts/asan.sh                   # both
#     bash scripts/asan.sh -p peft --lib     # other tests of cargo's
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1"
# With an explicit target build scripts and macros stay free of the flag.
check() { cargo test --target "$host" --target-dir target/asan "$@"; }
if [ $# -gt 0 ]; then
    check "$@"
else
    check -p peft-adapters
    check -p peft --lib alloc::
fi
