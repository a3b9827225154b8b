# SPDX-License-Identifier: Apache-2.0
"""Filesystems arrive whole: their own checkers find nothing, and the files in them are the same."""
import hashlib

import pytest

from harness.compare import assert_same
from harness.volumes import MiB, need, run

SIZES = {"ext4": 64 * MiB, "xfs": 320 * MiB, "btrfs": 160 * MiB}
CHECKS = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"], "btrfs": ["btrfs", "check"]}


def tree(where):
    """{relative path: hash} of all files."""
    return {str(path.relative_to(where)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(where.rglob("*")) if path.is_file()}


def fill(volumes, where):
    for at in range(60):
        directory = where / f"directory-{at % 7}"
        directory.mkdir(exist_ok=True)
        (directory / f"file-{at}").write_bytes(volumes.data(volumes.random.randrange(200_000)))
    (where / "removed").write_bytes(volumes.data(4 * MiB))
    run("sync", "--file-system", where)
    (where / "removed").unlink()
    with open(where / "sparse", "wb") as sparse:
        sparse.seek(30 * MiB)
        sparse.write(b"end")
    return tree(where)


def make(volumes, kind, sector=512):
    """(device, {path: hash}) of an unmounted filesystem with files."""
    need(f"mkfs.{kind}", CHECKS[kind][0])
    device = volumes.loop(SIZES[kind], sector=sector)
    run(f"mkfs.{kind}", "-q", device)
    where = volumes.mount(device, kind)
    files = fill(volumes, where)
    run("umount", where)
    return device, files


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_cloned_filesystem_is_whole(ferryd, volumes, kind, sector):
    source, files = make(volumes, kind, sector)
    target = volumes.loop(SIZES[kind], sector=sector)
    ferryd.clone(source, target)
    assert_same(source, target)
    run(*CHECKS[kind], target)
    # The same UUID twice on one machine: the source must go first.
    volumes.detach(source)
    assert tree(volumes.mount(target, kind, "ro")) == files


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_a_filesystem_cloned_to_a_file_is_whole(ferryd, volumes, kind):
    source, files = make(volumes, kind)
    target = volumes.path()
    ferryd.clone(source, target)
    run(*CHECKS[kind], target)
    volumes.detach(source)
    assert tree(volumes.mount(target, kind, "ro,loop")) == files


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_an_increment_of_a_filesystem_is_whole(ferryd, volumes, kind):
    source, _ = make(volumes, kind)
    target = volumes.loop(SIZES[kind])
    ferryd.clone(source, target)
    where = volumes.mount(source, kind)
    (where / "new").write_bytes(volumes.data(3 * MiB))
    (where / "directory-1" / "file-1").unlink()
    files = tree(where)
    run("umount", where)
    increment = ferryd.clone(source, target, options=["--mode", "incremental"])
    assert increment["bytes_copied"] < SIZES[kind] // 2
    assert_same(source, target)
    run(*CHECKS[kind], target)
    volumes.detach(source)
    assert tree(volumes.mount(target, kind, "ro")) == files


def test_a_larger_target_holds_the_filesystem_and_can_be_grown(ferryd, volumes):
    need("resize2fs")
    source, files = make(volumes, "ext4")
    target = volumes.loop(2 * SIZES["ext4"])
    ferryd.clone(source, target)
    run("e2fsck", "-f", "-p", target)
    run("resize2fs", target)
    run(*CHECKS["ext4"], target)
    volumes.detach(source)
    assert tree(volumes.mount(target, "ext4", "ro")) == files


def test_a_partitioned_disk_arrives_with_its_partitions(ferryd, volumes):
    need("sfdisk")
    source, target = volumes.loop(64 * MiB), volumes.loop(64 * MiB)
    run("sfdisk", "--quiet", source, input="label: gpt\nstart=1MiB, size=20MiB\nstart=21MiB, size=20MiB\n")
    ferryd.clone(source, target)
    assert run("sfdisk", "--dump", target).replace(str(target), "X") == \
        run("sfdisk", "--dump", source).replace(str(source), "X")
    run("sfdisk", "--verify", target)


def test_one_partition_is_a_volume(ferryd, volumes):
    need("sfdisk", "mkfs.ext4")
    disk = volumes.loop(64 * MiB, partitions=True)
    run("sfdisk", "--quiet", disk, input="label: gpt\nstart=1MiB, size=20MiB\nstart=21MiB, size=20MiB\n")
    run("partx", "--update", disk)
    try:
        run("mkfs.ext4", "-q", f"{disk}p1")
    except AssertionError:
        pytest.skip("no device nodes of partitions here")
    ferryd.clone(f"{disk}p1", f"{disk}p2")
    assert_same(f"{disk}p1", f"{disk}p2")
    run("e2fsck", "-f", "-n", f"{disk}p2")
