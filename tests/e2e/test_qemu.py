# SPDX-License-Identifier: Apache-2.0
"""Disks of running QEMU guests: cloned while they are written, moved to another disk under the guest, and QEMU as clean
afterwards as before."""
import json
import shlex
import signal
import socket
import threading

import pytest

from harness.guest import DISK, BootGuest
from harness.volumes import MiB
from harness.waiting import Stopwatch, wait_until

# Once only: what the guest has been told is written at the moment at which it stands still.
STILL = "cp {serial} {still}"


@pytest.fixture
def guest(volumes):
    return BootGuest(volumes)


def still_command(guest, volumes):
    """A cutover command, and the file in which it leaves what was acknowledged then."""
    still = volumes.path("still")
    return STILL.format(serial=shlex.quote(str(guest.serial)), still=shlex.quote(str(still))), still


def test_clone_is_of_one_moment_and_the_guest_goes_on(ferryd, volumes, guest):
    command, still = still_command(guest, volumes)
    target = volumes.path("target")
    shown = ferryd.clone(guest.source(), target, options=["--cutover-cmd", command])
    assert (shown["state"], shown["tracker"], shown["mode"]) == ("completed", "qemu", "hybrid"), shown
    assert shown["downtime_ms"] > 0 and shown["passes"][0]["kind"] == "full", shown
    assert shown["bytes_zeroed"] > 0, "holes are not read"
    guest.assert_holds(target, guest.acknowledged(still))
    guest.wait_for_writes(3)
    guest.assert_own_disk()
    guest.assert_clean()


def test_clone_verifies_after_the_release(ferryd, volumes, guest):
    target = volumes.path("target")
    shown = ferryd.clone(f"qemu:{guest.qmp}?device=vd0", target)
    assert shown["verify"]["granules"] == DISK // 4096 and shown["verify"]["mismatches"] == 0, shown
    guest.wait_for_writes(1)
    guest.assert_clean()


def test_a_disk_of_an_iothread_is_not_for_old_qemu(ferryd, volumes):
    guest = BootGuest(volumes, iothread=True)
    version = guest.command("query-version")["qemu"]
    old = (version["major"], version["minor"]) < (8, 2)
    result = ferryd.ctl("clone", guest.source(), volumes.path("target"), expect=4 if old else 0)
    assert not old or "served by an iothread" in result.error, result.error
    guest.wait_for_writes(3)
    guest.assert_clean()


def test_migrate_moves_the_guest_to_the_target(ferryd, volumes, guest):
    target = volumes.loop(DISK)
    shown = ferryd.ctl("migrate", "--json", guest.source(), target).json
    assert shown["state"] == "completed" and shown["downtime_ms"] > 0, shown
    old = guest.images[0].read_bytes()
    guest.wait_for_writes(5)
    assert guest.images[0].read_bytes() == old, "the old disk is idle"
    guest.assert_clean()
    guest.command("blockdev-del", **{"node-name": "disk0"})
    guest.command("quit")
    guest.process.wait(30)
    guest.assert_holds(target, guest.acknowledged())


def test_a_failing_cutover_command_leaves_the_guest_where_it_was(ferryd, volumes, guest):
    target = volumes.path("target")
    shown = ferryd.ctl("migrate", "--json", "--cutover-cmd", "false", guest.source(), target, expect=1).json
    assert shown["state"] == "rolled-back", shown
    guest.wait_for_writes(3)
    guest.assert_own_disk()
    assert guest.running()
    guest.assert_clean()


def test_a_guest_that_is_paused_stays_so(ferryd, volumes, guest):
    guest.command("stop")
    writes = guest.acknowledged()
    target = volumes.path("target")
    ferryd.clone(guest.source(), target)
    assert not guest.running() and guest.acknowledged() == writes
    guest.assert_holds(target, writes)
    guest.command("cont")
    guest.assert_clean()


