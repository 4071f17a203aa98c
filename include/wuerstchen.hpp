// wuerstchen.hpp: the C++17 face of wuerstchen.h. Header-only; every call that fails throws wst::Error.
//
//     wst::Model model("models/emoji-v1");
//     wst::GenerateOptions options(model);
//     options.add_prompt("a red apple").set_seed(7);
//     model.generate(options).front().write_png("apple.png");
//
// A stage is trained with a Trainer, over pictures and captions at hand or from a Loader:
//
//     wst::Trainer trainer(model, wst::TrainOptions(WST_STAGE_C).set_learning_rate(1e-4f));
//     wst::Loader loader(wst::LoaderOptions("pictures").set_side(512).set_batch_size(8));
//     for (int i = 0; i < 1000; ++i) std::printf("%f\n", trainer.step(loader)->loss);
//     trainer.export_model("models/trained");
//
// Handles are move-only and free themselves in any order. Callbacks are std::function and may throw: the run is
// cancelled, and the exception comes out of the call (for a job: out of wait and images).
#ifndef WUERSTCHEN_HPP
#define WUERSTCHEN_HPP

#include "wuerstchen.h"

#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace wst {

/// A failed call: what() is the library's message, status() its kind, place() the parameter, file or tensor.
class Error : public std::runtime_error {
public:
    Error(wst_status status, const std::string &message, std::string place = {})
        : std::runtime_error(message), status_(status), place_(std::move(place)) {}
    [[nodiscard]] wst_status status() const noexcept { return status_; }
    [[nodiscard]] const std::string &place() const noexcept { return place_; }

private:
    wst_status status_;
    std::string place_;
};

/// The version of the library that runs.
[[nodiscard]] inline std::string_view version() noexcept { return wst_version(); }

/// A view of contiguous values that belong to somebody else.
template <class T> class span {
public:
    constexpr span() noexcept = default;
    constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    template <class C, class = decltype(std::declval<C &>().data())>
    constexpr span(C &&values) noexcept : data_(values.data()), size_(values.size()) {}
    [[nodiscard]] constexpr T *data() const noexcept { return data_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }
    [[nodiscard]] constexpr T *begin() const noexcept { return data_; }
    [[nodiscard]] constexpr T *end() const noexcept { return data_ + size_; }
    [[nodiscard]] constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};

namespace detail {

template <auto Free> struct Deleter {
    template <class T> void operator()(T *handle) const noexcept { Free(handle); }
};
template <class T, auto Free> using Handle = std::unique_ptr<T, Deleter<Free>>;

[[noreturn]] inline void fail(wst_status status, wst_error *error) {
    Handle<wst_error, wst_error_free> owned(error);
    const char *message = error ? wst_error_message(error) : wst_status_name(status);
    throw Error(status, message, wst_error_place(error));
}

/// Calls a function of the C ABI, with the error object as its last argument.
template <class F, class... Args> void call(F function, Args &&...args) {
    wst_error *error = nullptr;
    if (const wst_status status = function(std::forward<Args>(args)..., &error); status != WST_OK) fail(status, error);
}

/// A text for C. One with a NUL byte inside would be cut short in silence: it is refused.
inline const char *c_str(const char *name, const std::string &text) {
    if (text.find('\0') != std::string::npos)
        throw Error(WST_INVALID_ARGUMENT, std::string(name) + ": expected a text without NUL bytes", name);
    return text.c_str();
}

/// The first exception that a callback threw, until the call that ran it rethrows it.
class Caught {
public:
    void keep(std::exception_ptr thrown) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!thrown_) thrown_ = std::move(thrown);
    }
    void rethrow() {
        std::exception_ptr thrown;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            thrown = std::exchange(thrown_, nullptr);
        }
        if (thrown) std::rethrow_exception(thrown);
    }

private:
    std::mutex mutex_;
    std::exception_ptr thrown_;
};

} // namespace detail

/// A compute device; Device::all() lists them, the CPU first.
struct Device {
    std::string name, description;
    std::uint32_t threads = 0;
    std::uint64_t memory_bytes = 0, memory_available_bytes = 0;

    [[nodiscard]] static std::vector<Device> all() {
        std::vector<Device> devices;
        for (std::size_t i = 0; i < wst_device_count(); ++i) {
            wst_device_info_t info{};
            info.struct_size = sizeof info;
            detail::call(wst_device_info, i, &info);
            devices.push_back({info.name, info.description, info.threads, info.memory_bytes, info.memory_available_bytes});
        }
        return devices;
    }
};

/// A sticky flag that asks work to stop, from any thread. Copies share the flag.
class CancelToken {
public:
    CancelToken() : token_(wst_cancel_new(), wst_cancel_free) {
        if (!token_) throw std::bad_alloc();
    }
    void request() const noexcept { wst_cancel_request(token_.get()); }
    void reset() const noexcept { wst_cancel_reset(token_.get()); }
    [[nodiscard]] wst_cancel *get() const noexcept { return token_.get(); }

private:
    std::shared_ptr<wst_cancel> token_;
};

