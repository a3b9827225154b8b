# SPDX-License-Identifier: Apache-2.0
"""Volumes in use: filesystems on every kind of device, mixed load on them, and proof at the moment of the cutover."""
import os
import random
import subprocess
import threading
import time
from pathlib import Path

from harness.volumes import MiB, need, need_root, run
from harness.waiting import wait_until

SIZE = 320 * MiB  # the smallest that mkfs.xfs takes, and some
KINDS = ("loop512", "loop4096", "partition", "disk", "zram")
FILESYSTEMS = ("ext4", "xfs", "btrfs")

# Run while the source is still: it is read past the page cache, which does not see what a filesystem writes.
COMPARE = ('size=$(blockdev --getsize64 "$BLOCKFERRY_SOURCE"); dd if="$BLOCKFERRY_SOURCE" bs=1M iflag=direct status=none'
           ' | cmp --bytes=$size - "$BLOCKFERRY_TARGET"')


class LiveVolume:
    """A source of some kind (or a device that is there, by its path), a filesystem on it (or on its partition), mounted,
    and a target for it."""

    def __init__(self, volumes, kind, filesystem, options=None, size=SIZE):
        need_root()
        need("fio", f"mkfs.{filesystem}")
        self.volumes, self.filesystem = volumes, filesystem
        self.offset = 0  # of the filesystem on the target
        self.part = None
        sector = 4096 if kind == "loop4096" else 512
        if kind.startswith("/dev/"):
            self.source = self.device = kind
        elif kind == "zram":
            self.source = self.device = volumes.zram(size)
        elif kind in ("partition", "disk"):
            disk = volumes.loop(size + 2 * MiB, partitions=True)
            subprocess.run(["sfdisk", "-q", str(disk)], input=f"start=1MiB, size={size // MiB}MiB\n", text=True,
                           check=True, capture_output=True)
            run("partx", "--update", disk)
            self.device = f"{disk}p1"
            wait_until(lambda: os.path.exists(self.device), what=self.device)
            self.source = self.device if kind == "partition" else str(disk)
            self.offset = MiB if kind == "disk" else 0
        else:
            self.source = self.device = str(volumes.loop(size, sector=sector))
        bytes_total = int(run("blockdev", "--getsize64", self.source))
        self.target = volumes.loop(bytes_total, sector=sector, data=False)
        run(f"mkfs.{filesystem}", "-q" if filesystem != "btrfs" else "--quiet",
            "-F" if filesystem == "ext4" else "-f", self.device)
        self.mount = volumes.mount(self.device, filesystem, options)

    def filesystem_on_target(self):
        if not self.offset:
            return str(self.target)
        if not self.part:
            self.part = run("losetup", "--find", "--show", "--offset", self.offset, self.target.file).strip()
            self.volumes.at_end(lambda: self.part and run("losetup", "--detach", self.part, check=False))
        return self.part

    def check_target(self):
        """The target's filesystem is clean."""
        target = self.filesystem_on_target()
        run("blockdev", "--flushbufs", target)
        if self.filesystem == "xfs":  # whose log is replayed by mounting only
            where = self.volumes.path("replay")
            where.mkdir()
            run("mount", "-t", "xfs", "-o", "nouuid", target, where)
            run("umount", where)
        check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"],
                 "btrfs": ["btrfs", "check", "--readonly"]}[self.filesystem]
        run(*check, target, timeout=120)
        if self.part:  # which holds the target
            run("losetup", "--detach", self.part)
            self.part = None


class Load:
    """Writes of every kind at once, until stopped: buffered, direct at depth, mapped, with fsync, truncates, deletes
    and, if asked for, fstrim."""

    def __init__(self, mount, seed, direct_rate="40m", only_files=False, trims=False):
        self.mount, self.random = Path(mount), random.Random(seed)
        self.stopped = threading.Event()
        self.errors = []
        self.trims, self.trim_lock = trims, threading.Lock()
        self.fio = None if only_files else self._start_fio(seed, direct_rate)
        self.thread = threading.Thread(target=self._files)
        self.thread.start()
        time.sleep(0.5)  # the load itself, not a wait for an event

    def _start_fio(self, seed, direct_rate):
        jobs = self.mount / ".load.fio"
        jobs.write_text(f"""[global]
directory={self.mount}
thread
time_based
runtime=600
randseed={seed}
size=24m
rate={direct_rate}
[direct]
ioengine=libaio
iodepth=16
direct=1
rw=randwrite
bsrange=4k-64k
[buffered]
ioengine=psync
rw=randwrite
bs=4k
fsync=64
[mapped]
ioengine=mmap
rw=randwrite
bs=4k
[trims]
ioengine=psync
rw=randwrite
bs=8k
fallocate=none
unlink_each_loop=1
""")
        return subprocess.Popen(["fio", "--output=/dev/null", str(jobs)], stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    def _files(self):
        try:
            while not self.stopped.is_set():
                self._one_round()
        except Exception as error:  # told by stop()
            self.errors.append(error)

    def _one_round(self):
        path = self.mount / f"file{self.random.randrange(40)}"
        action = self.random.randrange(5)
        if action <= 1:
            with open(path, "ab") as file:
                file.write(self.random.randbytes(self.random.randrange(1, 200000)))
                if action:
                    os.fsync(file.fileno())
        elif path.exists() and action == 2:
            os.truncate(path, self.random.randrange(path.stat().st_size + 1))
        elif path.exists() and action == 3:
            path.unlink()
        elif self.random.randrange(20) == 0:
            with self.trim_lock:
                if self.trims:
                    run("fstrim", self.mount, check=False)
        self.stopped.wait(0.002)

    def end_trims(self):
        """fstrim goes on where a filesystem is frozen: what is free would differ between the source and its copy."""
        with self.trim_lock:
            self.trims = False

    def stop(self):
        self.stopped.set()
        self.thread.join(60)
        if self.fio:
            self.fio.terminate()
            self.fio.wait(60)
        if self.errors:
            raise self.errors[0]


class Loaded:
    """`with Loaded(volume, seed)`: under load."""

    def __init__(self, volume, seed, **options):
        self.volume, self.seed, self.options = volume, seed, options

    def __enter__(self):
        self.load = Load(self.volume.mount, self.seed, **self.options)
        return self.load

    def __exit__(self, *_):
        self.load.stop()


class Probe:
    """What an application notices: appends and fsyncs on the volume without end; the longest that one took."""

    def __init__(self, mount):
        self.path = Path(mount, ".probe")
        self.longest, self.usual = 0.0, []
        self.begun = time.monotonic()  # of the append under way
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._append)
        self.thread.start()

    def _append(self):
        with open(self.path, "ab", buffering=0) as file:
            while not self.stopped.is_set():
                self.begun = time.monotonic()
                file.write(b"x" * 64)
                os.fsync(file.fileno())
                took = time.monotonic() - self.begun
                self.longest = max(self.longest, took)
                self.usual.append(took)
                self.stopped.wait(0.001)

    def waits(self):
        """For how long the append under way has been waiting."""
        return time.monotonic() - self.begun

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join(60)
