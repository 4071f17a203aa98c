/* NULL, absurd and broken arguments of every function: a clear error, cleared out-parameters, no crash. */
#include <math.h>

#include "check.h"

#define GARBAGE(type) ((type *)(uintptr_t)0x10)
#define BROKEN "caf\xe9"

static void errors_and_versions(void) {
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", WST_VERSION_MAJOR, WST_VERSION_MINOR, WST_VERSION_PATCH);
    CHECK(strcmp(version, WST_VERSION) == 0);
    CHECK(strcmp(version, wst_version()) == 0);
    CHECK(strcmp(wst_status_name(WST_OK), "WST_OK") == 0);
    CHECK(strcmp(wst_status_name(WST_INTERNAL), "WST_INTERNAL") == 0);
    CHECK(strcmp(wst_status_name(77), "unknown status") == 0);
    CHECK(strcmp(wst_status_name(-1), "unknown status") == 0);
    CHECK(wst_error_status(NULL) == WST_OK);
    CHECK(strcmp(wst_error_message(NULL), "") == 0);
    CHECK(strcmp(wst_error_place(NULL), "") == 0);
    wst_error *error = NULL;
    wst_model *model = GARBAGE(wst_model);
    CHECK(wst_model_open("/nowhere/at/all", NULL, &model, &error) == WST_IO);
    CHECK(model == NULL);
    CHECK(strstr(wst_error_message(error), "/nowhere/at/all") != NULL);
    CHECK(strstr(wst_error_place(error), "/nowhere/at/all") != NULL);
    wst_error_free(error);
    /* Nobody wants the error; an old one is not kept. */
    CHECK(wst_model_open("/nowhere", NULL, &model, NULL) == WST_IO);
    error = GARBAGE(wst_error);
    wst_cancel *cancel = wst_cancel_new();
    wst_model_options *options = wst_model_options_new();
    CHECK(wst_model_options_set_threads(options, 1, &error) == WST_OK);
    CHECK(error == NULL);
    wst_model_options_free(options);
    wst_cancel_free(cancel);
}

static void frees_of_null(void) {
    wst_error_free(NULL);
    wst_cancel_free(NULL);
    wst_cancel_request(NULL);
    wst_cancel_reset(NULL);
    wst_image_free(NULL);
    wst_tensor_free(NULL);
    wst_model_options_free(NULL);
    wst_model_free(NULL);
    wst_generate_options_free(NULL);
    wst_job_cancel(NULL);
    wst_job_free(NULL);
    wst_train_options_free(NULL);
    wst_samples_free(NULL);
    wst_trainer_free(NULL);
    wst_loader_options_free(NULL);
    wst_batch_free(NULL);
    wst_loader_free(NULL);
    CHECK(wst_image_width(NULL) == 0 && wst_image_height(NULL) == 0 && wst_image_data(NULL) == NULL);
    CHECK(wst_tensor_dtype(NULL) == -1 && wst_tensor_rank(NULL) == 0 && wst_tensor_shape(NULL) == NULL);
    CHECK(wst_tensor_data(NULL) == NULL && wst_tensor_nbytes(NULL) == 0);
    CHECK(wst_generate_options_image_count(NULL) == 0 && wst_samples_count(NULL) == 0);
    CHECK(wst_batch_count(NULL) == 0 && wst_batch_images(NULL) == NULL);
    CHECK(wst_batch_captions(NULL) == NULL && wst_batch_keys(NULL) == NULL);
}

static void devices(void) {
    wst_device_info_t info;
    CHECK(wst_device_count() >= 1);
    memset(&info, 0xAB, sizeof info);
    info.struct_size = sizeof info;
    OK(wst_device_info(0, &info, &error));
    CHECK(strcmp(info.name, "cpu") == 0 && info.threads >= 1 && info.memory_bytes > 0 && info.description[0]);
    INVALID("index", wst_device_info(1000, &info, &error));
    CHECK(info.memory_bytes == 0 && info.name[0] == 0 && info.struct_size == sizeof info);
    INVALID("out: expected a pointer, found NULL", wst_device_info(0, NULL, &error));
    info.struct_size = 0;
    INVALID("out->struct_size", wst_device_info(0, &info, &error));
    info.struct_size = 4;
    INVALID("out->struct_size", wst_device_info(0, &info, &error));
    info.struct_size = 0xABABABAB;
    INVALID("out->struct_size", wst_device_info(0, &info, &error));
    /* An older caller gets its part, and not a byte more. */
    memset(&info, 0xAB, sizeof info);
    info.struct_size = 8;
    OK(wst_device_info(0, &info, &error));
    CHECK(info.threads >= 1 && info.memory_bytes == UINT64_C(0xABABABABABABABAB) && info.struct_size == 8);
    /* A newer caller's tail stays as it is. */
    struct {
        wst_device_info_t info;
        uint64_t later;
    } newer;
    memset(&newer, 0xAB, sizeof newer);
    newer.info.struct_size = sizeof newer;
    OK(wst_device_info(0, &newer.info, &error));
    CHECK(newer.later == UINT64_C(0xABABABABABABABAB) && newer.info.threads >= 1);
}

