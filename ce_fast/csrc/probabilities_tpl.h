/* Probabilities checked, and -log of the one that is each row's label's: included once for each REAL and each ISA.
 *
 * One pass: a tile of rows comes from memory once, for the check of its values; its row sums and the probabilities of
 * the labels are then read from L1. The logarithms run along the rows of the tile, in double whatever REAL.
 */
#ifndef CE_PROBABILITIES_COMMON
#define CE_PROBABILITIES_COMMON

/* log v of a normal v > 0. With v = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2) and s = f / (2 + f) it is
   k ln 2 + f - f^2 / 2 + s (f^2 / 2 + R(s^2)), with the R of fdlibm; what k ln 2 + f loses is added again: 0.8 ulp. */
CE_INLINE double ce_log(double v)
{
    uint64_t bits, exponent;
    double f, k;
    memcpy(&bits, &v, sizeof bits);
    bits += 0x3ff0000000000000u - 0x3fe6a09e00000000u;
    exponent = bits >> 52 | 0x4330000000000000u; /* 2^52 + it: AVX2 converts no integers of 64 bits */
    bits = (bits & 0xfffffffffffffu) + 0x3fe6a09e00000000u;
    memcpy(&k, &exponent, sizeof k);
    memcpy(&f, &bits, sizeof f);
    k -= 0x1p52 + 1023;
    f -= 1;
    double s = f / (2 + f), z = s * s, half = 0.5 * f * f, r = 0x1.2f112df3e5244p-3;
    r = r * z + 0x1.39a09d078c69fp-3;
    r = r * z + 0x1.7466496cb03dep-3;
    r = r * z + 0x1.c71c51d8e78afp-3;
    r = r * z + 0x1.2492494229359p-2;
    r = r * z + 0x1.999999997fa04p-2;
    r = r * z + 0x1.5555555555593p-1;
    double high = k * 0x1.62e42feep-1 + f, lost = f - (high - k * 0x1.62e42feep-1);
    return high + (lost - (half - (s * (half + r * z) + k * 0x1.a39ef35793c76p-33)));
}

/* NumPy's order of additions: the mean of few rows has the bits that it has there. */
static double ce_pairwise(const double *v, int64_t n)
{
    if (n > 128) {
        int64_t half = n / 2 - n / 2 % 8;
        return ce_pairwise(v, half) + ce_pairwise(v + half, n - half);
    }
    double lanes[8] = {0}, sum;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++)
            lanes[l] += v[i + l];
    sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    for (; i < n; i++)
        sum += v[i];
    return sum;
}

/* Labels [first, first + n) less `low`, as unsigned numbers: what is below it is no column either. */
static void ce_columns(const ce_labels *labels, int64_t first, int64_t n, int64_t low, uint64_t *restrict column)
{
    const char *at = labels->data + first * labels->stride;
#define CE_COLUMNS(TYPE)                                  \
    for (int64_t i = 0; i < n; i++) {                     \
        TYPE v;                                           \
        memcpy(&v, at + i * labels->stride, sizeof v);    \
        column[i] = (uint64_t)(int64_t)v - (uint64_t)low; \
    }                                                     \
    return;
    switch (labels->dtype) {
    case CE_INT8: CE_COLUMNS(int8_t)
    case CE_UINT8: CE_COLUMNS(uint8_t)
    case CE_INT16: CE_COLUMNS(int16_t)
    case CE_UINT16: CE_COLUMNS(uint16_t)
    case CE_INT32: CE_COLUMNS(int32_t)
    case CE_UINT32: CE_COLUMNS(uint32_t)
    default: CE_COLUMNS(int64_t)
    }
#undef CE_COLUMNS
}

