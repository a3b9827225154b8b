# SPDX-License-Identifier: Apache-2.0
"""Devices that fail: one clear error each, nothing lost, and the run goes on once the cause is gone."""
import errno
import json
import os

import pytest

from harness.compare import allocated, assert_same, fingerprint, read_range
from harness.volumes import KiB, MiB, run as command
from harness.waiting import TIME_SCALE, wait_until

SIZE = 24 * MiB
CUT = 16 * MiB


class Cut:
    """A source whose backing file loses its last third: what lies there cannot be read until it is mended."""

    def __init__(self, volumes):
        self.volumes = volumes
        self.source = volumes.loop(SIZE, data=True)
        self.tail = read_range(self.source.file, CUT, SIZE)

    def cut(self):
        os.truncate(self.source.file, CUT)

    def mend(self):
        os.truncate(self.source.file, SIZE)
        self.volumes.write(self.source.file, CUT, self.tail)

    def failed_run(self, ferryd, target):
        """A run that came upon the cut; preflight would have noticed one that was there before."""
        run = ferryd.start_clone(self.source, target, options=["--rate", "16M"])
        ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > MiB)
        self.cut()
        ferryd.ctl("set", run, "--rate", "0")
        return ferryd.wait_end(run, "failed")


@pytest.fixture
def unreadable(volumes):
    return Cut(volumes)


def failed(ferryd, shown):
    """The one error of a failed run; the daemon's log says it too."""
    assert shown["state"] == "failed"
    message = shown["error"]["message"]
    assert message and "\n" not in message
    wait_until(lambda: message in ferryd.stderr(), what="the log of it")
    return shown["error"]


def test_read_errors_fail_the_run_clearly(ferryd, volumes, unreadable):
    error = failed(ferryd, unreadable.failed_run(ferryd, volumes.path()))
    assert error["device"] == str(unreadable.source)
    assert error["offset"] >= CUT
    assert "Input/output error" in error["message"]


def test_a_source_that_cannot_be_read_at_all_is_refused(ferryd, volumes, unreadable):
    unreadable.cut()
    target = volumes.path()
    assert str(unreadable.source) in ferryd.ctl("clone", unreadable.source, target, expect=4).stderr
    assert not target.exists()


def test_a_waiting_client_exits_1_with_the_error(ferryd, volumes, unreadable):
    waiting = ferryd.spawn_ctl("clone", unreadable.source, volumes.path(), "--rate", "16M", "--json")
    run = ferryd.wait_for_first_run()
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > MiB)
    unreadable.cut()
    ferryd.ctl("set", run, "--rate", "0")
    stdout, stderr = waiting.communicate(timeout=30 * TIME_SCALE)
    assert waiting.returncode == 1
    assert json.loads(stdout)["state"] == "failed"
    assert "Input/output error" in json.loads(stderr)["error"]["message"]


def test_after_a_read_error_the_run_goes_on_where_it_was(ferryd, volumes, unreadable):
    target = volumes.loop(SIZE)
    run = unreadable.failed_run(ferryd, target)["id"]
    unreadable.mend()
    ferryd.ctl("resume", run)
    shown = ferryd.wait_end(run)
    assert shown["error"] is None
    assert SIZE <= shown["bytes_copied"] <= SIZE + 16 * MiB
    assert_same(unreadable.source, target)


def test_resume_while_the_cause_is_still_there_fails_again(ferryd, volumes, unreadable):
    target = volumes.path()
    run = unreadable.failed_run(ferryd, target)["id"]
    ferryd.ctl("resume", run, expect=None)
    failed(ferryd, ferryd.wait_end(run, "failed"))
    unreadable.mend()
    ferryd.ctl("resume", run)
    ferryd.wait_end(run)
    assert_same(unreadable.source, target)


def test_a_failed_run_stays_failed_over_a_restart(ferryd, volumes, unreadable):
    target = volumes.path()
    shown = unreadable.failed_run(ferryd, target)
    ferryd.restart()
    again = ferryd.show(shown["id"])
    assert (again["state"], again["error"]) == ("failed", shown["error"])
    unreadable.mend()
    ferryd.ctl("resume", shown["id"])
    ferryd.wait_end(shown["id"])
    assert_same(unreadable.source, target)


def test_skipped_read_errors_are_listed_and_read_as_zeroes(ferryd, volumes, unreadable):
    source, target = unreadable.source, volumes.loop(SIZE, data=True)
    unreadable.cut()
    good = read_range(source.file, 0, CUT)
    run = ferryd.clone(source, target, options=["--on-read-error", "skip", "--overwrite"])
    assert run["state"] == "completed"
    assert run["bad_ranges"] == [{"offset": CUT, "bytes": SIZE - CUT}]
    assert read_range(target.file, 0, CUT) == good
    assert read_range(target.file, CUT, SIZE) == bytes(SIZE - CUT)


def test_skipping_loses_no_more_than_the_bad_granules(ferryd, volumes):
    """The cut lies inside a big read: its good part is copied all the same."""
    source, target = volumes.loop(SIZE, data=True), volumes.path()
    cut = 9 * MiB + 12 * KiB
    good = read_range(source.file, 0, cut)
    os.truncate(source.file, cut)
    run = ferryd.clone(source, target, options=["--on-read-error", "skip"])
    assert run["bad_ranges"] == [{"offset": cut, "bytes": SIZE - cut}]
    assert read_range(target, 0, cut) == good


def test_what_was_skipped_is_copied_by_an_increment_once_it_can_be_read(ferryd, volumes, unreadable):
    source, target = unreadable.source, volumes.loop(SIZE)
    unreadable.cut()
    ferryd.clone(source, target, options=["--on-read-error", "skip"])
    unreadable.mend()
    run = ferryd.clone(source, target, options=["--mode", "incremental"])
    assert run["bad_ranges"] == []
    assert_same(source, target)


