/* AVX2 and FMA (Haswell, Zen and later). */
#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CE_ISA avx2
#define CE_HAVE_FMA 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#include "isa_tpl.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx2,fma,tune=haswell")
#include "isa_tpl.h"
#endif
#else
typedef int ce_no_avx2; /* a C file may not be empty */
#endif
