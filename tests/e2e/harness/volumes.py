# SPDX-License-Identifier: Apache-2.0
"""Volumes for tests: files, sparse files, loop and zram devices. All are given back by close()."""
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from harness.waiting import wait_until

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB


def run(*command, check=True, timeout=60, **options):
    """A command's output; fails with its stderr."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout,
                          **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def need(*commands):
    """Skips the test where a command is missing."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def need_root():
    if os.geteuid() != 0:
        pytest.skip("needs root")


def need_loop():
    need_root()
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("this machine has no loop devices")


class Loop:
    """A loop device; `file` is its backing file."""

    def __init__(self, path, file):
        self.path = path
        self.file = Path(file)

    def __fspath__(self):
        return self.path

    def __str__(self):
        return self.path

    @property
    def name(self):
        return os.path.basename(self.path)

    def sysfs(self, attribute):
        return Path("/sys/block", self.name, attribute)

    def bytes_written(self):
        """What the kernel has counted as written to the device since it was attached."""
        return int(self.sysfs("stat").read_text().split()[6]) * 512

    def bytes_read(self):
        return int(self.sysfs("stat").read_text().split()[2]) * 512


def is_mounted(where):
    """Unlike os.path.ismount, also of a filesystem that was shut down and answers nothing but errors."""
    return any(line.split()[1] == str(where) for line in Path("/proc/self/mounts").read_text().splitlines())


class Volumes:
    def __init__(self, seed):
        self.random = random.Random(seed)
        # RAM-backed: quiet and quick. Readable by others, so that tests of access fail for the right reason.
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="blockferry-e2e-", dir=base))
        self.directory.chmod(0o755)
        self._undo = []
        self._count = 0

    def close(self):
        """Undoes everything, newest first; goes on after a failure and reports the first."""
        first = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:  # the rest must be undone whatever went wrong
                first = first or error
        shutil.rmtree(self.directory, ignore_errors=True)
        if first:
            raise first

    def at_end(self, action):
        self._undo.append(action)

    def path(self, name="volume"):
        """A fresh path where nothing is yet."""
        self._count += 1
        return self.directory / f"{name}-{self._count}"

    def data(self, size):
        return b"".join(self.random.randbytes(min(MiB, size - at)) for at in range(0, size, MiB))

    def file(self, size, data=True, name="file"):
        """A file of random data, or (data=False) a hole of that size."""
        path = self.path(name)
        with open(path, "wb") as out:
            if data:
                for at in range(0, size, MiB):
                    out.write(self.random.randbytes(min(MiB, size - at)))
            out.truncate(size)
        return path

    def sparse(self, size, extents, name="sparse"):
        """A sparse file with random data at extents of (offset, bytes)."""
        path = self.file(size, data=False, name=name)
        for offset, length in extents:
            self.write(path, offset, self.data(length))
        return path

    def write(self, target, offset, data):
        """Writes behind everybody's back, durably and past the page cache of a block device."""
        with open(target, "r+b", buffering=0) as out:
            out.seek(offset)
            view = memoryview(data)
            while view:
                view = view[out.write(view):]
            os.fsync(out.fileno())
        if not isinstance(target, Path):
            run("blockdev", "--flushbufs", target)

    def loop(self, size, data=False, sector=512, read_only=False, file=None, partitions=False):
        """A loop device of that size; `file` puts it on a file that is there already."""
        need_loop()
        file = self.file(size, data=data, name="loop") if file is None else file
        command = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", sector]
        command += ["--read-only"] if read_only else []
        command += ["--partscan"] if partitions else []

        def attach():  # --find races with everybody else who attaches
            done = subprocess.run([str(word) for word in (*command, file)], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
            if "Invalid argument" in done.stderr and "--direct-io=on" in command:
                command.remove("--direct-io=on")  # of older kernels, whose tmpfs cannot be read past the cache
                return None
            assert "busy" in done.stderr, done.stderr
            return None

        loop = Loop(wait_until(attach, what="a free loop device"), file)
        self.at_end(lambda: self.detach(loop))
        return loop

    def detach(self, loop):
        """Detaches and waits for it; a loop that was detached already is left alone."""
        backing = loop.sysfs("loop/backing_file")

        def ours():
            try:
                return backing.read_text().strip().removesuffix(" (deleted)") == str(loop.file)
            except OSError:
                return False

        if ours():
            run("losetup", "--detach", loop)
            wait_until(lambda: not ours(), what=f"the end of {loop}")

    def reattach(self, loop, file):
        """Puts another file behind the same name."""
        def attach():  # who looks for a free loop device may have got this one: then when it is given back
            if loop.sysfs("loop/backing_file").exists():
                return False
            command = ["losetup", "--direct-io=on", str(loop), str(file)]
            return subprocess.run(command, capture_output=True).returncode == 0

        self.detach(loop)
        wait_until(attach, 60, f"{loop} to be free")
        loop.file = file

    def zram(self, size):
        """A zram device: bio-based, which loop devices are not."""
        need_root()
        control = Path("/sys/class/zram-control/hot_add")
        if not control.exists():
            pytest.skip("this machine has no zram")
        number = int(control.read_text())
        self.at_end(lambda: Path("/sys/class/zram-control/hot_remove").write_text(str(number)))
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        return f"/dev/zram{number}"

    def mount(self, device, kind=None, options=None):
        """Mounts it on a directory of its own, unmounted at the end."""
        where = self.path("mnt")
        where.mkdir()
        command = ["mount"] + (["-t", kind] if kind else []) + (["-o", options] if options else [])
        run(*command, device, where)
        self.at_end(lambda: is_mounted(where) and run("umount", where))
        return where
