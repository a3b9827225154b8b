# SPDX-License-Identifier: Apache-2.0
"""A guest with Debian's kernel and an ext4 on its disk, which fsyncs what it writes and says so: cloned and moved while it
does."""
import shlex
import struct
import subprocess
from pathlib import Path

import pytest

from harness.guest import boot_linux
from harness.volumes import MiB, need, need_root, run
from harness.waiting import wait_until

DISK = 48 * MiB
BLOCKS, BLOCK = 2048, 4096


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Kernel and initramfs."""
    need("qemu-system-x86_64", "gcc", "busybox", "cpio", "modprobe")
    directory = tmp_path_factory.mktemp("guest")
    subprocess.run([Path(__file__).parents[1] / "vm" / "guest", directory], check=True, timeout=240)
    return directory


def acknowledged(console):
    """The last number of which all is said."""
    numbers = [line for line in Path(console).read_text(errors="replace").split("\n")[:-1] if line.strip().isdigit()]
    return int(numbers[-1]) if numbers else 0


def place_of(number):
    number ^= number >> 31
    number = number * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    number ^= number >> 29
    return number % BLOCKS


class LinuxGuest:
    def __init__(self, volumes, made):
        need_root()
        need("mkfs.ext4", "e2fsck")
        self.volumes = volumes
        self.image = volumes.file(DISK, data=False, name="disk")
        run("mkfs.ext4", "-q", "-F", self.image)
        self.qemu = boot_linux(volumes, [self.image], made)
        self.console = self.qemu.console
        wait_until(lambda: self.console.exists() and self.writes() > 5, 240, "the guest's writes")

    def writes(self):
        return acknowledged(self.console)

    def wait_for_writes(self, more):
        wanted = self.writes() + more
        wait_until(lambda: self.writes() >= wanted, 120, "the guest's writes")

    def assert_holds(self, image, count):
        """A clean filesystem once its journal is replayed, in which all writes up to `count` are."""
        run("e2fsck", "-fp", image, check=False, timeout=120)  # replays the journal
        run("e2fsck", "-fn", image, timeout=120)
        where = self.volumes.mount(self.volumes.loop(DISK, file=image), "ext4")
        journal = (where / "journal").read_text().split()
        assert journal[:count] == [str(number) for number in range(1, count + 1)], "appends are missing"
        data = (where / "data").read_bytes()
        last = {}
        for number in range(1, len(journal) + 1):
            last[place_of(number)] = number
        for place, number in last.items():
            found = struct.unpack_from("<Q", data, place * BLOCK)[0]
            assert found >= number or number > count, f"write {number} is missing: block {place} holds {found}"


def test_clone_and_migrate_a_live_linux_guest(ferryd, volumes, made):
    guest = LinuxGuest(volumes, made)
    still, clone = volumes.path("still"), volumes.path("clone")
    command = f"cp {shlex.quote(str(guest.console))} {shlex.quote(str(still))}"
    shown = ferryd.clone(guest.qemu.source(), clone, options=["--cutover-cmd", command], timeout=120)
    print(f"clone: {shown['pause']}")
    guest.wait_for_writes(3)
    guest.assert_holds(clone, acknowledged(still))
    guest.qemu.assert_clean()

    target = volumes.path("target")
    shown = ferryd.ctl("migrate", "--json", guest.qemu.source(), target, timeout=120).json
    print(f"migrate: {shown['pause']}")
    old = guest.image.read_bytes()
    guest.wait_for_writes(20)
    assert guest.image.read_bytes() == old, "the old disk is idle"
    guest.qemu.assert_clean()
    guest.qemu.command("quit")
    guest.qemu.process.wait(30)
    guest.assert_holds(target, guest.writes())
    assert "writer has ended" not in guest.console.read_text()