static void images(const char *scratch) {
    uint8_t rgb[2 * 8] = {1, 2, 3, 4, 5, 6, 0, 0, 7, 8, 9, 10, 11, 12, 0, 0};
    wst_image *image = GARBAGE(wst_image);
    INVALID("rgb: expected a pointer, found NULL", wst_image_new(2, 2, NULL, 0, &image, &error));
    CHECK(image == NULL);
    INVALID("out", wst_image_new(2, 2, rgb, 0, NULL, &error));
    INVALID("width", wst_image_new(0, 2, rgb, 0, &image, &error));
    INVALID("height", wst_image_new(2, 0, rgb, 0, &image, &error));
    INVALID("width", wst_image_new(UINT32_MAX, 2, rgb, 0, &image, &error));
    INVALID("row_stride", wst_image_new(2, 2, rgb, 5, &image, &error));
    INVALID("row_stride", wst_image_new(2, 2, rgb, SIZE_MAX, &image, &error));
    INVALID("row_stride", wst_image_new(2, 3, rgb, SIZE_MAX / 2, &image, &error));
    OK(wst_image_new(2, 2, rgb, 8, &image, &error));
    CHECK(wst_image_width(image) == 2 && wst_image_height(image) == 2);
    CHECK(image && memcmp(wst_image_data(image), "\1\2\3\4\5\6\7\10\11\12\13\14", 12) == 0);
    INVALID("image", wst_image_write_png(NULL, "x.png", &error));
    INVALID("path", wst_image_write_png(image, NULL, &error));
    INVALID("path", wst_image_write_png(image, "", &error));
    INVALID("path: expected UTF-8 text, found a broken sequence at byte 3", wst_image_write_png(image, BROKEN, &error));
    FAILS(WST_IO, "/nowhere/x.png", wst_image_write_png(image, "/nowhere/x.png", &error));
    char path[1024];
    snprintf(path, sizeof path, "%s/w\xc3\xbcrstchen.png", scratch);
    OK(wst_image_write_png(image, path, &error));
    wst_image *back = NULL;
    OK(wst_image_read(path, &back, &error));
    CHECK(same_image(image, back));
    wst_image_free(back);
    back = GARBAGE(wst_image);
    INVALID("path", wst_image_read(NULL, &back, &error));
    CHECK(back == NULL);
    INVALID("out", wst_image_read(path, NULL, &error));
    INVALID("byte 3", wst_image_read(BROKEN, &back, &error));
    FAILS(WST_IO, "/nowhere.png", wst_image_read("/nowhere.png", &back, &error));
    snprintf(path, sizeof path, "%s/text.png", scratch);
    FILE *file = fopen(path, "w");
    CHECK(file && fputs("this is no picture", file) >= 0 && fclose(file) == 0);
    FAILS(WST_FORMAT, "text.png", wst_image_read(path, &back, &error));
    CHECK(back == NULL);
    wst_image_free(image);
}

