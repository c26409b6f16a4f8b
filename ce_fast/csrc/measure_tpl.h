/* What evaluation asks of a row, in one pass over its tiles. Included once for each REAL and each ISA.
 *
 *   rest    = sum_{k != t} e_k          e_k = exp(z_k - m), the target's left out, as everywhere (rows_tpl.h)
 *   moment  = sum_{k != t} e_k (x_k - pivot)
 *   squares = sum_{k != t} e_k^2
 *   entropy = lse - z_top - sum_k p_k (z_k - z_top)      two terms, neither negative: nothing cancels
 *   brier   = (1 - p_t)^2 + sum_{k != t} p_k^2
 *   rank    = how many come before the target: larger, or equal and of a lower class
 */
#ifndef CE_MEASURE_COMMON
#define CE_MEASURE_COMMON
#define CE_SURE 0.5 /* of a largest class surer than this the rest is summed by itself, for what it adds would cancel */
#define CE_MEASURE_LANES 16 /* of three sums: with CE_LANES of them AVX2 runs out of registers */
#endif

typedef struct {
    NAME(sums) sums;
    ce_sum squares;
    REAL max;   /* of the classes that are not left out, */
    int64_t at; /* and the tile that holds it first; -1: all are -inf or NaN */
    int64_t above;
} NAME(measured);

/* The largest of n elements, a multiple of CE_LANES, and how many are above `rival`. */
static REAL NAME(max_and_above)(const REAL *x, int64_t n, REAL rival, int64_t *above)
{
    REAL lanes[CE_LANES];
    SINT counts[CE_LANES];
    for (int l = 0; l < CE_LANES; l++) {
        lanes[l] = -(REAL)INFINITY;
        counts[l] = 0;
    }
    for (int64_t k = 0; k < n; k += CE_LANES)
        for (int l = 0; l < CE_LANES; l++) {
            lanes[l] = x[k + l] > lanes[l] ? x[k + l] : lanes[l]; /* NaN is passed over */
            counts[l] += x[k + l] > rival;
        }
#pragma GCC unroll 8
    for (int half = CE_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) {
            lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
            counts[l] += counts[l + half];
        }
    *above += counts[0];
    return lanes[0];
}

/* sum + e^2, where e^2 may be less than a normal number: FMA makes none, and a sum that begins a little above 0 is never one;
   without FMA it is 0 then (subnormal numbers are 20 to 40 times slower) */
CE_INLINE REAL NAME(add_square)(REAL sum, REAL e)
{
#if CE_HAVE_FMA
    return REAL_IS_FLOAT ? (REAL)__builtin_fmaf((float)e, (float)e, (float)sum) : (REAL)__builtin_fma(e, e, sum);
#else
    REAL root = e < (REAL_IS_FLOAT ? (REAL)0x1p-60 : (REAL)0x1p-500) ? 0 : e;
    return sum + root * root;
#endif
}

/* The sums over a tile of n elements, a multiple of CE_LANES. Meanwhile come into the cache what will be read next, at
   `ahead`. */
static void NAME(add_tile)(NAME(measured) *s, const REAL *x, int64_t n, const char *ahead, int64_t size)
{
    const NAME(exp_args) args = s->sums.exp;
    const REAL pivot = s->sums.pivot - args.base, little = REAL_IS_FLOAT ? (REAL)0x1p-120 : (REAL)0x1p-1000;
    double rest[CE_MEASURE_LANES], moment[CE_MEASURE_LANES], squares[CE_MEASURE_LANES];
    for (int l = 0; l < CE_MEASURE_LANES; l++) /* no memset, see setup.py */
        rest[l] = moment[l] = squares[l] = 0;
    for (int64_t j = 0; j < n; j += CE_RUN) {
        int64_t end = j + CE_RUN < n ? j + CE_RUN : n;
        REAL run[CE_MEASURE_LANES], run_moment[CE_MEASURE_LANES], run_squares[CE_MEASURE_LANES];
        for (int l = 0; l < CE_MEASURE_LANES; l++) {
            run[l] = run_moment[l] = 0;
            run_squares[l] = little;
        }
        for (int64_t k = j; k < end; k += CE_MEASURE_LANES) {
            for (int line = 0; line < CE_MEASURE_LANES * (int)sizeof(REAL); line += 64)
                __builtin_prefetch(ahead + k * size + line);
            for (int l = 0; l < CE_MEASURE_LANES; l++) {
                REAL d = NAME(exp_distance)(x[k + l], args), e = NAME(exp_of_distance)(d, args);
                run[l] += e;
                run_moment[l] += e * (d - pivot); /* 0 of -inf */
                run_squares[l] = NAME(add_square)(run_squares[l], e);
            }
        }
        for (int l = 0; l < CE_MEASURE_LANES; l++) {
            rest[l] += (double)run[l];
            moment[l] += (double)run_moment[l];
            squares[l] += (double)run_squares[l];
        }
    }
    ce_add(&s->sums.rest, NAME(sum_lanes)(rest, CE_MEASURE_LANES));
    ce_add(&s->sums.moment, NAME(sum_lanes)(moment, CE_MEASURE_LANES));
    ce_add(&s->squares, NAME(sum_lanes)(squares, CE_MEASURE_LANES));
}

