/* NULL, absurd and broken arguments of every function of training: a clear error, cleared out-parameters. */
#include "train.h"

#define GARBAGE(type) ((type *)(uintptr_t)0x10)
#define BROKEN "caf\xe9"

static void train_options(void) {
    wst_train_options *o = GARBAGE(wst_train_options);
    INVALID("stage: expected WST_STAGE_A (0), WST_STAGE_B (1), WST_STAGE_C (2), WST_STAGE_PAIR (3), found 4",
            wst_train_options_new(4, &o, &error));
    CHECK(o == NULL);
    INVALID("stage", wst_train_options_new(-1, &o, &error));
    INVALID("out", wst_train_options_new(WST_STAGE_C, NULL, &error));
    for (wst_stage stage = WST_STAGE_A; stage <= WST_STAGE_PAIR; ++stage) {
        OK(wst_train_options_new(stage, &o, &error));
        wst_train_options_free(o);
    }
    OK(wst_train_options_new(WST_STAGE_C, &o, &error));
    wst_cancel *cancel = wst_cancel_new();
    INVALID("options", wst_train_options_set_learning_rate(NULL, 1e-4f, &error));
    INVALID("options", wst_train_options_set_betas(NULL, 0.9f, 0.95f, &error));
    INVALID("options", wst_train_options_set_weight_decay(NULL, 0.01f, &error));
    INVALID("options", wst_train_options_set_warmup_steps(NULL, 1, &error));
    INVALID("options", wst_train_options_set_grad_clip(NULL, 1, &error));
    INVALID("options", wst_train_options_set_grad_accumulation(NULL, 1, &error));
    INVALID("options", wst_train_options_set_ema(NULL, 0.9f, 1, 1, &error));
    INVALID("options", wst_train_options_set_text_dropout(NULL, 0.1f, &error));
    INVALID("options", wst_train_options_set_seed(NULL, 1, &error));
    INVALID("options", wst_train_options_set_compute_dtype(NULL, WST_F32, &error));
    INVALID("options", wst_train_options_set_cancel(NULL, cancel, &error));
    INVALID("options", wst_train_options_set(NULL, "seed", "1", &error));
    INVALID("learning_rate", wst_train_options_set_learning_rate(o, -1, &error));
    INVALID("learning_rate", wst_train_options_set_learning_rate(o, NAN, &error));
    INVALID("learning_rate", wst_train_options_set_learning_rate(o, INFINITY, &error));
    INVALID("beta1", wst_train_options_set_betas(o, 1, 0.9f, &error));
    INVALID("beta2", wst_train_options_set_betas(o, 0.9f, NAN, &error));
    INVALID("weight_decay", wst_train_options_set_weight_decay(o, -0.1f, &error));
    INVALID("grad_clip", wst_train_options_set_grad_clip(o, NAN, &error));
    INVALID("grad_accumulation", wst_train_options_set_grad_accumulation(o, 0, &error));
    INVALID("grad_accumulation", wst_train_options_set_grad_accumulation(o, UINT32_MAX, &error));
    INVALID("ema decay", wst_train_options_set_ema(o, 1.5f, 1, 1, &error));
    INVALID("ema every", wst_train_options_set_ema(o, 0.9f, 1, 0, &error));
    INVALID("text_dropout", wst_train_options_set_text_dropout(o, 1.5f, &error));
    INVALID("dtype", wst_train_options_set_compute_dtype(o, 99, &error));
    INVALID("compute_dtype", wst_train_options_set_compute_dtype(o, WST_I64, &error));
    INVALID("compute_dtype", wst_train_options_set_compute_dtype(o, WST_I8, &error));
    INVALID("key", wst_train_options_set(o, NULL, "1", &error));
    INVALID("value", wst_train_options_set(o, "seed", NULL, &error));
    INVALID("flavour", wst_train_options_set(o, "flavour", "sweet", &error));
    INVALID("learning_rate", wst_train_options_set(o, "flavour", "sweet", &error)); /* the list of keys */
    INVALID("byte 3", wst_train_options_set(o, "seed", BROKEN, &error));
    INVALID("seed", wst_train_options_set(o, "seed", "minus one", &error));
    OK(wst_train_options_set_learning_rate(o, 1e-4f, &error));
    OK(wst_train_options_set_betas(o, 0.9f, 0.95f, &error));
    OK(wst_train_options_set_weight_decay(o, 0, &error));
    OK(wst_train_options_set_warmup_steps(o, UINT64_MAX, &error));
    OK(wst_train_options_set_grad_clip(o, 0, &error));
    OK(wst_train_options_set_grad_accumulation(o, 2, &error));
    OK(wst_train_options_set_ema(o, 0, 0, 1, &error));
    OK(wst_train_options_set_text_dropout(o, 1, &error));
    OK(wst_train_options_set_seed(o, UINT64_MAX, &error));
    OK(wst_train_options_set_compute_dtype(o, WST_BF16, &error));
    OK(wst_train_options_set_cancel(o, cancel, &error));
    OK(wst_train_options_set_cancel(o, NULL, &error));
    OK(wst_train_options_set(o, "ema_every", "7", &error));
    wst_cancel_free(cancel);
    wst_train_options_free(o);
}

