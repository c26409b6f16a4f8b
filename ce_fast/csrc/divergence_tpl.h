/* One row of KL(q || p) or KL(p || q), in double precision only: their terms nearly cancel where p is close to q.
 *
 *   forward   loss = sum_k q_k d_k,    gradient by z_k:  p_k - q_k             d_k = log q_k - log p_k
 *   reverse   loss = -sum_k p_k d_k,   gradient by z_k: -p_k (d_k + loss)
 *
 * Without another distribution log q is 0, and the reverse loss minus the entropy of p. Of log-probabilities, which have
 * no lse to follow them, the gradients are -q_k and -p_k (d_k - 1).
 */

typedef struct { /* one of the two */
    NAME(row) row;
    double pivot, lse_minus_pivot; /* log p_k = (x_k - pivot) / temperature - lse_minus_pivot */
    double inverse_sum;            /* p_k = exp(z_k - m) inverse_sum */
    REAL most;                     /* of a log-probability, so that its exp is finite */
    NAME(exp_args) exp;
    ce_class top; /* the largest class, whose nll lse - z loses where it is near certain */
} NAME(distribution);

static NAME(distribution) NAME(distribution_of)(const ce_job *job, int64_t i)
{
    NAME(distribution) d = {{job, job->logits.data + NAME(offset)(job, &job->logits, i), NULL, NULL, -1, 0, NULL, NULL}};
    d.inverse_sum = 1;
    d.most = job->log_probs ? 709 : INFINITY;
    d.exp = NAME(exp_prepare)(0, 0, &job->temperature);
    if (job->log_probs)
        return d;
    d.row.t = NAME(argmax)(&d.row, 0);
    double x_t = NAME(logit)(&d.row, d.row.t);
    NAME(sums) sums = NAME(statistics)(&d.row, x_t, 0, job->n_classes);
    ce_row_stats stats = NAME(row_stats)(&d.row, &sums, x_t);
    d.pivot = stats.pivot;
    d.lse_minus_pivot = stats.lse_minus_pivot;
    d.inverse_sum = 1 / stats.sum;
    d.exp = sums.exp;
    d.top = stats.target;
    return d;
}

/* log p_k of tile [j, j + n), and p_k */
static void NAME(log_prob_tile)(const NAME(distribution) *d, int64_t j, int64_t n, REAL *log_p, REAL *p)
{
    const NAME(row) *row = &d->row;
    NAME(load_logits)(row, j, n, log_p);
    const REAL most = d->most, pivot = d->pivot, t = row->job->temperature.value;
    const NAME(exp_args) args = d->exp;
    for (int64_t k = 0; k < n; k++) {
        REAL x = log_p[k], e = NAME(exp)(x, args) * d->inverse_sum;
        p[k] = x > most ? INFINITY : e;
        log_p[k] = x - pivot;
    }
    for (int64_t k = 0; k < n && t != 1; k++)
        log_p[k] /= t;
    for (int64_t k = 0; k < n; k++)
        log_p[k] -= d->lse_minus_pivot;
    if (row->t < j || row->t >= j + n)
        return;
    p[row->t - j] = d->top.p;
    log_p[row->t - j] = -d->top.nll;
}

static void NAME(pair_tile)(const NAME(distribution) *model, const NAME(distribution) *other, int64_t j, int64_t n,
                            REAL *p, REAL *q, REAL *d)
{
    REAL log_p[CE_TILE];
    NAME(log_prob_tile)(model, j, n, log_p, p);
    for (int64_t k = 0; k < n; k++)
        d[k] = q[k] = 0;
    if (other->row.x)
        NAME(log_prob_tile)(other, j, n, d, q);
    for (int64_t k = 0; k < n; k++)
        d[k] -= log_p[k];
}

/* d + exp(-d) - 1 for |d| <= 0.5, by its series */
CE_INLINE REAL NAME(bregman)(REAL d)
{
    REAL sum = 1;
#pragma GCC unroll 16
    for (int i = 16; i > 2; i--)
        sum = 1 - sum * (d * ((REAL)1 / (REAL)i));
    return sum * d * d / 2;
}

/* sum_k p_k log(p_k / q_k) = sum_k p_k (d + exp(-d) - 1), for p and q have the same sum: no term is negative, and none
   loses its digits where p is close to q. Of log-probabilities, which are as they are, the plain sum. */
