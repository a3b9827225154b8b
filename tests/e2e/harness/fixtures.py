# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end and interop tests. BLOCKFERRY_SEED replays a run's random choices."""
import os
import random
import zlib

import pytest

from harness.ferryd import Ferryd
from harness.volumes import Volumes

SEED = int(os.environ.get("BLOCKFERRY_SEED") or random.SystemRandom().randrange(2**32))


def pytest_report_header():
    return f"BLOCKFERRY_SEED={SEED}"


@pytest.fixture
def seed(request):
    """Of this test alone, so that one test replays like the whole file."""
    print(f"BLOCKFERRY_SEED={SEED}")
    return SEED ^ zlib.crc32(request.node.name.encode())


@pytest.fixture
def volumes(seed):
    made = Volumes(seed)
    yield made
    made.close()


@pytest.fixture
def ferryds(volumes):
    """Starts ferryds with options of the test's own; stopped before the volumes go."""
    made = []

    def start(*options, **settings):
        made.append(Ferryd(*options, **settings))
        return made[-1].start()

    start.made = made
    yield start
    failures = []
    for ferryd in reversed(made):
        try:
            ferryd.close()
        except AssertionError as error:
            failures.append(error)
    if failures:
        raise failures[0]


@pytest.fixture
def ferryd(ferryds):
    """A ferryd with default settings."""
    return ferryds()
