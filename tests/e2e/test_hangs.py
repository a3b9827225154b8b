# SPDX-License-Identifier: Apache-2.0
"""Devices that do not answer: a loop device whose backing file lies on a frozen filesystem."""
import os
import signal
import subprocess

import pytest

from harness.compare import assert_same
from harness.volumes import MiB, need, run as command
from harness.waiting import Stopwatch, wait_until

SIZE = 24 * MiB


class Frozen:
    """A filesystem that can be frozen: every write to a file on it waits until it is thawed."""

    def __init__(self, volumes):
        need("mkfs.ext4", "fsfreeze")
        device = volumes.loop(64 * MiB)
        command("mkfs.ext4", "-q", device)
        self.where = volumes.mount(device)
        self.is_frozen = False
        volumes.at_end(self.thaw)

    def freeze(self):
        command("fsfreeze", "--freeze", self.where)
        self.is_frozen = True

    def thaw(self):
        if self.is_frozen:
            command("fsfreeze", "--unfreeze", self.where)
            self.is_frozen = False


@pytest.fixture
def frozen(volumes):
    return Frozen(volumes)


@pytest.fixture
def target(volumes, frozen):
    """A device that hangs on demand."""
    backing = frozen.where / "backing"
    backing.write_bytes(volumes.data(SIZE))
    command("sync", "--file-system", frozen.where)
    return volumes.loop(SIZE, file=backing)


@pytest.fixture
def watchful(ferryds, target, frozen):
    """A ferryd that reports a hang after two seconds. What is frozen is thawed before it must stop."""
    ferryd = ferryds("--stall-warning", "2s")
    yield ferryd
    frozen.thaw()


@pytest.fixture
def hung(watchful, volumes, target, frozen):
    """(run, source) of a run whose writes hang."""
    source = volumes.loop(SIZE, data=True)
    run = watchful.start_clone(source, target, options=["--rate", "8M", "--overwrite"])
    watchful.wait_for(run, lambda shown: shown["bytes_copied"] > 2 * MiB)
    frozen.freeze()
    return run, source


def test_a_hang_is_reported_as_a_warning(watchful, hung, target):
    run, _ = hung
    watch = Stopwatch()
    shown = watchful.wait_for(run, lambda shown: shown["warning"], 6, "the warning")
    assert watch.seconds() < 5
    assert str(target) in shown["warning"]
    assert shown["state"] == "copying"
    assert str(target) in watchful.ctl("show", run).stdout


def test_the_run_goes_on_when_the_device_answers_again(watchful, hung, target, frozen):
    run, source = hung
    watchful.wait_for(run, lambda shown: shown["warning"], 6)
    frozen.thaw()
    watchful.wait_for(run, lambda shown: not shown["warning"], 5)
    watchful.ctl("set", run, "--rate", "0")
    watchful.wait_end(run)
    assert_same(source, target)


def test_cancel_of_a_hung_run_works(watchful, hung, target, frozen):
    run, _ = hung
    watchful.wait_for(run, lambda shown: shown["warning"], 6)
    watch = Stopwatch()
    watchful.ctl("cancel", run)
    watchful.wait_end(run, "cancelled", seconds=3)
    assert watch.seconds() < 3
    frozen.thaw()
    # Once the kernel has let go of it, the device is free again.
    wait_until(lambda: may_be_held(target), 10, "the release of the target")


def may_be_held(device):
    try:
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))
        return True
    except OSError:
        return False


def test_until_the_kernel_lets_go_the_target_of_a_cancelled_run_is_refused(watchful, volumes, hung, target):
    run, _ = hung
    watchful.wait_for(run, lambda shown: shown["warning"], 6)
    watchful.ctl("cancel", run)
    watchful.wait_end(run, "cancelled", seconds=3)
    watchful.ctl("clone", volumes.file(MiB), target, "--overwrite", "--force", expect=4)


def test_a_hung_run_does_not_disturb_others(watchful, volumes, hung):
    watch = Stopwatch()
    source, other = volumes.file(8 * MiB), volumes.path()
    watchful.clone(source, other)
    assert watch.seconds() < 3
    assert_same(source, other)
    watchful.ctl("list")
    assert watch.seconds() < 4


def test_pause_of_a_hung_run_is_answered(watchful, hung):
    run, _ = hung
    watch = Stopwatch()
    watchful.ctl("pause", run)
    assert watch.seconds() < 2


def test_sigterm_while_a_device_hangs_is_followed_as_soon_as_the_kernel_allows(watchful, hung, frozen):
    """The process cannot go before the kernel gives its requests back; it must not wait for more than that."""
    watchful.wait_for(hung[0], lambda shown: shown["warning"], 6)
    watchful.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "leaving without it" in watchful.stderr() or watchful.process.poll() is not None, 15,
               "the end of ferryd's patience")
    frozen.thaw()
    assert watchful.process.wait(10) == 0
    watchful.start()
    watchful.ctl("set", hung[0], "--rate", "0")
    watchful.wait_end(hung[0])


def test_after_kill_9_the_target_is_taken_up_once_the_kernel_lets_go(watchful, hung, target, frozen):
    """The dead process's writes are still on their way: the new one waits instead of refusing or overtaking."""
    run, source = hung
    watchful.wait_for(run, lambda shown: shown["warning"], 6)
    watchful.process.kill()
    try:
        watchful.process.wait(3)
    except subprocess.TimeoutExpired:
        frozen.thaw()  # this kernel keeps the process until its requests are back
        watchful.process.wait(20)
    watchful.start()
    assert watchful.show(run)["state"] in ("queued", "copying")
    frozen.thaw()
    watchful.ctl("set", run, "--rate", "0")
    watchful.wait_end(run)
    assert_same(source, target)
