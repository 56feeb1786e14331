// The level for every processor, with the compiler's own vectors of four numbers.
#include "problem.h"

#define MTU_LEVEL portable
#define MTU_LEVEL_NAME "portable"
#define MTU_TABLE kernels_portable
#define MTU_LANES 4
#define MTU_FLOAT_ROWS 2
#define MTU_FLOAT_PANELS 1
#include "kernels/level.h"
