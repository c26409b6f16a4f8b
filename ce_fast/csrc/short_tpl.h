/* Short rows as they lie, for classes that fill vectors: exponentials and sums along each row, then lanes_tpl.h for all.
 * Included once for each REAL and each ISA.
 */
#define STEP ((int)(64 / sizeof(REAL))) /* a vector of 512 bits: less padding than CE_LANES */

/* length of a row in scratch: whole lanes */
CE_INLINE int64_t NAME(pitch)(const ce_job *job)
{
    int64_t lanes = job->n_classes <= CE_RUN ? STEP : CE_LANES;
    return (job->n_classes + lanes - 1) & -lanes;
}

/* The largest of n >= STEP elements, or, where one is NaN, NaN or any of them. Loops of one vector are told not to be unrolled
   here: GCC would do that first, and find no vector then. */
CE_INLINE REAL NAME(largest)(const REAL *x, int64_t n)
{
    REAL max[STEP];
    for (int l = 0; l < STEP; l++)
        max[l] = x[n - STEP + l]; /* the end, which whole steps may leave out */
    for (int64_t k = 0; k + STEP <= n; k += STEP)
#pragma GCC unroll 1
        for (int l = 0; l < STEP; l++)
            max[l] = x[k + l] > max[l] ? x[k + l] : max[l];
#pragma GCC unroll 8
    for (int half = STEP / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            max[l] = max[l + half] > max[l] ? max[l + half] : max[l];
    return max[0];
}

/* exp(x - m) to e, which may be x, of n >= STEP elements; of what is above `most`, exp(most - m). Between, a line at a time,
   what will be read is fetched, elements of `size` bytes, and what waits is streamed: a row's lines together filled all
   the buffers between core and memory, and each waited for the one before (6 % of the time). */
CE_INLINE void NAME(short_exp)(const REAL *x, REAL *e, int64_t n, REAL most, NAME(exp_args) args, const char *ahead,
                               int64_t size, ce_waiting *waiting)
{
    ce_waiting w = *waiting;
    REAL tail[STEP];
    for (int l = 0; l < STEP; l++) {
        REAL z = x[n - STEP + l];
        tail[l] = NAME(exp)(z > most ? most : z, args);
    }
    for (int64_t k = 0; k + STEP <= n; k += STEP) {
        __builtin_prefetch(ahead + k * size, 0, 2); /* to L2: a row is read in two batches from now */
        ce_stream_line(&w);
#pragma GCC ivdep
        for (int l = 0; l < STEP; l++) {
            REAL z = x[k + l];
            e[k + l] = NAME(exp)(z > most ? most : z, args);
        }
    }
    for (int l = 0; l < STEP; l++)
        e[n - STEP + l] = tail[l];
    *waiting = w;
}

/* sum of n elements, whole lanes: a run of them in REAL, runs in double */
CE_INLINE double NAME(sum_of_lanes)(const REAL *e, int64_t n, const int n_lanes)
{
    double sums[CE_LANES];
    for (int l = 0; l < n_lanes; l++) /* no memset, see setup.py */
        sums[l] = 0;
    const int64_t run = CE_RUN / CE_LANES * n_lanes;
    for (int64_t j = 0; j < n; j += run) {
        int64_t end = j + run < n ? j + run : n;
        REAL lanes[CE_LANES];
        for (int l = 0; l < n_lanes; l++)
            lanes[l] = e[j + l];
        for (int64_t k = j + n_lanes; k < end; k += n_lanes)
            for (int l = 0; l < n_lanes; l++)
                lanes[l] += e[k + l];
        for (int l = 0; l < n_lanes; l++)
            sums[l] += (double)lanes[l];
    }
    return NAME(sum_lanes)(sums, n_lanes);
}

static double NAME(sum_short)(const REAL *e, int64_t n)
{
    return n <= CE_RUN ? NAME(sum_of_lanes)(e, n, STEP) : NAME(sum_of_lanes)(e, n, CE_LANES);
}

/* sum_{k != t} (x_k - pivot) of n >= n_lanes elements, as sum_of_lanes */
CE_INLINE double NAME(moment_of_lanes)(const REAL *x, int64_t n, SINT t, REAL pivot, const int n_lanes)
{
    double sums[CE_LANES];
    const int64_t run = CE_RUN / CE_LANES * n_lanes, whole = n & -(int64_t)n_lanes;
#pragma GCC unroll 1
    for (int l = 0; l < n_lanes; l++) { /* the end, which whole steps leave out */
        SINT k = (SINT)(n - n_lanes) + l;
        REAL v = x[n - n_lanes + l] - pivot;
        sums[l] = (k < (SINT)whole) | (k == t) ? 0 : (double)v;
    }
    for (int64_t j = 0; j < whole; j += run) {
        int64_t end = j + run < whole ? j + run : whole;
        REAL lanes[CE_LANES];
        for (int l = 0; l < n_lanes; l++) /* no memset, see setup.py */
            lanes[l] = 0;
        for (int64_t k = j; k < end; k += n_lanes)
#pragma GCC unroll 1
            for (int l = 0; l < n_lanes; l++) {
                REAL v = x[k + l] - pivot;
                lanes[l] += (SINT)k + l == t ? 0 : v;
            }
        for (int l = 0; l < n_lanes; l++)
            sums[l] += (double)lanes[l];
    }
    return NAME(sum_lanes)(sums, n_lanes);
}

static double NAME(moment_of_row)(const REAL *x, int64_t n, SINT t, REAL pivot)
{
    return n <= CE_RUN ? NAME(moment_of_lanes)(x, n, t, pivot, STEP) : NAME(moment_of_lanes)(x, n, t, pivot, CE_LANES);
}

/* The row's logits: as they lie, or copied to where its exponentials will be. */
CE_INLINE const REAL *NAME(short_row)(const ce_job *job, const NAME(lanes) *l, int p, REAL *e)
{
    const ce_array *x = &job->logits;
    const char *logits = x->data + NAME(offset)(job, x, l->first + p);
    if (x->dtype == REAL_DTYPE && x->class_stride == sizeof(REAL))
        return (const REAL *)logits;
    NAME(load)(logits, x->class_stride, x->dtype, job->n_classes, e);
    return e;
}

/* exp(z - m) of row p, m = ref ln 2, to e */
static void NAME(exp_of_row)(const ce_job *job, NAME(lanes) *l, int p, const REAL *x, REAL *e)
{
    const ce_temperature *t = &job->temperature;
    REAL ln2 = (REAL)(t->ln2_high + t->ln2_low), most = (l->ref[p] + (CE_LEAD + CE_SLACK)) * ln2;
    NAME(exp_args) args = NAME(exp_of_lane)(NAME(exp_prepare)(0, 0, t), ln2, l->ref[p]);
    int64_t next = l->first + p + 2 * l->padded;
    const char *ahead = job->logits.data + NAME(offset)(job, &job->logits, next < job->n_rows ? next : l->first);
    NAME(short_exp)(x, e, job->n_classes, most, args, ahead, job->logits.class_stride, &l->waiting);
}

/* exp(z - m) of the rows and their sums without the target; 0 if a row is out of the ordinary. The reference is taken from a
   row's first classes, or from all where those turn out to be far below, or for a pivot. In a row that does not count,
   nothing is read. Loop after loop over all rows: within one row each step waits for the one before. */
static int NAME(sum_rows)(const ce_job *job, NAME(lanes) *l)
{
    int64_t n = job->n_classes, pitch = NAME(pitch)(job);
    const ce_temperature *t = &job->temperature;
    REAL limit = (REAL)(CE_BASE_LIMIT * t->value), log2e = (REAL)t->log2e, ln2 = (REAL)(t->ln2_high + t->ln2_low);
    const REAL *rows[ROWS];
    int smoothed = job->off != 0, looked = l->look || smoothed, first = n >= 4 * STEP ? 4 * STEP : STEP;
    REAL max[ROWS];
    for (int p = 0; p < l->padded; p++) {
        REAL *e = l->x + p * pitch;
        for (int64_t k = n; k < pitch && l->t[p] >= 0; k++)
            e[k] = 0;
        rows[p] = l->t[p] < 0 ? NULL : NAME(short_row)(job, l, p, e);
        int all = rows[p] == e || looked, one = !REAL_IS_FLOAT && !all; /* the range of double is wide: 4 % of the time */
        max[p] = !rows[p] ? 0 : one ? rows[p][0] : NAME(largest)(rows[p], all ? n : first);
        l->x_t[p] = rows[p] ? rows[p][l->t[p]] : 0;
    }
    for (int p = 0; p < l->padded; p++) {
        l->ref[p] = NAME(round)(max[p] * log2e) - CE_LEAD;
        l->rest[p] = l->lost[p] = 0;
    }
    for (int p = 0; p < l->padded && smoothed; p++) {
        l->pivot[p] = max[p];
        l->moment[p] = rows[p] ? NAME(moment_of_row)(rows[p], n, l->t[p], max[p]) : 0;
        l->moment_lost[p] = 0;
    }
    for (int p = 0; p < l->padded; p++)
        if (rows[p])
            NAME(exp_of_row)(job, l, p, rows[p], l->x + p * pitch);
    for (int p = 0; p < l->padded; p++)
        if (rows[p])
            l->x[p * pitch + l->t[p]] = 0;
    for (int p = 0; p < l->padded; p++)
        if (rows[p])
            l->rest[p] = NAME(sum_short)(l->x + p * pitch, pitch);
    int odd = 0;
    for (int p = 0; p < l->padded; p++) {
        REAL most = (l->ref[p] + (CE_LEAD + CE_SLACK)) * ln2;
        int below = !(l->rest[p] < (REAL_IS_FLOAT ? 0x1p54 : 0x1p534)) | !(l->x_t[p] < most) | !(max[p] > -limit);
        if (below && rows[p] && rows[p] != l->x + p * pitch && !looked) {
            l->look = 1;
            max[p] = NAME(largest)(rows[p], n);
            l->ref[p] = NAME(round)(max[p] * log2e) - CE_LEAD;
            NAME(exp_of_row)(job, l, p, rows[p], l->x + p * pitch);
            l->x[p * pitch + l->t[p]] = 0;
            l->rest[p] = NAME(sum_short)(l->x + p * pitch, pitch);
        }
        odd |= !(max[p] < limit) | !(max[p] > -limit);
    }
    return !odd;
}

/* A p_k of each row less its pull to its place, g_t at the target. Rows that are streamed are packed first: lines written in
   parts took [80000, 129] from 0.7 to 1.7 ns a logit. */
static void NAME(write_rows)(const ce_job *job, NAME(lanes) *l)
{
    int64_t n = job->n_classes, size = n * (int64_t)sizeof(REAL);
    int contiguous = job->out.dtype == REAL_DTYPE && job->out.class_stride == sizeof(REAL);
    int packed = contiguous && job->n_outer == 1 && job->out.outer_stride[0] == size && NAME(streams)(job);
    ce_stream_rest(&l->waiting);
    for (int p = 0; p < l->n; p++) {
        char *out = job->out.data + NAME(offset)(job, &job->out, l->first + p);
        REAL *e = l->x + p * NAME(pitch)(job), *g = packed ? l->pack + p * n : contiguous ? (REAL *)out : e;
        if (l->t[p] >= 0) {
            NAME(scale_tile)(e, g, n, l->a[p] * l->inverse[p] * l->scale[p], NAME(pull)(job, l, p));
            g[l->t[p]] = (REAL)(l->g_t[p] * l->scale[p]);
        } else {
            for (int64_t k = 0; k < n; k++)
                g[k] = 0;
        }
        if (!contiguous)
            NAME(store)(out, job->out.class_stride, job->out.dtype, n, g);
    }
    if (packed) {
        l->waiting = (ce_waiting){job->out.data + l->first * size, (const char *)l->pack, l->n * size};
        if (l->pack == l->x)
            ce_stream_rest(&l->waiting);
        else
            ce_stream_head(&l->waiting);
    }
}
#undef STEP
