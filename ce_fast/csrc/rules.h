/* The losses: statistics of a row in, scalars out. A new loss is a new rule.
 *
 *   gradient of row i:   g_k = a p_k - mass_k   for k != t,   and g_t as the rule says it, free of cancellation
 */
#ifndef CE_RULES_H
#define CE_RULES_H

#include "ce_fast.h"

typedef struct {
    double lse;
    double sum;           /* sum_k exp(x_k - m), m the reference of the stored exponentials */
    double nll;           /* lse - x_t */
    double p_t, p_rest;   /* softmax at the target, and of all the others: p_t + p_rest = 1, each to full precision */
    double mass_t;        /* w_t q_t, the weighted target distribution at the target */
    double mass_rest;     /* sum_{k != t} w_k q_k */
    double cross_rest;    /* sum_{k != t} w_k q_k (lse - x_k) */
    double row_weight;    /* w_t for index targets, 1 for class probabilities: what z_loss is weighted by */
} ce_row_stats;

typedef struct {
    double loss, a, g_t;
} ce_row_rule;

/* loss = sum_k mass_k (lse - x_k) + row_weight z_loss lse^2 */
static inline ce_row_rule ce_cross_entropy_rule(const ce_row_stats *s, double z_loss)
{
    double z = z_loss == 0 ? 0 : z_loss * s->row_weight * s->lse;
    double own = s->mass_t == 0 && s->nll == s->nll ? 0 : s->mass_t * s->nll; /* 0 * inf is 0 here, NaN stays */
    ce_row_rule r;
    r.loss = own + s->cross_rest + (z == 0 ? 0 : z * s->lse);
    double mass = s->mass_t + s->mass_rest;
    r.a = mass + 2 * z;
    r.g_t = 2 * z * s->p_t + (s->mass_t > s->mass_rest ? s->mass_rest - mass * s->p_rest : mass * s->p_t - s->mass_t);
    return r;
}

#endif
