# Lacuna: build, test, run. `make help` lists the targets.
#
# Nothing but make, a C compiler and Debian packages is needed; `make deps` installs the packages. Everything that is
# made goes to build/. The CPU kernels (c/cpu) are compiled once per instruction set and chosen at run time, so a
# library built here runs on any x86-64 (other processors get the portable build). CUDA is optional: with nvcc the
# plug-in is built, without it the build says so and everything else works.

VERSION := $(shell sed -n 's/^\#define LAC_VERSION "\(.*\)"/\1/p' c/lacuna.h)
PREFIX  ?= /usr/local
BUILD   ?= build
CC      ?= cc
NVCC    ?= $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
BUSTED  ?= luajit /usr/bin/busted

PACKAGES := gcc libc6-dev make pkg-config luajit libluajit-5.1-dev libopenblas-openmp-dev libedit2 lua-busted lua-check lua-cjson \
            lua-posix lua-filesystem gnuplot-nox bible-kjv bible-kjv-text xz-utils
LINTERS  := clang-format clang-tidy

, := ,
# short lines unless V=1: `  CC c/pool.c`
Q := $(if $(V),,@)
say = $(if $(V),,@printf '  %-4s %s\n' '$(1)' '$(2)')

# -fno-trapping-math and -fno-math-errno let loops vectorise and keep NaN, infinities and denormals exact;
# -ffast-math would not. -ffp-contract=fast allows fused multiply-add. Jump threading would turn two clamps in a row
# into three paths with masks (half as many instructions again in an exponential) where a minimum and a maximum do.
# -g1 has the lines for backtraces and profilers; with variables (-g) gcc takes a third longer for the same code.
WARN   := -Wall -Wextra -Wstrict-prototypes -Wmissing-prototypes -Wshadow
WERROR ?= -Werror
CFLAGS ?= -O3 -g1
EXTRA  ?=
ALL_CFLAGS := -std=c11 -D_GNU_SOURCE $(CFLAGS) -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-thread-jumps -fopenmp \
              -fvisibility=hidden $(WARN) $(WERROR) $(EXTRA)
INCLUDES := -Ic -I$(BUILD) -I/usr/include/$(shell $(CC) -print-multiarch)/openblas-openmp
# an explicit path: `-lopenblas` would find whichever alternative the system prefers, also the pthread one, whose
# threads would compete with OpenMP's
BLAS_DIR := /usr/lib/$(shell $(CC) -print-multiarch)/openblas-openmp

