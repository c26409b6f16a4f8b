/* One row: statistics -> rule -> gradient, included once for each REAL and each ISA.
 *
 * With z = x / temperature, x the logits or, with a softcap, softcap tanh(logits / softcap):
 *
 *   rest = sum_{k != t} exp(z_k - m)     one pass over tiles; the reference m moves only when a tile exceeds it by
 *                                        MARGIN (lazy max), and costs no accuracy while it lags (vecmath.h)
 *   nll  = lse - z_t = log1p(rest / e_t)              keeps its digits when p_t is near 1
 *   g_t  ~ p_t - 1   = -rest / (rest + e_t)           likewise
 *
 * With a gradient to write, the same pass leaves exp(z_k - m) in it while the tile is hot, and a second pass scales:
 * one exp a logit. Where the gradient is 16-bit or strided, or needs more than the exponential, exp is taken again.
 */
#include "ce_fast.h"
#include "rules.h"
#include "storage.h"
#include "sums.h"
#include "vecmath.h"

#ifndef CE_ROWS_COMMON
#define CE_ROWS_COMMON
#define CE_MARGIN 1.0
#define CE_LEAD 23 /* terms 2^-23 under the smallest normal still count: 152,064 of them may add up to it */
#define CE_STREAM (1 << 23)      /* bytes of a gradient that caches do not hold anyway */
enum { CE_STORE_NOT, CE_STORE, CE_STORE_FAR };
/* Bytes: how far before they are widened 16-bit logits are fetched. One tile, 2 KiB, is too late: [1024, 50257] of bfloat16
   took 8.8 ms so, 7.3 with 8 to 16 KiB; of float, 8.8 with its tile of 4 KiB and 9.3 with 16. */
#define CE_AHEAD (1 << 14)
#define CE_RUN 256 /* elements summed in REAL: on a row of equal logits runs of 1024 lost 4.5 ulp, these lose 1 */
#define CE_LANES 32 /* partial sums of a tile; a multiple of every vector length, and tiles are padded to it */
#endif

typedef struct {
    const ce_job *job;
    const char *x; /* the row of logits, */
    const char *q; /* of class probabilities, */
    char *out;     /* and of the output */
    int64_t t;     /* the class left out of the sums; -1: none */
    int store_exp; /* out takes exp(z - m) in the first pass */
    ce_reference *tiles;     /* the reference of each stored tile */
    const int64_t *left_out; /* (n_left_out), or NULL */
} NAME(row);

typedef struct {
    ce_reference m;
    REAL pivot; /* the logit m was set by: sums of mass (x - pivot) stay well conditioned */
    REAL bound; /* a tile above it moves m */
    NAME(exp_args) exp;
    ce_sum rest, mass, moment; /* sums over k != t of exp(z_k - m), mass_k, mass_k (x_k - pivot) */
    int infinite;              /* met +inf */
} NAME(sums);

/* x <- softcap tanh(x / softcap), and its derivative to slope, if asked for. With e = exp(-2 |x| / softcap):
   tanh = (1 - e) / (1 + e), tanh' = 4 e / (1 + e)^2, and 1 - e by its series where it would cancel. */
static void NAME(cap_tile)(const ce_job *job, REAL *x, REAL *slope, int64_t n)
{
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &job->cap);
    REAL cap = (REAL)job->softcap;
    for (int64_t k = 0; k < n; k++) {
        REAL down = x[k] < 0 ? x[k] : -x[k], e = NAME(exp)(down, args), t = 2 * down / cap;
        REAL v = cap * ((t > (REAL)-0.5 ? -NAME(expm1)(t) : 1 - e) / (1 + e));
        if (slope)
            slope[k] = 4 * e / ((1 + e) * (1 + e));
        x[k] = x[k] < 0 ? -v : v;
    }
}

static double NAME(element)(const char *row, const ce_array *array, int64_t k)
{
    REAL v;
    NAME(load)(row + k * array->class_stride, 1, array->dtype, 1, &v);
    return v;
}