def test_a_target_that_is_full_fails_clearly_and_goes_on_after(ferryd, volumes):
    source = volumes.file(12 * MiB)
    where = volumes.mount("none", "tmpfs", "size=8M")
    target = where / "target"
    error = failed(ferryd, run := ferryd.clone(source, target, expect=1))
    assert error["code"] == "no_space"
    assert error["device"] == str(target)
    assert "No space left on device" in error["message"]
    command("mount", "-o", "remount,size=32M", where)
    ferryd.ctl("resume", run["id"])
    ferryd.wait_end(run["id"])
    assert_same(source, target)


def test_a_thin_device_that_is_full_fails_and_goes_on_after(ferryd, volumes):
    """A loop device on a sparse file that has no room to grow."""
    source = volumes.file(12 * MiB)
    where = volumes.mount("none", "tmpfs", "size=8M")
    with open(where / "backing", "wb") as backing:
        backing.truncate(12 * MiB)
    target = volumes.loop(12 * MiB, file=where / "backing")
    run = ferryd.clone(source, target, expect=1)
    error = failed(ferryd, run)
    assert error["device"] == str(target)
    command("mount", "-o", "remount,size=32M", where)
    ferryd.ctl("resume", run["id"])
    ferryd.wait_end(run["id"])
    assert_same(source, target)


def test_a_full_filesystem_takes_a_sparse_copy_that_fits(ferryd, volumes):
    where = volumes.mount("none", "tmpfs", "size=8M")
    source = volumes.sparse(64 * MiB, [(MiB, 2 * MiB), (60 * MiB, MiB)])
    ferryd.clone(source, where / "target")
    assert_same(source, where / "target")
    assert allocated(where / "target") <= 4 * MiB


def test_a_state_directory_that_is_full_fails_the_run_and_nothing_else(ferryds, volumes):
    where = volumes.mount("none", "tmpfs", "size=4M")
    ferryd = ferryds(state_dir=where / "state")
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    with open(where / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    result = ferryd.ctl("clone", source, target, "--json", expect=None)
    assert result.status == 1, repr(result)
    assert "No space left" in result.stderr
    os.truncate(where / "ballast", 0)
    ferryd.clone(source, target, options=["--overwrite"])
    assert_same(source, target)


def test_a_source_that_shrinks_under_the_run(ferryd, volumes):
    source, target = volumes.loop(SIZE, data=True), volumes.path()
    run = ferryd.start_clone(source, target, options=["--rate", "8M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 2 * MiB)
    os.truncate(source.file, CUT)
    command("losetup", "--set-capacity", source)
    ferryd.ctl("set", run, "--rate", "0")
    failed(ferryd, ferryd.wait_end(run, "failed"))


def test_a_source_file_that_shrinks_under_the_run(ferryd, volumes):
    """A short read."""
    source, target = volumes.file(SIZE), volumes.path()
    run = ferryd.start_clone(source, target, options=["--rate", "8M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 2 * MiB)
    os.truncate(source, CUT + 100)
    ferryd.ctl("set", run, "--rate", "0")
    assert failed(ferryd, ferryd.wait_end(run, "failed"))["device"] == str(source)


def test_a_source_that_was_replaced_while_ferryd_was_away_is_not_mixed_in(ferryd, volumes):
    """Another volume stands under the same name: half of each would be on the target."""
    source, target = volumes.file(SIZE), volumes.path()
    run = ferryd.start_clone(source, target, options=["--rate", "8M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 4 * MiB)
    ferryd.stop()
    source.rename(volumes.path("old"))
    volumes.file(SIZE).rename(source)
    ferryd.start()
    assert str(source) in failed(ferryd, ferryd.wait_end(run, "failed"))["message"]


def test_a_target_that_was_replaced_while_ferryd_was_away_is_not_written(ferryd, volumes):
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = ferryd.start_clone(source, target, options=["--rate", "8M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 4 * MiB)
    ferryd.stop()
    other = volumes.file(SIZE)
    before = fingerprint(other)
    volumes.reattach(target, other)
    ferryd.start()
    assert str(target) in failed(ferryd, ferryd.wait_end(run, "failed"))["message"]
    assert fingerprint(other) == before


def test_a_target_that_is_gone_after_a_restart_fails_clearly(ferryd, volumes):
    source, target = volumes.file(SIZE), volumes.path()
    run = ferryd.start_clone(source, target, options=["--rate", "8M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 4 * MiB)
    ferryd.stop()
    aside = volumes.path("aside")
    target.rename(aside)
    ferryd.start()
    assert str(target) in failed(ferryd, ferryd.wait_end(run, "failed"))["message"]
    aside.rename(target)
    ferryd.ctl("resume", run)
    ferryd.ctl("set", run, "--rate", "0")
    ferryd.wait_end(run)
    assert_same(source, target)


def test_a_failed_target_gets_all_that_it_lacks_when_it_is_back(ferryd, volumes):
    """Two targets; one fills up, the other finishes; resumed, the first catches up."""
    source, good = volumes.file(12 * MiB), volumes.path()
    where = volumes.mount("none", "tmpfs", "size=8M")
    bad = where / "target"
    run = ferryd.clone(source, good, bad, expect=1)
    assert str(bad) in failed(ferryd, run)["message"]
    assert_same(source, good)
    command("mount", "-o", "remount,size=32M", where)
    ferryd.ctl("resume", run["id"])
    ferryd.wait_end(run["id"])
    assert_same(source, bad)
    assert_same(source, good)