FRONT := $(wildcard c/*.c)
FRONT := $(filter-out c/main.c c/interrupt.c,$(FRONT))
CPU   := $(wildcard c/cpu/*.c)
ifneq ($(filter x86_64%,$(shell $(CC) -dumpmachine)),)
ISAS := baseline avx2 avx512
ALL_CFLAGS += -DLAC_HAVE_AVX
else
ISAS := baseline
endif
ISA_baseline :=
ISA_avx2     := -mavx2 -mfma -mf16c -mbmi -mbmi2
ISA_avx512   := $(ISA_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512

OBJECTS := $(FRONT:c/%.c=$(BUILD)/obj/%.o) $(foreach isa,$(ISAS),$(CPU:c/cpu/%.c=$(BUILD)/obj/$(isa)/%.o)) \
           $(if $(filter avx512,$(ISAS)),$(BUILD)/obj/amx/attn.o)
LIBRARY := $(BUILD)/lib/liblacuna.so
COMMAND := $(BUILD)/bin/lacuna
PLUGIN  := $(BUILD)/lib/liblacuna_cuda.so

.PHONY: all
all: $(LIBRARY) $(COMMAND) cuda ## build the engine, the command and, where nvcc is found, the CUDA plug-in (default)

# ---- engine ----

$(BUILD)/ffi.h: c/lacuna.h c/lacuna_queue.h
	@mkdir -p $(@D)
	$(Q)sed -n '/^\/\* <ffi> \*\//,/^\/\* <\/ffi> \*\//p' $^ > $@

$(BUILD)/obj/abi.o: $(BUILD)/ffi.h

$(BUILD)/obj/%.o: c/%.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(ALL_CFLAGS) $(INCLUDES) -DLAC_FFI_FILE='"$(BUILD)/ffi.h"' -MMD -MP -c $< -o $@

define isa_rule
$$(BUILD)/obj/$(1)/%.o: c/cpu/%.c
	@mkdir -p $$(@D)
	$$(call say,CC,$$< ($(1)))
	$$(Q)$$(CC) $$(ALL_CFLAGS) $$(ISA_$(1)) -DLAC_ISA=$(1) $$(INCLUDES) -MMD -MP -c $$< -o $$@
endef
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))

# attention for AVX-512 with a matrix unit; everything else of that table is AVX-512's
$(BUILD)/obj/amx/attn.o: c/cpu/attn.c
	@mkdir -p $(@D)
	$(call say,CC,$< (amx))
	$(Q)$(CC) $(ALL_CFLAGS) $(ISA_avx512) -DLAC_ISA=avx512 -DATTN_AMX $(INCLUDES) -MMD -MP -c $< -o $@

$(LIBRARY): $(OBJECTS)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(CC) -shared $(ALL_CFLAGS) -o $@.new $^ -Wl,-z,defs -Wl,-z,nodelete -Wl,-rpath,$(BLAS_DIR) \
	  $(BLAS_DIR)/libopenblas.so -ldl -lpthread -lm && mv $@.new $@ # whole or not at all: it may be in use

# ---- command ----

$(COMMAND): c/main.c c/interrupt.c c/interrupt.h c/lacuna.h
	@mkdir -p $(@D)
	$(call say,CC,$@)
	$(Q)$(CC) -std=c11 -D_GNU_SOURCE $(CFLAGS) $(WARN) $(WERROR) -Ic $$(pkg-config --cflags luajit) c/main.c c/interrupt.c \
	  -o $@ -rdynamic $$(pkg-config --libs luajit) -ldl -lm -lpthread

-include $(OBJECTS:.o=.d)

# ---- CUDA ----

# Kernels are compiled for each architecture, because from Hopper on they may start while the one before ends
# (kernels/launch.cuh); the portable ones of attention, which take longest, once, as PTX of the first architecture, from
# which each architecture's instructions are made. PTX is of the first architecture, too, and for later devices; an
# architecture that CUDA_CODE leaves out runs from it as well, once the driver has translated it there. Files with
# nothing but kernels for Hopper are compiled for Hopper alone, where that is asked for.
# CUDA_CHECK=1 makes a plug-in that is to be compiled and linked, not run: without PTX; of architectures that CUDA_CODE
# leaves out the sources are only looked through, by the front end; and kernels of which nothing is asked but that they
# compile are optimised little, and so are attention's portable ones and Hopper's for options, which took two thirds of
# the time: what kernels/ptxas.awk asks of these a plain `make` asks.
CUDA_ARCH  ?= 80 90a
CUDA_CODE  ?= $(CUDA_ARCH)
CUDA_CHECK ?=
gencode = $(foreach a,$(2),-gencode arch=compute_$(or $(1),$(a))$(,)code=sm_$(a)) \
          $(if $(3)$(CUDA_CHECK),,-gencode arch=compute_$(firstword $(1) $(CUDA_ARCH))$(,)code=compute_$(firstword $(1) $(CUDA_ARCH)))
PLAIN_ARCH := $(firstword $(CUDA_ARCH:%a=%))
GENCODE := $(call gencode,,$(CUDA_CODE))
PLAIN_CODE := $(call gencode,$(PLAIN_ARCH),$(CUDA_CODE:%a=%))
HOPPER_CODE := $(if $(filter 90a,$(CUDA_CODE)),$(call gencode,,90a,alone),$(GENCODE))
LOOKED_AT := $(if $(CUDA_CHECK),$(filter-out $(CUDA_CODE),$(CUDA_ARCH)))

.PHONY: cuda
ifeq ($(NVCC),)
cuda: ## build the CUDA plug-in (says so where there is no nvcc)
	@echo "lacuna: no nvcc found: building for the CPU only (set NVCC=/path/to/nvcc to change that)"
else
cuda: $(PLUGIN)

# One object a file, so that they compile side by side. cuBLAS comes with the toolkit and is found where it is now.
KERNELS := $(patsubst kernels/%.cu,$(BUILD)/obj/cuda/%.o,$(wildcard kernels/*.cu))
CUDA_LIB := $(abspath $(dir $(NVCC))../lib64)

# Attention kernels may neither spill registers nor have their products serialised: ptxas.awk reads what ptxas says.
cuda_flags = $(NVCC) -O3 -std=c++17 --extended-lambda $(1) -Ic -Xcompiler -fPIC,-Wall,-fvisibility=hidden
compile_cuda = $(call cuda_flags,$(1)) -MMD -MP
look_at = $(foreach a,$(LOOKED_AT),$(call cuda_flags,-arch=compute_$(a)) -ptx -fdevice-syntax-only -o /dev/null $< && ) :

# Objects that were only checked are not what a plug-in to be run is made of: this file's age tells them apart.
$(BUILD)/obj/cuda/checked: force
	@mkdir -p $(@D)
	@echo 'CUDA_CHECK=$(CUDA_CHECK)' | cmp -s - $@ || echo 'CUDA_CHECK=$(CUDA_CHECK)' >$@
.PHONY: force
force:

# ptxas of CUDA 12.5, 12.6 and 12.8 makes the products of attn_hopper_forward.cu wait for each other (C7513), which is
# refused below; 12.9's does not. Before 12.5 the runtime lacks cudaGetDriverEntryPointByVersion. An older nvcc would say
# so in pages of its own words, late: it is asked once, before anything is compiled.
CUDA_LEAST := 12.9
$(BUILD)/obj/cuda/compiler: force
	@mkdir -p $(@D)
	@echo '$(NVCC)' | cmp -s - $@ || { release=$$($(NVCC) --version | sed -n 's/.*release \([0-9.]*[0-9]\).*/\1/p') && \
	  if [ -z "$$release" ]; then echo "lacuna: '$(NVCC) --version' names no release of CUDA"; exit 1; \
	  elif printf '%s\n' $$release $(CUDA_LEAST) | sort -V -C && [ $$release != $(CUDA_LEAST) ]; then \
	    echo "lacuna: $(NVCC) is of CUDA $$release; the kernels need $(CUDA_LEAST) or later (NVCC= builds for the CPU only)"; \
	    exit 1; \
	  else echo '$(NVCC)' >$@; fi; }

ATTN_HOPPER := $(patsubst %,kernels/attn_hopper_%.cu,added blocks forward keys padded pairs parts_backward parts_forward wide)
ATTN_EACH := kernels/attn.cu kernels/attn_hopper% kernels/attn_few%
attn_code = $(if $(filter $(ATTN_HOPPER),$<),$(HOPPER_CODE),$(if $(filter $(ATTN_EACH),$<),$(GENCODE),$(PLAIN_CODE)))
ATTN_OPTIONS := $(patsubst %,kernels/attn_hopper_%.cu,added block_keys blocks padded pairs)
attn_quick = $(if $(CUDA_CHECK),$(filter $(ATTN_OPTIONS),$<)$(filter-out $(ATTN_EACH) $(ATTN_HOPPER),$<))
$(BUILD)/obj/cuda/attn%.o: kernels/attn%.cu kernels/ptxas.awk $(BUILD)/obj/cuda/checked | $(BUILD)/obj/cuda/compiler
	@mkdir -p $(@D)
	$(call say,NVCC,$<)
	$(Q)$(if $(filter $(ATTN_EACH),$<),$(look_at),:)
	$(Q)$(call compile_cuda,$(attn_code)) $(if $(attn_quick),-Ofc=max) -Xptxas -v -c $< -o $@ 2>$@.log || { cat $@.log; exit 1; }
	$(Q)$(if $(attn_quick),:,awk -f kernels/ptxas.awk $@.log) || { rm $@; exit 1; }

$(BUILD)/obj/cuda/%.o: kernels/%.cu $(BUILD)/obj/cuda/checked | $(BUILD)/obj/cuda/compiler
	@mkdir -p $(@D)
	$(call say,NVCC,$<)
	$(Q)$(look_at)
	$(Q)$(call compile_cuda,$(GENCODE)) $(if $(CUDA_CHECK),-Ofc=max) -c $< -o $@

# nvcc lets a template's host code call a function of the device, silently: what the host gets is a call of exit().
$(PLUGIN): $(KERNELS)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)for o in $^; do ! nm -u $$o | grep -qw exit || { echo "$$o: calls a function of the device on the host"; exit 1; }; done
	$(Q)$(NVCC) -shared -cudart static $(GENCODE) -o $@.new $^ -L$(CUDA_LIB) -lcublasLt -Xlinker -rpath,$(CUDA_LIB) && mv $@.new $@

