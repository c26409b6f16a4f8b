/* Class-major tiles: few classes after a transpose, and a strided class axis. Included once for each REAL and each ISA.
 *
 *   rest = sum_{k != t} exp(z_k - m),  m = n T ln 2 of each lane       runs of classes in REAL, their sums in double
 */
#ifndef CE_TILES_COMMON
#define CE_TILES_COMMON
#define CE_CLASSES 256 /* of a tile: 144 KiB, in L2; more of them take the logits twice for a gradient */
#define CE_CLASS_RUN 8 /* classes added in REAL */
#endif
#define PITCH ((int)(576 / sizeof(REAL))) /* 9 cache lines: 8 would put all classes in 8 of the 64 sets of L1 */

typedef REAL NAME(four) __attribute__((vector_size(4 * sizeof(REAL))));
typedef SINT NAME(mask) __attribute__((vector_size(4 * sizeof(REAL))));

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
            REAL *tile = l->x + done, *given = (REAL *)row, *packed = l->x + n_classes * PITCH;
            int whole = n_classes == job->n_classes && stride == n_classes * (int64_t)sizeof(REAL);
            if (store && whole && n_classes <= CE_FEW && NAME(streams)(job)) {
                NAME(transpose)(tile, PITCH, n_classes, run, packed, n_classes);
                ce_stream(row, (const char *)packed, run * stride);
            } else if (store)
                NAME(transpose)(tile, PITCH, n_classes, run, given, stride / (int64_t)sizeof(REAL));
            else
                NAME(transpose)(given, stride / (int64_t)sizeof(REAL), run, n_classes, tile, PITCH);
            done += run;
            continue;
        }
        int streams = store && stride == (int64_t)sizeof(REAL) && NAME(streams)(job);
        for (int64_t j = 0; j < n_classes; j++)
            if (streams)
                ce_stream(row + j * array->class_stride, (const char *)(l->x + j * PITCH + done),
                          run * (int64_t)sizeof(REAL));
            else if (store)
                NAME(store)(row + j * array->class_stride, stride, array->dtype, run, l->x + j * PITCH + done);
            else
                NAME(load)(row + j * array->class_stride, stride, array->dtype, run, l->x + j * PITCH + done);
        done += run;
    }
}

/* logits of classes [k, k + n_classes); 0 in lanes that do not count, which are not looked at */
CE_INLINE void NAME(load_lanes)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l)
{
    NAME(each_class)(job, &job->logits, k, n_classes, l, 0);
    for (int p = 0; p < l->padded && !l->all; p++)
        for (int64_t j = 0; j < n_classes && l->t[p] < 0; j++)
            l->x[j * PITCH + p] = 0;
}

/* The references of LANES lanes at p from the largest of a row's first classes; with smoothing, of all: the pivot too. */
CE_INLINE void NAME(first_references)(const ce_job *job, int64_t first, const REAL *x, int64_t pitch, NAME(lanes) *l, int p,
                                      const int smoothed)
{
    REAL limit = (REAL)(CE_BASE_LIMIT * job->temperature.value), log2e = (REAL)job->temperature.log2e, max[LANES];
    for (int i = 0; i < LANES; i++)
        max[i] = -limit;
    for (int64_t c = 0; c < first; c++)
        for (int i = 0; i < LANES; i++)
            max[i] = x[c * pitch + i] > max[i] ? x[c * pitch + i] : max[i];
    for (int i = 0; i < LANES; i++)
        l->ref[p + i] = NAME(round)(max[i] * log2e) - CE_LEAD;
    for (int i = 0; i < LANES && smoothed; i++)
        l->pivot[p + i] = max[i];
}

/* The references of LANES lanes go to CE_LEAD ln 2 below max, where that exceeds bound; sums follow. */
static void NAME(move_references)(const ce_temperature *t, const REAL *max, const REAL *bound, REAL *ref, double *rest,
                                  double *lost)
{
    for (int i = 0; i < LANES; i++) {
        REAL before = ref[i];
        ref[i] = max[i] > bound[i] ? NAME(round)(max[i] * (REAL)t->log2e) - CE_LEAD : before;
        double factor = ce_exp2_float64((double)before - (double)ref[i]);
        rest[i] *= factor;
        lost[i] *= factor;
    }
}

/* a run to the sums of LANES lanes */
CE_INLINE void NAME(add_run)(double *sum, double *rounded, const REAL *run)
{
    for (int i = 0; i < LANES; i++) {
#if REAL_IS_FLOAT
        sum[i] += (double)run[i];
#else /* Knuth's sum: the order of magnitudes is not known */
        double high = sum[i] + run[i], back = high - sum[i];
        rounded[i] += (sum[i] - (high - back)) + (run[i] - back);
        sum[i] = high;
#endif
    }
}

/* exp(z - m) of LANES lanes at p of a tile of logits x, to l->x if store, and their sums without the target t; 0 if a logit
   exceeds the bound of its lane: nothing has been added then, and top is known. */