/* the least and the greatest of labels [first, last), not empty */
static void ce_label_range(const ce_labels *labels, int64_t first, int64_t last, int64_t *least, int64_t *most)
{
    const char *at = labels->data + first * labels->stride;
    int64_t n = last - first;
#define CE_RANGE(TYPE, STRIDE)                            \
    for (int64_t i = 0; i < n; i++) {                     \
        TYPE v;                                           \
        memcpy(&v, at + i * (int64_t)(STRIDE), sizeof v); \
        low = v < low ? v : low;                          \
        high = v > high ? v : high;                       \
    }
#define CE_EACH_RANGE(TYPE)                               \
    {                                                     \
        TYPE low, high;                                   \
        memcpy(&low, at, sizeof low);                     \
        high = low;                                       \
        if (labels->stride == sizeof(TYPE)) {             \
            CE_RANGE(TYPE, sizeof(TYPE))                  \
        } else {                                          \
            CE_RANGE(TYPE, labels->stride)                \
        }                                                 \
        *least = low;                                     \
        *most = high;                                     \
        return;                                           \
    }
    switch (labels->dtype) {
    case CE_INT8: CE_EACH_RANGE(int8_t)
    case CE_UINT8: CE_EACH_RANGE(uint8_t)
    case CE_INT16: CE_EACH_RANGE(int16_t)
    case CE_UINT16: CE_EACH_RANGE(uint16_t)
    case CE_INT32: CE_EACH_RANGE(int32_t)
    case CE_UINT32: CE_EACH_RANGE(uint32_t)
    default: CE_EACH_RANGE(int64_t)
    }
#undef CE_RANGE
#undef CE_EACH_RANGE
}
#endif

/* whether a value is below 0 or above 1; NaN is not looked for, it is left to the sum of its row */
static int NAME(outside)(const REAL *v, int64_t n)
{
    REAL least[CE_LANES], most[CE_LANES];
    for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
        least[l] = most[l] = 0;
    int64_t k = 0;
    for (; k + CE_LANES <= n; k += CE_LANES) {
        for (int l = 0; l < CE_LANES; l += 64 / (int)sizeof(REAL))
            __builtin_prefetch(v + k + CE_TILE + l); /* the next tile, while this one is added up: 11 % of the time */
        for (int l = 0; l < CE_LANES; l++) {
            least[l] = v[k + l] < least[l] ? v[k + l] : least[l];
            most[l] = v[k + l] > most[l] ? v[k + l] : most[l];
        }
    }
    for (; k < n; k++) {
        least[0] = v[k] < least[0] ? v[k] : least[0];
        most[0] = v[k] > most[0] ? v[k] : most[0];
    }
    int found = 0;
    for (int l = 0; l < CE_LANES; l++)
        found |= least[l] < 0 || most[l] > 1;
    return found;
}

/* The sums of n rows, added to `sums`. Short rows four at a time: the additions of one wait for each other. */
static void NAME(add_rows)(const REAL *v, int64_t n, int64_t width, REAL *sums)
{
    int64_t i = 0;
    for (; width < CE_LANES && i + 4 <= n; i += 4) {
        const REAL *a = v + i * width, *b = a + width, *c = b + width, *d = c + width;
        REAL sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
#pragma GCC unroll 4
        for (int64_t k = 0; k < width; k++) {
            sum_a += a[k];
            sum_b += b[k];
            sum_c += c[k];
            sum_d += d[k];
        }
        sums[i] += sum_a;
        sums[i + 1] += sum_b;
        sums[i + 2] += sum_c;
        sums[i + 3] += sum_d;
    }
    for (; i < n; i++) {
        const REAL *a = v + i * width;
        REAL lanes[CE_LANES];
        for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
            lanes[l] = 0;
        int64_t k = 0;
        for (; k + CE_LANES <= width; k += CE_LANES)
            for (int l = 0; l < CE_LANES; l++)
                lanes[l] += a[k + l];
        for (; k < width; k++)
            lanes[0] += a[k];
        for (int half = CE_LANES / 2; half > 0; half /= 2)
            for (int l = 0; l < half; l++)
                lanes[l] += lanes[l + half];
        sums[i] += lanes[0];
    }
}