/* m and the pivot move to x; what was summed against the old ones follows */
static void NAME(move_reference)(NAME(measured) *s, REAL x, const ce_temperature *t)
{
    ce_reference old = s->sums.m;
    double rest = ce_total(&s->sums.rest), moment = ce_total(&s->sums.moment), pivot = s->sums.pivot;
    NAME(set_reference)(&s->sums, x, t);
    if (rest == 0)
        return;
    double factor = ce_exp_scaled(old.base - s->sums.m.base, s->sums.m.n - old.n, t);
    s->sums.moment = (ce_sum){factor * (moment - rest * ((double)x - pivot)), 0};
    s->squares = (ce_sum){factor * factor * ce_total(&s->squares), 0};
}

CE_INLINE REAL NAME(next_below)(REAL x)
{
    return REAL_IS_FLOAT ? (REAL)nextafterf((float)x, -INFINITY) : (REAL)nextafter((double)x, -INFINITY);
}

/* The sums of a row without class row->t, whose logit is x_t; logits above `x_rival`, or equal to it and of a class before
   t_rival, are counted. */
static NAME(measured) NAME(measure)(const NAME(row) *row, double x_t, REAL x_rival, int64_t t_rival)
{
    const ce_job *job = row->job;
    const ce_temperature *t = &job->temperature;
    REAL buffer[CE_TILE], below = NAME(next_below)(x_rival);
    NAME(measured) s = {{{0, -CE_LEAD}, 0, -(REAL)INFINITY, NAME(exp_prepare)(0, -CE_LEAD, t), {0, 0}, {0, 0}, {0, 0}, 0},
                        {0, 0}, -(REAL)INFINITY, -1, 0};
    if (row->t >= 0 && isfinite(x_t))
        NAME(set_reference)(&s.sums, (REAL)x_t, t);
    s.sums.infinite = row->t >= 0 && x_t > 0 && isinf(x_t);
    int64_t size = job->logits.class_stride;
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE, padded;
        const REAL *x = NAME(tile)(row, j, n, buffer, &padded);
        REAL max = NAME(max_and_above)(x, padded, j + n <= t_rival ? below : x_rival, &s.above);
        for (int64_t k = j; k < t_rival && t_rival < j + n; k++)
            s.above += x[k - j] == x_rival;
        if (max > s.max) {
            s.max = max;
            s.at = j;
        }
        if (max > s.sums.bound) {
            if (isinf(max))
                s.sums.infinite = 1;
            else
                NAME(move_reference)(&s, max, t);
        }
        NAME(add_tile)(&s, x, padded, row->x + j * size + CE_AHEAD, size);
    }
    return s;
}

/* Before class t of logit x_t in a row that may hold anything: NaN is above all, as NumPy has it. */
static int64_t NAME(rank_of)(const NAME(row) *row, double x_t, int64_t t)
{
    int64_t above = 0;
    for (int64_t k = 0; k < row->job->n_classes; k++) {
        double x = NAME(logit)(row, k);
        int equal = x == x_t || (isnan(x) && isnan(x_t));
        above += k != t && (equal ? k < t : x > x_t || isnan(x));
    }
    return above;
}

/* the first class of the largest logit beside row->t, the tile of which is known */
static int64_t NAME(class_of_max)(const NAME(row) *row, const NAME(measured) *s)
{
    REAL buffer[CE_TILE];
    int64_t n = row->job->n_classes - s->at < CE_TILE ? row->job->n_classes - s->at : CE_TILE, k = 0, padded;
    const REAL *x = NAME(tile)(row, s->at, n, buffer, &padded);
    while (x[k] != s->max)
        k++;
    return s->at + k;
}