CE_INLINE int NAME(add_lanes)(const ce_temperature *of, const REAL *x, int64_t pitch, int64_t n_classes, const SINT *target,
                              NAME(lanes) *l, int p, REAL *top_x, const char *ahead, int64_t along, const int store,
                              const int smoothed)
{
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, of);
    REAL ln2 = (REAL)(of->ln2_high + of->ln2_low), cutoff[LANES], magic[LANES], top[LANES], x_t[LANES], pivot[LANES];
    REAL *e = l->x + p;
    SINT t[LANES];
    double sum[LANES], rounded[LANES], moment[LANES], moment_lost[LANES];
    for (int i = 0; i < LANES; i++) {
        NAME(exp_args) of_lane = NAME(exp_of_lane)(args, ln2, l->ref[p + i]);
        cutoff[i] = of_lane.cutoff;
        magic[i] = of_lane.magic;
        top[i] = -(REAL)INFINITY;
        t[i] = target[i];
        x_t[i] = l->x_t[p + i];
        sum[i] = l->rest[p + i];
        rounded[i] = l->lost[p + i];
    }
    for (int i = 0; i < LANES && smoothed; i++) {
        pivot[i] = l->pivot[p + i];
        moment[i] = l->moment[p + i];
        moment_lost[i] = l->moment_lost[p + i];
    }
    for (int64_t j = 0; j < n_classes; j += CE_CLASS_RUN) {
        int64_t end = j + CE_CLASS_RUN < n_classes ? j + CE_CLASS_RUN : n_classes;
        REAL run[LANES], apart[LANES];
        for (int i = 0; i < LANES; i++) /* no memset, see setup.py */
            run[i] = apart[i] = 0;
        for (int64_t c = j; c < end; c++) {
            __builtin_prefetch(ahead + c * along);
            __builtin_prefetch(ahead + c * along + 64);
#pragma GCC ivdep
            for (int i = 0; i < LANES; i++) {
                args.cutoff = cutoff[i];
                args.magic = magic[i];
                REAL z = x[c * pitch + i], v = NAME(exp)(z, args);
                run[i] = t[i] == (SINT)c ? run[i] : run[i] + v;
                if (smoothed)
                    apart[i] = t[i] == (SINT)c ? apart[i] : apart[i] + (z - pivot[i]);
                x_t[i] = t[i] == (SINT)c ? z : x_t[i];
                top[i] = z > top[i] ? z : top[i];
                if (store)
                    e[c * PITCH + i] = v;
            }
        }
        NAME(add_run)(sum, rounded, run);
        if (smoothed)
            NAME(add_run)(moment, moment_lost, apart);
    }
    int above = 0;
    for (int i = 0; i < LANES; i++) {
        above |= top[i] > (l->ref[p + i] + (CE_LEAD + CE_SLACK)) * ln2;
        top_x[i] = top[i];
        l->x_t[p + i] = x_t[i];
    }
    for (int i = 0; i < LANES && !above; i++) {
        l->rest[p + i] = sum[i];
        l->lost[p + i] = rounded[i];
    }
    for (int i = 0; i < LANES && !above && smoothed; i++) {
        l->moment[p + i] = moment[i];
        l->moment_lost[p + i] = moment_lost[i];
    }
    return !above;
}

/* exp(z - m) of a tile of logits x, to l->x if store, and its sums without the target, those of smoothing too if smoothed; 0
   if a lane is out of the ordinary. References come from the first classes, if any are named, and from the largest logit
   where that is far above them. */
CE_INLINE int NAME(add_exp)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l, const REAL *x, int64_t pitch,
                            const char *ahead, int64_t along, int64_t first, const int store, const int smoothed)
{
    const ce_temperature *of = &job->temperature;
    REAL limit = (REAL)(CE_BASE_LIMIT * of->value), ln2 = (REAL)(of->ln2_high + of->ln2_low);
    int odd = 0;
    for (int p = 0; p < l->padded; p += LANES) {
        REAL top[LANES], bound[LANES];
        SINT t[LANES];
        for (int i = 0; i < LANES; i++)
            t[i] = l->t[p + i] - (SINT)k;
        if (first)
            NAME(first_references)(job, first, x + p, pitch, l, p, smoothed);
        while (!NAME(add_lanes)(of, x + p, pitch, n_classes, t, l, p, top, ahead + k * along + p * (int)sizeof(REAL), along,
                                store, smoothed)) {
            l->look = 1;
            for (int i = 0; i < LANES; i++) {
                bound[i] = (l->ref[p + i] + (CE_LEAD + CE_SLACK)) * ln2;
                odd |= !(top[i] < limit);
            }
            if (odd)
                return 0;
            NAME(move_references)(of, top, bound, l->ref + p, l->rest + p, l->lost + p);
        }
        for (int i = 0; i < LANES; i++)
            odd |= !(top[i] < limit) | !(top[i] > -limit);
    }
    return !odd;
}

