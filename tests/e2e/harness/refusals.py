# SPDX-License-Identifier: Apache-2.0
"""What a refusal must look like."""
from harness.compare import fingerprint


def assert_refused(ferryd, source, *targets, options=(), says=None, untouched=None):
    """Exit 4, one line, and everything is as it was; `says` must stand in the line."""
    watched = [source, *targets] if untouched is None else untouched
    before = [fingerprint(volume) for volume in watched]
    result = ferryd.ctl("clone", source, *targets, *options, expect=4)
    assert result.stdout == ""
    if says is not None:
        assert str(says).lower() in result.stderr.lower()
    assert [fingerprint(volume) for volume in watched] == before
    return result