/* the same in a row that may hold anything: the first NaN, as NumPy has it */
static int64_t NAME(class_of_any)(const NAME(row) *row)
{
    for (int64_t k = 0; k < row->job->n_classes; k++)
        if (isnan(NAME(logit)(row, k)))
            return k;
    return NAME(argmax)(row, 0);
}

/* exp(z - m) of a logit */
static double NAME(share)(const NAME(measured) *s, double x, const ce_temperature *t)
{
    return ce_exp_scaled(x - s->sums.m.base, s->sums.m.n, t);
}

/* sum_k p_k (lse - z_k), x_out the logit that is left out of the sums, or -inf, and x_top the
   largest */
static double NAME(entropy)(const NAME(measured) *s, double sum, double x_out, double x_top, const ce_temperature *t)
{
    double e_top = NAME(share)(s, x_top, t), e_out = NAME(share)(s, x_out, t), rest = ce_total(&s->sums.rest);
    double moment = ce_total(&s->sums.moment) - rest * (x_top - (double)s->sums.pivot);
    if (x_out == x_top)
        return log1p(rest / e_top) - moment / t->value / sum;
    moment += e_out > 0 ? e_out * (x_out - x_top) : 0;
    return log(sum / e_top) - moment / t->value / sum;
}

static void NAME(measure_row)(const ce_job *job, const ce_measures *out, int64_t i, int64_t target)
{
    const ce_temperature *t = &job->temperature;
    NAME(row) row = {job, job->logits.data + NAME(offset)(job, &job->logits, i), NULL, NULL, -1, 0, NULL, NULL};
    row.t = target >= 0 && target < job->n_classes ? target : -1;
    double x_out = row.t >= 0 ? NAME(logit)(&row, row.t) : -INFINITY;
    double x_rival = out->target_logit ? out->target_logit[i] : x_out;
    NAME(measured) s = NAME(measure)(&row, x_out, (REAL)x_rival, target);
    ce_row_stats stats = NAME(row_stats)(&row, &s.sums, x_out);
    ce_class of_target = stats.target;
    int any = !isfinite(stats.lse), inside = row.t >= 0; /* any: it holds NaN or +inf, or nothing but -inf */
    int64_t top = row.t, above = s.above;
    if (any)
        top = NAME(class_of_any)(&row);
    else if (!inside || above > 0)
        top = NAME(class_of_max)(&row, &s);
    double x_top = NAME(logit)(&row, top);
    if (!any && top != row.t && NAME(share)(&s, x_top, t) > CE_SURE * stats.sum) {
        row.t = top;
        x_out = x_top;
        s = NAME(measure)(&row, x_out, 0, 0);
        stats = NAME(row_stats)(&row, &s.sums, x_out);
    }
    double p_out = row.t >= 0 ? stats.target.p : 0, squares = ce_total(&s.squares) / (stats.sum * stats.sum);
    double sum_sq = squares + p_out * p_out;
    double others = row.t == target ? squares : sum_sq - of_target.p * of_target.p;
    out->lse[i] = any ? NAME(limit_lse)(&row) : stats.lse;
    out->max[i] = x_top / t->value;
    out->argmax[i] = top;
    out->entropy[i] = any ? NAN : NAME(entropy)(&s, stats.sum, x_out, x_top, t);
    out->sum_sq_prob[i] = any ? NAN : sum_sq;
    out->brier[i] = any ? NAN : inside ? of_target.rest * of_target.rest + others : sum_sq;
    out->log_prob[i] = any || !inside ? NAN : -of_target.nll;
    out->rank[i] = !job->target ? -1 : any || !isfinite(x_rival) ? NAME(rank_of)(&row, x_rival, target) : above;
}

/* Rows [first, last); those that do not count are left as they are. */
static void NAME(measures)(const ce_job *job, const ce_measures *out, int64_t first, int64_t last, ce_tally *tally)
{
    for (int64_t i = first; i < last; i++) {
        double sample_weight = job->sample_weight ? job->sample_weight[i] : 1;
        int64_t target = job->target ? ce_target_at(job->target, job->target_type, i) : -1;
        int counts = out->target_logit ? sample_weight != 0 : ce_tally_row(job, i, target, sample_weight, tally);
        if (counts)
            NAME(measure_row)(job, out, i, target);
    }
}
