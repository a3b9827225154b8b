# SPDX-License-Identifier: Apache-2.0
"""Live sources on devices that few machines have. Inside tests/vm/run: what is made here goes with the machine."""
from pathlib import Path

import pytest

from harness.live import COMPARE, LiveVolume, Loaded
from harness.volumes import MiB, run
from harness.waiting import wait_until

CONFIG = Path("/sys/kernel/config")


def set_up(directory, **attributes):
    directory.mkdir()
    for name, value in attributes.items():
        (directory / name).write_text(str(value))
    return directory


def modprobe(*modules, options=()):
    run("modprobe", "-a", *modules) if not options else run("modprobe", *modules, *options)
    if not CONFIG.joinpath("nvmet").exists() and not CONFIG.joinpath("nullb").exists():
        run("mount", "-t", "configfs", "none", CONFIG)


@pytest.fixture
def multipath_head(volumes):
    """An NVMe disk with two paths, to a target of this machine's own."""
    modprobe("nvmet-tcp", "nvme-tcp")
    subsystem = set_up(CONFIG / "nvmet/subsystems/blockferry", attr_allow_any_host=1)
    namespace = set_up(subsystem / "namespaces/1", device_path=volumes.loop(192 * MiB), enable=1)
    volumes.at_end(lambda: (namespace / "enable").write_text("0"))  # it holds the loop device
    for number in (1, 2):
        port = set_up(CONFIG / f"nvmet/ports/{number}", addr_trtype="tcp", addr_adrfam="ipv4", addr_traddr="127.0.0.1",
                      addr_trsvcid=4420 + number)
        (port / "subsystems/blockferry").symlink_to(subsystem)
        Path("/dev/nvme-fabrics").write_text(
            f"transport=tcp,traddr=127.0.0.1,trsvcid={4420 + number},nqn=blockferry")
    wait_until(lambda: len(list(Path("/sys/block").glob("nvme*c*n1"))) == 2, 20, "two paths")
    head = Path("/dev/nvme0n1")
    wait_until(head.exists, 20, str(head))
    return str(head)


@pytest.fixture
def zoned_disk():
    modprobe("null_blk", options=("nr_devices=0",))
    set_up(CONFIG / "nullb/zoned", size=256, zoned=1, zone_size=4, memory_backed=1, power=1)
    return "/dev/zoned"


def clone_under_load(ferryd, volumes, disk, filesystem, options=None, **load):
    volume = LiveVolume(volumes, disk, filesystem, options)
    with Loaded(volume, volumes.random.randrange(2**32), **load):
        shown = ferryd.clone(volume.source, volume.target, timeout=200, options=[
            "--cutover-cmd", COMPARE, "--max-freeze", "120s", "--max-downtime", "10s"])
    assert "checksum" not in [each["kind"] for each in shown["passes"]], shown["tracker_losses"]
    assert len(shown["passes"]) > 1 and shown["verify"]["mismatches"] == 0
    return volume


def test_a_disk_with_two_paths(ferryd, volumes, multipath_head):
    """Writes are queued at the head, and end at a path: on the way they change their device."""
    clone_under_load(ferryd, volumes, multipath_head, "ext4", direct_rate="2m").check_target()


def test_a_disk_that_is_written_in_zones(ferryd, volumes, zoned_disk):
    """Where an append comes to lie is known when it has ended. The copy is what the source was; the filesystem on it needs
    zones of the same size to be read, which the target has not."""
    clone_under_load(ferryd, volumes, zoned_disk, "btrfs", only_files=True)


@pytest.fixture
def persistent_memory():
    """What tests/vm/run tells the kernel to take for it."""
    run("modprobe", "-a", "nd_e820", "nd_pmem")
    disk = Path("/dev/pmem0")
    wait_until(disk.exists, 20, str(disk))
    return str(disk)


def test_persistent_memory(ferryd, volumes, persistent_memory):
    """Mapped files are written past the device, unless the filesystem is told not to."""
    run("mkfs.ext4", "-q", "-F", persistent_memory)
    where = volumes.mount(persistent_memory, "ext4")
    result = ferryd.ctl("clone", persistent_memory, volumes.loop(64 * MiB), expect=4)
    assert "dax=never" in result.stderr
    run("umount", where)
    clone_under_load(ferryd, volumes, persistent_memory, "ext4", options="dax=never", only_files=True).check_target()
