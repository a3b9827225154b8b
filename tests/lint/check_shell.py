#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Shell scripts pass shellcheck."""
import subprocess
import sys

import tree

scripts = [path for path in tree.files() if path.suffix == ".sh" or
           (tree.is_script(path) and "sh" in tree.first_line(path).split("/")[-1])]
if not scripts:
    sys.exit("no shell scripts found")
sys.exit(subprocess.run(["shellcheck", "--severity=warning", *scripts], cwd=tree.ROOT).returncode)
