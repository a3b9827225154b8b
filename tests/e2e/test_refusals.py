# SPDX-License-Identifier: Apache-2.0
"""Preflight refuses what would destroy data by mistake: exit 4, one line that says why, nothing touched.

Here: what the volumes are. What holds them is in test_refusals_in_use.py.
"""
import os

import pytest

from harness.compare import assert_same
from harness.refusals import assert_refused
from harness.volumes import MiB, need, run

SIZE = 8 * MiB


def test_a_smaller_target(ferryd, volumes):
    assert_refused(ferryd, volumes.loop(SIZE, data=True), volumes.loop(SIZE - 512), says="small")


def test_a_target_one_sector_smaller_than_an_odd_file(ferryd, volumes):
    assert_refused(ferryd, volumes.file(SIZE + 1), volumes.loop(SIZE), says="small")


def test_overwrite_does_not_excuse_a_smaller_target(ferryd, volumes):
    assert_refused(ferryd, volumes.file(SIZE), volumes.loop(SIZE // 2), options=["--overwrite", "--force"],
                   says="small")


def test_the_source_itself(ferryd, volumes):
    source = volumes.loop(SIZE, data=True)
    assert_refused(ferryd, source, source, options=["--overwrite"], says="the source itself")


def test_the_source_file_itself(ferryd, volumes):
    source = volumes.file(SIZE)
    assert_refused(ferryd, source, source, options=["--overwrite"], says="the source itself")


@pytest.mark.parametrize("kind", ["loop", "file"])
def test_the_source_by_a_symlink(ferryd, volumes, kind):
    source, link = getattr(volumes, kind)(SIZE, data=True), volumes.path("link")
    link.symlink_to(source)
    assert_refused(ferryd, source, link, options=["--overwrite"], says="the source itself")


def test_the_source_by_a_hard_link(ferryd, volumes):
    source, link = volumes.file(SIZE), volumes.path("link")
    os.link(source, link)
    assert_refused(ferryd, source, link, options=["--overwrite"], says="the source itself")


def test_the_source_by_another_device_node(ferryd, volumes):
    source, node = volumes.loop(SIZE, data=True), volumes.path("node")
    try:
        os.mknod(node, 0o600 | 0o060000, os.stat(source).st_rdev)
        os.close(os.open(node, os.O_RDONLY))
    except OSError:
        pytest.skip("no device nodes outside /dev here")
    assert_refused(ferryd, source, node, options=["--overwrite"], says="the source itself")


def partitioned(volumes, size=4 * SIZE, **options):
    """A disk with one partition; the disk and the partition's node."""
    need("sfdisk")
    disk = volumes.loop(size, partitions=True, **options)
    run("sfdisk", "--quiet", disk, input="label: gpt\nstart=1MiB, size=4MiB\n")
    run("partx", "--update", disk)
    part = f"{disk}p1"
    if not os.path.exists(part):
        pytest.skip("no device nodes of partitions here")
    return disk, part


def test_a_partition_of_the_source(ferryd, volumes):
    disk, part = partitioned(volumes)
    assert_refused(ferryd, disk, part, options=["--overwrite"], untouched=[disk], says=part)


def test_the_disk_that_the_source_is_a_partition_of(ferryd, volumes):
    disk, part = partitioned(volumes)
    assert_refused(ferryd, part, disk, options=["--overwrite"])


def test_a_loop_device_on_the_source(ferryd, volumes):
    source = volumes.file(SIZE)
    assert_refused(ferryd, source, volumes.loop(SIZE, file=source), options=["--overwrite"])


def test_the_file_under_the_source(ferryd, volumes):
    source = volumes.loop(SIZE, data=True)
    assert_refused(ferryd, source, source.file, options=["--overwrite"])


def test_a_loop_device_on_the_source_device(ferryd, volumes):
    source = volumes.loop(SIZE, data=True)
    assert_refused(ferryd, source, volumes.loop(SIZE, file=source), options=["--overwrite"])


def test_another_loop_device_on_the_same_file(ferryd, volumes):
    file = volumes.file(SIZE)
    first, second = volumes.loop(SIZE, file=file), volumes.loop(SIZE, file=file)
    assert_refused(ferryd, first, second, options=["--overwrite"])


def test_two_targets_that_are_one(ferryd, volumes):
    target, link = volumes.loop(SIZE), volumes.path("link")
    link.symlink_to(target)
    assert_refused(ferryd, volumes.file(SIZE), target, link, says="twice")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "swap"])
