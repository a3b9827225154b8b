// SPDX-License-Identifier: Apache-2.0
// What keeps the guard going when ferryd is stopped, killed, or out of memory. As far as the process's rights
// go: what is refused is left out.
#pragma once

namespace blockferry {

/// Deaf to signals, locked in memory, the last one for the kernel to end for memory's sake, and outside of
/// every cgroup that may be frozen, limited or killed as a whole.
void harden();

}  // namespace blockferry
