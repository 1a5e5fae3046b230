# The CUDA compiler, for the preset cuda only: every other build neither looks for it nor needs it. docs/cuda.md.
option(ZEROC_CUDA "Build the CUDA backend: the kernels and the tests that run on a GPU" OFF)
set(ZEROC_CUDA_ROOT "" CACHE PATH
    "Folder of the CUDA toolkit; empty: CUDACXX, PATH, /usr/local/cuda, what deploy/setup --cuda installed")
set(ZEROC_NCCL_ROOT "" CACHE PATH
    "Folder of NCCL, with include and lib; empty: the system's folders, what deploy/setup --cuda installed")
# sm_80 has all that the kernels use (mma on bf16 and int8, cp.async); newer processors run the same code.
set(ZEROC_CUDA_ARCHITECTURES "80;90a;100-virtual" CACHE STRING "GPU architectures to compile for")

if(ZEROC_CUDA)
  if(ZEROC_CUDA_ROOT)
    find_program(ZEROC_NVCC nvcc PATHS ${ZEROC_CUDA_ROOT}/bin NO_DEFAULT_PATH)
  else()
    find_program(ZEROC_NVCC nvcc HINTS ENV CUDA_PATH PATH_SUFFIXES bin
                 PATHS /usr/local/cuda/bin ${PROJECT_SOURCE_DIR}/build/cuda-toolkit/nvidia/cu13/bin)
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    if(NOT ZEROC_NVCC)
      message(FATAL_ERROR "ZEROC_CUDA=ON: there is no CUDA compiler here. Install a toolkit, 12.4 or later, or run "
                          "deploy/setup --cuda; or name its folder with ZEROC_CUDA_ROOT")
    endif()
    set(CMAKE_CUDA_COMPILER ${ZEROC_NVCC})
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${ZEROC_CUDA_ARCHITECTURES})
  # Constants and pure functions that the host has too are constexpr, and kernels may call them.
  set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} --expt-relaxed-constexpr -Wno-deprecated-gpu-targets")
  enable_language(CUDA)
  # CMake 3.25 does not know that nvcc speaks C++20.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  # CMake 3.25 marks this target as outdated without asking whether there is one; CUDA 13 has none.
  add_library(CUDA::nvToolsExt INTERFACE IMPORTED)
  find_package(CUDAToolkit REQUIRED)

  set(nccl_roots ${ZEROC_NCCL_ROOT} ${PROJECT_SOURCE_DIR}/build/cuda-toolkit/nvidia/nccl)
  find_path(ZEROC_NCCL_INCLUDE_DIR nccl.h HINTS ${nccl_roots} PATH_SUFFIXES include)
  find_library(ZEROC_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${nccl_roots} PATH_SUFFIXES lib)
  if(NOT ZEROC_NCCL_INCLUDE_DIR OR NOT ZEROC_NCCL_LIBRARY)
    message(FATAL_ERROR "ZEROC_CUDA=ON: there is no NCCL here. Run deploy/setup --cuda, install it, or name "
                        "its folder with ZEROC_NCCL_ROOT")
  endif()
  add_library(NCCL::nccl SHARED IMPORTED)
  set_target_properties(NCCL::nccl PROPERTIES IMPORTED_LOCATION ${ZEROC_NCCL_LIBRARY}
                        INTERFACE_INCLUDE_DIRECTORIES ${ZEROC_NCCL_INCLUDE_DIR})
endif()
