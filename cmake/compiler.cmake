# SPDX-License-Identifier: Apache-2.0
# Warnings are errors; hardening is on in every build.
add_compile_options(-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror -fno-omit-frame-pointer
                    -fstack-protector-strong)
include_directories(${CMAKE_SOURCE_DIR})
if(BLOCKFERRY_SANITIZE STREQUAL "address")
  # The three left out double the time to compile what uses JSON, and tell of little that a crash or the address
  # sanitizer would not.
  add_compile_options(-fsanitize=address,undefined -fno-sanitize=null,vptr,object-size -fno-sanitize-recover=all)
  add_link_options(-fsanitize=address,undefined)
elseif(BLOCKFERRY_SANITIZE STREQUAL "thread")
  add_compile_options(-fsanitize=thread -Wno-tsan)
  add_link_options(-fsanitize=thread)
elseif(NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
  add_compile_definitions(_FORTIFY_SOURCE=2)
endif()
# Functions and lines, which is what a backtrace shows; a Debug build has the rest.
add_compile_options($<$<CONFIG:RelWithDebInfo>:-g1>)
