# SPDX-License-Identifier: Apache-2.0
"""Preflight refuses what somebody uses: mounts, swap, holders, openers and other runs."""
import fcntl
import os
import subprocess
from contextlib import contextmanager

import pytest

from harness.compare import assert_same
from harness.refusals import assert_refused
from harness.volumes import MiB, need, run

SIZE = 24 * MiB
ANYHOW = ["--overwrite", "--force"]


def filesystem(volumes, **options):
    need("mkfs.ext4")
    device = volumes.loop(SIZE, **options)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    return device


@pytest.fixture
def mounted(volumes):
    """A device with a mounted filesystem, quiet, so that its content does not change by itself."""
    device = filesystem(volumes)
    where = volumes.mount(device)
    (where / "file").write_bytes(volumes.data(MiB))
    for action in ("--freeze", "--unfreeze"):  # upon which the journal holds nothing back
        run("fsfreeze", action, where)
    return device


@contextmanager
def opened(path, flags):
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", [["--overwrite"], ANYHOW])
def test_a_mounted_target(ferryd, volumes, mounted, options):
    assert_refused(ferryd, volumes.file(MiB), mounted, options=options, says="mounted")


def test_a_target_mounted_in_another_mount_namespace(ferryd, volumes):
    """Mounted where this process cannot see it, as in a container."""
    device, where = filesystem(volumes), volumes.path("elsewhere")
    where.mkdir()
    inside = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"mount {device} {where} && echo up && cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    volumes.at_end(lambda: (inside.stdin.close(), inside.wait(30)))
    assert inside.stdout.readline() == "up\n"
    assert not os.path.ismount(where)
    assert_refused(ferryd, volumes.file(MiB), device, options=ANYHOW)


def test_a_target_in_swap(ferryd, volumes):
    need("mkswap", "swapon")
    target = volumes.loop(SIZE)
    run("mkswap", target)
    done = subprocess.run(["swapon", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no swap here: {done.stderr.strip()}")
    volumes.at_end(lambda: run("swapoff", target))
    assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW, says="swap", untouched=[])


def test_a_target_held_by_another_device(ferryd, volumes):
    """A loop device stands on it."""
    target = volumes.loop(SIZE)
    upper = volumes.loop(SIZE, file=target)
    assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW, says=upper.name)


def test_a_target_file_under_a_loop_device(ferryd, volumes):
    device = volumes.loop(SIZE, data=True)
    assert_refused(ferryd, volumes.file(MiB), device.file, options=ANYHOW, says=device.name)


def test_a_target_held_exclusively_by_a_process(ferryd, volumes):
    target = volumes.loop(SIZE)
    with opened(target, os.O_RDONLY | os.O_EXCL):
        assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW)


def test_a_target_open_for_writing_elsewhere(ferryd, volumes):
    target = volumes.loop(SIZE)
    with opened(target, os.O_RDWR):
        assert_refused(ferryd, volumes.file(MiB), target, options=["--overwrite"], says=str(os.getpid()))


def test_a_target_file_locked_elsewhere(ferryd, volumes):
    target = volumes.file(SIZE)
    with opened(target, os.O_RDWR) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert_refused(ferryd, volumes.file(MiB), target, options=["--overwrite"])


def test_a_partition_of_a_mounted_disk(ferryd, volumes):
    """The target is the whole disk, and one of its partitions is mounted."""
    need("sfdisk", "mkfs.ext4")
    disk = volumes.loop(2 * SIZE, partitions=True)
    run("sfdisk", "--quiet", disk, input="label: gpt\nstart=1MiB, size=16MiB\n")
    run("partx", "--update", disk)
    if not os.path.exists(f"{disk}p1"):
        pytest.skip("no device nodes of partitions here")
    run("mkfs.ext4", "-q", f"{disk}p1")
    volumes.mount(f"{disk}p1")
    assert_refused(ferryd, volumes.file(MiB), disk, options=ANYHOW, says="mounted")


def slow_run(ferryd, source, target):
    return ferryd.start_clone(source, target, options=["--rate", "1M"])


def test_another_runs_target(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.loop(SIZE)
    other = slow_run(ferryd, source, target)
    assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW, says=other, untouched=[])


def test_another_runs_target_file(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.path()
    other = slow_run(ferryd, source, target)
    assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW, says=other, untouched=[])


def test_another_runs_target_while_that_one_is_paused(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.loop(SIZE)
    other = slow_run(ferryd, source, target)
    ferryd.ctl("pause", other)
    ferryd.wait_state(other, "paused")
    assert_refused(ferryd, volumes.file(MiB), target, options=ANYHOW, says=other)


def test_another_runs_target_as_source(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.loop(SIZE)
    slow_run(ferryd, source, target)
    assert_refused(ferryd, target, volumes.path(), untouched=[])


def test_another_runs_source_as_target(ferryd, volumes):
    source = volumes.loop(SIZE, data=True)
    slow_run(ferryd, source, volumes.path())
    assert_refused(ferryd, volumes.file(MiB), source, options=["--overwrite"])


def test_a_target_of_another_ferryd(ferryds, volumes):
    target = volumes.loop(SIZE)
    slow_run(ferryds(), volumes.file(SIZE), target)
    assert_refused(ferryds(), volumes.file(MiB), target, options=ANYHOW, untouched=[])


def test_one_source_may_feed_two_runs(ferryd, volumes):
    source, targets = volumes.loop(4 * MiB, data=True), [volumes.path(), volumes.path()]
    runs = [ferryd.start_clone(source, target, options=["--rate", "8M"]) for target in targets]
    for each, target in zip(runs, targets):
        ferryd.wait_end(each)
        assert_same(source, target)


@pytest.mark.parametrize("options", [["--mode", "full"], ["--tracker", "checksum"], ["--tracker", "none"]])
def test_a_mounted_source_is_not_copied_without_tracking(ferryd, volumes, mounted, options):
    target = volumes.path()
    assert_refused(ferryd, mounted, target, options=options, says="mounted")
    assert not target.exists()


def test_a_mounted_source_by_force_with_no_tracker(ferryd, volumes, mounted):
    target = volumes.path()
    ferryd.clone(mounted, target, options=["--tracker", "none", "--force"])
    assert_same(mounted, target)


@pytest.mark.parametrize("kind", ["loop", "file"])
def test_a_source_open_for_writing_elsewhere(ferryd, volumes, kind):
    source, target = getattr(volumes, kind)(SIZE, data=True), volumes.path()
    with opened(source, os.O_RDWR):
        assert_refused(ferryd, source, target, says=str(os.getpid()))
    assert not target.exists()


def test_a_source_open_for_reading_elsewhere_is_fine(ferryd, volumes):
    source, target = volumes.loop(MiB, data=True), volumes.path()
    with opened(source, os.O_RDONLY):
        ferryd.clone(source, target)
    assert_same(source, target)


def test_check_names_what_refers_to_the_old_disk(ferryd, volumes):
    """The clone will double the filesystem's UUID."""
    device = filesystem(volumes)
    uuid = run("blkid", "--probe", "--match-tag", "UUID", "--output", "value", device).strip()
    report = ferryd.ctl("check", device, volumes.path(), "--json").json
    assert uuid in str(report["references"])
    assert uuid in ferryd.ctl("check", device, volumes.path()).stdout
