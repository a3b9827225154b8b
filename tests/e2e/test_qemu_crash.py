# SPDX-License-Identifier: Apache-2.0
"""ferryd is killed while it clones or moves a guest's disk: the guest is running again at once, the run goes on without a
scan, and QEMU is left clean.

BLOCKFERRY_CRASH_ROUNDS says how many kills of clones in all; half as many are of moves.
"""
import os
import shlex
import signal
import time

from harness.ferryd import ENDED, ask_for_cutover
from harness.guest import DISK, BootGuest
from harness.waiting import wait_until

KILLS = int(os.environ.get("BLOCKFERRY_CRASH_ROUNDS", "6"))
INSTANTS = ("copying", "tracking", "cutover", "cutover")


def kill_at(ferryd, run, instant, random):
    """False: the run had ended before."""
    if instant != "copying":
        if ferryd.wait_state(run, "tracking", "cutting-over", *ENDED)["state"] in ENDED:
            return False
    asking = ask_for_cutover(ferryd, run) if instant == "cutover" else None
    time.sleep(random.random() * 0.4)  # any moment of it
    ferryd.kill()
    if asking:
        asking.join(30)
    return True


def removed(guest, name):
    try:
        guest.command("block-dirty-bitmap-remove", node="disk0", name=name)
    except AssertionError:  # an export that goes still uses it
        pass
    return name not in guest.bitmaps()


def finish(ferryd, run):
    if ferryd.show(run)["state"] not in ENDED:
        ferryd.wait_state(run, "tracking", "cutting-over", *ENDED)
        ask_for_cutover(ferryd, run).join(30)
    return ferryd.wait_end(run)


def test_kill_at_any_instant_of_a_clone(ferryds, volumes):
    ferryd = ferryds("--checkpoint-interval", "300ms")
    guest = BootGuest(volumes)
    kills = 0
    while kills < KILLS:
        still, target = volumes.path("still"), volumes.path("target")
        run = ferryd.start_clone(guest.source(), target, options=[
            "--cutover", "manual", "--rate", "40M",
            "--cutover-cmd", f"cp {shlex.quote(str(guest.serial))} {shlex.quote(str(still))}"])
        for instant in volumes.random.choices(INSTANTS, k=3):
            if not kill_at(ferryd, run, instant, volumes.random):
                break
            kills += 1
            print(f"kill {kills}: {instant}")
            wait_until(guest.running, 12, "the guest to go on")
            guest.wait_for_writes(1)
            ferryd.start()
        shown = finish(ferryd, run)
        assert not any(each["kind"] == "checksum" for each in shown["passes"]), shown
        guest.assert_holds(target, guest.acknowledged(still))
        guest.assert_clean()
        target.unlink()


def test_kill_at_any_instant_of_a_move(ferryds, volumes):
    """The run ends with the guest on the target, and nothing of what it was told is lost."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    kills = 0
    while kills < max(3, KILLS // 2):
        guest = BootGuest(volumes)
        target = volumes.path("target")
        run = ferryd.ctl("migrate", "--json", "--detach", "--cutover", "manual", guest.source(), target).json["id"]
        for instant in volumes.random.choices(INSTANTS, k=3):
            if not kill_at(ferryd, run, instant, volumes.random):
                break
            kills += 1
            print(f"kill {kills}: {instant}")
            wait_until(guest.running, 12, "the guest to go on")
            guest.wait_for_writes(1)
            ferryd.start()
        shown = finish(ferryd, run)
        assert shown["state"] == "completed" and shown["verify"]["mismatches"] == 0, shown
        assert not any(each["kind"] == "checksum" for each in shown["passes"]), shown
        old = guest.images[0].read_bytes()
        guest.wait_for_writes(3)
        assert guest.images[0].read_bytes() == old, "the old disk is idle"
        guest.assert_clean()
        guest.shut_down()
        guest.assert_holds(target, guest.acknowledged())
        guest.close()
        target.unlink()


def test_a_run_that_ended_while_ferryd_died_leaves_nothing(ferryds, volumes):
    """Bitmaps of a failed run wait for it to be resumed, and go when it is forgotten."""
    ferryd = ferryds()
    guest = BootGuest(volumes)
    run = ferryd.start_clone(guest.source(), volumes.path("target"), options=["--cutover", "manual"])
    ferryd.wait_state(run, "tracking")
    ferryd.kill()
    assert guest.bitmaps() and guest.exports(), "what the dead one left"
    ferryd.start()
    ferryd.wait_state(run, "tracking")
    ferryd.ctl("cancel", run)
    guest.assert_clean()


def test_the_lowest_bitmap_is_missed(ferryds, volumes):
    """Two took turns when ferryd died, and somebody removed the first: what is left looks whole by itself."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    guest = BootGuest(volumes)
    still, target = volumes.path("still"), volumes.path("target")
    run = ferryd.start_clone(guest.source(), target, options=[
        "--cutover", "manual", "--cutover-cmd", f"cp {shlex.quote(str(guest.serial))} {shlex.quote(str(still))}"])
    ferryd.wait_state(run, "tracking")
    ferryd.kill()
    last = max(guest.bitmaps(), key=lambda name: int(name.split("-")[-1]))
    guest.wait_for_writes(2)
    guest.command("block-dirty-bitmap-add", node="disk0", granularity=4096,
                  name=f"blockferry-{run}-{int(last.split('-')[-1]) + 1}")
    for name in guest.exports():
        guest.command("block-export-del", id=name, mode="hard")
    for name in guest.bitmaps():
        if int(name.split("-")[-1]) <= int(last.split("-")[-1]):
            wait_until(lambda: removed(guest, name), what=f"{name} to go")
    ferryd.start()
    shown = finish(ferryd, run)
    assert any(each["kind"] == "checksum" for each in shown["passes"]), shown
    guest.assert_holds(target, guest.acknowledged(still))
    guest.assert_clean()


def test_a_stopped_ferryd_does_not_keep_the_guest(ferryds, volumes):
    """SIGSTOP while the guest stands still: the guard lets it go, and what comes later is not handed over."""
    ferryd = ferryds()
    guest = BootGuest(volumes)
    target = volumes.path("target")
    marker = volumes.path("marker")
    run = ferryd.ctl("migrate", "--json", "--detach", "--cutover", "manual", "--max-freeze", "3s",
                     "--cutover-cmd", f"touch {marker}; sleep 60", guest.source(), target).json["id"]
    ferryd.wait_state(run, "tracking")
    asking = ask_for_cutover(ferryd, run)
    wait_until(marker.exists, 30, "the cutover command")
    assert not guest.running()
    ferryd.process.send_signal(signal.SIGSTOP)
    wait_until(guest.running, 12, "the guest to go on")
    guest.wait_for_writes(2)
    ferryd.process.send_signal(signal.SIGCONT)
    asking.join(30)
    shown = ferryd.wait_end(run, "rolled-back")
    assert "max-freeze" in shown["error"]["message"], shown
    guest.wait_for_writes(1)
    guest.assert_own_disk()
    guest.assert_clean()
    assert target.stat().st_size == DISK