static double NAME(logit)(const NAME(row) *row, int64_t k)
{
    REAL v = (REAL)NAME(element)(row->x, &row->job->logits, k);
    if (row->job->softcap != 0)
        NAME(cap_tile)(row->job, &v, NULL, 1);
    return v;
}

/* the logits [j, j + n) of the row, capped */
static void NAME(load_logits)(const NAME(row) *row, int64_t j, int64_t n, REAL *buffer)
{
    const ce_array *logits = &row->job->logits;
    NAME(load)(row->x + j * logits->class_stride, logits->class_stride, logits->dtype, n, buffer);
    if (row->job->softcap != 0)
        NAME(cap_tile)(row->job, buffer, NULL, n);
}

/* m moves to CE_LEAD ln 2 below z; what was summed against the old m follows it */
static void NAME(set_reference)(NAME(sums) *s, REAL x, const ce_temperature *t)
{
    ce_reference m = {0, -CE_LEAD};
    if (fabs((double)x) < CE_BASE_LIMIT * t->value)
        m.n += (int64_t)rint((double)x * t->log2e);
    else
        m.base = x;
    if (s->rest.high != 0) {
        double factor = ce_exp_scaled(s->m.base - m.base, m.n - s->m.n, t);
        s->rest.high *= factor;
        s->rest.low *= factor;
    }
    if (s->mass.high != 0)
        ce_add(&s->moment, -ce_total(&s->mass) * ((double)x - (double)s->pivot));
    s->m = m;
    s->pivot = x;
    s->bound = x + (REAL)(CE_MARGIN * t->value);
    s->exp = NAME(exp_prepare)(m.base, m.n, t);
}

/* (m + CE_LEAD ln 2) - z, exact until the last addition: base or n + CE_LEAD is 0, and that times ln2_high is exact */
static double NAME(reference_minus)(const ce_reference *m, double x, const ce_temperature *t)
{
    double n = (double)(m->n + CE_LEAD);
    return (((m->base - x) + n * t->ln2_high) + n * t->ln2_low) / t->value;
}

/* -inf in place of the classes of tile [j, j + n) that are left out */
static void NAME(leave_out)(const NAME(row) *row, int64_t j, int64_t n, REAL *tile)
{
    int64_t low = 0, high = row->left_out ? row->job->n_left_out : 0, end = high;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (row->left_out[middle] < j)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < end && row->left_out[low] < j + n; low++)
        tile[row->left_out[low] - j] = -(REAL)INFINITY;
}

/* Tile [j, j + n) of the row without its target: the row itself where that will do, else buffer, padded with -inf to
   whole lanes. *padded: its length. */
static const REAL *NAME(tile)(const NAME(row) *row, int64_t j, int64_t n, REAL *buffer, int64_t *padded)
{
    const ce_array *logits = &row->job->logits;
    int has_target = row->t >= j && row->t < j + n, plain = !has_target && row->job->softcap == 0 && !row->left_out;
    *padded = (n + CE_LANES - 1) & -(int64_t)CE_LANES;
    if (*padded == n && plain && logits->dtype == REAL_DTYPE && logits->class_stride == sizeof(REAL))
        return (const REAL *)(row->x + j * logits->class_stride);
    NAME(load_logits)(row, j, n, buffer);
    NAME(leave_out)(row, j, n, buffer);
    if (has_target)
        buffer[row->t - j] = -(REAL)INFINITY;
    for (int64_t k = n; k < *padded; k++)
        buffer[k] = -(REAL)INFINITY;
    return buffer;
}

/* mass_k = w_k (on q_k + off), 0 at the target and in the padding */
static void NAME(mass_tile)(const NAME(row) *row, int64_t j, int64_t n, int64_t padded, REAL *mass)
{
    const ce_job *job = row->job;
    REAL on = (REAL)job->on, off = (REAL)job->off;
    for (int64_t k = 0; k < padded; k++)
        mass[k] = 0;
    if (row->q)
        NAME(load)(row->q + j * job->soft.class_stride, job->soft.class_stride, job->soft.dtype, n, mass);
    for (int64_t k = 0; k < n; k++)
        mass[k] = row->q ? on * mass[k] + off : off;
    if (job->weight)
        for (int64_t k = 0; k < n; k++)
            mass[k] *= (REAL)job->weight[j + k];
    if (row->t >= j && row->t < j + n)
        mass[row->t - j] = 0;
}

