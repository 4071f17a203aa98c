/* v2 folders through the same calls: one folder or two, what a half alone can do, stages, initial latents. */
#include <math.h>

#include "check.h"

/* Opens FOLDER with OPTION naming another one, or NULL. */
static wst_model *open_joined(const char *folder, const char *option, const char *other) {
    wst_model *model = NULL;
    wst_model_options *options = wst_model_options_new();
    if (option) OK(wst_model_options_set(options, option, other, &error));
    OK(wst_model_open(folder, options, &model, &error));
    wst_model_options_free(options);
    return model;
}

static wst_image *one_picture(const wst_model *model, const wst_generate_options *options) {
    wst_image *image = NULL;
    OK(wst_generate(model, options, &image, 1, &error));
    return image;
}

static int has_shape(const wst_tensor *tensor, int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t *shape = wst_tensor_shape(tensor);
    return wst_tensor_rank(tensor) == 4 && wst_tensor_dtype(tensor) == WST_F32 && shape[0] == n && shape[1] == c
           && shape[2] == h && shape[3] == w;
}

/* Numbers that follow no rule; the last one is LAST. */
static wst_tensor *tensor_of(const int64_t *shape, uint32_t rank, float last) {
    static float values[8192];
    int64_t count = 1;
    wst_tensor *tensor = NULL;
    for (uint32_t i = 0; i < rank; ++i) count *= shape[i];
    for (int64_t i = 0; i < count; ++i) values[i] = (float)(i * 29 % 81) / 20.0f - 2.0f;
    if (count > 0) values[count - 1] = last;
    OK(wst_tensor_new(WST_F32, shape, rank, values, &tensor, &error));
    return tensor;
}

static void one_folder_or_two(const char *whole, const char *prior, const char *decoder) {
    const char *joins[][3] = {{whole, NULL, NULL}, {prior, "decoder_path", decoder}, {decoder, "prior_path", prior}};
    wst_image *first = NULL;
    for (int i = 0; i < 3; ++i) {
        wst_model *model = open_joined(joins[i][0], joins[i][1], joins[i][2]);
        wst_model_info_t info = {.struct_size = sizeof info};
        OK(wst_model_info(model, &info, &error));
        CHECK(info.generation == 2 && info.default_width == 1024 && info.default_height == 1024);
        CHECK(info.latent_channels == 8 && info.latent_height == 24 && info.latent_width == 24);
        CHECK(info.stage_a_parameters && info.stage_b_parameters && info.stage_c_parameters);
        CHECK(info.text_encoder_parameters && info.image_encoder_parameters == 0);
        wst_generate_options *o = quick_options(model, 7);
        wst_image *image = one_picture(model, o);
        CHECK(wst_image_width(image) == 128 && wst_image_height(image) == 128);
        if (first) CHECK(same_image(first, image));
        if (first) wst_image_free(image);
        else first = image;
        INVALID("multiple of 128", wst_generate_options_set_size(o, 192, 128, &error));
        INVALID("height", wst_generate_options_set_size(o, 128, 0, &error));
        FAILS(WST_UNSUPPORTED, "tokens", wst_generate_options_set_stage_b_temperature(o, 1, 1, &error));
        FAILS(WST_UNSUPPORTED, "tokens", wst_generate_options_set_stage_b_choice(o, WST_ARGMAX, &error));
        FAILS(WST_UNSUPPORTED, "tokens", wst_generate_options_set(o, "stage_b_choice", "argmax", &error));
        FAILS(WST_UNSUPPORTED, "image_encoder", wst_generate_options_set_init_image(o, first, 0.5f, &error));
        OK(wst_generate_options_set_images_per_prompt(o, 2, &error));
        OK(wst_generate_options_add_prompt(o, "a blue car", "red", &error));
        wst_image *images[4] = {NULL};
        OK(wst_generate(model, o, images, 4, &error));
        CHECK(same_image(first, images[0]));
        for (int k = 1; k < 4; ++k) CHECK(!same_image(images[0], images[k]));
        for (int k = 0; k < 4; ++k) wst_image_free(images[k]);
        wst_generate_options_free(o);
        wst_model_free(model);
    }
    wst_image_free(first);

    wst_model *model = (wst_model *)(uintptr_t)0x10;
    wst_model_options *options = wst_model_options_new();
    INVALID("value", wst_model_options_set(options, "decoder_path", NULL, &error));
    OK(wst_model_options_set(options, "decoder_path", prior, &error));
    INVALID("decoder_path", wst_model_open(whole, options, &model, &error));
    CHECK(model == NULL);
    OK(wst_model_options_set(options, "decoder_path", "/nowhere", &error));
    FAILS(WST_IO, "/nowhere/model_index.json", wst_model_open(prior, options, &model, &error));
    OK(wst_model_options_set(options, "decoder_path", "", &error)); /* none again */
    OK(wst_model_open(prior, options, &model, &error));
    wst_model_free(model);
    wst_model_options_free(options);
}

