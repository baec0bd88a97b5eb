// The arena never hands out memory twice, gives the lowest fit, and grows free ranges together
// again.
#include "host/arena.h"

#include <atomic>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "contract/config.h"

namespace {

constexpr int64_t kPage = ep::kExtentAlign;

}  // namespace

int main() {
    ep::test("extents are whole pages from the lowest address", [] {
        ep::Arena arena(8 * kPage);
        ep::expect_eq(arena.grant(1)->offset, 0);
        ep::expect_eq(arena.grant(kPage + 1)->offset, kPage);
        ep::expect_eq(arena.grant(kPage)->offset, 3 * kPage);
        ep::expect_eq(arena.stats().in_use, 4 * kPage);
    });

    ep::test("no extent when none is long enough, and nothing changes", [] {
        ep::Arena arena(4 * kPage);
        const auto first = arena.grant(kPage);
        const auto second = arena.grant(kPage);
        arena.give_back(first->offset);
        ep::expect(!arena.grant(3 * kPage), "granted across a held extent");
        ep::expect_eq(arena.stats().in_use, second->bytes);
        ep::expect_eq(arena.stats().largest_free, 2 * kPage);
    });

    ep::test("ranges that are left out stay free", [] {
        ep::Arena arena(10 * kPage);
        const auto held = arena.grant(2 * kPage);
        const std::vector<ep::Extent> but{{0, kPage}, {3 * kPage, kPage}, {6 * kPage, 2 * kPage}};
        ep::expect_eq(arena.grant(kPage, but)->offset, 2 * kPage);
        ep::expect_eq(arena.grant(2 * kPage, but)->offset, 4 * kPage);
        ep::expect(!arena.grant(3 * kPage, but), "granted what was left out");
        ep::expect_eq(arena.grant(2 * kPage, but)->offset, 8 * kPage);
        ep::expect(!arena.grant(kPage, but), "granted what was left out");
        ep::expect_eq(arena.give_back(held->offset).bytes, 2 * kPage);
        ep::expect_eq(arena.give_back(held->offset).bytes, 0);
        ep::expect_eq(arena.grant(kPage, but)->offset, kPage);
        ep::expect_eq(arena.grant(kPage)->offset, 0);
        ep::expect_eq(arena.stats().largest_free, 2 * kPage);
        ep::expect_eq(arena.grant(2 * kPage)->offset, 6 * kPage);
        ep::expect_eq(arena.grant(kPage)->offset, 3 * kPage);
        ep::expect_eq(arena.stats().largest_free, 0);
    });

    ep::test("an extent given back twice or never granted is ignored", [] {
        ep::Arena arena(4 * kPage);
        const auto extent = arena.grant(kPage);
        arena.give_back(extent->offset);
        arena.give_back(extent->offset);
        arena.give_back(12345);
        ep::expect_eq(arena.stats().largest_free, 4 * kPage);
    });

    ep::test("random grants and returns leave one free range", [] {
        ep::Arena arena(64 * kPage);
        std::mt19937 random(7);
        std::map<int64_t, int64_t> held;
        for (int step = 0; step < 20000; ++step) {
            if (random() % 2 == 0) {
                const auto extent = arena.grant(1 + random() % (6 * kPage));
                if (!extent) continue;
                const auto next = held.lower_bound(extent->offset);
                ep::expect(next == held.end() || extent->offset + extent->bytes <= next->first,
                           "overlaps the next extent");
                ep::expect(next == held.begin() ||
                               std::prev(next)->first + std::prev(next)->second <= extent->offset,
                           "overlaps the extent before");
                held[extent->offset] = extent->bytes;
            } else if (!held.empty()) {
                const auto which = std::next(held.begin(), random() % held.size());
                arena.give_back(which->first);
                held.erase(which);
            }
        }
        for (const auto& [offset, bytes] : held) arena.give_back(offset);
        ep::expect_eq(arena.stats().largest_free, 64 * kPage);
        ep::expect_eq(arena.stats().num_extents, 0);
    });

    ep::test("extents return from any thread", [] {
        auto arena = std::make_shared<ep::Arena>(256 * kPage);
        std::vector<std::thread> threads;
        for (int i = 0; i < 4; ++i) {
            threads.emplace_back([arena] {
                for (int step = 0; step < 500; ++step) {
                    if (const auto extent = arena->grant(3 * kPage)) {
                        ep::ExtentHold hold(arena, *extent);
                    }
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
        ep::expect_eq(arena->stats().in_use, 0);
    });

    ep::test("nothing is granted while free ranges are visited", [] {
        ep::Arena arena(8 * kPage);
        std::vector<std::atomic<int>> owners(8);
        std::atomic<bool> over = false;
        std::thread user([&] {
            for (int step = 0; step < 20000; ++step) {
                const auto extent = arena.grant(kPage);
                std::atomic<int>& owner = owners[extent->offset / kPage];
                owner = step + 1;
                if (step % 4 == 0) std::this_thread::yield();
                ep::expect_eq(owner.exchange(0), step + 1);
                arena.give_back(extent->offset);
            }
            over = true;
        });
        int64_t visited = 0;
        while (!over) {
            arena.visit_free([&](const ep::Extent& range) {
                ++visited;
                for (int64_t i = 0; i < range.bytes / kPage; ++i) {
                    owners[range.offset / kPage + i] = -1;
                }
            });
        }
        user.join();
        ep::expect(visited > 0, "nothing was ever free");
    });
    return ep::finish();
}
