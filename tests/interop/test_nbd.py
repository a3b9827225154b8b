# SPDX-License-Identifier: Apache-2.0
"""Volumes behind other people's NBD servers, as sources and as targets: contents agree, holes stay holes."""
import json
import subprocess

import pytest

from harness import nbd
from harness.compare import allocated, assert_same, extents
from harness.volumes import KiB, MiB, GiB, TiB, need, run

SIZE = 48 * MiB
DATA = [(0, 3 * MiB), (10 * MiB, 64 * KiB), (SIZE - MiB, MiB)]


@pytest.fixture
def source(volumes):
    return volumes.sparse(SIZE, DATA)


SERVERS = {
    "nbdkit": lambda volumes, image: nbd.nbdkit(volumes, "file", image),
    "nbdkit-tcp": lambda volumes, image: nbd.nbdkit_tcp(volumes, "file", image),
    "qemu-nbd": nbd.qemu_nbd,
    "qemu-storage-daemon": nbd.storage_daemon,
    "nbd-server": nbd.nbd_server,
}


@pytest.fixture(params=SERVERS)
def serve(request, volumes):
    need(request.param.removesuffix("-tcp"))
    return lambda image: SERVERS[request.param](volumes, image)


def test_from_a_server_into_a_file(ferryd, volumes, source, serve):
    server, target = serve(source), volumes.path()
    shown = ferryd.clone(server.uri, target)
    assert shown["source"]["uri"] == server.uri
    assert_same(source, target)
    assert allocated(target) <= 5 * MiB


def test_from_a_file_onto_a_server_that_was_full(ferryd, volumes, source, serve):
    image = volumes.file(SIZE)
    server = serve(image)
    ferryd.clone(source, server.uri, options=["--overwrite"])
    assert_same(source, image)
    if "nbd-server" not in server.command[0]:  # which writes its zeroes
        assert allocated(image) <= 5 * MiB, "what holds nothing but zeroes takes space on the target"


def test_from_server_to_server_incrementally(ferryd, volumes, source, serve):
    image = volumes.file(SIZE, data=False)
    one, other = nbd.nbdkit(volumes, "file", source), serve(image)
    ferryd.clone(one.uri, other.uri)
    assert_same(source, image)
    volumes.write(source, 20 * MiB, volumes.data(64 * KiB))
    shown = ferryd.clone(one.uri, other.uri, options=["--mode", "incremental"])
    assert shown["bytes_copied"] == 64 * KiB
    assert_same(source, image)


def test_memory_and_sparse_random(ferryd, volumes):
    need("nbdkit", "nbdcopy")
    source = nbd.nbdkit(volumes, "sparse-random", "size=1G", "seed=5", "percent=5")
    target = nbd.nbdkit(volumes, "memory", "1G")
    shown = ferryd.clone(source.uri, target.uri)
    assert shown["verify"] == {"granules": GiB // 4096, "mismatches": 0}
    assert shown["bytes_read"] < 0.4 * GiB, "holes were fetched"
    # The plugin compares every write with what it would hold itself.
    run("nbdcopy", target.uri, source.uri)


def test_a_terabyte_of_nothing(ferryd, volumes):
    need("nbdkit", "qemu-io")
    source, target = nbd.nbdkit(volumes, "memory", "1T"), nbd.nbdkit(volumes, "memory", "1T")
    run("qemu-io", "-f", "raw", "-c", "write -P 120 700G 64K", source.uri)
    shown = ferryd.clone(source.uri, target.uri)
    assert shown["bytes_total"] == TiB and shown["bytes_read"] < 16 * MiB
    assert "verification failed" not in run("qemu-io", "-f", "raw", "-c", "read -P 120 700G 64K", target.uri)


@pytest.mark.parametrize("size", [0, 1, 511, 1025, 64 * KiB + 513, 3 * MiB + 1])
def test_odd_sizes(ferryd, volumes, size):
    need("nbdkit")
    source, image, back = volumes.file(size), volumes.file(size, data=False), volumes.path()
    server = nbd.nbdkit(volumes, "file", image)
    ferryd.clone(source, server.uri, options=["--overwrite"])
    assert_same(source, image)
    ferryd.clone(server.uri, back)
    assert_same(source, back)


def test_qcow2_through_qemu_nbd(ferryd, volumes, source):
    """The one-liners of docs/backup-to-a-file.md."""
    need("qemu-nbd", "qemu-img")
    image, back = volumes.path("image.qcow2"), volumes.path()
    run("qemu-img", "create", "-f", "qcow2", image, SIZE)
    server = nbd.qemu_nbd(volumes, image, "qcow2")
    ferryd.clone(source, server.uri)
    ferryd.clone(server.uri, back)
    assert_same(source, back)
    server.process.terminate()
    server.process.wait(20)
    server.process = None
    run("qemu-img", "check", image)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, image)
    assert allocated(image) <= 8 * MiB


def test_qcow2_through_the_storage_daemon(ferryd, volumes, source):
    need("qemu-storage-daemon", "qemu-img")
    image, back = volumes.path("image.qcow2"), volumes.path()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, image)
    server = nbd.storage_daemon(volumes, image, "qcow2", writable=False)
    ferryd.clone(server.uri, back)
    assert_same(source, back)
    assert sum(end - begin for begin, end in extents(back)) <= 5 * MiB
    assert "read-only" in ferryd.ctl("clone", source, server.uri, "--overwrite", expect=4).stderr


def test_a_disk_image_is_seen_behind_a_server(ferryd, volumes, source):
    """What a target holds is looked at before it is overwritten."""
    need("nbdkit", "mkfs.ext4")
    image = volumes.file(SIZE, data=False)
    run("mkfs.ext4", "-q", "-L", "precious", image)
    server = nbd.nbdkit(volumes, "file", image)
    refused = ferryd.ctl("clone", source, server.uri, expect=4)
    assert "ext4" in refused.stderr and "--overwrite" in refused.stderr
    assert run("blkid", "-p", "-o", "value", "-s", "LABEL", image).strip() == "precious"


def test_check_tells_what_the_server_can(ferryd, volumes, source):
    need("nbd-server")
    server = nbd.nbd_server(volumes, volumes.file(SIZE, data=False))
    told = json.loads(ferryd.ctl("check", source, server.uri, "--json").stdout)["targets"][0]
    assert told["kind"] == "nbd" and told["bytes"] == SIZE
    text = ferryd.ctl("check", source, server.uri).stdout
    assert "does not tell holes" in text and "zeroes ranges" in text and "flushes" in text, text


def test_nbdcopy_agrees(ferryd, volumes, source):
    """The peer reads what was written, over the same server."""
    need("nbdkit", "nbdcopy")
    target, copy = nbd.nbdkit(volumes, "memory", SIZE), volumes.path()
    ferryd.clone(source, target.uri)
    run("nbdcopy", target.uri, copy)
    assert_same(source, copy)
    done = subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), target.uri], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
