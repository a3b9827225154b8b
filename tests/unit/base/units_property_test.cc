// SPDX-License-Identifier: Apache-2.0
// Whatever is typed is read as what it says or refused, and what is printed is near what it stands for.
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include "blockio/base/units.h"

namespace blockferry {
namespace {

constexpr std::array<const char*, 5> suffixes{"", "K", "M", "G", "T"};
constexpr std::array<std::uint64_t, 5> multiples{1, KiB, MiB, GiB, TiB};

RC_GTEST_PROP(SizesProperty, AnyWholeNumberWithAnySuffixIsReadExactlyOrDoesNotFit, ()) {
  const auto number = *rc::gen::arbitrary<std::uint64_t>();
  const auto unit = *rc::gen::inRange<std::size_t>(0, suffixes.size());
  const auto parsed = parse_size(std::to_string(number) + suffixes[unit]);
  const bool fits = number <= std::numeric_limits<std::uint64_t>::max() / multiples[unit];
  RC_ASSERT(parsed.has_value() == fits);
  if (fits) RC_ASSERT(*parsed == number * multiples[unit]);
}

RC_GTEST_PROP(SizesProperty, ThousandthsAreNotLost, ()) {
  const auto thousandths = *rc::gen::inRange<std::uint64_t>(0, 10'000'000);
  const auto unit = *rc::gen::inRange<std::size_t>(1, suffixes.size());
  std::string fraction = std::to_string(1000 + thousandths % 1000).substr(1);
  const auto parsed = parse_size(std::to_string(thousandths / 1000) + "." + fraction + suffixes[unit]);
  RC_ASSERT(parsed.has_value());
  const double expected = double(thousandths) * double(multiples[unit]) / 1000;
  RC_ASSERT(std::abs(double(*parsed) - expected) <= 1);
}

RC_GTEST_PROP(SizesProperty, AnyTextIsReadOrRefusedWithOneLine, ()) {
  const auto alphabet = rc::gen::elementOf(std::string("0123456789.KMGTkmsh +-e\n"));
  const auto text = *rc::gen::container<std::string>(alphabet);
  const auto size = parse_size(text);
  const auto duration = parse_duration(text);
  if (size) RC_ASSERT(text.find_first_not_of("0123456789.KMGT") == std::string::npos);
  if (duration) RC_ASSERT(text.find_first_not_of("0123456789.msh") == std::string::npos);
  if (!size) RC_ASSERT(size.error().message().find('\n') == std::string::npos);
  if (!duration) RC_ASSERT(duration.error().message().find('\n') == std::string::npos);
}

RC_GTEST_PROP(DurationsProperty, WholeMillisecondsAreReadExactly, ()) {
  const auto count = *rc::gen::inRange<std::int64_t>(0, 1'000'000'000'000);
  const auto parsed = parse_duration(std::to_string(count) + "ms");
  RC_ASSERT(parsed.has_value());
  RC_ASSERT(parsed->count() == count);
}

RC_GTEST_PROP(FormatsProperty, APrintedSizeIsWithinItsLastDigit, ()) {
  const auto bits = *rc::gen::inRange(0, 64);
  const std::uint64_t bytes = *rc::gen::arbitrary<std::uint64_t>() >> bits;
  const std::string text = format_size(bytes);
  static constexpr std::array<const char*, 7> units{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  char* rest = nullptr;
  const double value = std::strtod(text.c_str(), &rest);
  double unit = 1;
  std::size_t i = 0;
  for (; i < units.size() && std::string(rest) != std::string(" ") + units[i]; ++i) unit *= 1024;
  RC_ASSERT(i < units.size());
  RC_ASSERT(value < 1024);
  RC_ASSERT(std::abs(value * unit - double(bytes)) <= 0.051 * unit);
}

}  // namespace
}  // namespace blockferry
