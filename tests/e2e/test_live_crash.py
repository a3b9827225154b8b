# SPDX-License-Identifier: Apache-2.0
"""A live run whose ferryd is killed or stopped: it goes on without a scan, nothing stays frozen, and at the cutover
source and target are the same. A tracker that may have missed something leads to a checksum pass.

BLOCKFERRY_CRASH_ROUNDS says how many kills in all.
"""
import json
import os
import signal
import time
from pathlib import Path

import pytest

from harness.ferryd import ENDED, ask_for_cutover
from harness.live import COMPARE, LiveVolume, Loaded, Probe
from harness.volumes import Loop, MiB, run
from harness.waiting import TIME_SCALE, wait_until

KILLS = int(os.environ.get("BLOCKFERRY_CRASH_ROUNDS", "8"))
FREEZE_SECONDS_MAX = 8


def kinds_of(shown):
    return [each["kind"] for each in shown["passes"]]


def start(ferryd, volume, freeze_seconds_max=FREEZE_SECONDS_MAX):
    return ferryd.start_clone(volume.source, volume.target, options=[
        "--overwrite", "--cutover", "manual", "--max-freeze", f"{freeze_seconds_max}s", "--max-downtime", "1s",
        "--cutover-cmd", COMPARE])


def pins_of(ferryd):
    """The directory of the only run's pins."""
    state = Path("/sys/fs/bpf/blockferry", (ferryd.state_dir / "tracker-id").read_text())
    directories = list(state.iterdir())
    assert len(directories) == 1, directories
    return directories[0]


def test_kill_at_any_instant(ferryds, volumes):
    ferryd = ferryds("--checkpoint-interval", "300ms")
    volume = LiveVolume(volumes, "loop512", "ext4", size=192 * MiB)
    kills = 0
    with Loaded(volume, volumes.random.randrange(2**32), direct_rate="10m"), Probe(volume.mount) as probe:
        while kills < KILLS:
            name = start(ferryd, volume)
            killed = []
            for instant in volumes.random.choices(("copying", "tracking", "cutover", "cutover"), k=3):
                if instant != "copying":
                    shown = ferryd.wait_state(name, "tracking", "cutting-over", *ENDED)
                    if shown["state"] in ENDED:
                        break
                asking = ask_for_cutover(ferryd, name) if instant == "cutover" else None
                time.sleep(volumes.random.random() * (0.5 if instant == "copying" else 0.25))  # any moment of it
                ferryd.kill()
                killed.append(instant)
                if asking:
                    asking.join(30)
                ferryd.start()
            kills += len(killed)
            print(f"killed while {killed}")
            if ferryd.show(name)["state"] not in ENDED:
                ferryd.wait_state(name, "tracking", "cutting-over", *ENDED)
                ask_for_cutover(ferryd, name).join(30)
            shown = ferryd.wait_end(name)
            assert "checksum" not in kinds_of(shown), "it scanned"
            assert shown["verify"]["mismatches"] in (0, None)
    assert probe.longest < (FREEZE_SECONDS_MAX + 1) * TIME_SCALE
    volume.check_target()


def test_a_ferryd_that_is_stopped_while_frozen(ferryd, volumes):
    """The guard lets go in time, and grants no hand-over afterwards. Ctrl-Z on ferryd's terminal is not for it."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    pid = ferryd.process.pid
    with Probe(volume.mount) as probe:
        name = ferryd.start_clone(volume.source, volume.target, options=[
            "--max-freeze", "2s", "--cutover-cmd", f"kill -TSTP $PPID; kill -STOP {pid}; sleep 60"])
        wait_until(lambda: probe.waits() > 0.5, what="the freeze")
        wait_until(lambda: probe.waits() < 0.5, 5, "the end of the freeze")
        assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "ferryd does not see to it itself"
        assert probe.longest < 3 * TIME_SCALE
        os.kill(pid, signal.SIGCONT)
        shown = ferryd.wait_end(name, "rolled-back")
    assert "--max-freeze" in shown["error"]["message"]


@pytest.fixture
def cgroup(volumes):
    """One of version 2, of the test's own."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[words.index("-") + 1] == "cgroup2":
            made = Path(words[4], f"blockferry-{volumes.directory.name}")
            made.mkdir()
            volumes.at_end(made.rmdir)
            return made
    pytest.skip("this machine has no cgroups of version 2")