/* by halves: one after another, the 32 dependent additions took half as long as the tile's exponentials */
CE_INLINE double NAME(sum_lanes)(double *sum, const int n_lanes)
{
#pragma GCC unroll 8
    for (int half = n_lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            sum[l] += sum[l + half];
    return sum[0];
}

static REAL NAME(tile_max)(const REAL *x, int64_t n)
{
    REAL lanes[CE_LANES];
    for (int l = 0; l < CE_LANES; l++)
        lanes[l] = -(REAL)INFINITY;
    for (int64_t k = 0; k < n; k += CE_LANES)
        for (int l = 0; l < CE_LANES; l++)
            lanes[l] = x[k + l] > lanes[l] ? x[k + l] : lanes[l]; /* NaN is passed over */
#pragma GCC unroll 8
    for (int half = CE_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
    return lanes[0];
}

/* sum_k exp(z_k - m) over n elements, a multiple of n_lanes, and with `store` the terms to e, which may be x. Meanwhile
   come into the cache what will be read next, at `ahead`, elements of `size` bytes, and with CE_STORE_FAR the next tile of
   e: [1024, 50257] took 11.1 ms without the one, its gradient 18.8 without the other, 8.5 and 15.7 with them. */
CE_INLINE double NAME(lanes_exp)(const REAL *x, REAL *e, const int store, int64_t n, NAME(exp_args) args,
                                 const char *ahead, int64_t size, const int n_lanes)
{
    double sums[CE_LANES];
    for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
        sums[l] = 0;
    const int64_t run = CE_RUN / CE_LANES * n_lanes;
    for (int64_t j = 0; j < n; j += run) {
        int64_t end = j + run < n ? j + run : n;
        REAL lanes[CE_LANES];
        for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
            lanes[l] = 0;
        for (int64_t k = j; k < end; k += n_lanes) {
            for (int line = 0; line < n_lanes * (int)sizeof(REAL); line += 64)
                __builtin_prefetch(ahead + k * size + line);
            for (int line = 0; store == CE_STORE_FAR && line < n_lanes * (int)sizeof(REAL); line += 64)
                __builtin_prefetch((const char *)(e + k + CE_TILE) + line, 1);
#pragma GCC ivdep
            for (int l = 0; l < n_lanes; l++) {
                REAL v = NAME(exp)(x[k + l], args);
                lanes[l] += v;
                if (store)
                    e[k + l] = v;
            }
        }
        for (int l = 0; l < n_lanes; l++)
            sums[l] += (double)lanes[l];
    }
    return NAME(sum_lanes)(sums, n_lanes);
}

CE_INLINE double NAME(tile_exp)(const REAL *x, REAL *e, int store, int64_t n, NAME(exp_args) args, const char *ahead,
                                int64_t size)
{
    return NAME(lanes_exp)(x, e, store, n, args, ahead, size, CE_LANES);
}

static void NAME(add_moments)(NAME(sums) *s, const REAL *x, const REAL *mass, int64_t n)
{
    double masses[CE_LANES], moments[CE_LANES];
    for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
        masses[l] = moments[l] = 0;
    REAL pivot = s->pivot;
    for (int64_t j = 0; j < n; j += CE_RUN) {
        int64_t end = j + CE_RUN < n ? j + CE_RUN : n;
        REAL total[CE_LANES], moment[CE_LANES];
        for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
            total[l] = moment[l] = 0;
        for (int64_t k = j; k < end; k += CE_LANES)
            for (int l = 0; l < CE_LANES; l++) {
                REAL w = mass[k + l], v = w * (x[k + l] - pivot);
                total[l] += w;
                moment[l] += w != 0 ? v : 0; /* mass 0 against -inf contributes 0 */
            }
        for (int l = 0; l < CE_LANES; l++) {
            masses[l] += (double)total[l];
            moments[l] += (double)moment[l];
        }
    }
    ce_add(&s->mass, NAME(sum_lanes)(masses, CE_LANES));
    ce_add(&s->moment, NAME(sum_lanes)(moments, CE_LANES));
}

/* of the classes [first, last), first a multiple of CE_TILE */
static NAME(sums) NAME(statistics)(const NAME(row) *row, double x_t, int64_t first, int64_t last)
{
    const ce_job *job = row->job;
    int with_mass = (job->off != 0 || row->q) && job->rule == CE_CROSS_ENTROPY;
    REAL buffer[CE_TILE], mass[CE_TILE];
    const ce_temperature *t = &job->temperature;
    NAME(sums) s = {{0, -CE_LEAD}, 0, -(REAL)INFINITY, NAME(exp_prepare)(0, -CE_LEAD, t), {0, 0}, {0, 0}, {0, 0}, 0};
    if (row->t >= 0 && isfinite(x_t))
        NAME(set_reference)(&s, (REAL)x_t, t);
    s.infinite = row->t >= 0 && x_t > 0 && isinf(x_t);
    int64_t size = job->logits.class_stride;
    const char *next = row->x + (size == 2 ? CE_AHEAD : CE_TILE * size);
    for (int64_t j = first; j < last; j += CE_TILE) {
        int64_t n = last - j < CE_TILE ? last - j : CE_TILE, padded;
        const REAL *x = NAME(tile)(row, j, n, buffer, &padded);
        const char *ahead = next + j * size; /* right where the classes are contiguous */
        REAL max = NAME(tile_max)(x, padded);
        if (max > s.bound) {
            if (isinf(max))
                s.infinite = 1;
            else
                NAME(set_reference)(&s, max, t);
        }
        if (with_mass) {
            NAME(mass_tile)(row, j, n, padded, mass);
            NAME(add_moments)(&s, x, mass, padded);
        }
        if (!row->store_exp) {
            ce_add(&s.rest, NAME(tile_exp)(x, NULL, 0, padded, s.exp, ahead, size));
            continue;
        }
        REAL *e = (REAL *)row->out + j;
        row->tiles[j / CE_TILE] = s.m;
        ce_add(&s.rest, NAME(tile_exp)(x, x == buffer ? buffer : e, CE_STORE_FAR, padded, s.exp, ahead, size));
        if (x == buffer)
            memcpy(e, buffer, (size_t)n * sizeof(REAL));
    }
    return s;
}

/* a class that is not the target */
static ce_class NAME(class)(const ce_job *job, REAL x, const ce_row_stats *s)
{
    double n = (s->pivot - (double)x) / job->temperature.value + s->lse_minus_pivot;
    n = n < 0 ? 0 : n; /* by rounding, where p is 1 */
    return (ce_class){n, exp(-n), -expm1(-n)};
}

/* what the classes beside the target contribute, where their slopes differ: class by class, once lse is known */
static ce_term NAME(rest_terms)(const NAME(row) *row, const ce_row_stats *s)
{
    const ce_job *job = row->job;
    REAL buffer[CE_TILE], mass[CE_TILE];
    ce_sum loss = {0, 0}, slope = {0, 0};
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        NAME(load_logits)(row, j, n, buffer);
        NAME(mass_tile)(row, j, n, n, mass);
        for (int64_t k = 0; k < n; k++) {
            if (mass[k] == 0)
                continue; /* mass 0 against -inf contributes 0 */
            ce_term term = ce_term_of(job, NAME(class)(job, buffer[k], s));
            ce_add(&loss, (double)mass[k] * term.loss);
            ce_add(&slope, (double)mass[k] * term.slope);
        }
    }
    return (ce_term){ce_total(&loss), ce_total(&slope)};
}

/* everything a rule may ask for, each from the form that does not cancel */
static ce_row_stats NAME(row_stats)(const NAME(row) *row, const NAME(sums) *s, double x_t)
{
    const ce_job *job = row->job;
    const ce_temperature *t = &job->temperature;
    double rest = s->infinite ? NAN : ce_total(&s->rest);
    double log_rest = log(ldexp(rest, -CE_LEAD)); /* against m + CE_LEAD ln 2, so that it is small */
    ce_row_stats r = {0};
    r.sum = rest;
    r.lse = NAME(reference_minus)(&s->m, 0, t) + log_rest;
    if (row->t < 0)
        return r;
    double e_t = ce_exp_scaled(x_t - s->m.base, s->m.n, t);
    r.pivot = s->pivot;
    r.sum = rest + e_t;
    if (e_t >= rest) {
        double odds = rest / e_t, nll = log1p(odds);
        r.target = (ce_class){nll, 1 / (1 + odds), odds / (1 + odds)};
        r.lse = x_t / t->value + nll;
        r.lse_minus_pivot = (x_t - (double)s->pivot) / t->value + nll;
    } else {
        double odds = e_t / rest, log_sum = log_rest + log1p(odds);
        r.target = (ce_class){NAME(reference_minus)(&s->m, x_t, t) + log_sum, odds / (1 + odds), 1 / (1 + odds)};
        r.lse = NAME(reference_minus)(&s->m, 0, t) + log_sum;
        r.lse_minus_pivot = NAME(reference_minus)(&s->m, (double)s->pivot, t) + log_sum;
    }
    double w_t = job->weight ? job->weight[row->t] : 1;
    double q_t = row->q ? NAME(element)(row->q, &job->soft, row->t) : 1;
    r.row_weight = row->q ? 1 : w_t;
    r.mass_t = w_t * (job->on * q_t + job->off);
    if (job->rule == CE_CROSS_ENTROPY) { /* slopes 1, and a loss that is linear in z: sums of the first pass do */
        double mass = job->off * ((job->weight_total.high - w_t) + job->weight_total.low);
        double moment = ce_total(&s->moment);
        mass = row->q ? ce_total(&s->mass) : mass;
        r.rest = (ce_term){mass == 0 && moment == 0 ? 0 : mass * r.lse_minus_pivot - moment / t->value, mass};
    } else if (job->off != 0 || row->q) {
        r.rest = NAME(rest_terms)(row, &r);
    }
    return r;
}

/* out_k = factor exp(z_k - m) - pull; products that would be subnormal become 0, also those of what the factor rounds: on
   logits spread over 200 they took eight times as long */
static void NAME(scale_tile)(const REAL *e, REAL *out, int64_t n, double factor, REAL pull)
{
    REAL high = (REAL)factor, cut = (REAL)REAL_MIN / NAME(abs)(high);
#if CE_HAVE_FMA && REAL_IS_FLOAT
    REAL low = isfinite(high) ? (REAL)(factor - (double)high) : 0; /* or the rounding of factor alone costs half an ulp */
    REAL cut_low = (REAL)REAL_MIN / NAME(abs)(low);
#pragma GCC ivdep
    for (int64_t k = 0; k < n; k++)
        out[k] = __builtin_fmaf(e[k] < cut ? 0 : e[k], high, (e[k] < cut_low ? 0 : e[k]) * low - pull);
#else
#pragma GCC ivdep
    for (int64_t k = 0; k < n; k++)
        out[k] = (e[k] < cut ? 0 : e[k]) * high - pull;
#endif
}

typedef struct {
    ce_row_stats stats;
    ce_row_rule rule;
    double inverse_sum, scale, hess_scale;
} NAME(slopes);

/* scale mass_k s_k, what the target distribution takes from the gradient */
static void NAME(pull_tile)(const NAME(row) *row, const NAME(slopes) *g, int64_t j, int64_t n, const REAL *x, REAL *pull)
{
    const ce_job *job = row->job;
    NAME(mass_tile)(row, j, n, n, pull);
    for (int64_t k = 0; k < n; k++)
        pull[k] *= (REAL)g->scale;
    if (job->rule != CE_CROSS_ENTROPY)
        for (int64_t k = 0; k < n; k++)
            if (pull[k] != 0)
                pull[k] *= (REAL)ce_term_of(job, NAME(class)(job, x[k], &g->stats)).slope;
}

/* sum_{i != k} p_i */
static double NAME(others)(const NAME(row) *row, int64_t k, const ce_row_stats *s)
{
    double sum = 0;
    for (int64_t i = 0; i < row->job->n_classes; i++)
        sum += i == k ? 0 : NAME(class)(row->job, (REAL)NAME(logit)(row, i), s).p;
    return sum;
}

/* h p_k (1 - p_k) >= floor, of e_k = exp(z_k - m); 1 - p is exact also where p is near 1 */
static void NAME(write_hess)(const NAME(row) *row, const NAME(slopes) *g, int64_t j, int64_t n, const REAL *e,
                             const REAL *slope, char *hess)
{
    const ce_job *job = row->job;
    REAL buffer[CE_TILE];
    double h = g->hess_scale * g->rule.h;
    for (int64_t k = 0; k < n; k++) {
        double p = (double)e[k] * g->inverse_sum, rest = 1 - p;
        if (j + k == row->t) {
            p = g->stats.target.p;
            rest = g->stats.target.rest;
        } else if (p > 0.5) {
            rest = NAME(others)(row, j + k, &g->stats);
        }
        double v = h * p * rest * (job->softcap != 0 ? (double)slope[k] * (double)slope[k] : 1);
        buffer[k] = (REAL)(v < job->floor ? job->floor : v);
    }
    NAME(store)(hess + j * job->hess.class_stride, job->hess.class_stride, job->hess.dtype, n, buffer);
}

static void NAME(write_gradient)(const NAME(row) *row, const NAME(sums) *s, const NAME(slopes) *g, char *hess,
                                 int64_t first, int64_t last)
{
    const ce_job *job = row->job;
    int with_mass = job->off != 0 || row->q;
    REAL buffer[CE_TILE], pull[CE_TILE], slope[CE_TILE], raw[CE_TILE];
    for (int64_t j = first; j < last; j += CE_TILE) {
        int64_t n = last - j < CE_TILE ? last - j : CE_TILE, padded;
        double factor = g->scale * g->rule.a * g->inverse_sum;
        const REAL *x = buffer;
        REAL *out = buffer;
        if (row->store_exp) {
            const ce_reference *m = &row->tiles[j / CE_TILE];
            if (m->base != s->m.base || m->n != s->m.n) /* it has risen, unless a tile of nothing but -inf had none */
                factor *= fmin(1, ce_exp_scaled(m->base - s->m.base, s->m.n - m->n, &job->temperature));
            out = (REAL *)row->out + j;
        } else {
            x = NAME(tile)(row, j, n, buffer, &padded);
        }
        if (with_mass)
            NAME(pull_tile)(row, g, j, n, x, pull);
        if (!row->store_exp)
            NAME(tile_exp)(x, buffer, 1, padded, s->exp, (const char *)x, 0);
        if (job->softcap != 0) {
            NAME(load)(row->x + j * job->logits.class_stride, job->logits.class_stride, job->logits.dtype, n, raw);
            NAME(cap_tile)(job, raw, slope, n);
        }
        if (hess)
            NAME(write_hess)(row, g, j, n, buffer, slope, hess);
        NAME(scale_tile)(out, out, n, factor, 0);
        if (with_mass)
            for (int64_t k = 0; k < n; k++)
                out[k] -= pull[k];
        if (row->t >= j && row->t < j + n)
            out[row->t - j] = (REAL)(g->scale * g->rule.g_t);
        if (job->softcap != 0)
            for (int64_t k = 0; k < n; k++)
                out[k] *= slope[k];
        if (!row->store_exp)
            NAME(store)(row->out + j * job->out.class_stride, job->out.class_stride, job->out.dtype, n, out);
    }
}

/* log p_k = (x_k - x_t) - nll, with t the largest class: exact where p is near 1 */
static void NAME(write_log_softmax)(const NAME(row) *row, double x_t, double nll)
{
    const ce_job *job = row->job;
    REAL buffer[CE_TILE], shift = (REAL)x_t, loss = (REAL)nll;
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        NAME(load_logits)(row, j, n, buffer);
        for (int64_t k = 0; k < n; k++)
            buffer[k] = (buffer[k] - shift) - loss;
        NAME(store)(row->out + j * job->out.class_stride, job->out.class_stride, job->out.dtype, n, buffer);
    }
}