/// A picture: RGB, 8 bits per channel, rows top to bottom.
class Image {
public:
    explicit Image(wst_image *owned) noexcept : image_(owned) {}
    /// Copies `rgb`, 3 * width * height bytes or rows that lie `row_stride` bytes apart.
    Image(std::uint32_t width, std::uint32_t height, span<const std::uint8_t> rgb, std::size_t row_stride = 0) {
        const std::size_t row = std::size_t{3} * width, stride = row_stride ? row_stride : row;
        if (width > 0 && height > 0 && stride >= row && rgb.size() / stride < height - 1u + (rgb.size() % stride >= row ? 0u : 1u))
            throw Error(WST_INVALID_ARGUMENT, "rgb: expected more bytes for this size, found " + std::to_string(rgb.size()), "rgb");
        wst_image *image = nullptr;
        detail::call(wst_image_new, width, height, rgb.data(), row_stride, &image);
        image_.reset(image);
    }
    /// Reads a PNG, JPEG or WebP file.
    [[nodiscard]] static Image read(const std::string &path) {
        wst_image *image = nullptr;
        detail::call(wst_image_read, detail::c_str("path", path), &image);
        return Image(image);
    }
    void write_png(const std::string &path) const { detail::call(wst_image_write_png, get(), detail::c_str("path", path)); }
    [[nodiscard]] std::uint32_t width() const noexcept { return wst_image_width(get()); }
    [[nodiscard]] std::uint32_t height() const noexcept { return wst_image_height(get()); }
    /// The pixels; they live as long as the image.
    [[nodiscard]] span<const std::uint8_t> data() const noexcept {
        return {wst_image_data(get()), std::size_t{3} * width() * height()};
    }
    [[nodiscard]] const wst_image *get() const noexcept { return image_.get(); }

private:
    detail::Handle<wst_image, wst_image_free> image_;
};

/// The element type of a C++ type; std::uint16_t is none, say F16 or BF16 with the other constructor.
template <class T> inline constexpr wst_dtype dtype_of = -1;
template <> inline constexpr wst_dtype dtype_of<float> = WST_F32;
template <> inline constexpr wst_dtype dtype_of<std::int64_t> = WST_I64;
template <> inline constexpr wst_dtype dtype_of<std::uint8_t> = WST_U8;
template <> inline constexpr wst_dtype dtype_of<std::int8_t> = WST_I8;

/// A block of numbers in host memory, [N, C, H, W].
class Tensor {
public:
    explicit Tensor(wst_tensor *owned) noexcept : tensor_(owned) {}
    /// Copies `data`, which has as many elements as `shape` tells.
    template <class T> Tensor(span<const std::int64_t> shape, span<const T> data) {
        static_assert(dtype_of<T> >= 0, "float, std::int64_t, std::uint8_t or std::int8_t");
        std::uint64_t elements = 1;
        for (const std::int64_t dim : shape) {
            const auto d = static_cast<std::uint64_t>(dim);
            if (dim < 0 || (d != 0 && elements > std::numeric_limits<std::uint64_t>::max() / d)) elements = ~std::uint64_t{0};
            else elements *= d;
        }
        if (elements != data.size())
            throw Error(WST_INVALID_ARGUMENT, "data: expected as many elements as the shape tells, found " + std::to_string(data.size()), "data");
        wst_tensor *tensor = nullptr;
        detail::call(wst_tensor_new, dtype_of<T>, shape.data(), shape.size(), static_cast<const void *>(data.data()), &tensor);
        tensor_.reset(tensor);
    }
    [[nodiscard]] wst_dtype dtype() const noexcept { return wst_tensor_dtype(get()); }
    [[nodiscard]] span<const std::int64_t> shape() const noexcept { return {wst_tensor_shape(get()), wst_tensor_rank(get())}; }
    [[nodiscard]] std::size_t nbytes() const noexcept { return wst_tensor_nbytes(get()); }
    /// The elements; they live as long as the tensor.
    template <class T> [[nodiscard]] span<const T> data() const {
        if (dtype_of<T> != dtype()) throw Error(WST_INVALID_ARGUMENT, "data: the tensor holds another type", "data");
        return {static_cast<const T *>(wst_tensor_data(get())), nbytes() / sizeof(T)};
    }
    [[nodiscard]] const wst_tensor *get() const noexcept { return tensor_.get(); }

private:
    detail::Handle<wst_tensor, wst_tensor_free> tensor_;
};