@pytest.mark.parametrize("fate", ["freeze", "kill"])
def test_the_guard_does_not_share_the_fate_of_ferryds_cgroup(ferryd, volumes, cgroup, fate):
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    volumes.at_end(lambda: run("fsfreeze", "--unfreeze", volume.mount, check=False))
    (cgroup / "cgroup.procs").write_text(str(ferryd.process.pid))
    with Probe(volume.mount) as probe:
        name = ferryd.start_clone(volume.source, volume.target, options=[
            "--max-freeze", "2s", "--cutover-cmd", f"echo 1 > {cgroup}/cgroup.{fate}; sleep 60"])
        if fate == "freeze":
            wait_until(lambda: probe.waits() > 0.5, what="the freeze")
        else:
            wait_until(lambda: ferryd.process.poll() is not None, 30, "ferryd's end")
        before = len(probe.usual)
        wait_until(lambda: len(probe.usual) > before + 5, 5, "the end of the freeze")
        assert probe.longest < 3 * TIME_SCALE
        if fate == "freeze":
            assert "frozen 1" in (cgroup / "cgroup.events").read_text(), "ferryd does not see to it itself"
            (cgroup / "cgroup.freeze").write_text("0")
        else:
            ferryd.kill()
            ferryd.start()
        ferryd.wait_end(name, "rolled-back")


def test_a_guard_that_is_killed(ferryd, volumes):
    """Nothing stays frozen, and what it had not granted is not handed over."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    with Probe(volume.mount) as probe:
        name = ferryd.start_clone(volume.source, volume.target, options=[
            "--max-freeze", "20s", "--cutover-cmd", "kill -KILL $PPID"])
        shown = ferryd.wait_end(name, "rolled-back")
        before = len(probe.usual)
        wait_until(lambda: len(probe.usual) > before + 5, 5, "writes after it")
    assert "guard" in shown["error"]["message"]


def test_a_guard_that_was_stopped_grants_nothing_afterwards(ferryd, volumes):
    """It is ended before the source is released without it."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    said = volumes.path("guard")
    name = ferryd.start_clone(volume.source, volume.target, options=[
        "--max-freeze", "1s", "--cutover-cmd", f"echo $PPID > {said}; kill -STOP $PPID"])
    ferryd.wait_end(name, "rolled-back", seconds=90)
    assert not Path("/proc", said.read_text().strip()).exists()


def test_a_ferryd_that_is_stopped_at_any_instant_of_a_cutover(ferryd, volumes):
    volume = LiveVolume(volumes, "loop512", "xfs")
    pid = ferryd.process.pid
    with Loaded(volume, volumes.random.randrange(2**32), direct_rate="10m"), Probe(volume.mount) as probe:
        for _ in range(max(2, KILLS // 4)):
            name = start(ferryd, volume, 2)
            ferryd.wait_state(name, "tracking")
            asking = ask_for_cutover(ferryd, name)
            time.sleep(volumes.random.random() * 0.3)  # any moment of it
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2.2)  # longer than anything may stay frozen; the load catches up afterwards
            wait_until(lambda: probe.waits() < 0.5, 5, "the end of the freeze")
            assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "ferryd does not see to it itself"
            os.kill(pid, signal.SIGCONT)
            asking.join(30)
            shown = ferryd.wait_for(name, lambda shown: shown["state"] in ENDED)
            # Rolled back where the compare command was running.
            assert shown["state"] in ("completed", "rolled-back"), shown
    assert probe.longest < 4 * TIME_SCALE


def forced_counter(pins):
    counters = ["1"] + ["0"] * 47
    run("bpftool", "map", "update", "pinned", pins / "counters", "key", "0", "0", "0", "0", "value", *counters)


LOSSES = {
    "a pin removed": lambda pins: (pins / "marks").unlink(),
    "a link detached": lambda pins: (pins / "on_bio_complete").unlink(),
    "all pins removed": lambda pins: run("rm", "-r", pins),
    "writes missed": forced_counter,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tracker_that_missed_something_while_nobody_was_there(ferryd, volumes, loss):
    volume = LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)
    with Loaded(volume, volumes.random.randrange(2**32), direct_rate="10m"):
        name = start(ferryd, volume)
        ferryd.wait_state(name, "tracking")
        ferryd.kill()
        LOSSES[loss](pins_of(ferryd))
        time.sleep(0.3)  # writes that nobody sees
        ferryd.start()
        ferryd.wait_state(name, "tracking")
        ask_for_cutover(ferryd, name).join(30)
        shown = ferryd.wait_end(name)
    assert "checksum" in kinds_of(shown)
    assert shown["verify"]["mismatches"] == 0
    volume.check_target()


def backing_file(volume):
    return Path(f"/sys/block/{os.path.basename(volume.device)}/loop/backing_file").read_text().strip()


def test_a_disk_that_was_taken_away_meanwhile(ferryd, volumes):
    """Another one bears its name, with the same content and some more: no tracker has seen that."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)
    name = start(ferryd, volume)
    ferryd.wait_state(name, "tracking")
    ferryd.kill()
    run("umount", volume.mount)
    loop = Loop(volume.device, backing_file(volume))
    volumes.reattach(loop, loop.file)
    run("mount", volume.device, volume.mount)
    (volume.mount / "late").write_bytes(volumes.data(MiB))
    os.sync()
    ferryd.start()
    ferryd.wait_state(name, "tracking")
    ask_for_cutover(ferryd, name).join(30)
    shown = ferryd.wait_end(name)
    assert "checksum" in kinds_of(shown) and shown["verify"]["mismatches"] == 0
    volume.check_target()


def test_a_disk_that_grows_meanwhile(ferryd, volumes):
    """What the run copies is no longer the volume: it says so."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    name = start(ferryd, volume)
    ferryd.wait_state(name, "tracking")
    os.truncate(backing_file(volume), 80 * MiB)
    run("losetup", "--set-capacity", volume.device)
    shown = ferryd.wait_end(name, "failed")
    assert "another size" in shown["error"]["message"]


def test_a_tracker_that_misses_something_meanwhile(ferryd, volumes):
    volume = LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)
    with Loaded(volume, volumes.random.randrange(2**32), direct_rate="10m"):
        name = start(ferryd, volume)
        ferryd.wait_state(name, "tracking")
        forced_counter(pins_of(ferryd))
        ferryd.wait_for(name, lambda shown: "checksum" in kinds_of(shown))
        shown = ferryd.wait_for(name, lambda shown: shown["state"] == "tracking" and shown["warning"])
        assert shown["tracker_losses"]["records_refused"] == 1 and "could not see 1 writes" in shown["warning"]
        ask_for_cutover(ferryd, name).join(30)
        ferryd.wait_end(name)
    volume.check_target()


