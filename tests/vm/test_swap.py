# SPDX-License-Identifier: Apache-2.0
"""migrate --handover dm-swap of volumes in use: inside a virtual machine (tests/vm/swap)."""
import json
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

# The long set: so often each filesystem on each kind; without it a few of these.
ROUNDS = range(int(os.environ.get("BLOCKFERRY_SWAP_ROUNDS", 0)))
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


ALL = [(kind, filesystem) for kind in ("linear", "lvm") for filesystem in ("ext4", "xfs")]


def in_rounds(few, all_):
    """The round is part of a test's name, and so of its seed."""
    return [(*each, number) for number in ROUNDS for each in all_] or [(*each, 0) for each in few]


@pytest.mark.parametrize("kind, filesystem, number",
                         in_rounds([("nvme", "ext4"), ("lvm", "xfs")],
                                   [*ALL, ("multipath", "ext4"), ("nvme", "ext4")]))
def test_nobody_notices_the_swap_and_the_way_back(ferryd, in_use, kind, filesystem, number):
    volume = in_use(kind, filesystem)
    check = ferryd.ctl("check", "--handover", "dm-swap", volume.map.path, volume.map.target, "--json").json
    assert check["ok"] and check["handover"] == "dm-swap", check
    swapped = migrate(ferryd, volume)
    assert swapped["swapped"] and swapped["handover"] == "dm-swap", swapped
    assert swapped["verify"]["mismatches"] == 0, json.dumps(swapped)
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

    def __init__(self, ferryd, volume, reached, with_guard):
        self.ferryd, self.volume, self.reached, self.with_guard = ferryd, volume, reached, with_guard
        self.killed, self.suspended = threading.Event(), False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        give_up = time.monotonic() + 200
        while not self.reached():
            if time.monotonic() > give_up:
                return
            time.sleep(0.002)
        self.suspended = self.volume.suspended()
        processes = [self.ferryd.process.pid]
        if self.with_guard:
            # One must not see the other's end. What the guard runs lives on.
            os.kill(processes[0], signal.SIGSTOP)
            processes += guards_of(self.ferryd)
        for process in reversed(processes):
            os.kill(process, signal.SIGKILL)
        self.killed.set()

    def wait(self):
        """Whether the volume was suspended then."""
        self.thread.join(220)
        assert self.killed.is_set(), "it never came so far"
        self.ferryd.kill()
        return self.volume.suspended() if self.with_guard else self.suspended


def read(path):
    """Nothing where it is gone meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def children_of(process):
    tasks = list(Path(f"/proc/{process}/task").glob("*/children"))
    return [int(child) for task in tasks for child in read(task).split()]


def guards_of(ferryd):
    return [child for child in children_of(ferryd.process.pid) if "guard" in read(Path(f"/proc/{child}/comm"))]


def lvm_runs(ferryd):
    """The guard has LVM's metadata changed."""
    return any("vgcfgrestore" in read(Path(f"/proc/{child}/cmdline"))
               for guard in guards_of(ferryd) for child in children_of(guard))


class After:
    """`reached()`, and then `later` seconds."""

    def __init__(self, reached, later):
        self.reached, self.later, self.since = reached, later, None

    def __call__(self):
        if self.since is None and self.reached():
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() >= self.since + self.later


class Resumed:
    """After it was suspended it is not any more."""

    def __init__(self, volume):
        self.volume, self.seen = volume, False

    def __call__(self):
        suspended = self.volume.suspended()
        self.seen = self.seen or suspended
        return self.seen and not suspended


# "both": ferryd and its guard. "metadata": while LVM's is changed.
STEPS = {"there": ["copying", "verifying"], "back": ["tracking"]}
IN_THE_PAUSE = ["suspended", "suspended-both", "metadata", "metadata-both", "resumed"]


def steps_of(kind, way):
    return STEPS[way] + [each for each in IN_THE_PAUSE if kind == "lvm" or "metadata" not in each]


def reached(name, ferryd, volume, later):
    """What to wait for."""
    if name in ("copying", "verifying", "tracking"):
        return lambda: ferryd.request("GET", "/v1/runs/move")[1].get("state") == name
    if "metadata" in name:
        return After(lambda: lvm_runs(ferryd), later / 4)
    return After(Resumed(volume) if name == "resumed" else volume.suspended, later)


def kill_at(ferryd, volume, way, name, later):
    """Whether the step was reached: it may be over `later`."""
    both = name.endswith("both")
    killer = Killer(ferryd, volume, reached(name, ferryd, volume, later), both)
    verify = () if name == "verifying" else ("--no-verify",)
    process = ferryd.spawn_ctl(*(("migrate", *OPTIONS, *verify, "--overwrite", volume.map.path, volume.map.target)
                                 if way == "there" else ("rollback", "move")))
    suspended = killer.wait()
    process.kill()
    process.communicate()
    wait_until(lambda: both or not volume.suspended(), 60, "the guard letting go")
    begun = time.monotonic()
    ferryd.start(60)
    wait_until(lambda: not volume.suspended(), 10, "the volume going on")
    print(f"killed at {name}, {later:.3f} s later: {'' if suspended else 'not '}suspended; "
          f"not so any more {time.monotonic() - begun:.2f} s after the start of another ferryd")
    return suspended or name not in ("suspended", *filter(lambda each: each.endswith("both"), IN_THE_PAUSE))


@pytest.mark.parametrize("kind, filesystem, way, name, number",
                         in_rounds([("lvm", "ext4", way, "any step") for way in ("there", "back")],
                                   [(kind, filesystem, way, name) for kind, filesystem in ALL
                                    for way in ("there", "back") for name in steps_of(kind, way)]))
def test_killed_at_every_step(ferryd, in_use, seed, kind, filesystem, way, name, number):
    """The volume lies on one of its disks, goes on within the limit, and the next ferryd knows on which."""
    chance = random.Random(seed)
    volume = in_use(kind, filesystem)
    if name == "any step":
        name = chance.choice(steps_of(kind, way))
    later, done = chance.uniform(0, 0.3), False
    while not done:
        start_from(ferryd, volume, way)
        done = kill_at(ferryd, volume, way, name, later)
        volume.writer.goes_on()
        finish(ferryd, volume, way)
        later /= 2
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
        ferryd.ctl("rollback", "move", expect=None, timeout=300)  # it may be coming there by itself
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
