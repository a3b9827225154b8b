# SPDX-License-Identifier: Apache-2.0
"""The cutover as the user asks for it: by hand, rehearsed, with commands, handed over or rolled back."""
import errno
import os
import time

import pytest

from harness.ferryd import ENDED
from harness.live import COMPARE, LiveVolume, Loaded, Probe
from harness.volumes import MiB, need, run
from harness.waiting import TIME_SCALE, wait_until


@pytest.fixture
def ext4(volumes):
    return LiveVolume(volumes, "loop512", "ext4", size=128 * MiB)


def tracked(ferryd, volume, *options):
    """A run that waits for its cutover."""
    name = ferryd.start_clone(volume.source, volume.target, options=["--cutover", "manual", *options])
    ferryd.wait_state(name, "tracking")
    return name


def test_manual_waits_and_keeps_up(ferryd, volumes, ext4):
    name = tracked(ferryd, ext4)
    before = ferryd.show(name)["bytes_copied"]
    content = volumes.data(MiB)
    with open(ext4.mount / "late", "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    ferryd.wait_for(name, lambda shown: shown["bytes_copied"] >= before + MiB)
    assert ferryd.show(name)["state"] == "tracking"
    shown = ferryd.ctl("cutover", name, "--json").json
    assert shown["state"] == "completed" and shown["downtime_ms"] > 0
    copy = volumes.mount(ext4.target, "ext4", "ro,noload")
    assert (copy / "late").read_bytes() == content


def test_a_rehearsal_changes_nothing_but_tells_the_pause(ferryd, ext4, volumes):
    name = tracked(ferryd, ext4, "--cutover-cmd", COMPARE)
    with Loaded(ext4, 1):
        said = ferryd.ctl("cutover", name, "--rehearse").stdout
        assert said.startswith("rehearsed: a pause of ")
        shown = ferryd.show(name)
        assert shown["state"] == "tracking"
        assert shown["pause"]["rehearsal"] and shown["pause"]["command_ms"] == 0
        assert shown["downtime_ms"] >= shown["pause"]["freeze_ms"] > 0
        shown = ferryd.ctl("cutover", name, "--json").json
    assert shown["state"] == "completed" and not shown["pause"]["rehearsal"]
    ext4.check_target()


def test_a_cutover_command_that_fails_rolls_back(ferryd, ext4):
    result = ferryd.ctl("clone", ext4.source, ext4.target, "--cutover-cmd", "echo no such host >&2; exit 3", expect=1)
    assert "no such host" in result.stderr and "status 3" in result.stderr
    assert ferryd.ctl("list", "--json").json[-1]["state"] == "rolled-back"
    (ext4.mount / "file").write_text("goes on")
    os.sync()


def test_the_commands_know_what_it_is_about(ferryd, ext4, volumes):
    said = volumes.path("said")
    shown = ferryd.clone(ext4.source, ext4.target, options=[
        "--name", "told", "--cutover-cmd", f'echo "$BLOCKFERRY_RUN $BLOCKFERRY_SOURCE $BLOCKFERRY_TARGET" > {said}'])
    assert said.read_text().split() == [shown["id"], str(ext4.source), str(ext4.target)]


def test_the_cutover_command_may_mount_the_target(ferryd, ext4, volumes):
    where = volumes.path("new")
    where.mkdir()
    (ext4.mount / "precious").write_text("here")
    # The filesystem's twin is mounted: it has the same UUID.
    shown = ferryd.clone(ext4.source, ext4.target, options=["--cutover-cmd", f'mount -o ro,noload "$BLOCKFERRY_TARGET" {where}'])
    try:
        assert (where / "precious").read_text() == "here"
        assert shown["verify"]["mismatches"] == 0
    finally:
        run("umount", where)


def test_quiesce_and_resume_by_command(ferryd, ext4, volumes):
    """The commands unmount and mount: nothing of ferryd's keeps them from it."""
    said = volumes.path("said")
    shown = ferryd.clone(ext4.source, ext4.target, options=[
        "--quiesce-cmd", f"umount {ext4.mount} && echo quiesced >> {said}",
        "--resume-cmd", f"mount {ext4.source} {ext4.mount} && echo resumed >> {said}"])
    assert shown["state"] == "completed" and shown["downtime_ms"] > 0
    assert said.read_text().split() == ["quiesced", "resumed"]
    ext4.check_target()


def test_a_quiesce_command_that_fails_is_undone_and_told(ferryd, ext4, volumes):
    said = volumes.path("said")
    name = tracked(ferryd, ext4, "--quiesce-cmd", "echo busy; false", "--resume-cmd", f"echo resumed >> {said}")
    ferryd.ctl("cutover", name, "--detach")
    shown = ferryd.wait_for(name, lambda shown: shown["warning"])
    assert "busy" in shown["warning"] and shown["state"] == "tracking"
    assert said.read_text().split() == ["resumed"]
    ferryd.ctl("cancel", name)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_migrate_fences_the_source(ferryd, volumes, filesystem):
    """Writers that wait while it is handed over get errors: nothing is acknowledged on the old disk any more."""
    volume = LiveVolume(volumes, "loop512", filesystem)
    path = volume.mount / "log"
    acknowledged = []
    with open(path, "ab", buffering=0) as log:
        process = ferryd.spawn_ctl("migrate", str(volume.source), str(volume.target), "--json", "--max-downtime", "5s",
                                   "--cutover-cmd", COMPARE)
        failure = None
        while failure is None:
            try:
                log.write(f"{len(acknowledged):09}\n".encode())
                os.fsync(log.fileno())
                acknowledged.append(len(acknowledged))
            except OSError as error:
                failure = error
    assert failure.errno in (errno.EIO, errno.EROFS, errno.ESHUTDOWN), failure
    assert process.wait(60) == 0
    process.communicate()
    run("umount", volume.mount)
    copy = volumes.mount(volume.target, filesystem, "nouuid" if filesystem == "xfs" else None)
    lines = (copy / "log").read_text().split()
    assert lines[:len(acknowledged)] == [f"{each:09}" for each in acknowledged], "an acknowledged write is lost"
    assert len(lines) <= len(acknowledged) + 1
    run("umount", copy)
    volume.check_target()


def test_migrate_rolls_back_as_a_whole(ferryd, ext4):
    result = ferryd.ctl("migrate", ext4.source, ext4.target, "--cutover-cmd", "exit 1", expect=1)
    assert "status 1" in result.stderr
    (ext4.mount / "file").write_text("not fenced")
    os.sync()


def test_a_hand_over_that_ferryd_did_not_live_to_record(ferryd, ext4, volumes):
    """The mark that the guard left says so; nothing of the target is touched any more."""
    name = tracked(ferryd, ext4, "--cutover-cmd", f"kill -STOP {ferryd.process.pid}; sleep 0.2")
    try:
        ferryd.request("POST", f"/v1/runs/{name}/cutover", timeout=1)
    except OSError:
        pass
    pins = os.path.join("/sys/fs/bpf/blockferry", (ferryd.state_dir / "tracker-id").read_text())
    wait_until(lambda: any("handed-over" in names for _, names, _ in os.walk(pins)), what="the hand-over's mark")
    ferryd.kill()
    copy = volumes.mount(ext4.target, "ext4")  # it is in use already
    ferryd.start()
    shown = ferryd.wait_end(name)
    assert shown["error"] is None
    wait_until(lambda: not os.path.exists(pins), what="the end of the pins")
    assert os.path.ismount(copy)


def test_a_sync_without_a_freeze(ferryd, volumes, ext4):
    name = ferryd.clone(ext4.source, ext4.target, options=["--keep"])["id"]
    before = ferryd.show(name)
    (ext4.mount / "later").write_bytes(volumes.data(MiB))
    os.sync()
    result = ferryd.ctl("sync", name, "--unfrozen")
    assert "not frozen" in result.stdout
    shown = ferryd.show(name)
    assert shown["state"] == "completed" and shown["unfrozen"] and shown["pause"] == before["pause"]
    assert MiB <= shown["bytes_copied"] - before["bytes_copied"] < 8 * MiB
    with Loaded(ext4, 5, direct_rate="1m"):
        ferryd.ctl("sync", name, "--unfrozen")
        shown = ferryd.ctl("sync", name, "--json").json
    assert not shown["unfrozen"] and shown["downtime_ms"] != before["downtime_ms"]
    assert "checksum" not in [each["kind"] for each in shown["passes"]]
    ext4.check_target()


def test_a_device_mounted_twice_and_elsewhere(ferryd, volumes, ext4):
    """Mounts of one filesystem are frozen once; that of another namespace counts too."""
    again = volumes.path("again")
    again.mkdir()
    run("mount", "--bind", ext4.mount, again)
    volumes.at_end(lambda: run("umount", again))
    with Loaded(ext4, 3):
        ferryd.clone(ext4.source, ext4.target, options=["--cutover-cmd", COMPARE])
    ext4.check_target()


def test_a_swap_file_on_it_is_refused(ferryd, volumes, ext4):
    """It is written even while the filesystem is frozen."""
    swap = ext4.mount / "swap"
    swap.write_bytes(bytes(4 * MiB))
    swap.chmod(0o600)
    run("mkswap", swap)
    run("swapon", swap)
    try:
        result = ferryd.ctl("clone", ext4.source, ext4.target, expect=4)
        assert f"swap file {swap}" in result.stderr and "swapoff" in result.stderr
    finally:
        run("swapoff", swap)
    ferryd.clone(ext4.source, ext4.target)


def test_one_device_of_several_of_a_btrfs_is_refused(ferryd, volumes):
    need("mkfs.btrfs")
    devices = [volumes.loop(128 * MiB) for _ in range(2)]
    run("mkfs.btrfs", "--quiet", *devices)
    volumes.mount(devices[0], "btrfs")
    for device in devices:
        result = ferryd.ctl("clone", device, volumes.loop(128 * MiB), expect=4)
        assert "several devices" in result.stderr


def test_a_filesystem_that_somebody_else_has_frozen_stays_frozen(ferryd, ext4):
    run("fsfreeze", "--freeze", ext4.mount)
    try:
        name = ferryd.start_clone(ext4.source, ext4.target)
        shown = ferryd.wait_for(name, lambda shown: shown["warning"])
        assert "somebody else has frozen it" in shown["warning"]
        ferryd.ctl("cancel", name)
        done = os.system(f"fsfreeze --freeze {ext4.mount} 2>/dev/null")
        assert done != 0, "it was thawed"
    finally:
        run("fsfreeze", "--unfreeze", ext4.mount)


def test_state_and_log_on_the_frozen_filesystem(ferryds, volumes, ext4):
    """ferryd's own files wait like everybody's, and the cutover does not wait for them."""
    ferryd = ferryds(state_dir=ext4.mount / "state")
    with Probe(ext4.mount) as probe:
        shown = ferryd.clone(ext4.source, ext4.target, options=["--cutover-cmd", "sleep 1; " + COMPARE])
    assert shown["state"] == "completed"
    assert 1 < probe.longest < 5 * TIME_SCALE


def test_a_run_that_does_not_converge_says_so_and_takes_advice(ferryd, ext4):
    with Loaded(ext4, 5, direct_rate="30m"):
        name = ferryd.start_clone(ext4.source, ext4.target, options=["--max-downtime", "1ms"])
        shown = ferryd.wait_for(name, lambda shown: shown["warning"] and "converge" in shown["warning"])
        assert "/s are written" in shown["warning"] and "ferryctl set" in shown["warning"]
        assert shown["predicted_downtime_ms"] > 1 and shown["dirty_bytes_per_second"] > 0
        ferryd.ctl("set", name, "--max-downtime", "2s")
        shown = ferryd.wait_end(name)
    assert shown["downtime_ms"] < 2000 * TIME_SCALE
    ext4.check_target()


def test_when_the_passes_are_spent_the_run_waits(ferryd, ext4):
    with Loaded(ext4, 5, direct_rate="30m"):
        name = ferryd.start_clone(ext4.source, ext4.target, options=["--max-downtime", "1ms", "--max-passes", "3"])
        ferryd.wait_state(name, "tracking")
        ferryd.ctl("cutover", name)
    ext4.check_target()


def test_pause_resume_and_cancel_while_tracking(ferryd, ext4):
    name = tracked(ferryd, ext4)
    ferryd.ctl("pause", name)
    ferryd.wait_state(name, "paused")
    assert ferryd.ctl("cutover", name, expect=1).stderr
    (ext4.mount / "meanwhile").write_bytes(b"x" * MiB)
    ferryd.ctl("resume", name)
    ferryd.wait_state(name, "tracking")
    ferryd.ctl("cancel", name)
    ferryd.wait_end(name, "cancelled")
    ferryd.ctl("resume", name, "--json")  # its tracker is gone: everything is compared
    shown = ferryd.wait_state(name, "tracking")
    assert "checksum" in [each["kind"] for each in shown["passes"]]
    ferryd.ctl("cutover", name)
    ext4.check_target()


def test_a_kept_run_synchronizes_by_itself(ferryd, ext4, volumes):
    shown = ferryd.clone(ext4.source, ext4.target, options=["--keep", "--sync-every", "1s", "--name", "kept"])
    first = shown["ended_at"]
    content = volumes.data(MiB)
    (ext4.mount / "late").write_bytes(content)
    os.sync()
    shown = ferryd.wait_for("kept", lambda shown: shown["state"] == "completed" and shown["ended_at"] > first + 1.5)
    assert "checksum" not in [each["kind"] for each in shown["passes"]], "it scanned"
    ferryd.stop()
    copy = volumes.mount(ext4.target, "ext4", "ro,noload")
    assert (copy / "late").read_bytes() == content
    run("umount", copy)
    ferryd.start()


def test_a_kept_run_of_a_source_that_is_idle_by_now(ferryd, ext4, volumes):
    ferryd.clone(ext4.source, ext4.target, options=["--keep", "--name", "kept"])
    (ext4.mount / "late").write_text("before it was unmounted")
    run("umount", ext4.mount)
    shown = ferryd.ctl("sync", "kept", "--json").json
    assert "checksum" not in [each["kind"] for each in shown["passes"]], "it scanned"
    copy = volumes.mount(ext4.target, "ext4", "ro,noload")
    assert (copy / "late").read_text() == "before it was unmounted"


def test_kept_runs_copy_only_what_changed(ferryd, ext4, volumes):
    shown = ferryd.clone(ext4.source, ext4.target, options=["--keep", "--name", "kept"])
    first = shown["bytes_copied"]
    for _ in range(3):
        with Loaded(ext4, volumes.random.randrange(2**32), direct_rate="5m"):
            pass
        shown = ferryd.ctl("sync", "kept", "--json").json
        assert shown["state"] == "completed" and shown["verify"]["mismatches"] == 0
        assert "checksum" not in [each["kind"] for each in shown["passes"]], "it scanned"
        ext4.check_target()
    assert shown["bytes_copied"] - first < 3 * 96 * MiB
    ferryd.restart()
    (ext4.mount / "after").write_text("a restart")
    os.sync()
    shown = ferryd.ctl("sync", "kept", "--json").json
    assert "checksum" not in [each["kind"] for each in shown["passes"]], "it scanned"
    copy = volumes.mount(ext4.target, "ext4", "ro,noload")
    assert (copy / "after").read_text() == "a restart"
