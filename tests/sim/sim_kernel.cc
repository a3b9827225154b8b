// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_kernel.h"

#include <algorithm>

namespace blockferry::sim {

namespace {

// When the run takes the records that still stand for those of writes that have ended.
constexpr Nanoseconds between_strays = std::chrono::milliseconds(50);

}  // namespace

SimKernel::SimKernel(World& world, SimDisk& source, std::uint64_t granule_bytes)
    : world_(world), source_(source), granule_bytes_(granule_bytes) {}

GranuleRange SimKernel::granules_of(const Write& write) const {
  const std::uint64_t first = write.offset / granule_bytes_;
  return {first, (write.offset + write.data.size() - 1) / granule_bytes_ + 1 - first};
}

void SimKernel::mark(GranuleRange range) {
  for (std::uint64_t granule = range.first; granule < range.end(); ++granule) marks.insert(granule);
}

bool SimKernel::writes_on_their_way() const {
  return std::any_of(writes_.begin(), writes_.end(), [](const Write& write) { return !write.landed; });
}

bool SimKernel::covers(std::uint64_t granule) const {
  const bool standing = std::any_of(records.begin(), records.end(), [&](const auto& record) {
    return granule >= record.second.first && granule < record.second.end();
  });
  return attached && (standing || losses.any() || marks.contains(granule) || held.contains(granule));
}

bool SimKernel::unknown_writes() const {
  return std::any_of(writes_.begin(), writes_.end(),
                     [&](const Write& write) { return !records.contains(write.number); });
}

void SimKernel::begin() {
  const std::size_t size = source_.bytes.current.size();
  Write write;
  write.number = next_number_++;
  write.offset = std::size_t(world_.below(size / 512)) * 512;
  write.data.resize(std::min<std::size_t>(size - write.offset, 512 * (1 + world_.below(24))));
  for (auto& byte : write.data) byte = std::byte(world_.random());
  if (!records.empty() && world_.chance(0.2)) {
    // The memory of a write whose end was hidden serves again.
    const auto old = records.begin();
    const bool hidden = std::none_of(writes_.begin(), writes_.end(),
                                     [&](const Write& other) { return other.number == old->first; });
    if (hidden) {
      mark(old->second);
      records.erase(old);
      ++losses.ends_unseen;
    }
  }
  if (attached) records[write.number] = granules_of(write);
  writes_.push_back(std::move(write));
}

void SimKernel::land(Write& write) {
  source_.poke(write.offset, write.data);
  write.landed = true;
}

void SimKernel::end(std::size_t index) {
  const Write write = writes_[index];
  writes_.erase(writes_.begin() + std::ptrdiff_t(index));
  const auto record = records.find(write.number);
  if (!attached) return;
  if (record == records.end()) return mark(granules_of(write));  // queued before the tracker came
  if (world_.chance(0.03)) return;                               // hidden: its record stands
  if (misses && world_.chance(0.01)) {
    ++losses.records_refused;
  } else if (silent_miss) {
    silent_miss = false;
  } else {
    mark(record->second);
  }
  records.erase(record);
}

void SimKernel::expect_strays() {
  strays_left = strays ? 8 : 0;
  next_stray = world_.time + between_strays;
}

void SimKernel::stray() {
  begin();
  land(writes_.back());
  writes_.pop_back();
  --strays_left;
  next_stray = world_.time + between_strays;
  ++strays_begun;
}

void SimKernel::tick() {
  if (frozen && (world_.time >= deadline || (expires && world_.chance(0.01)))) {
    frozen = false;
    expired = true;
  }
  if (frozen && strays_left > 0 && world_.time >= next_stray && world_.chance(0.1)) stray();
  constexpr std::size_t queue_depth = 12;
  if (!frozen && !fenced && writes_.size() < queue_depth && world_.chance(write_chance)) begin();
  if (writes_.empty()) return;
  const std::size_t index = std::size_t(world_.below(writes_.size()));
  if (!writes_[index].landed) {
    if (world_.chance(0.5)) land(writes_[index]);
  } else if (world_.chance(0.5)) {
    end(index);
  }
}

void SimKernel::note_collected() {
  if (strays) at_collect = source_.bytes.current;
}

void SimKernel::process_ended() {
  frozen = false;
}

void SimKernel::power_cut() {
  for (Write& write : writes_) {
    if (!write.landed && world_.chance(0.5)) land(write);
  }
  writes_.clear();
  frozen = handed_over = attached = false;
  marks.clear();
  held.clear();
  records.clear();
}

namespace {

class SimTracker : public LiveTracker {
 public:
  SimTracker(World& world, SimKernel& kernel) : world_(world), kernel_(kernel) {}

