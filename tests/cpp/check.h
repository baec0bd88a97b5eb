// Checks for the C++ tests: functions and a main(), no framework.
//
//     int main() {
//         ep::test("an extent freed twice is found", [] { ep::expect_eq(arena.free_bytes(), 4096);
//         }); return ep::finish();
//     }
#pragma once

#include <cstdlib>
#include <exception>
#include <iostream>
#include <mutex>
#include <source_location>
#include <sstream>
#include <string>

namespace ep {

inline constexpr int kSkip = 77;  // exit code ctest shows as skipped

struct Tally {
    std::mutex mutex;  // checks may fail on any thread
    int tests = 0, failures = 0;
};

inline Tally& tally() {
    static Tally all;
    return all;
}

inline void fail(const std::string& what, std::source_location at) {
    std::lock_guard lock(tally().mutex);
    ++tally().failures;
    std::cerr << at.file_name() << ":" << at.line() << ": " << what << "\n";
}

inline void expect(bool ok, const char* what,
                   std::source_location at = std::source_location::current()) {
    if (!ok) fail(what, at);
}

template <class Got, class Want>
void expect_eq(const Got& got, const Want& want,
               std::source_location at = std::source_location::current()) {
    if (got == want) return;
    std::ostringstream text;
    text << "got " << got << ", want " << want;
    fail(text.str(), at);
}

// Runs one named body; an exception fails it and the next body still runs.
template <class Body>
void test(const char* name, Body&& body) {
    ++tally().tests;
    const int before = tally().failures;
    try {
        body();
    } catch (const std::exception& error) {
        fail(std::string("threw ") + error.what(), std::source_location::current());
    } catch (...) {
        fail("threw something that is no std::exception", std::source_location::current());
    }
    std::cerr << (tally().failures == before ? "ok    " : "FAIL  ") << name << "\n";
}

inline int finish() {
    std::cerr << tally().tests << " tests, " << tally().failures << " failed checks\n";
    return tally().failures == 0 && tally().tests > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace ep
