# cuda_include_dirs: the CUDA headers of pip wheels (nvidia-cuda-runtime, nvidia-cuda-crt), else of a
# toolkit.  FindCUDAToolkit alone fails on the wheels, which have no nvcc.  Not cached: a later build
# by pip has another temporary environment.

execute_process(COMMAND "${Python_EXECUTABLE}" -c "import sys; print(';'.join(sys.path))"
                OUTPUT_VARIABLE site_folders OUTPUT_STRIP_TRAILING_WHITESPACE
                COMMAND_ERROR_IS_FATAL ANY)
# Either version's will do for either flavour: what is used of them did not change.
set(wheel_folders nvidia/cu13/include nvidia/cuda_runtime/include nvidia/cuda_nvcc/include)

set(cuda_include_dirs)
foreach(header IN ITEMS cuda_runtime_api.h crt/host_defines.h)
  find_path(folder ${header} HINTS ${site_folders} PATH_SUFFIXES ${wheel_folders}
            NO_CACHE NO_DEFAULT_PATH)
  if(NOT folder)
    find_package(CUDAToolkit QUIET)
    find_path(folder ${header} HINTS ${CUDAToolkit_INCLUDE_DIRS} NO_CACHE)
  endif()
  if(NOT folder)
    message(FATAL_ERROR "${header} not found: pip install nvidia-cuda-runtime nvidia-cuda-crt "
                        "(CUDA 12: nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12), or a CUDA toolkit")
  endif()
  list(APPEND cuda_include_dirs "${folder}")
  unset(folder)
endforeach()
list(REMOVE_DUPLICATES cuda_include_dirs)
message(STATUS "CUDA headers: ${cuda_include_dirs}")
