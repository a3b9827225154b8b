# SPDX-License-Identifier: Apache-2.0
"""NBD servers that fail, wait, lack abilities, die and come back: nothing is lost, and each end is a clear one."""
import signal

import pytest

from harness import nbd
from harness.compare import assert_same
from harness.volumes import KiB, MiB, need
from harness.waiting import Stopwatch

SIZE = 32 * MiB


@pytest.fixture(autouse=True)
def needed():
    need("nbdkit", "nbdcopy")


@pytest.fixture
def source(volumes):
    return volumes.sparse(SIZE, [(0, 8 * MiB), (12 * MiB, 2 * MiB), (SIZE - 5 * MiB, 5 * MiB)])


@pytest.mark.parametrize("filters", [
    ["--filter=nozero"], ["--filter=noextents"], ["--filter=nozero", "--filter=noextents", "--filter=noparallel"],
    ["--filter=fua"], ["--filter=nozero", "zeromode=emulate"], ["--filter=multi-conn", "multi-conn-mode=disable"],
    ["--filter=delay", "rdelay=5ms", "wdelay=5ms"], ["--filter=rate", "rate=1G"],
    ["--filter=blocksize-policy", "blocksize-minimum=64K", "blocksize-preferred=256K", "blocksize-maximum=1M",
     "blocksize-error-policy=error"]], ids=lambda filters: "+".join(filters))
def test_servers_that_lack_this_or_that(ferryd, volumes, source, filters):
    only, parameters = [w for w in filters if w.startswith("-")], [w for w in filters if not w.startswith("-")]
    image, back = volumes.file(SIZE), volumes.path()
    server = nbd.nbdkit(volumes, *only, "file", image, *parameters)
    ferryd.clone(source, server.uri, options=["--overwrite"])
    assert_same(source, image)
    ferryd.clone(server.uri, back)
    assert_same(source, back)


def test_errors_end_the_run_with_the_place(ferryd, volumes, source):
    trigger = volumes.path("trigger")
    server = nbd.nbdkit(volumes, "--filter=error", "file", volumes.file(SIZE, data=False), "error-pwrite=ENOSPC",
                        "error-pwrite-rate=100%", f"error-pwrite-file={trigger}")
    trigger.touch()
    result = ferryd.ctl("clone", "--name", "full", source, server.uri, expect=1)
    assert server.uri in result.stderr and "No space left" in result.stderr and "resume" in result.stderr
    trigger.unlink()
    ferryd.ctl("resume", "full")
    ferryd.wait_end("full")


def test_errors_now_and_then_are_tried_again(ferryd, volumes, source):
    target = volumes.path()
    server = nbd.nbdkit(volumes, "--filter=error", "file", source, "error-pread=EIO", "error-pread-rate=2%")
    ferryd.clone(server.uri, target, options=["--io-size", "64K"])
    assert_same(source, target)


def started_slowly(ferryd, one, other, *options):
    """A run that lasts: some of it is copied and much of it not."""
    run = ferryd.start_clone(one, other, options=["--io-size", "64K", "--queue-depth", "4", "--rate", "12M", *options])
    ferryd.wait_for(run, lambda shown: shown["bytes_copied"] > MiB)
    return run


@pytest.mark.parametrize("verify", [[], ["--no-verify"]], ids=["verified", "unverified"])
def test_a_target_that_is_killed_and_comes_back(ferryds, volumes, source, verify):
    """Its memory is gone, and so is all that it acknowledged: a file is what a server that flushes keeps."""
    ferryd = ferryds("--checkpoint-interval", "200ms")
    image = volumes.file(SIZE, data=False)
    server = nbd.nbdkit(volumes, "--filter=delay", "file", image, "wdelay=2ms")
    run = started_slowly(ferryd, source, server.uri, *verify)
    for _ in range(3):
        before = ferryd.show(run)["bytes_copied"]
        server.restart()
        ferryd.wait_for(run, lambda shown, least=before + MiB // 2: shown["bytes_copied"] > least or
                        shown["state"] == "completed")
    ferryd.wait_end(run)
    assert_same(source, image)


