#!/bin/sh
# Runs a compiler command and keeps what it printed beside the object file, in OBJECT.ptxas; the
# console gets everything but the notes of ptxas. tools/cuda_gates.py reads the report.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.ptxas" 2>&1
status=$?
grep -vE '^ptxas info|bytes stack frame|^$' "$object.ptxas" >&2
exit $status
