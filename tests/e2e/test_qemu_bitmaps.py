# SPDX-License-Identifier: Apache-2.0
"""Bitmaps that the user names: the image keeps them, so that a later run copies only what was written since, though QEMU
and ferryd were started anew. What cannot be trusted is noticed, and everything is compared."""
import shlex
import shutil

import pytest

from harness.guest import BootGuest, qcow2, raw_content, storage_daemon
from harness.volumes import KiB, MiB, run
from harness.waiting import wait_until

SIZE = 16 * MiB
STILL = ("--quiesce-cmd", "true", "--resume-cmd", "true")  # nobody writes through a storage daemon here
AGAIN = ("--mode", "incremental", *STILL)


@pytest.fixture
def image(volumes):
    return qcow2(volumes, volumes.sparse(SIZE, [(2 * MiB, 4 * MiB)]))


def write(image, offset, length, pattern):
    """By a program that keeps the image's bitmaps up to date, as QEMU does."""
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -P {pattern} {offset} {length}", image)


def named(qemu, name="nightly"):
    return qemu.source(bitmap=name)


def kinds(shown):
    return [each["kind"] for each in shown["passes"]]


def first_copy(ferryd, volumes, image, target):
    """The run's id; and the storage daemon that has ended since, for the next one to be like it."""
    daemon = storage_daemon(volumes, image, "qcow2")
    shown = ferryd.clone(named(daemon), target, options=STILL)
    assert daemon.bitmaps() == [f"nightly-{shown['id']}-0"] and daemon.exports() == [], "the bitmap alone is left"
    daemon.shut_down()
    return shown["id"], daemon


def copied_again(ferryd, volumes, image, target, before):
    """How the next run ended, and the bitmaps then; QEMU has ended since."""
    daemon = storage_daemon(volumes, image, "qcow2", before)
    shown = ferryd.clone(named(daemon), target, options=AGAIN)
    left = daemon.bitmaps()
    daemon.shut_down()
    assert target.read_bytes() == raw_content(image)
    return shown, left


