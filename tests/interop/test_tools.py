# SPDX-License-Identifier: Apache-2.0
"""Other people's tools read what Blockferry wrote, agree that it is the same, and go on with it."""
import json
import os
import subprocess

import pytest

from harness.compare import allocated, assert_same, extents
from harness.volumes import KiB, MiB, need, run

SIZE = 64 * MiB


@pytest.fixture
def source(volumes):
    """Data, stored zeroes and holes."""
    path = volumes.sparse(SIZE, [(0, 5 * MiB), (20 * MiB, 64 * KiB), (SIZE - MiB, MiB)])
    volumes.write(path, 30 * MiB, bytes(8 * MiB))
    return path


@pytest.fixture(params=["loop", "file", "zram"])
def cloned(request, ferryd, volumes, source):
    target = {"loop": lambda: volumes.loop(SIZE), "file": volumes.path, "zram": lambda: volumes.zram(SIZE)}
    made = target[request.param]()
    ferryd.clone(source, made)
    return made


def test_qemu_img_compare_agrees(source, cloned):
    need("qemu-img")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, cloned)


def test_qemu_img_sees_what_was_corrupted(volumes, source, cloned):
    """The peer is no rubber stamp."""
    need("qemu-img")
    volumes.write(cloned, 12 * MiB, b"x" * 512)
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", source, cloned], capture_output=True)
    assert done.returncode == 1


def test_nbdkit_serves_the_target(volumes, source, cloned):
    need("nbdkit", "nbdcopy")
    copy = volumes.path("served")
    served = f"nbdcopy \"$uri\" {copy}"
    run("nbdkit", "--exit-with-parent", "-U", "-", "--readonly", "file", cloned, "--run", served)
    assert_same(source, copy)


def test_nbdkit_finds_the_holes(ferryd, volumes, source):
    need("nbdkit", "nbdinfo")
    target = volumes.path()
    ferryd.clone(source, target)
    mapped = json.loads(run("nbdkit", "-U", "-", "--readonly", "file", target, "--run",
                            'nbdinfo --map --json "$uri"'))
    data = sum(each["length"] for each in mapped if each["type"] == 0)
    assert data <= 7 * MiB


def test_a_qemu_made_image_as_source(ferryd, volumes, source):
    need("qemu-img")
    made, target = volumes.path("qemu"), volumes.loop(SIZE)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, made)
    ferryd.clone(made, target)
    assert_same(source, target)


def test_fio_verifies_its_own_pattern_on_the_target(ferryd, volumes):
    """fio's blocks carry their own checksums and offsets: a block at the wrong place would show."""
    need("fio")
    source, target = volumes.loop(32 * MiB), volumes.loop(32 * MiB)
    job = ["--name=pattern", "--rw=randwrite", "--bs=4k-64k", "--size=32m", "--verify=crc32c", "--direct=1",
           "--ioengine=psync", "--randseed=7", "--output-format=terse"]
    run("fio", *job, f"--filename={source}", "--do_verify=0")
    ferryd.clone(source, target)
    run("fio", *job, f"--filename={target}", "--verify_only=1")


def test_dd_and_blockferry_agree_on_a_device(ferryd, volumes):
    source, target, other = volumes.loop(SIZE, data=True), volumes.loop(SIZE), volumes.path()
    ferryd.clone(source, target)
    run("dd", f"if={target}", f"of={other}", "bs=1M", "iflag=direct", "status=none")
    assert_same(source, other)


def test_a_thin_loop_target_stays_thin(ferryd, volumes, source):
    target = volumes.loop(SIZE)
    ferryd.clone(source, target)
    assert_same(source, target)
    assert allocated(target.file) <= 7 * MiB


def test_a_thin_loop_target_that_was_full_becomes_thin(ferryd, volumes, source):
    target = volumes.loop(SIZE, data=True)
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)
    assert allocated(target.file) <= 7 * MiB


def test_zram_stores_nothing_for_zeroes(ferryd, volumes, source):
    target = volumes.zram(SIZE)
    ferryd.clone(source, target)
    stored = int(open(f"/sys/block/{os.path.basename(target)}/mm_stat").read().split()[0])
    assert stored <= 7 * MiB
    assert_same(source, target)


def test_cp_keeps_the_holes_of_the_target(ferryd, volumes, source):
    target, copy = volumes.path(), volumes.path("copy")
    ferryd.clone(source, target)
    run("cp", "--sparse=auto", target, copy)
    assert extents(copy) == extents(target)
    assert_same(source, copy)
