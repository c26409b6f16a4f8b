/* The sigmoid family: an element in place of a row, included once for each REAL and each ISA.
 *
 *   e = exp(-|z|),  softplus(z) = max(z, 0) + log1p(e),  sigmoid(z) = 1 / (1 + e) or e / (1 + e)
 *
 * Whatever the loss, what pulls z up and what pulls it down are added apart, so that nothing cancels: of the two, `wrong`
 * pulls z back over 0 and `right` further away. One loop over a tile of elements serves every loss; what is not asked for
 * and what has its neutral value is left out of it when it is compiled. Operands are read where they are, or gathered
 * into tiles.
 */
#ifndef CE_ELEMENTS_COMMON
#define CE_ELEMENTS_COMMON
enum { CE_ELEMENT_TILE = 512 };
enum { CE_Z, CE_Y, CE_W, CE_POS_WEIGHT, CE_S, CE_UPSTREAM, CE_N_OPERANDS };

typedef struct { /* an array, innermost axis first, with axes made one where one stride walks both */
    char *data;
    ce_dtype dtype;
    int n_axes;
    int64_t shape[CE_MAX_OUTER + 1], stride[CE_MAX_OUTER + 1];
    int64_t period; /* after which it repeats, if that is within a tile; else 0 */
} ce_walk;

static void ce_set_walk(ce_walk *walk, const ce_element_job *job, const ce_array *array)
{
    walk->data = array->data;
    walk->dtype = array->dtype;
    walk->n_axes = 0;
    int64_t n = 1; /* elements of all axes but the outermost */
    for (int d = job->n_outer; d >= 0; d--) {
        int64_t size = d == job->n_outer ? job->n_last : job->outer_shape[d], a = walk->n_axes - 1;
        int64_t stride = d == job->n_outer ? array->class_stride : array->outer_stride[d];
        if (size == 1)
            continue;
        if (a >= 0 && stride == walk->stride[a] * walk->shape[a]) {
            walk->shape[a] *= size;
        } else {
            n *= a >= 0 ? walk->shape[a] : 1;
            walk->shape[a + 1] = size;
            walk->stride[a + 1] = stride;
            walk->n_axes++;
        }
    }
    if (walk->n_axes == 0) {
        walk->shape[0] = walk->n_axes = 1;
        walk->stride[0] = 0;
    }
    walk->period = walk->stride[walk->n_axes - 1] == 0 && n <= CE_ELEMENT_TILE ? n : 0;
}
#endif

typedef struct { /* where the operands and the results of a tile are */
    const REAL *in[CE_N_OPERANDS];
    REAL *loss, *grad, *hess;
} NAME(element_tile);

typedef struct {
    REAL on, off, gamma, alpha, scale, hess_scale, floor, least;
} NAME(element_options);

typedef struct {
    REAL loss, grad, hess;
} NAME(values);

/* Elements [first, first + n) in C order, from the array to the tile or back, a run along the innermost axis at a time. */
static void NAME(each_run)(const ce_walk *w, int64_t first, int64_t n, REAL *tile, int store)
{
    int64_t index[CE_MAX_OUTER + 1], offset = 0, rest = first;
    for (int a = 0; a < w->n_axes; a++) {
        index[a] = a + 1 < w->n_axes ? rest % w->shape[a] : rest;
        rest = a + 1 < w->n_axes ? rest / w->shape[a] : 0;
        offset += index[a] * w->stride[a];
    }
    for (int64_t done = 0; done < n;) {
        int64_t left = w->shape[0] - index[0], run = left < n - done ? left : n - done;
        if (store)
            NAME(store)(w->data + offset, w->stride[0], w->dtype, run, tile + done);
        else
            NAME(load)(w->data + offset, w->stride[0], w->dtype, run, tile + done);
        done += run;
        index[0] += run;
        offset += run * w->stride[0];
        for (int a = 0; a + 1 < w->n_axes && index[a] == w->shape[a]; a++) {
            offset += w->stride[a + 1] - w->shape[a] * w->stride[a];
            index[a + 1]++;
            index[a] = 0;
        }
    }
}

/* Elements [first, ...) where they are, if they are there one after another as REAL; else NULL. */
CE_INLINE REAL *NAME(in_place)(const ce_walk *w, int64_t first)
{
    int there = w->data && w->dtype == REAL_DTYPE && w->n_axes == 1 && w->stride[0] == sizeof(REAL);
    return there ? (REAL *)w->data + first : NULL;
}