static void stages(const wst_model *model) {
    const int64_t one[] = {1}, latent_shape[] = {1, 8, 3, 3}, noise_shape[] = {1, 4, 32, 32}, odd[] = {1, 8, 4, 3};
    wst_generate_options *o = quick_options(model, 7);
    const char *texts[] = {"a red apple"};
    wst_tensor *for_c = NULL, *for_b = NULL, *out = NULL, *latents = NULL, *decoded = NULL, *ids = NULL;
    OK(wst_tokenize(model, WST_STAGE_B, texts[0], &ids, &error));
    CHECK(wst_tensor_dtype(ids) == WST_I64 && wst_tensor_rank(ids) == 1 && wst_tensor_shape(ids)[0] == 77);
    OK(wst_encode_text(model, WST_STAGE_C, texts, 1, &for_c, &error));
    OK(wst_encode_text(model, WST_STAGE_B, texts, 1, &for_b, &error));
    CHECK(wst_tensor_shape(for_c)[2] == 20 && wst_tensor_shape(for_b)[2] == 15); /* a tower each */
    wst_tensor *t = tensor_of(one, 1, 0.5f), *x = tensor_of(latent_shape, 4, 0), *y = tensor_of(noise_shape, 4, 0);
    wst_tensor *other = tensor_of(odd, 4, 0);

    OK(wst_stage_c_predict(model, x, t, for_c, &out, &error));
    CHECK(has_shape(out, 1, 8, 3, 3));
    wst_tensor_free(out);
    INVALID("text", wst_stage_c_predict(model, x, t, for_b, &out, &error));
    OK(wst_stage_b_predict(model, y, t, x, for_b, &out, &error));
    CHECK(has_shape(out, 1, 4, 32, 32));
    wst_tensor_free(out);
    INVALID("text", wst_stage_b_predict(model, y, t, x, for_c, &out, &error));
    INVALID("x: expected", wst_stage_b_predict(model, x, t, x, for_b, &out, &error));
    INVALID("dimensions", wst_stage_b_predict(model, ids, t, x, for_b, &out, &error));
    CHECK(out == NULL);

    /* One after the other they make the picture. */
    OK(wst_stage_c_sample(model, for_c, NULL, NULL, o, &latents, &error));
    CHECK(has_shape(latents, 1, 8, 3, 3));
    OK(wst_stage_b_sample(model, latents, for_b, NULL, o, &decoded, &error));
    CHECK(has_shape(decoded, 1, 4, 32, 32));
    OK(wst_stage_a_decode(model, decoded, &out, &error));
    CHECK(has_shape(out, 1, 3, 128, 128));
    wst_image *image = one_picture(model, o);
    const float *pixels = wst_tensor_data(out);
    int wrong = 0;
    for (int i = 0; i < 128 * 128 * 3 && image && pixels; ++i) {
        float value = pixels[i % 3 * 128 * 128 + i / 3];
        value = value < 0 ? 0 : value > 1 ? 1 : value;
        wrong += abs((int)(value * 255.0f) - wst_image_data(image)[i]) > 1;
    }
    CHECK(wrong == 0);
    wst_tensor_free(out);
    INVALID("multiple of 8", wst_stage_b_sample(model, other, for_b, NULL, o, &out, &error));
    const wst_image *pictures[] = {image};
    OK(wst_stage_a_encode(model, pictures, 1, &out, &error));
    CHECK(wst_tensor_dtype(out) == WST_I64 && wst_tensor_rank(out) == 3 && wst_tensor_shape(out)[1] == 32);
    wst_tensor_free(out);
    FAILS(WST_UNSUPPORTED, "image_encoder", wst_encode_image(model, pictures, 1, &out, &error));

    /* The same latents as a start that nothing is left of: the same picture without Stage C. */
    OK(wst_generate_options_set_init_latents(o, latents, 0, &error));
    wst_image *again = one_picture(model, o);
    CHECK(same_image(image, again));
    wst_image_free(again);
    OK(wst_generate_options_set_init_latents(o, latents, 0.6f, &error));
    again = one_picture(model, o);
    CHECK(!same_image(image, again));
    wst_image_free(again);
    OK(wst_generate_options_set_init_latents(o, other, 0.5f, &error)); /* the size may still change */
    INVALID("init latents", wst_generate(model, o, &again, 1, &error));
    CHECK(again == NULL);
    wst_image_free(image);
    wst_tensor_free(decoded);
    wst_tensor_free(latents);
    wst_tensor_free(other);
    wst_tensor_free(y);
    wst_tensor_free(x);
    wst_tensor_free(t);
    wst_tensor_free(for_b);
    wst_tensor_free(for_c);
    wst_tensor_free(ids);
    wst_generate_options_free(o);
}

