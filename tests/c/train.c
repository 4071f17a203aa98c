/* Training: steps, prepared samples, checkpoints, export, sums over ranks, cancelling, frees, panics. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <time.h>

#include "train.h"

static wst_image *images[PICTURES];
static const wst_image *const *pictures = (const wst_image *const *)images;
static const char *const captions[PICTURES] = {"a red apple", "", "a dog", "a blue car"};

static void nap(int milliseconds) {
    struct timespec time = {0, milliseconds * 1000000L};
    nanosleep(&time, NULL);
}

static wst_train_metrics step(wst_trainer *trainer) {
    wst_train_metrics m = {.struct_size = sizeof m};
    OK(wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    return m;
}

static int same_metrics(wst_train_metrics a, wst_train_metrics b) {
    return memcmp(&a, &b, sizeof a) == 0;
}

/* All stages that there are learn from the same pictures. */
static void steps(const wst_model *model) {
    const wst_stage stages[] = {WST_STAGE_A, WST_STAGE_B, WST_STAGE_C, WST_STAGE_PAIR};
    for (size_t s = 0; s < sizeof stages / sizeof *stages; ++s) {
        wst_trainer *trainer = quick_trainer(model, stages[s]);
        for (uint64_t i = 1; i <= 3; ++i) {
            wst_train_metrics m = step(trainer);
            CHECK(m.step == i && !m.skipped && isfinite(m.loss) && m.loss > 0 && m.grad_norm > 0);
            CHECK(m.learning_rate == 1e-3f && m.token_accuracy >= 0 && m.token_accuracy <= 1);
        }
        wst_train_progress progress = {.struct_size = sizeof progress, .reserved = 7};
        OK(wst_trainer_progress(trainer, &progress, &error));
        CHECK(progress.step == 3 && progress.skipped == 0 && progress.samples == 3 * PICTURES && !progress.reserved);
        wst_trainer_free(trainer);
    }
    /* One picture many times: the loss falls. */
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_B);
    wst_train_metrics first = step(trainer), last = first;
    for (int i = 0; i < 30; ++i) last = step(trainer);
    CHECK(last.loss < first.loss);
    wst_trainer_free(trainer);
}

