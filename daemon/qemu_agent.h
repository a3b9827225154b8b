// SPDX-License-Identifier: Apache-2.0
// The QEMU guest agent, which runs in the guest and is spoken to over a socket of QEMU's.
#pragma once

#include <string>

#include "blockio/base/error.h"
#include "blockio/base/file_descriptor.h"

namespace blockferry {

/// A connection over which the agent has just answered.
Result<FileDescriptor> connect_to_agent(const std::string& socket);

}  // namespace blockferry
