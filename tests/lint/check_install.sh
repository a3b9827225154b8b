#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# check_install.sh BUILD: installs into an empty root; everything is where Debian expects it, systemd has nothing to
# say against the units, and ferryd takes the sample configuration.
set -euo pipefail
build=$1
root=$(mktemp -d "${TMPDIR:-/tmp}/blockferry-install-XXXXXX")
trap 'rm -rf "$root"' EXIT

fail() {
  echo "FAILED: $*"
  exit 1
}

DESTDIR=$root cmake --install "$build" --prefix /usr >/dev/null
expected="etc/blockferry/ferryd.conf
usr/bin/ferryctl
usr/lib/systemd/system/ferryd.service
usr/lib/systemd/system/ferryd.socket
usr/lib/sysusers.d/blockferry.conf
usr/lib/tmpfiles.d/blockferry.conf
usr/sbin/ferryd
usr/sbin/ferryd-guard
usr/share/bash-completion/completions/ferryctl
usr/share/blockferry/openapi.json
usr/share/doc/blockferry/ARCHITECTURE.md
usr/share/doc/blockferry/LICENSE
usr/share/doc/blockferry/README.md
$(cd "$(dirname "$0")/../.." && find docs -type f | sort | sed 's|^|usr/share/doc/blockferry/|')"
installed=$(cd "$root" && find . -type f | sed 's|^\./||' | sort)
[ "$installed" = "$expected" ] || fail "installed is: $(diff <(echo "$expected") <(echo "$installed"))"
[ -x "$root/usr/bin/ferryctl" ] && [ -x "$root/usr/sbin/ferryd" ] || fail "the programs are not executable"

# The units, among systemd's own that they refer to.
cp -rn /usr/lib/systemd/system "$root/usr/lib/systemd/"
complaints=$(systemd-analyze verify --root="$root" ferryd.service ferryd.socket 2>&1) ||
  fail "systemd-analyze verify: $complaints"
[ -z "$complaints" ] || fail "systemd-analyze verify: $complaints"
# An exposure above 3.9, in tenths, fails the command.
systemd-analyze security --offline=true --root="$root" --threshold=39 --no-pager ferryd.service >"$root/security" ||
  fail "$(cat "$root/security")"
grep 'Overall exposure' "$root/security"
systemd-sysusers --root="$root" --dry-run "$root/usr/lib/sysusers.d/blockferry.conf" >/dev/null 2>&1 ||
  fail "systemd-sysusers refuses its file"
# As a user, tmpfiles cannot give directories to root.
if [ "$(id -u)" -eq 0 ]; then
  systemd-tmpfiles --root="$root" --create "$root/usr/lib/tmpfiles.d/blockferry.conf"
  [ "$(stat -c %a "$root/var/lib/blockferry")" = 700 ] || fail "tmpfiles made another state directory"
fi

# Every option of the sample is one that ferryd has, with the default that it has.
sed -E -n 's/^#?([a-z-]+) =( (.*))?$/\1 = \3/p' "$root/etc/blockferry/ferryd.conf" >"$root/all.conf"
"$root/usr/sbin/ferryd" --config "$root/all.conf" --version >/dev/null 2>&1 || fail "ferryd refuses the sample"
help=$("$root/usr/sbin/ferryd" --help | tr '\n' ' ')
while IFS='= ' read -r name value; do
  # Those without a value have no default.
  [[ $help == *"--$name arg ${value:+(=$value)}"* ]] || fail "the sample's $name = $value is not ferryd's default"
done <"$root/all.conf"
for name in $(grep -oE -- '--[a-z-]+ arg' <<<"$help" | sed -e 's/^--//' -e 's/ arg$//'); do
  [ "$name" = config ] || grep -q "^$name = " "$root/all.conf" || fail "the sample lacks $name"
done
echo "installed files, units and sample configuration are in order"