/// Where a run stands. `preview` is null, or borrowed until the callback returns (from Job::poll: until the next).
struct Progress {
    wst_stage stage = WST_STAGE_C;
    std::uint32_t step = 0, steps = 0;
    double seconds = 0;
    const wst_image *preview = nullptr;

    /// The preview's pixels, if there is one.
    [[nodiscard]] span<const std::uint8_t> preview_data() const noexcept {
        return {wst_image_data(preview), std::size_t{3} * wst_image_width(preview) * wst_image_height(preview)};
    }
};

using ProgressFunction = std::function<void(const Progress &)>;
/// Called on any thread of the library, several at once. What it throws is dropped.
using LogFunction = std::function<void(wst_log_level, std::string_view)>;

/// How a model is opened.
class ModelOptions {
public:
    ModelOptions() : options_(wst_model_options_new()) {
        if (!options_) throw std::bad_alloc();
    }
    ModelOptions &set_device(const std::string &device) { return set_(wst_model_options_set_device, detail::c_str("device", device)); }
    ModelOptions &set_threads(std::uint32_t threads) { return set_(wst_model_options_set_threads, threads); }
    ModelOptions &set_compute_dtype(wst_dtype dtype) { return set_(wst_model_options_set_compute_dtype, dtype); }
    /// A CUstream or cudaStream_t that all work runs on; it must outlive the model.
    ModelOptions &set_cuda_stream(void *stream) { return set_(wst_model_options_set_cuda_stream, stream); }
    ModelOptions &set_residency(wst_residency residency) { return set_(wst_model_options_set_residency, residency); }
    ModelOptions &set_log(wst_log_level level, LogFunction function) {
        auto log = std::make_shared<LogFunction>(std::move(function));
        set_(wst_model_options_set_log, level, *log ? &forward_log : nullptr, static_cast<void *>(log.get()));
        log_ = std::move(log);
        return *this;
    }
    /// A LoRA adapter of Stage C; several add up.
    ModelOptions &add_lora(const std::string &path, float scale = 1.0f) {
        return set_(wst_model_options_add_lora, detail::c_str("path", path), scale);
    }
    ModelOptions &set(const std::string &key, const std::string &value) {
        return set_(wst_model_options_set, detail::c_str("key", key), detail::c_str("value", value));
    }
    [[nodiscard]] const wst_model_options *get() const noexcept { return options_.get(); }

private:
    friend class Model;
    template <class F, class... Args> ModelOptions &set_(F function, Args... args) {
        detail::call(function, options_.get(), args...);
        return *this;
    }
    static void forward_log(wst_log_level level, const char *message, void *user_data) noexcept {
        try {
            (*static_cast<LogFunction *>(user_data))(level, message);
        } catch (...) { // nobody waits for a log line
        }
    }
    detail::Handle<wst_model_options, wst_model_options_free> options_;
    std::shared_ptr<LogFunction> log_;
};

class GenerateOptions;

/// An opened model. Const members may be called from any number of threads at once.
class Model {
public:
    explicit Model(const std::string &path) { open(path, nullptr); }
    Model(const std::string &path, const ModelOptions &options) : log_(options.log_) { open(path, options.get()); }

    [[nodiscard]] wst_model_info_t info() const {
        wst_model_info_t info{};
        info.struct_size = sizeof info;
        detail::call(wst_model_info, get(), &info);
        return info;
    }
    [[nodiscard]] inline std::vector<Image> generate(const GenerateOptions &options) const;

    [[nodiscard]] Tensor tokenize(wst_stage for_stage, const std::string &text) const {
        return tensor_(wst_tokenize, for_stage, detail::c_str("text", text));
    }
    [[nodiscard]] Tensor encode_text(wst_stage for_stage, span<const std::string> texts) const {
        std::vector<const char *> pointers;
        for (const std::string &text : texts) pointers.push_back(detail::c_str("texts", text));
        return tensor_(wst_encode_text, for_stage, static_cast<const char *const *>(pointers.data()), pointers.size());
    }
    [[nodiscard]] Tensor encode_image(span<const Image> images) const { return images_(wst_encode_image, images); }
    [[nodiscard]] Tensor stage_a_encode(span<const Image> images) const { return images_(wst_stage_a_encode, images); }
    [[nodiscard]] Tensor stage_a_decode(const Tensor &tokens_or_latents) const {
        return tensor_(wst_stage_a_decode, tokens_or_latents.get());
    }
    [[nodiscard]] Tensor stage_b_predict(const Tensor &x, const Tensor &t, const Tensor &latents, const Tensor &text) const {
        return tensor_(wst_stage_b_predict, x.get(), t.get(), latents.get(), text.get());
    }
    [[nodiscard]] Tensor stage_c_predict(const Tensor &x, const Tensor &t, const Tensor &text) const {
        return tensor_(wst_stage_c_predict, x.get(), t.get(), text.get());
    }
    /// `negative_text` may be null.
    [[nodiscard]] inline Tensor stage_b_sample(const Tensor &latents, const Tensor &text, const Tensor *negative_text,
                                               const GenerateOptions &options) const;
    /// `negative_text` and `initial_noise` may be null.
    [[nodiscard]] inline Tensor stage_c_sample(const Tensor &text, const Tensor *negative_text, const Tensor *initial_noise,
                                               const GenerateOptions &options) const;
    [[nodiscard]] const wst_model *get() const noexcept { return model_.get(); }

private:
    friend class GenerateOptions;
    friend class Trainer;
    void open(const std::string &path, const wst_model_options *options) {
        wst_model *model = nullptr;
        detail::call(wst_model_open, detail::c_str("path", path), options, &model);
        model_.reset(model);
    }
    template <class F, class... Args> Tensor tensor_(F function, Args... args) const {
        wst_tensor *tensor = nullptr;
        detail::call(function, get(), args..., &tensor);
        return Tensor(tensor);
    }
    template <class F> Tensor images_(F function, span<const Image> images) const {
        std::vector<const wst_image *> pointers;
        for (const Image &image : images) pointers.push_back(image.get());
        return tensor_(function, static_cast<const wst_image *const *>(pointers.data()), pointers.size());
    }
    // Before the model: the log ends after it.
    std::shared_ptr<LogFunction> log_;
    detail::Handle<wst_model, wst_model_free> model_;
};

