// The forward pass of a call, shared among threads.
#pragma once

#include "problem.h"

namespace mtu {

// Writes those of y, hidden, mean and rstd that are not null in the problem. Results do not depend on the number of
// threads: one thread computes each number, always with the same additions in the same order.
void forward(const Problem& problem, const Kernels& kernels);

}  // namespace mtu
