# SPDX-License-Identifier: Apache-2.0
"""The power fails while a volume in use is copied: the target and the file system that ferryd's state lies on were one
disk, of which each moment is played back that a flush made durable. ferryd goes on from there, and at the cutover the
copy is the source, byte by byte."""
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
from harness.live import COMPARE
from harness.volumes import MiB, run
from log_writes import Log

# How many of the flushes are tried; 0: all, for the long set.
FLUSHES = int(os.environ.get("BLOCKFERRY_FLUSHES", 3))
SOURCE, LOGGED, LOG, PLAYED = "/dev/ram0", "/dev/ram1", "/dev/ram2", "/dev/ram3"
TARGET_BYTES, STATE_BYTES = 32 * MiB, 48 * MiB
# The disk's own halves have names of their own, whatever lies below: ferryd knows them again.
TARGET, STATE = "power-target", "power-state"


def sectors(count):
    return count // 512


def load(name, disk, offset, count, verb="create"):
    subprocess.run(["dmsetup", verb, name], input=f"0 {sectors(count)} linear {disk} {sectors(offset)}\n", text=True,
                   check=True)


def lay_on(disk, verb="create"):
    load(TARGET, disk, 0, TARGET_BYTES, verb)
    load(STATE, disk, TARGET_BYTES, STATE_BYTES, verb)
    if verb == "reload":
        run("dmsetup", "resume", TARGET)
        run("dmsetup", "resume", STATE)


@pytest.fixture
def logged_disk():
    """What is written to it stands in LOG."""
    run("dmsetup", "create", "logged", "--table",
        f"0 {sectors(TARGET_BYTES + STATE_BYTES)} log-writes {LOGGED} {LOG}")
    run("dd", "if=/dev/zero", f"of={LOGGED}", "bs=1M", f"count={(TARGET_BYTES + STATE_BYTES) // MiB}", "oflag=direct")
    run("dmsetup", "create", "source", "--table", f"0 {sectors(TARGET_BYTES)} linear {SOURCE} 0")
    lay_on("/dev/mapper/logged")
    yield
    for name in (TARGET, STATE, "source", "logged"):
        subprocess.run(["dmsetup", "remove", "--retry", name], check=False)


def mark(name):
    run("dmsetup", "message", "logged", "0", "mark", name)


class Toggler:
    """Writes either of two contents to the blocks of a file, so that they are soon again what they were; until it is
    left."""

    def __init__(self, file, chance):
        self.file, self.chance, self.stopped = file, chance, threading.Event()
        self.contents = [bytes([each]) * 4096 for each in (0x55, 0xaa)]
        self.written = 0
        self.file.write_bytes(self.contents[0] * 2048)
        self.thread = threading.Thread(target=self._write)

    def _write(self):
        with open(self.file, "r+b", buffering=0) as file:
            while not self.stopped.is_set():
                os.pwrite(file.fileno(), self.chance.choice(self.contents), 4096 * self.chance.randrange(2048))
                if self.written % 20 == 0:
                    os.fdatasync(file.fileno())
                self.written += 1

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join(60)


def test_every_flush_is_a_place_to_go_on_from(ferryds, tmp_path, seed, logged_disk):
    chance = random.Random(seed)
    where, state = tmp_path / "source", tmp_path / "state"
    run("mkfs.ext4", "-q", "/dev/mapper/source")
    run("mkfs.ext4", "-q", "-E", "nodiscard", f"/dev/mapper/{STATE}")
    for device, directory in (("/dev/mapper/source", where), (f"/dev/mapper/{STATE}", state)):
        directory.mkdir()
        run("mount", device, directory)
    try:
        record(ferryds, where, state, chance)
        log = Log(LOG)
        flushes = log.after_flushes("begun", "ended")
        chosen = sorted(chance.sample(flushes, min(FLUSHES or len(flushes), len(flushes))))
        print(f"{len(log.entries)} writes and {len(flushes)} flushes; tried: {chosen}")
        assert len(flushes) > 10
        # The disk as it was at the last one, from which each is made.
        before, image = 0, tmp_path / "image"
        image.write_bytes(bytes(TARGET_BYTES + STATE_BYTES))
        outcomes = []
        for number in chosen:
            log.play(image, before, number)
            before = number
            outcomes.append(go_on_from(ferryds, image, state))
        print(f"{sum(outcomes)} held a run that had begun, which went on")
        assert FLUSHES or sum(outcomes) > 5, "it never came so far"
    finally:
        run("umount", where)
        subprocess.run(["umount", state], check=False)


def record(ferryds, where, state, chance):
    """A copy under load, of which all stands in the log."""
    ferryd = ferryds(state_dir=state / "ferryd")
    run("sync", "-f", state)
    mark("begun")
    with Toggler(where / "file", chance) as toggler:
        ferryd.ctl("clone", "--name", "copy", "--detach", "--cutover", "manual", "--max-freeze", "60s",
                   "--cutover-cmd", COMPARE, "/dev/mapper/source", f"/dev/mapper/{TARGET}")
        ferryd.wait_for("copy", lambda shown: shown["state"] == "tracking" and len(shown["passes"]) >= 6, 60, "passes")
        assert toggler.written > 100
    mark("ended")
    ferryd.kill()
    ferryds.made.remove(ferryd)
    ferryd.remove_pins()
    run("sync", "-f", where)
    run("umount", state)


def go_on_from(ferryds, image, state):
    """With the source as it is at last, and the other disk as in this image. Whether it holds a run that had begun."""
    run("dd", f"if={image}", f"of={PLAYED}", "bs=1M", "oflag=direct", "conv=notrunc")
    run("blockdev", "--flushbufs", PLAYED)
    lay_on(PLAYED, "reload")
    run("mount", f"/dev/mapper/{STATE}", state)
    ferryd = None
    try:
        ferryd = ferryds(state_dir=state / "ferryd")
        runs = ferryd.request("GET", "/v1/runs")[1]
        if not runs:
            return False
        ferryd.wait_for("copy", lambda shown: shown["state"] == "tracking", 60, "tracking")
        ferryd.ctl("cutover", "copy")
        shown = ferryd.wait_end("copy")
        assert shown["verify"]["mismatches"] == 0 and shown["restarts"] <= 1, shown
        return shown["restarts"] == 1
    finally:
        if ferryd is not None:
            ferryd.close()
            ferryds.made.remove(ferryd)
        run("umount", state)
