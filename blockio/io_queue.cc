// SPDX-License-Identifier: Apache-2.0
#include "blockio/io_queue.h"

#include "blockio/aio_queue.h"
#include "blockio/uring_queue.h"

namespace blockferry {

Result<IoEngine> parse_io_engine(const std::string& name) {
  if (name == "auto") return IoEngine::automatic;
  if (name == "uring") return IoEngine::uring;
  if (name == "aio") return IoEngine::aio;
  return fail(
      make_error(ErrorCode::invalid_argument, "read", name, "not an I/O engine; try auto, uring or aio"));
}

Result<std::unique_ptr<FileQueue>> make_file_queue(IoEngine engine, unsigned depth) {
  if (engine == IoEngine::aio) return make_aio_queue(depth);
  auto queue = make_uring_queue(depth);
  if (queue || engine == IoEngine::uring || queue.error().code != ErrorCode::unsupported) return queue;
  return make_aio_queue(depth);
}

}  // namespace blockferry