static void tensors(void) {
    wst_tensor *tensor = GARBAGE(wst_tensor);
    const int64_t shape[] = {2, 3};
    const float values[] = {1, 2, 3, 4, 5, 6};
    const int64_t negative[] = {2, -3}, absurd[] = {INT64_MAX, 2}, huge[] = {INT64_C(1) << 40}, none[] = {0, 5};
    INVALID("dtype", wst_tensor_new(6, shape, 2, values, &tensor, &error));
    CHECK(tensor == NULL);
    INVALID("WST_F32 (0)", wst_tensor_new(-1, shape, 2, values, &tensor, &error));
    INVALID("rank", wst_tensor_new(WST_F32, shape, 7, values, &tensor, &error));
    INVALID("shape: expected a pointer", wst_tensor_new(WST_F32, NULL, 2, values, &tensor, &error));
    INVALID("data", wst_tensor_new(WST_F32, shape, 2, NULL, &tensor, &error));
    INVALID("out", wst_tensor_new(WST_F32, shape, 2, values, NULL, &error));
    INVALID("shape[1]", wst_tensor_new(WST_F32, negative, 2, values, &tensor, &error));
    INVALID("shape", wst_tensor_new(WST_F32, absurd, 2, values, &tensor, &error));
    FAILS(WST_OUT_OF_MEMORY, "tensor", wst_tensor_new(WST_I64, huge, 1, values, &tensor, &error));
    OK(wst_tensor_new(WST_F32, shape, 2, values, &tensor, &error));
    CHECK(wst_tensor_dtype(tensor) == WST_F32 && wst_tensor_rank(tensor) == 2 && wst_tensor_nbytes(tensor) == 24);
    CHECK(tensor && wst_tensor_shape(tensor)[1] == 3 && memcmp(wst_tensor_data(tensor), values, 24) == 0);
    CHECK((uintptr_t)wst_tensor_data(tensor) % 64 == 0);
    wst_tensor_free(tensor);
    OK(wst_tensor_new(WST_F32, none, 2, NULL, &tensor, &error));
    CHECK(wst_tensor_nbytes(tensor) == 0);
    wst_tensor_free(tensor);
    OK(wst_tensor_new(WST_I8, NULL, 0, "x", &tensor, &error));
    CHECK(wst_tensor_dtype(tensor) == WST_I8 && wst_tensor_nbytes(tensor) == 1);
    wst_tensor_free(tensor);
    OK(wst_tensor_new(WST_U8, NULL, 0, "x", &tensor, &error));
    CHECK(wst_tensor_rank(tensor) == 0 && wst_tensor_nbytes(tensor) == 1);
    wst_tensor_free(tensor);
    char bytes[9] = {0};
    OK(wst_tensor_new(WST_I64, shape, 0, bytes + 1, &tensor, &error));
    wst_tensor_free(tensor);
}

static void log_line(wst_log_level level, const char *message, void *user_data) {
    if (level > WST_LOG_OFF && level <= WST_LOG_DEBUG && message) ++*(int *)user_data;
}

/* Options that are good by themselves, for a machine without a GPU, which is most that run this. */
static void what_the_machine_lacks(const char *folder) {
    wst_model_options *options = wst_model_options_new();
    wst_model *model = GARBAGE(wst_model);
    if (wst_device_count() == 1) {
        OK(wst_model_options_set_device(options, "cuda", &error));
        wst_error *error = NULL;
        wst_status status = wst_model_open(folder, options, &model, &error);
        /* A driver without a GPU does not start. */
        CHECK(status == WST_UNSUPPORTED || status == WST_DEVICE || status == WST_INVALID_ARGUMENT);
        CHECK(strstr(wst_error_message(error), "cuda") != NULL);
        CHECK(status != WST_UNSUPPORTED || strstr(wst_error_message(error), "libcuda.so.1"));
        CHECK(model == NULL);
        wst_error_free(error);
    }
    OK(wst_model_options_set_device(options, "cpu", &error));
    OK(wst_model_options_set_compute_dtype(options, WST_F16, &error));
    FAILS(WST_UNSUPPORTED, "compute_dtype", wst_model_open(folder, options, &model, &error));
    CHECK(model == NULL);
    OK(wst_model_options_set_compute_dtype(options, WST_I8, &error));
    OK(wst_model_open(folder, options, &model, &error));
    wst_model_free(model);
    OK(wst_model_options_set_device(options, "cuda", &error));
    FAILS(WST_UNSUPPORTED, "compute_dtype", wst_model_open(folder, options, &model, &error));
    OK(wst_model_options_set_device(options, "cpu", &error));
    OK(wst_model_options_set_compute_dtype(options, WST_F32, &error));
    OK(wst_model_options_set_cuda_stream(options, &model, &error));
    INVALID("cuda_stream", wst_model_open(folder, options, &model, &error));
    wst_model_options_free(options);
}