static void trainers(const wst_model *model) {
    wst_train_options *options = quick_training(WST_STAGE_C);
    wst_trainer *trainer = GARBAGE(wst_trainer);
    INVALID("base", wst_trainer_new(NULL, options, &trainer, &error));
    CHECK(trainer == NULL);
    INVALID("options", wst_trainer_new(model, NULL, &trainer, &error));
    INVALID("out", wst_trainer_new(model, options, NULL, &error));
    OK(wst_train_options_set_grad_accumulation(options, 3, &error));
    OK(wst_trainer_new(model, options, &trainer, &error));
    wst_train_options_free(options);

    wst_image *a = picture(SIDE, 0), *b = picture(SIDE / 2, 1), *c = picture(SIDE, 2);
    const wst_image *const images[] = {a, c, a}, *const mixed[] = {a, b, c}, *const missing[] = {a, NULL, c};
    const char *const captions[] = {"a", "b", ""}, *const broken[] = {"a", BROKEN, "c"}, *const none[] = {"a", "b", NULL};
    wst_train_metrics m;
    memset(&m, 0xAB, sizeof m);
    m.struct_size = sizeof m;
    INVALID("trainer", wst_trainer_step(NULL, images, captions, 3, &m, &error));
    CHECK(m.step == 0 && m.loss == 0 && m.skipped == 0);
    INVALID("images: expected a pointer", wst_trainer_step(trainer, NULL, captions, 3, &m, &error));
    INVALID("captions: expected a pointer", wst_trainer_step(trainer, images, NULL, 3, &m, &error));
    INVALID("count: expected at least 1", wst_trainer_step(trainer, images, captions, 0, &m, &error));
    INVALID("count", wst_trainer_step(trainer, images, captions, SIZE_MAX, &m, &error));
    INVALID("images[1]", wst_trainer_step(trainer, missing, captions, 3, &m, &error));
    INVALID("images: expected pictures of one size, 64 x 64", wst_trainer_step(trainer, mixed, captions, 3, &m, &error));
    INVALID("captions[1]: expected UTF-8 text", wst_trainer_step(trainer, images, broken, 3, &m, &error));
    INVALID("captions[2]", wst_trainer_step(trainer, images, none, 3, &m, &error));
    INVALID("out", wst_trainer_step(trainer, images, captions, 3, NULL, &error));
    INVALID("grad_accumulation", wst_trainer_step(trainer, images, captions, 2, &m, &error));
    m.struct_size = 4;
    INVALID("out->struct_size", wst_trainer_step(trainer, images, captions, 3, &m, &error));
    /* An older caller gets its part. */
    m.struct_size = 20;
    m.grad_norm = -1;
    OK(wst_trainer_step(trainer, images, captions, 3, &m, &error));
    CHECK(m.step == 1 && m.loss > 0 && m.grad_norm == -1);

    wst_samples *samples = GARBAGE(wst_samples);
    INVALID("trainer", wst_trainer_prepare(NULL, images, captions, 3, &samples, &error));
    CHECK(samples == NULL);
    INVALID("images", wst_trainer_prepare(trainer, NULL, captions, 3, &samples, &error));
    INVALID("captions", wst_trainer_prepare(trainer, images, NULL, 3, &samples, &error));
    INVALID("count", wst_trainer_prepare(trainer, images, captions, 0, &samples, &error));
    INVALID("images: expected pictures of one size", wst_trainer_prepare(trainer, mixed, captions, 3, &samples, &error));
    INVALID("out", wst_trainer_prepare(trainer, images, captions, 3, NULL, &error));
    CHECK(samples == NULL);

    wst_train_progress progress = {.struct_size = sizeof progress, .step = 9};
    INVALID("trainer", wst_trainer_progress(NULL, &progress, &error));
    CHECK(progress.step == 0);
    INVALID("out", wst_trainer_progress(trainer, NULL, &error));
    progress.struct_size = 0;
    INVALID("struct_size", wst_trainer_progress(trainer, &progress, &error));
    INVALID("trainer", wst_trainer_save(NULL, "x", &error));
    INVALID("directory", wst_trainer_save(trainer, NULL, &error));
    INVALID("directory", wst_trainer_save(trainer, "", &error));
    INVALID("byte 3", wst_trainer_save(trainer, BROKEN, &error));
    INVALID("trainer", wst_trainer_load(NULL, "x", &error));
    INVALID("directory", wst_trainer_load(trainer, NULL, &error));
    INVALID("trainer", wst_trainer_export(NULL, "x", &error));
    INVALID("model_directory", wst_trainer_export(trainer, NULL, &error));
    CHECK(steps_of(trainer) == 1);
    wst_trainer_free(trainer);
    wst_image_free(a);
    wst_image_free(b);
    wst_image_free(c);
}

static void on_skip(wst_log_level level, const char *message, void *user_data) {
    (void)level;
    (void)message;
    (void)user_data;
}

