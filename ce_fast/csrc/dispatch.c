/* Which kernels this CPU can run: asked once, worst first. */
#include "ce_fast.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern const ce_table ce_table_baseline, ce_table_avx2, ce_table_avx512;

static const ce_table *tables[3] = {&ce_table_baseline};

int ce_isa_count(void)
{
    int n = 1;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        tables[n++] = &ce_table_avx2;
    if (n == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables[n++] = &ce_table_avx512;
#endif
    return n;
}

const ce_table *ce_isa(int i)
{
    return tables[i];
}

int ce_max_threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

int ce_openmp(void)
{
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}
