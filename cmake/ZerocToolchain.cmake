# Compiler settings shared by every target: warnings, sanitizers, fuzzing, ccache, mold.

add_library(zeroc_warnings INTERFACE)
target_compile_options(zeroc_warnings INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wnon-virtual-dtor;-Wcast-align>"
  "$<$<COMPILE_LANGUAGE:CXX>:-Woverloaded-virtual;-Wno-missing-field-initializers>")
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  target_compile_options(zeroc_warnings INTERFACE -Wthread-safety)
endif()

if(ZEROC_SANITIZE)
  string(REPLACE ";" "," sanitize_list "${ZEROC_SANITIZE}")
  add_compile_options(-fsanitize=${sanitize_list} -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${sanitize_list})
  if("undefined" IN_LIST ZEROC_SANITIZE)
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()

# Fuzz targets are programs of tests/fuzz with -fsanitize=fuzzer; everything they reach gets coverage counters.
option(ZEROC_BUILD_FUZZERS "Build the fuzz targets (clang only)" OFF)
if(ZEROC_BUILD_FUZZERS)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "ZEROC_BUILD_FUZZERS needs clang (libFuzzer): use the preset fuzz")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

find_program(ZEROC_CCACHE ccache)
if(ZEROC_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ZEROC_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${ZEROC_CCACHE})
endif()

find_program(ZEROC_MOLD mold)
if(ZEROC_MOLD AND NOT ZEROC_SANITIZE)
  add_link_options(-fuse-ld=mold)
endif()
