# SPDX-License-Identifier: Apache-2.0
"""kill -9 at instants that chance chooses, in the middle of whatever the run is doing."""
import http.client
import threading
import time

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
INSTANTS = ("copying", "checkpoint", "verifying", "pausing", "resuming", "starting")


class Crashes:
    """Kills one ferryd again and again while `run` goes on; stops when it has ended or the kills are spent."""

    def __init__(self, ferryd, run, random, kills):
        self.ferryd, self.run, self.random, self.kills_left = ferryd, run, random, kills
        self.kills = []
        self.repeated = 0

    def go_on(self):
        while self.kills_left > 0 and self.shown()["state"] not in ENDED:
            self.one()
        self.ferryd.ctl("set", self.run, "--rate", "0", expect=None)
        if self.shown()["state"] == "paused":
            self.ferryd.ctl("resume", self.run)

    def one(self):
        state = self.shown()["state"]
        usable = ("verifying", "starting") if state == "verifying" else \
            ("copying", "checkpoint", "pausing", "resuming", "starting")
        instant = self.random.choice(usable)
        getattr(self, instant)()
        if self.ferryd.process is None:  # the instant was part of a start
            return
        before = self.last_look()
        self.ferryd.kill()
        self.note(instant)
        self.ferryd.start()
        self.count_repeated(before)
        if self.shown()["state"] == "paused":  # killed between the word and the deed: either is right
            self.ferryd.ctl("resume", self.run)

    def note(self, instant):
        self.kills.append(instant)
        self.kills_left -= 1
        print(f"kill {len(self.kills)}: {instant}")

    def shown(self):
        return self.ferryd.show(self.run)

    def last_look(self):
        return self.shown()["bytes_copied"]

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
        self.moment(30)

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
        before = self.last_look()
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
    left, rounds, worst = kills, 0, 0
    while left > 0:
        run, source, targets = start(rounds)
        rounds += 1
        written = [target.bytes_written() for target in targets if hasattr(target, "bytes_written")]
        crashes = Crashes(ferryd, run, volumes.random, min(left, 8))
        crashes.go_on()
        shown = ferryd.wait_end(run)
        count = len(crashes.kills)
        left -= max(count, 1)
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
    print(f"{kills} kills over {rounds} runs; at most {worst} bytes were copied again after one")
