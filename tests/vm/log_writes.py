# SPDX-License-Identifier: Apache-2.0
"""What a device was after each flush: the log of the kernel's dm-log-writes, played onto another one.

  sector 0          magic, version, number of entries (8 bytes each), bytes of a sector (4), from which all is counted
  then each entry   a sector: sector, sectors, flags, length of a mark (8 bytes each), the mark;
                    and what was written, unless it was a discard

Writes stand in the log in the order in which they ended, and those of which a flush made sure before that flush."""
import os
import struct

MAGIC, VERSION = 0x6a736677736872, 1
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class Log:
    def __init__(self, path):
        with open(path, "rb") as log:
            magic, version, count, self.sector_bytes = struct.unpack("<QQQI", log.read(28))
            assert (magic, version) == (MAGIC, VERSION), f"{path} holds no log"
            self.path, self.entries, at = path, [], self.sector_bytes
            for _ in range(count):
                log.seek(at)
                sector, sectors, flags, length = struct.unpack("<QQQQ", log.read(32))
                mark = log.read(length).decode() if flags & MARK else ""
                at += self.sector_bytes
                self.entries.append((sector * self.sector_bytes, sectors * self.sector_bytes, flags, at, mark))
                if not flags & DISCARD:
                    at += sectors * self.sector_bytes

    def after_flushes(self, begin, end):
        """Numbers of entries after those that made something durable between two marks."""
        marks = {mark: number for number, (*_, mark) in enumerate(self.entries) if mark}
        return [number + 1 for number in range(marks[begin], marks[end])
                if self.entries[number][2] & (FLUSH | FUA)]

    def play(self, device, first, last):
        """Entries from `first` up to before `last`."""
        with open(self.path, "rb") as log, open(device, "r+b") as onto:
            for offset, count, flags, at, _ in self.entries[first:last]:
                if flags & MARK or not count:
                    continue
                log.seek(at)
                onto.seek(offset)
                onto.write(bytes(count) if flags & DISCARD else log.read(count))
            onto.flush()
            os.fsync(onto.fileno())