class Agent:
    """As much of a guest agent as freezes and thaws; it says when, and whether the guest ran then."""

    def __init__(self, volumes, guest, refuses=False):
        self.path, self.said, self.guest, self.refuses = volumes.path("agent"), [], guest, refuses
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(1)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        volumes.at_end(self.listener.close)

    def _serve(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            try:
                with connection, connection.makefile("rb") as lines:
                    for line in lines:
                        connection.sendall(self._answer(json.loads(line.lstrip(b"\xff"))))
            except ConnectionError:  # whoever has heard enough just goes
                pass

    def _answer(self, request):
        answer = {"return": request.get("arguments", {}).get("id", 1)}
        if request["execute"] != "guest-sync":
            self.said.append((request["execute"].removeprefix("guest-fsfreeze-"), self.guest.running()))
            if self.refuses:
                answer = {"error": {"class": "GenericError", "desc": "no filesystem can be frozen"}}
        if "id" in request:
            answer["id"] = request["id"]
        return json.dumps(answer).encode() + b"\n"


def test_the_guest_agent_freezes_before_the_guest_stops(ferryd, volumes, guest):
    agent = Agent(volumes, guest)
    ferryd.clone(guest.source(agent=agent.path), volumes.path("target"))
    assert agent.said == [("freeze", True), ("thaw", True)]
    guest.wait_for_writes(1)
    guest.assert_clean()


def test_an_agent_that_refuses_is_told_and_the_guest_goes_on(ferryd, volumes, guest):
    agent = Agent(volumes, guest, refuses=True)
    run = ferryd.ctl("clone", "--json", "--detach", guest.source(agent=agent.path), volumes.path("target")).json["id"]
    shown = ferryd.wait_for(run, lambda shown: shown["warning"])
    assert "no filesystem can be frozen" in shown["warning"], shown
    assert agent.said[0] == ("freeze", True) and "thaw" not in dict(agent.said), agent.said
    guest.wait_for_writes(1)
    ferryd.ctl("cancel", run)
    guest.assert_clean()


def test_a_qemu_that_hangs_does_not_keep_cancel_waiting(ferryd, volumes, guest):
    """And when it goes on, what the run added is taken away all the same."""
    run = ferryd.ctl("clone", "--json", "--detach", "--rate", "4M", guest.source(), volumes.path("target")).json["id"]
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 0)
    guest.process.send_signal(signal.SIGSTOP)
    try:
        stuck = []

        def is_stuck():
            """For longer than the rate makes it wait between two requests."""
            shown = ferryd.show(run)
            stuck.append((shown["io_in_flight"], shown["bytes_copied"]))
            return stuck[-1][0] > 0 and stuck[-50:] == [stuck[-1]] * 50
        wait_until(is_stuck, what="a read that QEMU does not answer")
        watch = Stopwatch()
        ferryd.ctl("cancel", run)
        ferryd.wait_state(run, "cancelled")
        waited = watch.seconds()
    finally:
        guest.process.send_signal(signal.SIGCONT)
    assert waited < 5, "a second for what is in flight, and none of the ten that a command of QEMU's is waited for"
    guest.wait_for_writes(1)
    wait_until(lambda: guest.bitmaps() == [] and guest.exports() == [], what="a clean QEMU")
    guest.assert_clean()


def test_keep_and_sync_copy_only_what_was_written(ferryd, volumes, guest):
    target = volumes.path("target")
    run = ferryd.clone(guest.source(), target, options=["--keep"])["id"]
    assert len(guest.bitmaps()) == 1 and guest.exports() == []
    guest.wait_for_writes(3)
    before = ferryd.show(run)
    ferryd.ctl("sync", run)
    shown = ferryd.wait_end(run)
    added = shown["passes"][len(before["passes"]):]
    assert {each["kind"] for each in added} == {"incremental", "final"}, shown
    assert 0 < shown["bytes_copied"] - before["bytes_copied"] < 16 * MiB, "what the guest writes to, in two passes"
    ferryd.ctl("forget", run)
    guest.assert_clean()


def test_rehearsal_leaves_the_guest_as_it_was(ferryd, volumes, guest):
    target = volumes.path("target")
    run = ferryd.ctl("migrate", "--json", "--detach", "--cutover", "manual", guest.source(), target).json["id"]
    ferryd.wait_state(run, "tracking")
    ferryd.ctl("cutover", run, "--rehearse")
    shown = ferryd.wait_for(run, lambda shown: shown["pause"] is not None)
    assert shown["pause"]["rehearsal"] and shown["state"] != "completed", shown
    guest.wait_for_writes(2)
    ferryd.ctl("cancel", run)
    assert guest.running()
    guest.assert_clean()


def test_disks_of_one_guest_are_of_one_moment(ferryd, volumes):
    guest = BootGuest(volumes, disks=2)
    command, still = still_command(guest, volumes)
    targets = [volumes.path("target"), volumes.path("target")]
    pairs = [f"{guest.source(f'disk{i}')}={targets[i]}" for i in range(2)]
    shown = ferryd.ctl("clone", "--json", "--cutover-cmd", command, *pairs).json
    assert [each["state"] for each in shown] == ["completed"] * 2, shown
    for i in range(2):
        guest.assert_holds(targets[i], guest.acknowledged(still), disk=i)
    guest.wait_for_writes(4)
    guest.assert_clean()


