# SPDX-License-Identifier: Apache-2.0
"""Measuring: RAM-backed volumes, a ferryd of the benchmark's own, wall and CPU seconds of commands."""
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

MiB = 1 << 20
GiB = 1 << 30
TICK = os.sysconf("SC_CLK_TCK")


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Sample:
    """One measured command."""

    def __init__(self, wall_seconds, cpu_seconds):
        self.wall_seconds, self.cpu_seconds = wall_seconds, cpu_seconds

    def __add__(self, other):
        return Sample(self.wall_seconds + other.wall_seconds, self.cpu_seconds + other.cpu_seconds)


def measure(*command):
    """Wall seconds, and the CPU seconds of the process with all its threads and children."""
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {process.returncode}: {complaint.decode().strip()}")
    return Sample(time.monotonic() - started, usage.ru_utime + usage.ru_stime)


class Samples:
    def __init__(self):
        self.all = []

    def add(self, sample):
        self.all.append(sample)

    @property
    def wall_seconds(self):
        return statistics.median(sample.wall_seconds for sample in self.all)

    @property
    def cpu_seconds(self):
        return statistics.median(sample.cpu_seconds for sample in self.all)


class Workshop:
    """A scratch directory in RAM, loop devices on its files, and ferryds; all given back by close()."""

    def __init__(self, programs, state_base):
        self.programs = Path(programs)
        self.directory = Path(tempfile.mkdtemp(prefix="blockferry-bench-", dir="/dev/shm"))
        self.state = Path(tempfile.mkdtemp(prefix="blockferry-bench-", dir=state_base))
        self.loops = []
        self.ferryds = []

    def close(self):
        for ferryd in list(self.ferryds):
            ferryd.stop()
        for loop in list(self.loops):
            self.detach(loop)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def path(self, name):
        return self.directory / name

    def random_file(self, name, size):
        path = self.path(name)
        with open(path, "wb") as out:
            for at in range(0, size, 16 * MiB):
                out.write(os.urandom(min(16 * MiB, size - at)))
        return path

    def sparse_file(self, name, size, extents):
        path = self.path(name)
        with open(path, "wb") as out:
            out.truncate(size)
            for offset, length in extents:
                out.seek(offset)
                out.write(os.urandom(length))
        return path

    def loop(self, file):
        device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
        self.loops.append(device)
        return device

    def detach(self, loop):
        run("losetup", "--detach", loop)
        self.loops.remove(loop)

    def device_pair(self, size):
        """(source, target): random data, and as many other random bytes, so that no page is yet to be allocated."""
        return self.loop(self.random_file("source", size)), self.loop(self.random_file("target", size))

    def drop_pair(self, pair):
        for device in pair:
            self.detach(device)
        for name in ("source", "target"):
            self.path(name).unlink()

    def ferryd(self, *options):
        made = Ferryd(self, *options)
        self.ferryds.append(made)
        return made


def settle(*devices):
    """Gives the devices' page cache back, which peers without O_DIRECT fill."""
    for device in devices:
        if str(device).startswith("/dev/loop"):
            run("blockdev", "--flushbufs", device)


class Ferryd:
    def __init__(self, workshop, *options):
        self.workshop = workshop
        self.directory = Path(tempfile.mkdtemp(prefix="ferryd-", dir=workshop.state))
        self.socket = self.directory / "socket"
        self.process = subprocess.Popen(
            [workshop.programs / "ferryd", "--state-dir", self.directory / "state", "--socket", self.socket,
             "--metrics-listen", "none", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(self.directory / "log", "wb"))
        limit = time.monotonic() + 20
        while subprocess.run(self.command("list"), capture_output=True).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError("ferryd did not start: " + (self.directory / "log").read_text())
            time.sleep(0.01)

    def command(self, *words):
        return [self.workshop.programs / "ferryctl", "--socket", self.socket, *words]

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def measure(self, *words):
        """A ferryctl command: its own CPU seconds and ferryd's together."""
        before = self.cpu_seconds()
        sample = measure(*self.command(*words))
        sample.cpu_seconds += self.cpu_seconds() - before
        return sample

    def json(self, *words):
        return json.loads(run(*self.command(*words, "--json")))

    def forget_all(self):
        for shown in self.json("list"):
            run(*self.command("forget", shown["id"]))

    def resident_bytes_max(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no VmHWM")

    def state_bytes(self):
        return int(run("du", "--summarize", "--block-size=1", self.directory / "state").split()[0])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.workshop.ferryds.remove(self)


def change(device, size, share, run_bytes, seed):
    """Overwrites a share of the device with new random data, in runs of run_bytes at random places."""
    places = random.Random(seed).sample(range(size // run_bytes), max(1, int(size * share / run_bytes)))
    file = os.open(device, os.O_WRONLY)
    try:
        for place in places:
            os.pwrite(file, os.urandom(run_bytes), place * run_bytes)
        os.fsync(file)
    finally:
        os.close(file)
    settle(device)


def table(headings, rows):
    """Lines of aligned columns, the first to the left."""
    cells = [headings, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return "\n".join("  " + "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                                      for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
                     for row in cells)
