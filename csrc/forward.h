// The forward pass of a whole call, shared among threads.
#pragma once

#include "problem.h"

namespace mtu {

// Writes y (unless it is null: pre-activations and statistics alone are wanted), and what training asks for besides.
// Results do not depend on the number of threads: each number is made by one thread, always by the same additions.
void forward(const Problem& problem, const Kernels& kernels);

}  // namespace mtu
