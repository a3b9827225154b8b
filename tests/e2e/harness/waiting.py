# SPDX-License-Identifier: Apache-2.0
"""Waiting for events, always bounded. The pauses only space the polls out: no test relies on their length."""
import os
import time

POLL_SECONDS = 0.01

# Sanitizer builds are several times slower: every bound on time is multiplied by this.
TIME_SCALE = float(os.environ.get("BLOCKFERRY_TIME_SCALE", "1"))


def wait_until(condition, seconds=10.0, what="the condition"):
    """Polls until `condition()` is truthy and returns that value; fails after `seconds`."""
    deadline = time.monotonic() + seconds * TIME_SCALE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {seconds * TIME_SCALE:g} s")
        time.sleep(POLL_SECONDS)


class Stopwatch:
    def __init__(self):
        self.began = time.monotonic()

    def seconds(self):
        """Seconds since the start, as an unburdened build would have needed."""
        return (time.monotonic() - self.began) / TIME_SCALE
