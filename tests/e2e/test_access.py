# SPDX-License-Identifier: Apache-2.0
"""Root and the group operate; others are refused, by the socket's mode and by the peer's credentials."""
import grp
import http.client
import os
import pwd
import shutil
import stat
import subprocess

import pytest

from harness.ferryd import binary
from harness.metrics import metrics_address, scrape
from harness.volumes import MiB, need, need_root


@pytest.fixture
def readable_ctl(volumes):
    """ferryctl where anybody can run it: a build directory may be closed to others."""
    path = volumes.directory / "ferryctl"
    shutil.copy(binary("ferryctl"), path)
    path.chmod(0o755)
    return path


def as_nobody(ctl, ferryd, *words, groups=None):
    need_root()
    need("setpriv")
    nobody = pwd.getpwnam("nobody")
    group = ["--clear-groups"] if groups is None else ["--groups", ",".join(map(str, groups))]
    return subprocess.run(["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", *group, str(ctl),
                           "--socket", str(ferryd.socket), *words], capture_output=True, text=True, timeout=30)


def assert_turned_away(done):
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "group" in done.stderr or "denied" in done.stderr.lower()


def test_the_socket_is_closed_to_others(ferryd):
    assert stat.S_IMODE(os.stat(ferryd.socket).st_mode) & 0o007 == 0


def test_the_state_directory_is_closed_to_others(ferryd, volumes):
    ferryd.clone(volumes.file(MiB), volumes.path())
    for path in (ferryd.state_dir, *ferryd.state_dir.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_an_unprivileged_user_is_refused(ferryd, readable_ctl):
    assert_turned_away(as_nobody(readable_ctl, ferryd, "list"))


def test_an_unprivileged_user_is_refused_even_where_the_mode_lets_it_in(ferryd, readable_ctl):
    ferryd.socket.chmod(0o666)
    assert_turned_away(as_nobody(readable_ctl, ferryd, "list"))


def test_with_json_the_refusal_is_json(ferryd, readable_ctl):
    done = as_nobody(readable_ctl, ferryd, "list", "--json")
    assert done.returncode == 3
    assert '"unreachable"' in done.stderr


def test_a_member_of_the_group_operates(ferryds, readable_ctl):
    """Any group will do for the test; by default it is blockferry."""
    need_root()
    group = _other_group(pwd.getpwnam("nobody").pw_gid)
    ferryd = ferryds("--group", group.gr_name)
    assert os.stat(ferryd.socket).st_gid == group.gr_gid
    done = as_nobody(readable_ctl, ferryd, "list", "--json", groups=[group.gr_gid])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert_turned_away(as_nobody(readable_ctl, ferryd, "list"))


def _other_group(excluded):
    return next(group for group in grp.getgrall() if group.gr_gid not in (0, excluded) and not group.gr_mem)


def test_the_metrics_address_offers_nothing_but_metrics(ferryds, volumes):
    ferryd = ferryds("--metrics-listen", "127.0.0.1:0")
    ferryd.clone(volumes.file(MiB), volumes.path())
    assert scrape(ferryd)
    for method, path in (("GET", "/v1/runs"), ("POST", "/v1/runs"), ("GET", "/v1/devices"), ("DELETE", "/metrics")):
        connection = http.client.HTTPConnection(metrics_address(ferryd), timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status in (404, 405)
        connection.close()