static void prepared(const wst_model *model) {
    wst_trainer *plain = quick_trainer(model, WST_STAGE_C), *trainer = quick_trainer(model, WST_STAGE_C);
    wst_samples *samples = NULL, *more = NULL;
    OK(wst_trainer_prepare(trainer, pictures, captions, 2, &samples, &error));
    OK(wst_trainer_prepare(trainer, pictures + 2, captions + 2, 2, &more, &error));
    CHECK(wst_samples_count(samples) == 2);
    OK(wst_samples_append(samples, more, &error));
    wst_samples_free(more);
    CHECK(wst_samples_count(samples) == 4);
    wst_train_metrics m = {.struct_size = sizeof m};
    const size_t order[] = {0, 1, 2, 3}, turned[] = {3, 3, 0}, wrong[] = {0, 4};
    OK(wst_trainer_step_samples(trainer, samples, order, 4, &m, &error));
    CHECK(same_metrics(m, step(plain)));
    OK(wst_trainer_step_samples(trainer, samples, NULL, 0, &m, &error));
    CHECK(same_metrics(m, step(plain)));
    OK(wst_trainer_step_samples(trainer, samples, turned, 3, &m, &error));
    INVALID("indices[1]: expected less than 4, found 4", wst_trainer_step_samples(trainer, samples, wrong, 2, &m, &error));
    CHECK(m.step == 0 && m.loss == 0 && m.struct_size == sizeof m);
    INVALID("indices: expected a pointer", wst_trainer_step_samples(trainer, samples, NULL, 2, &m, &error));
    INVALID("trainer", wst_trainer_step_samples(NULL, samples, order, 4, &m, &error));
    INVALID("samples", wst_trainer_step_samples(trainer, NULL, order, 4, &m, &error));
    INVALID("out", wst_trainer_step_samples(trainer, samples, order, 4, NULL, &error));
    OK(wst_samples_append(samples, samples, &error));
    CHECK(wst_samples_count(samples) == 8);
    INVALID("to", wst_samples_append(NULL, samples, &error));
    INVALID("from", wst_samples_append(samples, NULL, &error));
    /* Another caption makes another loss, the old one the same. */
    wst_trainer *a = quick_trainer(model, WST_STAGE_C), *b = quick_trainer(model, WST_STAGE_C);
    wst_train_metrics x = {.struct_size = sizeof x}, y = {.struct_size = sizeof y};
    OK(wst_trainer_recaption(a, samples, 0, "a green pear", &error));
    OK(wst_trainer_step_samples(a, samples, order, 1, &x, &error));
    OK(wst_trainer_recaption(a, samples, 0, captions[0], &error));
    OK(wst_trainer_step_samples(b, samples, order, 1, &y, &error));
    CHECK(x.loss != y.loss);
    INVALID("index: expected less than 8, found 8", wst_trainer_recaption(a, samples, 8, "x", &error));
    INVALID("caption", wst_trainer_recaption(a, samples, 0, NULL, &error));
    INVALID("byte 3", wst_trainer_recaption(a, samples, 0, "caf\xe9", &error));
    INVALID("samples", wst_trainer_recaption(a, NULL, 0, "x", &error));
    INVALID("trainer", wst_trainer_recaption(NULL, samples, 0, "x", &error));
    wst_trainer_free(a);
    wst_trainer_free(b);
    /* Samples of another stage lack what this one needs. */
    wst_trainer *other = quick_trainer(model, WST_STAGE_B);
    INVALID("samples", wst_trainer_step_samples(other, samples, order, 2, &m, &error));
    wst_trainer_free(other);
    wst_trainer_free(trainer);
    wst_trainer_free(plain);
    wst_samples_free(samples); /* after its trainer */
}

/* A run that was killed and taken up again takes the steps that the other one takes. */
static void checkpoints(const wst_model *model, const char *scratch) {
    char folder[1024], nowhere[1100];
    for (wst_stage stage = WST_STAGE_A; stage <= WST_STAGE_PAIR; ++stage) {
        snprintf(folder, sizeof folder, "%s/checkpoint-%d", scratch, stage);
        wst_trainer *whole = quick_trainer(model, stage);
        (void)step(whole);
        (void)step(whole);
        OK(wst_trainer_save(whole, folder, &error));
        OK(wst_trainer_save(whole, folder, &error)); /* over an old one */
        wst_trainer *resumed = quick_trainer(model, stage);
        (void)step(resumed); /* is forgotten */
        OK(wst_trainer_load(resumed, folder, &error));
        CHECK(steps_of(resumed) == 2);
        for (int i = 0; i < 3; ++i) CHECK(same_metrics(step(whole), step(resumed)));
        wst_trainer_free(whole);
        wst_trainer_free(resumed);
    }
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_B);
    FAILS(WST_FORMAT, "stage", wst_trainer_load(trainer, folder, &error));
    CHECK(steps_of(trainer) == 0 && step(trainer).step == 1);
    snprintf(nowhere, sizeof nowhere, "%s/state.json/below", folder); /* below a file */
    FAILS(WST_IO, "state.json", wst_trainer_load(trainer, nowhere, &error));
    FAILS(WST_IO, "state.json", wst_trainer_save(trainer, nowhere, &error));
    FAILS(WST_IO, "state.json", wst_trainer_export(trainer, nowhere, &error));
    FAILS(WST_IO, scratch, wst_trainer_load(trainer, scratch, &error)); /* no checkpoint */
    CHECK(step(trainer).step == 2);
    wst_trainer_free(trainer);
}

