// SPDX-License-Identifier: Apache-2.0
// FileQueue on io_uring: registered files and memory, one thread, one system call a batch.
#pragma once

#include <memory>

#include "blockio/io_queue.h"

namespace blockferry {

/// `unsupported` where the kernel or a seccomp filter forbids io_uring.
Result<std::unique_ptr<FileQueue>> make_uring_queue(unsigned depth);

}  // namespace blockferry
