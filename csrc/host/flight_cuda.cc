#include "host/flight.h"

namespace ep {

void Flight::use_on(Stream other) const {
    const StreamHold* last = nullptr;
    for (const Granted& g : granted) {
        if (g && g.hold.get() != last) g.hold->use_on(other);
        last = g.hold.get();
    }
}

Routing Flight::routing() const {
    const bool is_fixed = job.args.is_static || job.args.cached;
    return {job.args,
            job.out.recv_src,
            job.out.recv_row,
            is_fixed ? job.out.max_recv : report.num_recv,
            is_fixed ? job.out.max_rows : report.num_rows,
            number,
            (*this)[Out::kRankCounts].hold};
}

}  // namespace ep
