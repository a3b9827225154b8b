# SPDX-License-Identifier: Apache-2.0
"""clone: what arrives is what was there, whatever the kinds, sizes and sectors of the volumes."""
import os

import pytest

from harness.compare import assert_same, fingerprint, read_range
from harness.seccomp import forbid_io_uring
from harness.volumes import KiB, MiB

ODD = MiB + 123


def assert_whole(run, size):
    assert run["state"] == "completed"
    assert run["error"] is None
    assert run["bytes_total"] == size
    assert run["bytes_copied"] == size
    assert run["verify"]["mismatches"] == 0
    assert run["verify"]["granules"] == -(-size // run["granule_bytes"])
    assert run["bad_ranges"] == []
    assert run["restarts"] == 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_block_to_block(ferryd, volumes, sector):
    source = volumes.loop(48 * MiB, data=True, sector=sector)
    target = volumes.loop(48 * MiB, sector=sector)
    assert_whole(ferryd.clone(source, target), 48 * MiB)
    assert_same(source, target)
    assert_same(source.file, target.file)


@pytest.mark.parametrize("from_sector, to_sector", [(512, 4096), (4096, 512)])
def test_sectors_of_two_sizes(ferryd, volumes, from_sector, to_sector):
    source = volumes.loop(8 * MiB, data=True, sector=from_sector)
    target = volumes.loop(8 * MiB, sector=to_sector)
    assert_whole(ferryd.clone(source, target), 8 * MiB)
    assert_same(source, target)


def test_512_byte_sectors_onto_4096_where_the_size_is_no_multiple(ferryd, volumes):
    source = volumes.loop(8 * MiB + 512, data=True)
    target = volumes.loop(8 * MiB + 4096, sector=4096)
    assert_whole(ferryd.clone(source, target), 8 * MiB + 512)
    assert_same(source, target)


def test_file_to_file_creates_the_target(ferryd, volumes):
    source, target = volumes.file(20 * MiB), volumes.path()
    assert_whole(ferryd.clone(source, target), 20 * MiB)
    assert_same(source, target)


def test_file_to_block(ferryd, volumes):
    source, target = volumes.file(20 * MiB), volumes.loop(20 * MiB)
    assert_whole(ferryd.clone(source, target), 20 * MiB)
    assert_same(source, target)


def test_block_to_file(ferryd, volumes):
    source, target = volumes.loop(20 * MiB, data=True), volumes.path()
    assert_whole(ferryd.clone(source, target), 20 * MiB)
    assert_same(source, target)


def test_block_to_zram(ferryd, volumes):
    source, target = volumes.loop(16 * MiB, data=True), volumes.zram(16 * MiB)
    assert_whole(ferryd.clone(source, target), 16 * MiB)
    assert_same(source, target)


def test_zram_to_file(ferryd, volumes):
    source, target = volumes.zram(16 * MiB), volumes.path()
    volumes.write(source, 3 * MiB, volumes.data(5 * MiB))
    assert_whole(ferryd.clone(source, target), 16 * MiB)
    assert_same(source, target)


SIZES = [1, 511, 512, 4095, 4096, 4097, 64 * KiB - 1, MiB, ODD, 3 * MiB + 4096 + 1]


@pytest.mark.parametrize("size", SIZES)
def test_file_of_any_size_to_file(ferryd, volumes, size):
    source, target = volumes.file(size), volumes.path()
    assert_whole(ferryd.clone(source, target), size)
    assert_same(source, target)


def test_0_bytes(ferryd, volumes):
    source, target = volumes.file(0), volumes.path()
    assert_whole(ferryd.clone(source, target), 0)
    assert os.path.getsize(target) == 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_an_odd_file_to_a_larger_device_leaves_the_rest_of_it_alone(ferryd, volumes, sector):
    source, target = volumes.file(ODD), volumes.loop(2 * MiB, data=True, sector=sector)
    after = -(-ODD // sector) * sector
    before = read_range(target, after, 2 * MiB)
    assert_whole(ferryd.clone(source, target, options=["--overwrite"]), ODD)
    assert_same(source, target)
    assert read_range(target, after, 2 * MiB) == before


def test_a_device_of_an_odd_number_of_sectors_to_file(ferryd, volumes):
    source, target = volumes.loop(MiB + 512 * 3, data=True), volumes.path()
    assert_whole(ferryd.clone(source, target), MiB + 512 * 3)
    assert_same(source, target)


def test_a_symlink_names_the_source(ferryd, volumes):
    source, link, target = volumes.file(ODD), volumes.path("link"), volumes.path()
    link.symlink_to(source)
    assert_whole(ferryd.clone(link, target), ODD)
    assert_same(source, target)


def test_relative_paths_are_relative_to_the_caller(ferryd, volumes):
    source = volumes.file(ODD)
    target = volumes.path()
    ferryd.ctl("clone", source.name, target.name, "--json", cwd=volumes.directory)
    assert_same(source, target)


def test_awkward_names(ferryd, volumes):
    source = volumes.file(ODD, name='a "quoted" name, with % and \u00e9')
    target = volumes.path("back\\slash and 'quotes'")
    assert_whole(ferryd.clone(source, target), ODD)
    assert_same(source, target)


def test_two_targets_are_fed_from_one_read(ferryd, volumes):
    source = volumes.loop(24 * MiB, data=True)
    device, file = volumes.loop(32 * MiB, sector=4096), volumes.path()
    before = source.bytes_read()
    run = ferryd.clone(source, device, file)
    assert source.bytes_read() - before < 1.5 * 24 * MiB
    assert run["state"] == "completed"
    assert run["bytes_copied"] == run["bytes_total"] == 24 * MiB
    assert run["verify"]["mismatches"] == 0
    assert len(run["targets"]) == 2
    assert_same(source, device)
    assert_same(source, file)


def test_one_target_that_fails_lets_the_other_finish(ferryd, volumes):
    """A device whose backing file was cut accepts no write beyond the cut."""
    source, good = volumes.file(16 * MiB), volumes.path()
    small = volumes.mount("none", "tmpfs", "size=4M")
    bad = volumes.loop(16 * MiB, file=_sparse(small / "backing", 16 * MiB))
    run = ferryd.clone(source, good, bad, expect=1)
    assert run["state"] == "failed"
    assert str(bad) in run["error"]["message"]
    assert_same(source, good)


def _sparse(path, size):
    with open(path, "wb") as out:
        out.truncate(size)
    return path


@pytest.mark.parametrize("granule, bytes_", [("4K", 4 * KiB), ("64K", 64 * KiB), ("1M", MiB), ("64M", 64 * MiB)])
def test_the_granule_can_be_set(ferryd, volumes, granule, bytes_):
    source, target = volumes.file(9 * MiB + 77), volumes.path()
    run = ferryd.clone(source, target, options=["--granule", granule])
    assert_whole(run, 9 * MiB + 77)
    assert run["granule_bytes"] == bytes_
    assert_same(source, target)


@pytest.mark.parametrize("options", [["--io-size", "64K", "--queue-depth", "1"],
                                     ["--io-size", "4M", "--queue-depth", "4"],
                                     ["--queue-depth", "64"]])
def test_size_and_depth_of_io_can_be_set(ferryd, volumes, options):
    source, target = volumes.loop(16 * MiB, data=True), volumes.loop(16 * MiB)
    assert_whole(ferryd.clone(source, target, options=options), 16 * MiB)
    assert_same(source, target)


@pytest.mark.parametrize("engine", ["uring", "aio"])
@pytest.mark.parametrize("size", [24 * MiB, ODD // 512 * 512])
def test_both_io_engines_copy_devices(ferryd, volumes, engine, size):
    source, target = volumes.loop(size, data=True), volumes.loop(size)
    assert_whole(ferryd.clone(source, target, options=["--io-engine", engine]), size)
    assert_same(source, target)


@pytest.mark.parametrize("engine", ["uring", "aio"])
def test_both_io_engines_copy_files_and_their_holes(ferryd, volumes, engine):
    source = volumes.sparse(64 * MiB + 77, [(5 * MiB, ODD), (64 * MiB, 77)])
    target = volumes.path()
    assert_whole(ferryd.clone(source, target, options=["--io-engine", engine]), 64 * MiB + 77)
    assert_same(source, target)


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_where_io_uring_is_forbidden_another_engine_is_taken_by_itself(ferryds, volumes, error):
    ferryd = ferryds(preexec=forbid_io_uring(error))
    source, target = volumes.loop(16 * MiB, data=True), volumes.path()
    assert_whole(ferryd.clone(source, target), 16 * MiB)
    assert_same(source, target)


def test_where_io_uring_is_forbidden_asking_for_it_is_one_clear_error(ferryds, volumes):
    ferryd = ferryds(preexec=forbid_io_uring("EPERM"))
    source, target = volumes.file(MiB), volumes.loop(MiB)
    before = fingerprint(target)
    result = ferryd.ctl("clone", source, target, "--io-engine", "uring", expect=None)
    assert result.status in (1, 4), repr(result)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "uring" in result.stderr
    assert fingerprint(target) == before


def test_16_runs_at_once(ferryds, volumes):
    ferryd = ferryds("--max-runs", 16)
    pairs = [(volumes.file(6 * MiB + at * 1001), volumes.path()) for at in range(16)]
    # The rate keeps the early ones from ending before the late ones start.
    runs = [ferryd.start_clone(source, target, options=["--rate", "8M"]) for source, target in pairs]
    together = max(sum(ferryd.show(run)["state"] == "copying" for run in runs) for _ in range(5))
    assert together > 1
    for run in runs:
        ferryd.wait_end(run)
    for source, target in pairs:
        assert_same(source, target)


def test_without_verification_nothing_is_read_back(ferryd, volumes):
    source, target = volumes.loop(16 * MiB, data=True), volumes.loop(16 * MiB)
    before = target.bytes_read()
    run = ferryd.clone(source, target, options=["--no-verify"])
    assert run["state"] == "completed"
    # Preflight reads signatures; nobody reads the volume.
    assert target.bytes_read() - before < 4 * MiB
    assert_same(source, target)


def test_two_ferryds_side_by_side(ferryds, volumes):
    first, second = ferryds(), ferryds()
    pairs = [(volumes.file(ODD), volumes.path()) for _ in range(2)]
    assert_whole(first.clone(*pairs[0]), ODD)
    assert_whole(second.clone(*pairs[1]), ODD)
    assert [run["source"]["uri"] for run in first.ctl("list", "--json").json] == [str(pairs[0][0])]
    for pair in pairs:
        assert_same(*pair)
