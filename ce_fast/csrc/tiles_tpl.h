/* Many rows at once, class-major: few classes after a transpose, and a strided class axis. A lane is a row. Included once
 * for each REAL and each ISA.
 *
 *   rest = sum_{k != t} exp(z_k - m),  m = n T ln 2 of each lane       runs of classes in REAL, their sums in double
 *   nll  = log1p(rest / e_t), or (m - z_t) + log(rest) + log1p(e_t / rest), whichever does not cancel
 *
 * Statistics and rule are those of a row (rows_tpl.h), vectorized over lanes. A tile with a lane out of the ordinary (NaN,
 * +inf, nothing but -inf, logits of CE_BASE_LIMIT and more) goes row by row; nothing of it has been written by then.
 */
#ifndef CE_TILES_COMMON
#define CE_TILES_COMMON
#define CE_SMALL 256   /* classes; longer rows go by themselves */
#define CE_CLASSES 256 /* of a tile: 128 KiB, in L2 */
#define CE_CLASS_RUN 8 /* classes added in REAL */
#endif
#define ROWS ((int)(512 / sizeof(REAL)))  /* of a tile */
#define LANES ((int)(128 / sizeof(REAL))) /* two vectors of 512 bits, in registers together */

typedef REAL NAME(four) __attribute__((vector_size(4 * sizeof(REAL))));
typedef SINT NAME(mask) __attribute__((vector_size(4 * sizeof(REAL))));

typedef struct {
    int64_t first; /* the row of the first lane */
    int n, padded; /* rows, and whole blocks of LANES */
    const char *ahead; /* where the logits of the next tile lie, if they are not next to these: to be prefetched */
    SINT t[ROWS];              /* the target; -1: the row does not count */
    REAL x_t[ROWS], ref[ROWS]; /* of the target; the n of the reference */
    double s[ROWS], w[ROWS];   /* weight of the sample, and times that of the target's class; 0 if it does not count */
    double rest[ROWS], lost[ROWS];         /* a sum, and what its roundings lost */
    double nll[ROWS], p[ROWS], q[ROWS];    /* of the target: -log p, p, 1 - p */
    double lse[ROWS], inverse[ROWS];       /* and 1 / sum_k exp(z_k - m) */
    double scale[ROWS];                    /* of the gradient */
    double loss[ROWS], a[ROWS], g_t[ROWS]; /* of the rule, times s; the gradient is a p_k, but g_t at the target */
    REAL x[]; /* (classes, ROWS): logits, then exponentials, then gradients */
} NAME(lanes);

#define TWO(a, b, i0, i1, i2, i3) __builtin_shuffle(a, b, (NAME(mask)){i0, i1, i2, i3})