/// What to generate; starts from the model's own recommended values.
class GenerateOptions {
public:
    explicit GenerateOptions(const Model &model) : log_(model.log_) {
        wst_generate_options *options = nullptr;
        detail::call(wst_generate_options_new, model.get(), &options);
        options_.reset(options);
    }
    GenerateOptions &add_prompt(const std::string &text) {
        return set_(wst_generate_options_add_prompt, detail::c_str("text", text), static_cast<const char *>(nullptr));
    }
    GenerateOptions &add_prompt(const std::string &text, const std::string &negative_text) {
        return set_(wst_generate_options_add_prompt, detail::c_str("text", text), detail::c_str("negative_text", negative_text));
    }
    GenerateOptions &set_images_per_prompt(std::uint32_t count) { return set_(wst_generate_options_set_images_per_prompt, count); }
    GenerateOptions &set_size(std::uint32_t width, std::uint32_t height) { return set_(wst_generate_options_set_size, width, height); }
    GenerateOptions &set_seed(std::uint64_t seed) { return set_(wst_generate_options_set_seed, seed); }
    GenerateOptions &set_stage_c(std::uint32_t steps, float guidance) { return set_(wst_generate_options_set_stage_c, steps, guidance); }
    GenerateOptions &set_stage_c_sampler(wst_sampler sampler) { return set_(wst_generate_options_set_stage_c_sampler, sampler); }
    GenerateOptions &set_stage_c_timesteps(span<const float> timesteps) {
        return set_(wst_generate_options_set_stage_c_timesteps, timesteps.data(), timesteps.size());
    }
    GenerateOptions &set_stage_b(std::uint32_t steps, float guidance) { return set_(wst_generate_options_set_stage_b, steps, guidance); }
    GenerateOptions &set_stage_b_timesteps(span<const float> timesteps) {
        return set_(wst_generate_options_set_stage_b_timesteps, timesteps.data(), timesteps.size());
    }
    GenerateOptions &set_stage_b_temperature(float start, float end) { return set_(wst_generate_options_set_stage_b_temperature, start, end); }
    GenerateOptions &set_stage_b_choice(wst_choice choice) { return set_(wst_generate_options_set_stage_b_choice, choice); }
    GenerateOptions &set_init_image(const Image &image, float strength) {
        return set_(wst_generate_options_set_init_image, image.get(), strength);
    }
    GenerateOptions &set_init_latents(const Tensor &latents, float strength) {
        return set_(wst_generate_options_set_init_latents, latents.get(), strength);
    }
    GenerateOptions &set_mask(const Image &mask) { return set_(wst_generate_options_set_mask, mask.get()); }
    GenerateOptions &set_preview(std::uint32_t every_n_steps) { return set_(wst_generate_options_set_preview, every_n_steps); }
    /// An exception out of `function` cancels the run and comes out of the call. If set_cancel gave a token, it is
    /// the one that is cancelled, and it stays so until it is reset.
    GenerateOptions &set_progress(ProgressFunction function) {
        auto state = std::make_shared<State>();
        state->function = std::move(function);
        if (user_token_) state->token = *user_token_;
        else set_(wst_generate_options_set_cancel, state->token.get());
        set_(wst_generate_options_set_progress, state->function ? &forward_progress : nullptr, static_cast<void *>(state.get()));
        state_ = std::move(state);
        return *this;
    }
    GenerateOptions &set_cancel(const CancelToken &token) {
        set_(wst_generate_options_set_cancel, token.get());
        user_token_ = token;
        // A fresh state: a job may be running with the old one.
        return state_ && state_->function ? set_progress(ProgressFunction(state_->function)) : *this;
    }
    GenerateOptions &set(const std::string &key, const std::string &value) {
        return set_(wst_generate_options_set, detail::c_str("key", key), detail::c_str("value", value));
    }
    [[nodiscard]] std::size_t image_count() const noexcept { return wst_generate_options_image_count(get()); }
    [[nodiscard]] const wst_generate_options *get() const noexcept { return options_.get(); }

private:
    friend class Model;
    friend class Job;
    struct State {
        ProgressFunction function;
        CancelToken token;
        detail::Caught caught;
    };
    template <class F, class... Args> GenerateOptions &set_(F function, Args... args) {
        detail::call(function, options_.get(), args...);
        return *this;
    }
    static void forward_progress(const wst_progress *p, void *user_data) noexcept {
        State &state = *static_cast<State *>(user_data);
        try {
            state.function({p->stage, p->step, p->steps, p->seconds, p->preview});
        } catch (...) {
            state.caught.keep(std::current_exception());
            state.token.request();
        }
    }
    /// Runs `work`; what a callback threw takes the place of what the library says.
    template <class F> auto run_(F work) const {
        // Only our own token: the user's is sticky on purpose.
        if (state_ && !user_token_) state_->token.reset();
        try {
            return work();
        } catch (const Error &) {
            if (state_) state_->caught.rethrow();
            throw;
        }
    }
    std::shared_ptr<LogFunction> log_;
    std::shared_ptr<State> state_;
    std::optional<CancelToken> user_token_;
    detail::Handle<wst_generate_options, wst_generate_options_free> options_;
};

