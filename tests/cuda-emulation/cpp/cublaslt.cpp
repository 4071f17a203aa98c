// A stand-in libcublasLt.so.13: D = epilogue(alpha op(A) op(B) + beta C), summed in float, on the fake driver's streams.
//
// It refuses what the library refuses or would only do slowly and by chance: types that do not go together, a bias
// over a row-major result, operands that are aligned less than the algorithm was asked for.
#include "fake.h"
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1,
    ALLOC_FAILED = 3,
    INVALID_VALUE = 7,
    EXECUTION_FAILED = 13,
    INTERNAL_ERROR = 14,
    NOT_SUPPORTED = 15,
};

enum Type { F32 = 0, F16 = 2, BF16 = 14 };
enum Compute { IN_F32 = 68, IN_F32_PEDANTIC = 69, FAST_F16 = 74, FAST_BF16 = 75, FAST_TF32 = 77 };
enum Epilogue { RELU = 2, BIAS = 4, GELU = 32 }; // bits, but for 1, which is none of them

namespace {

struct Handle {};

struct Description {
    int32_t compute, scale, pointer_mode = 0, transpose_a = 0, transpose_b = 0, transpose_c = 0;
    uint32_t epilogue = 1;
    uint64_t bias = 0, auxiliary = 0;
    int64_t bias_stride = 0, auxiliary_ld = 0;
    int32_t bias_type = -1, multiprocessors = 0;
};

struct Layout {
    uint32_t type;
    int32_t order = 0; // 0 columns, 1 rows
    uint64_t rows, columns;
    int64_t ld;
    int32_t batch = 1;
    int64_t stride = 0;

    size_t element() const { return type == F32 ? 4 : 2; }
    size_t at(uint64_t row, uint64_t column) const { return order ? row * ld + column : column * ld + row; }
    size_t elements() const { return rows && columns ? at(rows - 1, columns - 1) + 1 : 0; }
    size_t bytes() const { return (elements() + (batch - 1) * (size_t)stride) * element(); }
    bool valid() const { return ld >= (int64_t)(order ? columns : rows) && batch >= 1; }
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};
};

// What an algorithm that the heuristic gave out was found for.
struct Algorithm {
    uint64_t magic, problem, workspace;
    uint32_t alignment[4];
    uint64_t unused[3];
};
static_assert(sizeof(Algorithm) == 64);
constexpr uint64_t MAGIC = 0x63756d754c740001;

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

// --- Handles ----------------------------------------------------------------------------------------------------

struct Handles {
    std::mutex lock;
    std::set<const void *> alive;
};
Handles &handles() {
    static Handles &handles = *new Handles;
    return handles;
}

bool alive(const void *handle) {
    std::lock_guard<std::mutex> lock(handles().lock);
    return handles().alive.count(handle);
}

template <class T> int hand_out(T **to, T *made) {
    std::lock_guard<std::mutex> lock(handles().lock);
    handles().alive.insert(*to = made);
    cuemu_count("library handle", 1);
    return SUCCESS;
}

template <class T> int take_back(T *handle) {
    {
        std::lock_guard<std::mutex> lock(handles().lock);
        if (!handles().alive.erase(handle)) return INVALID_VALUE;
    }
    delete handle;
    cuemu_count("library handle", -1);
    return SUCCESS;
}

int status_of(int driver_code) {
    return !driver_code ? SUCCESS : driver_code == 2 ? ALLOC_FAILED : INTERNAL_ERROR;
}

// --- The product ------------------------------------------------------------------------------------------------

float from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    float magnitude;
    uint32_t wide = rest << 13;
    memcpy(&magnitude, &wide, 4);
    magnitude *= 0x1p112f;
    if (rest >= 0x7c00) magnitude = rest > 0x7c00 ? NAN : INFINITY;
    return sign ? -magnitude : magnitude;
}

uint16_t to_f16(float x) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float magnitude = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | (uint16_t)std::nearbyint(magnitude * 0x1p24f);
    int exponent = std::ilogb(magnitude);
    float mantissa = std::nearbyint(std::ldexp(magnitude, 10 - exponent)); // 1024 to 2048
    return sign | (uint16_t)((exponent + 14) * 1024 + (int)mantissa);
}

float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// x with the lowest `drop` bits of its mantissa rounded away, to even.
float rounded(float x, int drop) {
    uint32_t u, half = (1u << (drop - 1)) - 1;
    memcpy(&u, &x, 4);
    if (std::isfinite(x)) u = (u + half + (u >> drop & 1)) >> drop << drop;
    memcpy(&x, &u, 4);
    return x;
}

uint16_t to_bf16(float x) {
    if (std::isnan(x)) return 0x7fff;
    uint32_t u;
    x = rounded(x, 16);
    memcpy(&u, &x, 4);
    return u >> 16;
}

