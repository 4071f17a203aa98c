/* What the tests of training share. */
#ifndef TRAIN_H
#define TRAIN_H
#include <math.h>

#include "check.h"

enum { SIDE = 64, PICTURES = 4 };

/* A picture whose colours follow `seed`. */
static inline wst_image *picture(uint32_t side, uint32_t seed) {
    uint8_t *rgb = malloc((size_t)3 * side * side);
    wst_image *image = NULL;
    for (uint32_t y = 0; y < side; ++y)
        for (uint32_t x = 0; x < side; ++x)
            for (uint32_t c = 0; c < 3; ++c)
                rgb[3 * (y * side + x) + c] = (uint8_t)(x * (seed + 1) + y * (seed + 2 * c) + 40 * c * seed);
    OK(wst_image_new(side, side, rgb, 0, &image, &error));
    free(rgb);
    return image;
}

/* Options under which a few steps show something. */
static inline wst_train_options *quick_training(wst_stage stage) {
    wst_train_options *options = NULL;
    OK(wst_train_options_new(stage, &options, &error));
    OK(wst_train_options_set_warmup_steps(options, 0, &error));
    OK(wst_train_options_set_learning_rate(options, 1e-3f, &error));
    OK(wst_train_options_set_ema(options, 0.5f, 2, 1, &error));
    OK(wst_train_options_set_seed(options, 5, &error));
    return options;
}

static inline wst_trainer *quick_trainer(const wst_model *model, wst_stage stage) {
    wst_train_options *options = quick_training(stage);
    wst_trainer *trainer = NULL;
    OK(wst_trainer_new(model, options, &trainer, &error));
    wst_train_options_free(options);
    return trainer;
}

static inline uint64_t steps_of(const wst_trainer *trainer) {
    wst_train_progress progress = {.struct_size = sizeof progress};
    OK(wst_trainer_progress(trainer, &progress, &error));
    return progress.step;
}
#endif