def test_a_tracker_without_room_for_records(ferryd, volumes):
    """As if its map held no more than the writes that stand there."""
    volume = LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)
    name = start(ferryd, volume)
    ferryd.wait_state(name, "tracking")
    pinned = pins_of(ferryd) / "records"
    shown = json.loads(run("bpftool", "--json", "map", "show", "pinned", pinned))
    batch = volumes.path("batch")
    value = " ".join(["1"] * 24 + ["0"] * (shown["bytes_value"] - 24))  # a bucket of three that are no bios
    with open(batch, "w", encoding="ascii") as file:
        for number in range(shown["max_entries"]):
            key = " ".join(str(byte) for byte in number.to_bytes(shown["bytes_key"], "little"))
            file.write(f"map update pinned {pinned} key {key} value {value}\n")
    run("bpftool", "batch", "file", batch, check=False)  # until it is full, or the tracker is replaced
    with Loaded(volume, volumes.random.randrange(2**32), direct_rate="10m"):
        ferryd.wait_for(name, lambda shown: "checksum" in kinds_of(shown))
        shown = ferryd.wait_state(name, "tracking")
        assert shown["tracker_losses"]["records_refused"] > 0
        ask_for_cutover(ferryd, name).join(30)
        ferryd.wait_end(name)
    volume.check_target()


def test_the_audit_finds_a_write_that_nobody_told_of(ferryd, volumes):
    """The backing file of the loop device is written: no tracker of the device can know."""
    size = 64 * MiB
    volume = LiveVolume(volumes, "loop512", "ext4", size=size)
    name = start(ferryd, volume)
    ferryd.wait_state(name, "tracking")
    with open(backing_file(volume), "r+b") as file:
        file.seek(size - 8 * MiB)  # where nothing is yet
        file.write(b"behind the tracker's back")
    shown = ferryd.wait_for(name, lambda shown: shown["audit"]["misses"] > 0)
    assert shown["audit"]["misses"] == 1
    shown = ferryd.wait_for(name, lambda shown: "checksum" in kinds_of(shown) and shown["warning"])
    assert "audit" in shown["warning"]
    ask_for_cutover(ferryd, name).join(30)
    ferryd.wait_end(name)  # by then source and target are the same
    volume.check_target()


def test_pins_go_with_the_run_and_not_with_anothers(ferryds, volumes):
    one, other = ferryds(), ferryds()
    volume = LiveVolume(volumes, "loop512", "ext4", size=64 * MiB)
    target = volumes.loop(64 * MiB)
    first = one.start_clone(volume.source, volume.target, options=["--cutover", "manual"])
    second = other.start_clone(volume.source, target, options=["--cutover", "manual"])
    for ferryd, name in ((one, first), (other, second)):
        ferryd.wait_state(name, "tracking")
    pins, others = pins_of(one), pins_of(other)
    one.kill()
    other.restart()
    assert pins.exists(), "another ferryd's pins are not its to remove"
    one.start()
    for ferryd, name, left in ((one, first, pins), (other, second, others)):
        ferryd.ctl("cancel", name)
        ferryd.wait_end(name, "cancelled")
        wait_until(lambda: not left.exists(), what="the end of the pins")