static void NAME(write_constant)(const ce_array *array, char *row, REAL value, int64_t first, int64_t last)
{
    REAL buffer[CE_TILE];
    for (int64_t k = 0; k < CE_TILE; k++)
        buffer[k] = value;
    for (int64_t j = first; j < last; j += CE_TILE) {
        int64_t n = last - j < CE_TILE ? last - j : CE_TILE;
        NAME(store)(row + j * array->class_stride, array->class_stride, array->dtype, n, buffer);
    }
}

/* the first class of the largest logit, or of the largest mass; 0 if there is none but NaN */
static int64_t NAME(argmax)(const NAME(row) *row, int of_mass)
{
    const ce_job *job = row->job;
    REAL buffer[CE_TILE], best = -(REAL)INFINITY;
    int64_t at = 0;
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        int64_t padded = (n + CE_LANES - 1) & -(int64_t)CE_LANES;
        if (of_mass)
            NAME(mass_tile)(row, j, n, n, buffer);
        else
            NAME(load_logits)(row, j, n, buffer);
        for (int64_t k = n; k < padded; k++)
            buffer[k] = -(REAL)INFINITY;
        REAL max = NAME(tile_max)(buffer, padded);
        if (!(max > best))
            continue;
        best = max;
        for (at = j; buffer[at - j] != max; at++)
            ;
    }
    return at;
}

