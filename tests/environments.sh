#!/usr/bin/env bash
# `make test-environments`: the tests of `make test` as five machines would run them, each a variable away from this one.
# Every numeric bound must hold on all of them. The log is committed.
set -uo pipefail
python=$1
cd "$(dirname "$0")/.."
grep -m1 'model name' /proc/cpuinfo
status=0
for variables in "" "OMP_NUM_THREADS=1" "OMP_NUM_THREADS=2" "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" \
    "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE"; do
    # shellcheck disable=SC2086  # several variables
    printed=$(env -u OMP_NUM_THREADS $variables "$python" -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder -rfEs 2>&1) || status=1
    echo "== ${variables:-nothing set}"
    grep -E "^(FAILED|ERROR|SKIPPED)|(passed|failed)" <<<"$printed"
done
exit $status
