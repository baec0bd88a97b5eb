# Decides whether kernels are built, and says why not.
#
# Sets EP_HAS_CUDA, EP_CUDA_VERSION, EP_CUDA_ARCHS ("90" is code for sm_90, "90+PTX" what later ones
# compile) and EP_CUDA_MISSING (a reason for people).
set(EP_HAS_CUDA FALSE)
set(EP_CUDA_VERSION "")
set(EP_CUDA_ARCHS "")
set(EP_CUDA_MISSING "")
set(oldest_cuda 12.0)  # the first nvcc with C++20

# Architectures as CMake has them ("90-real", "90-virtual", or "90" for both) in our words; one without
# a number ("native", "all") is left out, as nobody knows here what nvcc makes of it.
function(ep_name_archs result)
    set(names "")
    foreach(arch IN LISTS ARGN)
        if(arch MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
            set(number ${CMAKE_MATCH_1})
            set(only "${CMAKE_MATCH_2}")
            if(NOT only STREQUAL "-virtual")
                list(APPEND names ${number})
            endif()
            if(NOT only STREQUAL "-real")
                list(APPEND names ${number}+PTX)
            endif()
        endif()
    endforeach()
    list(JOIN names " " names)
    set(${result} "${names}" PARENT_SCOPE)
endfunction()

if(NOT EP_CUDA MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "EP_CUDA=${EP_CUDA}: want AUTO, ON or OFF")
elseif(EP_CUDA STREQUAL "OFF")
    set(EP_CUDA_MISSING "switched off by EP_CUDA=OFF")
elseif(EP_SANITIZE)
    set(EP_CUDA_MISSING "a host sanitizer build (EP_SANITIZE=${EP_SANITIZE})")
elseif(NOT kernel_sources)
    set(EP_CUDA_MISSING "csrc/kernels holds no .cu file")
else()
    if(NOT CMAKE_CUDA_COMPILER)
        unset(CMAKE_CUDA_COMPILER CACHE)  # a toolkit installed since the last configure is noticed
        find_program(EP_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
                     PATH_SUFFIXES bin NO_CACHE)
        if(EP_NVCC AND NOT DEFINED ENV{CUDACXX})
            set(ENV{CUDACXX} ${EP_NVCC})
        endif()
    endif()
    # SASS for Hopper, and PTX that later architectures compile for themselves.
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
        set(CMAKE_CUDA_ARCHITECTURES 90)
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
        if(EP_NVCC)
            set(EP_CUDA_MISSING "nvcc is there but compiles nothing (see the CMake log)")
        else()
            set(EP_CUDA_MISSING "nvcc was not found")
        endif()
    else()
        enable_language(CUDA)
        if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS oldest_cuda)
            set(EP_CUDA_MISSING "nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, need ${oldest_cuda}")
        else()
            set(EP_HAS_CUDA TRUE)
            set(EP_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
            ep_name_archs(EP_CUDA_ARCHS ${CMAKE_CUDA_ARCHITECTURES})
        endif()
    endif()
endif()

if(EP_CUDA STREQUAL "ON" AND NOT EP_HAS_CUDA)
    message(FATAL_ERROR "EP_CUDA=ON, but ${EP_CUDA_MISSING}")
endif()

if(EP_HAS_CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
    set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -g")
    # CMake adds -Werror=all-warnings, which turns warnings of nvcc, of the host compiler and of ptxas into
    # errors. A spill is a warning of ptxas: the build stops and names the kernel.
    # fmad=false: products round before they are added, as on the CPU and in the reference.
    add_compile_options(
        "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-lineinfo;-Xptxas=--warn-on-spills>"
        "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-ffp-contract=off>")
endif()