def test_disks_of_one_guest_are_moved_together(ferryd, volumes):
    guest = BootGuest(volumes, disks=2)
    targets = [volumes.path("target"), volumes.path("target")]
    pairs = [f"{guest.source(f'disk{i}')}={targets[i]}" for i in range(2)]
    ferryd.ctl("migrate", "--json", *pairs)
    old = [image.read_bytes() for image in guest.images]
    guest.wait_for_writes(4)
    assert [image.read_bytes() for image in guest.images] == old
    guest.assert_clean()
    guest.command("quit")
    guest.process.wait(30)
    for i in range(2):
        guest.assert_holds(targets[i], guest.acknowledged(), disk=i)


def test_a_guest_that_is_switched_off_ends_the_run(ferryd, volumes, guest):
    target = volumes.path("target")
    run = ferryd.ctl("clone", "--json", "--detach", "--cutover", "manual", guest.source(), target).json["id"]
    ferryd.wait_state(run, "tracking")
    guest.power_off()
    shown = ferryd.wait_end(run, "failed")
    assert str(guest.qmp) in shown["error"]["message"], shown["error"]
    # Started anew, its bitmaps are gone: the checksums decide.
    again = BootGuest(volumes, images=guest.images)
    run_again = ferryd.ctl("clone", "--json", "--mode", "incremental", again.source(), target, expect=None)
    assert run_again.status in (0, 4), repr(run_again)
    again.wait_for_writes(1)
    again.assert_clean()


def test_a_bitmap_that_somebody_removed_means_a_checksum_pass(ferryd, volumes, guest):
    command, still = still_command(guest, volumes)
    target = volumes.path("target")
    run = ferryd.ctl("clone", "--json", "--detach", "--cutover", "manual", "--cutover-cmd", command, guest.source(),
                     target).json["id"]
    ferryd.wait_state(run, "tracking")

    def removed():
        for name in guest.bitmaps():
            try:
                guest.command("block-dirty-bitmap-remove", node="disk0", name=name)
                return True
            except AssertionError:
                return False

    wait_until(removed, what="a bitmap to be removed")
    shown = ferryd.wait_for(run, lambda shown: any(each["kind"] == "checksum" for each in shown["passes"])
                            or shown["state"] == "failed")
    if shown["state"] == "failed":  # it happened in the middle of a transaction
        ferryd.ctl("resume", run)
    ferryd.wait_for(run, lambda shown: shown["state"] == "tracking")
    ferryd.ctl("cutover", run)
    shown = ferryd.wait_end(run)
    assert any(each["kind"] == "checksum" for each in shown["passes"]), shown
    guest.assert_holds(target, guest.acknowledged(still))
    guest.assert_clean()


def test_a_snapshot_meanwhile_ends_the_run_and_resume_follows(ferryd, volumes, guest):
    command, still = still_command(guest, volumes)
    target = volumes.path("target")
    source = f"qemu:{guest.qmp}?device=vd0"
    run = ferryd.ctl("clone", "--json", "--detach", "--cutover", "manual", "--cutover-cmd", command, source,
                     target).json["id"]
    ferryd.wait_state(run, "tracking")
    guest.command("blockdev-snapshot-sync", **{"node-name": "disk0", "snapshot-file": str(volumes.path("overlay")),
                                               "snapshot-node-name": "overlay", "format": "qcow2"})
    shown = ferryd.wait_end(run, "failed")
    assert "a snapshot" in shown["error"]["message"], shown["error"]
    guest.wait_for_writes(2)
    ferryd.ctl("resume", run)
    ferryd.wait_state(run, "tracking")
    ferryd.ctl("cutover", run)
    shown = ferryd.wait_end(run)
    assert shown["passes"][-1]["kind"] == "final" and any(each["kind"] == "checksum" for each in shown["passes"]), shown
    guest.assert_holds(target, guest.acknowledged(still))
    guest.assert_clean()


def test_refusals_say_what_to_do(ferryd, volumes, guest):
    target = volumes.path("target")

    def refused(source, words, *options):
        result = ferryd.ctl("clone", *options, source, target, expect=4)
        assert words in result.error, result.error

    refused(guest.source("disk7"), "it has ")
    refused(f"qemu:{guest.qmp}?device=vd7", ", vd0")
    refused(f"qemu:{guest.qmp}-none?node=disk0", "is the guest switched off?")
    refused(guest.source(), "only --mode hybrid", "--mode", "full")
    result = ferryd.ctl("clone", guest.source(), guest.images[0], "--overwrite", expect=4)
    assert "it is the source itself" in result.error, result.error
    ferryd.ctl("clone", f"qemu:{guest.qmp}", target, expect=2)
    guest.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(guest.directory / "others")}})
    shown = ferryd.clone(guest.source(), target, expect=1)
    assert "it has one already" in shown["error"]["message"], shown
    guest.command("nbd-server-stop")
    ferryd.ctl("resume", shown["id"])
    ferryd.wait_end(shown["id"])
    guest.assert_clean()
