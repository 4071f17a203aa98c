#include "fake.h"
FAKE_API size_t cublasLtGetVersion() { return 130000; }