static void model_options(const char *folder) {
    wst_model_options *options = wst_model_options_new();
    CHECK(options != NULL);
    INVALID("options", wst_model_options_set_device(NULL, "cpu", &error));
    INVALID("options", wst_model_options_set_threads(NULL, 1, &error));
    INVALID("options", wst_model_options_set_compute_dtype(NULL, WST_F32, &error));
    INVALID("options", wst_model_options_set_residency(NULL, 0, &error));
    INVALID("options", wst_model_options_set_log(NULL, 0, NULL, NULL, &error));
    INVALID("options", wst_model_options_set(NULL, "device", "cpu", &error));
    INVALID("device", wst_model_options_set_device(options, NULL, &error));
    INVALID("device", wst_model_options_set_device(options, "gpu", &error));
    INVALID("device: expected UTF-8 text, found a broken sequence at byte 3",
            wst_model_options_set_device(options, BROKEN, &error));
    INVALID("cuda:x", wst_model_options_set_device(options, "cuda:x", &error));
    INVALID("options", wst_model_options_set_cuda_stream(NULL, NULL, &error));
    INVALID("dtype", wst_model_options_set_compute_dtype(options, 99, &error));
    INVALID("dtype", wst_model_options_set_compute_dtype(options, WST_I64, &error));
    INVALID("residency", wst_model_options_set_residency(options, 3, &error));
    INVALID("residency", wst_model_options_set_residency(options, INT32_MIN, &error));
    INVALID("level", wst_model_options_set_log(options, 4, log_line, NULL, &error));
    INVALID("threads", wst_model_options_set_threads(options, UINT32_MAX, &error));
    INVALID("key", wst_model_options_set(options, NULL, "cpu", &error));
    INVALID("value", wst_model_options_set(options, "device", NULL, &error));
    INVALID("flavour", wst_model_options_set(options, "flavour", "sweet", &error));
    INVALID("threads", wst_model_options_set(options, "threads", "many", &error));
    OK(wst_model_options_set(options, "threads", "2", &error));
    OK(wst_model_options_set_residency(options, WST_RESIDENCY_ALL, &error));
    int lines = 0;
    OK(wst_model_options_set_log(options, WST_LOG_DEBUG, log_line, &lines, &error));
    wst_model *model = GARBAGE(wst_model);
    INVALID("path", wst_model_open(NULL, options, &model, &error));
    CHECK(model == NULL);
    what_the_machine_lacks(folder);
    INVALID("path", wst_model_open("", options, &model, &error));
    INVALID("byte 3", wst_model_open(BROKEN, options, &model, &error));
    INVALID("out", wst_model_open(folder, options, NULL, &error));
    char *big = malloc(1 << 20);
    memset(big, 'x', (1 << 20) - 1);
    big[(1 << 20) - 1] = 0;
    INVALID("path", wst_model_open(big, options, &model, &error));
    INVALID("value", wst_model_options_set(options, "device", big, &error));
    free(big);
    OK(wst_model_open(folder, options, &model, &error));
    wst_model_options_free(options);
    CHECK(lines > 0);
    wst_model_free(model);
}

static void on_progress(const wst_progress *progress, void *user_data) {
    (void)progress;
    (void)user_data;
}

