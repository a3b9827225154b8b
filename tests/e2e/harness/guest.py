# SPDX-License-Identifier: Apache-2.0
"""QEMU guests that write, and QMP to talk to them.

A guest has two QMP sockets, since each serves one client: `qmp` is ferryd's, and the test's own is behind command().
"""
import json
import signal
import socket
import struct
import subprocess
from pathlib import Path

from harness.volumes import KiB, MiB, need, run
from harness.waiting import TIME_SCALE, wait_until

BLOCK = 4 * KiB
BLOCKS = 2048  # of each disk, that the guest writes to
DISK = 24 * MiB


class Qmp:
    def __init__(self, path):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(60 * TIME_SCALE)
        self.connection.connect(str(path))
        self.lines = self.connection.makefile("r")
        assert "QMP" in json.loads(self.lines.readline())
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.connection.sendall(json.dumps({"execute": command, "arguments": arguments, "id": "test"}).encode())
        while True:
            line = self.lines.readline()
            if not line:
                raise ConnectionError(f"QEMU has closed the connection at {command}")
            answer = json.loads(line)
            if answer.get("id") != "test":
                continue
            assert "error" not in answer, f"{command} {arguments}: {answer['error']}"
            return answer["return"]

    def close(self):
        self.lines.close()
        self.connection.close()


class Qemu:
    """A process of QEMU's with its sockets, ended when the test ends. `before` is one that has ended: this is the same
    guest again, with the same sockets."""

    def __init__(self, volumes, words, monitor, before=None):
        self.directory = before.directory if before else volumes.path("qemu")
        self.directory.mkdir(exist_ok=True)
        self.qmp = self.directory / "qmp"
        own = self.directory / "own"
        for socket_path in (self.qmp, own):
            socket_path.unlink(missing_ok=True)
        with open(self.directory / "log", "wb") as log:
            self.process = subprocess.Popen([*words, *monitor(self.qmp, "ferryd"), *monitor(own, "own")],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        volumes.at_end(self.close)
        wait_until(lambda: self.qmp.exists() and own.exists() or self.process.poll() is not None, what="QEMU's sockets")
        assert self.process.poll() is None, (self.directory / "log").read_text()
        self.command = Qmp(own)

    def source(self, node="disk0", **more):
        parameters = "".join(f"&{name}={value}" for name, value in more.items())
        return f"qemu:{self.qmp}?node={node}{parameters}"

    def shut_down(self):
        """In order: QEMU closes its images."""
        self.command("quit")
        self.process.wait(30)

    def power_off(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def close(self):
        if self.process.poll() is None:
            self.power_off()
        self.command.close()

    def running(self):
        return self.command("query-status")["running"]

    def bitmaps(self):
        return [bitmap["name"] for node in self.command("query-named-block-nodes", flat=True)
                for bitmap in node.get("dirty-bitmaps", [])]

    def exports(self):
        return [each["id"] for each in self.command("query-block-exports")]

    def nodes(self):
        return [node["node-name"] for node in self.command("query-named-block-nodes", flat=True)]

    def assert_clean(self):
        """Nothing is left of what a run adds, but a disk that the guest uses."""
        used = {each["inserted"]["node-name"] for each in self.command("query-block") if "inserted" in each}
        left = [node for node in self.nodes() if node.startswith("blockferry-") and node.removesuffix("-file") not in used]
        assert (self.bitmaps(), self.exports(), left) == ([], [], [])
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.directory / "free")}})
        self.command("nbd-server-stop")