/* logsumexp where the formula is NaN: it alone has limits where a loss has none */
static double NAME(limit_lse)(const NAME(row) *row)
{
    double limit = -INFINITY;
    for (int64_t k = 0; k < row->job->n_classes; k++) {
        double x = NAME(logit)(row, k);
        if (isnan(x))
            return x;
        if (isinf(x) && x > 0)
            limit = x;
    }
    return limit;
}

static int64_t NAME(offset)(const ce_job *job, const ce_array *array, int64_t i)
{
    int64_t offset = 0;
    for (int d = job->n_outer - 1; d > 0; d--) {
        offset += i % job->outer_shape[d] * array->outer_stride[d];
        i /= job->outer_shape[d];
    }
    return job->n_outer ? offset + i * array->outer_stride[0] : 0;
}

/* what a row that does not count gets, or one whose loss is NaN */
static void NAME(fill_row)(const ce_job *job, char *out, char *hess, REAL value)
{
    if (out)
        NAME(write_constant)(&job->out, out, value, 0, job->n_classes);
    if (hess)
        NAME(write_constant)(&job->hess, hess, value, 0, job->n_classes);
}

/* the class left out of the sums: the target, else the one that most of the loss, or of the sum, comes from */
static int64_t NAME(anchor)(const NAME(row) *row, int64_t target)
{
    const ce_job *job = row->job;
    if (job->target)
        return target;
    if (row->left_out || (job->emit == CE_GRADIENT && !row->q)) /* the sum itself, or softmax, which need none */
        return -1;
    return NAME(argmax)(row, row->q != NULL);
}

