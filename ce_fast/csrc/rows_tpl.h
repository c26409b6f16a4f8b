/* One row: statistics -> rule -> gradient, included once for each REAL and each ISA.
 *
 *   rest = sum_{k != t} exp(x_k - m)     one pass over tiles; the reference m moves only when a tile exceeds it by
 *                                        MARGIN (lazy max), and costs no accuracy while it lags (vecmath.h)
 *   nll  = lse - x_t = log1p(rest / e_t)              keeps its digits when p_t is near 1
 *   g_t  ~ p_t - 1   = -rest / (rest + e_t)           likewise
 *
 * With a gradient to write, the same pass leaves exp(x_k - m) in it while the tile is hot, and a second pass scales:
 * one exp a logit. Where the gradient is 16-bit or strided, exp is taken again instead.
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
#define CE_RUN 256 /* elements summed in REAL: on a row of equal logits runs of 1024 lost 4.5 ulp, these lose 1 */
#define CE_LANES 32 /* partial sums of a tile; a multiple of every vector length, and tiles are padded to it */
#endif

typedef struct {
    const ce_job *job;
    const char *x; /* the row of logits, */
    const char *q; /* of class probabilities, */
    char *out;     /* and of the output */
    int64_t t;     /* the class left out of the sums; -1: none */
    int store_exp; /* out takes exp(x - m) in the first pass */
    ce_reference *tiles; /* the reference of each stored tile */
} NAME(row);

typedef struct {
    ce_reference m;
    REAL pivot; /* the logit m was set by: sums of mass (x - pivot) stay well conditioned */
    REAL bound; /* a tile above it moves m */
    NAME(exp_args) exp;
    ce_sum rest, mass, moment; /* sums over k != t of exp(x_k - m), mass_k, mass_k (x_k - pivot) */
    int infinite;              /* met +inf */
} NAME(sums);

static double NAME(element)(const char *row, const ce_array *array, int64_t k)
{
    REAL v;
    NAME(load)(row + k * array->class_stride, 1, array->dtype, 1, &v);
    return v;
}

/* m moves to CE_LEAD ln 2 below x; what was summed against the old m follows it */
static void NAME(set_reference)(NAME(sums) *s, REAL x)
{
    ce_reference m = {0, -CE_LEAD};
    if (fabs((double)x) < CE_BASE_LIMIT)
        m.n += (int64_t)rint((double)x * CE_LOG2E);
    else
        m.base = x;
    if (s->rest.high != 0) {
        double factor = ce_exp_scaled(s->m.base - m.base, m.n - s->m.n);
        s->rest.high *= factor;
        s->rest.low *= factor;
    }
    if (s->mass.high != 0)
        ce_add(&s->moment, -ce_total(&s->mass) * ((double)x - (double)s->pivot));
    s->m = m;
    s->pivot = x;
    s->bound = x + (REAL)CE_MARGIN;
    s->exp = NAME(exp_prepare)(m.base, m.n);
}

/* (m + CE_LEAD ln 2) - x, exact until the last addition: base or n + CE_LEAD is 0, and that times CE_LN2_HI is exact */
static double NAME(reference_minus)(const ce_reference *m, double x)
{
    double n = (double)(m->n + CE_LEAD);
    return ((m->base - x) + n * CE_LN2_HI) + n * CE_LN2_LO;
}

/* Tile [j, j + n) of the row without its target: the row itself where that will do, else buffer, padded with -inf to
   whole lanes. *padded: its length. */
