# SPDX-License-Identifier: Apache-2.0
"""kill -9 at instants that chance chooses, in the middle of whatever the run is doing."""
import http.client
import threading
import time
from collections import Counter

from harness.compare import assert_same
from harness.ferryd import ENDED
from harness.volumes import MiB
from harness.waiting import TIME_SCALE, wait_until

RATE = 24 * MiB
INTERVAL_SECONDS = 0.3
CHECKPOINT_SECONDS = 0.25  # what a checkpoint itself may take on a busy machine
IN_FLIGHT = 16 * MiB       # buffers of one run
# What one crash may cause to be copied again.
REPEATED_MAX = int(RATE * (INTERVAL_SECONDS + CHECKPOINT_SECONDS * TIME_SCALE))
OPTIONS = ("--checkpoint-interval", f"{int(INTERVAL_SECONDS * 1000)}ms")


class Crashes:
    """Kills one ferryd again and again while `run` goes on: so many times while it copies, and while it verifies."""

    def __init__(self, ferryd, run, random, kills):
        self.ferryd, self.run, self.random = ferryd, run, random
        self.kills = []
        self.repeated = 0
        while_verifying = kills // 3
        self.kill_while("copying", kills - while_verifying)
        if while_verifying:
            self.ferryd.wait_for(self.run, lambda shown: self.goes_on(shown) and shown["state"] != "copying")
            self.kill_while("verifying", kills)
        self.ferryd.ctl("set", self.run, "--rate", "0", expect=None)
        self.ferryd.wait_for(self.run, self.goes_on)

    def kill_while(self, state, kills):
        while len(self.kills) < kills and self.ferryd.wait_for(self.run, self.goes_on)["state"] == state:
            self.one(state)

    def one(self, state):
        instants = ("pausing", "resuming", "starting")
        instants += ("copying", "copying", "checkpoint") if state == "copying" else ("verifying",) * 3
        instant = self.random.choice(instants)
        getattr(self, instant)()
        if instant != "starting":
            before = self.shown()["bytes_copied"]
            self.ferryd.kill()
            self.note(instant)
            self.ferryd.start()
            self.count_repeated(before)

    def goes_on(self, shown):
        """Killed between the word and the deed of a pause, it may be paused or not: either is right."""
        if shown["state"] == "paused":
            self.ferryd.ctl("resume", self.run, expect=None)
        return shown["state"] not in ("queued", "paused")

    def note(self, instant):
        self.kills.append(instant)
        print(f"kill {len(self.kills)}: {instant}")

    def shown(self):
        return self.ferryd.show(self.run)

    def count_repeated(self, before):
        """What the new process knows of must be nearly what the old one had."""
        lost = before - self.shown()["bytes_copied"]
        assert lost <= REPEATED_MAX, f"{lost} bytes are copied again, more than {REPEATED_MAX}"
        self.repeated = max(self.repeated, lost)

    def moment(self, milliseconds):
        """A random instant of the next milliseconds: the choice of the moment, not a wait for an event."""
        time.sleep(self.random.random() * milliseconds / 1000)

    # The instants

    def copying(self):
        until = self.shown()["bytes_copied"] + self.random.randrange(8 * MiB)
        self.ferryd.wait_for(self.run, lambda shown: shown["bytes_copied"] >= until or shown["state"] != "copying")
        self.moment(10)

    def checkpoint(self):
        """Just when durable state changes."""
        def changes():
            return [(entry.name, entry.stat().st_mtime_ns) for entry in self.ferryd.state_dir.iterdir()]

        def stable():
            try:
                return changes()
            except FileNotFoundError:  # replaced under our eyes
                return None
        before = wait_until(stable)
        wait_until(lambda: stable() != before or self.shown()["state"] != "copying")
        self.moment(4)

    def verifying(self):
        self.moment(100)

    def later(self, verb):
        def ask():
            try:
                self.ferryd.request("POST", f"/v1/runs/{self.run}/{verb}")
            except (OSError, http.client.HTTPException):
                pass  # it was killed while it answered
        thread = threading.Thread(target=ask)
        thread.start()
        self.moment(20)
        return thread

    def pausing(self):
        self.later("pause")

    def resuming(self):
        self.ferryd.ctl("pause", self.run, expect=None)
        if self.ferryd.wait_state(self.run, "paused", *ENDED)["state"] == "paused":
            self.later("resume")

    def starting(self):
        """A second kill while the new process takes the run up."""
        before = self.shown()["bytes_copied"]
        self.ferryd.kill()
        self.note("copying")
        self.ferryd.spawn()
        self.moment(100)
        self.ferryd.kill()
        self.note("starting")
        self.ferryd.start()
        self.count_repeated(before)


def crash_until_done(ferryd, volumes, kills, start):
    """Runs made by `start(round)` -> (run, source, targets) are crashed until the kills are spent."""
    left, rounds, worst, instants = kills, 0, 0, Counter()
    while left > 0:
        run, source, targets = start(rounds)
        rounds += 1
        written = [target.bytes_written() for target in targets if hasattr(target, "bytes_written")]
        crashes = Crashes(ferryd, run, volumes.random, min(left, 9))
        shown = ferryd.wait_end(run)
        count = len(crashes.kills)
        left -= max(count, 1)
        instants.update(crashes.kills)
        worst = max(worst, crashes.repeated)
        total = shown["bytes_total"]
        assert shown["restarts"] <= count
        assert shown["bytes_copied"] <= total + count * REPEATED_MAX
        assert shown["verify"]["mismatches"] == 0
        loops = [target for target in targets if hasattr(target, "bytes_written")]
        for target, before in zip(loops, written):
            assert target.bytes_written() - before <= total + count * (REPEATED_MAX + IN_FLIGHT)
        for target in targets:
            assert_same(source, target)
    print(f"{kills} kills over {rounds} runs, while {dict(instants)}; at most {worst} bytes copied again after one")
