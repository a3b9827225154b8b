// SPDX-License-Identifier: Apache-2.0
#include "daemon/guarded_quiescer.h"

#include <cerrno>
#include <set>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include "blockio/base/file_descriptor.h"
#include "daemon/guard_process.h"

namespace blockferry {

namespace {

// Beyond the limit; and for the resume command.
constexpr Nanoseconds answer_patience = std::chrono::seconds(10), resume_patience = std::chrono::seconds(35);
constexpr Nanoseconds targets_patience = std::chrono::seconds(1);

class GuardedQuiescer : public Quiescer {
 public:
  GuardedQuiescer(QuiescerOptions options, std::vector<std::unique_ptr<QuiescedVolume>> volumes)
      : options_(std::move(options)), volumes_(std::move(volumes)) {}

  Result<void> open();
  Result<void> sync_ahead() override;
  Result<void> quiesce(Nanoseconds limit) override;
  Result<bool> release() override { return finish(GuardRequest::release); }
  Result<bool> hand_over() override;
  Nanoseconds quiesced_at() const override { return quiesced_at_; }
  Nanoseconds released_at() const override { return released_at_; }
  bool handed_over() const override { return handed_over_; }
  Nanoseconds command_time() const override { return command_time_; }
  Nanoseconds expected_command_time() const override;

 private:
  Result<void> open_mark();
  void choose_holds();
  Result<bool> finish(GuardRequest::Kind kind);
  Result<GuardAnswer> ask(GuardRequest request, Nanoseconds patience);
  Nanoseconds patience() const {
    return limit_ + answer_patience + (options_.resume_cmd.empty() ? Nanoseconds(0) : resume_patience);
  }
  bool is_marked() const { return ::faccessat(mark_.get(), guard_mark, F_OK, 0) == 0; }
  Error failure(const GuardAnswer& answer) const;
  void wait_for_targets() const;

