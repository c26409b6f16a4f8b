/* Many rows at once: a lane is a row. Included once for each REAL and each ISA.
 *
 * Statistics and rule are those of a row (rows_tpl.h), vectorized over lanes: a row by itself takes some 130 ns beside its
 * logits. The sums come from tiles_tpl.h, class-major, or from short_tpl.h, along the rows. Where a lane is out of the
 * ordinary (NaN, +inf, nothing but -inf, logits of CE_BASE_LIMIT and more) all of them go row by row.
 */
#ifndef CE_SLACK
/* powers of 2 that a logit may be above those the reference is taken from; more, and gradients would lose digits */
#define CE_SLACK (REAL_IS_FLOAT ? 32 : 512)
#define CE_FAR 0x1p20 /* with smoothing, rows whose z lie so far below the largest go one by one, those of -inf too */
#endif
#define ROWS ((int)(512 / sizeof(REAL)))  /* at a time, at most */
#define LANES ((int)(128 / sizeof(REAL))) /* two vectors of 512 bits, in registers together */

typedef struct {
    int64_t first; /* the row of the first lane */
    int n, padded; /* rows, and whole blocks of LANES */
    int all;       /* all of them count */
    int only_sum;  /* of the losses is asked for, not each */
    int look;      /* at all classes for the reference: the first ones did not do for rows before */
    REAL *pack;    /* gradients are put together here, */
    ce_waiting waiting; /* and some are streamed while the next rows are computed */
    _Alignas(64) SINT t[ROWS]; /* the target; -1: the row does not count. All arrays whole cache lines: a vector across two
                                  takes twice as long */
    REAL x_t[ROWS], ref[ROWS]; /* of the target; the n of the reference */
    REAL pivot[ROWS];          /* with smoothing, the largest logit */
    double s[ROWS], w[ROWS];   /* weight of the sample, and times that of the target's class; 0 if it does not count */
    double rest[ROWS], lost[ROWS];         /* a sum, and what its roundings lost */
    double moment[ROWS], moment_lost[ROWS]; /* with smoothing, sum_{k != t} (x_k - pivot), likewise */
    double others[ROWS]; /* and sum_{k != t} -log p_k, of float without the (K - 1) nll that is in it */
    double nll[ROWS], p[ROWS], q[ROWS];    /* of the target: -log p, p, 1 - p */
    double lse[ROWS], inverse[ROWS];       /* and 1 / sum_k exp(z_k - m) */
    double scale[ROWS];                    /* of the gradient */
    double loss[ROWS], a[ROWS], g_t[ROWS]; /* of the rule, times s; the gradient is a p_k, but g_t at the target */
    _Alignas(64) REAL x[]; /* (classes, PITCH) or rows: logits, then exponentials, then gradients */
} NAME(lanes);

/* the sum of a value of each lane, in a fixed order */
CE_INLINE double NAME(over_lanes)(const double *value, int padded)
{
    double sum[LANES];
    for (int l = 0; l < LANES; l++) /* no memset, see setup.py */
        sum[l] = 0;
    for (int p = 0; p < padded; p += LANES)
        for (int i = 0; i < LANES; i++)
            sum[i] += value[p + i];
#pragma GCC unroll 8
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            sum[i] += sum[i + half];
    return sum[0];
}

/* targets and weights of the rows; what lies beyond them does not count */
static void NAME(load_targets)(const ce_job *job, NAME(lanes) *l, ce_tally *tally)
{
    int64_t target[ROWS], n_classes = job->n_classes, ignore_index = job->ignore_index;
    ce_read_targets(job->target, job->target_type, l->first, l->n, target);
    for (int p = l->n; p < l->padded; p++)
        target[p] = ignore_index;
    for (int p = 0; p < l->n && job->sample_weight; p++)
        target[p] = job->sample_weight[l->first + p] == 0 ? ignore_index : target[p];
    int64_t bad = 0, counted = 0;
    for (int p = 0; p < l->padded; p++) {
        int64_t asked = target[p] != ignore_index, known = (uint64_t)target[p] < (uint64_t)n_classes;
        bad += asked & !known;
        counted += asked & known;
        l->t[p] = asked & known ? (SINT)target[p] : -1;
        l->s[p] = l->w[p] = asked & known ? 1 : 0;
    }
    for (int p = 0; p < l->n && bad && tally->bad < 0; p++)
        if (l->t[p] < 0 && target[p] != ignore_index)
            tally->bad = l->first + p;
    for (int p = 0; p < l->n && (job->sample_weight || job->weight); p++) {
        l->s[p] *= job->sample_weight && l->t[p] >= 0 ? job->sample_weight[l->first + p] : 1;
        l->w[p] = l->s[p] * (job->weight && l->t[p] >= 0 ? job->weight[l->t[p]] : 1);
    }
    l->all = counted == l->padded;
    tally->counted += counted;
    ce_add(&tally->weight, job->sample_weight || job->weight ? NAME(over_lanes)(l->w, l->padded) : (double)counted);
}

