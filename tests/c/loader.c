/* Training data: folders of pictures with captions, single passes, skipped records, steps, taking up again. */
#define _POSIX_C_SOURCE 200809L
#include <sys/stat.h>

#include "train.h"

enum { RECORDS = 6 };

static void write_text(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

/* RECORDS pictures with captions, one without, and one that is none. */
static void data_set(const char *folder) {
    char path[1200], text[64];
    CHECK(mkdir(folder, 0777) == 0);
    for (uint32_t i = 0; i <= RECORDS; ++i) {
        wst_image *image = picture(SIDE + 8 * i, i);
        snprintf(path, sizeof path, "%s/%u.png", folder, i);
        OK(wst_image_write_png(image, path, &error));
        wst_image_free(image);
        snprintf(path, sizeof path, "%s/%u.txt", folder, i);
        snprintf(text, sizeof text, " caption %u\n", i);
        if (i < RECORDS) write_text(path, text);
    }
    snprintf(path, sizeof path, "%s/broken.png", folder);
    write_text(path, "no picture");
    snprintf(path, sizeof path, "%s/broken.txt", folder);
    write_text(path, "a caption of nothing");
}

static wst_loader_options *quick_data(const char *folder, wst_passes passes) {
    wst_loader_options *options = NULL;
    OK(wst_loader_options_new(folder, &options, &error));
    OK(wst_loader_options_set_side(options, SIDE, &error));
    OK(wst_loader_options_set_batch_size(options, 4, &error));
    OK(wst_loader_options_set_flip(options, 0.5f, &error));
    OK(wst_loader_options_set_seed(options, 3, &error));
    OK(wst_loader_options_set_threads(options, 2, &error));
    OK(wst_loader_options_set_passes(options, passes, &error));
    return options;
}

static wst_loader *quick_loader(const char *folder, wst_passes passes) {
    wst_loader_options *options = quick_data(folder, passes);
    wst_loader *loader = NULL;
    OK(wst_loader_open(options, &loader, &error));
    wst_loader_options_free(options);
    return loader;
}

static wst_loader *asked; /* by one_pass */

static void on_skip(wst_log_level level, const char *message, void *user_data) {
    wst_batch *batch = NULL;
    wst_loader_info_t info = {.struct_size = sizeof info};
    CHECK(wst_loader_next(asked, &batch, NULL) == WST_BUSY && !batch);
    CHECK(wst_loader_info(asked, &info, NULL) == WST_BUSY);
    if (level == WST_LOG_WARNING && (strstr(message, "broken.png: ") || strstr(message, "6.png: "))) ++*(int *)user_data;
}

/* One pass: every record once, in order; then the end, again and again. */
static void one_pass(const char *folder) {
    int skips = 0;
    wst_loader_options *options = quick_data(folder, WST_PASSES_ONE);
    OK(wst_loader_options_set_shuffle(options, 0, &error));
    OK(wst_loader_options_set_crop(options, WST_CROP_CENTRE, &error));
    OK(wst_loader_options_set_flip(options, 0, &error));
    OK(wst_loader_options_set_log(options, on_skip, &skips, &error));
    wst_loader *loader = NULL;
    OK(wst_loader_open(options, &loader, &error));
    wst_loader_options_free(options);
    asked = loader;
    wst_batch *batch = NULL;
    char expected[64];
    size_t seen = 0;
    for (;;) {
        OK(wst_loader_next(loader, &batch, &error));
        if (!batch) break;
        for (size_t i = 0; i < wst_batch_count(batch); ++i, ++seen) {
            snprintf(expected, sizeof expected, "caption %u", (unsigned)seen);
            CHECK(strcmp(wst_batch_captions(batch)[i], expected) == 0);
            snprintf(expected, sizeof expected, "%u.png", (unsigned)seen);
            CHECK(strcmp(wst_batch_keys(batch)[i], expected) == 0);
            CHECK(wst_image_width(wst_batch_images(batch)[i]) == SIDE);
        }
        if (seen == 4) {
            wst_image *first = picture(SIDE, 0); /* of that size already */
            CHECK(same_image(first, wst_batch_images(batch)[0]));
            wst_image_free(first);
        }
        wst_batch_free(batch);
    }
    CHECK(seen == RECORDS && skips == 2);
    OK(wst_loader_next(loader, &batch, &error));
    CHECK(batch == NULL);
    wst_loader_info_t info = {.struct_size = sizeof info};
    OK(wst_loader_info(loader, &info, &error));
    CHECK(info.unreadable == 1 && info.no_caption == 1 && info.filtered == 0 && info.damaged_shards == 0);
    INVALID("out", wst_loader_info(loader, NULL, &error));
    INVALID("out", wst_loader_next(loader, NULL, &error));
    wst_loader_free(loader);

    options = quick_data(folder, WST_PASSES_ENDLESS);
    OK(wst_loader_options_set(options, "filter", "authors", &error));
    OK(wst_loader_open(options, &loader, &error));
    wst_loader_options_free(options);
    FAILS(WST_FORMAT, "filtered", wst_loader_next(loader, &batch, &error));
    FAILS(WST_FORMAT, "filtered", wst_loader_next(loader, &batch, &error));
    CHECK(batch == NULL);
    wst_loader_free(loader);
}

static wst_train_metrics step_from(wst_trainer *trainer, wst_loader *loader) {
    wst_train_metrics m = {.struct_size = sizeof m};
    int32_t end = 7;
    OK(wst_trainer_step_from(trainer, loader, &m, &end, &error));
    CHECK(end == 0);
    return m;
}

/* Steps from a loader, killed and taken up again: the same batches, the same steps. */
static void taken_up_again(const wst_model *model, const char *folder, const char *checkpoint) {
    wst_trainer *whole = quick_trainer(model, WST_STAGE_C), *by_hand = quick_trainer(model, WST_STAGE_C);
    wst_loader *loader = quick_loader(folder, WST_PASSES_ENDLESS), *other = quick_loader(folder, WST_PASSES_ENDLESS);
    for (int i = 0; i < 3; ++i) {
        wst_train_metrics m = step_from(whole, loader), n = {.struct_size = sizeof n};
        wst_batch *batch = NULL;
        OK(wst_loader_next(other, &batch, &error));
        OK(wst_trainer_step(by_hand, wst_batch_images(batch), wst_batch_captions(batch), wst_batch_count(batch), &n, &error));
        wst_batch_free(batch);
        CHECK(memcmp(&m, &n, sizeof m) == 0);
    }
    OK(wst_trainer_follow(by_hand, other, &error));
    OK(wst_trainer_save(by_hand, checkpoint, &error));
    wst_trainer_free(by_hand);
    wst_loader_free(other);

    wst_trainer *resumed = quick_trainer(model, WST_STAGE_C);
    other = quick_loader(folder, WST_PASSES_ENDLESS);
    OK(wst_loader_resume(other, resumed, &error)); /* nothing loaded: from the start */
    OK(wst_trainer_load(resumed, checkpoint, &error));
    INVALID("trainer", wst_loader_resume(other, NULL, &error));
    OK(wst_loader_resume(other, resumed, &error));
    for (int i = 0; i < 4; ++i) {
        wst_train_metrics m = step_from(whole, loader), n = step_from(resumed, other);
        CHECK(memcmp(&m, &n, sizeof m) == 0);
    }
    /* Another seed is another order: the place means nothing there. */
    wst_loader_options *options = quick_data(folder, WST_PASSES_ENDLESS);
    OK(wst_loader_options_set_seed(options, 4, &error));
    wst_loader *wrong = NULL;
    OK(wst_loader_open(options, &wrong, &error));
    wst_loader_options_free(options);
    INVALID("position", wst_loader_resume(wrong, resumed, &error));
    (void)step_from(resumed, wrong); /* goes on as it was */
    wst_loader_free(wrong);
    wst_loader_free(other);
    wst_loader_free(loader);
    wst_trainer_free(resumed);
    wst_trainer_free(whole);
}

static void ends(const wst_model *model, const char *folder) {
    wst_trainer *trainer = quick_trainer(model, WST_STAGE_B);
    wst_loader *loader = quick_loader(folder, WST_PASSES_ONE);
    (void)step_from(trainer, loader);
    (void)step_from(trainer, loader);
    wst_train_metrics m = {.struct_size = sizeof m, .step = 9};
    int32_t end = 0;
    OK(wst_trainer_step_from(trainer, loader, &m, &end, &error));
    CHECK(end == 1 && m.step == 0 && steps_of(trainer) == 2);
    wst_loader_free(loader);
    /* Ranks share the records. */
    size_t count = 0;
    for (uint32_t rank = 0; rank < 2; ++rank) {
        wst_loader_options *options = quick_data(folder, WST_PASSES_ONE);
        OK(wst_loader_options_set_rank(options, rank, 2, &error));
        OK(wst_loader_open(options, &loader, &error));
        wst_loader_options_free(options);
        wst_batch *batch = NULL;
        OK(wst_loader_next(loader, &batch, &error));
        count += wst_batch_count(batch);
        wst_loader_free(loader);
        wst_batch_free(batch); /* after its loader */
    }
    CHECK(count == RECORDS);
    wst_trainer_free(trainer);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2; /* MODEL SCRATCH */
    char folder[1024], checkpoint[1024], empty[1024];
    snprintf(folder, sizeof folder, "%s/data", argv[2]);
    snprintf(checkpoint, sizeof checkpoint, "%s/loader-checkpoint", argv[2]);
    snprintf(empty, sizeof empty, "%s/empty", argv[2]);
    data_set(folder);
    one_pass(folder);
    wst_loader_options *options = NULL;
    wst_loader *loader = NULL;
    CHECK(mkdir(empty, 0777) == 0);
    OK(wst_loader_options_new(empty, &options, &error));
    FAILS(WST_FORMAT, "empty", wst_loader_open(options, &loader, &error));
    wst_loader_options_free(options);
    wst_model *model = NULL;
    OK(wst_model_open(argv[1], NULL, &model, &error));
    if (model) {
        taken_up_again(model, folder, checkpoint);
        ends(model, folder);
    }
    wst_model_free(model);
    return summary("loader");
}