/* An operand that repeats is gathered once: a tile begins anywhere in its first period. */
static void NAME(fill)(const ce_walk *w, REAL *tile)
{
    int64_t n = w->period;
    NAME(each_run)(w, 0, n, tile, 0);
    while (n < w->period + CE_ELEMENT_TILE) {
        int64_t more = w->period + CE_ELEMENT_TILE - n < n ? w->period + CE_ELEMENT_TILE - n : n;
        memcpy(tile + n, tile, (size_t)more * sizeof(REAL));
        n += more;
    }
}

CE_INLINE const REAL *NAME(fetch)(const ce_walk *w, int64_t first, int64_t n, REAL *tile)
{
    if (w->period)
        return tile + first % w->period;
    REAL *there = NAME(in_place)(w, first);
    if (!there)
        NAME(each_run)(w, first, n, tile, 0);
    return there ? there : tile;
}

/* loss = down softplus(z) + up softplus(-z);  its gradient down p - up (1 - p);  its Hessian (down + up) p (1 - p) */
CE_INLINE NAME(values) NAME(binary)(REAL z, REAL down, REAL up, NAME(exp_args) args)
{
    REAL size = NAME(abs)(z), e = NAME(exp)(-size, args), most = 1 / (1 + e);
    REAL wrong = z < 0 ? up : down, right = z < 0 ? down : up, slope = most * NAME(fma)(-right, e, wrong);
    NAME(values) r;
    size = wrong == 0 ? 0 : size; /* 0 * inf is 0 here, and NaN stays in e */
    r.loss = NAME(fma)(down + up, NAME(log1p_unit)(e), wrong * size);
    r.grad = z < 0 ? -slope : slope;
    r.hess = (down + up) * (e * most * most);
    return r;
}

/* loss = -down max(log(1 - x), -100) - up max(log x, -100) of a probability x, gradient and clamps as torch's */
CE_INLINE NAME(values) NAME(probability)(REAL x, REAL down, REAL up)
{
    REAL high = -NAME(log1m)(x), low = -NAME(log)(x), width = x * (1 - x);
    NAME(values) r;
    r.loss = NAME(fma)(down, high > 100 ? 100 : high, up * (low > 100 ? 100 : low));
    r.grad = NAME(fma)(x, down, -((1 - x) * up)) / (width < (REAL)1e-12 ? (REAL)1e-12 : width);
    r.hess = 0;
    return r;
}

#if !REAL_IS_FLOAT
/* u^gamma of u = (right e + wrong) / (1 + e). Its logarithm is taken in parts, one exact (-size or k ln 2) and one small,
   for gamma magnifies their errors. */
CE_INLINE double ce_modulation(double mix, double wrong, double size, double log1p_e, double gamma, NAME(exp_args) args)
{
    double k, f = NAME(log_parts)(mix == 0 || mix > 1 ? 1 : mix, &k);
    double exact = wrong == 0 ? -size : k * NAME(ln2_high), small = (wrong == 0 ? 0 : k * NAME(ln2_low) + f) - log1p_e;
    double product = gamma * exact, rest = gamma * small + ce_lost(gamma, exact, product);
    double t = product + rest, back = t - product, lost = (product - (t - back)) + (rest - back);
    double power = NAME(exp)(t, args) * (1 + lost);
    return gamma == 0 || t >= 0 ? 1 : t > -800 ? power : 0; /* of a gamma near infinity, `lost` is NaN */
}

/* loss = c u^gamma [(1 - y) softplus(z) + y softplus(-z)],  u = y (1 - p) + (1 - y) p,  c = alpha y + (1 - alpha)(1 - y)
   (Lin et al., arXiv:1708.02002). p (1 - p) / u = e / ((1 + e) (right e + wrong)) has a limit where wrong is 0: nothing
   is infinite at any finite z. square: gamma is 2, and u^2 keeps its digits without a logarithm. */
