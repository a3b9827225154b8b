# SPDX-License-Identifier: Apache-2.0
"""Bounds on memory and on durable state, whatever the volume's size."""
import os

import pytest

from harness.compare import allocated_tree, assert_same, assert_same_sparse
from harness.volumes import GiB, KiB, MiB, TiB
from harness.waiting import wait_until

RESIDENT_KIB_MAX = 128 * 1024
SANITIZED = bool(os.environ.get("BLOCKFERRY_SANITIZE"))

measures_memory = pytest.mark.skipif(SANITIZED, reason="a sanitizer's own memory would be measured")


def scattered(volumes, size, count=8):
    """A sparse file with a few MiB in it, here and there."""
    return volumes.sparse(size, [(volumes.random.randrange(size // MiB) * MiB, MiB) for _ in range(count)])


@measures_memory
def test_a_tebibyte_keeps_ferryd_under_128_mib(ferryd, volumes):
    source, target = scattered(volumes, TiB), volumes.path()
    ferryd.clone(source, target)
    ferryd.clone(source, target, options=["--mode", "incremental"])
    assert ferryd.status_kib("VmHWM") < RESIDENT_KIB_MAX
    assert_same_sparse(source, target)


@measures_memory
def test_a_busy_device_keeps_ferryd_under_128_mib(ferryd, volumes):
    source, target = volumes.loop(256 * MiB, data=True), volumes.loop(256 * MiB)
    ferryd.clone(source, target)
    assert ferryd.status_kib("VmHWM") < RESIDENT_KIB_MAX
    assert_same(source, target)


@measures_memory
def test_a_large_granule_stays_within_the_bound(ferryd, volumes):
    """A granule is a unit of bookkeeping, not a buffer."""
    source, target = scattered(volumes, 64 * GiB), volumes.path()
    run = ferryd.clone(source, target, options=["--granule", "64M"])
    assert run["granule_bytes"] == 64 * MiB
    assert ferryd.status_kib("VmHWM") < 2 * RESIDENT_KIB_MAX
    assert_same_sparse(source, target)


@measures_memory
def test_many_clones_leak_nothing(ferryd, volumes):
    def one():
        run = ferryd.clone(volumes.file(MiB), volumes.path())
        ferryd.ctl("forget", run["id"])

    def open_descriptors():
        return len(os.listdir(f"/proc/{ferryd.process.pid}/fd"))

    for _ in range(5):
        one()
    before = ferryd.status_kib("VmRSS")
    descriptors = open_descriptors()
    for _ in range(30):
        one()
    assert ferryd.status_kib("VmRSS") - before < 8 * 1024
    # ferryd closes the last client's connection a moment after the client has ended.
    wait_until(lambda: open_descriptors() <= descriptors, 5, f"no more than {descriptors} descriptors")


def test_the_state_of_a_full_volume_is_under_three_thousandths_of_it(ferryd, volumes):
    source, target = volumes.file(128 * MiB), volumes.path()
    run = ferryd.start_clone(source, target, options=["--rate", "64M"])
    largest = 0

    def ended(shown):
        nonlocal largest
        largest = max(largest, allocated_tree(ferryd.state_dir))
        return shown["state"] == "completed"
    ferryd.wait_for(run, ended)
    # The run's record and the tables' headers do not grow with the volume.
    assert largest < 128 * MiB * 0.003 + 64 * KiB
    assert allocated_tree(ferryd.state_dir) < 128 * MiB * 0.003 + 64 * KiB


def test_state_is_sparse_where_the_volume_is(ferryd, volumes):
    source, target = scattered(volumes, TiB), volumes.path()
    ferryd.clone(source, target)
    # 32 MiB would be the bitmap of a volume all dirty: of it, and of the checksums, what is clean and zero is holes.
    assert allocated_tree(ferryd.state_dir) < 4 * MiB


def test_the_granule_grows_with_the_volume(ferryd, volumes):
    run = ferryd.clone(volumes.file(4 * TiB, data=False), volumes.path(), timeout=120)
    assert run["granule_bytes"] > 4096
    assert run["bytes_zeroed"] == 4 * TiB


def test_an_increment_of_a_sparse_tebibyte_takes_seconds(ferryd, volumes):
    source, target = scattered(volumes, TiB), volumes.path()
    ferryd.clone(source, target)
    at = volumes.random.randrange(TiB // MiB) * MiB
    volumes.write(source, at, volumes.data(64 * KiB))
    run = ferryd.clone(source, target, options=["--mode", "incremental"], timeout=20)
    assert run["bytes_copied"] == 64 * KiB
    assert_same_sparse(source, target)
