// A stand-in libnvrtc.so.13: compiles CUDA C++ with g++ against cuemu.h. What it gives out as machine code or PTX is
// the path of the library that came out, kept in a cache by a hash of everything that went in.
#include "fake.h"
#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <iterator>
#include <spawn.h>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

extern char **environ;

enum Result {
    SUCCESS = 0,
    OUT_OF_MEMORY = 1,
    PROGRAM_CREATION_FAILURE = 2,
    INVALID_INPUT = 3,
    INVALID_PROGRAM = 4,
    INVALID_OPTION = 5,
    COMPILATION = 6,
    INTERNAL_ERROR = 11,
};

namespace {

struct File {
    std::string name, text;
};

struct Program {
    File source;
    std::vector<File> headers;
    std::string log, image;
    bool binary = false; // compiled for a device, not only for an architecture
};

const int ARCHITECTURES[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

int enter(const char *name) {
    int code = cuemu_enter(name);
    return !code ? SUCCESS : code == 2 ? OUT_OF_MEMORY : INTERNAL_ERROR;
}

// --- Options ----------------------------------------------------------------------------------------------------

struct Options {
    std::string target = "compute_75";
    std::vector<std::string> flags;
};

bool starts(const std::string &text, const char *with) { return text.rfind(with, 0) == 0; }

// The value of an option written in any of the ways given, or null.
const char *value_of(const std::string &option, std::initializer_list<const char *> names) {
    for (const char *name : names)
        if (starts(option, name)) return option.c_str() + strlen(name);
    return nullptr;
}

bool known_target(const std::string &target) {
    const char *number = value_of(target, {"sm_", "compute_"});
    if (!number) return false;
    char *end;
    long version = strtol(number, &end, 10);
    bool suffix = version >= 90 && (!strcmp(end, "a") || (version >= 100 && !strcmp(end, "f")));
    if (*end && !suffix) return false;
    for (int each : ARCHITECTURES)
        if (version == each) return true;
    return false;
}

// Options that change nothing here.
bool harmless(const std::string &option) {
    static const char *const exact[] = {"--device-as-default-execution-space", "-default-device", "--use_fast_math",
        "-use_fast_math", "--extra-device-vectorization", "-extra-device-vectorization", "--generate-line-info",
        "-lineinfo", "--device-debug", "-G", "--restrict", "-restrict", "--disable-warnings", "-w", "--dopt=on",
        "-dopt", "--minimal", "-minimal", "--display-error-number", "--no-display-error-number", "--no-source-include"};
    static const char *const prefixes[] = {"--std=c++", "-std=c++", "--fmad=", "-fmad=", "--ftz=", "-ftz=",
        "--prec-sqrt=", "-prec-sqrt=", "--prec-div=", "-prec-div=", "--maxrregcount=", "-maxrregcount=",
        "--ptxas-options", "-Xptxas", "--diag-suppress", "-diag-suppress", "--diag-error", "-diag-error",
        "--split-compile=", "--Ofast-compile=", "--dlink-time-opt", "--relocatable-device-code=", "-rdc="};
    for (const char *each : exact)
        if (option == each) return true;
    for (const char *each : prefixes)
        if (starts(option, each)) return true;
    return false;
}

bool parse(int count, const char *const *given, Options *to, std::string *log) {
    for (int i = 0; i < count; i++) {
        std::string option = given[i];
        if (const char *target = value_of(option, {"--gpu-architecture=", "-arch="})) {
            if (known_target(target)) to->target = target;
            else return *log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n", false;
        } else if (const char *value = value_of(option, {"--define-macro=", "-D"})) {
            to->flags.push_back(std::string("-D") + (*value || i + 1 == count ? value : given[++i]));
        } else if (const char *value = value_of(option, {"--undefine-macro=", "-U"})) {
            to->flags.push_back(std::string("-U") + value);
        } else if (const char *value = value_of(option, {"--include-path=", "-I"})) {
            to->flags.push_back(std::string("-I") + value);
        } else if (!harmless(option)) {
            return *log = "nvrtc: error: unrecognized option " + option + " found\n", false;
        }
    }
    return true;
}

// --- The compiler -----------------------------------------------------------------------------------------------

std::vector<std::string> arguments(const Options &options) {
    std::vector<std::string> all = {CUEMU_CXX, "-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-fvisibility=hidden",
        "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-attributes", "-Wno-unknown-pragmas",
        "-Wl,-Bsymbolic", "-Wl,-z,start-stop-visibility=hidden", "-I" CUEMU_INCLUDE, "-include", "cuemu.h"};
    all.push_back("-D__CUDA_ARCH__=" + std::to_string(atoi(options.target.c_str() + options.target.find('_') + 1) * 10));
    all.push_back("-D__CUDACC_RTC__=1");
    all.insert(all.end(), options.flags.begin(), options.flags.end());
    if (const char *extra = getenv("CUEMU_CXXFLAGS")) {
        std::istringstream words(extra);
        all.insert(all.end(), std::istream_iterator<std::string>(words), {});
        if (strstr(extra, "-fsanitize=address") || strstr(extra, ",address"))
            all.push_back("-fsanitize-sections=cuemu_shared");
    }
    return all;
}

// Two FNV-1a sums with different starts: nobody chooses these sources to collide.
struct Hash {
    uint64_t a = 0xcbf29ce484222325, b = 0x9e3779b97f4a7c15;
    void add(const std::string &text) {
        for (unsigned char c : text + '\0') {
            a = (a ^ c) * 0x100000001b3;
            b = (b ^ c) * 0x100000001b3 + (a >> 32);
        }
    }
    std::string hex() const {
        char text[33];
        snprintf(text, sizeof text, "%016llx%016llx", (unsigned long long)a, (unsigned long long)b);
        return text;
    }
};

std::string hash(const Program &program, const std::vector<std::string> &arguments) {
    Hash hash;
    hash.add(CUEMU_HEADERS_HASH);
    for (auto &argument : arguments) hash.add(argument);
    hash.add(program.source.name), hash.add(program.source.text);
    for (auto &header : program.headers) hash.add(header.name), hash.add(header.text);
    return hash.hex();
}

bool write(const std::string &path, const std::string &text) {
    for (size_t slash = path.find('/', 1); slash != std::string::npos; slash = path.find('/', slash + 1))
        mkdir(path.substr(0, slash).c_str(), 0777);
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    return file.good();
}

std::string read(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// A sanitizer that is preloaded for the kernels must not look at the compiler.
std::vector<char *> clean_environment() {
    std::vector<char *> kept;
    for (char **each = environ; *each; each++)
        if (!starts(*each, "LD_PRELOAD=")) kept.push_back(*each);
    kept.push_back(nullptr);
    return kept;
}

// The exit status of a command whose messages go to a file; -1 if it did not run.
int run(const std::vector<std::string> &arguments, const std::string &messages) {
    std::vector<char *> list;
    for (auto &argument : arguments) list.push_back((char *)argument.c_str());
    list.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, messages.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    auto environment = clean_environment();
    pid_t child;
    int failed = posix_spawnp(&child, list[0], &actions, nullptr, list.data(), environment.data());
    posix_spawn_file_actions_destroy(&actions);
    if (failed) return -1;
    int status = 0;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Puts the library at `path`; other processes may do the same at the same time.
int build(Program &program, std::vector<std::string> arguments, const std::string &path) {
    static std::atomic<unsigned> number{0};
    std::string folder = path + "." + std::to_string(getpid()) + "." + std::to_string(number++);
    std::string source = folder + "/source.cu", library = folder + "/library.so", messages = folder + "/messages";
    std::string name = program.source.name.empty() ? "default_program" : program.source.name;
    bool written = write(source, "#line 1 \"" + name + "\"\n" + program.source.text);
    for (auto &header : program.headers) written = write(folder + "/" + header.name, header.text) && written;
    for (const char *each : {"-I", folder.c_str(), "-x", "c++", source.c_str(), "-o", library.c_str()})
        arguments.push_back(each);
    int status = written ? run(arguments, messages) : -1;
    program.log = read(messages);
    bool moved = status == 0 && !rename(library.c_str(), path.c_str());
    for (auto &header : program.headers) unlink((folder + "/" + header.name).c_str());
    for (auto &file : {source, library, messages}) unlink(file.c_str());
    rmdir(folder.c_str());
    if (status > 0) return COMPILATION;
    if (!moved) program.log += "cuemu: " CUEMU_CXX " did not run, or " + path + " cannot be written\n";
    return moved ? SUCCESS : INTERNAL_ERROR;
}

int copy(const std::string &text, char *to) {
    memcpy(to, text.c_str(), text.size() + 1);
    return SUCCESS;
}

} // namespace

#define API FAKE_API int
#define ENTER(condition, otherwise)                                                                                    \
    if (int error = enter(__func__)) return error;                                                                             \
    if (!(condition)) return otherwise

// What is compiled depends on this emulation and its flags: whoever keeps images by version must not meet old ones.
API nvrtcVersion(int *major, int *minor) {
    ENTER(major && minor, INVALID_INPUT);
    const char *flags = getenv("CUEMU_CXXFLAGS");
    *major = 13;
    *minor = (int)(std::hash<std::string>{}(CUEMU_HEADERS_HASH CUEMU_CACHE + std::string(flags ? flags : "")) % 1000000);
    return SUCCESS;
}

API nvrtcGetNumSupportedArchs(int *count) {
    ENTER(count, INVALID_INPUT);
    *count = std::size(ARCHITECTURES);
    return SUCCESS;
}

API nvrtcGetSupportedArchs(int *to) {
    ENTER(to, INVALID_INPUT);
    memcpy(to, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

API nvrtcCreateProgram(Program **program, const char *source, const char *name, int count, const char *const *headers,
                       const char *const *names) {
    ENTER(program && source && count >= 0, INVALID_INPUT);
    *program = new Program{{name ? name : "", source}, {}, "", "", false};
    for (int i = 0; i < count; i++) (*program)->headers.push_back({names[i], headers[i]});
    cuemu_count("library handle", 1);
    return SUCCESS;
}

API nvrtcDestroyProgram(Program **program) {
    if (!program || !*program) return INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    cuemu_count("library handle", -1);
    return SUCCESS;
}

API nvrtcCompileProgram(Program *program, int count, const char *const *given) {
    ENTER(program, INVALID_PROGRAM);
    program->image.clear(), program->log.clear();
    Options options;
    if (!parse(count, given, &options, &program->log)) return INVALID_OPTION;
    auto all = arguments(options);
    std::string path = CUEMU_CACHE "/" + hash(*program, all) + ".so";
    if (access(path.c_str(), R_OK))
        if (int error = build(*program, all, path)) return error;
    program->binary = starts(options.target, "sm_");
    program->image = "CUEMU1\n" + path + "\n" + options.target + "\n";
    return SUCCESS;
}

API nvrtcGetPTXSize(Program *program, size_t *bytes) {
    ENTER(program && !program->image.empty(), INVALID_PROGRAM);
    *bytes = program->image.size() + 1;
    return SUCCESS;
}

API nvrtcGetPTX(Program *program, char *to) {
    ENTER(program && !program->image.empty(), INVALID_PROGRAM);
    return copy(program->image, to);
}

API nvrtcGetCUBINSize(Program *program, size_t *bytes) {
    ENTER(program && !program->image.empty(), INVALID_PROGRAM);
    *bytes = program->binary ? program->image.size() + 1 : 0;
    return SUCCESS;
}

API nvrtcGetCUBIN(Program *program, char *to) {
    ENTER(program && program->binary, INVALID_PROGRAM);
    return copy(program->image, to);
}

API nvrtcGetProgramLogSize(Program *program, size_t *bytes) {
    ENTER(program, INVALID_PROGRAM);
    *bytes = program->log.size() + 1;
    return SUCCESS;
}

API nvrtcGetProgramLog(Program *program, char *to) {
    ENTER(program, INVALID_PROGRAM);
    return copy(program->log, to);
}

FAKE_API const char *nvrtcGetErrorString(int code) {
    static const char *const names[] = {"NVRTC_SUCCESS", "NVRTC_ERROR_OUT_OF_MEMORY",
        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE", "NVRTC_ERROR_INVALID_INPUT", "NVRTC_ERROR_INVALID_PROGRAM",
        "NVRTC_ERROR_INVALID_OPTION", "NVRTC_ERROR_COMPILATION", "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION", "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID", "NVRTC_ERROR_INTERNAL_ERROR"};
    return code >= 0 && (size_t)code < std::size(names) ? names[code] : "NVRTC_ERROR unknown";
}
