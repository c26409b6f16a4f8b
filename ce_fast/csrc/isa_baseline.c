/* What every CPU of the platform has: SSE2 on x86-64, NEON on AArch64. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CE_ISA baseline
#if defined(__FMA__) || defined(__aarch64__)
#define CE_HAVE_FMA 1
#else
#define CE_HAVE_FMA 0
#endif
#include "isa_tpl.h"