  const QuiescerOptions options_;
  const std::vector<std::unique_ptr<QuiescedVolume>> volumes_;
  std::vector<GuardHold> holds_;
  FileDescriptor mark_;
  bool handed_over_ = false;
  Nanoseconds limit_{0};
  Nanoseconds quiesced_at_{0}, released_at_{0}, command_time_{0};
  GuardProcess guard_;  ///< ended before the rest is given up
};

Result<void> GuardedQuiescer::open() {
  if (auto done = open_mark(); !done) return done;
  choose_holds();
  return guard_.start({holds_, options_.cutover_cmd, mark_.get(), options_.environment});
}

Result<void> GuardedQuiescer::open_mark() {
  mark_ = FileDescriptor(options_.mark_directory.empty()
                             ? ::open("/dev/null", O_RDONLY | O_CLOEXEC)
                             : ::open(options_.mark_directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!mark_.valid()) return fail(error_from_errno(errno, "open", options_.mark_directory));
  if (!options_.mark_directory.empty()) ::flock(mark_.get(), LOCK_SH | LOCK_NB);
  // Of an earlier cutover of this run, which is on record.
  if (!options_.mark_directory.empty()) ::unlinkat(mark_.get(), guard_mark, AT_REMOVEDIR);
  return {};
}

/// Those of each volume, but what two of them share only once; and the commands.
void GuardedQuiescer::choose_holds() {
  std::set<std::string> keys;
  for (const auto& volume : volumes_) {
    for (auto& hold : volume->holds()) {
      if (keys.insert(hold.key).second) holds_.push_back(std::move(hold));
    }
  }
  if (options_.quiesce_cmd.empty()) return;
  GuardHold commands;
  commands.kind = options_.writers_go_on ? "commands-of-moved" : "commands";
  commands.words = {options_.quiesce_cmd, options_.resume_cmd};
  commands.take_verb = "quiesce";
  commands.where = options_.sources;
  holds_.push_back(std::move(commands));
}

Nanoseconds GuardedQuiescer::expected_command_time() const {
  Nanoseconds time{0};
  for (const auto& volume : volumes_) time += volume->expected_command_time();
  return time;
}

Result<void> GuardedQuiescer::sync_ahead() {
  for (const auto& volume : volumes_) {
    if (auto done = volume->sync_ahead(); !done) return done;
  }
  return {};
}

Result<GuardAnswer> GuardedQuiescer::ask(GuardRequest request, Nanoseconds patience) {
  for (const auto& volume : volumes_) volume->guard_talks(true);
  auto answer = guard_.ask(request, patience);
  if (!answer) {
    for (const auto& volume : volumes_) volume->release_without_guard();
  }
  for (auto volume = volumes_.rbegin(); volume != volumes_.rend(); ++volume) (*volume)->guard_talks(false);
  return answer;
}

Error GuardedQuiescer::failure(const GuardAnswer& answer) const {
  if (answer.step == GuardAnswer::cutover_command)
    return make_error(ErrorCode::conflict, "cut over", options_.sources, answer.detail);
  if (answer.step == GuardAnswer::marking)
    return error_from_errno(answer.errno_value, "mark the hand-over in", options_.mark_directory);
  if (answer.hold >= holds_.size())
    return make_error(ErrorCode::internal, "cut over", options_.sources, "the guard failed");
  const GuardHold& hold = holds_[answer.hold];
  const std::string& verb = answer.step == GuardAnswer::quiescing ? hold.take_verb : hold.hand_over_verb;
  if (answer.errno_value == 0) return make_error(ErrorCode::conflict, verb, hold.where, answer.detail);
  Error error = error_from_errno(answer.errno_value, verb, hold.where);
  if (answer.errno_value == EBUSY && verb == "freeze") error.hint = "somebody else has frozen it";
  return error;
}

Result<void> GuardedQuiescer::quiesce(Nanoseconds limit) {
  limit_ = limit;
  const auto limit_ms = std::chrono::duration_cast<std::chrono::milliseconds>(limit).count();
  const auto answer = ask({GuardRequest::quiesce, std::uint32_t(limit_ms)}, patience());
  if (!answer) return fail(answer.error());
  if (answer->kind == GuardAnswer::failed) return fail(failure(*answer));
  if (answer->kind != GuardAnswer::quiesced) {
    return fail(make_error(ErrorCode::busy, "quiesce", options_.sources,
                           "it took longer than --max-freeze allows, and was given up"));
  }
  quiesced_at_ = Nanoseconds(answer->at_ns);
  for (const auto& volume : volumes_) {
    if (auto done = volume->settle(); !done) return done;
  }
  return {};
}

/// They have been closed, but the kernel gives up a file that a ring has flushed some moments after it has
/// told of the flush, and until then nobody can mount it. Whoever else holds one: the command will say so.
void GuardedQuiescer::wait_for_targets() const {
  const Nanoseconds deadline = system_clock().now() + targets_patience;
  for (const auto& target : options_.targets) {
    while (system_clock().now() < deadline) {
      const FileDescriptor fd(::open(target.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK));
      if (fd.valid() || errno != EBUSY) break;
      system_clock().sleep_for(std::chrono::milliseconds(1));
    }
  }
}

Result<bool> GuardedQuiescer::hand_over() {
  if (!options_.cutover_cmd.empty()) wait_for_targets();
  return finish(GuardRequest::hand_over);
}

Result<bool> GuardedQuiescer::finish(GuardRequest::Kind kind) {
  const auto answer = ask({kind, 0}, patience());
  if (!answer) {
    // It has ended; what it had settled by then stands.
    handed_over_ = kind == GuardRequest::hand_over && is_marked();
    released_at_ = system_clock().now();
    return handed_over_ ? Result<bool>(true) : fail(answer.error());
  }
  released_at_ = Nanoseconds(answer->at_ns);
  command_time_ = Nanoseconds(answer->command_ns);
  if (answer->kind == GuardAnswer::failed) return fail(failure(*answer));
  handed_over_ = kind == GuardRequest::hand_over && answer->kind == GuardAnswer::released;
  return answer->kind == GuardAnswer::released;
}

}  // namespace

Result<std::unique_ptr<Quiescer>> make_guarded_quiescer(
    QuiescerOptions options, std::vector<std::unique_ptr<QuiescedVolume>> volumes) {
  auto quiescer = std::make_unique<GuardedQuiescer>(std::move(options), std::move(volumes));
  if (auto done = quiescer->open(); !done) return fail(done.error());
  return quiescer;
}

}  // namespace blockferry
