# SPDX-License-Identifier: Apache-2.0
"""Nodes of a qemu-storage-daemon: cloned, and moved to another disk under the guest whose disk it serves, which stays
connected."""
import os
import shlex
import time

import pytest

from harness.ferryd import ENDED, ask_for_cutover
from harness.guest import DISK, BootGuest, qcow2, storage_daemon, vhost_user_words
from harness.volumes import MiB
from harness.waiting import wait_until

# What a user's command would be: it tells the guest's QEMU, which the daemon knows nothing of.
TELL = """import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
lines = s.makefile("r")
lines.readline()
for command in ("qmp_capabilities", sys.argv[2]):
    s.sendall(json.dumps({"execute": command}).encode())
    while "return" not in json.loads(lines.readline()): pass
"""


@pytest.fixture
def raw(volumes):
    return volumes.sparse(DISK, [(8 * MiB, 4 * MiB)])


def served(volumes, image, driver="raw"):
    """A storage daemon, and a guest that writes to its disk."""
    socket = volumes.path("vhost")
    daemon = storage_daemon(volumes, image, driver, exported=socket)
    wait_until(socket.exists, what="the daemon's socket")
    return daemon, BootGuest(volumes, images=[image], words=vhost_user_words(socket))


def commands(guest):
    def tell(verb):
        return " ".join(shlex.quote(str(word)) for word in ("/usr/bin/python3", "-c", TELL, guest.qmp, verb))
    return ["--quiesce-cmd", tell("stop"), "--resume-cmd", tell("cont")]


def export_nodes(daemon):
    return {each["id"]: each["node-name"] for each in daemon.command("query-block-exports")}


def assert_moved(daemon, guest, run, image, target):
    assert export_nodes(daemon) == {"theirs": f"blockferry-{run}-disk"}, "and nothing of ours"
    wait_until(guest.running, 12, "the guest to go on")
    old = image.read_bytes()
    guest.wait_for_writes(5)
    assert image.read_bytes() == old, "the old disk is idle"
    assert daemon.bitmaps() == [] and daemon.command("query-jobs") == []
    daemon.command("blockdev-del", **{"node-name": "disk0"})
    guest.shut_down()
    daemon.shut_down()
    guest.assert_holds(target, guest.acknowledged())


def test_a_storage_daemon_needs_commands(ferryd, volumes, raw):
    daemon = storage_daemon(volumes, raw)
    target = volumes.path("target")
    refused = ferryd.ctl("clone", daemon.source(), target, expect=4)
    assert "there is no guest to stop" in refused.error, refused.error
    ferryd.clone(daemon.source(), target, options=["--quiesce-cmd", "true", "--resume-cmd", "true"])
    assert target.read_bytes() == raw.read_bytes()
    daemon.assert_clean()


def test_what_nobody_uses_is_not_moved(ferryd, volumes, raw):
    daemon = storage_daemon(volumes, raw)
    refused = ferryd.ctl("migrate", "--quiesce-cmd", "true", daemon.source(), volumes.path("target"), expect=4)
    assert "QEMU exports it to nobody" in refused.error, refused.error


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_migrate_moves_those_whom_it_serves(ferryd, volumes, raw, driver):
    image = raw if driver == "raw" else qcow2(volumes, raw)
    daemon, guest = served(volumes, image, driver)
    target = volumes.loop(DISK)
    shown = ferryd.ctl("migrate", "--json", *commands(guest), daemon.source(), target).json
    assert shown["state"] == "completed" and shown["downtime_ms"] > 0, shown
    assert_moved(daemon, guest, shown["id"], image, target)


def test_a_failing_cutover_command_leaves_them_where_they_were(ferryd, volumes, raw):
    daemon, guest = served(volumes, raw)
    shown = ferryd.ctl("migrate", "--json", *commands(guest), "--cutover-cmd", "false", daemon.source(),
                       volumes.path("target"), expect=1).json
    assert shown["state"] == "rolled-back", shown
    guest.wait_for_writes(3)
    assert export_nodes(daemon) == {"theirs": "disk0"} and daemon.command("query-jobs") == []
    assert not [name for name in daemon.nodes() if name.startswith("blockferry-")]
    guest.shut_down()
    daemon.shut_down()
    guest.assert_holds(raw, guest.acknowledged())


def test_kill_at_any_instant_of_a_move(ferryds, volumes, raw):
    """It is resumed, or finds that it had handed over; nothing of what the guest was told is lost."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    daemon, guest = served(volumes, raw)
    target = volumes.path("target")
    run = ferryd.ctl("migrate", "--json", "--detach", "--cutover", "manual", *commands(guest), daemon.source(),
                     target).json["id"]
    for _ in range(int(os.environ.get("BLOCKFERRY_CRASH_ROUNDS", "6")) // 2):
        if ferryd.wait_state(run, "tracking", "cutting-over", *ENDED)["state"] in ENDED:
            break
        asking = ask_for_cutover(ferryd, run)
        time.sleep(volumes.random.random() * 0.4)  # any moment of it
        ferryd.kill()
        asking.join(30)
        wait_until(guest.running, 45, "the guest to go on")
        guest.wait_for_writes(1)
        ferryd.start()
    if ferryd.show(run)["state"] not in ENDED:
        ferryd.wait_state(run, "tracking", *ENDED)
        ask_for_cutover(ferryd, run).join(30)
    ferryd.wait_end(run)
    assert_moved(daemon, guest, run, raw, target)
