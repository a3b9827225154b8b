# SPDX-License-Identifier: Apache-2.0
"""Device-mapper volumes that are in use, and proof that nobody noticed what became of them."""
import os
import subprocess
import threading
import time
from pathlib import Path

from harness.volumes import run
from harness.waiting import wait_until

MIB = 40
# mkfs.xfs makes none smaller than 300 MiB but for its own tests.
SMALL_XFS = {"TEST_DIR": "/", "TEST_DEV": "/", "QA_CHECK_FS": "1"}


def sectors(mib):
    return mib * 2048


class LinearMap:
    """Of two segments on one disk, and a plain disk to go to."""

    def __init__(self, new_disk="ram1"):
        half = sectors(MIB) // 2
        self.path, self.target = "/dev/mapper/moved", f"/dev/{new_disk}"
        self.old_disk, self.new_disk = "ram0", new_disk
        table = f"0 {half} linear 1:0 0\n{half} {half} linear 1:0 {half + 8192}\n"
        subprocess.run(["dmsetup", "create", "moved"], input=table, text=True, check=True)
        for left in (self.path, self.target):  # by an earlier test
            run("wipefs", "--all", "--quiet", left)

    def lies_on(self):
        numbers = {line.split()[3] for line in run("dmsetup", "table", "moved").splitlines()}
        assert len(numbers) == 1, numbers
        return Path("/sys/dev/block", numbers.pop()).resolve().name

    def check_books(self):
        """Nothing tells where it lies but its table."""

    def remove(self):
        run("dmsetup", "remove", "--retry", "moved")


class LogicalVolume:
    """And another of the same group, on another disk, to go to. Its name has a dash."""

    def __init__(self):
        extents = MIB // 4
        self.path, self.target = "/dev/group/da-ta", "/dev/group/da-ta_new"
        self.old_disk, self.new_disk = "ram2", "ram3"
        run("vgcreate", "-q", "-y", "group", "/dev/ram2", "/dev/ram3")
        run("lvcreate", "-q", "-y", "-n", "da-ta", "-l", extents, "group", "/dev/ram2")
        run("lvcreate", "-q", "-y", "-n", "da-ta_new", "-l", extents, "group", "/dev/ram3")

    def lies_on(self):
        minor = run("dmsetup", "table", self.path).split()[3].split(":")[1]
        return f"ram{minor}"

    def check_books(self):
        """LVM's metadata says where both lie, and its own refresh changes nothing."""
        for path in (self.path, self.target):
            volume = path.removeprefix("/dev/")
            before = run("dmsetup", "table", path)
            disk = run("lvs", "--noheadings", "-o", "devices", volume).strip()
            assert disk.startswith(f"/dev/ram{before.split()[3].split(':')[1]}("), f"{volume}: {disk}; {before}"
            run("lvchange", "--refresh", volume)
            assert run("dmsetup", "table", path) == before

    def remove(self):
        run("vgremove", "-q", "-f", "-y", "group")
        run("pvremove", "-q", "-y", "/dev/ram2", "/dev/ram3")


class MultipathMap:
    """With one path, and another SCSI disk to go to."""

    def __init__(self):
        run("modprobe", "-a", "sd_mod", "dm_round_robin")
        run("modprobe", "scsi_debug", f"dev_size_mb={MIB}", "per_host_store=1", "add_host=2")
        disks = wait_until(lambda: len(names := sorted(disk.name for disk in Path("/sys/block").glob("sd*"))) == 2 and names,
                           what="two disks")
        self.old_disk, self.new_disk = disks
        self.path, self.target = "/dev/mapper/moved", f"/dev/{self.new_disk}"
        number = Path("/sys/block", self.old_disk, "dev").read_text().strip()
        table = f"0 {sectors(MIB)} multipath 0 0 1 1 round-robin 0 1 1 {number} 1\n"
        subprocess.run(["dmsetup", "create", "moved"], input=table, text=True, check=True)

    def lies_on(self):
        table = run("dmsetup", "table", "moved").split()
        return next(disk for disk in (self.old_disk, self.new_disk)
                    if Path("/sys/block", disk, "dev").read_text().strip() in table)

    def check_books(self):
        assert run("dmsetup", "table", "moved").split()[2] == "multipath"

    def remove(self):
        run("dmsetup", "remove", "--retry", "moved")
        wait_until(lambda: subprocess.run(["modprobe", "-r", "scsi_debug"], check=False).returncode == 0, 20, "rmmod")


def linear_map_to_nvme():
    run("modprobe", "nvme")
    disks = wait_until(lambda: list(Path("/sys/block").glob("nvme*")), what="the disk")
    return LinearMap(disks[0].name)


KINDS = {"linear": LinearMap, "nvme": linear_map_to_nvme, "lvm": LogicalVolume, "multipath": MultipathMap}


class Writer:
    """Appends numbered lines, syncs each and counts it as acknowledged then, and rewrites blocks of another file;
    until stopped. The longest that one line took."""

    def __init__(self, mount, random):
        self.log, self.random = Path(mount, "log"), random
        self.acknowledged, self.longest, self.error = 0, 0.0, None
        self.stopped = threading.Event()
        self.scratch = open(Path(mount, "scratch"), "wb", buffering=0)
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self):
        try:
            with open(self.log, "ab", buffering=0) as log:
                while not self.stopped.is_set():
                    begun = time.monotonic()
                    os.pwrite(self.scratch.fileno(), self.random.randbytes(8192), 4096 * self.random.randrange(2000))
                    log.write(b"%d\n" % (self.acknowledged + 1))
                    os.fdatasync(log.fileno())
                    self.acknowledged += 1
                    self.longest = max(self.longest, time.monotonic() - begun)
        except OSError as error:
            self.error = error

    def goes_on(self):
        """Some more lines are acknowledged."""
        seen = self.acknowledged
        wait_until(lambda: self.error or self.acknowledged > seen + 2, 60, "writes going on")
        assert self.error is None, self.error

    def close(self):
        self.stopped.set()
        self.thread.join(120)
        self.scratch.close()

    def stop(self):
        self.close()
        assert not self.thread.is_alive(), "a write hangs"
        assert self.error is None, self.error


class MountedMap:
    """A filesystem on a map, mounted and written to."""

    def __init__(self, kind, filesystem, where, random):
        self.filesystem, self.map, self.mount = filesystem, KINDS[kind](), where
        run(f"mkfs.{filesystem}", "-q", self.map.path, env={**os.environ, **SMALL_XFS})
        where.mkdir()
        run("mount", self.map.path, where)
        self.mounted = True
        self.writer = Writer(where, random)

    def writes_to(self, disk):
        return int(Path("/sys/block", disk, "stat").read_text().split()[6])

    def check_idle(self, disk):
        before = self.writes_to(disk)
        self.writer.goes_on()
        assert self.writes_to(disk) == before, f"{disk} is still written to"

    def suspended(self):
        number = os.stat(self.map.path).st_rdev
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/dm/suspended").read_text().strip() == "1"

    def check_content(self):
        """Stops the writer; what was acknowledged is there, and the filesystem is clean."""
        self.writer.stop()
        run("umount", self.mount)
        self.mounted = False
        check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[self.filesystem]
        run(*check, self.map.path, timeout=300)
        run("mount", self.map.path, self.mount)
        self.mounted = True
        lines = Path(self.mount, "log").read_text().split()
        assert lines[:self.writer.acknowledged] == [str(i + 1) for i in range(self.writer.acknowledged)]
        assert len(lines) <= self.writer.acknowledged + 1

    def close(self):
        self.writer.close()
        if self.mounted:
            run("umount", self.mount)
        self.map.remove()
