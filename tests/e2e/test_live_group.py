# SPDX-License-Identifier: Apache-2.0
"""Several volumes with one cutover: at one moment, all of them or none."""
import errno
import os
import threading
import time
from pathlib import Path

import pytest

from harness.ferryd import ENDED, ask_for_cutover
from harness.live import LiveVolume, Loaded
from harness.volumes import MiB, run
from harness.waiting import wait_until

KILLS = int(os.environ.get("BLOCKFERRY_CRASH_ROUNDS", "6"))
# Of each volume: source and target are the same.
COMPARE_ALL = ('set -- $BLOCKFERRY_TARGET; for source in $BLOCKFERRY_SOURCE; do size=$(blockdev --getsize64 $source); '
               'dd if=$source bs=1M iflag=direct status=none | cmp --bytes=$size - $1 || exit 1; shift; done')


@pytest.fixture
def pair(volumes):
    return [LiveVolume(volumes, "loop512", filesystem, size=size)
            for filesystem, size in (("ext4", 64 * MiB), ("xfs", 320 * MiB))]


class Ledger:
    """An application with a volume for its data and one for its log: a line there is written before one here, and each
    waits for the other. At any one moment the log is at most one line ahead."""

    def __init__(self, data, log):
        self.paths = [Path(volume.mount, "ledger") for volume in (log, data)]
        self.acknowledged, self.error = 0, None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self):
        try:
            with open(self.paths[0], "ab", buffering=0) as log, open(self.paths[1], "ab", buffering=0) as data:
                while not self.stopped.is_set():
                    for file in (log, data):
                        file.write(f"{self.acknowledged:09}\n".encode())
                        os.fsync(file.fileno())
                    self.acknowledged += 1
        except OSError as error:
            self.error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join(60)


def lines_on_target(volumes, volume):
    copy = volumes.mount(volume.target, volume.filesystem, "nouuid" if volume.filesystem == "xfs" else None)
    lines = (copy / "ledger").read_text().split()
    run("umount", copy)
    assert lines == [f"{each:09}" for each in range(len(lines))]
    return len(lines)


def pairs_of(*pair):
    return [f"{volume.source}={volume.target}" for volume in pair]


def start(ferryd, verb, pair, *options):
    """The runs' ids; they wait for their cutover."""
    runs = ferryd.ctl(verb, *pairs_of(*pair), "--detach", "--json", "--cutover", "manual", *options).json
    ids = [each["id"] for each in runs]
    assert all(each["group"] == ids for each in runs)
    for each in ids:
        ferryd.wait_state(each, "tracking")
    return ids


def test_volumes_are_cloned_at_one_moment(ferryd, volumes, pair):
    with Ledger(*pair) as ledger, Loaded(pair[1], volumes.random.randrange(2**32)):
        wait_until(lambda: ledger.acknowledged > 20, what="some lines")
        for _ in range(3):
            before = ledger.acknowledged
            shown = ferryd.ctl("clone", *pairs_of(*pair), "--json", "--overwrite", "--cutover-cmd", COMPARE_ALL,
                               "--max-freeze", "30s", "--max-downtime", "1s").json
            assert [each["state"] for each in shown] == ["completed"] * 2
            assert shown[0]["downtime_ms"] == shown[1]["downtime_ms"] > 0
            data, log = (lines_on_target(volumes, volume) for volume in pair)
            assert data >= before and log in (data, data + 1), "not of one moment"
    assert ledger.error is None
    for volume in pair:
        volume.check_target()


def test_migrate_hands_over_all(ferryd, volumes, pair):
    said = volumes.path("said")
    with Ledger(*pair) as ledger:
        shown = ferryd.ctl("migrate", *pairs_of(*pair), "--json", "--name", "both", "--max-downtime", "5s", "--cutover-cmd",
                           f'{COMPARE_ALL} && echo "$BLOCKFERRY_RUN" >> {said}').json
        wait_until(lambda: ledger.error is not None, what="the fence")
    assert ledger.error.errno in (errno.EIO, errno.EROFS, errno.ESHUTDOWN)
    assert said.read_text() == " ".join(each["id"] for each in shown) + "\n", "once, for both"
    assert [each["name"] for each in shown] == ["both-1", "both-2"]
    for volume in pair:
        run("umount", volume.mount)
    data, log = (lines_on_target(volumes, volume) for volume in pair)
    assert data >= ledger.acknowledged and log in (data, data + 1), "an acknowledged line is lost"


def test_a_command_that_fails_rolls_all_back(ferryd, volumes, pair):
    with Ledger(*pair) as ledger:
        result = ferryd.ctl("migrate", *pairs_of(*pair), "--json", "--cutover-cmd", "echo no; exit 7", expect=None)
        assert result.status == 1 and "status 7" in result.stderr
        before = ledger.acknowledged
        wait_until(lambda: ledger.acknowledged > before + 5, what="lines after it")
    assert ledger.error is None
    assert [each["state"] for each in ferryd.ctl("list", "--json").json] == ["rolled-back"] * 2


def test_one_that_is_not_ready_keeps_all_waiting(ferryd, volumes, pair):
    ids = start(ferryd, "migrate", pair, "--cutover-cmd", COMPARE_ALL)
    ferryd.ctl("pause", ids[0])
    assert ferryd.request("POST", f"/v1/runs/{ids[1]}/cutover")[0] == 409
    ferryd.ctl("cancel", ids[0])
    ferryd.wait_end(ids[0], "cancelled")
    assert ferryd.request("DELETE", f"/v1/runs/{ids[0]}")[0] == 409, "the others still need it"
    with Ledger(*pair) as ledger:
        assert ferryd.request("POST", f"/v1/runs/{ids[1]}/cutover")[0] == 409
        assert ledger.error is None
        ferryd.ctl("resume", ids[0])
        ferryd.wait_state(ids[0], "tracking")
        ferryd.ctl("cutover", ids[1], "--json")
        ferryd.wait_end(ids[0])
        wait_until(lambda: ledger.error is not None, what="the fence")