static wst_image *draw(const wst_model *model) {
    wst_image *image = NULL;
    wst_generate_options *o = NULL;
    OK(wst_generate_options_new(model, &o, &error));
    OK(wst_generate_options_add_prompt(o, "a red apple", NULL, &error));
    OK(wst_generate_options_set_stage_c(o, 3, 2.0f, &error));
    OK(wst_generate_options_set_stage_b(o, 2, 1.0f, &error));
    OK(wst_generate(model, o, &image, 1, &error));
    wst_generate_options_free(o);
    return image;
}

static void exported(const wst_model *model, const char *scratch) {
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/exported", scratch);
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_C);
    (void)step(trainer);
    (void)step(trainer);
    OK(wst_trainer_export(trainer, folder, &error));
    wst_trainer_free(trainer);
    wst_model *trained = NULL;
    OK(wst_model_open(folder, NULL, &trained, &error));
    wst_image *before = draw(model), *after = draw(trained);
    CHECK(wst_image_width(after) == wst_image_width(before) && !same_image(before, after));
    wst_image_free(before);
    wst_image_free(after);
    wst_model_free(trained);
}

/* An adapter: trained, saved, put under an opened model, merged into a folder; the same picture each time. */
static void adapters(const wst_model *model, const char *base, const char *scratch) {
    char file[1024], merged[1024], exported[1024];
    snprintf(file, sizeof file, "%s/adapter.safetensors", scratch);
    snprintf(merged, sizeof merged, "%s/merged", scratch);
    snprintf(exported, sizeof exported, "%s/with-adapter", scratch);
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_C);
    FAILS(WST_UNSUPPORTED, "lora_rank", wst_trainer_save_adapter(trainer, file, &error));
    INVALID("path", wst_trainer_save_adapter(trainer, "", &error));
    INVALID("trainer", wst_trainer_save_adapter(NULL, file, &error));
    wst_trainer_free(trainer);
    wst_train_options *options = quick_training(WST_STAGE_C);
    OK(wst_train_options_set(options, "lora_rank", "2", &error));
    OK(wst_train_options_set_learning_rate(options, 0.1f, &error));
    OK(wst_trainer_new(model, options, &trainer, &error));
    wst_train_options_free(options);
    for (int i = 0; i < 3; ++i) (void)step(trainer);
    OK(wst_trainer_save_adapter(trainer, file, &error));
    OK(wst_trainer_export(trainer, exported, &error));
    wst_trainer_free(trainer);
    OK(wst_model_merge_adapter(base, file, 1.0f, merged, &error));
    INVALID("directory", wst_model_merge_adapter(NULL, file, 1.0f, merged, &error));
    INVALID("adapter", wst_model_merge_adapter(base, NULL, 1.0f, merged, &error));
    INVALID("out_directory", wst_model_merge_adapter(base, file, 1.0f, NULL, &error));
    INVALID("scale", wst_model_merge_adapter(base, file, NAN, merged, &error));
    FAILS(WST_IO, "nothing", wst_model_merge_adapter(base, "nothing.safetensors", 1.0f, merged, &error));
    wst_model_options *adapted = wst_model_options_new();
    INVALID("options", wst_model_options_add_lora(NULL, file, 1, &error));
    INVALID("path", wst_model_options_add_lora(adapted, NULL, 1, &error));
    INVALID("scale", wst_model_options_add_lora(adapted, file, INFINITY, &error));
    OK(wst_model_options_add_lora(adapted, file, 1, &error));
    const char *const folders[] = {base, base, merged, exported};
    wst_image *drawn[4] = {NULL};
    for (int i = 0; i < 4; ++i) {
        wst_model *opened = NULL;
        OK(wst_model_open(folders[i], i == 1 ? adapted : NULL, &opened, &error));
        drawn[i] = draw(opened);
        wst_model_free(opened);
    }
    CHECK(!same_image(drawn[0], drawn[1]) && same_image(drawn[1], drawn[2]) && same_image(drawn[2], drawn[3]));
    for (int i = 0; i < 4; ++i) wst_image_free(drawn[i]);
    wst_model_options_free(adapted);
}

