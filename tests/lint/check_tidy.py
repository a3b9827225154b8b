#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""clang-tidy over the sources of the build directory given, two at a time; .clang-tidy names the checks.

What passed is remembered in the build directory, by the content of all that a source includes, so that a second
run looks only at what changed.
"""
import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import tree

BUILD = Path(sys.argv[1]).resolve()
PASSED = BUILD / "tidy-passed"
ROOMS = ("blockio", "bitmap", "guard", "daemon", "ctl", "tests")
CHECKS = {
    # The data path: few templates of others, so that the static analyzer is quick.
    "blockio": ["--checks=clang-analyzer-core.*,clang-analyzer-cplusplus.*,clang-analyzer-unix.*"],
    "bitmap": ["--checks=clang-analyzer-core.*,clang-analyzer-cplusplus.*,clang-analyzer-unix.*"],
    # gtest's macros and a fuzzer's fixed names are not ours to mend.
    "tests": ["--checks=-readability-identifier-naming,-bugprone-*"],
}


def included(source, seen):
    """All of the tree's files that a source includes."""
    if source in seen or not source.is_file():
        return seen
    seen.add(source)
    for name in re.findall(r'#include "([^"]+)"', source.read_text()):
        included(tree.ROOT / name, seen)
    return seen


def content_key(source, arguments):
    digest = hashlib.sha256(" ".join(arguments).encode())
    for path in [tree.ROOT / ".clang-tidy", *sorted(included(source, set()))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def tidy(source):
    name = source.relative_to(tree.ROOT)
    arguments = ["clang-tidy", "--quiet", "-p", str(BUILD), *CHECKS.get(name.parts[0], [])]
    key = content_key(source, arguments)
    if (PASSED / key).exists():
        return name, ""
    done = subprocess.run([*arguments, str(source)], capture_output=True, text=True)
    if done.returncode == 0:
        (PASSED / key).touch()
        return name, ""
    return name, done.stdout + "\n".join(line for line in done.stderr.splitlines() if "error" in line.lower())


def main():
    sources = {Path(entry["file"]) for entry in json.loads((BUILD / "compile_commands.json").read_text())}
    wanted = [tree.ROOT / room for room in (sys.argv[2:] or ROOMS)]
    sources = sorted(path for path in sources if any(path.is_relative_to(room) for room in wanted))
    if not sources:
        sys.exit(f"{BUILD}/compile_commands.json names no source of this tree")
    PASSED.mkdir(exist_ok=True)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for name, complaints in pool.map(tidy, sources):
            if complaints:
                failed.append(name)
                print(complaints, flush=True)
    print(f"{len(sources)} sources, {len(failed)} with complaints: {' '.join(map(str, failed))}")
    sys.exit(1 if failed else 0)


main()