float load(uint32_t type, const void *from, size_t at) {
    if (type == F32) return ((const float *)from)[at];
    uint16_t bits = ((const uint16_t *)from)[at];
    return type == F16 ? from_f16(bits) : from_bf16(bits);
}

void store(uint32_t type, void *to, size_t at, float x) {
    if (type == F32) ((float *)to)[at] = x;
    else ((uint16_t *)to)[at] = type == F16 ? to_f16(x) : to_bf16(x);
}

struct Product {
    Description description;
    Layout a, b, c, d;
    const char *a_data, *b_data, *c_data;
    char *d_data, *workspace;
    size_t workspace_bytes;
    float alpha, beta;
    const float *device_alpha, *device_beta;
};

// As a fast mode of multiplication sees a factor.
float factor(int compute, float x) {
    if (compute == FAST_TF32) return rounded(x, 13);
    if (compute == FAST_BF16) return rounded(x, 16);
    return compute == FAST_F16 ? from_f16(to_f16(x)) : x;
}

// A matrix or its transpose, row by row.
std::vector<float> rows(const Layout &layout, const char *data, bool transpose, int compute) {
    uint64_t height = transpose ? layout.columns : layout.rows, width = transpose ? layout.rows : layout.columns;
    std::vector<float> all(height * width);
    for (uint64_t i = 0; i < height; i++)
        for (uint64_t j = 0; j < width; j++) {
            size_t at = transpose ? layout.at(j, i) : layout.at(i, j);
            all[i * width + j] = factor(compute, load(layout.type, data, at));
        }
    return all;
}

__attribute__((target_clones("avx2", "default"))) void add_row(float *sum, const float *row, float by, size_t count) {
    for (size_t i = 0; i < count; i++) sum[i] += by * row[i];
}

float activate(uint32_t epilogue, float x) {
    if (epilogue & RELU) return x > 0 ? x : 0;
    if (epilogue & GELU) return 0.5f * x * (1 + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x;
}

void multiply(const Product &p, int64_t batch) {
    auto of = [&](const Layout &layout, const char *data) { return data + batch * layout.stride * layout.element(); };
    const Description &how = p.description;
    auto a = rows(p.a, of(p.a, p.a_data), how.transpose_a, how.compute);
    auto b = rows(p.b, of(p.b, p.b_data), how.transpose_b, how.compute);
    size_t height = p.d.rows, width = p.d.columns, depth = a.size() / height;
    float alpha = p.device_alpha ? *p.device_alpha : p.alpha, beta = p.device_beta ? *p.device_beta : p.beta;
    uint32_t bias_type = how.bias_type < 0 ? p.d.type : how.bias_type;
    auto *bias = (const char *)how.bias + batch * how.bias_stride * (bias_type == F32 ? 4 : 2);
    std::vector<float> sum(width);
    for (size_t i = 0; i < height; i++) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (size_t k = 0; k < depth; k++) add_row(sum.data(), &b[k * width], a[i * depth + k], width);
        for (size_t j = 0; j < width; j++) {
            float x = alpha * sum[j];
            if (beta != 0) x += beta * load(p.c.type, of(p.c, p.c_data), p.c.at(i, j));
            if (how.epilogue & BIAS) x += load(bias_type, bias, i);
            store(p.d.type, (char *)of(p.d, p.d_data), p.d.at(i, j), activate(how.epilogue, x));
        }
    }
}

int run(void *data) {
    const Product &p = *(Product *)data;
    if (p.workspace_bytes) memset(p.workspace, 0xff, p.workspace_bytes);
    for (int64_t i = 0; i < p.d.batch; i++) multiply(p, i);
    return 0;
}

void drop(void *data) { delete (Product *)data; }

// --- What is allowed --------------------------------------------------------------------------------------------

bool known(uint32_t type) { return type == F32 || type == F16 || type == BF16; }

// Shapes, types and options that go together.
int check(const Description &how, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    for (const Layout *each : {&a, &b, &c, &d}) {
        if (!each->valid() || each->batch != d.batch) return INVALID_VALUE;
        if (!known(each->type) || each->order > 1) return NOT_SUPPORTED;
    }
    uint64_t m = how.transpose_a ? a.columns : a.rows, k = how.transpose_a ? a.rows : a.columns;
    uint64_t k_of_b = how.transpose_b ? b.columns : b.rows, n = how.transpose_b ? b.rows : b.columns;
    if (m != d.rows || n != d.columns || k != k_of_b || c.rows != m || c.columns != n) return INVALID_VALUE;
    if (how.scale != F32 || a.type != b.type || c.type != d.type || how.transpose_c) return NOT_SUPPORTED;
    if (d.type != F32 && d.type != a.type) return NOT_SUPPORTED;
    bool fast = how.compute == FAST_F16 || how.compute == FAST_BF16 || how.compute == FAST_TF32;
    if (!fast && how.compute != IN_F32 && how.compute != IN_F32_PEDANTIC) return NOT_SUPPORTED;
    if (fast && a.type != F32) return NOT_SUPPORTED;
    uint32_t epilogue = how.epilogue == 1 ? 0 : how.epilogue;
    if (epilogue & ~(RELU | BIAS | GELU) || (epilogue & RELU && epilogue & GELU)) return NOT_SUPPORTED;
    if (epilogue & BIAS && (d.order == 1 || (how.bias_type >= 0 && (uint32_t)how.bias_type != d.type)))
        return NOT_SUPPORTED;
    return SUCCESS;
}