-include $(KERNELS:.o=.d)
endif

# ---- use ----

.PHONY: demo test lint
demo: deps ## train a small LongNet on real text, about five minutes on two cores
	@$(MAKE) --no-print-directory -j$$(nproc) all
	$(COMMAND) experiments/language_model.lua

test: deps ## build and run the whole test suite (JOBS processes beside each other)
	@$(MAKE) --no-print-directory -j$$(nproc) all
	@BUSTED="$(BUSTED)" tests/support/suite.sh $(BUILD)/suite

.PHONY: test-gpu
test-gpu: all ## the specs that need a CUDA device
	LACUNA_GPU=1 $(BUSTED) --tags=gpu

# Kernels run many times slower under these tools: tests/sanitize.lua has a small case of each kind. racecheck sees the
# portable kernels only. In Hopper's one lane arrives at a barrier for its warp, after __syncwarp, and the tool takes the
# other lanes' writes for unordered; what products and bulk copies read and write it does not see. So no tool says whether
# what roles hand to each other there races: only specs that ask for the same bits again.
.PHONY: sanitize-gpu
sanitize-gpu: all ## attention on the device under compute-sanitizer (memcheck, racecheck, synccheck): any report fails
	compute-sanitizer --tool memcheck --error-exitcode 3 $(COMMAND) tests/sanitize.lua
	compute-sanitizer --tool racecheck --error-exitcode 3 $(COMMAND) tests/sanitize.lua portable pairs
	compute-sanitizer --tool synccheck --error-exitcode 3 $(COMMAND) tests/sanitize.lua

