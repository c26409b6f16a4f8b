/* The sigmoid family: an element in place of a row, included once for each REAL and each ISA.
 *
 *   e = exp(-|z|),  softplus(z) = max(z, 0) + log1p(e),  sigmoid(z) = 1 / (1 + e) or e / (1 + e)
 *
 * Whatever the loss, what pulls z up and what pulls it down are added apart, so that nothing cancels. Operands are
 * gathered into tiles, whatever their strides, and what the compiler vectorizes runs over whole tiles.
 */
typedef struct { /* a tile of each operand: down = w (1 - y'), up = w pos_weight y' */
    REAL z[CE_TILE], y[CE_TILE], down[CE_TILE], up[CE_TILE], s[CE_TILE];
    REAL loss[CE_TILE], grad[CE_TILE], hess[CE_TILE];
} NAME(element_tile);

/* Elements [first, first + n) in C order, from the array to the tile or back, a run along the last axis at a time. */
CE_INLINE void NAME(each_run)(const ce_element_job *job, const ce_array *array, int64_t first, int64_t n, REAL *tile,
                              int store)
{
    for (int64_t done = 0; done < n;) {
        int64_t row = (first + done) / job->n_last, column = (first + done) % job->n_last;
        int64_t run = job->n_last - column < n - done ? job->n_last - column : n - done;
        int64_t offset = column * array->class_stride;
        for (int d = job->n_outer - 1; d >= 0; d--) {
            offset += row % job->outer_shape[d] * array->outer_stride[d];
            row /= job->outer_shape[d];
        }
        if (store)
            NAME(store)(array->data + offset, array->class_stride, array->dtype, run, tile + done);
        else
            NAME(load)(array->data + offset, array->class_stride, array->dtype, run, tile + done);
        done += run;
    }
}

static void NAME(gather)(const ce_element_job *job, const ce_array *array, int64_t first, int64_t n, REAL *tile)
{
    for (int64_t k = 0; k < n && !array->data; k++)
        tile[k] = 1;
    if (array->data)
        NAME(each_run)(job, array, first, n, tile, 0);
}

static void NAME(scatter)(const ce_element_job *job, const ce_array *array, int64_t first, int64_t n, REAL *tile)
{
    if (array->data)
        NAME(each_run)(job, array, first, n, tile, 1);
}

/* loss = down softplus(z) + up softplus(-z);  its gradient down p - up (1 - p);  its Hessian (down + up) p (1 - p) */
static void NAME(binary_tile)(NAME(element_tile) *t, int64_t n)
{
    ce_temperature one = CE_TEMPERATURE_1;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &one);
    for (int64_t k = 0; k < n; k++) {
        REAL z = t->z[k], up = t->up[k], down = t->down[k];
        REAL e = NAME(exp)(z < 0 ? z : -z, args), rest = NAME(log1p)(e), most = 1 / (1 + e), least = e * most;
        REAL p = z < 0 ? least : most, q = z < 0 ? most : least;
        REAL above = (z > 0 ? z : 0) + rest, below = (z < 0 ? -z : 0) + rest;
        REAL high = down == 0 && above == above ? 0 : down * above; /* 0 * inf is 0 here, NaN stays */
        t->loss[k] = high + (up == 0 && below == below ? 0 : up * below);
        t->grad[k] = down * p - up * q;
        t->hess[k] = (down + up) * (p * q);
    }
}

/* loss = -down max(log(1 - x), -100) - up max(log x, -100) of a probability x, gradient and clamps as torch's */
static void NAME(probability_tile)(NAME(element_tile) *t, int64_t n)
{
    for (int64_t k = 0; k < n; k++) {
        double x = t->z[k], high = -log1p(-x), low = -log(x), width = x * (1 - x);
        t->loss[k] = (REAL)((double)t->down[k] * (high > 100 ? 100 : high) + (double)t->up[k] * (low > 100 ? 100 : low));
        t->grad[k] = (REAL)((x * (double)t->down[k] - (1 - x) * (double)t->up[k]) / (width < 1e-12 ? 1e-12 : width));
    }
}

#if !REAL_IS_FLOAT
/* u^gamma of u = mix / (1 + e), or of e / (1 + e) if mix is 0: in parts whose logarithms are small, or exact, for gamma
   magnifies their errors. With mix = 2^k f: 2^(gamma k) f^gamma (1 + e)^-gamma exp(-gamma size). */
CE_INLINE REAL NAME(modulation)(REAL mix, REAL size, REAL log1p_e, REAL gamma, NAME(exp_args) args)
{
    REAL f, k = NAME(split)(mix == 0 || mix > 1 ? 1 : mix, &f), n = rint(gamma * k > -1e6 ? gamma * k : -1e6);
    REAL rest = ((gamma * k - n) + __builtin_fma(gamma, k, -(gamma * k))) * 0.6931471805599453;
    REAL product = gamma * size, lost = __builtin_fma(gamma, size, -product);
    REAL power = NAME(exp2)(n) * NAME(exp)(rest + gamma * (NAME(twice_atanh)((f - 1) / (f + 1)) - log1p_e), args);
    REAL far = product > 800 ? 0 : NAME(exp)(-product, args) * (1 - lost); /* exp is 0 from 709 on */
    power = gamma * k < -1e6 ? 0 : power; /* as rest would be NaN of a gamma near infinity */
    return gamma == 0 ? 1 : mix == 0 ? power * far : power;
}