/* New models: of a whole folder, and with fresh weights for a part that has none. */
static void created(const char *configs, const char *scratch) {
    char whole[1024], weights[1100], fresh[1024], again[1024];
    snprintf(whole, sizeof whole, "%s/whole", scratch);
    snprintf(weights, sizeof weights, "%s/stage_c/model.safetensors", whole);
    snprintf(fresh, sizeof fresh, "%s/fresh", scratch);
    snprintf(again, sizeof again, "%s/again", scratch);
    INVALID("configs", wst_model_create(NULL, whole, 1, &error));
    INVALID("directory", wst_model_create(configs, NULL, 1, &error));
    FAILS(WST_IO, "/nowhere", wst_model_create("/nowhere", whole, 1, &error));
    OK(wst_model_create(configs, whole, 1, &error));
    CHECK(remove(weights) == 0);
    OK(wst_model_create(whole, fresh, 1, &error));
    OK(wst_model_create(whole, again, 1, &error));
    wst_image *drawn[3] = {NULL};
    const char *const folders[] = {configs, fresh, again};
    for (int i = 0; i < 3; ++i) {
        wst_model *opened = NULL;
        OK(wst_model_open(folders[i], NULL, &opened, &error));
        drawn[i] = draw(opened);
        if (i == 1) {
            wst_trainer *trainer = quick_trainer(opened, WST_STAGE_C);
            CHECK(step(trainer).loss > 0);
            wst_trainer_free(trainer);
        }
        wst_model_free(opened);
    }
    CHECK(!same_image(drawn[0], drawn[1]) && same_image(drawn[1], drawn[2]));
    for (int i = 0; i < 3; ++i) wst_image_free(drawn[i]);

    INVALID("texts", wst_tokenizer_train(NULL, 1, 600, fresh, &error));
    INVALID("count", wst_tokenizer_train(captions, 0, 600, fresh, &error));
    INVALID("vocabulary", wst_tokenizer_train(captions, PICTURES, 5, fresh, &error));
    INVALID("directory", wst_tokenizer_train(captions, PICTURES, 600, NULL, &error));
    FAILS(WST_IO, "/nowhere", wst_tokenizer_train(captions, PICTURES, 600, "/nowhere", &error));
    OK(wst_tokenizer_train(captions, PICTURES, 600, fresh, &error));
}

/* A host that pretends to be one of two ranks whose parts are alike: every sum is twice the number. */
typedef struct {
    wst_trainer *trainer;
    pthread_t caller;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int calls, doubles, foreign, busy, answer; /* what was seen, what to return */
    int probes, frees, hold, held;             /* what to do meanwhile */
} host_t;

#define HOST {.caller = pthread_self(), .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}

static int32_t twice(void *values, size_t count, int32_t is_double, void *user_data) {
    host_t *host = user_data;
    pthread_mutex_lock(&host->lock);
    ++host->calls;
    host->doubles += is_double;
    host->foreign += !pthread_equal(pthread_self(), host->caller);
    if (host->probes) {
        wst_train_metrics m = {.struct_size = sizeof m};
        host->busy += wst_trainer_step(host->trainer, pictures, captions, 1, &m, NULL) == WST_BUSY;
    }
    if (host->frees) wst_trainer_free(host->trainer); /* only cancels */
    host->held = host->hold;
    pthread_cond_broadcast(&host->changed);
    while (host->hold) pthread_cond_wait(&host->changed, &host->lock);
    pthread_mutex_unlock(&host->lock);
    for (size_t i = 0; i < count; ++i) {
        if (is_double) ((double *)values)[i] *= 2;
        else ((float *)values)[i] *= 2;
    }
    return host->answer;
}