static void initial_latents(const wst_model *model) {
    const int64_t fits[] = {1, 8, 3, 3}, channels[] = {1, 3, 3, 8}, rank[] = {8, 3, 3}, empty[] = {1, 8, 0, 3};
    wst_tensor *good = tensor_of(fits, 4, 0), *nan = tensor_of(fits, 4, NAN), *inf = tensor_of(fits, 4, -INFINITY);
    wst_tensor *wide = tensor_of(channels, 4, 0), *flat = tensor_of(rank, 3, 0), *none = NULL, *tokens = NULL, *half = NULL;
    const uint64_t zeros[72] = {0};
    OK(wst_tensor_new(WST_F32, empty, 4, NULL, &none, &error));
    OK(wst_tensor_new(WST_I64, fits, 4, zeros, &tokens, &error));
    OK(wst_tensor_new(WST_F16, fits, 4, zeros, &half, &error));
    wst_generate_options *o = quick_options(model, 7);
    wst_image *plain = one_picture(model, o);
    INVALID("options", wst_generate_options_set_init_latents(NULL, good, 0.5f, &error));
    INVALID("latents: expected a pointer", wst_generate_options_set_init_latents(o, NULL, 0.5f, &error));
    INVALID("finite values, found NaN", wst_generate_options_set_init_latents(o, nan, 0.5f, &error));
    INVALID("finite values, found -inf", wst_generate_options_set_init_latents(o, inf, 0.5f, &error));
    INVALID("8 channels", wst_generate_options_set_init_latents(o, wide, 0.5f, &error));
    INVALID("[N, C, h, w]", wst_generate_options_set_init_latents(o, flat, 0.5f, &error));
    INVALID("latents", wst_generate_options_set_init_latents(o, none, 0.5f, &error));
    INVALID("F32, F16 or BF16", wst_generate_options_set_init_latents(o, tokens, 0.5f, &error));
    INVALID("strength", wst_generate_options_set_init_latents(o, good, 1.5f, &error));
    INVALID("strength", wst_generate_options_set_init_latents(o, good, NAN, &error));
    wst_image *image = one_picture(model, o);
    CHECK(same_image(plain, image)); /* nothing of that was kept */
    wst_image_free(image);
    /* The options keep a copy; half precision is as good. */
    OK(wst_generate_options_set_init_latents(o, half, 0.5f, &error));
    wst_tensor_free(half);
    image = one_picture(model, o);
    CHECK(!same_image(plain, image));
    wst_image_free(image);
    OK(wst_generate_options_set_init_latents(o, good, 0.5f, &error));
    wst_tensor_free(good);
    wst_job *job = NULL;
    int32_t done = 0;
    OK(wst_job_start(model, o, &job, &error));
    wst_generate_options_free(o);
    OK(wst_job_wait(job, -1, &done, &error));
    OK(wst_job_images(job, &image, 1, &error));
    CHECK(done == 1 && !same_image(plain, image));
    wst_job_free(job);
    wst_image_free(image);
    wst_image_free(plain);
    wst_tensor_free(nan);
    wst_tensor_free(inf);
    wst_tensor_free(wide);
    wst_tensor_free(flat);
    wst_tensor_free(none);
    wst_tensor_free(tokens);
}