static const REAL *NAME(tile)(const NAME(row) *row, int64_t j, int64_t n, REAL *buffer, int64_t *padded)
{
    const ce_array *logits = &row->job->logits;
    const char *src = row->x + j * logits->class_stride;
    int has_target = row->t >= j && row->t < j + n;
    *padded = (n + CE_LANES - 1) & -(int64_t)CE_LANES;
    if (*padded == n && !has_target && logits->dtype == REAL_DTYPE && logits->class_stride == sizeof(REAL))
        return (const REAL *)src;
    NAME(load)(src, logits->class_stride, logits->dtype, n, buffer);
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
CE_INLINE double NAME(sum_lanes)(double *sum)
{
    for (int half = CE_LANES / 2; half > 0; half /= 2)
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
    for (int half = CE_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
    return lanes[0];
}

/* sum_k exp(x_k - m), and with store != 0 the terms to e, which may be x */
CE_INLINE double NAME(tile_exp)(const REAL *x, REAL *e, int store, int64_t n, NAME(exp_args) args)
{
    double sums[CE_LANES] = {0};
    for (int64_t j = 0; j < n; j += CE_RUN) {
        int64_t end = j + CE_RUN < n ? j + CE_RUN : n;
        REAL lanes[CE_LANES] = {0};
        for (int64_t k = j; k < end; k += CE_LANES) {
#pragma GCC ivdep
            for (int l = 0; l < CE_LANES; l++) {
                REAL v = NAME(exp)(x[k + l], args);
                lanes[l] += v;
                if (store)
                    e[k + l] = v;
            }
        }
        for (int l = 0; l < CE_LANES; l++)
            sums[l] += (double)lanes[l];
    }
    return NAME(sum_lanes)(sums);
}

static void NAME(add_moments)(NAME(sums) *s, const REAL *x, const REAL *mass, int64_t n)
{
    double masses[CE_LANES] = {0}, moments[CE_LANES] = {0};
    REAL pivot = s->pivot;
    for (int64_t j = 0; j < n; j += CE_RUN) {
        int64_t end = j + CE_RUN < n ? j + CE_RUN : n;
        REAL total[CE_LANES] = {0}, moment[CE_LANES] = {0};
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
    ce_add(&s->mass, NAME(sum_lanes)(masses));
    ce_add(&s->moment, NAME(sum_lanes)(moments));
}

static NAME(sums) NAME(statistics)(const NAME(row) *row, double x_t)
{
    const ce_job *job = row->job;
    int with_mass = job->off != 0 || row->q;
    REAL buffer[CE_TILE], mass[CE_TILE];
    NAME(sums) s = {{0, -CE_LEAD}, 0, -(REAL)INFINITY, NAME(exp_prepare)(0, -CE_LEAD), {0, 0}, {0, 0}, {0, 0}, 0};
    if (row->t >= 0 && isfinite(x_t))
        NAME(set_reference)(&s, (REAL)x_t);
    s.infinite = row->t >= 0 && x_t > 0 && isinf(x_t);
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE, padded;
        const REAL *x = NAME(tile)(row, j, n, buffer, &padded);
        REAL max = NAME(tile_max)(x, padded);
        if (max > s.bound) {
            if (isinf(max))
                s.infinite = 1;
            else
                NAME(set_reference)(&s, max);
        }
        if (with_mass) {
            NAME(mass_tile)(row, j, n, padded, mass);
            NAME(add_moments)(&s, x, mass, padded);
        }
        if (!row->store_exp) {
            ce_add(&s.rest, NAME(tile_exp)(x, NULL, 0, padded, s.exp));
            continue;
        }
        REAL *e = (REAL *)row->out + j;
        row->tiles[j / CE_TILE] = s.m;
        ce_add(&s.rest, NAME(tile_exp)(x, x == buffer ? buffer : e, 1, padded, s.exp));
        if (x == buffer)
            memcpy(e, buffer, (size_t)n * sizeof(REAL));
    }
    return s;
}

/* everything a rule may ask for, each from the form that does not cancel */
static ce_row_stats NAME(row_stats)(const NAME(row) *row, const NAME(sums) *s, double x_t)
{
    const ce_job *job = row->job;
    double rest = s->infinite ? NAN : ce_total(&s->rest), moment = ce_total(&s->moment);
    double log_rest = log(ldexp(rest, -CE_LEAD)); /* against m + CE_LEAD ln 2, so that it is small */
    ce_row_stats r = {0};
    r.p_rest = 1;
    r.sum = rest;
    r.lse = NAME(reference_minus)(&s->m, 0) + log_rest;
    if (row->t < 0)
        return r;
    double e_t = ce_exp_scaled(x_t - s->m.base, s->m.n);
    double lse_minus_pivot;
    r.sum = rest + e_t;
    if (e_t >= rest) {
        double odds = rest / e_t;
        r.nll = log1p(odds);
        r.p_t = 1 / (1 + odds);
        r.p_rest = odds / (1 + odds);
        r.lse = x_t + r.nll;
        lse_minus_pivot = (x_t - (double)s->pivot) + r.nll;
    } else {
        double odds = e_t / rest, log_sum = log_rest + log1p(odds);
        r.nll = NAME(reference_minus)(&s->m, x_t) + log_sum;
        r.p_t = odds / (1 + odds);
        r.p_rest = 1 / (1 + odds);
        r.lse = NAME(reference_minus)(&s->m, 0) + log_sum;
        lse_minus_pivot = NAME(reference_minus)(&s->m, (double)s->pivot) + log_sum;
    }
    double w_t = job->weight ? job->weight[row->t] : 1;
    double q_t = row->q ? NAME(element)(row->q, &job->soft, row->t) : 1;
    r.row_weight = row->q ? 1 : w_t;
    r.mass_t = w_t * (job->on * q_t + job->off);
    r.mass_rest = row->q ? ce_total(&s->mass) : job->off * ((job->weight_total.high - w_t) + job->weight_total.low);
    r.cross_rest = r.mass_rest == 0 && moment == 0 ? 0 : r.mass_rest * lse_minus_pivot - moment;
    return r;
}

/* out_k = factor exp(x_k - m) - scale mass_k; products that would be subnormal become 0 */
static void NAME(scale_tile)(const REAL *e, REAL *out, int64_t n, double factor)
{
    REAL high = (REAL)factor, cut = (REAL)REAL_MIN / (high < 0 ? -high : high);
#if CE_HAVE_FMA && REAL_IS_FLOAT
    REAL low = isfinite(high) ? (REAL)(factor - (double)high) : 0; /* or the rounding of factor alone costs half an ulp */
#pragma GCC ivdep
    for (int64_t k = 0; k < n; k++)
        out[k] = e[k] < cut ? 0 : __builtin_fmaf(e[k], high, e[k] * low);
#else
#pragma GCC ivdep
    for (int64_t k = 0; k < n; k++)
        out[k] = e[k] < cut ? 0 : e[k] * high;
#endif
}

static void NAME(write_gradient)(const NAME(row) *row, const NAME(sums) *s, double a_over_sum, double scale, double g_t)
{
    const ce_job *job = row->job;
    int with_mass = job->off != 0 || row->q;
    REAL buffer[CE_TILE], mass[CE_TILE];
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE, padded;
        double factor = a_over_sum;
        REAL *out = buffer;
        if (row->store_exp) {
            const ce_reference *m = &row->tiles[j / CE_TILE];
            if (m->base != s->m.base || m->n != s->m.n)
                factor *= ce_exp_scaled(m->base - s->m.base, s->m.n - m->n);
            out = (REAL *)row->out + j;
        } else {
            NAME(tile_exp)(NAME(tile)(row, j, n, buffer, &padded), buffer, 1, (n + CE_LANES - 1) & -(int64_t)CE_LANES, s->exp);
        }
        NAME(scale_tile)(out, out, n, factor);
        if (with_mass) {
            NAME(mass_tile)(row, j, n, n, mass);
            for (int64_t k = 0; k < n; k++)
                out[k] -= (REAL)scale * mass[k];
        }
        if (row->t >= j && row->t < j + n)
            out[row->t - j] = (REAL)g_t;
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
        NAME(load)(row->x + j * job->logits.class_stride, job->logits.class_stride, job->logits.dtype, n, buffer);
        for (int64_t k = 0; k < n; k++)
            buffer[k] = (buffer[k] - shift) - loss;
        NAME(store)(row->out + j * job->out.class_stride, job->out.class_stride, job->out.dtype, n, buffer);
    }
}

static void NAME(write_constant)(const NAME(row) *row, REAL value)
{
    const ce_job *job = row->job;
    REAL buffer[CE_TILE];
    for (int64_t k = 0; k < CE_TILE; k++)
        buffer[k] = value;
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        NAME(store)(row->out + j * job->out.class_stride, job->out.class_stride, job->out.dtype, n, buffer);
    }
}