/* whether a gradient goes past the caches: it is large, new, and nothing but the exponentials is asked of a class */
static int NAME(streams)(const ce_job *job)
{
    int plain = job->emit == CE_GRADIENT && job->out.dtype == REAL_DTYPE && job->out.data != job->logits.data;
    return plain && job->n_rows * job->n_classes * (int64_t)sizeof(REAL) >= CE_STREAM;
}

static NAME(row) NAME(row_of)(const ce_job *job, int64_t i, int64_t target, char *out, ce_reference *tiles)
{
    NAME(row) row = {job, job->logits.data + NAME(offset)(job, &job->logits, i), NULL, out, -1, 0, tiles, NULL};
    if (job->soft.data)
        row.q = job->soft.data + NAME(offset)(job, &job->soft, i);
    if (job->left_out)
        row.left_out = job->left_out + i * job->n_left_out;
    row.t = NAME(anchor)(&row, target);
    int by_class = job->softcap != 0 || ((job->off != 0 || row.q) && job->rule != CE_CROSS_ENTROPY);
    row.store_exp = job->emit == CE_GRADIENT && job->out.dtype == REAL_DTYPE && job->out.class_stride == sizeof(REAL) &&
                    !by_class && !job->hess.data;
    return row;
}

/* what the rule makes of the row's sums */
static NAME(slopes) NAME(slopes_of)(const NAME(row) *row, const NAME(sums) *sums, double x_t, int64_t i,
                                    double sample_weight)
{
    const ce_job *job = row->job;
    NAME(slopes) g = {NAME(row_stats)(row, sums, x_t), {0, 1, 0, 0}, 0, 0, 0};
    if (row->t >= 0) /* with no target at all, the gradient of logsumexp: softmax */
        g.rule = ce_rule_of(job, &g.stats);
    double upstream = sample_weight * (job->upstream ? job->upstream[i] : 1);
    g.inverse_sum = row->left_out && g.stats.sum == 0 ? 0 : 1 / g.stats.sum;
    g.scale = job->scale * upstream;
    g.hess_scale = job->hess_scale * upstream;
    return g;
}

