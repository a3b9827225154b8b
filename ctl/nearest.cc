// SPDX-License-Identifier: Apache-2.0
#include "ctl/nearest.h"

#include <algorithm>

namespace blockferry {

namespace {

std::size_t distance(const std::string& one, const std::string& other) {
  std::vector<std::size_t> row(other.size() + 1);
  for (std::size_t i = 0; i <= other.size(); ++i) row[i] = i;
  for (std::size_t i = 1; i <= one.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= other.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (one[i - 1] == other[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  constexpr std::size_t word_bytes_max = 64;  // the work grows with the product of the lengths
  if (word.empty() || word.size() > word_bytes_max) return "";
  const std::size_t far = std::max<std::size_t>(2, word.size() / 3);
  std::string best;
  std::size_t best_distance = far + 1;
  for (const auto& candidate : candidates) {
    // A word that was only begun is near however much is missing.
    const std::size_t length =
        candidate.starts_with(word) && word.size() >= 2 ? 1 : distance(word, candidate);
    // Two letters changed in a word of two or three leave nothing of it.
    if (length >= std::max(word.size(), candidate.size())) continue;
    if (length < best_distance) {
      best = candidate;
      best_distance = length;
    }
  }
  return best;
}

}  // namespace blockferry
