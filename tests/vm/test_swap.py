# SPDX-License-Identifier: Apache-2.0
"""migrate --handover dm-swap of volumes in use: inside a virtual machine (tests/vm/swap)."""
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness.volumes import run
from harness.waiting import wait_until
from maps import MountedMap

ROUNDS = int(os.environ.get("BLOCKFERRY_SWAP_ROUNDS", 1))
MAX_FREEZE = "60s"  # everything is emulated
OPTIONS = ("--max-freeze", MAX_FREEZE, "--max-downtime", "20s", "--name", "move")


@pytest.fixture
def in_use(ferryds, tmp_path, seed):
    """Makes one; removed after the ferryds have ended."""
    made = []

    def make(kind, filesystem):
        made.append(MountedMap(kind, filesystem, tmp_path / f"mount{len(made)}", random.Random(seed)))
        return made[-1]

    yield make
    for ferryd in ferryds.made:
        ferryd.close()
    ferryds.made.clear()
    left = [line.split()[0] for line in run("dmsetup", "ls").splitlines() if line.startswith("blockferry")]
    for name in left:
        run("dmsetup", "remove", name)
    for each in made:
        each.close()
    assert not left, "a ferryd left maps behind"


def migrate(ferryd, volume, *options):
    return ferryd.ctl("migrate", *OPTIONS, *options, volume.map.path, volume.map.target, "--json", timeout=300).json


@pytest.mark.parametrize("kind, filesystem", [("linear", "ext4"), ("lvm", "xfs")] if ROUNDS == 1 else
                         [*((kind, filesystem) for kind in ("linear", "lvm") for filesystem in ("ext4", "xfs")),
                          ("multipath", "ext4")] * ROUNDS)
def test_nobody_notices_the_swap_and_the_way_back(ferryd, in_use, kind, filesystem):
    volume = in_use(kind, filesystem)
    check = ferryd.ctl("check", "--handover", "dm-swap", volume.map.path, volume.map.target, "--json").json
    assert check["ok"] and check["handover"] == "dm-swap", check
    swapped = migrate(ferryd, volume)
    assert swapped["swapped"] and swapped["handover"] == "dm-swap" and swapped["verify"]["mismatches"] == 0, swapped
    assert volume.map.lies_on() == volume.map.new_disk
    volume.map.check_books()
    volume.writer.goes_on()
    back = ferryd.ctl("rollback", "move", "--json", timeout=300).json
    assert back["state"] == "rolled-back" and not back["swapped"], back
    assert volume.map.lies_on() == volume.map.old_disk
    volume.map.check_books()
    volume.check_idle(volume.map.new_disk)
    print(f"pauses: {swapped['pause']}, {back['pause']}; longest write {volume.writer.longest:.2f} s")
    # And there for good.
    migrate(ferryd, volume, "--overwrite", "--no-verify")
    assert ferryd.ctl("commit", "move", "--json").json["state"] == "completed"
    volume.check_idle(volume.map.old_disk)
    volume.check_content()
    volume.map.check_books()


class Killer:
    """Kills ferryd, and its guard too where that is asked for, as soon as `reached()`."""

    def __init__(self, ferryd, reached, with_guard):
        self.ferryd, self.reached, self.with_guard = ferryd, reached, with_guard
        self.killed = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        give_up = time.monotonic() + 200
        while not self.reached():
            if time.monotonic() > give_up:
                return
            time.sleep(0.002)
        processes = [self.ferryd.process.pid]
        if self.with_guard:
            processes += children_of(self.ferryd.process.pid)
        for process in reversed(processes):
            os.kill(process, signal.SIGKILL)
        self.killed.set()

    def wait(self):
        self.thread.join(220)
        assert self.killed.is_set(), "it never came so far"
        self.ferryd.kill()


def read(path):
    """Nothing where it is gone meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def children_of(process):
    tasks = list(Path(f"/proc/{process}/task").glob("*/children"))
    return [int(child) for task in tasks for child in read(task).split()]


def lvm_runs(ferryd):
    """The guard has LVM's metadata changed."""
    return any("vgcfgrestore" in read(Path(f"/proc/{child}/cmdline")) for guard in children_of(ferryd.process.pid)
               if "guard" in read(Path(f"/proc/{guard}/comm")) for child in children_of(guard))


