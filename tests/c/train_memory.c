/* Under failing_malloc.c: whichever allocation of training fails, alone or with all after it, the call says
 * WST_OUT_OF_MEMORY or does the right thing, and what follows is what would have followed. */
#include <limits.h>

#include "train.h"

void failing_malloc_arm(long n, long more);
long failing_malloc_seen(void);

static wst_image *images[2];
static const wst_image *const *pictures = (const wst_image *const *)images;
static const char *const captions[2] = {"a red apple", "a dog"};

typedef struct {
    wst_model *model;
    wst_trainer *trainer;
    wst_samples *samples;
    int loaded, saved;
    wst_train_metrics first, second;
} run_t;

static char checkpoint[1024], copy[1024];

/* Does what is not done yet, up to the checkpoint after two steps. */
static wst_status run(const char *folder, wst_stage stage, run_t *r) {
    wst_train_options *o = NULL;
    wst_error *error = NULL;
    wst_status status = WST_OK;
    r->first.struct_size = r->second.struct_size = sizeof r->first;
    if (!r->model) status = wst_model_open(folder, NULL, &r->model, &error);
    if (status == WST_OK && !r->trainer) {
        status = wst_train_options_new(stage, &o, &error);
        if (status == WST_OK) status = wst_train_options_set_warmup_steps(o, 0, &error);
        if (status == WST_OK) status = wst_train_options_set_ema(o, 0.5f, 0, 1, &error);
        if (status == WST_OK) status = wst_trainer_new(r->model, o, &r->trainer, &error);
        wst_train_options_free(o);
    }
    if (status == WST_OK && !r->loaded) {
        status = wst_trainer_load(r->trainer, checkpoint, &error);
        r->loaded = status == WST_OK;
    }
    if (status == WST_OK && !r->samples) status = wst_trainer_prepare(r->trainer, pictures, captions, 2, &r->samples, &error);
    if (status == WST_OK && !r->first.step)
        status = wst_trainer_step_samples(r->trainer, r->samples, NULL, 0, &r->first, &error);
    if (status == WST_OK && !r->second.step)
        status = wst_trainer_step_samples(r->trainer, r->samples, NULL, 0, &r->second, &error);
    if (status == WST_OK && !r->saved) {
        status = wst_trainer_save(r->trainer, copy, &error);
        r->saved = status == WST_OK;
    }
    const char *message = wst_error_message(error); /* the library's, or the system's of a file */
    if (status == WST_OUT_OF_MEMORY && !strstr(message, "out of memory") && !strstr(message, "annot allocate")) ++failed;
    if (status != WST_OK && status != WST_OUT_OF_MEMORY) fprintf(stderr, "%s\n", message);
    wst_error_free(error);
    return status;
}

static void end(run_t *r) {
    wst_samples_free(r->samples);
    wst_trainer_free(r->trainer);
    wst_model_free(r->model);
}

static int same(const run_t *a, const run_t *b) {
    return memcmp(&a->first, &b->first, sizeof a->first) == 0 && memcmp(&a->second, &b->second, sizeof a->second) == 0;
}

int main(int argc, char **argv) {
    if (argc < 3) return 2; /* MODEL SCRATCH [RUNS] */
    long runs = argc > 3 ? atol(argv[3]) : 1000000;
    for (uint32_t i = 0; i < 2; ++i) images[i] = picture(SIDE, i);
    for (wst_stage stage = WST_STAGE_A; stage <= WST_STAGE_PAIR; ++stage) {
        snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint-%d", argv[2], stage);
        snprintf(copy, sizeof copy, "%s/copy-%d", argv[2], stage);
        run_t before = {0}, right = {0};
        before.loaded = 1;
        CHECK(run(argv[1], stage, &before) == WST_OK);
        OK(wst_trainer_save(before.trainer, checkpoint, &error));
        end(&before);
        failing_malloc_arm(0, -1);
        CHECK(run(argv[1], stage, &right) == WST_OK);
        long count = failing_malloc_seen();
        end(&right);
        CHECK(count > 0);
        long step = count > runs ? (count + runs - 1) / runs : 1;
        long survived = 0;
        for (long turn = 0; turn <= (count - 1) / step * 2 + 1; ++turn) {
            long n = 1 + turn / 2 * step;
            run_t r = {0};
            failing_malloc_arm(n, turn % 2 ? LONG_MAX : 0);
            wst_status status = run(argv[1], stage, &r);
            int reached = failing_malloc_seen() >= n;
            failing_malloc_arm(-1, 0);
            if (status == WST_OK) ++survived;
            else CHECK(reached && status == WST_OUT_OF_MEMORY);
            CHECK(run(argv[1], stage, &r) == WST_OK);
            CHECK(same(&right, &r));
            end(&r);
        }
        printf("train_memory: %ld allocations, every %ld. failed, %ld runs survived\n", count, step, survived);
    }
    for (uint32_t i = 0; i < 2; ++i) wst_image_free(images[i]);
    return summary("train_memory");
}
