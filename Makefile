# make demo PROMPT="a red apple"   builds everything and draws build/demo.png
# make test                        every test; its last line counts them
# make check                       format, lints, docs, freshness of the header
# make test-cuda                   the tests of the CUDA backend on a GPU
# make profile                     where the time goes, per op, and flame graphs in build/profile/
# make bench | parity | clean
# What a target needs beyond git, make, a C/C++ compiler and Rust it fetches
# itself, into build/ or, for root, with apt-get.

PROMPT ?= a red apple
export PROMPT

.PHONY: all check test test-cuda demo bench bench-cuda profile parity clean

all:
	@tools/build.sh

check:
	@tools/check.sh

test:
	@tools/test.sh

bench-cuda:
	@tools/bench-cuda.sh

test-cuda:
	@tools/test-cuda.sh

demo:
	@tools/demo.sh

bench:
	@tools/bench.sh

profile:
	@tools/profile.sh $(PROFILE)

parity:
	@tools/parity.sh

clean:
	cargo clean
	rm -rf build
