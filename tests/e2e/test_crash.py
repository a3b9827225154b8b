# SPDX-License-Identifier: Apache-2.0
"""kill -9 of ferryd at random instants on real loop devices: never a mismatch, little copied again.

BLOCKFERRY_CRASH_ROUNDS says how many kills in all. What a power cut would add (unsynced writes lost or torn) is
the simulator's part.
"""
import json
import os

import pytest

from harness.compare import assert_same
from harness.crash import OPTIONS, crash_until_done
from harness.volumes import MiB

KILLS = int(os.environ.get("BLOCKFERRY_CRASH_ROUNDS", "12"))
SIZE = 32 * MiB


@pytest.fixture
def fragile(ferryds):
    return ferryds(*OPTIONS)


def test_full_copies_of_a_device(fragile, volumes):
    source = volumes.loop(SIZE, data=True)
    target = volumes.loop(SIZE)

    def start(number):
        if number > 0:
            volumes.write(source, 0, volumes.data(SIZE))
        return fragile.start_clone(source, target, options=["--rate", "24M", "--overwrite"]), source, [target]

    crash_until_done(fragile, volumes, KILLS // 2, start)


def test_increments_of_a_device(fragile, volumes):
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    fragile.clone(source, target)

    def start(_):
        # Half of it changed, and a part of that back to what stood there before.
        at = volumes.random.randrange(SIZE // 2 // MiB) * MiB
        volumes.write(source, at, volumes.data(SIZE // 2))
        volumes.write(source, at, bytes(MiB))
        run = fragile.start_clone(source, target, options=["--rate", "24M", "--mode", "incremental"])
        return run, source, [target]

    crash_until_done(fragile, volumes, KILLS // 4, start)


def test_two_targets_one_of_them_a_file(fragile, volumes):
    source = volumes.sparse(SIZE + 123, [(0, 12 * MiB), (16 * MiB, 8 * MiB), (SIZE - MiB, MiB + 123)])

    def start(_):
        targets = [volumes.path(), volumes.loop(SIZE + MiB, data=True)]
        run = fragile.start_clone(source, *targets, options=["--rate", "24M", "--overwrite"])
        return run, source, targets

    crash_until_done(fragile, volumes, KILLS - KILLS // 2 - KILLS // 4, start)


def test_a_crash_in_every_checkpoint_of_one_run(fragile, volumes):
    """The same run again and again, without end otherwise: each start must get further."""
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = fragile.start_clone(source, target, options=["--rate", "24M"])
    seen = 0
    for kills in range(1, 5):
        before = fragile.wait_for(run, lambda shown: shown["bytes_copied"] >= seen + 6 * MiB
                                  or shown["state"] != "copying")["bytes_copied"]
        fragile.kill()
        fragile.start()
        shown = fragile.show(run)
        assert shown["bytes_copied"] <= before + 6 * MiB
        assert shown["restarts"] <= kills
        seen = before
    fragile.ctl("set", run, "--rate", "0", expect=None)
    fragile.wait_end(run)
    assert_same(source, target)


def test_a_crash_after_the_end_changes_nothing(fragile, volumes):
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = fragile.clone(source, target)
    written = target.bytes_written()
    fragile.kill()
    fragile.start()
    assert fragile.show(run["id"]) == run
    assert target.bytes_written() == written


def test_a_waiting_client_follows_the_run_over_a_crash(fragile, volumes):
    source, target = volumes.file(SIZE), volumes.path()
    waiting = fragile.spawn_ctl("clone", source, target, "--rate", "4M", "--json")
    try:
        run = fragile.wait_for_first_run()
        fragile.wait_for(run, lambda shown: shown["bytes_copied"] > 4 * MiB)  # some checkpoints in
        fragile.kill()
        fragile.start()
        fragile.ctl("set", run, "--rate", "0")
        stdout, stderr = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
    assert waiting.returncode == 0, stderr
    assert json.loads(stdout)["restarts"] == 1
    assert_same(source, target)
