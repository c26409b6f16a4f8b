/* Few rows of many classes: threads take parts of a row. Included once for each REAL and each ISA.
 *
 *   rest = sum over parts, in index order, of rest_part exp(m_part - m)      m: the largest reference of the parts
 *
 * The parts are those of the shape, whatever the number of threads, and so are the bits.
 */
typedef struct {
    int counts;
    double sample_weight, x_t;
    NAME(row) row;
    NAME(sums) sums;
    NAME(slopes) slopes;
} NAME(cut_row);

static int64_t NAME(n_parts)(const ce_job *job)
{
    return (job->n_classes + job->part_classes - 1) / job->part_classes;
}

/* Class indices or softmax, and nothing that takes a row's classes again before the gradient. */
static size_t NAME(parts_scratch)(const ce_job *job)
{
    if (!job->part_classes || job->soft.data || job->left_out || job->hess.data || job->lse || job->softcap != 0)
        return 0;
    if (job->rule > CE_GENERALIZED || (job->off != 0 && job->rule != CE_CROSS_ENTROPY))
        return 0;
    if (job->emit == CE_LOG_SOFTMAX || (!job->target && job->emit != CE_GRADIENT))
        return 0;
    int64_t n_tiles = (job->n_classes + CE_TILE - 1) / CE_TILE;
    size_t of_row = sizeof(NAME(cut_row)) + (size_t)NAME(n_parts)(job) * sizeof(NAME(sums));
    return (size_t)job->n_rows * (of_row + (size_t)n_tiles * sizeof(ce_reference));
}

/* the lower of two references rises to the other; sums that never met a finite logit have none */
static void NAME(add_sums)(NAME(sums) *s, NAME(sums) part, const ce_temperature *t)
{
    if (part.bound > s->bound)
        NAME(set_reference)(s, part.pivot, t);
    else if (s->bound > part.bound)
        NAME(set_reference)(&part, s->pivot, t);
    ce_add(&s->rest, ce_total(&part.rest));
    ce_add(&s->mass, ce_total(&part.mass));
    ce_add(&s->moment, ce_total(&part.moment));
    s->infinite |= part.infinite;
}

static void NAME(begin_row)(const ce_job *job, int64_t i, NAME(cut_row) *cut, ce_reference *tiles, ce_tally *tally)
{
    char *out = job->emit ? job->out.data + NAME(offset)(job, &job->out, i) : NULL;
    int64_t target = job->target ? ce_target_at(job->target, job->target_type, i) : -1;
    cut->sample_weight = job->sample_weight ? job->sample_weight[i] : 1;
    cut->counts = ce_tally_row(job, i, target, cut->sample_weight, tally);
    cut->row = NAME(row_of)(job, i, target, out, tiles);
    cut->x_t = cut->counts && target >= 0 ? NAME(logit)(&cut->row, target) : 0; /* the parts may be in place */
}

static void NAME(finish_row)(const ce_job *job, int64_t i, NAME(cut_row) *cut, const NAME(sums) *parts, ce_tally *tally)
{
    double loss = 0;
    if (cut->counts) {
        cut->sums = parts[0];
        for (int64_t p = 1; p < NAME(n_parts)(job); p++)
            NAME(add_sums)(&cut->sums, parts[p], &job->temperature);
        cut->slopes = NAME(slopes_of)(&cut->row, &cut->sums, cut->x_t, i, cut->sample_weight);
        loss = cut->sample_weight * cut->slopes.rule.loss;
    }
    ce_add(&tally->loss, loss);
    if (job->loss)
        ((REAL *)job->loss)[i] = (REAL)loss;
}

static void NAME(parts)(const ce_job *job, ce_phase phase, int64_t unit, void *scratch, ce_tally *tally)
{
    int64_t n_parts = NAME(n_parts)(job), n_tiles = (job->n_classes + CE_TILE - 1) / CE_TILE;
    NAME(cut_row) *cuts = scratch;
    NAME(sums) *parts = (NAME(sums) *)(cuts + job->n_rows);
    ce_reference *tiles = (ce_reference *)(parts + job->n_rows * n_parts);
    if (phase == CE_BEGIN) {
        NAME(begin_row)(job, unit, &cuts[unit], tiles + unit * n_tiles, tally);
        return;
    }
    if (phase == CE_FINISH) {
        NAME(finish_row)(job, unit, &cuts[unit], parts + unit * n_parts, tally);
        return;
    }
    NAME(cut_row) *cut = &cuts[unit / n_parts];
    int64_t first = unit % n_parts * job->part_classes, last = first + job->part_classes;
    last = last < job->n_classes ? last : job->n_classes;
    if (phase == CE_STATISTICS && cut->counts)
        parts[unit] = NAME(statistics)(&cut->row, cut->x_t, first, last);
    else if (phase == CE_WRITE && (!cut->counts || isnan(cut->slopes.stats.lse)))
        NAME(write_constant)(&job->out, cut->row.out, cut->counts ? (REAL)NAN : 0, first, last);
    else if (phase == CE_WRITE)
        NAME(write_gradient)(&cut->row, &cut->sums, &cut->slopes, NULL, first, last);
}