namespace detail {
inline std::vector<Image> own(const std::vector<wst_image *> &images) {
    std::vector<Image> owned;
    owned.reserve(images.size());
    for (wst_image *image : images) owned.emplace_back(image);
    return owned;
}
} // namespace detail

inline std::vector<Image> Model::generate(const GenerateOptions &options) const {
    return options.run_([&] {
        std::vector<wst_image *> images(options.image_count());
        detail::call(wst_generate, get(), options.get(), images.data(), images.size());
        return detail::own(images);
    });
}

inline Tensor Model::stage_b_sample(const Tensor &latents, const Tensor &text, const Tensor *negative_text,
                                    const GenerateOptions &options) const {
    return options.run_([&] {
        return tensor_(wst_stage_b_sample, latents.get(), text.get(), negative_text ? negative_text->get() : nullptr, options.get());
    });
}

inline Tensor Model::stage_c_sample(const Tensor &text, const Tensor *negative_text, const Tensor *initial_noise,
                                    const GenerateOptions &options) const {
    return options.run_([&] {
        return tensor_(wst_stage_c_sample, text.get(), negative_text ? negative_text->get() : nullptr,
                       initial_noise ? initial_noise->get() : nullptr, options.get());
    });
}

/// A run in the background. Destroying it cancels and waits.
class Job {
public:
    Job(const Model &model, const GenerateOptions &options)
        : log_(options.log_), state_(options.state_), image_count_(options.image_count()) {
        if (state_ && !options.user_token_) state_->token.reset();
        wst_job *job = nullptr;
        detail::call(wst_job_start, model.get(), options.get(), &job);
        job_.reset(job);
    }
    /// Where it stands, and whether it has ended; never waits.
    [[nodiscard]] std::pair<Progress, bool> poll() {
        wst_progress p{};
        p.struct_size = sizeof p;
        std::int32_t done = 0;
        detail::call(wst_job_poll, job_.get(), &p, &done);
        return {Progress{p.stage, p.step, p.steps, p.seconds, p.preview}, done != 0};
    }
    /// Waits until it has ended, at most `timeout_seconds` (negative: without limit); says whether it has.
    bool wait(double timeout_seconds = -1) {
        std::int32_t done = 0;
        detail::call(wst_job_wait, job_.get(), timeout_seconds, &done);
        if (done && state_) state_->caught.rethrow();
        return done != 0;
    }
    void cancel() noexcept { wst_job_cancel(job_.get()); }
    [[nodiscard]] std::vector<Image> images() {
        std::vector<wst_image *> images(image_count_);
        try {
            detail::call(wst_job_images, job_.get(), images.data(), images.size());
        } catch (const Error &) {
            if (state_) state_->caught.rethrow();
            throw;
        }
        return detail::own(images);
    }

private:
    std::shared_ptr<LogFunction> log_;
    std::shared_ptr<GenerateOptions::State> state_;
    std::size_t image_count_;
    // Last: freed first, so that what its thread uses is still there.
    detail::Handle<wst_job, wst_job_free> job_;
};