static double NAME(softmax_row)(const ce_job *job, int64_t i, int64_t target, double sample_weight, char *out,
                                char *hess, ce_reference *tiles)
{
    NAME(row) row = NAME(row_of)(job, i, target, out, tiles);
    double x_t = row.t >= 0 ? NAME(logit)(&row, row.t) : 0; /* before the pass, which may be in place */
    NAME(sums) sums = NAME(statistics)(&row, x_t, 0, job->n_classes);
    NAME(slopes) g = NAME(slopes_of)(&row, &sums, x_t, i, sample_weight);
    if (job->lse)
        ((REAL *)job->lse)[i] = (REAL)(isnan(g.stats.lse) ? NAME(limit_lse)(&row) : g.stats.lse);
    if (job->emit == CE_LOG_SOFTMAX) {
        NAME(write_log_softmax)(&row, x_t, g.stats.target.nll);
        return 0;
    }
    if (job->emit == CE_GRADIENT && isnan(g.stats.lse))
        NAME(fill_row)(job, out, hess, (REAL)NAN);
    else if (job->emit == CE_GRADIENT)
        NAME(write_gradient)(&row, &sums, &g, hess, 0, job->n_classes);
    return sample_weight * g.rule.loss;
}

#if !REAL_IS_FLOAT
#include "divergence_tpl.h"
#endif

static double NAME(run_row)(const ce_job *job, int64_t i, ce_reference *tiles, ce_tally *tally)
{
    char *out = job->emit ? job->out.data + NAME(offset)(job, &job->out, i) : NULL;
    char *hess = job->hess.data ? job->hess.data + NAME(offset)(job, &job->hess, i) : NULL;
    double sample_weight = job->sample_weight ? job->sample_weight[i] : 1, loss = 0;
    int64_t target = job->target ? ce_target_at(job->target, job->target_type, i) : -1;
    if (!ce_tally_row(job, i, target, sample_weight, tally)) /* it is not read */
        NAME(fill_row)(job, out, hess, 0);
#if !REAL_IS_FLOAT
    else if (job->rule == CE_KL_FORWARD || job->rule == CE_KL_REVERSE)
        loss = NAME(divergence_row)(job, i, sample_weight, out, hess);
#endif
    else
        loss = NAME(softmax_row)(job, i, target, sample_weight, out, hess, tiles);
    if (job->loss)
        ((REAL *)job->loss)[i] = (REAL)loss;
    return loss;
}