static double NAME(divergence)(const NAME(distribution) *model, const NAME(distribution) *other)
{
    const ce_job *job = model->row.job;
    int reverse = job->rule == CE_KL_REVERSE, plain = job->log_probs || !other->row.x;
    REAL p[CE_TILE], q[CE_TILE], d[CE_TILE], near[CE_TILE];
    const REAL *mass = reverse ? p : q, *against = reverse ? q : p, sign = reverse ? -1 : 1;
    ce_sum sum = {0, 0};
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        double lanes[CE_LANES];
        for (int l = 0; l < CE_LANES; l++) /* no memset, see setup.py */
            lanes[l] = 0;
        NAME(pair_tile)(model, other, j, n, p, q, d);
        for (int64_t k = 0; k < n; k++) { /* in a loop of its own: where it may be skipped, nothing is vectorized */
            d[k] *= sign;
            near[k] = mass[k] * NAME(bregman)(d[k]);
        }
        for (int64_t k = 0; k < n; k++) {
            REAL product = mass[k] * d[k], rest = plain ? 0 : against[k] - mass[k];
            product = mass[k] == 0 && against[k] == against[k] ? 0 : product; /* mass 0 against -inf contributes 0 */
            d[k] = !plain && d[k] >= (REAL)-0.5 && d[k] <= (REAL)0.5 ? near[k] : product + rest;
        }
        for (int64_t k = n; k < CE_TILE; k++)
            d[k] = 0;
        for (int64_t k = 0; k < n; k += CE_LANES)
            for (int l = 0; l < CE_LANES; l++)
                lanes[l] += d[k + l];
        ce_add(&sum, NAME(sum_lanes)(lanes, CE_LANES));
    }
    return ce_total(&sum);
}

/* g by z to d, h by z to q */
static void NAME(divergence_slopes)(const NAME(distribution) *model, double shift, int64_t j, int64_t n, const REAL *p,
                                    REAL *q, REAL *d)
{
    const ce_job *job = model->row.job;
    int64_t top = model->row.t - j;
    int reverse = job->rule == CE_KL_REVERSE;
    for (int64_t k = 0; k < n; k++) {
        REAL forward = (job->log_probs ? 0 : p[k]) - q[k];
        d[k] = !reverse ? forward : p[k] == 0 ? 0 : -p[k] * (d[k] + shift);
        q[k] = p[k] * (1 - p[k]);
    }
    if (top >= 0 && top < n)
        q[top] = model->top.p * model->top.rest;
}

static void NAME(write_divergence)(const NAME(distribution) *model, const NAME(distribution) *other, double shift,
                                   double upstream, char *out, char *hess)
{
    const ce_job *job = model->row.job;
    const ce_array *logits = &job->logits;
    REAL p[CE_TILE], q[CE_TILE], d[CE_TILE], slope[CE_TILE];
    for (int64_t j = 0; j < job->n_classes; j += CE_TILE) {
        int64_t n = job->n_classes - j < CE_TILE ? job->n_classes - j : CE_TILE;
        NAME(pair_tile)(model, other, j, n, p, q, d);
        NAME(divergence_slopes)(model, shift, j, n, p, q, d);
        for (int64_t k = 0; k < n; k++)
            slope[k] = 1;
        if (job->softcap != 0) {
            NAME(load)(model->row.x + j * logits->class_stride, logits->class_stride, logits->dtype, n, p);
            NAME(cap_tile)(job, p, slope, n);
        }
        for (int64_t k = 0; k < n; k++) {
            REAL h = job->hess_scale * upstream * q[k] * slope[k] * slope[k];
            q[k] = h < job->floor ? job->floor : h;
            d[k] *= job->scale * upstream * slope[k];
        }
        NAME(store)(out + j * job->out.class_stride, job->out.class_stride, job->out.dtype, n, d);
        if (hess)
            NAME(store)(hess + j * job->hess.class_stride, job->hess.class_stride, job->hess.dtype, n, q);
    }
}

static double NAME(divergence_row)(const ce_job *job, int64_t i, double sample_weight, char *out, char *hess)
{
    ce_job other_job = *job;
    other_job.logits = job->soft;
    other_job.softcap = 0;
    NAME(distribution) model = NAME(distribution_of)(job, i), other = {{0}};
    if (job->soft.data)
        other = NAME(distribution_of)(&other_job, i);
    double loss = NAME(divergence)(&model, &other);
    double upstream = sample_weight * (job->upstream ? job->upstream[i] : 1);
    if (out && isnan(loss))
        NAME(fill_row)(job, out, hess, (REAL)NAN);
    else if (out)
        NAME(write_divergence)(&model, &other, job->log_probs ? -1 : loss, upstream, out, hess);
    return sample_weight * loss;
}
