# SPDX-License-Identifier: Apache-2.0
"""Real media errors: segments that the kernel answers with errors, and a SCSI disk with unreadable sectors."""
import subprocess
from pathlib import Path

import pytest
from harness.volumes import run
from harness.waiting import wait_until

MIB = 1 << 20


@pytest.fixture
def bad_map():
    """32 MiB, of which 64 KiB from 8 MiB on answer with errors."""
    begin, count = 8 * 2048, 128
    table = (f"0 {begin} linear 1:0 0\n{begin} {count} error\n"
             f"{begin + count} {32 * 2048 - begin - count} linear 1:0 {begin + count}\n")
    subprocess.run(["dmsetup", "create", "bad"], input=table, text=True, check=True)
    yield "/dev/mapper/bad", 8 * MIB, 64 << 10
    run("dmsetup", "remove", "--retry", "bad")


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


def test_error_segments_of_device_mapper(ferryd, bad_map):
    source, begin, count = bad_map
    fill(source, begin)
    check(ferryd, source, begin, count)


def test_medium_errors_of_a_scsi_disk(ferryd, bad_disk):
    source, begin, count = bad_disk
    fill(source, begin)
    check(ferryd, source, begin, count)