def test_a_target_with_a_signature(ferryd, volumes, kind):
    need("mkswap" if kind == "swap" else f"mkfs.{kind}")
    size = 320 * MiB
    target = volumes.loop(size)
    run(*(["mkswap"] if kind == "swap" else [f"mkfs.{kind}", "-q"]), target)
    assert_refused(ferryd, volumes.file(SIZE), target, says=kind)


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_a_target_with_a_partition_table(ferryd, volumes, label):
    need("sfdisk")
    target = volumes.loop(4 * SIZE)
    run("sfdisk", "--quiet", target, input=f"label: {label}\nstart=1MiB, size=4MiB\n")
    assert_refused(ferryd, volumes.file(SIZE), target, says=label)


def test_a_target_file_with_a_signature(ferryd, volumes):
    need("mkfs.ext4")
    target = volumes.file(SIZE, data=False)
    run("mkfs.ext4", "-q", target)
    assert_refused(ferryd, volumes.file(SIZE), target, says="ext4")


def test_overwrite_says_so(ferryd, volumes):
    need("mkfs.ext4")
    source, target = volumes.file(SIZE), volumes.loop(SIZE)
    run("mkfs.ext4", "-q", target)
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)


@pytest.mark.parametrize("options", [[], ["--overwrite", "--force"]])
def test_a_read_only_target(ferryd, volumes, options):
    target = volumes.loop(SIZE, read_only=True)
    assert_refused(ferryd, volumes.file(SIZE), target, options=options, says="read-only")


def test_a_target_file_on_a_read_only_filesystem(ferryd, volumes):
    need("mkfs.ext4")
    device = volumes.loop(16 * MiB)
    run("mkfs.ext4", "-q", device)
    where = volumes.mount(device, options="ro")
    assert_refused(ferryd, volumes.file(MiB), where / "target", says="ead-only")


def test_a_target_file_in_no_directory(ferryd, volumes):
    assert_refused(ferryd, volumes.file(MiB), volumes.path("no") / "such" / "target", says="such")


def test_a_target_that_is_a_directory(ferryd, volumes):
    target = volumes.path("directory")
    target.mkdir()
    assert_refused(ferryd, volumes.file(MiB), target, says="directory", untouched=[])
    assert list(target.iterdir()) == []


def test_a_target_that_is_a_character_device(ferryd, volumes):
    assert_refused(ferryd, volumes.file(MiB), "/dev/full", untouched=[])


def test_a_missing_device_under_dev_is_not_made_as_a_file(ferryd, volumes):
    assert_refused(ferryd, volumes.file(MiB), "/dev/no-such-disk-of-blockferry", untouched=[])
    assert not os.path.exists("/dev/no-such-disk-of-blockferry")


def test_a_missing_source(ferryd, volumes):
    source, target = volumes.path("missing"), volumes.path()
    assert_refused(ferryd, source, target, says=str(source))
    assert not target.exists()


def test_a_source_that_is_a_directory(ferryd, volumes):
    assert_refused(ferryd, volumes.directory, volumes.path(), says="directory", untouched=[])


def test_a_source_that_is_a_pipe(ferryd, volumes):
    pipe = volumes.path("pipe")
    os.mkfifo(pipe)
    assert_refused(ferryd, pipe, volumes.path(), untouched=[])


def test_a_source_that_cannot_be_read(ferryd, volumes):
    """A dangling link stands in for it: root reads whatever has bits."""
    link = volumes.path("dangling")
    link.symlink_to(volumes.path("nowhere"))
    assert_refused(ferryd, link, volumes.path(), untouched=[])


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_a_512_byte_partition_table_onto_4096_byte_sectors(ferryd, volumes, label):
    need("sfdisk")
    source, target = volumes.loop(4 * SIZE), volumes.loop(4 * SIZE, sector=4096)
    run("sfdisk", "--quiet", source, input=f"label: {label}\nstart=1MiB, size=4MiB\n")
    assert_refused(ferryd, source, target, says="4096")


def test_the_first_of_several_targets_is_not_touched_for_the_second(ferryd, volumes):
    good, small = volumes.loop(SIZE), volumes.loop(SIZE // 2)
    assert_refused(ferryd, volumes.file(SIZE), good, small, says=str(small))


def test_refused_with_json_names_the_code(ferryd, volumes):
    result = ferryd.ctl("clone", volumes.file(SIZE), volumes.loop(MiB), "--json", expect=4)
    assert result.stdout == ""
    assert '"refused"' in result.stderr


def test_a_refused_run_leaves_nothing_in_the_list(ferryd, volumes):
    assert_refused(ferryd, volumes.file(SIZE), volumes.loop(MiB))
    assert ferryd.ctl("list", "--json").json == []