/// How a stage is trained; starts from the paper's values for it.
class TrainOptions {
public:
    explicit TrainOptions(wst_stage stage) {
        wst_train_options *options = nullptr;
        detail::call(wst_train_options_new, stage, &options);
        options_.reset(options);
    }
    TrainOptions &set_learning_rate(float rate) { return set_(wst_train_options_set_learning_rate, rate); }
    TrainOptions &set_betas(float beta1, float beta2) { return set_(wst_train_options_set_betas, beta1, beta2); }
    TrainOptions &set_weight_decay(float decay) { return set_(wst_train_options_set_weight_decay, decay); }
    TrainOptions &set_warmup_steps(std::uint64_t steps) { return set_(wst_train_options_set_warmup_steps, steps); }
    TrainOptions &set_grad_clip(float norm) { return set_(wst_train_options_set_grad_clip, norm); }
    TrainOptions &set_grad_accumulation(std::uint32_t parts) { return set_(wst_train_options_set_grad_accumulation, parts); }
    TrainOptions &set_ema(float decay, std::uint64_t start, std::uint64_t every) {
        return set_(wst_train_options_set_ema, decay, start, every);
    }
    TrainOptions &set_text_dropout(float probability) { return set_(wst_train_options_set_text_dropout, probability); }
    TrainOptions &set_seed(std::uint64_t seed) { return set_(wst_train_options_set_seed, seed); }
    TrainOptions &set_compute_dtype(wst_dtype dtype) { return set_(wst_train_options_set_compute_dtype, dtype); }
    TrainOptions &set_cancel(const CancelToken &token) { return set_(wst_train_options_set_cancel, token.get()); }
    TrainOptions &set(const std::string &key, const std::string &value) {
        return set_(wst_train_options_set, detail::c_str("key", key), detail::c_str("value", value));
    }
    [[nodiscard]] const wst_train_options *get() const noexcept { return options_.get(); }

private:
    template <class F, class... Args> TrainOptions &set_(F function, Args... args) {
        detail::call(function, options_.get(), args...);
        return *this;
    }
    detail::Handle<wst_train_options, wst_train_options_free> options_;
};

/// Where training data come from and how.
class LoaderOptions {
public:
    explicit LoaderOptions(const std::string &path) {
        wst_loader_options *options = nullptr;
        detail::call(wst_loader_options_new, detail::c_str("path", path), &options);
        options_.reset(options);
    }
    LoaderOptions &add_path(const std::string &path) { return set_(wst_loader_options_add_path, detail::c_str("path", path)); }
    LoaderOptions &set_side(std::uint32_t side) { return set_(wst_loader_options_set_side, side); }
    LoaderOptions &set_crop(wst_crop crop) { return set_(wst_loader_options_set_crop, crop); }
    LoaderOptions &set_flip(float probability) { return set_(wst_loader_options_set_flip, probability); }
    LoaderOptions &set_batch_size(std::uint32_t pictures) { return set_(wst_loader_options_set_batch_size, pictures); }
    LoaderOptions &set_shuffle(std::uint32_t buffer) { return set_(wst_loader_options_set_shuffle, buffer); }
    LoaderOptions &set_seed(std::uint64_t seed) { return set_(wst_loader_options_set_seed, seed); }
    LoaderOptions &set_passes(wst_passes passes) { return set_(wst_loader_options_set_passes, passes); }
    LoaderOptions &set_threads(std::uint32_t threads) { return set_(wst_loader_options_set_threads, threads); }
    LoaderOptions &set_rank(std::uint32_t rank, std::uint32_t ranks) { return set_(wst_loader_options_set_rank, rank, ranks); }
    /// Hears of every record that is skipped. What it throws is dropped.
    LoaderOptions &set_log(LogFunction function) {
        auto log = std::make_shared<LogFunction>(std::move(function));
        set_(wst_loader_options_set_log, *log ? &forward_log : nullptr, static_cast<void *>(log.get()));
        log_ = std::move(log);
        return *this;
    }
    LoaderOptions &set(const std::string &key, const std::string &value) {
        return set_(wst_loader_options_set, detail::c_str("key", key), detail::c_str("value", value));
    }
    [[nodiscard]] const wst_loader_options *get() const noexcept { return options_.get(); }

private:
    friend class Loader;
    template <class F, class... Args> LoaderOptions &set_(F function, Args... args) {
        detail::call(function, options_.get(), args...);
        return *this;
    }
    static void forward_log(wst_log_level level, const char *message, void *user_data) noexcept {
        try {
            (*static_cast<LogFunction *>(user_data))(level, message);
        } catch (...) { // nobody waits for a log line
        }
    }
    std::shared_ptr<LogFunction> log_;
    detail::Handle<wst_loader_options, wst_loader_options_free> options_;
};

