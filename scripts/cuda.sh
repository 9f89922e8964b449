#!/usr/bin/env bash
# Builds peft with the feature `cuda`, also on a machine with neither a GPU nor a CUDA toolkit.
#
#     bash scripts/cuda.sh                         # for compute capability 9.0 (Hopper)
#     CUDA_COMPUTE_CAP=89 bash scripts/cuda.sh     # for another
#
# A toolkit that is there (nvcc on PATH, or CUDA_HOME) is used. Without one, compiler and libraries come as Python wheels
# (python3 with venv; 2 GB on disk) and the driver library is an empty stub to link against. Also needs cargo, gcc, g++ and
# binutils. Everything goes under target/cuda/, apart from other builds; a second run downloads nothing again. The result,
# target/cuda/peft, starts only where the loader finds the driver's libcuda.so.1 and CUDA's own libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$PWD/target/cuda
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
mkdir -p "$out"
link=()

if [[ -n ${CUDA_HOME:-} ]]; then
    export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"
elif nvcc=$(command -v nvcc); then
    root=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
    if [[ -e $root/include/cuda.h ]]; then export CUDA_HOME=$root; fi
else
    # All of CUDA 13.0 (its cuRAND is 10.4.0): an nvvm newer than nvcc makes PTX that ptxas refuses.
    wheels=("nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*" "nvidia-cuda-crt==13.0.*" "nvidia-cuda-runtime==13.0.*"
        "nvidia-cuda-cccl==13.0.*" "nvidia-cuda-nvrtc==13.0.*" "nvidia-cublas==13.0.*" "nvidia-curand==10.4.0.*")
    venv=$out/venv
    if [[ ! -e $venv/wheels || $(<"$venv/wheels") != "${wheels[*]}" ]]; then
        python3 -m venv --clear "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${wheels[@]}"
        echo "${wheels[*]}" >"$venv/wheels"
    fi
    CUDA_HOME=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
    export CUDA_HOME CUDA_PATH=$CUDA_HOME CUDA_ROOT=$CUDA_HOME CUDA_TOOLKIT_ROOT_DIR=$CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"

    # The wheels hold libX.so.N only, in lib.
    ln -sfn lib "$CUDA_HOME/lib64"
    for library in "$CUDA_HOME"/lib/lib*.so.*; do
        ln -sfn "${library##*/}" "${library%.so.*}.so"
    done

    # The driver library comes with the driver. Nothing is in the stub, so its symbols stay open until the program is loaded.
    mkdir -p "$out/stubs"
    gcc -shared -Wl,-soname,libcuda.so.1 -o "$out/stubs/libcuda.so" -x c /dev/null
    # rustc has --as-needed in force for the -lcuda of a crate, which drops a library without symbols: name it again.
    link=(-L "native=$out/stubs" -C link-arg=-Wl,--unresolved-symbols=ignore-all -C link-arg=-Wl,--no-as-needed
        -C link-arg=-lcuda)
fi
nvcc --version | grep release

cargo rustc --release --locked --features cuda --bin peft --target-dir "$out/build" -- "${link[@]}"
strip -o "$out/peft" "$out/build/release/peft"

needed=$(readelf -d "$out/peft" | grep NEEDED)
echo "$needed"
if [[ $needed != *'[libcuda.so.1]'* ]]; then
    echo "cuda.sh: libcuda.so.1 is not among the libraries needed: the driver would never be loaded" >&2
    exit 1
fi
echo "$out/peft: $(stat -c %s "$out/peft") bytes"
