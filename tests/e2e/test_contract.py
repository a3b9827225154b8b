# SPDX-License-Identifier: Apache-2.0
"""What people script against: JSON shapes, exit statuses, what goes to which stream."""
import json
import os
import signal
import subprocess

import pytest

from harness.ferryd import ENDED, RUN_MEMBERS, binary
from harness.volumes import MiB, need
from harness.waiting import TIME_SCALE

STATES = {"queued", "copying", "tracking", "paused", "cutting-over", "verifying", *ENDED}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_run(run):
    """Every member of the contract, with its type."""
    assert RUN_MEMBERS <= run.keys(), RUN_MEMBERS - run.keys()
    assert isinstance(run["id"], str) and run["id"]
    assert run["name"] is None or isinstance(run["name"], str)
    assert run["state"] in STATES
    assert run["mode"] in ("full", "incremental", "hybrid")
    assert isinstance(run["tracker"], str)
    for volume in (run["source"], *run["targets"]):
        assert {"uri", "bytes", "identity"} <= volume.keys()
        assert os.path.isabs(volume["uri"])
    assert isinstance(run["targets"], list) and run["targets"]
    for member in ("bytes_total", "bytes_copied", "bytes_zeroed", "bytes_read", "restarts"):
        assert is_count(run[member]), member
    assert isinstance(run["passes"], list)
    for each in run["passes"]:
        assert each["kind"] in ("full", "incremental", "checksum", "final")
        assert is_count(each["granules"]) and is_count(each["bytes"]) and is_number(each["seconds"])
    for member in ("downtime_ms", "throughput_bytes_per_second", "eta_seconds"):
        assert run[member] is None or (is_number(run[member]) and run[member] >= 0), member
    assert run["verify"] is None or {"granules", "mismatches"} <= run["verify"].keys()
    assert isinstance(run["bad_ranges"], list)
    assert run["error"] is None or isinstance(run["error"], dict)


@pytest.fixture
def finished(ferryd, volumes):
    """A completed run's object, as clone printed it."""
    source, target = volumes.file(4 * MiB + 9), volumes.path()
    return ferryd.clone(source, target, options=["--name", "nightly"])


@pytest.fixture
def slow(ferryd, volumes):
    """The id of a run that takes a minute if left alone."""
    return ferryd.start_clone(volumes.file(64 * MiB), volumes.path(), options=["--rate", "1M", "--name", "slow"])


def test_clone_prints_the_run_once_when_it_ends(finished):
    check_run(finished)
    assert finished["state"] == "completed"
    assert finished["name"] == "nightly"
    assert finished["downtime_ms"] is None
    assert finished["granule_bytes"] == 4096
    assert [each["kind"] for each in finished["passes"]] == ["full"]
    assert finished["passes"][0]["granules"] == 1025
    assert finished["passes"][0]["bytes"] == 4 * MiB + 9
    assert finished["verify"] == {"granules": 1025, "mismatches": 0}
    assert finished["source"]["bytes"] == finished["targets"][0]["bytes"] == 4 * MiB + 9


def test_show_prints_the_same_object(ferryd, finished):
    shown = ferryd.ctl("show", finished["id"], "--json").json
    check_run(shown)
    assert shown == finished


def test_a_run_goes_by_its_name_too(ferryd, finished):
    assert ferryd.ctl("show", "nightly", "--json").json["id"] == finished["id"]


def test_list_prints_an_array(ferryd, finished, volumes):
    other = ferryd.clone(volumes.file(MiB), volumes.path())
    listed = ferryd.ctl("list", "--json").json
    assert {run["id"] for run in listed} == {finished["id"], other["id"]}
    for run in listed:
        check_run(run)


def test_list_of_nothing_is_an_empty_array(ferryd):
    assert ferryd.ctl("list", "--json").json == []
    ferryd.ctl("list")


def test_detach_prints_the_object_at_once(ferryd, volumes):
    run = ferryd.clone(volumes.file(64 * MiB), volumes.path(), options=["--detach", "--rate", "1M"])
    check_run(run)
    assert run["state"] in ("queued", "copying")
    assert run["error"] is None


