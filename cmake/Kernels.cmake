# Object files of the selected instances: a custom command for each batch, or those of another build.
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
  set(batches)
else()
  set(kernel_folder "${CMAKE_BINARY_DIR}/kernels")
  set(list_sources "${CMAKE_BINARY_DIR}/list_sources.txt")
  cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m aot list --selection "${HOPPER_ATTENTION_INSTANCES}"
            --cores ${cores} --sources "${list_sources}" --prune "${kernel_folder}"
    WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}/python" OUTPUT_VARIABLE batches
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "[ \n]" ";" kernel_names "${batches}")
  string(REPLACE "\n" ";" batches "${batches}")
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

foreach(batch IN LISTS batches)
  string(REPLACE " " ";" names "${batch}")
  list(GET names 0 first)
  set(outputs)
  foreach(suffix IN ITEMS o h ptx cubin json)
    list(TRANSFORM names REPLACE "(.+)" "${kernel_folder}/\\1.${suffix}" OUTPUT_VARIABLE files)
    list(APPEND outputs ${files})
  endforeach()
  set(depfile "${kernel_folder}/${first}.d")
  add_custom_command(
    OUTPUT ${outputs}
    COMMAND Python::Interpreter -m aot compile ${names} --out "${kernel_folder}"
            --depfile "${depfile}" --cuda ${cuda_major}
    WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}/python"
    DEPFILE "${depfile}" JOB_POOL kernels
    COMMENT "Kernels ${batch}" VERBATIM)
endforeach()

list(TRANSFORM kernel_names REPLACE "(.+)" "${kernel_folder}/\\1.o" OUTPUT_VARIABLE kernel_objects)
set_source_files_properties(${kernel_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)

list(LENGTH kernel_names count)
message(STATUS "Kernels: ${count} instances (CUDA ${cuda_major}) in ${kernel_folder}")
