#!/bin/sh
# Run the tests and the benchmarks that need an NVIDIA GPU, in less than ten minutes.
# Usage: bench/gpu.sh [FOLDER] [PART ...]
# Results and logs are written to FOLDER (default: gpu-results). Parts: extraction (less than five minutes), tests,
# training, decoding; default: all.
# Requires a Python with torch, torchvision, and the dependencies in pyproject.toml: PYTHON=... (default: .venv/bin/python).
# A part that fails or times out leaves its log and the rows measured so far; the other parts still run.
out=gpu-results selected=
for argument in "$@"; do
    case $argument in
    extraction | tests | training | decoding) selected="$selected $argument " ;;
    *) out=$argument ;;
    esac
done
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
status=0

part() { # name, seconds, command ...
    name=$1 seconds=$2
    shift 2
    case ${selected:-" $name "} in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1 && return
    if [ $? = 124 ]; then why="stopped after $seconds s"; else why=failed; fi
    status=1
    echo "   $why: $out/$name.log"
    tail -n 3 "$out/$name.log"
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
$python -c 'import sys, torch, torchvision
available = torch.cuda.is_available()
name = torch.cuda.get_device_name() if available else "no GPU"
print("torch", torch.__version__, "torchvision", torchvision.__version__, name)
sys.exit(not available)' || exit 1
# The photos are read from memory, and the shards are written to memory, where there is a tmpfs.
[ -d /dev/shm ] && fast=/dev/shm || fast=${TMPDIR:-/tmp}
part extraction 280 env TMPDIR="$fast" $python -m bench --quick --only extraction --output "$out/results.json"
part tests 110 $python -m pytest -q tests/extract/encoders tests/extract/images tests/train/test_gpu.py -k "gpu or cuda or nvjpeg"
part training 100 $python -m bench --quick --only training --output "$out/results.json"
part decoding 70 $python -m bench --quick --only decoding --output "$out/results.json"
echo "results: $out/results.json"
exit $status
