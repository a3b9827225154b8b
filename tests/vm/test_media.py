# SPDX-License-Identifier: Apache-2.0
"""Real media errors: segments that the kernel answers with errors, always or for a while, and a SCSI disk with
unreadable sectors; and targets whose writes fail, or get lost."""
import subprocess
from pathlib import Path

import pytest
from harness.volumes import run
from harness.waiting import wait_until

MIB = 1 << 20


BAD, BAD_BEGIN, BAD_BYTES = "/dev/mapper/bad", 8 * MIB, 64 << 10


def load_bad_map(verb, target):
    """32 MiB, of which 64 KiB from 8 MiB on are such a target."""
    begin, count = BAD_BEGIN // 512, BAD_BYTES // 512
    table = (f"0 {begin} linear 1:0 0\n{begin} {count} {target}\n"
             f"{begin + count} {32 * 2048 - begin - count} linear 1:0 {begin + count}\n")
    subprocess.run(["dmsetup", verb, "bad"], input=table, text=True, check=True)


@pytest.fixture
def bad_map():
    """Makes one."""
    yield lambda target: load_bad_map("create", target)
    run("dmsetup", "remove", "--retry", "bad")


def flakey(*features):
    """It fails, or does as the feature says, from the first second on for an hour."""
    said = [str(len(features)), *features] if features else []
    return " ".join(["flakey 1:0", str(BAD_BEGIN // 512), "0 3600", *said])


@pytest.fixture
def bad_disk():
    """A SCSI disk with ten unreadable sectors."""
    run("modprobe", "sd_mod")
    run("modprobe", "scsi_debug", "dev_size_mb=32", "opts=2", "medium_error_start=20480", "medium_error_count=10")
    disk = wait_until(lambda: next(iter(Path("/sys/block").glob("sd*")), None), what="the disk")
    yield f"/dev/{disk.name}", 20480 * 512, 10 * 512
    wait_until(lambda: subprocess.run(["modprobe", "-r", "scsi_debug"], check=False).returncode == 0, 20, "rmmod")


def check(ferryd, source, begin, count):
    failed = ferryd.clone(source, "/dev/ram1", options=("--overwrite",), expect=1)
    assert failed["state"] == "failed" and failed["error"]["device"] == source, failed
    assert begin - MIB * 2 <= failed["error"]["offset"] <= begin + count, failed
    skipped = ferryd.clone(source, "/dev/ram1", options=("--overwrite", "--on-read-error", "skip"), timeout=200)
    assert skipped["state"] == "completed" and skipped["verify"]["mismatches"] == 0, skipped
    first, last = begin // 4096 * 4096, (begin + count + 4095) // 4096 * 4096
    ranges = skipped["bad_ranges"]
    assert ranges[0]["offset"] >= first and ranges[-1]["offset"] + ranges[-1]["bytes"] <= last, ranges
    assert sum(each["bytes"] for each in ranges) >= count, ranges
    # What could not be read is zero on the target, and the rest is the source's.
    for skip, bytes_ in ((0, first), (last, 32 * MIB - last)):
        run("cmp", f"--ignore-initial={skip}", f"--bytes={bytes_}", source, "/dev/ram1")


def fill(device, before):
    """Random data, but in what answers with errors."""
    run("dd", "if=/dev/urandom", f"of={device}", "bs=64K", f"count={before // 65536}", "oflag=direct")


@pytest.mark.parametrize("target", ["error", flakey()], ids=["error", "flakey"])
def test_error_segments_of_device_mapper(ferryd, bad_map, target):
    bad_map(target)
    fill(BAD, BAD_BEGIN)
    check(ferryd, BAD, BAD_BEGIN, BAD_BYTES)


@pytest.fixture
def good_source():
    run("dmsetup", "create", "good", "--table", f"0 {32 * 2048} linear 1:2 0")
    run("dd", "if=/dev/urandom", "of=/dev/mapper/good", "bs=1M", "count=32", "oflag=direct")
    yield "/dev/mapper/good"
    run("dmsetup", "remove", "--retry", "good")


def test_writes_that_fail_end_the_run_which_goes_on_when_they_succeed(ferryd, bad_map, good_source):
    bad_map(flakey("error_writes"))
    failed = ferryd.clone(good_source, BAD, options=("--overwrite",), expect=1)
    assert failed["state"] == "failed" and failed["error"]["device"] == BAD, failed
    assert BAD_BEGIN - MIB * 2 <= failed["error"]["offset"] <= BAD_BEGIN + BAD_BYTES, failed
    load_bad_map("reload", f"linear 1:0 {BAD_BEGIN // 512}")
    run("dmsetup", "resume", "bad")
    ferryd.ctl("resume", failed["id"])
    assert ferryd.wait_end(failed["id"])["verify"]["mismatches"] == 0
    run("cmp", good_source, BAD)


def test_writes_that_get_lost_are_found_by_the_verification(ferryd, bad_map, good_source):
    bad_map(flakey("drop_writes"))
    run("dd", "if=/dev/zero", "of=/dev/ram0", "bs=1M", "count=32", "oflag=direct")
    failed = ferryd.clone(good_source, BAD, options=("--overwrite",), expect=1)
    assert failed["state"] == "failed" and failed["verify"]["mismatches"] == BAD_BYTES // 4096, failed


def test_medium_errors_of_a_scsi_disk(ferryd, bad_disk):
    source, begin, count = bad_disk
    fill(source, begin)
    check(ferryd, source, begin, count)
