# Object files of the selected instances: one custom command each, or those of another build.
# Sets kernel_names, kernel_folder, kernel_objects.

if(HOPPER_ATTENTION_PREBUILT)
  get_filename_component(kernel_folder "${HOPPER_ATTENTION_PREBUILT}" ABSOLUTE
                         BASE_DIR "${CMAKE_SOURCE_DIR}")
  file(GLOB records CONFIGURE_DEPENDS "${kernel_folder}/*.json")
  if(NOT records)
    message(FATAL_ERROR "HOPPER_ATTENTION_PREBUILT: no instances in ${kernel_folder}")
  endif()
  set(cuda_major "as compiled")
  list(TRANSFORM records REPLACE ".*/(.+)\\.json$" "\\1" OUTPUT_VARIABLE kernel_names)
else()
  set(kernel_folder "${CMAKE_BINARY_DIR}/kernels")
  set(list_sources "${CMAKE_BINARY_DIR}/list_sources.txt")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m aot list --selection "${HOPPER_ATTENTION_INSTANCES}"
            --sources "${list_sources}" --prune "${kernel_folder}"
    WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}/python" OUTPUT_VARIABLE kernel_names
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" kernel_names "${kernel_names}")
  file(STRINGS "${list_sources}" sources)
  set_property(DIRECTORY "${CMAKE_SOURCE_DIR}" APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})

  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m aot flavour --cuda "${HOPPER_ATTENTION_CUDA}"
    WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}/python" OUTPUT_VARIABLE cuda_major
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)

  # Ninja bounds a build by cores; a pool bounds this one by memory too, at 1.5 GiB a compile.
  cmake_host_system_information(RESULT memory QUERY AVAILABLE_PHYSICAL_MEMORY)
  math(EXPR jobs "${memory} / 1536")
  if(jobs LESS 1)
    set(jobs 1)
  endif()
  set_property(GLOBAL APPEND PROPERTY JOB_POOLS kernels=${jobs})
endif()

set(kernel_objects)
foreach(name IN LISTS kernel_names)
  set(output "${kernel_folder}/${name}")
  list(APPEND kernel_objects "${output}.o")
  if(NOT HOPPER_ATTENTION_PREBUILT)
    add_custom_command(
      OUTPUT "${output}.o" "${output}.h" "${output}.ptx" "${output}.cubin" "${output}.json"
      COMMAND Python::Interpreter -m aot compile ${name} --out "${kernel_folder}"
              --depfile "${output}.d" --cuda ${cuda_major}
      WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}/python"
      DEPFILE "${output}.d" JOB_POOL kernels
      COMMENT "Kernel ${name}" VERBATIM)
  endif()
endforeach()
set_source_files_properties(${kernel_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)

list(LENGTH kernel_names count)
message(STATUS "Kernels: ${count} instances (CUDA ${cuda_major}) in ${kernel_folder}")