def test_only_what_was_written_since_is_copied(ferryd, volumes, image):
    target = volumes.path("target")
    first, before = first_copy(ferryd, volumes, image, target)
    for round in range(2):
        ferryd.restart()
        for granule in (5, 600 + round, 4000):
            write(image, granule * 4 * KiB, 4 * KiB, 7 + round)
        shown, left = copied_again(ferryd, volumes, image, target, before)
        assert "checksum" not in kinds(shown) and shown["warning"] is None, shown
        assert shown["bytes_copied"] == 3 * 4 * KiB, shown
        assert shown["verify"] == {"granules": SIZE // 4096, "mismatches": 0}, shown
        assert left == [f"nightly-{first}-{round + 1}"]


def test_sync_follows_it_too(ferryd, volumes, image):
    target = volumes.path("target")
    daemon = storage_daemon(volumes, image, "qcow2")
    shown = ferryd.clone(named(daemon), target, options=STILL)
    ferryd.ctl("sync", shown["id"])
    after = ferryd.wait_end(shown["id"])
    assert after["bytes_copied"] == shown["bytes_copied"] and "checksum" not in kinds(after), after


def test_a_guest_that_writes_is_followed_over_its_restart(ferryds, volumes):
    """ferryd is killed in the middle of the second run, besides."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    images = [qcow2(volumes, volumes.sparse(24 * MiB, [(8 * MiB, 12 * MiB)]))]
    guest, target = BootGuest(volumes, images=images, driver="qcow2"), volumes.path("target")
    ferryd.clone(named(guest), target)
    guest.wait_for_writes(3)
    guest.shut_down()
    guest, still = BootGuest(volumes, images=images, driver="qcow2", before=guest), volumes.path("still")
    command = f"cp {shlex.quote(str(guest.serial))} {shlex.quote(str(still))}"
    run = ferryd.start_clone(named(guest), target, options=["--mode", "incremental", "--cutover", "manual",
                                                            "--cutover-cmd", command])
    ferryd.wait_state(run, "tracking")
    ferryd.kill()
    wait_until(guest.running, 12, "the guest to go on")
    guest.wait_for_writes(1)
    ferryd.start()
    ferryd.wait_state(run, "tracking")
    ferryd.ctl("cutover", run)
    shown = ferryd.wait_end(run)
    assert "checksum" not in kinds(shown) and shown["bytes_copied"] < 12 * MiB, shown
    guest.assert_holds(target, guest.acknowledged(still))
    guest.wait_for_writes(1)
    assert len(guest.bitmaps()) == 1 and guest.exports() == []


def test_a_killed_qemu_is_noticed(ferryd, volumes, image):
    """It has not written the bitmap, and says so when it opens the image again."""
    target = volumes.path("target")
    first, before = first_copy(ferryd, volumes, image, target)
    daemon = storage_daemon(volumes, image, "qcow2", before)
    daemon.power_off()
    write(image, 3 * MiB, 64 * KiB, 9)
    shown, left = copied_again(ferryd, volumes, image, target, before)
    assert "checksum" in kinds(shown), shown
    assert left == [f"nightly-{first}-1"], "a new one takes its place"
    write(image, 4 * MiB, 4 * KiB, 10)
    shown, _ = copied_again(ferryd, volumes, image, target, before)
    assert "checksum" not in kinds(shown) and shown["bytes_copied"] == 4 * KiB, shown


def stopped(daemon, name):
    daemon.command("block-dirty-bitmap-disable", node="disk0", name=name)


def removed(daemon, name):
    daemon.command("block-dirty-bitmap-remove", node="disk0", name=name)


def coarse(daemon, name):
    removed(daemon, name)
    daemon.command("block-dirty-bitmap-add", node="disk0", name=name, granularity=64 * KiB, persistent=True)


def passing(daemon, name):
    removed(daemon, name)
    daemon.command("block-dirty-bitmap-add", node="disk0", name=name, granularity=4 * KiB)


@pytest.mark.parametrize("tamper", [stopped, removed, coarse, passing])
def test_what_others_do_to_it_is_noticed(ferryd, volumes, image, tamper):
    target = volumes.path("target")
    first, before = first_copy(ferryd, volumes, image, target)
    daemon = storage_daemon(volumes, image, "qcow2", before)
    tamper(daemon, f"nightly-{first}-0")
    daemon.shut_down()
    write(image, 3 * MiB, 64 * KiB, 9)
    shown, _ = copied_again(ferryd, volumes, image, target, before)
    assert "checksum" in kinds(shown), shown


def test_an_earlier_image_is_noticed(ferryd, volumes, image):
    """Restored from a backup, with the bitmap as it was then."""
    target, backup = volumes.path("target"), volumes.path("backup")
    _, before = first_copy(ferryd, volumes, image, target)
    shutil.copy(image, backup)
    write(image, 3 * MiB, 64 * KiB, 9)
    copied_again(ferryd, volumes, image, target, before)
    shutil.copy(backup, image)
    shown, _ = copied_again(ferryd, volumes, image, target, before)
    assert "checksum" in kinds(shown), shown


def test_another_run_over_the_same_target_breaks_the_chain(ferryd, volumes, image):
    target = volumes.path("target")
    first, before = first_copy(ferryd, volumes, image, target)
    ferryd.clone(volumes.file(SIZE), target, options=["--overwrite"])
    daemon = storage_daemon(volumes, image, "qcow2", before)
    refused = ferryd.ctl("clone", *AGAIN, named(daemon), target, expect=4)
    assert "was the last to write to this target" in refused.error, refused.error
    assert "has written to its target since" in ferryd.ctl("sync", first, expect=1).error


def test_a_cancelled_increment_is_gone_on_from(ferryd, volumes, image):
    target = volumes.path("target")
    _, before = first_copy(ferryd, volumes, image, target)
    write(image, 6 * MiB, 4 * MiB, 9)
    daemon = storage_daemon(volumes, image, "qcow2", before)
    run = ferryd.start_clone(named(daemon), target, options=[*AGAIN, "--rate", "4M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 0)
    ferryd.ctl("cancel", run)
    shown = ferryd.clone(named(daemon), target, options=AGAIN)
    assert "checksum" not in kinds(shown) and shown["bytes_copied"] <= 4 * MiB, shown
    daemon.shut_down()
    assert target.read_bytes() == raw_content(image)


def test_it_goes_with_the_last_run_that_is_forgotten(ferryd, volumes, image):
    target = volumes.path("target")
    daemon = storage_daemon(volumes, image, "qcow2")
    first = ferryd.clone(named(daemon), target, options=STILL)["id"]
    second = ferryd.clone(named(daemon), target, options=AGAIN)["id"]
    ferryd.ctl("forget", first)
    assert len(daemon.bitmaps()) == 1
    ferryd.ctl("forget", second)
    daemon.assert_clean()


def test_what_cannot_be_is_refused(ferryd, volumes, image):
    target = volumes.path("target")
    daemon = storage_daemon(volumes, image, "qcow2")
    daemon.command("block-dirty-bitmap-add", node="disk0", name="theirs", persistent=True)

    def refused(source, words, status=4):
        result = ferryd.ctl("clone", *STILL, source, target, expect=status)
        assert words in result.error, result.error

    refused(named(daemon, "theirs"), "is another program's")
    refused(daemon.source("file0", bitmap="nightly"), "only qcow2 keeps bitmaps")
    refused(named(daemon, "-x"), "begins with a letter", status=2)
    assert daemon.bitmaps() == ["theirs"]


def test_a_guest_that_is_moved_has_none(ferryd, volumes):
    guest = BootGuest(volumes, images=[qcow2(volumes, volumes.sparse(24 * MiB, []))], driver="qcow2")
    result = ferryd.ctl("migrate", named(guest), volumes.path("target"), expect=4)
    assert "a guest that is moved leaves its bitmaps behind" in result.error, result.error