class Once:
    """After it was suspended, `later` seconds on, or not suspended any more."""

    def __init__(self, volume, resumed=False, later=0.0):
        self.volume, self.resumed, self.later, self.since = volume, resumed, later, None

    def __call__(self):
        if self.since is None and self.volume.suspended():
            self.since = time.monotonic()
        if self.since is None or time.monotonic() < self.since + self.later:
            return False
        return not self.resumed or not self.volume.suspended()


STEPS = ["copying", "verifying", "suspended", "suspended-both", "metadata", "resumed"]


def step(name, ferryd, volume, chance):
    """What to wait for."""
    if name in ("copying", "verifying"):
        return lambda: ferryd.request("GET", "/v1/runs/move")[1].get("state") == name
    if name == "metadata":
        return lambda: lvm_runs(ferryd)
    return Once(volume, name == "resumed", 0.0 if name == "resumed" else chance.uniform(0, 0.3))


@pytest.mark.parametrize("way", ["there", "back"])
def test_killed_at_every_step(ferryd, in_use, seed, way):
    """The volume lies on one of its disks, goes on within the limit, and the next ferryd knows on which."""
    chance = random.Random(seed)
    volume = in_use("lvm", "ext4")
    steps = [each for each in STEPS if way == "there" or each not in ("copying", "verifying")]
    for name in [chance.choice(steps)] if ROUNDS == 1 else steps * ROUNDS:
        print(name)
        start_from(ferryd, volume, way)
        killer = Killer(ferryd, step(name, ferryd, volume, chance), name.endswith("both"))
        verify = () if name == "verifying" else ("--no-verify",)
        process = ferryd.spawn_ctl(*(("migrate", *OPTIONS, *verify, "--overwrite", volume.map.path, volume.map.target)
                                     if way == "there" else ("rollback", "move")))
        killer.wait()
        process.kill()
        process.communicate()
        wait_until(lambda: name.endswith("both") or not volume.suspended(), 60, "the guard letting go")
        ferryd.start(60)
        wait_until(lambda: not volume.suspended(), 90, "the volume going on")
        volume.writer.goes_on()
        finish(ferryd, volume, way)
    volume.check_content()


def start_from(ferryd, volume, way):
    if way == "there":
        return
    migrate(ferryd, volume, "--overwrite", "--no-verify")
    volume.writer.goes_on()


def finish(ferryd, volume, way):
    """The run comes to its end by itself or is asked once more, and all that tells where the volume lies is true."""
    if way == "there":
        ferryd.wait_for("move", lambda shown: shown["swapped"], 200, "the swap")
        assert volume.map.lies_on() == volume.map.new_disk
        volume.map.check_books()
    shown = ferryd.show("move")
    if shown["state"] != "rolled-back":
        ferryd.ctl("rollback", "move", timeout=300)
    ferryd.wait_state("move", "rolled-back", seconds=60)
    assert volume.map.lies_on() == volume.map.old_disk
    volume.map.check_books()
    volume.writer.goes_on()


def test_ferryd_that_hangs_does_not_keep_it_suspended(ferryd, in_use):
    volume = in_use("linear", "ext4")
    process = ferryd.spawn_ctl("migrate", "--max-freeze", "3s", "--max-downtime", "20s", "--no-verify", "--overwrite",
                               volume.map.path, volume.map.target)
    wait_until(lambda: volume.suspended() or process.poll() is not None, 60, "the suspension")
    assert process.poll() is None, process.communicate()
    ferryd.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not volume.suspended(), 30, "the guard letting go")
        assert volume.map.lies_on() in (volume.map.old_disk, volume.map.new_disk)
        volume.writer.goes_on()
    finally:
        ferryd.process.send_signal(signal.SIGCONT)
    process.communicate(timeout=300)
    volume.check_content()


def test_what_cannot_be_swapped_is_refused_with_the_reason(ferryd, in_use):
    volume = in_use("lvm", "ext4")

    def refused(source, target, words, *options):
        error = ferryd.ctl("migrate", "--handover", "dm-swap", *options, source, target, expect=4).error
        assert words in error, error

    refused(volume.map.path, "/dev/ram1", "vgextend group")
    refused("/dev/ram0", "/dev/ram1", "no device-mapper volume")
    subprocess.run(["cryptsetup", "open", "--type", "plain", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256",
                    volume.map.target, "secret"], input="x", text=True, check=True)
    try:
        refused("/dev/mapper/secret", "/dev/ram1", "name the volume below it, /dev/mapper/group-da--ta_new")
    finally:
        run("cryptsetup", "close", "secret")