def test_detach_without_json_prints_nothing_but_the_id(ferryd, volumes):
    printed = ferryd.ctl("clone", volumes.file(MiB), volumes.path(), "--detach").stdout
    assert len(printed.splitlines()) == 1
    assert ferryd.wait_end(printed.strip())["state"] == "completed"


@pytest.mark.parametrize("words", [("pause",), ("resume",), ("set", "--rate", "2M"), ("cancel",)])
def test_verbs_on_a_run_print_its_object(ferryd, slow, words):
    verb, *options = words
    if verb == "resume":
        ferryd.ctl("pause", slow)
    run = ferryd.ctl(verb, slow, *options, "--json").json
    check_run(run)
    assert run["id"] == slow


def test_forget_prints_the_last_object(ferryd, finished):
    run = ferryd.ctl("forget", finished["id"], "--json").json
    check_run(run)
    assert run["id"] == finished["id"]
    ferryd.ctl("show", finished["id"], expect=2)
    assert ferryd.ctl("list", "--json").json == []


def test_a_run_under_way_is_not_forgotten(ferryd, slow):
    ferryd.ctl("forget", slow, expect=1)
    assert ferryd.show(slow)["state"] not in ENDED


def test_watch_follows_to_the_end(ferryd, volumes):
    run = ferryd.start_clone(volumes.file(12 * MiB), volumes.path(), options=["--rate", "8M"])
    lines = [json.loads(line) for line in ferryd.ctl("watch", run, "--json").stdout.splitlines()]
    assert len(lines) >= 2
    for line in lines:
        check_run(line)
    assert lines[-1]["state"] == "completed"
    copied = [line["bytes_copied"] for line in lines]
    assert copied == sorted(copied)


def test_watch_of_an_ended_run_ends(ferryd, finished):
    assert json.loads(ferryd.ctl("watch", finished["id"], "--json").stdout.splitlines()[-1]) == finished
    ferryd.ctl("watch", finished["id"])


def test_a_clone_that_is_cancelled_elsewhere_exits_1(ferryd, volumes):
    waiting = ferryd.spawn_ctl("clone", volumes.file(64 * MiB), volumes.path(), "--rate", "1M", "--json")
    run = ferryd.wait_for_first_run()
    ferryd.ctl("cancel", run)
    stdout, stderr = waiting.communicate(timeout=10 * TIME_SCALE)
    assert waiting.returncode == 1
    assert json.loads(stdout)["state"] == "cancelled"
    assert len(stderr.strip().splitlines()) <= 1


def test_ctrl_c_detaches_and_says_how_to_go_on(ferryd, volumes):
    waiting = ferryd.spawn_ctl("clone", volumes.file(64 * MiB), volumes.path(), "--rate", "1M")
    run = ferryd.wait_for_first_run()
    # The signal must find the command following the run, not on its way to it: progress shows that it does.
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > 0)
    waiting.send_signal(signal.SIGINT)
    stdout, stderr = waiting.communicate(timeout=10 * TIME_SCALE)
    said = stdout + stderr
    assert f"watch {run}" in said and f"cancel {run}" in said
    assert ferryd.show(run)["state"] == "copying"


def test_progress_without_json_ends_with_a_summary(ferryd, volumes):
    result = ferryd.ctl("clone", volumes.file(MiB), volumes.path())
    assert result.stdout.strip() or result.stderr.strip()


def test_map_counts_every_granule(ferryd, volumes):
    source = volumes.sparse(8 * MiB, [(0, 2 * MiB)])
    run = ferryd.clone(source, volumes.path())
    cells = ferryd.ctl("map", run["id"], "--json").json["cells"]
    total = {kind: sum(cell[kind] for cell in cells) for kind in ("synced", "dirty", "zero", "bad")}
    assert total == {"synced": 512, "dirty": 0, "zero": 1536, "bad": 0}


def test_map_draws_in_the_terminal(ferryd, finished):
    assert ferryd.ctl("map", finished["id"]).stdout.strip()


