// SPDX-License-Identifier: Apache-2.0
// Members of ferryd's answers, as text for people: what is missing or null is empty or 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace blockferry {

/// Control characters become '?': a file's name must not command the terminal.
std::string printable(std::string text);

std::string text_of(const nlohmann::json& object, const char* member);  ///< printable
double number_of(const nlohmann::json& object, const char* member);
std::uint64_t count_of(const nlohmann::json& object, const char* member);
bool has_number(const nlohmann::json& object, const char* member);
/// The member where it is an array, else an empty array.
const nlohmann::json& list_of(const nlohmann::json& object, const char* member);
/// The member where it is an object, else an empty object.
const nlohmann::json& object_of(const nlohmann::json& object, const char* member);
/// The list's texts with commas between them.
std::string joined(const nlohmann::json& list);

std::string size_text(const nlohmann::json& object, const char* member);  ///< "1.5 GiB"
/// "68.8%"; 100 % is for what has completed.
std::string percent_text(const nlohmann::json& run);

/// How many columns a UTF-8 text takes where each character takes one.
std::size_t columns_of(const std::string& text);
/// At most `columns` columns of it; what was cut ends in "…" or, without `unicode`, "~".
std::string shortened(const std::string& text, std::size_t columns, bool unicode);

}  // namespace blockferry
