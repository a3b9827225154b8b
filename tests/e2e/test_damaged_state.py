# SPDX-License-Identifier: Apache-2.0
"""Damaged, cut, newer and foreign state: ferryd starts, and no run is ever continued by guessing."""
import os
import subprocess

import pytest

from harness.compare import assert_same, fingerprint
from harness.volumes import MiB
from harness.waiting import TIME_SCALE

SIZE = 24 * MiB


@pytest.fixture
def stopped(ferryd, volumes):
    """(run, source, target) of a run cut off half way by a stop of ferryd."""
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    run = ferryd.start_clone(source, target, options=["--rate", "24M"])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > SIZE // 2)
    ferryd.stop()
    return run, source, target


def state_files(ferryd):
    """What there is to damage, in an order that a seed replays."""
    return sorted(path for path in ferryd.state_dir.iterdir() if path.is_file() and path.stat().st_size > 0)


def find(ferryd, run):
    return next((shown for shown in ferryd.request("GET", "/v1/runs")[1] if shown["id"] == run), None)


def right_or_failed(ferryd, run, source, target):
    """The only two outcomes: a copy that is right, or a run that says that its state is damaged."""
    if find(ferryd, run) is None:
        return  # its record is beyond recognition: forgotten, and nothing is done to the target
    ferryd.ctl("set", run, "--rate", "0", expect=None)
    shown = ferryd.wait_state(run, "completed", "failed")
    if shown["state"] == "completed":
        assert_same(source, target)
    else:
        assert shown["error"]["code"] in ("state_damaged", "state_newer"), shown
        assert shown["error"]["message"]


def test_every_file_with_a_flipped_bit(ferryd, volumes, stopped):
    run, source, target = stopped
    for path in state_files(ferryd):
        kept = path.read_bytes()
        damaged = bytearray(kept)
        at = volumes.random.randrange(min(len(kept), 4096))
        damaged[at] ^= 1 << volumes.random.randrange(8)
        path.write_bytes(damaged)
        print(f"flipped a bit of {path.name} at {at}")
        ferryd.start()
        assert find(ferryd, run) is not None
        ferryd.stop()
        path.write_bytes(kept)
    ferryd.start()
    right_or_failed(ferryd, run, source, target)


@pytest.mark.parametrize("round_", range(4))
def test_flipped_bits_anywhere_never_make_a_wrong_copy(ferryd, volumes, stopped, round_):
    run, source, target = stopped
    paths = state_files(ferryd)
    path = paths[(volumes.random.randrange(len(paths)) + round_) % len(paths)]
    content = bytearray(path.read_bytes())
    for _ in range(4):
        content[volumes.random.randrange(len(content))] ^= 1 << volumes.random.randrange(8)
    path.write_bytes(content)
    print(f"damaged {path.name}")
    ferryd.start()
    right_or_failed(ferryd, run, source, target)


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_files_never_make_a_wrong_copy(ferryd, stopped, part):
    run, source, target = stopped
    for path in state_files(ferryd):
        os.truncate(path, int(path.stat().st_size * part))
    ferryd.start()
    right_or_failed(ferryd, run, source, target)


def test_missing_files_never_make_a_wrong_copy(ferryd, stopped):
    """All but the record: what was synced is not known any more."""
    run, source, target = stopped
    for path in state_files(ferryd):
        if run in path.name and not _is_record(path):
            path.unlink()
    ferryd.start()
    right_or_failed(ferryd, run, source, target)


def _is_record(path):
    return not any(word in path.name for word in ("bitmap", "checksum", "lag"))


