# SPDX-License-Identifier: Apache-2.0
"""check_skips.py PATTERNS RESULTS: fails where a test that may not be skipped was, or was not there at all.

PATTERNS has a regular expression a line, for whole names of CTest tests. A test counts as skipped when CTest says so,
when it never ran, or when pytest or GoogleTest report skips within it. Says nothing when all is well.
"""
import re
import sys
import xml.etree.ElementTree


def skips(case):
    """Why a test case counts as skipped: a list of reasons."""
    reasons = []
    if case.get("status") != "fail" and (case.get("status") != "run" or case.find("skipped") is not None):
        reasons.append("skipped as a whole")
    output = case.findtext("system-out") or ""
    reasons += re.findall(r"^SKIPPED \[\d+\] .*$", output, re.MULTILINE)  # pytest
    reasons += sorted(set(re.findall(r"^\[  SKIPPED \] \S+", output, re.MULTILINE)))  # GoogleTest
    return reasons


def main(patterns_path, results_path):
    with open(patterns_path) as file:
        patterns = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    cases = list(xml.etree.ElementTree.parse(results_path).getroot().iter("testcase"))
    problems = []
    for pattern in patterns:
        matching = [case for case in cases if re.fullmatch(pattern, case.get("name"))]
        if not matching:
            problems.append(f"no test is called {pattern}")
        problems += [f"{case.get('name')}: {reason}" for case in matching for reason in skips(case)]
    if problems:
        print("Tests that may not be skipped were:", *problems, sep="\n  ")
    return 1 if problems else 0


sys.exit(main(*sys.argv[1:]))
