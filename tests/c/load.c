/* dlopen and dlclose, a hundred times; two copies in one process. No thread and no mapping stays. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>

#include "check.h"

/* CHECK only: nothing of the library is linked here. */
typedef struct {
    void *library;
    wst_status (*open)(const char *, const wst_model_options *, wst_model **, wst_error **);
    void (*close)(wst_model *);
    wst_status (*options_new)(const wst_model *, wst_generate_options **, wst_error **);
    void (*options_free)(wst_generate_options *);
    wst_status (*prompt)(wst_generate_options *, const char *, const char *, wst_error **);
    wst_status (*stage_c)(wst_generate_options *, uint32_t, float, wst_error **);
    wst_status (*stage_b)(wst_generate_options *, uint32_t, float, wst_error **);
    wst_status (*set)(wst_generate_options *, const char *, const char *, wst_error **);
    wst_status (*generate)(const wst_model *, const wst_generate_options *, wst_image **, size_t, wst_error **);
    wst_status (*write_png)(const wst_image *, const char *, wst_error **);
    void (*image_free)(wst_image *);
    void (*error_free)(wst_error *);
    const char *(*version)(void);
} library_t;

static void symbol(library_t *l, const char *name, void *to) {
    void *found = dlsym(l->library, name);
    memcpy(to, &found, sizeof found);
    if (!found) ++failed;
}

static library_t load(const char *path) {
    library_t l = {.library = dlopen(path, RTLD_NOW | RTLD_LOCAL)};
    if (!l.library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    symbol(&l, "wst_model_open", &l.open);
    symbol(&l, "wst_model_free", &l.close);
    symbol(&l, "wst_generate_options_new", &l.options_new);
    symbol(&l, "wst_generate_options_free", &l.options_free);
    symbol(&l, "wst_generate_options_add_prompt", &l.prompt);
    symbol(&l, "wst_generate_options_set_stage_c", &l.stage_c);
    symbol(&l, "wst_generate_options_set_stage_b", &l.stage_b);
    symbol(&l, "wst_generate_options_set", &l.set);
    symbol(&l, "wst_generate", &l.generate);
    symbol(&l, "wst_image_write_png", &l.write_png);
    symbol(&l, "wst_image_free", &l.image_free);
    symbol(&l, "wst_error_free", &l.error_free);
    symbol(&l, "wst_version", &l.version);
    return l;
}

static wst_generate_options *options(library_t *l, const wst_model *model) {
    wst_generate_options *o = NULL;
    failed += l->options_new(model, &o, NULL) != WST_OK || l->prompt(o, "apple", NULL, NULL) != WST_OK
              || l->stage_c(o, 1, 1.0f, NULL) != WST_OK || l->stage_b(o, 1, 1.0f, NULL) != WST_OK;
    return o;
}

static void use(library_t *l, const char *folder, int panic) {
    wst_model *model = NULL;
    wst_image *image = NULL;
    wst_error *error = NULL;
    CHECK(l->open(folder, NULL, &model, NULL) == WST_OK);
    wst_generate_options *o = options(l, model);
    CHECK(l->generate(model, o, &image, 1, NULL) == WST_OK && image);
    CHECK(l->write_png(image, "/nowhere/x.png", &error) == WST_IO && error);
    l->error_free(error);
    if (panic) {
        CHECK(l->set(o, "test.panic", "thread", NULL) == WST_INTERNAL);
        l->options_free(o);
        o = options(l, model);
        CHECK(l->set(o, "test.panic", "caller", NULL) == WST_INTERNAL);
    }
    l->image_free(image);
    l->options_free(o);
    l->close(model);
}

static int thread_count(void) {
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks));) count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

static int mappings(const char *what) {
    char line[4096];
    int count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) count += strstr(line, what) != NULL;
    fclose(maps);
    return count;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2; /* LIBRARY COPY MODEL */
    const char *path = argv[1], *copy = argv[2], *folder = argv[3];
    for (int i = 0; i < 100; ++i) {
        library_t l = load(path);
        CHECK(strcmp(l.version(), WST_VERSION) == 0);
        if (i < 5 || i % 20 == 0) use(&l, folder, i % 2);
        CHECK(thread_count() == 1);
        CHECK(dlclose(l.library) == 0);
        CHECK(mappings("libwuerstchen") == 0 && mappings(".safetensors") == 0);
    }
    library_t first = load(path), second = load(copy);
    CHECK(first.library != second.library && (void *)first.open != (void *)second.open);
    use(&first, folder, 1);
    use(&second, folder, 1);
    use(&first, folder, 0);
    CHECK(dlclose(first.library) == 0);
    use(&second, folder, 1);
    CHECK(dlclose(second.library) == 0);
    CHECK(thread_count() == 1 && mappings("libwuerstchen") == 0 && mappings("wuerstchen_copy") == 0);
    printf("load: %d passed, %d failed\n", passed, failed);
    return failed != 0;
}
