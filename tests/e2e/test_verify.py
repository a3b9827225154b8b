# SPDX-License-Identifier: Apache-2.0
"""Verification reads the target back: what was corrupted is found, said, and mended on request."""
import pytest

from harness.compare import assert_same
from harness.volumes import KiB, MiB

SIZE = 24 * MiB


@pytest.fixture(params=["loop", "file"])
def cloned(request, ferryd, volumes):
    """(run, source, target) of a completed clone."""
    source = volumes.loop(SIZE, data=True) if request.param == "loop" else volumes.file(SIZE + 99)
    target = volumes.loop(SIZE) if request.param == "loop" else volumes.path()
    return ferryd.clone(source, target)["id"], source, target


def flip(volume, offset):
    """One bit, behind everybody's back."""
    with open(volume, "r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_verify_of_a_good_target_passes(ferryd, cloned):
    run, source, target = cloned
    shown = ferryd.ctl("verify", run, "--json").json
    assert shown["id"] == run
    shown = ferryd.wait_end(run)
    assert shown["verify"]["mismatches"] == 0
    assert shown["verify"]["granules"] >= SIZE // 4096


def test_verify_reads_the_target_afresh(ferryd, volumes):
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = ferryd.clone(source, target)["id"]
    before = target.bytes_read()
    ferryd.ctl("verify", run)
    assert target.bytes_read() - before >= SIZE


def corrupt(target):
    """Bits in three granules of the backing store, below any page cache of a device."""
    store = getattr(target, "file", target)
    for offset in (0, 5 * MiB + 123, SIZE - 1):
        flip(store, offset)


def test_verify_finds_single_bits_and_exits_1(ferryd, cloned):
    run, _, target = cloned
    corrupt(target)
    result = ferryd.ctl("verify", run, expect=1)
    assert str(target) in result.stderr
    shown = ferryd.show(run)
    assert shown["state"] == "failed"
    assert shown["verify"]["mismatches"] == 3
    assert shown["error"]["message"]


def test_verify_with_json_prints_the_run_and_the_error(ferryd, cloned):
    run, _, target = cloned
    corrupt(target)
    result = ferryd.ctl("verify", run, "--json", expect=1)
    assert result.json["verify"]["mismatches"] == 3


def test_resume_mends_what_verification_found(ferryd, cloned):
    run, source, target = cloned
    corrupt(target)
    ferryd.ctl("verify", run, expect=1)
    before = ferryd.show(run)["bytes_copied"]
    ferryd.ctl("resume", run)
    shown = ferryd.wait_end(run)
    assert shown["error"] is None
    assert shown["bytes_copied"] - before <= 3 * 4096
    assert_same(source, target)


def test_a_granule_that_went_missing_is_found_where_zeroes_were_expected(ferryd, volumes):
    source, target = volumes.sparse(64 * MiB, [(0, MiB)]), volumes.path()
    run = ferryd.clone(source, target)["id"]
    flip(target, 40 * MiB)
    ferryd.ctl("verify", run, expect=1)
    assert ferryd.show(run)["verify"]["mismatches"] == 1


def test_data_that_became_a_hole_is_found(ferryd, volumes):
    source, target = volumes.file(8 * MiB), volumes.path()
    run = ferryd.clone(source, target)["id"]
    with open(target, "r+b") as file:
        file.truncate(4 * MiB)
        file.truncate(8 * MiB)
    ferryd.ctl("verify", run, expect=1)
    assert ferryd.show(run)["verify"]["mismatches"] == 1024


def test_a_run_without_verification_can_be_verified_later(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.path()
    run = ferryd.clone(source, target, options=["--no-verify"])["id"]
    flip(target, 64 * KiB)
    ferryd.ctl("verify", run, expect=1)
    assert ferryd.show(run)["verify"]["mismatches"] == 1


def test_of_two_targets_the_corrupted_one_is_named(ferryd, volumes):
    source, good, bad = volumes.file(SIZE), volumes.path(), volumes.path()
    run = ferryd.clone(source, good, bad)["id"]
    flip(bad, MiB)
    message = ferryd.ctl("verify", run, expect=1).stderr
    assert str(bad) in message and str(good) not in message


def test_a_target_that_is_gone_is_one_clear_error(ferryd, volumes):
    source, target = volumes.file(MiB), volumes.path()
    run = ferryd.clone(source, target)["id"]
    target.unlink()
    assert str(target) in ferryd.ctl("verify", run, expect=1).stderr
    assert not target.exists()


def test_corruption_while_the_run_goes_on_is_caught_by_its_own_verification(ferryd, volumes):
    """The bit flips between the write and the reading back, as bad memory or a bad cable would do it."""
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = ferryd.start_clone(source, target, options=["--rate", "16M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 12 * MiB)
    flip(target.file, 64 * KiB)
    shown = ferryd.wait_for(run, lambda shown: shown["state"] in ("failed", "completed"))
    if shown["state"] == "failed":
        assert shown["verify"]["mismatches"] == 1
    else:
        assert_same(source, target)