def test_a_target_that_forgets_what_was_not_flushed(ferryds, volumes, source):
    """qemu-nbd with a write-back cache of its own would; nbdkit's cache filter does, when it is killed."""
    ferryd = ferryds("--checkpoint-interval", "300ms")
    image = volumes.file(SIZE, data=False)
    server = nbd.nbdkit(volumes, "--filter=cache", "file", image, "cache=writeback")
    run = started_slowly(ferryd, source, server.uri, "--no-verify")
    for _ in range(3):
        before = ferryd.show(run)["bytes_copied"]
        server.restart()
        ferryd.wait_for(run, lambda shown, least=before + MiB // 2: shown["bytes_copied"] > least or
                        shown["state"] == "completed")
    ferryd.wait_end(run)
    assert_same(source, image)


def test_a_source_that_is_killed_and_comes_back(ferryd, volumes, source):
    server, target = nbd.nbdkit(volumes, "file", source), volumes.path()
    run = started_slowly(ferryd, server.uri, target)
    server.restart()
    ferryd.wait_end(run)
    assert_same(source, target)


def test_ferryd_is_killed_too(ferryds, volumes, source):
    ferryd = ferryds("--checkpoint-interval", "200ms")
    image = volumes.file(SIZE, data=False)
    one, other = nbd.nbdkit(volumes, "file", source), nbd.nbdkit(volumes, "--filter=cache", "file", image,
                                                                 "cache=writeback")
    run = started_slowly(ferryd, one.uri, other.uri)
    ferryd.kill()
    other.restart()
    ferryd.start()
    assert ferryd.wait_end(run)["restarts"] == 1
    assert_same(source, image)


def test_a_hung_server_is_told_and_cancel_leaves_it(ferryds, volumes, source):
    ferryd = ferryds("--stall-warning", "500ms")
    server = nbd.nbdkit(volumes, "--filter=delay", "file", source, "rdelay=1ms")
    run = started_slowly(ferryd, server.uri, volumes.path())
    pid = server.process.pid
    server.process.send_signal(signal.SIGSTOP)
    try:
        ferryd.wait_for(run, lambda shown: server.uri in (shown["warning"] or ""), what="the warning")
        watch = Stopwatch()
        ferryd.ctl("cancel", run)
        ferryd.wait_end(run, "cancelled")
        assert watch.seconds() < 5
    finally:
        assert server.process.pid == pid
        server.process.send_signal(signal.SIGCONT)


def test_what_cannot_be_is_refused_before_anything_is_touched(ferryd, volumes, source):
    def refused(one, other, says, *options):
        result = ferryd.ctl("clone", one, other, *options, expect=4)
        assert says in result.stderr, result.stderr
    small = nbd.nbdkit(volumes, "memory", SIZE - 512)
    refused(source, small.uri, "smaller than the source")
    read_only = nbd.nbdkit(volumes, "memory", SIZE, options=["-r"])
    refused(source, read_only.uri, "read-only")
    memory = nbd.nbdkit(volumes, "memory", SIZE)
    refused(memory.uri, memory.uri, "the source itself")
    refused(source, f"nbd+unix:///?socket={volumes.path()}", "No such file")
    refused(source, f"nbd://127.0.0.1:{nbd.free_port()}", "refused")
    refused(source, memory.uri.replace("nbd+unix", "nbds+unix"), "TLS")
    large = nbd.nbdkit(volumes, "--filter=blocksize-policy", "memory", SIZE, "blocksize-minimum=64K",
                       "blocksize-preferred=64K")
    refused(source, large.uri, "64.0 KiB", "--granule", "4K")
    shown = ferryd.clone(source, large.uri)
    assert shown["granule_bytes"] == 64 * KiB
    assert "cannot be tracked" in ferryd.ctl("migrate", memory.uri, volumes.path(), expect=4).stderr
    usage = ferryd.ctl("clone", source, "nbds://bob:secret@host/", expect=2)
    assert "secret" not in usage.stderr and "secret" not in ferryd.stderr()


def test_a_server_that_cannot_flush_needs_force(ferryd, volumes, source):
    need("nbd-server")
    image = volumes.file(SIZE, data=False)
    server = nbd.nbd_server(volumes, image, flush=False)
    assert "--force" in ferryd.ctl("clone", source, server.uri, expect=4).stderr
    ferryd.clone(source, server.uri, options=["--force"])
    assert_same(source, image)