/* to (n_columns, n_rows) from (n_rows, n_columns), by blocks of 4 x 4; the last ones overlap those before */
static void NAME(transpose)(const REAL *restrict from, int64_t from_stride, int64_t n_rows, int64_t n_columns, REAL *restrict to,
                            int64_t to_stride)
{
    if (n_columns == 2 && from_stride == 2) { /* known to the compiler, these become shuffles of whole vectors */
        for (int64_t i = 0; i < n_rows; i++) {
            to[i] = from[2 * i];
            to[to_stride + i] = from[2 * i + 1];
        }
        return;
    }
    if (n_rows == 2 && to_stride == 2) {
        for (int64_t j = 0; j < n_columns; j++) {
            to[2 * j] = from[j];
            to[2 * j + 1] = from[from_stride + j];
        }
        return;
    }
    if (n_rows < 4 || n_columns < 4) {
        for (int64_t i = 0; i < n_rows; i++)
            for (int64_t j = 0; j < n_columns; j++)
                to[j * to_stride + i] = from[i * from_stride + j];
        return;
    }
    for (int64_t i = 0; i < n_rows; i += 4) {
        i = i < n_rows - 4 ? i : n_rows - 4;
        for (int64_t j = 0; j < n_columns; j += 4) {
            j = j < n_columns - 4 ? j : n_columns - 4;
            const REAL *source = from + i * from_stride + j;
            REAL *target = to + j * to_stride + i;
            NAME(four) a, b, c, d;
            memcpy(&a, source, sizeof a);
            memcpy(&b, source + from_stride, sizeof b);
            memcpy(&c, source + 2 * from_stride, sizeof c);
            memcpy(&d, source + 3 * from_stride, sizeof d);
            NAME(four) ab = TWO(a, b, 0, 4, 1, 5), cd = TWO(c, d, 0, 4, 1, 5);
            NAME(four) ab2 = TWO(a, b, 2, 6, 3, 7), cd2 = TWO(c, d, 2, 6, 3, 7);
            a = TWO(ab, cd, 0, 1, 4, 5);
            b = TWO(ab, cd, 2, 3, 6, 7);
            c = TWO(ab2, cd2, 0, 1, 4, 5);
            d = TWO(ab2, cd2, 2, 3, 6, 7);
            memcpy(target, &a, sizeof a);
            memcpy(target + to_stride, &b, sizeof b);
            memcpy(target + 2 * to_stride, &c, sizeof c);
            memcpy(target + 3 * to_stride, &d, sizeof d);
        }
    }
}
#undef TWO

/* Classes [k, k + n_classes) of the rows, from the array to the tile or back, a run of the last outer axis at a time. */
CE_INLINE void NAME(each_class)(const ce_job *job, const ce_array *array, int64_t k, int64_t n_classes, NAME(lanes) *l,
                                int store)
{
    int last = job->n_outer - 1;
    int64_t stride = array->outer_stride[last];
    for (int64_t done = 0; done < l->n;) {
        int64_t left = job->outer_shape[last] - (l->first + done) % job->outer_shape[last];
        int64_t run = left < l->n - done ? left : l->n - done;
        char *row = array->data + NAME(offset)(job, array, l->first + done) + k * array->class_stride;
        if (array->dtype == REAL_DTYPE && array->class_stride == sizeof(REAL) && stride % (int64_t)sizeof(REAL) == 0) {
            REAL *tile = l->x + done, *given = (REAL *)row;
            if (store)
                NAME(transpose)(tile, ROWS, n_classes, run, given, stride / (int64_t)sizeof(REAL));
            else
                NAME(transpose)(given, stride / (int64_t)sizeof(REAL), run, n_classes, tile, ROWS);
            done += run;
            continue;
        }
        for (int64_t j = 0; j < n_classes; j++)
            if (store)
                NAME(store)(row + j * array->class_stride, stride, array->dtype, run, l->x + j * ROWS + done);
            else
                NAME(load)(row + j * array->class_stride, stride, array->dtype, run, l->x + j * ROWS + done);
        done += run;
    }
}

/* the sum of a value of each lane, in a fixed order */
CE_INLINE double NAME(over_lanes)(const double *value, int padded)
{
    double sum[LANES] = {0};
    for (int p = 0; p < padded; p += LANES)
        for (int i = 0; i < LANES; i++)
            sum[i] += value[p + i];
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
    for (int p = 0; p < l->padded; p++)
        l->s[p] = 1;
    for (int p = 0; p < l->n && job->sample_weight; p++)
        l->s[p] = job->sample_weight[l->first + p];
    int64_t bad = 0, counted = 0;
    for (int p = 0; p < l->padded; p++) {
        int64_t counts = (target[p] != ignore_index) & (l->s[p] != 0);
        int64_t known = (uint64_t)target[p] < (uint64_t)n_classes;
        bad += counts & !known;
        counted += counts & known;
        l->t[p] = counts & known ? (SINT)target[p] : -1;
        l->s[p] = counts & known ? l->s[p] : 0;
        l->w[p] = l->s[p];
    }
    for (int p = 0; p < l->n && bad && tally->bad < 0; p++)
        if (l->t[p] < 0 && target[p] != ignore_index && !(job->sample_weight && job->sample_weight[l->first + p] == 0))
            tally->bad = l->first + p;
    for (int p = 0; p < l->n && job->weight; p++)
        l->w[p] *= l->t[p] < 0 ? 0 : job->weight[l->t[p]];
    ce_add(&tally->weight, NAME(over_lanes)(l->w, l->padded));
    tally->counted += counted;
}

