#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The rooms keep to themselves, files stay small, each names its licence, the options are written down once."""
import re
import sys

import tree

LINES_MAX = 500
# What a room's files may include; the longest matching prefix is the room. tests/ may include everything.
ROOMS = {
    "blockio/base/": ["blockio/base/"],
    "blockio/": ["blockio/"],
    "bitmap/": ["blockio/base/", "bitmap/"],
    "daemon/messages/": ["blockio/base/", "daemon/messages/"],
    "guard/": ["blockio/base/", "guard/"],
    "daemon/": ["blockio/", "bitmap/", "daemon/", "guard/protocol.h"],
    "ctl/": ["blockio/base/", "daemon/messages/", "ctl/"],
}
# Libraries that a room must not know either.
FOREIGN = {
    "blockio/": r"nlohmann/|boost/beast|prometheus/|spdlog/|fmt/",
    "bitmap/": r"nlohmann/|boost/|prometheus/|spdlog/|fmt/",
    "guard/": r"nlohmann/|boost/|prometheus/|spdlog/|fmt/",
    "daemon/messages/": r"boost/|prometheus/|spdlog/",
    "ctl/": r"prometheus/|spdlog/",
}
# Costly to compile: not in headers, which everybody includes.
HEAVY = r"nlohmann/json\.hpp|boost/(beast|program_options)|spdlog/|fmt/"
LICENSED = {".c", ".cc", ".h", ".py", ".sh", ".cmake", ".in", ".service", ".socket", ".conf"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

problems = []


def longest(rules, path):
    matching = [prefix for prefix in rules if str(path).startswith(prefix)]
    return max(matching, key=len) if matching else None


def check_includes(path, text):
    room = longest(ROOMS, path)
    for kind, name in INCLUDE.findall(text):
        where = f"{path}: #include {name}"
        if kind == '"':
            if not (tree.ROOT / name).is_file() and "/" in name:
                problems.append(f"{where}: there is no such file; includes are from the root")
            elif room and not name.endswith(".skel.h") and not any(name.startswith(allowed) for allowed in ROOMS[room]):
                problems.append(f"{where}: {room} may include only {', '.join(ROOMS[room])}")
        elif room:
            foreign = longest(FOREIGN, path)
            if foreign and re.match(FOREIGN[foreign], name):
                problems.append(f"{where}: {foreign} must not know this library")
            if path.suffix == ".h" and re.match(HEAVY, name):
                problems.append(f"{where}: too costly for a header")


def check(path):
    script = tree.is_script(path)
    if path.suffix not in LICENSED and not script and path.name != "CMakeLists.txt":
        return
    text = (tree.ROOT / path).read_text()
    # What the kernel runs must be under its licence as well.
    license = "GPL-2.0 OR BSD-2-Clause" if path.name.endswith(".bpf.c") else "Apache-2.0"
    if f"SPDX-License-Identifier: {license}" not in "\n".join(text.splitlines()[:3]):
        problems.append(f"{path}: no SPDX-License-Identifier: {license} among the first lines")
    if script or path.suffix in (".c", ".cc", ".h", ".py", ".sh"):
        lines = text.count("\n")
        if lines > LINES_MAX:
            problems.append(f"{path}: {lines} lines; more than {LINES_MAX} are two files")
    if path.suffix in (".c", ".cc", ".h"):
        check_includes(path, text)
    if path.suffix == ".h" and "#pragma once" not in text:
        problems.append(f"{path}: no #pragma once")


paths = tree.files()
for each in paths:
    check(each)
if not any(path.suffix == ".cc" for path in paths):
    problems.append("no sources found: the check looked at nothing")
print("\n".join(problems) or f"{len(paths)} files are in order")
sys.exit(1 if problems else 0)
