// SPDX-License-Identifier: Apache-2.0
// Drives a fuzzer where libFuzzer is not to be had: FUZZER [CORPUS] [SECONDS] [SEED]. Replays the corpus (a
// folder or one file), then feeds mutations of it for that long. The fuzzer runs in a child; what it dies of
// is kept as a file.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Bytes = std::vector<std::uint8_t>;
using Random = std::mt19937_64;
using SteadyClock = std::chrono::steady_clock;

constexpr std::size_t input_bytes_max = 64 << 10;
constexpr unsigned seconds_for_one_input = 60;

/// Shared with the child: the input that it works on.
struct Current {
  std::uint64_t number;
  std::size_t size;
  std::uint8_t data[input_bytes_max];
};

std::size_t below(Random& random, std::size_t end) {
  return end == 0 ? 0 : random() % end;
}

std::vector<Bytes> read_corpus(const std::string& path) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(path))
    for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
  else if (std::filesystem::exists(path))
    files.emplace_back(path);
  std::sort(files.begin(), files.end());  // the order is part of what a seed replays
  std::vector<Bytes> corpus;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    Bytes bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    bytes.resize(std::min(bytes.size(), input_bytes_max));
    corpus.push_back(std::move(bytes));
  }
  if (corpus.empty()) corpus.emplace_back();
  return corpus;
}

void insert_some(Bytes& bytes, Random& random, const Bytes& from) {
  const auto start = below(random, from.size());
  const auto count =
      std::min<std::size_t>(below(random, from.size() - start) + 1, input_bytes_max - bytes.size());
  if (from.empty() || count == 0) return;
  const Bytes piece(from.begin() + static_cast<std::ptrdiff_t>(start),
                    from.begin() + static_cast<std::ptrdiff_t>(std::min(from.size(), start + count)));
  bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(below(random, bytes.size() + 1)), piece.begin(),
               piece.end());
}

void mutate(Bytes& bytes, Random& random, const std::vector<Bytes>& corpus) {
  static constexpr std::uint8_t telling[] = {0,   1,   0x7f, 0x80, 0xff, '"',  '\\', '[',
                                             '{', '}', '-',  '9',  '\r', '\n', ' '};
  const auto at = below(random, bytes.size());
  switch (random() % 7) {
    case 0:
      if (!bytes.empty()) bytes[at] = static_cast<std::uint8_t>(bytes[at] ^ (1U << random() % 8));
      break;
    case 1:
      if (!bytes.empty()) bytes[at] = telling[below(random, std::size(telling))];
      break;
    case 2:
      if (bytes.size() < input_bytes_max)
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random()));
      break;
    case 3: {
      const auto count = below(random, std::min<std::size_t>(bytes.size() - at, 64) + 1);
      bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                  bytes.begin() + static_cast<std::ptrdiff_t>(at + count));
      break;
    }
    case 4:
      insert_some(bytes, random, Bytes(bytes));
      break;
    case 5:
      insert_some(bytes, random, corpus[below(random, corpus.size())]);
      break;
    default:
      bytes.resize(at);
  }
}

void run_one(Current& current, const Bytes& bytes) {
  ++current.number;
  current.size = bytes.size();
  std::copy(bytes.begin(), bytes.end(), current.data);
  ::alarm(seconds_for_one_input);
  // A copy of exactly this size, so that reading past its end is found out.
  const Bytes exact(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

void run_all(Current& current, const std::vector<Bytes>& corpus, double seconds, std::uint64_t seed) {
  for (const auto& bytes : corpus) run_one(current, bytes);
  Random random(seed);
  const auto end = SteadyClock::now() + std::chrono::duration<double>(seconds);
  while (SteadyClock::now() < end) {
    Bytes bytes = corpus[below(random, corpus.size())];
    for (auto steps = random() % 8 + 1; steps > 0; --steps) mutate(bytes, random, corpus);
    run_one(current, bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "";
  const double seconds = argc > 2 ? std::atof(argv[2]) : 5;
  const std::uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : std::random_device()();
  const auto corpus = read_corpus(path);
  void* shared = ::mmap(nullptr, sizeof(Current), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
  auto& current = *static_cast<Current*>(shared);
  std::printf("seed %llu, %zu seeds, %g s\n", static_cast<unsigned long long>(seed), corpus.size(), seconds);
  std::fflush(stdout);

  const pid_t child = ::fork();
  if (child == 0) {
    run_all(current, corpus, seconds, seed);
    std::exit(0);
  }
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child) return 1;
  const auto number = static_cast<unsigned long long>(current.number);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    std::printf("%llu inputs, nothing found\n", number);
    return 0;
  }
  const std::string kept = std::filesystem::path(argv[0]).filename().string() + "-crash";
  std::ofstream(kept, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data), static_cast<std::streamsize>(current.size));
  std::printf("input %llu of seed %llu failed (%s); it is kept in %s\n", number,
              static_cast<unsigned long long>(seed),
              WIFSIGNALED(status) ? ::strsignal(WTERMSIG(status)) : "it ended the process", kept.c_str());
  return 1;
}