static void generate_options(const wst_model *model) {
    wst_generate_options *o = GARBAGE(wst_generate_options);
    INVALID("model", wst_generate_options_new(NULL, &o, &error));
    CHECK(o == NULL);
    INVALID("out", wst_generate_options_new(model, NULL, &error));
    OK(wst_generate_options_new(model, &o, &error));
    wst_image *image = NULL;
    OK(wst_image_new(1, 1, (const uint8_t *)"rgb", 0, &image, &error));
    wst_cancel *cancel = wst_cancel_new();
    INVALID("options", wst_generate_options_add_prompt(NULL, "x", NULL, &error));
    INVALID("options", wst_generate_options_set_images_per_prompt(NULL, 1, &error));
    INVALID("options", wst_generate_options_set_size(NULL, 128, 128, &error));
    INVALID("options", wst_generate_options_set_seed(NULL, 1, &error));
    INVALID("options", wst_generate_options_set_stage_c(NULL, 1, 1, &error));
    INVALID("options", wst_generate_options_set_stage_c_sampler(NULL, 0, &error));
    INVALID("options", wst_generate_options_set_stage_c_timesteps(NULL, NULL, 0, &error));
    INVALID("options", wst_generate_options_set_stage_b_timesteps(NULL, NULL, 0, &error));
    INVALID("options", wst_generate_options_set_stage_b(NULL, 1, 1, &error));
    INVALID("options", wst_generate_options_set_stage_b_temperature(NULL, 1, 1, &error));
    INVALID("options", wst_generate_options_set_stage_b_choice(NULL, 0, &error));
    INVALID("options", wst_generate_options_set_init_image(NULL, image, 1, &error));
    INVALID("options", wst_generate_options_set_mask(NULL, image, &error));
    INVALID("options", wst_generate_options_set_progress(NULL, on_progress, NULL, &error));
    INVALID("options", wst_generate_options_set_preview(NULL, 1, &error));
    INVALID("options", wst_generate_options_set_cancel(NULL, cancel, &error));
    INVALID("options", wst_generate_options_set(NULL, "seed", "1", &error));
    INVALID("text", wst_generate_options_add_prompt(o, NULL, NULL, &error));
    INVALID("text: expected UTF-8 text, found a broken sequence at byte 3",
            wst_generate_options_add_prompt(o, BROKEN, NULL, &error));
    INVALID("negative_text: expected UTF-8 text, found a broken sequence at byte 3",
            wst_generate_options_add_prompt(o, "x", BROKEN, &error));
    CHECK(wst_generate_options_image_count(o) == 0);
    INVALID("images_per_prompt", wst_generate_options_set_images_per_prompt(o, 0, &error));
    INVALID("images_per_prompt", wst_generate_options_set_images_per_prompt(o, UINT32_MAX, &error));
    INVALID("width", wst_generate_options_set_size(o, 0, 128, &error));
    INVALID("height", wst_generate_options_set_size(o, 128, UINT32_MAX, &error));
    INVALID("steps", wst_generate_options_set_stage_c(o, 0, 1, &error));
    INVALID("steps", wst_generate_options_set_stage_c(o, UINT32_MAX, 1, &error));
    INVALID("guidance", wst_generate_options_set_stage_c(o, 2, NAN, &error));
    INVALID("sampler: expected WST_DDPM (0), WST_DDIM (1), found 2",
            wst_generate_options_set_stage_c_sampler(o, 2, &error));
    INVALID("timesteps", wst_generate_options_set_stage_c_timesteps(o, NULL, 3, &error));
    INVALID("timesteps", wst_generate_options_set_stage_b_timesteps(o, NULL, 3, &error));
    INVALID("count", wst_generate_options_set_stage_c_timesteps(o, GARBAGE(float), SIZE_MAX, &error));
    const float bad[] = {1.0f, NAN, 0.0f};
    INVALID("timesteps", wst_generate_options_set_stage_c_timesteps(o, bad, 3, &error));
    INVALID("steps", wst_generate_options_set_stage_b(o, 0, 1, &error));
    INVALID("guidance", wst_generate_options_set_stage_b(o, 2, INFINITY, &error));
    INVALID("expected", wst_generate_options_set_stage_b_temperature(o, NAN, 1, &error));
    INVALID("choice", wst_generate_options_set_stage_b_choice(o, -1, &error));
    INVALID("image", wst_generate_options_set_init_image(o, NULL, 0.5f, &error));
    INVALID("strength", wst_generate_options_set_init_image(o, image, 1.5f, &error));
    INVALID("mask", wst_generate_options_set_mask(o, NULL, &error));
    INVALID("key", wst_generate_options_set(o, NULL, "1", &error));
    INVALID("flavour", wst_generate_options_set(o, "flavour", "sweet", &error));
    INVALID("seed", wst_generate_options_set(o, "seed", "minus one", &error));
    OK(wst_generate_options_set_cancel(o, cancel, &error));
    OK(wst_generate_options_set_cancel(o, NULL, &error));
    OK(wst_generate_options_set_progress(o, NULL, NULL, &error));
    OK(wst_generate_options_set_preview(o, 0, &error));
    OK(wst_generate_options_add_prompt(o, "", NULL, &error));
    OK(wst_generate_options_add_prompt(o, "w\xc3\xbcrst \xf0\x9f\x8c\xad", "", &error));
    OK(wst_generate_options_set_images_per_prompt(o, 3, &error));
    CHECK(wst_generate_options_image_count(o) == 6);

    wst_image *images[6] = {GARBAGE(wst_image), GARBAGE(wst_image), GARBAGE(wst_image),
                            GARBAGE(wst_image), GARBAGE(wst_image), GARBAGE(wst_image)};
    INVALID("image_count: expected 6", wst_generate(model, o, images, 2, &error));
    CHECK(images[0] == NULL && images[1] == NULL && images[2] == GARBAGE(wst_image));
    INVALID("image_count", wst_generate(model, o, images, 0, &error));
    INVALID("image_count", wst_generate(model, o, images, SIZE_MAX, &error));
    INVALID("images", wst_generate(model, o, NULL, 6, &error));
    INVALID("model", wst_generate(NULL, o, images, 6, &error));
    INVALID("options", wst_generate(model, NULL, images, 6, &error));
    CHECK(images[5] == NULL);
    wst_job *job = GARBAGE(wst_job);
    INVALID("model", wst_job_start(NULL, o, &job, &error));
    CHECK(job == NULL);
    INVALID("options", wst_job_start(model, NULL, &job, &error));
    INVALID("out", wst_job_start(model, o, NULL, &error));
    wst_progress p = {.struct_size = sizeof p, .step = 9};
    int32_t done = 7;
    INVALID("job", wst_job_poll(NULL, &p, &done, &error));
    CHECK(p.step == 0 && done == 0 && p.struct_size == sizeof p);
    done = 7;
    INVALID("job", wst_job_wait(NULL, 1, &done, &error));
    CHECK(done == 0);
    INVALID("job", wst_job_images(NULL, images, 6, &error));
    wst_generate_options *empty = NULL;
    OK(wst_generate_options_new(model, &empty, &error));
    CHECK(wst_generate(model, empty, NULL, 0, NULL) == WST_INVALID_ARGUMENT);
    wst_generate_options_free(empty);
    wst_cancel_free(cancel);
    wst_image_free(image);
    wst_generate_options_free(o);
}

