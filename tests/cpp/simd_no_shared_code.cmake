# Fails when an object of *_avx2.cc or *_avx512.cc defines a weak function (nm: W, V or u).
list(FILTER OBJECTS INCLUDE REGEX "_avx(2|512)\\.cc\\.o$")
foreach(object IN LISTS OBJECTS)
    execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols
                    COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
    if(shared)
        list(JOIN shared "\n" lines)
        message(SEND_ERROR "${object} defines code that other files may end up calling:\n${lines}\n"
                           "Keep library templates out of *_avx2.cc and *_avx512.cc, or force them inline.")
    endif()
endforeach()
