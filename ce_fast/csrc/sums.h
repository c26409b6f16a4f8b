/* Neumaier's compensated sum. Plain additions cost 3 ulp over the 150 tiles of a long row, and 250 ulp over 5,000 equal
   rows, whose roundings all go one way. */
#ifndef CE_SUMS_H
#define CE_SUMS_H

#include <math.h>
#include "ce_fast.h"

CE_INLINE void ce_add(ce_sum *s, double term)
{
    double sum = s->high + term;
    s->low += fabs(s->high) >= fabs(term) ? (s->high - sum) + term : (term - sum) + s->high;
    s->high = sum;
}

CE_INLINE double ce_total(const ce_sum *s)
{
    return isfinite(s->high) ? s->high + s->low : s->high;
}

/* 1: row i counts; 0: it does not, or its target is no class */
static inline int ce_tally_row(const ce_job *job, int64_t i, int64_t target, double sample_weight, ce_tally *tally)
{
    if (sample_weight == 0 || (job->target && target == job->ignore_index))
        return 0;
    if (job->target && (target < 0 || target >= job->n_classes)) {
        tally->bad = tally->bad < 0 ? i : tally->bad;
        return 0;
    }
    ce_add(&tally->weight, sample_weight * (job->target && job->weight ? job->weight[target] : 1));
    tally->counted++;
    return 1;
}

#endif