/* loss = c u^gamma [(1 - y) softplus(z) + y softplus(-z)],  u = y (1 - p) + (1 - y) p,  c = alpha y + (1 - alpha)(1 - y)
   (Lin et al., arXiv:1708.02002). With u = (a e + b) / (1 + e) and a + b = 1, p (1 - p) / u = e / ((1 + e) (a e + b))
   has a limit where b is 0: nothing is infinite at any finite z. */
static void NAME(focal_tile)(const ce_element_job *job, NAME(element_tile) *t, int64_t n)
{
    ce_temperature one = CE_TEMPERATURE_1;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &one);
    REAL gamma = (REAL)job->gamma, alpha = (REAL)job->alpha;
    for (int64_t k = 0; k < n; k++) {
        REAL z = t->z[k], y = t->y[k], size = z < 0 ? -z : z;
        REAL e = NAME(exp)(-size, args), rest = NAME(log1p)(e), most = 1 / (1 + e), least = e * most;
        REAL p = z < 0 ? least : most, q = z < 0 ? most : least;
        REAL above = (z > 0 ? z : 0) + rest, below = (z < 0 ? -z : 0) + rest;
        REAL ce = (y == 1 && above == above ? 0 : (1 - y) * above) + (y == 0 && below == below ? 0 : y * below);
        REAL a = z < 0 ? 1 - y : y, b = z < 0 ? y : 1 - y, mix = a * e + b;
        REAL factor = NAME(modulation)(b == 0 ? 0 : mix, size, rest, gamma, args);
        REAL c = alpha < 0 ? 1 : alpha * y + (1 - alpha) * (1 - y);
        REAL spread = b == 0 ? most : least / mix; /* p (1 - p) / u */
        REAL by_factor = ce == 0 || spread == 0 ? 0 : gamma * ce * spread * (1 - 2 * y);
        int nothing = (factor == 0 || c == 0) && ce == ce; /* 0 * inf is 0 here, NaN stays */
        t->loss[k] = nothing ? 0 : c * factor * ce;
        t->grad[k] = nothing ? 0 : c * factor * ((1 - y) * p - y * q + by_factor);
        REAL slope = 1 + (ce == 0 || spread == 0 ? 0 : gamma * ce * spread * (1 - 2 * y) * (1 - 2 * y) / (y * q + (1 - y) * p));
        t->hess[k] = nothing ? 0 : c * factor * slope * (p * q);
    }
}
#endif

/* the operands of elements [first, first + n); 1 if a target that counts lies outside [0, 1] */
static int NAME(read_elements)(const ce_element_job *job, int64_t first, int64_t n, NAME(element_tile) *t)
{
    REAL on = (REAL)job->on, off = (REAL)job->off;
    NAME(gather)(job, &job->logits, first, n, t->z);
    NAME(gather)(job, &job->target, first, n, t->y);
    NAME(gather)(job, &job->weight, first, n, t->down);
    NAME(gather)(job, &job->pos_weight, first, n, t->up);
    NAME(gather)(job, &job->sample_weight, first, n, t->s);
    int bad = 0;
    for (int64_t k = 0; k < n; k++) {
        REAL y = t->y[k], w = t->down[k];
        bad |= (y < 0 || y > 1) && t->s[k] != 0;
        t->up[k] *= w * (on * y + off);
        t->down[k] = w * (on * (1 - y) + off);
    }
    return bad;
}

/* loss, gradient and Hessian to their places; the sum of the losses */
static double NAME(write_elements)(const ce_element_job *job, int64_t first, int64_t n, NAME(element_tile) *t)
{
    double lanes[CE_LANES] = {0};
    REAL upstream[CE_TILE], scale = (REAL)job->scale, hess_scale = (REAL)job->hess_scale, floor = (REAL)job->floor;
    NAME(gather)(job, &job->upstream, first, n, upstream);
    for (int64_t k = 0; k < n; k++) {
        REAL s = t->s[k], h = hess_scale * s * upstream[k] * t->hess[k];
        t->loss[k] = s == 0 ? 0 : s * t->loss[k]; /* what does not count leaks nothing */
        t->grad[k] = s == 0 ? 0 : scale * s * upstream[k] * t->grad[k];
        t->hess[k] = s == 0 ? 0 : h < floor ? floor : h;
    }
    for (int64_t k = 0; k < n; k++)
        lanes[k % CE_LANES] += (double)t->loss[k];
    NAME(scatter)(job, &job->loss, first, n, t->loss);
    NAME(scatter)(job, &job->out, first, n, t->grad);
    NAME(scatter)(job, &job->hess, first, n, t->hess);
    return NAME(sum_lanes)(lanes, CE_LANES);
}

static double NAME(elements)(const ce_element_job *job, int64_t first, int64_t last, int *bad)
{
    NAME(element_tile) tile;
    ce_sum sum = {0, 0};
    for (int64_t i = first; i < last; i += CE_TILE) {
        int64_t n = last - i < CE_TILE ? last - i : CE_TILE;
        *bad |= NAME(read_elements)(job, i, n, &tile);
#if !REAL_IS_FLOAT /* gamma magnifies roundings: the focal loss of float32 is computed in double too */
        if (job->rule == CE_BINARY_FOCAL)
            NAME(focal_tile)(job, &tile, n);
        else
#endif
        if (job->rule == CE_BINARY_PROBABILITY)
            NAME(probability_tile)(&tile, n);
        else
            NAME(binary_tile)(&tile, n);
        ce_add(&sum, NAME(write_elements)(job, i, n, &tile));
    }
    return ce_total(&sum);
}
