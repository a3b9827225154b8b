// SPDX-License-Identifier: Apache-2.0
// FileQueue on the kernel's older asynchronous I/O, for places where io_uring is forbidden. Zeroing has no
// asynchronous form there and blocks the run's thread; so does a flush where the filesystem lacks one.
#pragma once

#include <memory>

#include "blockio/io_queue.h"

namespace blockferry {

Result<std::unique_ptr<FileQueue>> make_aio_queue(unsigned depth);

}  // namespace blockferry
