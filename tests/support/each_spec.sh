#!/usr/bin/env bash
# each_spec.sh: specs, each in a process of its own, as many at once as there are processors.
#
# usage: each_spec.sh DIRECTORY spec.lua ...        (variables for the specs alone: SPEC_ENV="NAME=value NAME=value")
#
# The suite runs many specs in one process (suite.sh), because what one leaves behind must not disturb the next. The
# gates that instrument the code (make asan, tsan, coverage) are ten times slower and want something else: all
# processors at work, a report that belongs to one spec, a crash that ends one spec and not the suite. Each spec
# writes DIRECTORY/<name>.log; the logs of those that failed are shown. The last line counts tests like the suite's.
# SPEC_ENV is given to the specs and not to this script, because a preloaded sanitizer does not suit every shell.
set -u
directory=$1
shift
mkdir -p "$directory"

run_one() {
    local name log start status
    name=$(basename "$1" _spec.lua)
    log=$directory/$name.log
    start=$SECONDS
    # shellcheck disable=SC2086 # words on purpose
    env ${SPEC_ENV:-} ${BUSTED:-luajit /usr/bin/busted} ${BUSTED_OPTIONS:-} "$1" >"$log" 2>&1
    status=$?
    echo "$status" >"$directory/$name.status"
    printf '  %-6s %-24s %4d s  %s\n' "$([ $status = 0 ] && echo ok || echo FAILED)" "$1" $((SECONDS - start)) \
        "$(grep -E '^[0-9]+ passed' "$log" | tail -1)"
}
export -f run_one
export directory

rm -f "$directory"/*.log "$directory"/*.status
printf '%s\n' "$@" | xargs -P "${JOBS:-$(nproc)}" -I{} bash -c 'run_one {}'

failed=0
for spec in "$@"; do
    name=$(basename "$spec" _spec.lua)
    if [ "$(cat "$directory/$name.status" 2>/dev/null)" != 0 ]; then
        failed=1
        echo "---- $spec: $directory/$name.log"
        tail -n 60 "$directory/$name.log"
    fi
done
grep -hE '^[0-9]+ passed, [0-9]+ failed' "$directory"/*.log |
    awk '{ p += $1; f += $3; s += $5 } END { printf "%d passed, %d failed, %d skipped\n", p, f, s }'
exit $failed