def raw_content(image):
    """What a guest sees of it, whatever its format. Precondition: nobody writes to it."""
    if not Path(image).read_bytes()[:4] == b"QFI\xfb":
        return Path(image).read_bytes()
    raw = Path(f"{image}.raw")
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def qcow2(volumes, raw):
    """An image with the same content."""
    need("qemu-img")
    image = volumes.path("qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    return image


def disk_words(images, iothread=False, driver="raw"):
    """Of QEMU: each a node disk0, disk1, … of a device vd0, vd1, …."""
    words = ["-object", "iothread,id=io"] if iothread else []
    for i, image in enumerate(images):
        words += ["-blockdev", f"driver=file,node-name=file{i},filename={image}",
                  "-blockdev", f"driver={driver},node-name=disk{i},file=file{i}",
                  "-device", f"virtio-blk-pci,id=vd{i},drive=disk{i}" + (",iothread=io" if iothread else "")]
    return words


def vhost_user_words(path):
    """Of a QEMU whose guest's disk is served by a storage daemon at that socket."""
    return ["-object", "memory-backend-memfd,id=memory,size=32M,share=on", "-machine", "memory-backend=memory",
            "-chardev", f"socket,id=disk,path={path}", "-device", "vhost-user-blk-pci,id=vd0,chardev=disk"]


def blocks_of(first, last, disks=1, disk=0):
    """{block: number} as the writes first … last leave them on one disk."""
    return {(number * 0x9E3779B1 & 0xFFFFFFFF) >> 16 & BLOCKS - 1: number
            for number in range(first, last + 1) if (number - 1) % disks == disk}


class BootGuest(Qemu):
    """Writes from its boot sector on, as fast as it can; what has returned stands in `acknowledged()`."""

    def __init__(self, volumes, disks=1, images=None, iothread=False, driver="raw", before=None, words=None):
        need("qemu-system-x86_64", "gcc")
        self.disks = disks
        self.images = images or [volumes.sparse(DISK, [(8 * MiB, 4 * MiB)], name="disk") for _ in range(disks)]
        self.before = [raw_content(image) for image in self.images]
        self.serial = volumes.path("serial")
        program = volumes.path("boot")
        run("gcc", "-m16", "-nostdlib", "-static", "-Wl,--build-id=none,--oformat=binary,-Ttext=0x7c00", "-o", program,
            Path(__file__).with_name("boot_writer.S"))
        floppy = bytearray(program.read_bytes())
        assert len(floppy) == 512
        floppy[509] = disks
        program.write_bytes(floppy.ljust(1440 * KiB, b"\0"))
        super().__init__(volumes, [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-no-user-config", "-display", "none",
            "-drive", f"if=floppy,file={program},format=raw,readonly=on", "-boot", "a", "-serial", f"file:{self.serial}",
            *(words or disk_words(self.images, iothread, driver))], lambda path, _: ["-qmp", f"unix:{path},server=on,wait=off"],
            before)
        self.wait_for_writes(3)

    def acknowledged(self, serial=None):
        return Path(serial or self.serial).stat().st_size // 4

    def wait_for_writes(self, more):
        wanted = self.acknowledged() + more if self.serial.exists() else more
        wait_until(lambda: self.serial.exists() and self.acknowledged() >= wanted, 60, "the guest's writes")

    def assert_holds(self, image, acknowledged, disk=0, offset=0):
        """The image is the disk after so many writes; the one after those may have been on its way."""
        content = Path(image).read_bytes()
        expected = bytearray(self.before[disk])
        for block, number in blocks_of(1, acknowledged, self.disks, disk).items():
            expected[block * BLOCK:(block + 1) * BLOCK] = struct.pack("<I", number) * (BLOCK // 4)
        for block, number in blocks_of(acknowledged + 1, acknowledged + 1, self.disks, disk).items():
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            if content[place] == struct.pack("<I", number) * (BLOCK // 4):
                expected[place] = content[place]
        different = [at // BLOCK for at in range(0, len(expected), BLOCK)
                     if content[at:at + BLOCK] != expected[at:at + BLOCK]]
        assert len(content) == len(expected) and not different, \
            f"{len(different)} blocks of {image} differ after {acknowledged} writes, first {different[:5]}"

    def assert_own_disk(self):
        """All that was acknowledged is where the guest began, and nothing else."""
        self.command("stop")
        self.assert_holds(self.images[0], self.acknowledged())
        self.command("cont")


def boot_linux(volumes, disks, made):
    """A guest with Debian's kernel and an ext4 on each disk; `made` holds what tests/vm/guest makes."""
    console = volumes.path("console")
    guest = Qemu(volumes, [
        "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config",
        "-display", "none", "-kernel", f"{made}/kernel", "-initrd", f"{made}/initramfs",
        "-append", "console=ttyS0 panic=-1 quiet no_timer_check", "-serial", f"file:{console}", *disk_words(disks)],
        lambda path, _: ["-qmp", f"unix:{path},server=on,wait=off"])
    guest.console = console
    return guest


def storage_daemon(volumes, image, driver="raw", before=None, exported=None):
    """`exported` is a socket, at which the disk is offered to a guest, over vhost-user."""
    need("qemu-storage-daemon")
    return Qemu(volumes, [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file0,filename={image}",
        "--blockdev", f"driver={driver},node-name=disk0,file=file0",
        *(("--export", f"vhost-user-blk,id=theirs,node-name=disk0,addr.type=unix,addr.path={exported},writable=on")
          if exported else ())],
        lambda path, name: ["--chardev", f"socket,path={path},server=on,wait=off,id={name}",
                            "--monitor", f"chardev={name}"], before)


