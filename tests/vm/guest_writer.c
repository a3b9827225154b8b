// SPDX-License-Identifier: Apache-2.0
// Writes blocks at random places of a file on each of some filesystems, in turns, and says which are safe:
//
//   ready
//   NUMBER                 fsync has returned: so has each one's before
//
// Write NUMBER goes to the file of the filesystem NUMBER % count, at block hash(NUMBER) % blocks, and holds
// its number, so that whoever reads the file can tell which writes it has seen; a second file grows by a line
// each.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { block_bytes = 4096, blocks = 2048 };

static uint64_t hash(uint64_t number) {
  number ^= number >> 31;
  number *= 0x9E3779B97F4A7C15u;
  return number ^ number >> 29;
}

static void fail(const char* what) {
  perror(what);
  exit(1);
}

int main(int argc, char** argv) {
  static uint64_t block[block_bytes / sizeof(uint64_t)];
  int data[8], journal[8];
  const int count = argc - 1;
  if (count < 1 || count > 8) return 2;
  setvbuf(stdout, NULL, _IOLBF, 0);
  for (int i = 0; i < count; ++i) {
    char path[256];
    snprintf(path, sizeof path, "%s/data", argv[i + 1]);
    data[i] = open(path, O_RDWR | O_CREAT, 0600);
    snprintf(path, sizeof path, "%s/journal", argv[i + 1]);
    journal[i] = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (data[i] < 0 || journal[i] < 0) fail(path);
    if (ftruncate(data[i], (off_t)blocks * block_bytes) != 0) fail(path);
  }
  puts("ready");
  for (uint64_t number = 1;; ++number) {
    const int disk = (int)(number % (uint64_t)count);
    for (size_t i = 0; i < sizeof block / sizeof *block; ++i) block[i] = number;
    const off_t place = (off_t)(hash(number) % blocks) * block_bytes;
    char line[32];
    const int length = snprintf(line, sizeof line, "%llu\n", (unsigned long long)number);
    if (pwrite(data[disk], block, sizeof block, place) != sizeof block) fail("write");
    if (write(journal[disk], line, (size_t)length) != length) fail("append");
    if (fsync(data[disk]) != 0 || fsync(journal[disk]) != 0) fail("fsync");
    printf("%llu\n", (unsigned long long)number);
  }
}