CE_INLINE NAME(values) NAME(focal)(REAL z, REAL y, const NAME(element_options) *o, int square, NAME(exp_args) args)
{
    REAL size = NAME(abs)(z), e = NAME(exp)(-size, args), rest = NAME(log1p_unit)(e), most = 1 / (1 + e);
    REAL wrong = z < 0 ? y : 1 - y, right = z < 0 ? 1 - y : y;
    REAL mix = NAME(fma)(right, e, wrong), u = mix * most, slope = most * NAME(fma)(-right, e, wrong);
    REAL ce = NAME(fma)(wrong, wrong == 0 ? 0 : size, rest); /* 0 * inf is 0 here, and NaN stays in e */
    REAL factor = square ? (u < 0x1p-500 ? 0 : u * u) : ce_modulation(mix, wrong, size, rest, o->gamma, args);
    REAL c = factor * (o->alpha < 0 ? 1 : NAME(fma)(o->alpha, y, (1 - o->alpha) * (1 - y)));
    REAL spread = wrong == 0 ? most : e * most / mix; /* p (1 - p) / u */
    REAL turn = ce == 0 || spread == 0 ? 0 : o->gamma * ce * spread * (1 - 2 * y);
    REAL bend = 1 + (turn == 0 ? 0 : turn * (1 - 2 * y) / u), nothing = ce == ce ? 0 : ce;
    NAME(values) r;
    r.loss = c == 0 ? nothing : NAME(times)(c, ce, o->least);
    r.grad = c == 0 ? nothing : NAME(times)(c, (z < 0 ? -slope : slope) + turn, o->least);
    r.hess = c == 0 ? nothing : NAME(times)(c, bend * (e * most * most), o->least);
    return r;
}
#endif

/* The elements of a tile; 1 if a target that counts lies outside [0, 1]. rule, square, want (0: losses, 1: gradient too,
   2: Hessian too) and weighted (a weight, sample weight or upstream is there) are constants where this is called. */
CE_INLINE int NAME(each_element)(const NAME(element_tile) *t, const NAME(element_options) *options, int64_t n,
                                 ce_rule rule, int square, int want, int weighted)
{
    ce_temperature one = CE_TEMPERATURE_1;
    NAME(exp_args) args = NAME(exp_prepare)(0, 0, &one);
    NAME(element_options) o = *options;
    const REAL *zs = t->in[CE_Z], *ys = t->in[CE_Y], *ws = t->in[CE_W], *pos_weights = t->in[CE_POS_WEIGHT];
    const REAL *ss = t->in[CE_S], *upstreams = t->in[CE_UPSTREAM];
    REAL *loss = t->loss, *grad = t->grad, *hess = t->hess;
    UINT signs = 0;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; k++) {
        REAL s = weighted ? ss[k] : 1, w = weighted ? ws[k] * s : 1;
        REAL z = s == 0 ? 0 : zs[k], y = s == 0 ? 0 : ys[k]; /* what does not count leaks nothing */
        REAL down = o.on * (1 - y) + o.off, up = (weighted ? pos_weights[k] : 1) * (o.on * y + o.off);
        NAME(values) r;
#if !REAL_IS_FLOAT /* gamma magnifies roundings: the focal loss of float32 is computed in double too */
        if (rule == CE_BINARY_FOCAL)
            r = NAME(focal)(z, y, &o, square, args);
        else
#endif
        if (rule == CE_BINARY_PROBABILITY)
            r = NAME(probability)(z, down, up);
        else
            r = NAME(binary)(z, down, up, args);
        REAL factor = weighted ? upstreams[k] * w : 1;
        REAL finite = (w == 0) & (r.loss > REAL_MAX) ? 0 : r.loss; /* 0 * inf is 0 here, NaN stays */
        REAL within = y * (1 - y);
        UINT bits;
        memcpy(&bits, &within, sizeof bits);
        signs |= bits; /* two operations of some sixty, a comparison takes four */
        loss[k] = weighted ? NAME(times)(w, finite, o.least) : r.loss;
        if (want > 0)
            grad[k] = NAME(times)(r.grad, o.scale * factor, o.least);
        if (want > 1) {
            REAL h = NAME(times)(r.hess, o.hess_scale * factor, o.least);
            hess[k] = s == 0 ? 0 : h < o.floor ? o.floor : h;
        }
    }
    int bad = 0, negative = signs >> (8 * sizeof signs - 1) != 0; /* or NaN, or -0 */
    for (int64_t k = 0; k < n && negative; k++)
        bad |= !(weighted && ss[k] == 0) && ys[k] * (1 - ys[k]) < 0;
    return bad;
}

