#!/usr/bin/env bash
# Builds .venv in the project's root. Called by `make install`; says what it chose and why.
# VARIANT: auto | cpu | gpu | plain;  PYTHON: an interpreter to use;  TORCH_INDEX: an index with CPU builds of torch.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*"; }
fail() { printf 'make install: %s\n' "$*" >&2; exit 1; }

usable() { # An interpreter that runs (a pyenv shim may not), has the right version, and can build an environment.
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON does not run, is not Python 3.11 to 3.13, or lacks the venv module"
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3 ~/.pyenv/versions/3.1[123].*/bin/python3; do
        if usable "$candidate"; then printf '%s' "$candidate"; return; fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with the venv module was found; install one (Debian and Ubuntu: python3 and" \
         "python3-venv), or name one: make install PYTHON=/path/to/python3"
}

choose_variant() {
    if [ "${VARIANT:-auto}" != auto ]; then
        say "Installing the $VARIANT variant, because VARIANT=$VARIANT says so."
    elif nvidia-smi -L 2>/dev/null | grep -q GPU; then
        VARIANT=gpu
        say "Installing for NVIDIA GPUs (extra 'gpu'), because nvidia-smi lists $(nvidia-smi -L | wc -l)."
    elif [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        VARIANT=cpu
        say "Installing for the CPU (deploy/locks/cpu.txt), because nvidia-smi shows no GPU here."
    else
        VARIANT=plain
        say "Installing without vLLM, because the lock is for Linux x86-64 and this is $(uname -s) $(uname -m):" \
            "use the torch engine (--set rollout.engine=torch). This platform is not tested."
    fi
}

with_pip() { .venv/bin/python -m pip --disable-pip-version-check install --no-compile --quiet --quiet --progress-bar off --log .venv/install.log "$@"; }

install() { # What `pip install` would. uv, which fetches and unpacks many packages at once, where it can be had and can do it.
    if [ -x .venv/bin/uv ]; then
        .venv/bin/uv pip install --quiet --python .venv/bin/python "$@" 2>>.venv/install.log && return
        say "uv could not do it (see .venv/install.log): pip does."
    fi
    with_pip "$@"
}

install_packages() {
    if with_pip "$uv" 2>/dev/null; then eval "$(.venv/bin/python deploy/pip_settings.py)"; fi
    case $VARIANT in
        cpu)
            install --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r deploy/locks/cpu.txt
            install --no-deps --no-build-isolation --editable . ;;
        gpu)
            install --editable '.[gpu,dev]'
            touch .venv/gpu ;;  # tells make train that this vLLM knows no CPU
        plain) install --editable '.[dev]' ;;
        *) fail "VARIANT=$VARIANT is none of auto, cpu, gpu, plain" ;;
    esac
    # On all cores, where pip has one; without what a run does not import (more than half of 27,000 files), which Python
    # compiles when it is. A few packages carry templates that are no Python: those stay as they are.
    local seldom='/site-packages/(_pytest|anthropic|dns|fastapi_cloud_cli|google/(?!protobuf|rpc)[a-z_]+|hypothesis|mypyc?|numba|omegaconf|onnx|onnxruntime|pip'
    seldom+='|pyasn1_modules|rapidocr|sentry_sdk|shapely|tensorboard)/|/(tests?|pygments/(lexers|styles)|sympy/physics|numpy/distutils)/'
    seldom+='|/ray/(air|data|llm|rllib|serve|train|tune)/|/huggingface_hub/(cli|inference)/|/fontTools/(ttLib/tables|varLib)/'
    seldom+='|/openai/(resources|types/(?!chat|graders|responses|shared)[a-z]+/)'
    seldom+='|/transformers/(pipelines|models/(?!auto|janus|clip|llama|siglip))'
    seldom+='|/vllm/(benchmarks|models/(?!common|deepseek_v4)|model_executor/models/(?!__init__|[a-z_]*(llama|utils|interfaces|registry)))'
    .venv/bin/python -m compileall -q -j 0 -x "$seldom" .venv/lib >.venv/compile.log 2>&1 || true
}

check_torch() {
    .venv/bin/python -c 'import torch' 2>.venv/torch-error.txt && return
    tail -n 1 .venv/torch-error.txt >&2
    [ "$VARIANT" = cpu ] || fail "torch was installed but does not import (see .venv/torch-error.txt)"
    fail "torch was installed but does not import; pip most likely took the CUDA build. Name PyTorch's CPU index:" \
         "make clean install TORCH_INDEX=https://download.pytorch.org/whl/cpu"
}

SECONDS=0
uv=uv==0.13.9
choose_variant
python=$(find_python)
[ -x .venv/bin/python ] && usable .venv/bin/python || "$python" -m venv --clear .venv
say "Building .venv with $(.venv/bin/python --version) ($python): about 200 packages, one to three minutes the first time ..."
install_packages
check_torch
say "Installed in ${SECONDS} s. Try: .venv/bin/stage-ray doctor"