/// Pictures of one size with their captions. What the members return lives as long as the batch.
class Batch {
public:
    explicit Batch(wst_batch *owned) noexcept : batch_(owned) {}
    [[nodiscard]] std::size_t size() const noexcept { return wst_batch_count(get()); }
    [[nodiscard]] span<const wst_image *const> images() const noexcept { return {wst_batch_images(get()), size()}; }
    [[nodiscard]] span<const char *const> captions() const noexcept { return {wst_batch_captions(get()), size()}; }
    /// A path within the folder, or "shard.tar/key".
    [[nodiscard]] span<const char *const> keys() const noexcept { return {wst_batch_keys(get()), size()}; }
    [[nodiscard]] const wst_batch *get() const noexcept { return batch_.get(); }

private:
    detail::Handle<wst_batch, wst_batch_free> batch_;
};

class Trainer;

/// Pictures with captions, decoded ahead.
class Loader {
public:
    explicit Loader(const LoaderOptions &options) : log_(options.log_) {
        wst_loader *loader = nullptr;
        detail::call(wst_loader_open, options.get(), &loader);
        loader_.reset(loader);
    }
    /// The next batch; none after the last one of a single pass.
    [[nodiscard]] std::optional<Batch> next() {
        wst_batch *batch = nullptr;
        detail::call(wst_loader_next, loader_.get(), &batch);
        return batch ? std::optional<Batch>(Batch(batch)) : std::nullopt;
    }
    /// Goes on where the data stood when the checkpoint was saved that `trainer` loaded last.
    inline void resume(const Trainer &trainer);
    [[nodiscard]] wst_loader_info_t info() const {
        wst_loader_info_t info{};
        info.struct_size = sizeof info;
        detail::call(wst_loader_info, get(), &info);
        return info;
    }
    [[nodiscard]] const wst_loader *get() const noexcept { return loader_.get(); }

private:
    friend class Trainer;
    std::shared_ptr<LogFunction> log_;
    detail::Handle<wst_loader, wst_loader_free> loader_;
};

/// Pictures and captions as a trainer prepared them.
class Samples {
public:
    explicit Samples(wst_samples *owned) noexcept : samples_(owned) {}
    [[nodiscard]] std::size_t size() const noexcept { return wst_samples_count(get()); }
    Samples &append(const Samples &from) {
        detail::call(wst_samples_append, samples_.get(), from.get());
        return *this;
    }
    [[nodiscard]] const wst_samples *get() const noexcept { return samples_.get(); }

private:
    friend class Trainer;
    detail::Handle<wst_samples, wst_samples_free> samples_;
};

/// Puts in the place of each number its sum over all ranks: over floats, or over doubles (then `floats` is empty).
using SumFunction = std::function<void(span<float> floats, span<double> doubles)>;

