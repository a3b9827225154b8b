#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# leftovers.sh before|after FILE: the tests leave no loop device, mount, process or big file behind. `before` writes
# down what is there, `after` complains about what came since and has the project's name on it.
set -euo pipefail

list() {
  losetup --noheadings --list --output NAME,BACK-FILE 2>/dev/null | grep blockferry | sed 's/^/loop device /' || true
  grep -E '[ /]blockferry' /proc/mounts | cut -d ' ' -f 1,2 | sed 's/^/mount /' || true
  find /dev/shm "${TMPDIR:-/tmp}" -maxdepth 1 -name 'blockferry-*' -printf 'file %p\n' 2>/dev/null || true
  { pgrep --list-name --exact ferryd; pgrep --list-name --exact ferryd-guard; } | sed 's/^/process /' || true
  find /sys/fs/bpf/blockferry -mindepth 1 -maxdepth 1 -printf 'pinned tracker %p\n' 2>/dev/null || true
}

if [ "$1" = before ]; then
  list | sort >"$2"
  exit 0
fi
# Another checkout's tests may run at the same time: theirs go away by themselves.
for _ in $(seq 20); do
  new=$(list | sort | comm -23 - "$2")
  [ -n "$new" ] || exit 0
  sleep 0.5
done
printf 'left behind by the tests:\n%s\n' "$new"
exit 1