static void model_info(const wst_model *model) {
    wst_model_info_t info;
    memset(&info, 0xAB, sizeof info);
    info.struct_size = sizeof info;
    OK(wst_model_info(model, &info, &error));
    CHECK(info.generation == 1 && info.default_width >= 16 && info.stage_c_parameters > 0 && info.reserved == 0);
    INVALID("model", wst_model_info(NULL, &info, &error));
    CHECK(info.generation == 0 && info.bytes_device == 0);
    INVALID("out", wst_model_info(model, NULL, &error));
    info.struct_size = 7;
    INVALID("struct_size", wst_model_info(model, &info, &error));
    info.struct_size = 8;
    info.stage_a_parameters = 5;
    OK(wst_model_info(model, &info, &error));
    CHECK(info.generation == 1 && info.stage_a_parameters == 5);
}

static void stages(const wst_model *model) {
    const int64_t one[] = {1}, three[] = {1, 2, 3}, four[] = {1, 16, 3, 3};
    float zeros[144] = {0};
    wst_tensor *t1 = NULL, *t3 = NULL, *t4 = NULL, *bytes = NULL, *out = GARBAGE(wst_tensor);
    OK(wst_tensor_new(WST_F32, one, 1, zeros, &t1, &error));
    OK(wst_tensor_new(WST_F32, three, 3, zeros, &t3, &error));
    OK(wst_tensor_new(WST_F32, four, 4, zeros, &t4, &error));
    OK(wst_tensor_new(WST_U8, four, 4, zeros, &bytes, &error));
    wst_generate_options *o = quick_options(model, 1);
    const char *texts[] = {"apple", NULL}, *broken[] = {"apple", BROKEN};
    const wst_image *no_images[] = {NULL};
    INVALID("model", wst_tokenize(NULL, WST_STAGE_C, "x", &out, &error));
    CHECK(out == NULL);
    INVALID("for_stage", wst_tokenize(model, 3, "x", &out, &error));
    INVALID("text", wst_tokenize(model, WST_STAGE_C, NULL, &out, &error));
    INVALID("byte 3", wst_tokenize(model, WST_STAGE_C, BROKEN, &out, &error));
    INVALID("ids", wst_tokenize(model, WST_STAGE_C, "x", NULL, &error));
    OK(wst_tokenize(model, WST_STAGE_C, "a red apple", &out, &error));
    CHECK(wst_tensor_dtype(out) == WST_I64 && wst_tensor_rank(out) == 1);
    wst_tensor_free(out);
    INVALID("model", wst_encode_text(NULL, WST_STAGE_C, texts, 1, &out, &error));
    INVALID("for_stage", wst_encode_text(model, -1, texts, 1, &out, &error));
    INVALID("texts", wst_encode_text(model, WST_STAGE_C, NULL, 1, &out, &error));
    INVALID("count", wst_encode_text(model, WST_STAGE_C, texts, 0, &out, &error));
    INVALID("count", wst_encode_text(model, WST_STAGE_C, texts, SIZE_MAX, &out, &error));
    INVALID("texts[1]", wst_encode_text(model, WST_STAGE_C, texts, 2, &out, &error));
    INVALID("texts[1]: expected UTF-8 text, found a broken sequence at byte 3",
            wst_encode_text(model, WST_STAGE_C, broken, 2, &out, &error));
    INVALID("hidden", wst_encode_text(model, WST_STAGE_C, texts, 1, NULL, &error));
    INVALID("model", wst_encode_image(NULL, no_images, 1, &out, &error));
    INVALID("images", wst_encode_image(model, NULL, 1, &out, &error));
    INVALID("images[0]", wst_encode_image(model, no_images, 1, &out, &error));
    INVALID("count", wst_encode_image(model, no_images, 0, &out, &error));
    INVALID("latents", wst_encode_image(model, no_images, 1, NULL, &error));
    INVALID("model", wst_stage_a_encode(NULL, no_images, 1, &out, &error));
    INVALID("images[0]", wst_stage_a_encode(model, no_images, 1, &out, &error));
    INVALID("tokens", wst_stage_a_encode(model, no_images, 1, NULL, &error));
    INVALID("model", wst_stage_a_decode(NULL, t4, &out, &error));
    INVALID("tokens_or_latents", wst_stage_a_decode(model, NULL, &out, &error));
    INVALID("tokens_or_latents", wst_stage_a_decode(model, t1, &out, &error));
    INVALID("tokens_or_latents", wst_stage_a_decode(model, bytes, &out, &error));
    INVALID("pixels", wst_stage_a_decode(model, t4, NULL, &error));
    INVALID("model", wst_stage_b_predict(NULL, t4, t1, t4, t3, &out, &error));
    INVALID("x", wst_stage_b_predict(model, NULL, t1, t4, t3, &out, &error));
    INVALID("t:", wst_stage_b_predict(model, t4, NULL, t4, t3, &out, &error));
    INVALID("latents", wst_stage_b_predict(model, t4, t1, NULL, t3, &out, &error));
    INVALID("text", wst_stage_b_predict(model, t4, t1, t4, NULL, &out, &error));
    INVALID("text: expected 3 dimensions [N, tokens, width], found [1]",
            wst_stage_b_predict(model, t4, t1, t4, t1, &out, &error));
    INVALID("out", wst_stage_b_predict(model, t4, t1, t4, t3, NULL, &error));
    INVALID("latents", wst_stage_b_sample(model, NULL, t3, NULL, o, &out, &error));
    INVALID("text", wst_stage_b_sample(model, t4, NULL, NULL, o, &out, &error));
    INVALID("negative_text", wst_stage_b_sample(model, t4, t3, t1, o, &out, &error));
    INVALID("options", wst_stage_b_sample(model, t4, t3, NULL, NULL, &out, &error));
    INVALID("model", wst_stage_c_predict(NULL, t4, t1, t3, &out, &error));
    INVALID("x: expected 4 dimensions", wst_stage_c_predict(model, t3, t1, t3, &out, &error));
    INVALID("t: expected 1 dimensions", wst_stage_c_predict(model, t4, t3, t3, &out, &error));
    INVALID("x: expected elements of type F32", wst_stage_c_predict(model, bytes, t1, t3, &out, &error));
    INVALID("noise", wst_stage_c_predict(model, t4, t1, t3, NULL, &error));
    INVALID("text", wst_stage_c_sample(model, NULL, NULL, NULL, o, &out, &error));
    INVALID("initial_noise", wst_stage_c_sample(model, t3, NULL, t1, o, &out, &error));
    INVALID("options", wst_stage_c_sample(model, t3, NULL, NULL, NULL, &out, &error));
    CHECK(out == NULL);
    wst_generate_options_free(o);
    wst_tensor_free(t1);
    wst_tensor_free(t3);
    wst_tensor_free(t4);
    wst_tensor_free(bytes);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2; /* MODEL SCRATCH */
    errors_and_versions();
    frees_of_null();
    devices();
    images(argv[2]);
    tensors();
    model_options(argv[1]);
    wst_model *model = NULL;
    OK(wst_model_open(argv[1], NULL, &model, &error));
    if (model) {
        model_info(model);
        generate_options(model);
        stages(model);
    }
    wst_model_free(model);
    return summary("arguments");
}