/* what is wrong with the values and the sums of n rows from the i-th on, at most CE_TILE values or one row */
static int NAME(check_rows)(const ce_probability_job *job, int64_t i, int64_t n)
{
    int64_t n_classes = job->n_classes;
    int direct = job->dtype == REAL_DTYPE && job->class_stride == sizeof(REAL) &&
                 (n == 1 || job->row_stride == n_classes * (int64_t)sizeof(REAL));
    REAL tile[CE_TILE], sums[CE_TILE];
    int found = 0;
    for (int64_t r = 0; r < n; r++)
        sums[r] = 0;
    for (int64_t k = 0; k < n_classes; k += CE_TILE) {
        int64_t width = n_classes - k < CE_TILE ? n_classes - k : CE_TILE;
        const char *at = job->data + i * job->row_stride + k * job->class_stride;
        for (int64_t r = 0; r < n && !direct; r++)
            NAME(load)(at + r * job->row_stride, job->class_stride, job->dtype, width, tile + r * width);
        const REAL *v = direct ? (const REAL *)at : tile;
        found |= NAME(outside)(v, n * width) ? CE_OUTSIDE : 0;
        NAME(add_rows)(v, n, width, sums);
    }
    double tolerance = job->tolerance;
    int off = 0, nan = 0;
    for (int64_t r = 0; r < n; r++)
        off |= !(fabs((double)sums[r] - 1) <= tolerance);
    for (int64_t r = 0; r < n && off; r++)
        nan |= sums[r] != sums[r];
    return found | (off ? CE_SUM_NOT_ONE : 0) | (nan ? CE_OUTSIDE : 0);
}

/* p[i, column] of n rows; a column that is not there is read as the first */
static void NAME(pick)(const ce_probability_job *job, int64_t i, int64_t n, const uint64_t *column, char *seen, REAL *p)
{
    int64_t row_stride = job->row_stride, class_stride = job->class_stride;
    const char *at = job->data + i * row_stride;
    uint64_t n_classes = (uint64_t)job->n_classes;
#define CE_PICK(READ)                                            \
    for (int64_t r = 0; r < n; r++, at += row_stride) {          \
        uint64_t k = column[r] < n_classes ? column[r] : 0;      \
        const char *place = at + (int64_t)k * class_stride;      \
        seen[k] = 1;                                             \
        READ;                                                    \
    }
    if (job->dtype == REAL_DTYPE) {
        CE_PICK(memcpy(p + r, place, sizeof(REAL)))
    } else {
        CE_PICK(NAME(load)(place, 0, job->dtype, 1, p + r))
    }
#undef CE_PICK
}

/* p of label 1, 1 - p of label 0, rounded as in the dtype of p; what is wrong with them */
static int NAME(pick_one_column)(const ce_probability_job *job, int64_t i, int64_t n, const uint64_t *column, REAL *p)
{
    int found = 0;
    NAME(load)(job->data + i * job->row_stride, job->row_stride, job->dtype, n, p);
    for (int64_t r = 0; r < n; r++) {
        found |= !(p[r] >= 0 && p[r] <= 1);
        p[r] = column[r] == 1 ? p[r] : 1 - p[r];
    }
    return found ? CE_OUTSIDE : 0;
}

static double NAME(probabilities)(const ce_probability_job *job, int64_t first, int64_t last, double *loss, char *seen,
                                  int *flags)
{
    int64_t n_classes = job->n_classes ? job->n_classes : 1, step = n_classes < CE_TILE ? CE_TILE / n_classes : 1;
    int64_t size = job->dtype == CE_FLOAT16 ? 2 : (int64_t)sizeof(REAL);
    REAL eps = (REAL)job->eps, most = 1 - eps;
    step = step < 16 ? step : step & ~(int64_t)15; /* whole vectors of logarithms */
    for (int64_t i = first; i < last; i += step) {
        int64_t n = last - i < step ? last - i : step;
        uint64_t column[CE_TILE];
        REAL p[CE_TILE];
        ce_columns(&job->labels, i, n, job->low, column);
        if (job->n_classes == 0) {
            *flags |= NAME(pick_one_column)(job, i, n, column, p);
        } else {
            *flags |= NAME(check_rows)(job, i, n);
            NAME(pick)(job, i, n, column, seen, p);
        }
        for (int64_t r = 0; r < n; r++) {
            p[r] = p[r] > eps ? p[r] : eps; /* NaN too */
            p[r] = p[r] < most ? p[r] : most;
        }
        if (job->picked)
            NAME(store)(job->picked + i * size, size, job->dtype, n, p);
        else
            for (int64_t r = 0; r < n; r++)
                loss[i - first + r] = -ce_log((double)p[r]);
    }
    for (int64_t i = first; i < last && job->weight && !job->picked; i++)
        loss[i - first] *= job->weight[i];
    return job->picked ? 0 : ce_pairwise(loss, last - first);
}
