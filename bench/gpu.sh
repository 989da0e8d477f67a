#!/bin/sh
# Everything that wants an NVIDIA GPU, in one call of under nine minutes: the tests that need one, then the
# measurements. Results and logs are files in the folder given as $1 (default: gpu-results).
# Wants a Python with torch, torchvision and the packages of pyproject.toml: PYTHON=... (default: .venv/bin/python).
# A part that fails or takes too long has left a log and the rows it had measured, and the rest goes on.
out=${1:-gpu-results}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
status=0

part() { # name, seconds, command ...
    name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1 && return
    if [ $? = 124 ]; then why="stopped after $seconds s"; else why=failed; fi
    status=1
    echo "   $why: $out/$name.log"
    tail -n 3 "$out/$name.log"
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1
$python -c 'import sys, torch, torchvision
found = torch.cuda.is_available()
name = torch.cuda.get_device_name() if found else "sees no GPU"
print("torch", torch.__version__, "torchvision", torchvision.__version__, name)
sys.exit(not found)' || exit 1
part extraction 240 $python -m bench --quick --only extraction --output "$out/results.json"
part tests 110 $python -m pytest -q tests/extract/test_encoder.py tests/extract/test_nvjpeg.py tests/train/test_gpu.py -k "gpu or cuda or nvjpeg"
part training 100 $python -m bench --quick --only training --output "$out/results.json"
part decoding 70 $python -m bench --quick --only decoding --output "$out/results.json"
echo "results: $out/results.json"
exit $status
