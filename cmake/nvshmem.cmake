# Finds NVSHMEM for the plugin ep_comm._nvshmem, and says why not.
#
# Sets EP_NVSHMEM_VERSION, EP_NVSHMEM_MISSING (a reason for people) and, when it is there, the targets
# nvshmem_host and nvshmem_device. The wheel is a namespace package without CMake files of its own; a
# system's installation has the same two folders.
set(EP_NVSHMEM AUTO CACHE STRING "NVSHMEM plugin: AUTO (when it is found), ON (or fail), OFF")
set(EP_NVSHMEM_ROOT "" CACHE PATH "Folder with include/ and lib/ of NVSHMEM; empty: that of the wheel")
set_property(CACHE EP_NVSHMEM PROPERTY STRINGS AUTO ON OFF)
set(EP_NVSHMEM_VERSION "")
set(EP_NVSHMEM_MISSING "")

function(ep_find_nvshmem result)
    set(root "${EP_NVSHMEM_ROOT}")
    if(NOT root AND Python_EXECUTABLE)
        execute_process(
            COMMAND
                ${Python_EXECUTABLE} -c
                "import importlib.util as u
s = u.find_spec('nvidia') and u.find_spec('nvidia.nvshmem')
print(list(s.submodule_search_locations)[0] if s else '')"
            OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
    set(${result} "${root}" PARENT_SCOPE)
endfunction()

if(NOT EP_NVSHMEM MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "EP_NVSHMEM=${EP_NVSHMEM}: want AUTO, ON or OFF")
elseif(EP_NVSHMEM STREQUAL "OFF")
    set(EP_NVSHMEM_MISSING "switched off by EP_NVSHMEM=OFF")
elseif(NOT EP_HAS_CUDA)
    set(EP_NVSHMEM_MISSING "it needs CUDA kernels: ${EP_CUDA_MISSING}")
else()
    ep_find_nvshmem(nvshmem_root)
    set(nvshmem_header "${nvshmem_root}/include/non_abi/nvshmem_version.h")
    file(GLOB nvshmem_host_library "${nvshmem_root}/lib/libnvshmem_host.so*")
    if(NOT nvshmem_root OR NOT EXISTS "${nvshmem_header}" OR NOT nvshmem_host_library
       OR NOT EXISTS "${nvshmem_root}/lib/libnvshmem_device.a")
        set(EP_NVSHMEM_MISSING "nvidia-nvshmem-cu13 was not installed where this was built")
    else()
        foreach(part IN ITEMS MAJOR MINOR PATCH)
            file(STRINGS "${nvshmem_header}" line REGEX "define NVSHMEM_VENDOR_${part}_VERSION ")
            string(REGEX MATCH "[0-9]+$" number "${line}")
            list(APPEND nvshmem_numbers ${number})
        endforeach()
        list(JOIN nvshmem_numbers "." EP_NVSHMEM_VERSION)
        list(GET nvshmem_host_library 0 nvshmem_host_library)
        add_library(nvshmem_host SHARED IMPORTED)
        set_target_properties(nvshmem_host PROPERTIES IMPORTED_LOCATION "${nvshmem_host_library}")
        add_library(nvshmem_device STATIC IMPORTED)
        set_target_properties(nvshmem_device PROPERTIES IMPORTED_LOCATION
                                                        "${nvshmem_root}/lib/libnvshmem_device.a")
        # Its headers include <cuda/std/...>, which the toolkit keeps apart from CUDA 13 on.
        foreach(target IN ITEMS nvshmem_host nvshmem_device)
            target_include_directories(${target} SYSTEM INTERFACE "${nvshmem_root}/include")
            foreach(folder IN LISTS CUDAToolkit_INCLUDE_DIRS)
                if(EXISTS "${folder}/cccl")
                    target_include_directories(${target} SYSTEM INTERFACE "${folder}/cccl")
                endif()
            endforeach()
        endforeach()
    endif()
endif()

if(EP_NVSHMEM STREQUAL "ON" AND NOT EP_NVSHMEM_VERSION)
    message(FATAL_ERROR "EP_NVSHMEM=ON, but ${EP_NVSHMEM_MISSING}")
endif()

# The plugin, once pybind11 is known: kernels with relocatable device code, linked with the library's.
function(ep_add_nvshmem_plugin)
    file(GLOB sources CONFIGURE_DEPENDS csrc/plugin/*.cc csrc/plugin/*.cu)
    # NO_EXTRAS: link-time optimization of pybind11 breaks the device link.
    pybind11_add_module(_nvshmem MODULE NO_EXTRAS ${sources} csrc/transport/nvshmem.cc)
    set_target_properties(
        _nvshmem
        PROPERTIES COMPILE_WARNING_AS_ERROR OFF  # the library's functions spill, and ptxas tells
                   CUDA_SEPARABLE_COMPILATION ON
                   CUDA_RESOLVE_DEVICE_SYMBOLS ON
                   CUDA_RUNTIME_LIBRARY Shared  # one runtime with the library's, which knows our device
                   BUILD_WITH_INSTALL_RPATH ON
                   INSTALL_RPATH "$ORIGIN/../nvidia/nvshmem/lib:$ORIGIN/../nvidia/cu13/lib")
    target_include_directories(_nvshmem PRIVATE csrc ${CMAKE_BINARY_DIR}/generated)
    # Relocatable functions are compiled without their kernels, and must fit blocks of 512 threads.
    set_source_files_properties(csrc/plugin/rails.cu PROPERTIES COMPILE_OPTIONS
                                                                "-maxrregcount=128")
    target_link_libraries(_nvshmem PRIVATE nvshmem_device nvshmem_host CUDA::cudart)
    # Others in the process export the same symbols.
    target_link_options(_nvshmem PRIVATE "LINKER:--exclude-libs,ALL")
    install(TARGETS _nvshmem LIBRARY DESTINATION . COMPONENT python)
endfunction()
