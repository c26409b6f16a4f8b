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

/* the largest of n >= STEP elements, or, where one is NaN, NaN or any of them */
static REAL NAME(largest)(const REAL *x, int64_t n)
{
    REAL max[STEP];
    for (int l = 0; l < STEP; l++)
        max[l] = x[n - STEP + l]; /* the end, which whole steps may leave out */
    for (int64_t k = 0; k + STEP <= n; k += STEP)
        for (int l = 0; l < STEP; l++)
            max[l] = x[k + l] > max[l] ? x[k + l] : max[l];
    for (int half = STEP / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            max[l] = max[l + half] > max[l] ? max[l + half] : max[l];
    return max[0];
}

/* The rows without their targets, padded with -inf; the largest logit of each to ref. In a row that does not count, nothing
   is read. */
static void NAME(load_short)(const ce_job *job, NAME(lanes) *l)
{
    int64_t n = job->n_classes, pitch = NAME(pitch)(job);
    int direct = job->logits.dtype == REAL_DTYPE && job->logits.class_stride == sizeof(REAL);
    for (int p = 0; p < l->padded; p++) {
        REAL *x = l->x + p * pitch;
        l->x_t[p] = l->ref[p] = 0;
        for (int64_t k = l->t[p] < 0 ? 0 : n; k < pitch; k++)
            x[k] = -(REAL)INFINITY;
        if (l->t[p] < 0)
            continue;
        const char *logits = job->logits.data + NAME(offset)(job, &job->logits, l->first + p);
        if (direct)
            memcpy(x, logits, (size_t)n * sizeof(REAL));
        else
            NAME(load)(logits, job->logits.class_stride, job->logits.dtype, n, x);
        l->ref[p] = NAME(largest)(x, n);
        l->x_t[p] = x[l->t[p]];
        x[l->t[p]] = -(REAL)INFINITY; /* after the maximum: a vector that is read right after a part of it was written waits */
    }
}

/* exp(z - m) of the rows and their sums; 0 if a row is out of the ordinary. Loop after loop over all rows: within one row
   each step waits for the one before, which took a third more. */
static int NAME(sum_rows)(const ce_job *job, NAME(lanes) *l)
{
    int64_t n = job->n_classes, pitch = NAME(pitch)(job);
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &job->temperature);
    REAL limit = (REAL)(CE_BASE_LIMIT * job->temperature.value), log2e = (REAL)job->temperature.log2e;
    REAL ln2 = (REAL)(job->temperature.ln2_high + job->temperature.ln2_low);
    int64_t size = job->logits.class_stride;
    int odd = 0;
    NAME(load_short)(job, l);
    for (int p = 0; p < l->padded; p++) {
        odd |= !(l->ref[p] < limit) | !(l->ref[p] > -limit);
        l->ref[p] = NAME(round)(l->ref[p] * log2e) - CE_LEAD;
        l->lost[p] = 0;
    }
    for (int p = 0; p < l->padded; p++) {
        REAL *x = l->x + p * pitch;
        NAME(exp_args) of_row = NAME(exp_of_lane)(args, ln2, l->ref[p]);
        int64_t next = l->first + p + l->padded; /* a row of the next batch */
        const char *ahead = job->logits.data + NAME(offset)(job, &job->logits, next < job->n_rows ? next : l->first);
        l->rest[p] = n <= CE_RUN ? NAME(lanes_exp)(x, x, 1, pitch, of_row, ahead, size, STEP)
                                 : NAME(lanes_exp)(x, x, 1, pitch, of_row, ahead, size, CE_LANES);
    }
    return !odd;
}

/* a p_k of each row to its place, g_t at the target */
static void NAME(write_rows)(const ce_job *job, NAME(lanes) *l)
{
    for (int p = 0; p < l->n; p++) {
        char *out = job->out.data + NAME(offset)(job, &job->out, l->first + p);
        REAL *e = l->x + p * NAME(pitch)(job);
        int contiguous = job->out.dtype == REAL_DTYPE && job->out.class_stride == sizeof(REAL);
        int streams = contiguous && NAME(streams)(job);
        REAL *g = contiguous && !streams ? (REAL *)out : e;
        if (l->t[p] < 0) {
            NAME(write_constant)(&job->out, out, 0, 0, job->n_classes);
            continue;
        }
        NAME(scale_tile)(e, g, job->n_classes, l->a[p] * l->inverse[p] * l->scale[p]);
        g[l->t[p]] = (REAL)(l->g_t[p] * l->scale[p]);
        if (streams)
            ce_stream(out, (const char *)g, job->n_classes * (int64_t)sizeof(REAL));
        else if (!contiguous)
            NAME(store)(out, job->out.class_stride, job->out.dtype, job->n_classes, g);
    }
}
#undef STEP
