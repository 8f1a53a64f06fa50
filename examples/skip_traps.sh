#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# A running program full of int3 is put into a checkpoint, gets a handler library at a chosen address, and comes back:
# it skips every trap and prints what it never could. As root, with a CRIU that works (make criu).
set -eu
cd "$(dirname "$0")"
dynacut=${DYNACUT:-dynacut}
work=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || :; rm -rf "$work"' EXIT

gcc -O1 -o "$work/traps" traps.c
# The library's table: where each int3 is, and how many bytes to skip.
objdump -d "$work/traps" | sed -n 's/^ *\([0-9a-f]*\):.*\tint3.*/{0x\1, 1},/p' >"$work/traps.h"
gcc -shared -fPIC -DTRAPS="\"$work/traps.h\"" -o "$work/skip_traps.so" skip_traps.c

cd "$work"
setsid ./traps </dev/null >output 2>&1 &
pid=$!
until grep -qs waiting output; do sleep 0.01; done

"$dynacut" checkpoint --pid "$pid" image
"$dynacut" offline image --handler ./skip_traps.so --handler-at 0x123450000000 -o changed
"$dynacut" offline changed
"$dynacut" restore changed

kill -USR1 "$pid"
until grep -q done output || ! kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
cat output
