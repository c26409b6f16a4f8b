/* The losses: what one class contributes, and what a row makes of it. A new loss is a new rule.
 *
 *   loss of a row       sum_k mass_k f(n_k) + row_weight z_loss lse^2,    n_k = lse - z_k = -log p_k
 *   its gradient        g_j = a p_j - mass_j s_j,   s_k = df/dn_k,   a = sum_k mass_k s_k + 2 row_weight z_loss lse
 *   and Hessian         h_j = (sum_k mass_k s_k) p_j (1 - p_j): the exact one where s is constant, else its positive part
 */
#ifndef CE_RULES_H
#define CE_RULES_H

#include <math.h>
#include "ce_fast.h"

typedef struct { /* one class, each to full precision */
    double nll, p, rest; /* -log p, p, 1 - p */
} ce_class;

typedef struct {
    double loss, slope; /* f(nll), df/dnll */
} ce_term;

static inline ce_term ce_cross_entropy(ce_class c)
{
    return (ce_term){c.nll, 1};
}

/* f = (1 - p)^gamma nll (Lin et al., arXiv:1708.02002); du/dn = p with u = 1 - p, and nll / u -> 1 as u -> 0 */
static inline ce_term ce_focal(ce_class c, double gamma)
{
    double factor = c.p < 0.5 ? exp(gamma * log1p(-c.p)) : pow(c.rest, gamma); /* 1 - p rounds where p is small */
    double ratio = c.rest > 0 ? c.nll / c.rest : 1;
    return (ce_term){factor == 0 ? factor : factor * c.nll, factor * (1 + (c.p > 0 ? gamma * c.p * ratio : 0))};
}

/* f = nll + epsilon (1 - p) (Leng et al., arXiv:2204.12511) */
static inline ce_term ce_poly(ce_class c, double epsilon)
{
    return (ce_term){c.nll + epsilon * c.rest, c.p < 0.5 ? 1 + epsilon * c.p : (1 + epsilon) - epsilon * c.rest};
}

/* f = (1 - p^q) / q (Zhang and Sabuncu, arXiv:1805.07836) */
static inline ce_term ce_generalized(ce_class c, double q)
{
    double slope = c.p > 1e-300 ? pow(c.p, q) : exp(-q * c.nll); /* the rounding of a large nll would count here */
    return (ce_term){-expm1(-q * c.nll) / q, slope};
}

static inline ce_term ce_term_of(const ce_job *job, ce_class c)
{
    switch (job->rule) {
    case CE_FOCAL: return ce_focal(c, job->parameter);
    case CE_POLY: return ce_poly(c, job->parameter);
    case CE_GENERALIZED: return ce_generalized(c, job->parameter);
    default: return ce_cross_entropy(c);
    }
}

typedef struct {
    double lse;
    double pivot, lse_minus_pivot; /* a large logit, and lse - pivot / temperature: near it lse - z would cancel */
    double sum;           /* sum_k exp(z_k - m), m the reference of the stored exponentials */
    ce_class target;
    double mass_t;        /* w_t q_t, the weighted target distribution at the target */
    ce_term rest;         /* sum_{k != t} mass_k f(n_k), sum_{k != t} mass_k s_k */
    double row_weight;    /* w_t for index targets, 1 for class probabilities: what z_loss is weighted by */
} ce_row_stats;

typedef struct {
    double loss, a, g_t, h; /* gradient a p_k - mass_k s_k, but g_t at the target; Hessian h p_k (1 - p_k) */
} ce_row_rule;

static inline ce_row_rule ce_rule_of(const ce_job *job, const ce_row_stats *s)
{
    ce_term own = ce_term_of(job, s->target);
    double z = job->z_loss == 0 ? 0 : job->z_loss * s->row_weight * s->lse;
    double slope = s->mass_t * own.slope;
    ce_row_rule r;
    r.loss = (s->mass_t == 0 && own.loss == own.loss ? 0 : s->mass_t * own.loss) + s->rest.loss; /* 0 * inf is 0 here */
    r.loss += z == 0 ? 0 : z * s->lse;
    r.h = slope + s->rest.slope;
    r.a = r.h + 2 * z;
    r.g_t = s->rest.slope * s->target.p - slope * s->target.rest + 2 * z * s->target.p;
    return r;
}

#endif
