/* AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4 and later), with vectors of 512 bits: GCC alone would use half of that. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <math.h>
#include <stdint.h>
#include <string.h>

#define CE_ISA avx512
#define CE_HAVE_FMA 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#include "isa_tpl.h"
#pragma clang attribute pop
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512,tune=skylake-avx512")
#include "isa_tpl.h"
#endif
#else
typedef int ce_no_avx512; /* a C file may not be empty */
#endif