#if REAL_IS_FLOAT
/* log(1 + odds), with what 1 + odds loses where that counts */
CE_INLINE double NAME(log1p_of_lane)(double odds)
{
    double u = 1 + odds, lost = odds - (u - 1), k, log_f = ce_log_parts_float64(u, &k);
    return k * 0x1.62e42fefa39efp-1 + (log_f + (odds < 1 ? lost : 0)) + (odds - odds); /* NaN stays */
}

/* Losses of four lanes at a time, (1 + a)(1 + b) = 1 + (a + b + a b), where only their sum is asked for: a logarithm takes
   as long as ten classes. Nothing cancels: the sum keeps its digits. nll holds what the odds leave out. */
static void NAME(add_losses)(NAME(lanes) *l)
{
    int quarter = l->padded / 4;
    for (int p = 0; p < quarter; p++) {
        double a = l->q[p], b = l->q[p + quarter], c = l->q[p + 2 * quarter], d = l->q[p + 3 * quarter];
        double ab = b + (a + a * b), cd = d + (c + c * d), odds = cd + (ab + ab * cd);
        double rest = (l->nll[p] + l->nll[p + quarter]) + (l->nll[p + 2 * quarter] + l->nll[p + 3 * quarter]);
        l->loss[p] = rest + NAME(log1p_of_lane)(odds);
    }
    for (int p = quarter; p < l->padded; p++)
        l->loss[p] = 0;
}

/* nll = log1p(odds), odds = rest exp(m - z_t); 0 if one is NaN. Far below m, z_t is taken as 600 below (four of 110 have a
   product), and the difference added. In double throughout, so that the mean of many rows is: a polynomial of float's
   digits took a tenth less time. */
static int NAME(target_nll)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    ce_exp_args_float64 args = ce_exp_prepare_float64(0, 0, t);
    double ln2 = t->ln2_high + t->ln2_low, inverse_t = 1 / t->value, far = (l->only_sum ? 110 : 600) * t->value;
    int odd = 0;
    for (int p = 0; p < l->padded && !l->all; p++)
        l->rest[p] = l->t[p] < 0 ? 0 : l->rest[p];
    for (int p = 0; p < l->padded; p++) {
        double x = (double)l->x_t[p], n = (double)l->ref[p], low = n * ln2 - far, near = x > low ? x : low;
        double inverse = ce_exp_float64(-near, ce_exp_of_lane_float64(args, ln2, -n)), odds = l->rest[p] * inverse;
        l->nll[p] = (near - x) * inverse_t;
        l->inverse[p] = inverse;
        l->q[p] = odds;
        odd |= odds != odds || l->nll[p] != l->nll[p];
    }
    if (l->only_sum)
        NAME(add_losses)(l);
    for (int p = 0; p < l->padded && !l->only_sum; p++)
        l->nll[p] += NAME(log1p_of_lane)(l->q[p]);
    return !odd;
}

/* p and 1 - p of the target, 1 / sum_k exp(z_k - m), and lse */
static void NAME(target_slopes)(const ce_job *job, NAME(lanes) *l)
{
    double inverse_t = 1 / job->temperature.value;
    for (int p = 0; p < l->padded; p++) {
        double one = 1 / (1 + l->q[p]);
        l->lse[p] = (double)l->x_t[p] * inverse_t + l->nll[p];
        l->p[p] = l->nll[p] > 500 ? 0 : one; /* 600 stands for all below */
        l->q[p] *= one;
        l->inverse[p] *= one;
    }
}
#else
/* nll = log1p(rest / e_t), or (m - z_t) + log(rest) + log1p(e_t / rest), whichever does not cancel; 0 if one is NaN */
static int NAME(target_nll)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    ce_exp_args_float64 args = ce_exp_prepare_float64(0, 0, t);
    double ln2 = t->ln2_high + t->ln2_low, inverse_t = 1 / t->value;
    int odd = 0;
    for (int p = 0; p < l->padded; p++) {
        double x = l->x_t[p], n = l->ref[p], k, rest = l->rest[p] + l->lost[p];
        double e = ce_exp_float64(x, ce_exp_of_lane_float64(args, ln2, n));
        double most = e >= rest ? e : rest, least = e >= rest ? rest : e;
        double small = ce_log1p_unit_float64(least / most);
        double log_f = ce_log_parts_float64(rest, &k); /* k ln 2 to that of m: both may be large, and cancel */
        double minus_z = (((n + k) * t->ln2_high - x) + (n + k) * t->ln2_low) * inverse_t;
        double nll = e >= rest ? small : minus_z + log_f + small;
        odd |= nll != nll;
        l->nll[p] = nll;
        l->p[p] = e;
        l->q[p] = rest;
    }
    return !odd;
}