static void ranks(const wst_model *model) {
    host_t host = HOST;
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_B);
    INVALID("trainer", wst_trainer_set_reduce(NULL, 0, 2, twice, &host, &error));
    INVALID("ranks", wst_trainer_set_reduce(trainer, 0, 0, twice, &host, &error));
    INVALID("rank: expected less than ranks, 2, found 2", wst_trainer_set_reduce(trainer, 2, 2, twice, &host, &error));
    INVALID("sum: expected a function, found NULL", wst_trainer_set_reduce(trainer, 0, 2, NULL, NULL, &error));
    OK(wst_trainer_set_reduce(trainer, 0, 1, NULL, NULL, &error));
    OK(wst_trainer_set_reduce(trainer, 0, 2, twice, &host, &error));
    host.trainer = trainer;
    host.probes = 1;
    wst_train_metrics m = step(trainer);
    CHECK(m.step == 1 && m.loss > 0 && host.calls >= 2 && host.doubles >= 1 && host.doubles < host.calls);
    CHECK(host.foreign == 0 && host.busy == host.calls);
    wst_train_progress progress = {.struct_size = sizeof progress};
    OK(wst_trainer_progress(trainer, &progress, &error));
    CHECK(progress.samples == 2 * PICTURES);
    /* A sum that fails ends the step, and changes nothing. */
    host.answer = 5;
    FAILS(WST_IO, "the host's sum over ranks failed: its function returned 5",
          wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    CHECK(m.step == 0 && steps_of(trainer) == 1);
    host.answer = 0;
    CHECK(step(trainer).step == 2);
    int calls = host.calls;
    OK(wst_trainer_set_reduce(trainer, 0, 1, NULL, NULL, &error));
    CHECK(step(trainer).step == 3 && host.calls == calls);
    /* Freed by its own function: the step is cancelled, and the trainer can still be freed here. */
    OK(wst_trainer_set_reduce(trainer, 1, 2, twice, &host, &error));
    host.frees = 1;
    FAILS(WST_CANCELLED, "cancelled", wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    FAILS(WST_CANCELLED, "cancelled", wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    wst_trainer_free(trainer);
}

static void *step_apart(void *user_data) {
    host_t *host = user_data;
    wst_train_metrics m = {.struct_size = sizeof m};
    host->caller = pthread_self();
    return (void *)(intptr_t)wst_trainer_step(host->trainer, pictures, captions, PICTURES, &m, NULL);
}

static void *let_go(void *user_data) {
    host_t *host = user_data;
    nap(100);
    pthread_mutex_lock(&host->lock);
    host->hold = 0;
    pthread_cond_broadcast(&host->changed);
    pthread_mutex_unlock(&host->lock);
    return NULL;
}

/* Two threads: the second is turned away while a step runs; a free cancels the step and waits for it. */
static void threads(const wst_model *model) {
    host_t host = HOST;
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_C);
    if (!trainer) return;
    OK(wst_trainer_set_reduce(trainer, 0, 2, twice, &host, &error));
    host.hold = 1;
    host.trainer = trainer;
    pthread_t stepping, letting;
    pthread_create(&stepping, NULL, step_apart, &host);
    pthread_mutex_lock(&host.lock);
    while (!host.held) pthread_cond_wait(&host.changed, &host.lock);
    pthread_mutex_unlock(&host.lock);
    wst_train_metrics m = {.struct_size = sizeof m};
    wst_train_progress progress = {.struct_size = sizeof progress};
    wst_samples *samples = NULL;
    FAILS(WST_BUSY, "trainer is in use", wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_progress(trainer, &progress, &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_prepare(trainer, pictures, captions, 1, &samples, &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_save(trainer, "/nowhere/x", &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_load(trainer, "/nowhere/x", &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_export(trainer, "/nowhere/x", &error));
    FAILS(WST_BUSY, "trainer", wst_trainer_set_reduce(trainer, 0, 1, NULL, NULL, &error));
    pthread_create(&letting, NULL, let_go, &host);
    wst_trainer_free(trainer); /* waits for the step, which ends cancelled */
    CHECK(host.hold == 0);
    void *status = NULL;
    pthread_join(stepping, &status);
    CHECK((wst_status)(intptr_t)status == WST_CANCELLED);
    pthread_join(letting, NULL);
}

static void cancelled(const wst_model *model) {
    wst_train_options *options = quick_training(WST_STAGE_B);
    wst_cancel *cancel = wst_cancel_new();
    wst_trainer *trainer = NULL;
    wst_train_metrics m = {.struct_size = sizeof m};
    OK(wst_train_options_set_cancel(options, cancel, &error));
    OK(wst_trainer_new(model, options, &trainer, &error));
    (void)step(trainer);
    wst_cancel_request(cancel);
    FAILS(WST_CANCELLED, "cancelled", wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    wst_cancel_reset(cancel);
    CHECK(step(trainer).step == 2);
    wst_cancel_free(cancel);
    CHECK(step(trainer).step == 3);
    wst_trainer_free(trainer);
    wst_train_options_free(options);
}

/* A defect poisons the trainer: it can only be freed. */
static void panics(const wst_model *model) {
    wst_train_options *options = quick_training(WST_STAGE_C);
    FAILS(WST_INVALID_ARGUMENT, "test.panic", wst_train_options_set(options, "test.panic", "x", &error));
    OK(wst_train_options_set(options, "test.panic", "step", &error));
    wst_trainer *trainer = NULL;
    OK(wst_trainer_new(model, options, &trainer, &error));
    wst_train_metrics m = {.struct_size = sizeof m};
    FAILS(WST_INTERNAL, "test.panic", wst_trainer_step(trainer, pictures, captions, PICTURES, &m, &error));
    wst_train_progress progress = {.struct_size = sizeof progress};
    FAILS(WST_INTERNAL, "can only be freed", wst_trainer_progress(trainer, &progress, &error));
    wst_trainer_free(trainer);
    FAILS(WST_INTERNAL, "test.panic", wst_train_options_set(options, "test.panic", "caller", &error));
    FAILS(WST_INTERNAL, "can only be freed", wst_train_options_set_seed(options, 1, &error));
    wst_train_options_free(options);
}

/* Whatever is freed first, a trainer keeps what it needs. */
static void order_of_frees(const char *folder) {
    wst_model *model = NULL;
    OK(wst_model_open(folder, NULL, &model, &error));
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_B);
    wst_model_free(model);
    wst_samples *samples = NULL;
    OK(wst_trainer_prepare(trainer, pictures, captions, 2, &samples, &error));
    wst_train_metrics m = {.struct_size = sizeof m};
    OK(wst_trainer_step_samples(trainer, samples, NULL, 0, &m, &error));
    wst_samples_free(samples);
    CHECK(step(trainer).step == 2);
    wst_trainer_free(trainer);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2; /* MODEL SCRATCH */
    wst_model *model = NULL;
    OK(wst_model_open(argv[1], NULL, &model, &error));
    for (uint32_t i = 0; i < PICTURES; ++i) images[i] = picture(SIDE, i);
    if (model) {
        steps(model);
        prepared(model);
        checkpoints(model, argv[2]);
        exported(model, argv[2]);
        adapters(model, argv[1], argv[2]);
        created(argv[1], argv[2]);
        ranks(model);
        threads(model);
        cancelled(model);
        order_of_frees(argv[1]);
        wst_model *other = NULL; /* a panic poisons the model too */
        OK(wst_model_open(argv[1], NULL, &other, &error));
        panics(other);
        wst_model_free(other);
    }
    for (uint32_t i = 0; i < PICTURES; ++i) wst_image_free(images[i]);
    wst_model_free(model);
    return summary("train");
}
