#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""C and C++ are formatted as .clang-format says: `clang-format -i` mends it."""
import subprocess
import sys

import tree

sources = tree.files(".c", ".h", ".cc")
sys.exit(subprocess.run(["clang-format", "--dry-run", "-Werror", *sources], cwd=tree.ROOT).returncode)