/* the first class of the largest logit, or of the largest mass; 0 if there is none but NaN */
static int64_t NAME(argmax)(const NAME(row) *row, int of_mass)
{
    const ce_job *job = row->job;
    const ce_array *logits = &job->logits;
    REAL buffer[CE_TILE], best = -(REAL)INFINITY;
    int64_t at = 0;
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        int64_t padded = (n + CE_LANES - 1) & -(int64_t)CE_LANES;
        if (of_mass)
            NAME(mass_tile)(row, j, n, n, buffer);
        else
            NAME(load)(row->x + j * logits->class_stride, logits->class_stride, logits->dtype, n, buffer);
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
        double x = NAME(element)(row->x, &row->job->logits, k);
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

/* a row that does not count is not read: loss 0, gradient 0 */
static void NAME(skip_row)(const NAME(row) *row, int64_t i)
{
    if (row->job->loss)
        ((REAL *)row->job->loss)[i] = 0;
    if (row->job->emit)
        NAME(write_constant)(row, 0);
}

/* the class left out of the sums: the target, else the one that most of the loss, or of the sum, comes from */
static int64_t NAME(anchor)(const NAME(row) *row, int64_t target)
{
    const ce_job *job = row->job;
    if (job->target)
        return target;
    return row->q || job->emit != CE_GRADIENT ? NAME(argmax)(row, row->q != NULL) : -1; /* softmax needs none */
}

static double NAME(run_row)(const ce_job *job, int64_t i, ce_reference *tiles)
{
    const ce_array *logits = &job->logits, *out = &job->out;
    NAME(row) row = {job, logits->data + NAME(offset)(job, logits, i), NULL, NULL, -1, 0, tiles};
    if (job->soft.data)
        row.q = job->soft.data + NAME(offset)(job, &job->soft, i);
    if (job->emit)
        row.out = out->data + NAME(offset)(job, out, i);
    double sample_weight = job->sample_weight ? job->sample_weight[i] : 1;
    int64_t target = job->target ? ce_target_at(job->target, job->target_type, i) : -1;
    if (sample_weight == 0 || (job->target && target == job->ignore_index)) {
        NAME(skip_row)(&row, i);
        return 0;
    }
    row.t = NAME(anchor)(&row, target);
    row.store_exp = job->emit == CE_GRADIENT && out->dtype == REAL_DTYPE && out->class_stride == sizeof(REAL);

    double x_t = row.t >= 0 ? NAME(element)(row.x, logits, row.t) : 0; /* before the pass, which may be in place */
    NAME(sums) sums = NAME(statistics)(&row, x_t);
    ce_row_stats stats = NAME(row_stats)(&row, &sums, x_t);
    if (job->lse)
        ((REAL *)job->lse)[i] = (REAL)(isnan(stats.lse) ? NAME(limit_lse)(&row) : stats.lse);
    if (job->emit == CE_LOG_SOFTMAX) {
        NAME(write_log_softmax)(&row, x_t, stats.nll);
        return 0;
    }
    ce_row_rule rule = {0, 1, 0}; /* with no target at all, the gradient of logsumexp: softmax */
    if (row.t >= 0)
        rule = ce_cross_entropy_rule(&stats, job->z_loss);
    double loss = sample_weight * rule.loss;
    if (job->loss)
        ((REAL *)job->loss)[i] = (REAL)loss;
    if (job->emit == CE_GRADIENT && isnan(stats.lse))
        NAME(write_constant)(&row, (REAL)NAN);
    else if (job->emit == CE_GRADIENT) {
        double scale = job->scale * sample_weight * (job->upstream ? job->upstream[i] : 1);
        NAME(write_gradient)(&row, &sums, scale * rule.a / stats.sum, scale, scale * rule.g_t);
    }
    return loss;
}

static double NAME(rows)(const ce_job *job, int64_t first, int64_t last, ce_reference *tiles)
{
    ce_sum sum = {0, 0};
    for (int64_t i = first; i < last; i++)
        ce_add(&sum, NAME(run_row)(job, i, tiles));
    return ce_total(&sum);
}