/* logits of classes [k, k + n_classes); 0 in lanes that do not count, which are not looked at */
static void NAME(load_lanes)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l)
{
    NAME(each_class)(job, &job->logits, k, n_classes, l, 0);
    for (int p = 0; p < l->padded; p++) {
        int64_t t = l->t[p] - k;
        l->x_t[p] = l->t[p] < 0 ? 0 : l->x_t[p];
        if (l->t[p] < 0)
            for (int64_t j = 0; j < n_classes; j++)
                l->x[j * ROWS + p] = 0;
        else if (t >= 0 && t < n_classes)
            l->x_t[p] = l->x[t * ROWS + p];
    }
}

/* The references move to CE_LEAD ln 2 below the largest logit, where that is larger than all before, and sums with them.
   0: a lane is out of the ordinary. */
static int NAME(move_references)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l)
{
    REAL limit = (REAL)(CE_BASE_LIMIT * job->temperature.value), log2e = (REAL)job->temperature.log2e;
    int odd = 0;
    for (int p = 0; p < l->padded; p += LANES) {
        REAL max[LANES];
        for (int i = 0; i < LANES; i++)
            max[i] = l->x[p + i];
        for (int64_t j = 1; j < n_classes; j++)
            for (int i = 0; i < LANES; i++)
                max[i] = l->x[j * ROWS + p + i] > max[i] ? l->x[j * ROWS + p + i] : max[i];
        for (int i = 0; i < LANES; i++) {
            odd |= !(max[i] < limit) | !(max[i] > -limit);
            REAL ref = NAME(round)(max[i] * log2e) - CE_LEAD, before = k == 0 ? ref : l->ref[p + i];
            l->ref[p + i] = ref > before ? ref : before;
            max[i] = before - l->ref[p + i];
        }
        for (int i = 0; i < LANES && k > 0; i++) {
            l->rest[p + i] *= ce_exp2_float64((double)max[i]);
            l->lost[p + i] *= ce_exp2_float64((double)max[i]);
        }
    }
    return !odd;
}

/* exp(z - m) of the tile, and its sums without the target */
CE_INLINE void NAME(add_exp)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l, int store)
{
    int64_t along = job->logits.class_stride;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &job->temperature);
    REAL ln2 = (REAL)(job->temperature.ln2_high + job->temperature.ln2_low);
    for (int p = 0; p < l->padded; p += LANES) {
        double sum[LANES], lost[LANES];
        SINT t[LANES];
        for (int i = 0; i < LANES; i++) {
            sum[i] = k == 0 ? 0 : l->rest[p + i];
            lost[i] = k == 0 ? 0 : l->lost[p + i];
            t[i] = l->t[p + i] - (SINT)k;
        }
        for (int64_t j = 0; j < n_classes; j += CE_CLASS_RUN) {
            int64_t end = j + CE_CLASS_RUN < n_classes ? j + CE_CLASS_RUN : n_classes;
            REAL run[LANES] = {0};
            for (int64_t c = j; c < end; c++) {
                if (l->ahead) {
                    __builtin_prefetch(l->ahead + (k + c) * along + p * (int)sizeof(REAL));
                    __builtin_prefetch(l->ahead + (k + c) * along + p * (int)sizeof(REAL) + 64);
                }
#pragma GCC ivdep
                for (int i = 0; i < LANES; i++) {
                    REAL v = NAME(exp)(l->x[c * ROWS + p + i], NAME(exp_of_lane)(args, ln2, l->ref[p + i]));
                    run[i] += t[i] == (SINT)c ? 0 : v;
                    if (store)
                        l->x[c * ROWS + p + i] = v;
                }
            }
            for (int i = 0; i < LANES; i++) {
#if REAL_IS_FLOAT
                sum[i] += (double)run[i];
#else /* Knuth's sum: the order of magnitudes is not known */
                double high = sum[i] + run[i], back = high - sum[i];
                lost[i] += (sum[i] - (high - back)) + (run[i] - back);
                sum[i] = high;
#endif
            }
        }
        for (int i = 0; i < LANES; i++) {
            l->rest[p + i] = sum[i];
            l->lost[p + i] = lost[i];
        }
    }
}