  Result<void> collect(ChangeBitmap& dirty) override {
    if (first_) {
      for (const auto granule : kernel_.held) dirty.set({granule, 1});
    }
    first_ = false;
    world_.step();
    for (const auto granule : kernel_.marks) dirty.set({granule, 1});
    kernel_.held.merge(kernel_.marks);
    kernel_.marks.clear();
    for (const auto& [number, range] : kernel_.records) dirty.set(range);
    kernel_.note_collected();
    return {};
  }
  void release() override {
    world_.step();
    kernel_.held.clear();
  }
  std::vector<GranuleRange> queued() override {
    world_.step();
    std::vector<GranuleRange> ranges;
    for (const auto& [number, range] : kernel_.records) ranges.push_back(range);
    return ranges;
  }
  bool device_idle() override { return !kernel_.writes_on_their_way(); }
  TrackerLosses losses() override { return kernel_.losses; }

 private:
  World& world_;
  SimKernel& kernel_;
  bool first_ = true;
};

class SimQuiescer : public Quiescer {
 public:
  SimQuiescer(World& world, SimKernel& kernel, SimDisk& source, std::shared_ptr<bool> alive)
      : world_(world), kernel_(kernel), source_(source), alive_(std::move(alive)) {}
  ~SimQuiescer() override {
    if (*alive_) kernel_.frozen = false;
  }

  Result<void> sync_ahead() override { return dead_or_done(); }

  Result<void> quiesce(Nanoseconds limit) override {
    if (!*alive_) return dead_or_done();
    quiesced_at_ = world_.time;
    kernel_.frozen = true;
    kernel_.expired = false;
    kernel_.expect_strays();
    kernel_.deadline = world_.time + limit;
    world_.step();
    return {};
  }

  Result<bool> release() override {
    if (!*alive_) return fail(dead_or_done().error());
    world_.step();
    const bool kept = kernel_.frozen && !kernel_.expired;
    if (kept) remember();
    kernel_.frozen = false;
    return kept;
  }

  Result<bool> hand_over() override {
    if (!*alive_) return fail(dead_or_done().error());
    world_.step();
    const bool kept = kernel_.frozen && !kernel_.expired;
    if (kept) {
      remember();
      kernel_.handed_over = kernel_.fenced = handed_over_ = true;
    }
    kernel_.frozen = false;
    world_.step();
    return kept;
  }

  bool handed_over() const override { return handed_over_; }
  Nanoseconds quiesced_at() const override { return quiesced_at_; }
  Nanoseconds released_at() const override { return released_at_; }
  Nanoseconds command_time() const override { return Nanoseconds(0); }

 private:
  Result<void> dead_or_done() const {
    if (*alive_) return {};
    return fail(make_error(ErrorCode::internal, "ask", "the guard", "the process has ended"));
  }
  /// The last one counts: a run also releases what it gives up.
  void remember() {
    kernel_.at_cutover = kernel_.strays ? *kernel_.at_collect : source_.bytes.current;
    kernel_.drained_at_cutover = !kernel_.writes_on_their_way();
    released_at_ = world_.time;
  }

  World& world_;
  SimKernel& kernel_;
  SimDisk& source_;
  const std::shared_ptr<bool> alive_;
  bool handed_over_ = false;
  Nanoseconds quiesced_at_{0}, released_at_{0};
};

}  // namespace

Result<std::unique_ptr<LiveTracker>> SimLiveEnvironment::adopt_tracker(const RunRecord&) {
  if (!kernel_.attached) return none();
  return std::make_unique<SimTracker>(world_, kernel_);
}

Result<std::unique_ptr<LiveTracker>> SimLiveEnvironment::attach_tracker(const RunRecord& record) {
  remove_tracker(record);
  kernel_.attached = true;
  while (kernel_.unknown_writes()) world_.step();  // as the real one waits for those that it has no record of
  kernel_.losses = {};
  return std::make_unique<SimTracker>(world_, kernel_);
}

void SimLiveEnvironment::remove_tracker(const RunRecord&) {
  kernel_.attached = false;
  kernel_.marks.clear();
  kernel_.held.clear();
  kernel_.records.clear();
}

Result<std::unique_ptr<Quiescer>> SimLiveEnvironment::make_quiescer(const RunRecord&, bool) {
  kernel_.handed_over = false;
  return std::make_unique<SimQuiescer>(world_, kernel_, source(), alive_);
}

}  // namespace blockferry::sim