PEER ?= python3
.PHONY: bench
bench: all ## measure against PyTorch (PEER=/path/to/python with torch) and the machine's floors: ratios in one run
	$(COMMAND) experiments/benchmark.lua --peer $(PEER) $(BENCH)

# clang-tidy reads a file once, the kernels as AVX2. A stamp per source remembers that it was clean; what is compiled
# again is read again. gcc's __builtin_shuffle is unknown to clang; its value does not matter to an analysis.
TIDY := $(patsubst c/%.c,$(BUILD)/lint/%.tidy,$(FRONT) c/main.c c/interrupt.c $(CPU))
TIDY_ISA := $(firstword $(filter avx2,$(ISAS)) baseline)
TIDY_FLAGS = -std=c11 -D_GNU_SOURCE -fopenmp $(filter -DLAC_HAVE_AVX,$(ALL_CFLAGS)) -DLAC_FFI_FILE='"$(BUILD)/ffi.h"' \
             -D'__builtin_shuffle(a,b,mask)=(a)' -Wno-pass-failed $(INCLUDES) $$(pkg-config --cflags luajit) \
             $(if $(filter c/cpu/%,$<),-DLAC_ISA=$(TIDY_ISA) $(ISA_$(TIDY_ISA)))
$(FRONT:c/%.c=$(BUILD)/lint/%.tidy): $(BUILD)/lint/%.tidy: $(BUILD)/obj/%.o
$(CPU:c/%.c=$(BUILD)/lint/%.tidy): $(BUILD)/lint/cpu/%.tidy: $(BUILD)/obj/$(TIDY_ISA)/%.o
$(BUILD)/lint/main.tidy $(BUILD)/lint/interrupt.tidy: $(COMMAND)
$(BUILD)/lint/cpu/elem.tidy: c/cpu/elem_analysed.inc # gcc does not read it
$(BUILD)/lint/%.tidy: c/%.c .clang-tidy | $(BUILD)/ffi.h
	@mkdir -p $(@D)
	$(call say,TIDY,$<)
	$(Q)clang-tidy --quiet $< -- $(TIDY_FLAGS) >$@.log 2>/dev/null || { cat $@.log; exit 1; }
	@touch $@

