/* A GPU through the ABI, on the emulated driver: run.sh puts its folder into LD_LIBRARY_PATH. Pictures, the host's
 * context and stream, calls of the driver that fail, and nothing left over. */
#include <dlfcn.h>

#include "check.h"

/* Functions of the driver, and of its emulation. */
static int (*get_current)(void **context);
static int (*set_current)(void *context);
static int (*retain)(void **context, int device);
static int (*release)(int device);
static int (*stream_create)(void **stream, unsigned flags);
static int (*stream_destroy)(void *stream);
static long (*live)(const char *kind);
static void (*fail_call)(const char *name, long n, int code);

static int find(void *library, const char *name, void *function) {
    void *found = dlsym(library, name);
    if (!found) fprintf(stderr, "%s: %s\n", name, dlerror());
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

static int find_all(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) fprintf(stderr, "%s\n", dlerror());
    return driver && find(driver, "cuCtxGetCurrent", &get_current) && find(driver, "cuCtxSetCurrent", &set_current)
           && find(driver, "cuDevicePrimaryCtxRetain", &retain)
           && find(driver, "cuDevicePrimaryCtxRelease_v2", &release)
           && find(driver, "cuStreamCreate", &stream_create) && find(driver, "cuStreamDestroy_v2", &stream_destroy)
           && find(driver, "cuemu_live", &live) && find(driver, "cuemu_fail_call", &fail_call);
}

static void *current(void) {
    void *context = NULL;
    CHECK(get_current(&context) == 0);
    return context;
}

static void devices(void) {
    CHECK(wst_device_count() == 2);
    wst_device_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    OK(wst_device_info(0, &info, &error));
    CHECK(strcmp(info.name, "cpu") == 0);
    OK(wst_device_info(1, &info, &error));
    CHECK(strcmp(info.name, "cuda:0") == 0 && strstr(info.description, "Emulated GPU (compute capability 9.0)"));
    CHECK(info.memory_bytes > 0 && info.memory_available_bytes > 0 && info.threads > 0);
    CHECK(info.memory_available_bytes <= info.memory_bytes);
    INVALID("index", wst_device_info(2, &info, &error));
    CHECK(live(NULL) == 0);
}

static wst_model_options *options_of(const char *device) {
    wst_model_options *options = wst_model_options_new();
    OK(wst_model_options_set_device(options, device, &error));
    OK(wst_model_options_set_compute_dtype(options, WST_F32, &error));
    OK(wst_model_options_set_threads(options, 1, &error));
    return options;
}

static wst_model *open_on(const char *folder, const wst_model_options *options) {
    wst_model *model = NULL;
    OK(wst_model_open(folder, options, &model, &error));
    return model;
}

static wst_image *generate(const wst_model *model) {
    wst_generate_options *options = quick_options(model, 7);
    wst_image *image = NULL;
    OK(wst_generate(model, options, &image, 1, &error));
    wst_generate_options_free(options);
    return image;
}

/* Mean difference of a byte. */
static double distance(const wst_image *a, const wst_image *b) {
    size_t bytes = (size_t)3 * wst_image_width(a) * wst_image_height(a);
    const unsigned char *x = wst_image_data(a), *y = wst_image_data(b);
    double sum = 0;
    for (size_t i = 0; i < bytes; ++i) sum += abs((int)x[i] - (int)y[i]);
    return sum / (double)bytes;
}

static void pictures(const char *folder) {
    wst_model_options *options = options_of("cuda");
    wst_model *model = NULL;
    INVALID("cuda:9: ", wst_model_options_set(options, "device", "cuda:9: ", &error));
    OK(wst_model_options_set_device(options, "cuda:9", &error));
    INVALID("cuda:9", wst_model_open(folder, options, &model, &error));
    OK(wst_model_options_set_device(options, "cuda", &error));
    model = open_on(folder, options);
    wst_model_options_free(options);
    wst_image *first = generate(model), *second = generate(model);
    CHECK(same_image(first, second));
    wst_model_info_t info;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    OK(wst_model_info(model, &info, &error));
    CHECK(info.bytes_device > 0);
    wst_model_options *on_cpu = options_of("cpu");
    wst_model *cpu = open_on(folder, on_cpu);
    wst_model_options_free(on_cpu);
    wst_image *of_cpu = generate(cpu);
    CHECK(distance(first, of_cpu) < 2);
    wst_image_free(of_cpu);
    wst_model_free(cpu);
    wst_image_free(second);
    wst_model_free(model);
    CHECK(live(NULL) == 0);
    /* A picture lies on the host, and outlives the GPU. */
    CHECK(wst_image_data(first)[0] <= 255);
    wst_image_free(first);
}

static void context_and_stream(const char *folder) {
    void *context = NULL, *stream = NULL;
    CHECK(retain(&context, 0) == 0 && set_current(context) == 0 && stream_create(&stream, 1) == 0);
    wst_model_options *options = options_of("cuda:0");
    OK(wst_model_options_set_cuda_stream(options, stream, &error));
    wst_model *model = open_on(folder, options);
    CHECK(current() == context);
    wst_image *image = generate(model);
    CHECK(current() == context);
    CHECK(live("stream") == 1);
    wst_image_free(image);
    wst_model_free(model);
    CHECK(current() == context);
    OK(wst_model_options_set_cuda_stream(options, NULL, &error));
    wst_model_options_free(options);
    CHECK(stream_destroy(stream) == 0 && set_current(NULL) == 0 && release(0) == 0);
    CHECK(live(NULL) == 0);
}

static void failures(const char *folder) {
    wst_model_options *options = options_of("cuda");
    wst_model *model = NULL;
    fail_call("cuDevicePrimaryCtxRetain", 1, 719);
    FAILS(WST_DEVICE, "cuDevicePrimaryCtxRetain", wst_model_open(folder, options, &model, &error));
    CHECK(model == NULL && live(NULL) == 0);
    model = open_on(folder, options);
    wst_model_options_free(options);
    wst_image *right = generate(model), *image = NULL;
    wst_generate_options *o = quick_options(model, 7);
    fail_call("cuLaunchKernel", 20, 719);
    FAILS(WST_DEVICE, "CUDA_ERROR_LAUNCH_FAILED", wst_generate(model, o, &image, 1, &error));
    fail_call("cuMemcpyDtoHAsync_v2", 1, 700);
    FAILS(WST_DEVICE, "cuda:0", wst_generate(model, o, &image, 1, &error));
    CHECK(image == NULL);
    fail_call(NULL, -1, 0);
    OK(wst_generate(model, o, &image, 1, &error));
    CHECK(same_image(right, image));
    wst_generate_options_free(o);
    wst_image_free(image);
    wst_image_free(right);
    wst_model_free(model);
    CHECK(live(NULL) == 0);
}

int main(int argc, char **argv) {
    if (argc != 2 || !find_all()) return 2; /* MODEL */
    devices();
    CHECK(current() == NULL);
    pictures(argv[1]);
    CHECK(current() == NULL);
    context_and_stream(argv[1]);
    failures(argv[1]);
    CHECK(current() == NULL);
    return summary("cuda");
}