/* What a half cannot do names the option that brings the other. */
static void halves(const char *prior_folder, const char *decoder_folder) {
    const int64_t one[] = {1}, latent_shape[] = {1, 8, 3, 3}, noise_shape[] = {1, 4, 32, 32};
    wst_model *prior = open_joined(prior_folder, NULL, NULL), *decoder = open_joined(decoder_folder, NULL, NULL);
    wst_tensor *t = tensor_of(one, 1, 0.5f), *x = tensor_of(latent_shape, 4, 0), *y = tensor_of(noise_shape, 4, 0);
    wst_tensor *text = NULL, *out = NULL;
    const char *texts[] = {"a red apple"};
    wst_image *image = (wst_image *)(uintptr_t)0x10;
    wst_job *job = (wst_job *)(uintptr_t)0x10;

    wst_generate_options *o = quick_options(prior, 7);
    OK(wst_encode_text(prior, WST_STAGE_C, texts, 1, &text, &error));
    OK(wst_stage_c_predict(prior, x, t, text, &out, &error));
    wst_tensor_free(out);
    OK(wst_stage_c_sample(prior, text, NULL, x, o, &out, &error));
    CHECK(has_shape(out, 1, 8, 3, 3));
    wst_tensor_free(out);
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_generate(prior, o, &image, 1, &error));
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_job_start(prior, o, &job, &error));
    CHECK(image == NULL && job == NULL);
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_encode_text(prior, WST_STAGE_B, texts, 1, &out, &error));
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_stage_b_predict(prior, y, t, x, text, &out, &error));
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_stage_b_sample(prior, x, text, NULL, o, &out, &error));
    FAILS(WST_UNSUPPORTED, "decoder_path", wst_stage_a_decode(prior, y, &out, &error));
    INVALID("options", wst_generate(decoder, o, &image, 1, &error)); /* another model's */
    wst_generate_options_free(o);

    o = quick_options(decoder, 7);
    FAILS(WST_UNSUPPORTED, "prior_path", wst_generate(decoder, o, &image, 1, &error));
    FAILS(WST_UNSUPPORTED, "prior_path", wst_encode_text(decoder, WST_STAGE_C, texts, 1, &out, &error));
    FAILS(WST_UNSUPPORTED, "prior_path", wst_stage_c_predict(decoder, x, t, text, &out, &error));
    FAILS(WST_UNSUPPORTED, "prior_path", wst_stage_c_sample(decoder, text, NULL, NULL, o, &out, &error));
    OK(wst_stage_a_decode(decoder, y, &out, &error));
    CHECK(has_shape(out, 1, 3, 128, 128));
    wst_tensor_free(out);
    OK(wst_generate_options_set_init_latents(o, x, 0.5f, &error));
    FAILS(WST_UNSUPPORTED, "prior_path", wst_generate(decoder, o, &image, 1, &error));
    OK(wst_generate_options_set_init_latents(o, x, 0, &error));
    image = one_picture(decoder, o);
    CHECK(wst_image_width(image) == 128);
    wst_image_free(image);
    wst_generate_options_free(o);
    wst_tensor_free(text);
    wst_tensor_free(y);
    wst_tensor_free(x);
    wst_tensor_free(t);
    wst_model_free(decoder);
    wst_model_free(prior);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2; /* a folder with the v2 models "model", "prior" and "decoder" */
    char whole[1024], prior[1024], decoder[1024];
    snprintf(whole, sizeof whole, "%s/model", argv[1]);
    snprintf(prior, sizeof prior, "%s/prior", argv[1]);
    snprintf(decoder, sizeof decoder, "%s/decoder", argv[1]);
    one_folder_or_two(whole, prior, decoder);
    wst_model *model = open_joined(whole, NULL, NULL);
    if (model) {
        stages(model);
        initial_latents(model);
    }
    wst_model_free(model);
    halves(prior, decoder);
    return summary("v2");
}