lint: ## luacheck, clang-format, clang-tidy, every translation unit with warnings as errors
	@$(MAKE) --no-print-directory deps PACKAGES="$(PACKAGES) $(LINTERS)"
	luacheck -q lua experiments tests
	clang-format --dry-run -Werror $(wildcard c/*.[ch] c/cpu/*.[ch] c/cpu/*.inc kernels/*.cu kernels/*.cuh kernels/*.h tests/support/*.c \
	  experiments/benchmarks/*.c)
	@$(MAKE) -s --no-print-directory -j$$(nproc) WERROR=-Werror $(OBJECTS) $(COMMAND)
	@$(MAKE) --no-print-directory -k -j$$(nproc) $(TIDY)

# ---- quality gates ----

SPECS := $(sort $(wildcard tests/*_spec.lua))
# an instrumented engine and command in $(BUILD)/<name>; the command finds lua/ two directories above itself
# $(call instrumented,name,flags,targets)
instrumented = @ln -sfn ../lua $(BUILD)/lua; $(MAKE) --no-print-directory -j$$(nproc) BUILD=$(BUILD)/$(1) CFLAGS="$(2)" \
	  $(BUILD)/$(1)/lib/liblacuna.so $(BUILD)/$(1)/bin/lacuna
runtime = $(shell $(CC) -print-file-name=$(1))

# Lua itself is not instrumented: the sanitizers' runtimes are preloaded, also in what the specs start. Leaks are the
# pool's own count, which the specs check.
ASAN_ENV = LD_PRELOAD=$(call runtime,libasan.so):$(call runtime,libubsan.so) LACUNA_LIBRARY=$(CURDIR)/$(BUILD)/asan/lib/liblacuna.so \
           LACUNA_COMMAND=$(BUILD)/asan/bin/lacuna LACUNA_SLOWNESS=10 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
.PHONY: asan asan-build
asan-build: deps
	$(call instrumented,asan,-O1 -g -fno-omit-frame-pointer -fsanitize=address$(,)undefined -fno-sanitize-recover=undefined)
asan: all asan-build ## the whole suite under AddressSanitizer and UBSan
	@SPEC_ENV="$(ASAN_ENV)" tests/support/each_spec.sh $(BUILD)/asan/logs $(SPECS)

# gcc's OpenMP runtime is not instrumented: ThreadSanitizer does not see that its barriers order anything and reports
# every parallel loop. LLVM's runtime has gcc's interface too, and its tool Archer tells ThreadSanitizer about every
# fork, join and barrier; so it is put in libgomp's place. Work of any size is shared among threads, so that the small
# tensors of the specs exercise every parallel loop. Left out are the specs of other programs (ThreadSanitizer's runtime
# cannot be preloaded into sh). threads_spec.lua makes a race on purpose, which must be reported.
LLVM_OMP = $(firstword $(wildcard /usr/lib/llvm-*/lib/libarcher.so))
TSAN_ENV = LD_PRELOAD=$(call runtime,libtsan.so):$(dir $(LLVM_OMP))libomp.so.5 OMP_TOOL_LIBRARIES=$(LLVM_OMP) \
           TSAN_OPTIONS=ignore_noninstrumented_modules=1:exitcode=66 LACUNA_LIBRARY=$(CURDIR)/$(BUILD)/tsan/lib/liblacuna.so \
           LACUNA_CHILDREN=plain LACUNA_SLOWNESS=10 OMP_NUM_THREADS=4 \
           LACUNA_STRESS_FLAGS=-fsanitize=thread$(,)-Xlinker$(,)--no-as-needed$(,)$(dir $(LLVM_OMP))libomp.so.5
