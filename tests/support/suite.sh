#!/usr/bin/env bash
# suite.sh: the whole suite, in as many processes as there are processors, four at most (JOBS).
#
# usage: suite.sh DIRECTORY
#
# A process runs many spec files one after the other, because what one leaves behind must not disturb the next; which
# ones is settled as they go (SUITE_CLAIMS in output.lua), so all end together. Each writes DIRECTORY/<number>.log; the
# first is shown as it goes, the others when all have ended. The last line counts the tests of all. A process that ends
# without its own count has failed, whatever its status.
#
# Files that assert how long something takes (ALONE) come last, in one process with nothing beside it.
set -uo pipefail
directory=$1
rm -rf "$directory"
mkdir -p "$directory/claims"

processors=$(nproc)
jobs=${JOBS:-$((processors < 4 ? processors : 4))}
alone=()
for name in ${ALONE:-bench command dispatch explain}; do
    mkdir "$directory/claims/${name}_spec.lua"
    alone+=("tests/${name}_spec.lua")
done

# one NUMBER CLAIMS [files]
one() {
    local log=$directory/$1.log claims=$2
    shift 2
    # shellcheck disable=SC2086 # words on purpose
    SUITE_CLAIMS=$claims ${BUSTED:-luajit /usr/bin/busted} "$@" 2>&1 | tee "$log"
}
failed=0
# ended NUMBER STATUS
ended() {
    [ "$2" = 0 ] || failed=1
    if ! tail -n 1 "$directory/$1.log" | grep -qE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'; then
        echo "process $1 of the suite ended with status $2 and without its count"
        echo "0 passed, 1 failed, 0 skipped" >>"$directory/$1.log"
        failed=1
    fi
}

pids=()
for ((i = 1; i <= jobs; i++)); do
    if [ "$i" = 1 ]; then one "$i" "$directory/claims" & else one "$i" "$directory/claims" >/dev/null & fi
    pids+=($!)
done
for ((i = 1; i <= jobs; i++)); do
    wait "${pids[i - 1]}"
    status=$?
    [ "$i" = 1 ] || cat "$directory/$i.log"
    ended "$i" "$status"
done
one "$i" "" "${alone[@]}"
ended "$i" $?
tail -qn 1 "$directory"/*.log |
    awk '{ p += $1; f += $3; s += $5 } END { printf "%d passed, %d failed, %d skipped\n", p, f, s }'
exit $failed
