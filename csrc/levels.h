// The levels that this build has and this processor runs.
#pragma once

#include "problem.h"

namespace mtu {

// The kernels of the i-th level that this machine runs, the fastest first; null past the last one.
const Kernels* level(int64_t i);

}  // namespace mtu