def test_the_quick_one_waits_for_the_slow_one(ferryd, volumes, pair):
    (pair[0].mount / "much").write_bytes(volumes.data(24 * MiB))
    (pair[1].mount / "little").write_bytes(volumes.data(MiB))
    os.sync()
    runs = ferryd.ctl("clone", *pairs_of(*pair), "--detach", "--json", "--rate", "4M", "--cutover-cmd", COMPARE_ALL).json
    slow, quick = (each["id"] for each in runs)
    ferryd.ctl("set", quick, "--rate", "none")
    shown = ferryd.wait_for(quick, lambda shown: shown["warning"])
    assert slow in shown["warning"] and shown["state"] == "tracking" and shown["downtime_ms"] is None
    ferryd.ctl("set", slow, "--rate", "none")
    assert ferryd.wait_end(slow)["downtime_ms"] == ferryd.wait_end(quick)["downtime_ms"]


def test_rehearsed_and_brought_up_to_date_together(ferryd, volumes, pair):
    ids = start(ferryd, "clone", pair, "--keep")
    with Ledger(*pair) as ledger:
        assert ferryd.ctl("cutover", ids[1], "--rehearse").stdout.startswith("rehearsed: ")
        pauses = [ferryd.wait_for(each, lambda shown: shown["pause"])["pause"] for each in ids]
        assert all(each["rehearsal"] for each in pauses)
        ferryd.ctl("cutover", ids[0], "--json")
        ferryd.wait_end(ids[1])
        before = ledger.acknowledged
        wait_until(lambda: ledger.acknowledged > before + 20, what="more lines")
        ferryd.ctl("sync", ids[0], "--detach")
        for each in ids:
            ferryd.wait_state(each, "tracking", "completed")
        ferryd.request("POST", f"/v1/runs/{ids[0]}/cutover")
        for each in ids:
            shown = ferryd.wait_end(each)
            assert "checksum" not in [each["kind"] for each in shown["passes"]]
        data, log = (lines_on_target(volumes, volume) for volume in pair)
        assert data > before + 20 and log in (data, data + 1), "not of one moment"


def test_a_hand_over_that_ferryd_did_not_live_to_record(ferryd, volumes, pair):
    """One mark for all."""
    ids = start(ferryd, "migrate", pair, "--cutover-cmd", f"kill -STOP {ferryd.process.pid}; sleep 0.2")
    try:
        ferryd.request("POST", f"/v1/runs/{ids[0]}/cutover", timeout=1)
    except OSError:
        pass
    pins = Path("/sys/fs/bpf/blockferry", (ferryd.state_dir / "tracker-id").read_text())
    wait_until(lambda: list(pins.glob("group-*/handed-over")), what="the hand-over's mark")
    ferryd.kill()
    copies = [volumes.mount(volume.target, volume.filesystem, "nouuid" if volume.filesystem == "xfs" else None)
              for volume in pair]  # they are in use already
    ferryd.start()
    for each in ids:
        assert ferryd.wait_end(each)["error"] is None
    assert all(os.path.ismount(copy) for copy in copies)
    ferryd.restart()
    assert not list(pins.glob("group-*")), "nobody needs it any more"


def test_kill_at_any_instant(ferryds, volumes, pair):
    """Both are handed over, or both go on."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    with Ledger(*pair) as ledger:
        for _ in range(KILLS):
            ids = start(ferryd, "clone", pair, "--overwrite", "--max-downtime", "1s", "--max-freeze", "20s",
                        "--cutover-cmd", COMPARE_ALL)
            asking = ask_for_cutover(ferryd, ids[0])
            time.sleep(volumes.random.random() * 0.6)  # any moment of it
            ferryd.kill()
            asking.join(30)
            ferryd.start()
            for each in ids:
                ferryd.wait_state(each, "tracking", *ENDED)
            ended = [ferryd.show(each)["state"] in ENDED for each in ids]
            assert ended[0] == ended[1], "one was handed over without the other"
            if not ended[0]:
                ask_for_cutover(ferryd, ids[0]).join(30)
            for each in ids:
                shown = ferryd.wait_end(each)
                assert shown["verify"]["mismatches"] in (0, None)
                assert "checksum" not in [each["kind"] for each in shown["passes"]], "it scanned"
            data, log = (lines_on_target(volumes, volume) for volume in pair)
            assert log in (data, data + 1), "not of one moment"
    assert ledger.error is None


def test_refusals(ferryd, volumes, pair):
    one, other = pair
    result = ferryd.ctl("migrate", f"{one.source}={one.target}", f"{other.source}={one.target}", expect=4)
    assert "named twice" in result.stderr
    result = ferryd.ctl("migrate", *pairs_of(*pair), "--mode", "full", expect=2)
    assert "hybrid" in result.stderr
    ferryd.ctl("migrate", f"{one.source}=", f"{other.source}={other.target}", expect=2)
    result = ferryd.ctl("migrate", f"{one.source}={one.target}", f"/dev/nothing={other.target}", expect=4)
    assert "/dev/nothing" in result.stderr
    assert ferryd.ctl("list", "--json").json == [], "all or none"
