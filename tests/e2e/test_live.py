# SPDX-License-Identifier: Apache-2.0
"""Sources in use: mounted, under mixed load, on every kind of device. At the cutover, while the source is still, it
is compared with the target byte by byte; the target's filesystem is clean.

BLOCKFERRY_LIVE_ROUNDS says how often each combination is tried, with other seeds.
"""
import itertools
import os

import pytest

from harness.live import COMPARE, FILESYSTEMS, KINDS, LiveVolume, Loaded

ROUNDS = int(os.environ.get("BLOCKFERRY_LIVE_ROUNDS", "1"))
# All kinds with all filesystems; mounted with and without discard in turn, or, in the long set, both ways.
COMBINATIONS = [(kind, filesystem, options) for at, (kind, filesystem) in
                enumerate(itertools.product(KINDS, FILESYSTEMS))
                for options in ((None, "discard") if ROUNDS > 1 else ((None, "discard")[at % 2],))]


@pytest.mark.parametrize("kind,filesystem,options", COMBINATIONS)
def test_a_busy_filesystem_is_cloned_as_it_is_at_one_moment(ferryd, volumes, kind, filesystem, options):
    volume = LiveVolume(volumes, kind, filesystem, options)
    for _ in range(ROUNDS):
        with Loaded(volume, volumes.random.randrange(2**32), trims=True) as load:
            name = ferryd.start_clone(volume.source, volume.target, options=[
                "--overwrite", "--cutover", "manual", "--cutover-cmd", COMPARE, "--max-freeze", "30s"])
            ferryd.wait_state(name, "tracking")
            load.end_trims()
            shown = ferryd.ctl("cutover", name, "--json").json
        assert shown["mode"] == "hybrid" and shown["tracker"] == "ebpf"
        assert shown["passes"][0]["kind"] == "full" and shown["passes"][-1]["kind"] == "final"
        assert not [each for each in shown["passes"] if each["kind"] == "checksum"], shown["tracker_losses"]
        assert shown["downtime_ms"] > 0 and shown["verify"]["mismatches"] == 0
        volume.check_target()