def test_a_damaged_record_is_shown_as_a_failed_run_and_left_in_place(ferryd, stopped):
    run, source, target = stopped
    record = next(path for path in state_files(ferryd) if run in path.name and _is_record(path))
    damaged = bytearray(record.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    record.write_bytes(damaged)
    before = fingerprint(target)
    ferryd.start()
    shown = find(ferryd, run)
    assert shown["state"] == "failed"
    assert shown["error"]["code"] == "state_damaged"
    ferryd.ctl("resume", run, expect=1)
    assert fingerprint(target) == before
    assert record.read_bytes() == bytes(damaged)
    ferryd.ctl("forget", run)
    assert ferryd.ctl("list", "--json").json == []


@pytest.mark.parametrize("which", ["run-", ".bitmap", ".checksums"])
def test_state_of_a_later_version_is_left_alone(ferryd, stopped, which):
    """As after a downgrade: said clearly, nothing guessed, and the later version finds all as it was."""
    run, source, target = stopped
    path = next(path for path in state_files(ferryd) if which in path.name)
    kept = path.read_bytes()
    later = bytearray(kept)
    if which == "run-":
        later = later.replace(b"blockferry-run 1 ", b"blockferry-run 4 ", 1)
    for magic in (b"BFBITMP1", b"BFCHKSM1"):
        at = later.find(magic)
        while at >= 0:
            later[at + 8:at + 12] = (2).to_bytes(4, "little")
            at = later.find(magic, at + 1)
    assert later != kept, "the version was not found"
    path.write_bytes(later)
    before = fingerprint(target)
    ferryd.start()
    shown = ferryd.wait_state(run, "failed")
    assert shown["error"]["code"] == "state_newer", shown
    assert "later version" in shown["error"]["message"]
    assert fingerprint(target) == before
    ferryd.stop()
    assert path.read_bytes() == later
    if which == "run-":
        path.write_bytes(kept)
        ferryd.start()
        right_or_failed(ferryd, run, source, target)
        assert find(ferryd, run)["state"] == "completed"


def test_a_damaged_run_does_not_disturb_others(ferryd, volumes, stopped):
    run, _, _ = stopped
    for path in state_files(ferryd):
        if run in path.name:
            path.write_bytes(volumes.data(path.stat().st_size))
    ferryd.start()
    source, target = volumes.file(MiB), volumes.path()
    ferryd.clone(source, target)
    assert_same(source, target)


def test_foreign_files_are_left_alone(ferryd, volumes):
    ferryd.stop()
    foreign = {"README": b"mine", ".hidden": b"", "x.run": volumes.data(100), "a.bitmap": volumes.data(5000),
               "lock.old": b"?"}
    for name, content in foreign.items():
        (ferryd.state_dir / name).write_bytes(content)
    (ferryd.state_dir / "directory").mkdir()
    ferryd.start()
    ferryd.clone(volumes.file(MiB), volumes.path())
    for name in ("README", ".hidden"):
        assert (ferryd.state_dir / name).read_bytes() == foreign[name]


def test_damaged_checksums_do_not_hide_a_change(ferryd, volumes):
    """An increment trusts the recorded checksums: damage in them must be noticed, or cause copying, no less."""
    source, target = volumes.loop(SIZE, data=True), volumes.loop(SIZE)
    ferryd.clone(source, target)
    ferryd.stop()
    for path in state_files(ferryd):
        if "checksum" in path.name:
            content = bytearray(path.read_bytes())
            for at in range(4096, len(content), 997):
                content[at] ^= 0x10
            path.write_bytes(content)
    volumes.write(source, 5 * MiB, volumes.data(MiB))
    ferryd.start()
    run = ferryd.clone(source, target, options=["--mode", "incremental"], expect=None)
    if run["state"] == "completed":
        assert_same(source, target)


def test_two_ferryds_on_one_state_directory(ferryd):
    second = subprocess.run(_with_socket(ferryd), capture_output=True, text=True, timeout=20 * TIME_SCALE)
    assert second.returncode == 1
    assert len(second.stderr.strip().splitlines()) == 1
    assert str(ferryd.state_dir) in second.stderr
    assert ferryd.ctl("list", "--json").json == []


def _with_socket(ferryd):
    command = ferryd.command()
    command[command.index("--socket") + 1] = str(ferryd.directory / "second.sock")
    return command


def test_two_ferryds_on_one_socket(ferryd):
    command = ferryd.command()
    command[command.index("--state-dir") + 1] = str(ferryd.directory / "second-state")
    second = subprocess.run(command, capture_output=True, text=True, timeout=20 * TIME_SCALE)
    assert second.returncode == 1
    assert len(second.stderr.strip().splitlines()) == 1
    assert str(ferryd.socket) in second.stderr
    assert ferryd.ctl("list", "--json").json == []


def test_a_socket_file_left_by_a_crash_is_replaced(ferryd):
    ferryd.kill()
    assert ferryd.socket.exists()
    ferryd.start()
    ferryd.stop()
    assert not ferryd.socket.exists()


def test_a_file_that_is_no_socket_is_not_replaced(ferryd):
    ferryd.stop()
    ferryd.socket.write_text("precious")
    done = subprocess.run(ferryd.command(), capture_output=True, text=True, timeout=20 * TIME_SCALE)
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert ferryd.socket.read_text() == "precious"


@pytest.mark.parametrize("options", [
    ["--no-such-option"], ["--max-runs", "many"], ["--max-runs", "0"], ["--checkpoint-interval", "soon"],
    ["--checkpoint-interval", "0"], ["--memory-budget", "-1"], ["surplus"], ["--config", "/no/such/file"],
    ["--io-engine", "posix"], ["--metrics-listen", "nowhere"], ["--metrics-listen", "127.0.0.1:99999"]])
def test_bad_options_end_ferryd_with_one_line(ferryd, options):
    command = _with_socket(ferryd)
    command[command.index("--state-dir") + 1] = str(ferryd.directory / "second-state")
    if options[0] == "--metrics-listen":
        at = command.index("--metrics-listen")
        del command[at:at + 2]
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=20 * TIME_SCALE)
    assert done.returncode in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert options[0].lstrip("-") in done.stderr or options[-1] in done.stderr or options == ["surplus"]


def test_the_configuration_file_takes_the_same_names(ferryds, volumes):
    config = volumes.path("ferryd.conf")
    config.write_text("# a comment\nmax-runs = 1\ncheckpoint-interval = 1s\n")
    ferryd = ferryds("--config", config)
    runs = [ferryd.start_clone(volumes.file(8 * MiB), volumes.path(), options=["--rate", "1M"]) for _ in range(2)]
    ferryd.wait_state(runs[0], "copying")
    assert ferryd.show(runs[1])["state"] == "queued"


def test_an_unknown_name_in_the_configuration_file(ferryd, volumes):
    config = volumes.path("ferryd.conf")
    config.write_text("max-rnus = 1\n")
    done = subprocess.run([*_with_socket(ferryd), "--config", config], capture_output=True, text=True,
                          timeout=20 * TIME_SCALE)
    assert done.returncode in (1, 2)
    assert "max-rnus" in done.stderr