uint64_t problem(const Description &how, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    uint64_t sum = how.compute;
    auto add = [&](uint64_t value) { sum = (sum ^ value) * 0x100000001b3; };
    add(how.transpose_a), add(how.transpose_b), add(how.epilogue);
    for (const Layout *each : {&a, &b, &c, &d})
        add(each->type), add(each->order), add(each->rows), add(each->columns), add(each->ld), add(each->batch);
    return sum;
}

int check(const Algorithm &algorithm, const Product &p) {
    const void *operands[] = {p.a_data, p.b_data, p.c_data, p.d_data};
    bool same = algorithm.magic == MAGIC && algorithm.problem == problem(p.description, p.a, p.b, p.c, p.d);
    if (!same || algorithm.workspace > p.workspace_bytes) return INVALID_VALUE;
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)operands[i] % algorithm.alignment[i]) return INVALID_VALUE;
    return SUCCESS;
}

// Operands lie in live memory, and the result over none that is read.
int check_memory(const Product &p) {
    struct {
        const char *data;
        size_t bytes;
    } const read[] = {{p.a_data, p.a.bytes()}, {p.b_data, p.b.bytes()}, {p.c_data, p.c.bytes()}};
    bool reads_c = p.device_beta || p.beta != 0;
    for (int i = 0; i < 2 + reads_c; i++)
        if (!cuemu_inside((uintptr_t)read[i].data, read[i].bytes)) return INVALID_VALUE;
    if (!cuemu_inside((uintptr_t)p.d_data, p.d.bytes())) return INVALID_VALUE;
    for (int i = 0; i < 2; i++)
        if (read[i].data < p.d_data + p.d.bytes() && p.d_data < read[i].data + read[i].bytes) return INVALID_VALUE;
    if (p.workspace_bytes && !cuemu_inside((uintptr_t)p.workspace, p.workspace_bytes)) return INVALID_VALUE;
    if ((uintptr_t)p.workspace % 16) return INVALID_VALUE;
    const Description &how = p.description;
    size_t element = how.bias_type == F32 || (how.bias_type < 0 && p.d.type == F32) ? 4 : 2;
    bool bias = how.epilogue & BIAS && how.epilogue != 1;
    if (bias && !cuemu_inside(how.bias, element * (p.d.rows + (p.d.batch - 1) * how.bias_stride))) return INVALID_VALUE;
    return SUCCESS;
}

// --- Attributes -------------------------------------------------------------------------------------------------

struct Field {
    int attribute;
    void *to;
    size_t bytes;
};
template <class T> Field field(int attribute, T &to) { return {attribute, &to, sizeof(T)}; }

int set(std::initializer_list<Field> fields, int attribute, const void *value, size_t bytes) {
    for (const Field &field : fields) {
        if (field.attribute != attribute) continue;
        if (!value || bytes != field.bytes) return INVALID_VALUE;
        memcpy(field.to, value, bytes);
        return SUCCESS;
    }
    return NOT_SUPPORTED;
}

} // namespace

// --- Entry points -----------------------------------------------------------------------------------------------

#define API FAKE_API int
#define ENTER(...)                                                                                                     \
    if (int error = status_of(cuemu_enter(__func__))) return error;                                                            \
    for (const void *each : std::initializer_list<const void *>{__VA_ARGS__})                                          \
        if (!alive(each)) return INVALID_VALUE

FAKE_API size_t cublasLtGetVersion() { return 130000; }
FAKE_API size_t cublasLtGetCudartVersion() { return 13000; }

FAKE_API const char *cublasLtGetStatusName(int status) {
    switch (status) {
    case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unknown status";
    }
}
FAKE_API const char *cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }

API cublasLtCreate(Handle **to) {
    if (int error = status_of(cuemu_enter(__func__))) return error;
    return cuemu_has_context() ? hand_out(to, new Handle) : NOT_INITIALIZED;
}
API cublasLtDestroy(Handle *handle) { return take_back(handle); }

API cublasLtMatmulDescCreate(Description **to, int32_t compute, int32_t scale) {
    if (int error = status_of(cuemu_enter(__func__))) return error;
    auto *made = new Description;
    made->compute = compute, made->scale = scale;
    return hand_out(to, made);
}
API cublasLtMatmulDescDestroy(Description *description) { return take_back(description); }

