# Every outside package is found here, once. Debian 12 versions and their traps: docs/dependencies.md.
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)

# Portable SIMD with run-time dispatch.
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
# Debian's oneDNN config file demands OpenCL, so the library is found by hand.
find_path(ONEDNN_INCLUDE_DIR oneapi/dnnl/dnnl.hpp REQUIRED)
find_library(ONEDNN_LIBRARY dnnl REQUIRED)
add_library(onednn::dnnl UNKNOWN IMPORTED)
set_target_properties(onednn::dnnl PROPERTIES IMPORTED_LOCATION ${ONEDNN_LIBRARY}
                                              INTERFACE_INCLUDE_DIRECTORIES ${ONEDNN_INCLUDE_DIR})
find_package(OpenMP REQUIRED COMPONENTS CXX)  # only to tell oneDNN's runtime to stay on the calling thread
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
find_package(Eigen3 REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED CONFIG)
find_package(ucx REQUIRED CONFIG)  # beside the services, so that the transport is tested without gRPC (ThreadSanitizer)

if(ZEROC_BUILD_SERVICES)
  find_package(Protobuf REQUIRED)  # module mode: Debian ships no config package
  find_package(gRPC REQUIRED CONFIG)
  find_package(prometheus-cpp REQUIRED CONFIG)
  find_package(Boost 1.74 REQUIRED)
  find_package(OpenSSL 3.0 REQUIRED)  # TLS of the HTTP server
  find_package(yaml-cpp REQUIRED CONFIG)
  find_package(CLI11 REQUIRED CONFIG)
  find_package(spdlog REQUIRED CONFIG)
endif()
if(ZEROC_BUILD_TESTS)
  find_package(GTest REQUIRED CONFIG)
  find_package(Boost 1.74 REQUIRED COMPONENTS context)  # threads of an emulated GPU
endif()
if(ZEROC_BUILD_BENCHES)
  find_package(benchmark REQUIRED CONFIG)
endif()