static int NAME(run_tile)(const NAME(element_tile) *t, const NAME(element_options) *o, int64_t n, ce_rule rule, int want,
                          int weighted)
{
#define CE_WANTED(RULE, SQUARE, WEIGHTED)                                       \
    (want == 0   ? NAME(each_element)(t, o, n, RULE, SQUARE, 0, WEIGHTED)       \
     : want == 1 ? NAME(each_element)(t, o, n, RULE, SQUARE, 1, WEIGHTED)       \
                 : NAME(each_element)(t, o, n, RULE, SQUARE, 2, WEIGHTED))
#define CE_RULE(RULE, SQUARE) (weighted ? CE_WANTED(RULE, SQUARE, 1) : CE_WANTED(RULE, SQUARE, 0))
#if !REAL_IS_FLOAT
    if (rule == CE_BINARY_FOCAL)
        return o->gamma == 2 ? CE_RULE(CE_BINARY_FOCAL, 1) : CE_RULE(CE_BINARY_FOCAL, 0);
#endif
    return rule == CE_BINARY_PROBABILITY ? CE_RULE(CE_BINARY_PROBABILITY, 0) : CE_RULE(CE_BINARY, 0);
#undef CE_RULE
#undef CE_WANTED
}

static double NAME(elements)(const ce_element_job *job, int64_t first, int64_t last, int *bad)
{
    const ce_array *arrays[] = {&job->logits, &job->target,        &job->weight,
                                &job->pos_weight, &job->sample_weight, &job->upstream};
    REAL one = 1, tiles[CE_N_OPERANDS][2 * CE_ELEMENT_TILE], losses[CE_ELEMENT_TILE], grads[CE_ELEMENT_TILE];
    REAL hessians[CE_ELEMENT_TILE];
    const ce_array absent = {.data = (char *)&one, .dtype = REAL_DTYPE};
    ce_walk in[CE_N_OPERANDS], loss, grad, hess;
    int weighted = job->weight.data || job->pos_weight.data || job->sample_weight.data || job->upstream.data;
    int want = job->hess.data ? 2 : job->out.data ? 1 : 0, n_operands = weighted ? CE_N_OPERANDS : CE_Y + 1;
    NAME(element_options) options = {
        (REAL)job->on,         (REAL)job->off,   (REAL)job->gamma, (REAL)job->alpha, (REAL)job->scale,
        (REAL)job->hess_scale, (REAL)job->floor, job->logits.dtype == CE_FLOAT64 ? (REAL)DBL_MIN : (REAL)FLT_MIN};
    for (int i = 0; i < n_operands; i++) {
        ce_set_walk(&in[i], job, arrays[i]->data ? arrays[i] : &absent);
        if (in[i].period)
            NAME(fill)(&in[i], tiles[i]);
    }
    ce_set_walk(&loss, job, &job->loss);
    ce_set_walk(&grad, job, &job->out);
    ce_set_walk(&hess, job, &job->hess);
    ce_sum sum = {0, 0};
    for (int64_t i = first; i < last; i += CE_ELEMENT_TILE) {
        int64_t n = last - i < CE_ELEMENT_TILE ? last - i : CE_ELEMENT_TILE;
        REAL *grad_there = NAME(in_place)(&grad, i), *hess_there = NAME(in_place)(&hess, i);
        NAME(element_tile) t = {.loss = losses, .grad = grad_there ? grad_there : grads,
                                .hess = hess_there ? hess_there : hessians};
        for (int operand = 0; operand < n_operands; operand++)
            t.in[operand] = NAME(fetch)(&in[operand], i, n, tiles[operand]);
        *bad |= NAME(run_tile)(&t, &options, n, job->rule, want, weighted);
        if (grad.data && !grad_there)
            NAME(each_run)(&grad, i, n, grads, 1);
        if (hess.data && !hess_there)
            NAME(each_run)(&hess, i, n, hessians, 1);
        if (loss.data)
            NAME(each_run)(&loss, i, n, losses, 1);
        for (; n % CE_LANES; n++)
            losses[n] = 0;
        ce_add(&sum, NAME(sum_of_lanes)(losses, n, CE_LANES));
    }
    return ce_total(&sum);
}
