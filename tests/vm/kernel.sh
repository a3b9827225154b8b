# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Debian's kernel for emulated machines, and what their initramfs takes. To be sourced: `cache` is where kernels are
# kept, `work` a directory for what is made on the way.

kernel_package() {
  apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)/\1/p' | head -n 1
}

# The kernel with its modules, unpacked and not installed: $cache/PACKAGE/{boot,lib}. Made aside and moved into place:
# several may want it at once.
fetch_kernel() {
  local name=$1 made=${work:?}/kernel
  [ -d "${cache:?}/$name" ] && return
  mkdir -p "$cache" "$made"
  (cd "$work" && apt-get -qq -o Acquire::Retries=3 -o APT::Sandbox::User=root download "$name" >&2)
  dpkg -x "$work/$name"_*.deb "$made"
  depmod -b "$made" "${name#linux-image-}"
  mv -T "$made" "$cache/$name" 2>/dev/null || [ -d "$cache/$name" ]
}

# begin_initramfs ROOT KERNEL VERSION MODULE…: busybox, and the modules with what they need, which /modules lists in the
# order in which they are to be loaded.
begin_initramfs() {
  local root=$1 kernel=$2 version=$3 module file
  shift 3
  mkdir -p "$root"/{bin,proc,sys,dev,root}
  cp "$(command -v busybox)" "$root/bin/busybox"
  ln -s busybox "$root/bin/sh"
  : >"$root/modules"
  for module in "$@"; do
    modprobe -d "$kernel" -S "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p' | while read -r file; do
      [ -e "$root/${file##*/}" ] && continue
      cp "$file" "$root/"
      echo "/${file##*/}" >>"$root/modules"
    done
  done
  [ -d "$kernel/lib/modules/$version" ]
}

# pack_initramfs ROOT FILE
pack_initramfs() {
  (cd "$1" && find . | cpio --quiet -o -H newc) >"$2"
}
