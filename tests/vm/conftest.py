# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "e2e")]

from harness.fixtures import *  # noqa: E402,F401,F403 (the path must be set first)