API cublasLtMatmulDescSetAttribute(Description *d, int attribute, const void *value, size_t bytes) {
    ENTER(d);
    return set({field(0, d->compute), field(1, d->scale), field(2, d->pointer_mode), field(3, d->transpose_a),
                field(4, d->transpose_b), field(5, d->transpose_c), field(7, d->epilogue), field(8, d->bias),
                field(10, d->bias_stride), field(11, d->auxiliary), field(12, d->auxiliary_ld),
                field(15, d->multiprocessors), field(26, d->bias_type)},
               attribute, value, bytes);
}

API cublasLtMatrixLayoutCreate(Layout **to, uint32_t type, uint64_t rows, uint64_t columns, int64_t ld) {
    if (int error = status_of(cuemu_enter(__func__))) return error;
    auto *made = new Layout;
    made->type = type, made->rows = rows, made->columns = columns, made->ld = ld;
    return hand_out(to, made);
}
API cublasLtMatrixLayoutDestroy(Layout *layout) { return take_back(layout); }

API cublasLtMatrixLayoutSetAttribute(Layout *l, int attribute, const void *value, size_t bytes) {
    ENTER(l);
    return set({field(0, l->type), field(1, l->order), field(2, l->rows), field(3, l->columns), field(4, l->ld),
                field(5, l->batch), field(6, l->stride)},
               attribute, value, bytes);
}

API cublasLtMatmulPreferenceCreate(Preference **to) {
    if (int error = status_of(cuemu_enter(__func__))) return error;
    return hand_out(to, new Preference);
}
API cublasLtMatmulPreferenceDestroy(Preference *preference) { return take_back(preference); }

API cublasLtMatmulPreferenceSetAttribute(Preference *p, int attribute, const void *value, size_t bytes) {
    ENTER(p);
    uint32_t ignored;
    return set({field(0, ignored), field(1, p->workspace), field(3, ignored), field(5, p->alignment[0]),
                field(6, p->alignment[1]), field(7, p->alignment[2]), field(8, p->alignment[3]), field(9, ignored)},
               attribute, value, bytes);
}

// The first algorithm wants as much workspace as it may have, up to 1 MiB; the others half of that, and none.
API cublasLtMatmulAlgoGetHeuristic(Handle *handle, Description *how, Layout *a, Layout *b, Layout *c, Layout *d,
                                   Preference *preference, int wanted, Heuristic *results, int *count) {
    ENTER(handle, how, a, b, c, d, preference);
    *count = 0;
    if (wanted < 1) return INVALID_VALUE;
    if (int error = check(*how, *a, *b, *c, *d)) return error;
    uint64_t most = std::min<uint64_t>(preference->workspace, 1 << 20) / 256 * 256;
    for (uint64_t workspace : {most, most / 512 * 256, (uint64_t)0}) {
        if (*count == wanted || (*count && results[*count - 1].workspace == workspace)) break;
        Algorithm algorithm{MAGIC, problem(*how, *a, *b, *c, *d), workspace, {}, {}};
        memcpy(algorithm.alignment, preference->alignment, sizeof algorithm.alignment);
        results[(*count)++] = {algorithm, workspace, SUCCESS, 1.0f, {}};
    }
    return SUCCESS;
}

API cublasLtMatmul(Handle *handle, Description *how, const float *alpha, const void *a, Layout *a_layout,
                   const void *b, Layout *b_layout, const float *beta, const void *c, Layout *c_layout, void *d,
                   Layout *d_layout, const Algorithm *algorithm, void *workspace, size_t workspace_bytes,
                   void *stream) {
    ENTER(handle, how, a_layout, b_layout, c_layout, d_layout);
    if (int error = check(*how, *a_layout, *b_layout, *c_layout, *d_layout)) return error;
    if (!alpha || !beta || how->pointer_mode > 1) return INVALID_VALUE;
    bool on_device = how->pointer_mode == 1;
    auto product = std::make_unique<Product>(Product{
        *how, *a_layout, *b_layout, *c_layout, *d_layout, (const char *)a, (const char *)b, (const char *)c, (char *)d,
        (char *)workspace, workspace_bytes, on_device ? 0 : *alpha, on_device ? 0 : *beta, on_device ? alpha : nullptr,
        on_device ? beta : nullptr});
    if (product->description.epilogue == 1) product->description.epilogue = 0;
    if (algorithm) {
        Product asked = *product;
        asked.description.epilogue = how->epilogue;
        if (int error = check(*algorithm, asked)) return error;
        product->workspace_bytes = algorithm->workspace;
    }
    if (int error = check_memory(*product)) return error;
    return cuemu_enqueue(stream, run, drop, product.release()) ? EXECUTION_FAILED : SUCCESS;
}