/* -log p of the target, as in row_stats; 0 if one is NaN */
static int NAME(target_nll)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    ce_exp_args_float64 args = ce_exp_prepare_float64(0, 0, t);
    double ln2 = t->ln2_high + t->ln2_low, lead = ldexp(1, -CE_LEAD), inverse_t = 1 / t->value;
    int odd = 0;
    for (int p = 0; p < l->padded; p++) {
        double x = (double)l->x_t[p], n = (double)l->ref[p], rest = l->rest[p] + l->lost[p];
        double e = ce_exp_float64(x, ce_exp_of_lane_float64(args, ln2, n));
        double most = e >= rest ? e : rest, least = e >= rest ? rest : e;
        double small = ce_twice_atanh_float64(least / (2 * most + least)); /* log1p(least / most) */
        double m_minus_z = (((n + CE_LEAD) * t->ln2_high - x) + (n + CE_LEAD) * t->ln2_low) * inverse_t;
        double nll = e >= rest ? small : m_minus_z + ce_log_float64(rest * lead) + small;
        odd |= nll != nll;
        l->nll[p] = nll;
        l->p[p] = e;
        l->q[p] = rest;
    }
    return !odd;
}

/* 1 / sum_k exp(z_k - m), p and 1 - p of the target; lse, if there is a z_loss */
static void NAME(target_slopes)(const ce_job *job, NAME(lanes) *l)
{
    const ce_temperature *t = &job->temperature;
    double lead = ldexp(1, -CE_LEAD);
    for (int p = 0; p < l->padded && job->z_loss != 0; p++) {
        double n = (double)l->ref[p] + CE_LEAD;
        l->lse[p] = (n * t->ln2_high + n * t->ln2_low) / t->value + ce_log_float64((l->p[p] + l->q[p]) * lead);
    }
    for (int p = 0; p < l->padded; p++) {
        l->inverse[p] = 1 / (l->p[p] + l->q[p]);
        l->p[p] *= l->inverse[p];
        l->q[p] *= l->inverse[p];
    }
}

/* K = 2 at temperature 1: nll = softplus(d), 1 - p = sigmoid(d) of d = x_other - x_t, exact to twice the digits of REAL */
static int NAME(pair_stats)(NAME(lanes) *l)
{
    ce_temperature one = CE_TEMPERATURE_1;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &one);
    SINT odd = 0;
#pragma GCC ivdep
    for (int p = 0; p < l->padded; p++) {
        REAL x0 = l->x[p], x1 = l->x[ROWS + p];
        REAL own = l->t[p] == 1 ? x1 : x0, other = l->t[p] == 1 ? x0 : x1;
        REAL d = other - own, back = d - other, low = (other - (d - back)) - (own + back);
        REAL e = NAME(exp)(d < 0 ? d : -d, args);
        e += e * (d < 0 ? low : -low);
        REAL nll = (d < 0 ? 0 : d) + (NAME(log1p)(e) + (d < 0 ? 0 : low)), most = 1 / (1 + e);
        odd |= !(d < CE_BASE_LIMIT) | !(d > -CE_BASE_LIMIT);
        l->x_t[p] = nll;
        l->ref[p] = d < 0 ? e * most : most;
    }
    for (int p = 0; p < l->padded; p++)
        l->nll[p] = (double)l->x_t[p];
    return !odd;
}