static void loaders(const wst_model *model) {
    wst_loader_options *o = GARBAGE(wst_loader_options);
    INVALID("path", wst_loader_options_new(NULL, &o, &error));
    CHECK(o == NULL);
    INVALID("path", wst_loader_options_new("", &o, &error));
    INVALID("byte 3", wst_loader_options_new(BROKEN, &o, &error));
    INVALID("out", wst_loader_options_new("x", NULL, &error));
    OK(wst_loader_options_new("/no/such/data", &o, &error));
    INVALID("options", wst_loader_options_add_path(NULL, "x", &error));
    INVALID("options", wst_loader_options_set_side(NULL, 64, &error));
    INVALID("options", wst_loader_options_set_crop(NULL, WST_CROP_CENTRE, &error));
    INVALID("options", wst_loader_options_set_flip(NULL, 0.5f, &error));
    INVALID("options", wst_loader_options_set_batch_size(NULL, 2, &error));
    INVALID("options", wst_loader_options_set_shuffle(NULL, 1, &error));
    INVALID("options", wst_loader_options_set_seed(NULL, 1, &error));
    INVALID("options", wst_loader_options_set_passes(NULL, WST_PASSES_ONE, &error));
    INVALID("options", wst_loader_options_set_threads(NULL, 1, &error));
    INVALID("options", wst_loader_options_set_rank(NULL, 0, 1, &error));
    INVALID("options", wst_loader_options_set_log(NULL, on_skip, NULL, &error));
    INVALID("options", wst_loader_options_set(NULL, "seed", "1", &error));
    INVALID("path", wst_loader_options_add_path(o, NULL, &error));
    INVALID("path", wst_loader_options_add_path(o, "", &error));
    INVALID("side", wst_loader_options_set_side(o, 0, &error));
    INVALID("side", wst_loader_options_set_side(o, UINT32_MAX, &error));
    INVALID("crop: expected WST_CROP_CENTRE (0), WST_CROP_RANDOM (1), found 2", wst_loader_options_set_crop(o, 2, &error));
    INVALID("flip", wst_loader_options_set_flip(o, NAN, &error));
    INVALID("batch_size", wst_loader_options_set_batch_size(o, 0, &error));
    INVALID("shuffle_buffer", wst_loader_options_set_shuffle(o, UINT32_MAX, &error));
    INVALID("passes", wst_loader_options_set_passes(o, -1, &error));
    INVALID("threads", wst_loader_options_set_threads(o, 0, &error));
    INVALID("rank", wst_loader_options_set_rank(o, 2, 2, &error));
    INVALID("ranks", wst_loader_options_set_rank(o, 0, 0, &error));
    INVALID("key", wst_loader_options_set(o, NULL, "1", &error));
    INVALID("value", wst_loader_options_set(o, "seed", NULL, &error));
    INVALID("expected one of side, crop", wst_loader_options_set(o, "flavour", "sweet", &error));
    INVALID("max_unsafe", wst_loader_options_set(o, "max_unsafe", "nan?", &error));
    OK(wst_loader_options_set_shuffle(o, 0, &error));
    OK(wst_loader_options_set_log(o, NULL, NULL, &error));
    OK(wst_loader_options_set(o, "filter", "authors", &error));

    wst_loader *loader = GARBAGE(wst_loader);
    INVALID("options", wst_loader_open(NULL, &loader, &error));
    CHECK(loader == NULL);
    INVALID("out", wst_loader_open(o, NULL, &error));
    FAILS(WST_IO, "/no/such/data", wst_loader_open(o, &loader, &error));
    CHECK(loader == NULL);
    wst_loader_options_free(o);

    wst_trainer *trainer = quick_trainer(model, WST_STAGE_C);
    wst_batch *batch = GARBAGE(wst_batch);
    INVALID("loader", wst_loader_next(NULL, &batch, &error));
    CHECK(batch == NULL);
    wst_loader_info_t info = {.struct_size = sizeof info, .epoch = 7};
    INVALID("loader", wst_loader_info(NULL, &info, &error));
    CHECK(info.epoch == 0);
    INVALID("loader", wst_loader_resume(NULL, trainer, &error));
    wst_train_metrics m = {.struct_size = sizeof m};
    int32_t end = 7;
    INVALID("loader: expected a pointer", wst_trainer_step_from(trainer, NULL, &m, &end, &error));
    CHECK(end == 0);
    INVALID("trainer", wst_trainer_step_from(NULL, NULL, &m, &end, &error));
    INVALID("out", wst_trainer_step_from(trainer, NULL, NULL, &end, &error));
    INVALID("end", wst_trainer_step_from(trainer, NULL, &m, NULL, &error));
    INVALID("loader", wst_trainer_follow(trainer, NULL, &error));
    INVALID("trainer", wst_trainer_follow(NULL, NULL, &error));
    wst_trainer_free(trainer);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2; /* MODEL */
    train_options();
    wst_model *model = NULL;
    OK(wst_model_open(argv[1], NULL, &model, &error));
    if (model) {
        trainers(model);
        loaders(model);
    }
    wst_model_free(model);
    return summary("train_arguments");
}