TSAN_SPECS = $(filter-out $(addprefix tests/,$(addsuffix _spec.lua,build command experiments readme layers plot fuzz bench queue)),$(SPECS))
.PHONY: tsan
tsan: all ## the suite and stress programs under ThreadSanitizer, four threads
	@$(MAKE) --no-print-directory deps PACKAGES="$(PACKAGES) libomp-dev"
	$(call instrumented,tsan,-O1 -g -fsanitize=thread -DLAC_PARALLEL_WORK=1)
	@SPEC_ENV="$(TSAN_ENV)" tests/support/each_spec.sh $(BUILD)/tsan/logs $(TSAN_SPECS)

# A million random calls, in pieces that each have a seed: what fails is repeated by the command that it prints. Pieces
# that are done are remembered, so a stopped run goes on (`rm -r $(BUILD)/fuzz` starts again). SANITIZE=1: under ASan.
FUZZ_CALLS ?= 1000000
FUZZ_PIECE ?= 50000
FUZZ_SEED  ?= 1000
FUZZ_DIR   := $(BUILD)/fuzz/$(if $(SANITIZE),asan-)$(FUZZ_SEED)-$(FUZZ_PIECE)
.PHONY: fuzz coverage docs
fuzz: $(if $(SANITIZE),asan-build,all) ## a million random public calls (FUZZ_CALLS, FUZZ_SEED; SANITIZE=1: under ASan)
	@mkdir -p $(FUZZ_DIR); seq $(FUZZ_SEED) $$(($(FUZZ_SEED) + ($(FUZZ_CALLS) + $(FUZZ_PIECE) - 1) / $(FUZZ_PIECE) - 1)) | \
	xargs -P $$(nproc) -I{} sh -c 'test -f $(FUZZ_DIR)/{}.ok || { env OMP_NUM_THREADS=1 $(if $(SANITIZE),$(ASAN_ENV)) \
	  luajit tests/support/fuzz.lua {} $(FUZZ_PIECE) >$(FUZZ_DIR)/{}.log 2>&1 && mv $(FUZZ_DIR)/{}.log $(FUZZ_DIR)/{}.ok && \
	  echo "  seed {}: $$(cat $(FUZZ_DIR)/{}.ok)"; } || { echo "  seed {} FAILED"; tail -n 20 $(FUZZ_DIR)/{}.log; \
	  echo "  repeat with: luajit tests/support/fuzz.lua {} $(FUZZ_PIECE)"; exit 1; }'
	@awk '{ n += $$1 } END { print n " random calls without a failure" }' $(FUZZ_DIR)/*.ok

# The suite kills a writer of checkpoints 40 times, and damages every byte of a small one; this kills it KILLS times.
KILLS ?= 100
.PHONY: kill
kill: all ## kill a writer of checkpoints at KILLS (100) random moments: every newest checkpoint must load
	LACUNA_KILLS=$(KILLS) $(BUSTED) tests/checkpoint_spec.lua

# Kernels are run by the best instruction set of this processor and, in the engine's specs and those of operators and
# attention, by every other one that it has.
# Lines of Lua are counted with the JIT off. Specs below the library (direct) have nothing to count there and much to
# compute, and run without that.
COVERAGE_ENV  = LACUNA_LIBRARY=$(CURDIR)/$(BUILD)/coverage/lib/liblacuna.so LACUNA_COMMAND=$(BUILD)/coverage/bin/lacuna LACUNA_SLOWNESS=10
COVERAGE_LUA  = LACUNA_COVERAGE=$(CURDIR)/$(BUILD)/coverage/lines LACUNA_FUZZ=10000 LUA_INIT=@$(CURDIR)/tests/support/coverage.lua
spec = $(patsubst %,tests/%_spec.lua,$(1))
DIRECT_SPECS := $(filter $(call spec,engine engine_errors engine_maps engine_rows attend attend_pairs attend_parts golden plan threads dispatch elem),$(SPECS))
coverage: all ## line coverage of C and Lua over the suite; fails below 90%
	$(call instrumented,coverage,-O1 -g --coverage)
	@find $(BUILD)/coverage \( -name '*.gcda' -o -name '*.lines' \) -delete; mkdir -p $(BUILD)/coverage/lines
	$(Q)$(CC) -shared -std=c11 -O2 -fPIC $(WARN) $(WERROR) $$(pkg-config --cflags luajit) tests/support/coverage.c \
	  -o $(BUILD)/coverage/lines/hook.so
	@SPEC_ENV="$(COVERAGE_ENV)" tests/support/each_spec.sh $(BUILD)/coverage/logs-direct $(DIRECT_SPECS)
	@SPEC_ENV="$(COVERAGE_ENV) $(COVERAGE_LUA)" tests/support/each_spec.sh $(BUILD)/coverage/logs $(filter-out $(DIRECT_SPECS),$(SPECS))
	@SPEC_ENV="$(COVERAGE_ENV) LACUNA_CPU=baseline" tests/support/each_spec.sh $(BUILD)/coverage/logs-baseline $(call spec,ops grad nn)
	@luajit tests/support/coverage_report.lua $(BUILD)/coverage $(BUILD)/coverage/lines 90

docs: all ## the reference in build/docs/index.html; a warning is an error
	@$(MAKE) --no-print-directory deps PACKAGES="$(PACKAGES) lua-ldoc"
	@luajit tests/support/reference.lua $(BUILD)/docs

.PHONY: deps deps-all
deps-all: ## those of deps, lint and docs, in one go
	@$(MAKE) --no-print-directory deps PACKAGES="$(PACKAGES) $(LINTERS) lua-ldoc"
deps: ## install the Debian packages that building, testing and the demo need (root or sudo)
	@missing=""; for p in $(PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	line="apt-get install -y --no-install-recommends$$missing"; \
	if ! command -v apt-get >/dev/null; then echo "lacuna: not a Debian system: install the equivalents of:$$missing"; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=""; \
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo=sudo; \
	else echo "lacuna: packages are missing and this user can neither be root nor sudo. As root, run:"; \
	  echo "  apt-get update && $$line"; exit 1; fi; \
	echo "lacuna: $$line"; $$sudo apt-get update -q && DEBIAN_FRONTEND=noninteractive $$sudo $$line

# Quoted, because a path may have spaces. What an older version had and this one has not goes before the new one comes.
INSTALLED := $(DESTDIR)$(PREFIX)
MADE_OF := bin/lacuna include/lacuna.h include/lacuna_queue.h lib/liblacuna.so lib/liblacuna_cuda.so \
           share/lacuna/lua share/lacuna/experiments
remove_installed = rm -rf $(MADE_OF:%='$(INSTALLED)/%')
.PHONY: install uninstall
install: all ## install under PREFIX (default /usr/local)
	$(remove_installed)
	install -d '$(INSTALLED)/bin' '$(INSTALLED)/lib' '$(INSTALLED)/include' '$(INSTALLED)/share/lacuna'
	install -m 755 $(COMMAND) '$(INSTALLED)/bin/'
	install -m 644 $(wildcard $(BUILD)/lib/*.so) '$(INSTALLED)/lib/'
	install -m 644 c/lacuna.h c/lacuna_queue.h '$(INSTALLED)/include/'
	cp -r lua experiments '$(INSTALLED)/share/lacuna/'

uninstall: ## remove what install has put under PREFIX
	$(remove_installed)
	-rmdir '$(INSTALLED)/share/lacuna'

.PHONY: clean help
clean: ## remove everything that was built
	rm -rf $(BUILD)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '!seen[$$1]++ { printf "  make %-12s %s\n", $$1, $$2 }'