/* loss and slopes of each row, as ce_rule_of; cross-entropy alone without a call a row */
static void NAME(rule_of_lanes)(const ce_job *job, NAME(lanes) *l)
{
    int plain = job->rule == CE_CROSS_ENTROPY && job->z_loss == 0;
    for (int p = 0; p < l->padded && plain; p++)
        l->loss[p] = l->w[p] == 0 ? 0 : l->w[p] * l->nll[p]; /* 0 * inf is 0 here */
    for (int p = 0; p < l->padded && plain && job->emit; p++) {
        l->a[p] = l->w[p];
        l->g_t[p] = -l->w[p] * l->q[p];
    }
    for (int p = 0; p < l->padded && !plain; p++) {
        ce_row_stats s = {0};
        s.lse = job->z_loss == 0 ? 0 : l->lse[p];
        s.target = (ce_class){l->nll[p], l->p[p], l->q[p]};
        s.row_weight = l->s[p] == 0 ? 0 : l->w[p] / l->s[p];
        s.mass_t = s.row_weight * job->on;
        ce_row_rule rule = ce_rule_of(job, &s);
        l->loss[p] = l->s[p] == 0 ? 0 : l->s[p] * rule.loss;
        l->a[p] = l->s[p] * rule.a;
        l->g_t[p] = l->s[p] * rule.g_t;
    }
}

/* a p_k for the tile of exponentials, g_t at the target; products that would be subnormal become 0 */
static void NAME(scale_lanes)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p += LANES) {
        REAL high[LANES], low[LANES], cut[LANES];
        for (int i = 0; i < LANES; i++) {
            double factor = l->a[p + i] * l->inverse[p + i] * l->scale[p + i];
            high[i] = (REAL)factor;
            low[i] = REAL_IS_FLOAT && high[i] - high[i] == 0 ? (REAL)(factor - (double)high[i]) : 0;
            cut[i] = (REAL)REAL_MIN / (high[i] < 0 ? -high[i] : high[i]);
        }
        for (int64_t c = 0; c < n_classes; c++)
#pragma GCC ivdep
            for (int i = 0; i < LANES; i++) {
                REAL e = l->x[c * ROWS + p + i];
                l->x[c * ROWS + p + i] = e < cut[i] ? 0 : e * high[i] + e * low[i];
            }
    }
    for (int p = 0; p < l->n; p++)
        if (l->t[p] >= k && l->t[p] < k + n_classes)
            l->x[(l->t[p] - k) * ROWS + p] = (REAL)(l->g_t[p] * l->scale[p]);
}

/* the gradient of two classes is s w (1 - p_t), and minus that at the target */
static void NAME(pair_gradient)(NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p++) {
        REAL g = (REAL)(l->w[p] * l->scale[p]) * l->ref[p];
        g = g < (REAL)REAL_MIN && g > -(REAL)REAL_MIN ? 0 : g;
        l->x[p] = l->t[p] == 1 ? g : -g;
        l->x[ROWS + p] = l->t[p] == 1 ? -g : g;
    }
}

