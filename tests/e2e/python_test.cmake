# SPDX-License-Identifier: Apache-2.0
# One CTest test a file, run by Debian's Python: pytest is its package python3-pytest.
set(blockferry_time_scale 1)
if(BLOCKFERRY_SANITIZE)
  set(blockferry_time_scale 5)
endif()

# blockferry_python_test(<set> <file> <timeout_seconds> [ALONE]): ALONE for tests that measure time.
function(blockferry_python_test set file timeout)
  get_filename_component(name ${file} NAME_WE)
  string(REGEX REPLACE "^test_" "" name ${name})
  add_test(NAME ${set}.${name}
    COMMAND /usr/bin/python3 -m pytest -q -ra -p no:cacheprovider ${CMAKE_CURRENT_SOURCE_DIR}/${file})
  math(EXPR timeout "${timeout} * ${blockferry_time_scale}")
  set_tests_properties(${set}.${name} PROPERTIES
    TIMEOUT ${timeout}
    LABELS ${set}
    ENVIRONMENT "BLOCKFERRY_BIN=${CMAKE_BINARY_DIR}/bin;BLOCKFERRY_TIME_SCALE=${blockferry_time_scale};BLOCKFERRY_SANITIZE=${BLOCKFERRY_SANITIZE};PYTHONDONTWRITEBYTECODE=1")
  if("ALONE" IN_LIST ARGN)
    set_tests_properties(${set}.${name} PROPERTIES RUN_SERIAL ON)
  endif()
endfunction()