def test_check_tells_and_touches_nothing(ferryd, volumes):
    source, target = volumes.loop(4 * MiB, data=True), volumes.path()
    report = ferryd.ctl("check", source, target, "--json").json
    assert report["ok"] is True
    assert report["refusals"] == []
    assert not target.exists()
    assert ferryd.ctl("list", "--json").json == []


def test_check_of_what_would_be_refused_exits_4(ferryd, volumes):
    pair = volumes.file(2 * MiB), volumes.loop(MiB)
    result = ferryd.ctl("check", *pair, expect=4)
    assert "small" in (result.stdout + result.stderr)
    report = ferryd.ctl("check", *pair, "--json", expect=4).json
    assert report["ok"] is False
    assert "small" in report["refusals"][0]["message"]


def test_devices_lists_what_can_be_moved(ferryd, volumes):
    device = volumes.loop(4 * MiB, data=True)
    listed = json.dumps(ferryd.ctl("devices", "--json").json)
    assert str(device) in listed
    assert str(device) in ferryd.ctl("devices").stdout


UNKNOWN = ("show", "watch", "map", "pause", "resume", "cancel", "forget", "verify", "sync")


@pytest.mark.parametrize("verb", UNKNOWN)
def test_an_unknown_run_is_usage(ferryd, verb):
    assert "nosuchrun" in ferryd.ctl(verb, "nosuchrun", expect=2).stderr
    assert json.loads(ferryd.ctl(verb, "nosuchrun", "--json", expect=2).stderr)["error"]["code"] == "not_found"


@pytest.mark.parametrize("words", [
    ("frobnicate",), (), ("clone",), ("clone", "/dev/null"), ("show",), ("list", "surplus"),
    ("clone", "/a", "/b", "--no-such-option"), ("clone", "/a", "/b", "--rate", "fast"),
    ("clone", "/a", "/b", "--granule", "5000"), ("clone", "/a", "/b", "--granule", "1K"),
    ("clone", "/a", "/b", "--mode", "sideways"), ("clone", "/a", "/b", "--io-engine", "posix"),
    ("clone", "/a", "/b", "--on-read-error", "shrug"), ("clone", "/a", "/b", "--rate", "-1"),
    ("clone", "/a", "/b", "--rate", "99999999999999999999T"), ("set", "x"), ("--socket",),
    ("clone", "/a", "/b", "--name", "a b/c"), ("clone", "/a", *(f"/t{at}" for at in range(9)))])
def test_usage_errors_exit_2(ferryd, words):
    ferryd.ctl(*words, expect=2)


@pytest.mark.parametrize("words", [("cutover", "x"), ("rollback", "x"), ("commit", "x")])
def test_what_needs_a_live_source_is_refused_clearly(ferryd, finished, words):
    result = ferryd.ctl(words[0], finished["id"], expect=None)
    assert result.status in (1, 2, 4), repr(result)
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [("--quiesce-cmd", "true"), ("--resume-cmd", "true"), ("--tracker", "ebpf")])
def test_options_of_live_runs_are_refused_clearly(ferryd, volumes, options):
    target = volumes.path()
    result = ferryd.ctl("clone", volumes.file(MiB), target, *options, expect=None)
    assert result.status in (2, 4), repr(result)
    assert len(result.stderr.strip().splitlines()) == 1
    assert options[0].lstrip("-") in result.stderr or "tracked" in result.stderr
    assert not target.exists()


def test_no_ferryd_exits_3(volumes):
    socket = volumes.path("no-socket")
    done = subprocess.run([binary("ferryctl"), "--socket", socket, "list"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(socket) in done.stderr


def test_the_environment_names_the_socket(ferryd):
    done = subprocess.run([binary("ferryctl"), "list", "--json"], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "BLOCKFERRY_SOCKET": str(ferryd.socket)})
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


@pytest.mark.parametrize("program", ["ferryd", "ferryctl"])
def test_help_and_version(program):
    for option in ("--help", "--version"):
        done = subprocess.run([binary(program), option], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and not done.stderr


def test_curl_can_talk_to_the_socket(ferryd, finished):
    need("curl")
    done = subprocess.run(["curl", "--silent", "--fail", "--unix-socket", str(ferryd.socket),
                           f"http://localhost/v1/runs/{finished['id']}"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == finished
