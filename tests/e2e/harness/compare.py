# SPDX-License-Identifier: Apache-2.0
"""What became of the data: bytes, holes and hashes."""
import errno
import hashlib
import os
import subprocess

MiB = 1024 * 1024


def size_of(volume):
    with open(volume, "rb") as device:
        return device.seek(0, os.SEEK_END)


def drop_cache(volume):
    """A block device is read afresh: what another opener left in its page cache would hide what is stored."""
    if os.path.exists(f"/sys/class/block/{os.path.basename(os.path.realpath(volume))}"):
        subprocess.run(["blockdev", "--flushbufs", os.fspath(volume)], check=True)


def assert_same(source, target):
    """cmp over the whole of the source; the target may be longer only where it is a block device."""
    size = size_of(source)
    assert size_of(target) >= size
    if os.path.isfile(target):
        assert os.path.getsize(target) == size
    drop_cache(source)
    drop_cache(target)
    done = subprocess.run(["cmp", f"--bytes={size}", os.fspath(source), os.fspath(target)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def extents(path):
    """The (begin, end) of each run of data of a file, by SEEK_DATA."""
    found = []
    with open(path, "rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found.append((begin, at))
    return found


def read_range(path, begin, end):
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def assert_same_sparse(source, target):
    """As assert_same for huge sparse files: outside the data of both they are zeroes by definition."""
    assert os.path.getsize(source) == os.path.getsize(target)
    for begin, end in extents(source) + extents(target):
        for at in range(begin, end, 16 * MiB):
            stop = min(end, at + 16 * MiB)
            assert read_range(source, at, stop) == read_range(target, at, stop), f"they differ in {at}..{stop}"


def allocated(path):
    """Bytes of a file's blocks (du)."""
    return os.stat(path).st_blocks * 512


def allocated_tree(directory):
    return sum(allocated(os.path.join(root, name)) for root, _, names in os.walk(directory) for name in names)


def fingerprint(volume):
    """A hash of all of it, to show that nothing was touched; None where there is nothing."""
    if not os.path.exists(volume):
        return None
    drop_cache(volume)
    digest = hashlib.blake2b()
    with open(volume, "rb") as device:
        while block := device.read(4 * MiB):
            digest.update(block)
    return digest.hexdigest()