/// A stage of a model in training. Destroying it cancels a step that runs on another thread, and waits for it.
class Trainer {
public:
    Trainer(const Model &base, const TrainOptions &options) : log_(base.log_) {
        wst_trainer *trainer = nullptr;
        detail::call(wst_trainer_new, base.get(), options.get(), &trainer);
        trainer_.reset(trainer);
    }
    wst_train_metrics step(span<const Image> images, span<const std::string> captions) {
        const Lists lists(images, captions);
        return step_(wst_trainer_step, lists.images.data(), lists.captions.data(), lists.images.size());
    }
    wst_train_metrics step(const Batch &batch) {
        return step_(wst_trainer_step, batch.images().data(), batch.captions().data(), batch.size());
    }
    /// Over samples picked by their numbers; none: all of them.
    wst_train_metrics step(const Samples &samples, span<const std::size_t> indices = {}) {
        return step_(wst_trainer_step_samples, samples.get(), indices.data(), indices.size());
    }
    /// Over the loader's next batch; nothing after the last one of a single pass. Checkpoints then hold its place.
    std::optional<wst_train_metrics> step(Loader &loader) {
        std::int32_t end = 0;
        const wst_train_metrics metrics = step_(
            [](wst_trainer *trainer, wst_loader *from, std::int32_t *at_end, wst_train_metrics *out, wst_error **error) {
                return wst_trainer_step_from(trainer, from, out, at_end, error);
            },
            loader.loader_.get(), &end);
        return end ? std::nullopt : std::optional<wst_train_metrics>(metrics);
    }
    /// What stays the same from epoch to epoch, for steps over it.
    [[nodiscard]] Samples prepare(span<const Image> images, span<const std::string> captions) const {
        const Lists lists(images, captions);
        return prepare_(lists.images.data(), lists.captions.data(), lists.images.size());
    }
    [[nodiscard]] Samples prepare(const Batch &batch) const {
        return prepare_(batch.images().data(), batch.captions().data(), batch.size());
    }
    /// Gives a sample another caption.
    void recaption(Samples &samples, std::size_t index, const std::string &caption) const {
        detail::call(wst_trainer_recaption, get(), samples.samples_.get(), index, detail::c_str("caption", caption));
    }
    /// Joins `ranks` processes, each with its part of every batch. What `sum` throws ends the step and comes out of it.
    void set_reduce(std::uint32_t rank, std::uint32_t ranks, SumFunction sum) {
        auto state = std::make_unique<Sum>();
        state->function = std::move(sum);
        detail::call(wst_trainer_set_reduce, trainer_.get(), rank, ranks, state->function ? &forward_sum : nullptr,
                     static_cast<void *>(state.get()));
        sum_ = std::move(state);
    }
    /// Lets checkpoints hold where `loader` stands now.
    void follow(const Loader &loader) { detail::call(wst_trainer_follow, trainer_.get(), loader.get()); }
    [[nodiscard]] wst_train_progress progress() const {
        wst_train_progress progress{};
        progress.struct_size = sizeof progress;
        detail::call(wst_trainer_progress, get(), &progress);
        return progress;
    }
    void save(const std::string &directory) { detail::call(wst_trainer_save, trainer_.get(), detail::c_str("directory", directory)); }
    void load(const std::string &directory) { detail::call(wst_trainer_load, trainer_.get(), detail::c_str("directory", directory)); }
    void export_model(const std::string &directory) const {
        detail::call(wst_trainer_export, get(), detail::c_str("model_directory", directory));
    }
    /// The adapter that is trained with the option "lora_rank", in diffusers' format.
    void save_adapter(const std::string &path) const { detail::call(wst_trainer_save_adapter, get(), detail::c_str("path", path)); }
    [[nodiscard]] const wst_trainer *get() const noexcept { return trainer_.get(); }

private:
    struct Lists {
        std::vector<const wst_image *> images;
        std::vector<const char *> captions;
        Lists(span<const Image> pictures, span<const std::string> texts) {
            if (pictures.size() != texts.size())
                throw Error(WST_INVALID_ARGUMENT, "captions: expected one per image, found " + std::to_string(texts.size()), "captions");
            for (const Image &image : pictures) images.push_back(image.get());
            for (const std::string &text : texts) captions.push_back(detail::c_str("captions", text));
        }
    };
    struct Sum {
        SumFunction function;
        detail::Caught caught;
    };
    template <class F, class... Args> wst_train_metrics step_(F function, Args... args) {
        wst_train_metrics metrics{};
        metrics.struct_size = sizeof metrics;
        try {
            detail::call(function, trainer_.get(), args..., &metrics);
        } catch (const Error &) {
            if (sum_) sum_->caught.rethrow();
            throw;
        }
        return metrics;
    }
    Samples prepare_(const wst_image *const *images, const char *const *captions, std::size_t count) const {
        wst_samples *samples = nullptr;
        detail::call(wst_trainer_prepare, get(), images, captions, count, &samples);
        return Samples(samples);
    }
    static std::int32_t forward_sum(void *values, std::size_t count, std::int32_t is_double, void *user_data) noexcept {
        Sum &sum = *static_cast<Sum *>(user_data);
        try {
            if (is_double) sum.function({}, {static_cast<double *>(values), count});
            else sum.function({static_cast<float *>(values), count}, {});
            return 0;
        } catch (...) {
            sum.caught.keep(std::current_exception());
            return 1;
        }
    }
    std::shared_ptr<LogFunction> log_;
    std::unique_ptr<Sum> sum_;
    // Last: freed first, so that what a step on another thread uses is still there.
    detail::Handle<wst_trainer, wst_trainer_free> trainer_;
};

inline void Loader::resume(const Trainer &trainer) { detail::call(wst_loader_resume, loader_.get(), trainer.get()); }

/// Writes tokenizer.json, learnt from texts, into `directory`.
inline void train_tokenizer(span<const std::string> texts, std::uint32_t vocabulary, const std::string &directory) {
    std::vector<const char *> pointers;
    for (const std::string &text : texts) pointers.push_back(detail::c_str("texts", text));
    detail::call(wst_tokenizer_train, pointers.data(), pointers.size(), vocabulary, detail::c_str("directory", directory));
}

/// Makes a model with fresh weights of the configurations in a folder.
inline void create_model(const std::string &configs, const std::string &directory, std::uint64_t seed) {
    detail::call(wst_model_create, detail::c_str("configs", configs), detail::c_str("directory", directory), seed);
}

/// Adds an adapter to the weights of a model folder.
inline void merge_adapter(const std::string &directory, const std::string &adapter, float scale, const std::string &out_directory) {
    detail::call(wst_model_merge_adapter, detail::c_str("directory", directory), detail::c_str("adapter", adapter), scale,
                 detail::c_str("out_directory", out_directory));
}

} // namespace wst

#endif // WUERSTCHEN_HPP
