#!/usr/bin/env bash
# suite.sh: the whole suite, in as many processes as there are processors, four at most (JOBS).
#
# usage: suite.sh DIRECTORY
#
# A process runs many spec files one after the other, because what one leaves behind must not disturb the next; which
# ones is settled as they go (SUITE_CLAIMS in output.lua), so all end together. Each run has a directory of its own in
# DIRECTORY, so that one knows nothing of another beside it or before it; it stays if the run fails. A process writes
# <number>.log there; the first is shown as it goes, the others when all have ended. It lists the files that it ran in
# <number>.ran, and the run fails unless these are the spec files there are, each once. The last line counts the tests
# of all. A process that ends without its own count has failed, whatever its status.
#
# Files that compare two times, or a time with a tight bound (ALONE), come last, in one process with no other of the
# suite beside it. Others assert times too (profile_spec, train_spec), with bounds that leave room for neighbours or
# many times what is measured; and continuous integration may still be at its lint then, at a lower priority.
set -uo pipefail
directory=$1
processors=$(nproc)
jobs=${JOBS:-$((processors < 4 ? processors : 4))}
if ! [[ $jobs =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "suite.sh: JOBS must be a number of processes, 1 or more, got '$jobs'" >&2
    exit 2
fi
mkdir -p "$directory"
run=$(mktemp -d "$directory/XXXXXX") || exit 2
mkdir "$run/claims"

alone=()
for name in ${ALONE:-bench command dispatch explain}; do
    mkdir "$run/claims/${name}_spec.lua"
    alone+=("tests/${name}_spec.lua")
done

# Processes are started with job control on, and off again, which would speak of them: what a process starts is then in
# its group, and goes with it if this script is ended.
pids=()
# shellcheck disable=SC2317 # traps call it
end_all() {
    trap - EXIT INT TERM HUP
    local pid
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done 2>/dev/null
    wait 2>/dev/null
}
trap end_all EXIT
trap 'end_all; exit 129' HUP
trap 'end_all; exit 130' INT
trap 'end_all; exit 143' TERM

# one NUMBER CLAIMS [files]
one() {
    local log=$run/$1.log ran=$run/$1.ran claims=$2
    shift 2
    : >"$ran"
    # shellcheck disable=SC2086 # words on purpose
    SUITE_CLAIMS=$claims SUITE_RAN=$ran ${BUSTED:-luajit /usr/bin/busted} "$@" 2>&1 | tee "$log"
}
failed=0
# ended NUMBER STATUS
ended() {
    [ "$2" = 0 ] || failed=1
    if ! tail -n 1 "$run/$1.log" | grep -qE '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$'; then
        echo "process $1 of the suite ended with status $2 and without its count"
        echo "0 passed, 1 failed, 0 skipped" >>"$run/$1.log"
        failed=1
    fi
}

set -m
for ((i = 1; i <= jobs; i++)); do
    if [ "$i" = 1 ]; then one "$i" "$run/claims" </dev/null & else one "$i" "$run/claims" </dev/null >/dev/null & fi
    pids+=($!)
done
set +m
for ((i = 1; i <= jobs; i++)); do
    wait "${pids[i - 1]}"
    status=$?
    [ "$i" = 1 ] || cat "$run/$i.log"
    ended "$i" "$status"
done
set -m
one "$i" "" "${alone[@]}" </dev/null &
pids=($!)
set +m
wait "${pids[0]}"
ended "$i" $?
pids=()

if ! difference=$(diff <(printf '%s\n' tests/*_spec.lua | xargs -n 1 basename | sort) <(sort "$run"/*.ran)); then
    echo "the suite did not run each of tests/*_spec.lua once (<: not run, >: run again, or not there):"
    echo "$difference" | grep '^[<>]'
    echo "0 passed, 1 failed, 0 skipped" >"$run/files.log"
    failed=1
fi
counts=$(tail -qn 1 "$run"/*.log |
    awk '{ p += $1; f += $3; s += $5 } END { printf "%d passed, %d failed, %d skipped\n", p, f, s }')
if [ $failed = 0 ]; then rm -r "$run"; else echo "the logs of this run are in $run"; fi
echo "$counts"
exit $failed