/* a p_k less the pull for the tile of exponentials, g_t at the target; products that would be subnormal become 0 */
static void NAME(scale_lanes)(const ce_job *job, int64_t k, int64_t n_classes, NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p += LANES) {
        REAL high[LANES], low[LANES], cut[LANES], cut_low[LANES], pull[LANES];
        for (int i = 0; i < LANES; i++) {
            double factor = l->a[p + i] * l->inverse[p + i] * l->scale[p + i];
            high[i] = (REAL)factor;
            low[i] = REAL_IS_FLOAT && high[i] - high[i] == 0 ? (REAL)(factor - (double)high[i]) : 0;
            cut[i] = (REAL)REAL_MIN / NAME(abs)(high[i]);
            cut_low[i] = (REAL)REAL_MIN / NAME(abs)(low[i]);
            pull[i] = NAME(pull)(job, l, p + i);
        }
        for (int64_t c = 0; c < n_classes; c++)
#pragma GCC ivdep
            for (int i = 0; i < LANES; i++) {
                REAL e = l->x[c * PITCH + p + i];
                REAL rest = REAL_IS_FLOAT ? (e < cut_low[i] ? 0 : e) * low[i] - pull[i] : -pull[i];
                l->x[c * PITCH + p + i] = (e < cut[i] ? 0 : e) * high[i] + rest;
            }
    }
    for (int p = 0; p < l->n; p++)
        if (l->t[p] >= k && l->t[p] < k + n_classes)
            l->x[(l->t[p] - k) * PITCH + p] = (REAL)(l->g_t[p] * l->scale[p]);
}

/* h p_k (1 - p_k) >= floor for the exponentials of all classes, and 0 in rows that do not count; without a z_loss h is a.
   The largest class takes the others' sum for 1 - p, which would cancel. */
static void NAME(hess_lanes)(const ce_job *job, NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p += LANES) {
        double h[LANES], inverse[LANES], least[LANES], others[LANES];
        REAL top[LANES];
        for (int i = 0; i < LANES; i++) {
            h[i] = l->a[p + i] * l->scale[p + i];
            inverse[i] = l->inverse[p + i];
            least[i] = l->t[p + i] < 0 ? 0 : job->floor;
            others[i] = top[i] = 0;
        }
        for (int64_t c = 0; c < job->n_classes; c++)
#pragma GCC ivdep
            for (int i = 0; i < LANES; i++) {
                REAL e = l->x[c * PITCH + p + i];
                others[i] += (double)(e > top[i] ? top[i] : e);
                top[i] = e > top[i] ? e : top[i];
            }
        for (int64_t c = 0; c < job->n_classes; c++)
#pragma GCC ivdep
            for (int i = 0; i < LANES; i++) {
                REAL e = l->x[c * PITCH + p + i];
                double q = (double)e * inverse[i], v = h[i] * q * (e == top[i] ? others[i] * inverse[i] : 1 - q);
                l->x[c * PITCH + p + i] = (REAL)(v < least[i] ? least[i] : v);
            }
    }
    for (int p = 0; p < l->n; p++)
        if (l->t[p] >= 0) {
            double v = l->a[p] * l->scale[p] * l->p[p] * l->q[p];
            l->x[l->t[p] * PITCH + p] = (REAL)(v < job->floor ? job->floor : v);
        }
}

/* K = 2 at temperature 1: nll = softplus(d), 1 - p = sigmoid(d) of d = x_other - x_t, exact to twice the digits of REAL */
CE_INLINE int NAME(pair_stats)(NAME(lanes) *l, const int gradient)
{
    ce_temperature one = CE_TEMPERATURE_1;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &one);
    SINT odd = 0;
    for (int p = 0; p < l->padded && !l->all; p++)
        if (l->t[p] < 0)
            l->x[p] = l->x[PITCH + p] = 0;
#pragma GCC ivdep
    for (int p = 0; p < l->padded; p++) {
        REAL x0 = l->x[p], x1 = l->x[PITCH + p];
        REAL own = l->t[p] == 1 ? x1 : x0, other = l->t[p] == 1 ? x0 : x1;
        REAL d = other - own, back = d - other, low = (other - (d - back)) - (own + back);
        REAL e = NAME(exp)(d < 0 ? d : -d, args);
        e += e * (d < 0 ? low : -low);
        REAL nll = (d < 0 ? 0 : d) + (NAME(log1p_unit)(e) + (d < 0 ? 0 : low));
        odd |= !(d < CE_BASE_LIMIT) | !(d > -CE_BASE_LIMIT);
        l->nll[p] = (double)nll;
        if (gradient)
            l->q[p] = (double)((d < 0 ? e : 1) / (1 + e));
    }
    return !odd;
}

/* the gradient of two classes is s w (1 - p_t), and minus that at the target */
static void NAME(pair_gradient)(NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p++) {
        REAL g = (REAL)(l->w[p] * l->scale[p] * l->q[p]);
        g = g < (REAL)REAL_MIN && g > -(REAL)REAL_MIN ? 0 : g;
        l->x[p] = l->t[p] == 1 ? g : -g;
        l->x[PITCH + p] = l->t[p] == 1 ? -g : g;
    }
}

