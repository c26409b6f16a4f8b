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

#endif
