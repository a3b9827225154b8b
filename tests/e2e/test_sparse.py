# SPDX-License-Identifier: Apache-2.0
"""Holes stay holes, zeroes become holes, and neither costs time or space."""
import os

from harness.compare import allocated, assert_same, assert_same_sparse, extents
from harness.volumes import KiB, MiB, TiB
from harness.waiting import Stopwatch

PAGE = 4096


def covered(found):
    return sum(end - begin for begin, end in found)


def test_a_sparse_file_stays_sparse(ferryd, volumes):
    source = volumes.sparse(256 * MiB, [(0, PAGE), (64 * MiB, 2 * MiB), (200 * MiB + 17, 300 * KiB)])
    target = volumes.path()
    run = ferryd.clone(source, target)
    assert run["bytes_copied"] == 256 * MiB
    assert run["bytes_zeroed"] >= 250 * MiB
    assert_same(source, target)
    assert extents(target) == extents(source)
    assert allocated(target) <= allocated(source)


def test_holes_are_found_and_not_read(ferryd, volumes):
    source, target = volumes.sparse(512 * MiB, [(100 * MiB, MiB)]), volumes.path()
    run = ferryd.clone(source, target, options=["--no-verify"])
    assert run["bytes_read"] <= 2 * MiB
    assert_same(source, target)


def test_zeroes_that_are_stored_become_holes(ferryd, volumes):
    source, target = volumes.path(), volumes.path()
    source.write_bytes(volumes.data(MiB) + bytes(30 * MiB) + volumes.data(MiB))
    assert allocated(source) >= 32 * MiB
    run = ferryd.clone(source, target)
    assert run["bytes_zeroed"] == 30 * MiB
    assert_same(source, target)
    assert allocated(target) <= 3 * MiB


def test_zeroes_overwrite_what_the_target_held(ferryd, volumes):
    source, target = volumes.sparse(32 * MiB, [(8 * MiB, MiB)]), volumes.loop(32 * MiB, data=True)
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)


def test_zeroes_overwrite_an_existing_file(ferryd, volumes):
    source, target = volumes.sparse(32 * MiB + 5, [(8 * MiB, MiB)]), volumes.file(32 * MiB + 5)
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)
    assert allocated(target) <= 2 * MiB


def test_a_thin_device_gets_its_space_back(ferryd, volumes):
    source, target = volumes.sparse(64 * MiB, [(8 * MiB, MiB)]), volumes.loop(64 * MiB, data=True)
    assert allocated(target.file) >= 64 * MiB
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)
    assert allocated(target.file) <= 3 * MiB


def test_a_file_of_nothing_but_a_hole(ferryd, volumes):
    source, target = volumes.file(300 * MiB + 1, data=False), volumes.path()
    run = ferryd.clone(source, target)
    assert run["bytes_zeroed"] == run["bytes_total"] == 300 * MiB + 1
    assert allocated(target) <= PAGE  # the tail may be written
    assert os.path.getsize(target) == 300 * MiB + 1


def test_a_sparse_tebibyte_in_seconds(ferryd, volumes):
    at = [volumes.random.randrange(TiB - MiB) for _ in range(4)]
    source = volumes.sparse(TiB, [(0, MiB), (TiB - 1, 1)] + [(offset, MiB) for offset in at])
    target = volumes.path()
    watch = Stopwatch()
    run = ferryd.clone(source, target)
    assert watch.seconds() < 10
    assert run["bytes_copied"] == TiB
    assert run["verify"]["mismatches"] == 0
    assert_same_sparse(source, target)
    assert covered(extents(target)) <= covered(extents(source)) + 16 * 64 * KiB