/* Rows [first, first + n), n <= ROWS; 0 if one of them is out of the ordinary. */
static int NAME(run_lanes)(const ce_job *job, int64_t first, int n, NAME(lanes) *l, ce_tally *tally)
{
    int64_t classes = job->n_classes, most = classes < CE_CLASSES ? classes : CE_CLASSES;
    int gradient = job->emit == CE_GRADIENT, whole = classes == most;
    int pair = classes == 2 && job->temperature.value == 1 && job->rule == CE_CROSS_ENTROPY && job->z_loss == 0;
    int plain = job->rule == CE_CROSS_ENTROPY && job->z_loss == 0;
    l->first = first;
    l->n = n;
    l->padded = (n + LANES - 1) & -LANES;
    for (int64_t k = n; k < l->padded; k++)
        for (int64_t j = 0; j < most; j++)
            l->x[j * ROWS + k] = 0;
    NAME(load_targets)(job, l, tally);
    int64_t across = job->logits.outer_stride[job->n_outer - 1];
    l->ahead = NULL;
    if (across == (int64_t)sizeof(REAL) && first + ROWS < job->n_rows)
        l->ahead = job->logits.data + NAME(offset)(job, &job->logits, first + ROWS);
    for (int64_t k = 0; k < classes; k += most) {
        int64_t m = classes - k < most ? classes - k : most;
        NAME(load_lanes)(job, k, m, l);
        if (pair)
            break;
        if (!NAME(move_references)(job, k, m, l))
            return 0;
        if (gradient && whole)
            NAME(add_exp)(job, k, m, l, 1);
        else
            NAME(add_exp)(job, k, m, l, 0);
    }
    if (!(pair ? NAME(pair_stats)(l) : NAME(target_nll)(job, l)))
        return 0;
    if (!pair && (gradient || !plain))
        NAME(target_slopes)(job, l);
    NAME(rule_of_lanes)(job, l);
    ce_add(&tally->loss, NAME(over_lanes)(l->loss, l->padded));
    for (int p = 0; p < n && job->loss; p++)
        ((REAL *)job->loss)[first + p] = (REAL)l->loss[p];
    if (!gradient)
        return 1;
    for (int p = 0; p < l->padded; p++)
        l->scale[p] = job->scale;
    for (int p = 0; p < n && job->upstream; p++)
        l->scale[p] *= job->upstream[first + p];
    for (int64_t k = 0; k < classes; k += most) {
        int64_t m = classes - k < most ? classes - k : most;
        if (!whole) {
            NAME(load_lanes)(job, k, m, l);
            NAME(add_exp)(job, k, m, l, 1);
        }
        if (pair)
            NAME(pair_gradient)(l);
        else
            NAME(scale_lanes)(job, k, m, l);
        NAME(each_class)(job, &job->out, k, m, l, 1);
    }
    return 1;
}

/* whether rows run as lanes: class indices, nothing asked of single classes, and a layout that it pays for */
static int NAME(by_lanes)(const ce_job *job)
{
    const ce_array *x = &job->logits;
    if (!job->target || job->soft.data || job->left_out || job->hess.data || job->lse || !job->n_outer)
        return 0;
    if (job->off != 0 || job->softcap != 0 || job->emit == CE_LOG_SOFTMAX || job->rule > CE_GENERALIZED)
        return 0;
    int64_t along = x->class_stride < 0 ? -x->class_stride : x->class_stride;
    int64_t across = x->outer_stride[job->n_outer - 1];
    return job->n_classes <= CE_SMALL || along > (across < 0 ? -across : across);
}

static size_t NAME(scratch)(const ce_job *job)
{
    int64_t classes = job->n_classes < CE_CLASSES ? job->n_classes : CE_CLASSES;
    size_t lanes = NAME(by_lanes)(job) ? sizeof(NAME(lanes)) + (size_t)classes * ROWS * sizeof(REAL) : 0;
    size_t tiles = (size_t)((job->n_classes + CE_TILE - 1) / CE_TILE) * sizeof(ce_reference);
    return ((lanes > tiles ? lanes : tiles) + 63) & ~(size_t)63;
}

static void NAME(rows)(const ce_job *job, int64_t first, int64_t last, void *scratch, ce_tally *tally)
{
    int lanes = NAME(by_lanes)(job);
    for (int64_t i = first; i < last;) {
        ce_tally again = {{0, 0}, {0, 0}, 0, -1}, *of_row = lanes ? &again : tally;
        int64_t end = !lanes || last - i < ROWS ? last : i + ROWS;
        if (lanes && NAME(run_lanes)(job, i, (int)(end - i), scratch, tally))
            i = end;
        for (; i < end; i++)
            ce_add(&tally->loss, NAME(run_row)(job, i, scratch, of_row));
    }
}
#undef ROWS
#undef LANES