/* p and 1 - p of the target, 1 / sum_k exp(z_k - m), and lse, if there is a z_loss */
static void NAME(target_slopes)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    if (job->z_loss != 0)
        for (int p = 0; p < l->padded; p++) {
            double k, log_f = ce_log_parts_float64(l->p[p] + l->q[p], &k), n = l->ref[p] + k;
            double by_sum = (n * t->ln2_high + n * t->ln2_low) / t->value + log_f;
            l->lse[p] = l->p[p] >= l->q[p] ? l->x_t[p] / t->value + l->nll[p] : by_sum; /* may be near 0 */
        }
    for (int p = 0; p < l->padded; p++) {
        l->inverse[p] = 1 / (l->p[p] + l->q[p]);
        l->p[p] *= l->inverse[p];
        l->q[p] *= l->inverse[p];
    }
}
#endif

/* others, what smoothing asks for: (K - 1) (lse - pivot) - moment / T, in which nothing cancels. For float, lse is taken as
   nll + z_t, which has digits enough in double: lanes that share a logarithm need no other. It uses p and q as target_nll
   leaves them. 0 if a lane is out of the ordinary. */
static int NAME(sum_others)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    double inverse_t = 1 / t->value, n_others = (double)(job->n_classes - 1);
    int odd = 0;
    for (int p = 0; p < l->padded; p++) {
        double below = ((double)l->x_t[p] - (double)l->pivot[p]) * inverse_t;
        double moment = (l->moment[p] + l->moment_lost[p]) * inverse_t;
#if REAL_IS_FLOAT
        double lse = below;
#else
        double k, log_f = ce_log_parts_float64(l->p[p] + l->q[p], &k), n = l->ref[p] + k;
        double lse = ((n * t->ln2_high - l->pivot[p]) + n * t->ln2_low) * inverse_t + log_f;
#endif
        odd |= !(below > -CE_FAR) | !(moment >= -CE_FAR * n_others);
        l->others[p] = n_others * lse - moment;
    }
    return !odd;
}

/* loss and slopes of each row, as ce_rule_of; cross-entropy alone without a call a row */
static void NAME(rule_of_lanes)(const ce_job *job, NAME(lanes) *l)
{
    int plain = job->rule == CE_CROSS_ENTROPY && job->z_loss == 0;
    double mass_t = job->on + job->off, mass = job->off * (double)(job->n_classes - 1); /* at the target, and elsewhere */
    double of_nll = REAL_IS_FLOAT ? mass : 0;                                           /* what others leaves to it */
    for (int p = 0; p < l->padded && plain && !l->only_sum; p++)
        l->loss[p] = l->w[p] == 0 ? 0 : l->w[p] * l->nll[p]; /* 0 * inf is 0 here */
    for (int p = 0; p < l->padded && plain && job->off != 0; p++)
        l->loss[p] = (mass_t + of_nll) * l->loss[p] + l->w[p] * job->off * l->others[p];
    for (int p = 0; p < l->padded && plain && job->emit; p++) {
        l->a[p] = l->w[p] * (mass_t + mass);
        l->g_t[p] = l->w[p] * (mass * l->p[p] - mass_t * l->q[p]);
    }
    for (int p = 0; p < l->padded && !plain; p++) {
        ce_row_stats s = {0};
        s.lse = job->z_loss == 0 ? 0 : l->lse[p];
        s.target = (ce_class){l->nll[p], l->p[p], l->q[p]};
        s.row_weight = l->s[p] == 0 ? 0 : l->w[p] / l->s[p];
        s.mass_t = s.row_weight * mass_t;
        if (job->off != 0)
            s.rest = (ce_term){job->off * l->others[p] + of_nll * l->nll[p], mass};
        ce_row_rule rule = ce_rule_of(job, &s);
        l->loss[p] = l->s[p] == 0 ? 0 : l->s[p] * rule.loss;
        l->a[p] = l->s[p] * rule.a;
        l->g_t[p] = l->s[p] * rule.g_t;
    }
}

/* what smoothing takes from the gradient at every class but the target */
CE_INLINE REAL NAME(pull)(const ce_job *job, const NAME(lanes) *l, int p)
{
    double pull = job->off * l->w[p] * l->scale[p];
    return job->off == 0 || fabs(pull) < (double)REAL_MIN ? 0 : (REAL)pull;
}
