// Runs the CUDA C++ of this folder on a CPU, for tests: any C++20 compiler, no CUDA toolkit.
//
// Every CUDA thread of a block is a fiber; one OS thread runs them. A fiber runs until it reaches a barrier or a warp
// collective, then the next one runs. A warp collective completes when every living lane of its mask has arrived with
// the same operation, a barrier when every living thread of the block has; anything else is an error that names the
// block (a GPU would hang, or compute something undefined). Shared memory starts as NaN. The order of lanes, warps and
// blocks can be forward, reversed or shuffled, which brings out missing barriers and dependencies between blocks.
//
// What it cannot show: memory ordering within a warp, bank conflicts, anything about speed.
#pragma once
#ifdef __CUDACC__
#error "cuda_on_cpu.h is for host compilers"
#endif

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__) || defined(MBK_PORTABLE_FIBERS)
#define MBK_UCONTEXT
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct __nv_bfloat16 { uint16_t bits; };

namespace cuda_on_cpu {

enum class State : uint8_t { kRunning, kCollective, kBarrier, kDone };
enum class Op : uint8_t { kShuffle, kBallot, kSyncWarp, kMatch, kAdd };

// Set for all launches of the calling process: 0 forward, 1 reversed, otherwise the seed of a shuffle.
inline int64_t order = 0;

struct Fiber {
#ifdef MBK_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;
  uint3 thread{};
  State state = State::kDone;
  Op op{};
  uint32_t mask = 0;
  int source = 0;       // lane that a shuffle reads
  uint64_t value = 0;   // what the lane brings
  uint64_t result = 0;  // what it gets
};

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 256;  // bytes behind the shared memory that a launch asked for; written to means too little
constexpr size_t kSharedLimit = 227 << 10;

struct Block {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
#ifdef MBK_UCONTEXT
  ucontext_t scheduler;
#else
  void* scheduler = nullptr;
#endif
  dim3 grid, shape;
  uint3 index{};
  int threads = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
  ~Block() {
    for (auto& fiber : fibers) munmap(fiber.stack, kStack);
  }
};

inline thread_local Block* block = nullptr;

#ifdef MBK_UCONTEXT
inline void to_scheduler() { swapcontext(&block->current->context, &block->scheduler); }
inline void to_fiber(Fiber& fiber) { swapcontext(&block->scheduler, &fiber.context); }
inline void begin(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#else
// Saves the callee-saved registers of the System V ABI and swaps stacks: swapcontext would enter the kernel each time.
extern "C" void mbk_switch(void** save, void* load);
asm(R"(.text
.weak mbk_switch
.type mbk_switch,@function
mbk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mbk_switch,.-mbk_switch
)");
inline void to_scheduler() { mbk_switch(&block->current->stack_pointer, block->scheduler); }
inline void to_fiber(Fiber& fiber) { mbk_switch(&block->scheduler, fiber.stack_pointer); }
inline void begin(Fiber& fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack + kStack) & ~uintptr_t(15));
  *--top = nullptr;  // in the place of entry's return address, which aligns the stack as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}
#endif

inline void run_body() {
  (*block->body)();
  block->current->state = State::kDone;
  for (;;) to_scheduler();
}

inline int lane() { return int(block->current - block->fibers.data()) & 31; }

inline uint64_t collective(Op op, uint32_t mask, uint64_t value, int source) {
  Fiber& fiber = *block->current;
  if (!((mask >> lane()) & 1)) {
    block->error = "a lane called a warp collective without being in its mask";
    for (;;) to_scheduler();
  }
  fiber.op = op, fiber.mask = mask, fiber.value = value, fiber.source = source, fiber.state = State::kCollective;
  to_scheduler();
  return fiber.result;
}

inline void barrier() {
  block->current->state = State::kBarrier;
  to_scheduler();
}

inline std::string where(const Block& b) {
  int count[4] = {};
  for (int i = 0; i < b.threads; ++i) count[int(b.fibers[i].state)]++;
  char text[200];
  snprintf(text, sizeof text, "; block (%u,%u,%u): %d threads at a barrier, %d in a warp collective, %d done", b.index.x,
           b.index.y, b.index.z, count[int(State::kBarrier)], count[int(State::kCollective)], count[int(State::kDone)]);
  return text;
}

// What each member of one complete collective gets.
inline void give_results(Fiber* warp, int lanes, Op op, uint32_t members) {
  uint64_t combined = 0;
  for (int j = 0; j < lanes; ++j) {
    if (!((members >> j) & 1)) continue;
    if (op == Op::kBallot) combined |= uint64_t(warp[j].value != 0) << j;
    if (op == Op::kAdd) combined = uint32_t(combined + warp[j].value);
  }
  for (int j = 0; j < lanes; ++j) {
    if (!((members >> j) & 1)) continue;
    Fiber& fiber = warp[j];
    fiber.result = combined;
    if (op == Op::kShuffle)  // an absent source is undefined on a GPU: NaN here
      fiber.result = ((members >> fiber.source) & 1) ? warp[fiber.source].value : ~uint64_t(0);
    if (op == Op::kMatch) {
      fiber.result = 0;
      for (int k = 0; k < lanes; ++k)
        if (((members >> k) & 1) && warp[k].value == fiber.value) fiber.result |= uint64_t(1) << k;
    }
    fiber.state = State::kRunning;
  }
}

// Completes the collectives of a warp for which everybody is there; true if there was one.
inline bool resolve(Block& b, int first) {
  Fiber* warp = &b.fibers[first];
  const int lanes = std::min(32, b.threads - first);
  bool any = false;
  for (int i = 0; i < lanes; ++i) {
    if (warp[i].state != State::kCollective) continue;
    uint32_t members = 0;
    bool complete = true;
    for (int j = 0; j < lanes && complete; ++j) {
      if (!((warp[i].mask >> j) & 1) || warp[j].state == State::kDone) continue;
      if (warp[j].state != State::kCollective) complete = false;
      else if (warp[j].op != warp[i].op || warp[j].mask != warp[i].mask)
        throw std::runtime_error("lanes of a warp wait in different collectives" + where(b));
      members |= uint32_t(1) << j;
    }
    if (!complete) continue;
    give_results(warp, lanes, warp[i].op, members);
    any = true;
  }
  return any;
}

inline void set_order(std::vector<int>& places, std::mt19937* shuffle) {
  std::iota(places.begin(), places.end(), 0);
  if (shuffle) std::shuffle(places.begin(), places.end(), *shuffle);
  else if (order == 1) std::reverse(places.begin(), places.end());
}

inline void run_warp(Block& b, int first, std::mt19937* shuffle) {
  std::vector<int> lanes(std::min(32, b.threads - first));
  do {
    set_order(lanes, shuffle);
    for (int lane : lanes) {
      Fiber& fiber = b.fibers[first + lane];
      if (fiber.state != State::kRunning) continue;
      b.current = &fiber;
      to_fiber(fiber);
      if (!b.error.empty()) throw std::runtime_error(b.error + where(b));
    }
  } while (resolve(b, first));
}

inline void run_block(Block& b, std::mt19937* shuffle) {
  for (int i = 0; i < b.threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.thread = {i % b.shape.x, i / b.shape.x % b.shape.y, i / (b.shape.x * b.shape.y)};
    fiber.state = State::kRunning;
    begin(fiber, run_body);
  }
  memset(b.shared, 0xFF, b.shared_bytes + kGuard);
  std::vector<int> warps((b.threads + 31) / 32);
  for (;;) {
    set_order(warps, shuffle);
    for (int warp : warps) run_warp(b, warp * 32, shuffle);
    int living = 0, waiting = 0;
    for (int i = 0; i < b.threads; ++i) {
      living += b.fibers[i].state != State::kDone;
      waiting += b.fibers[i].state == State::kBarrier;
    }
    if (!living) break;
    if (waiting != living) throw std::runtime_error("threads wait for each other for ever" + where(b));
    for (int i = 0; i < b.threads; ++i)
      if (b.fibers[i].state == State::kBarrier) b.fibers[i].state = State::kRunning;
  }
  for (size_t i = 0; i < kGuard; ++i)
    if (b.shared[b.shared_bytes + i] != 0xFF)
      throw std::runtime_error("a write behind the shared memory of the launch" + where(b));
}

inline void launch(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& body) {
  const int threads = int(shape.x * shape.y * shape.z);
  if (threads < 1 || threads > 1024) throw std::runtime_error("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kSharedLimit) throw std::runtime_error("too much shared memory");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("an impossible grid");
  static thread_local Block own;
  block = &own;
  while (int(own.fibers.size()) < threads) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
    own.fibers.push_back({});
    own.fibers.back().stack = static_cast<char*>(stack);
  }
  own.grid = grid, own.shape = shape, own.threads = threads, own.body = &body, own.error.clear();
  own.memory.assign(shared_bytes + kGuard + 16, 0);
  own.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(own.memory.data()) + 15) & ~uintptr_t(15));
  own.shared_bytes = shared_bytes;
  std::mt19937 generator{static_cast<uint32_t>(order)};
  std::mt19937* shuffle = order > 1 ? &generator : nullptr;
  std::vector<int> blocks(size_t(grid.x) * grid.y * grid.z);
  set_order(blocks, shuffle);
  for (int place : blocks) {
    const unsigned i = unsigned(place);
    own.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(own, shuffle);
  }
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T shuffle(unsigned mask, T value, int source) {
  const uint64_t bits = collective(Op::kShuffle, mask, pack(value), source);
  T result;
  memcpy(&result, &bits, sizeof(T));
  return result;
}
}  // namespace cuda_on_cpu

// What the kernel sources see of CUDA.
#define threadIdx (::cuda_on_cpu::block->current->thread)
#define blockIdx (::cuda_on_cpu::block->index)
#define blockDim (::cuda_on_cpu::block->shape)
#define gridDim (::cuda_on_cpu::block->grid)
using std::max;
using std::min;

inline void __syncthreads() { ::cuda_on_cpu::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { ::cuda_on_cpu::collective(::cuda_on_cpu::Op::kSyncWarp, mask, 0, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) { return ::cuda_on_cpu::shuffle(mask, value, source & 31); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ::cuda_on_cpu::shuffle(mask, value, ::cuda_on_cpu::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = ::cuda_on_cpu::lane(), source = lane - int(by);
  return ::cuda_on_cpu::shuffle(mask, value, source < 0 ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int lane = ::cuda_on_cpu::lane(), source = lane + int(by);
  return ::cuda_on_cpu::shuffle(mask, value, source > 31 ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(::cuda_on_cpu::collective(::cuda_on_cpu::Op::kBallot, mask, predicate != 0, 0));
}
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  return unsigned(::cuda_on_cpu::collective(::cuda_on_cpu::Op::kMatch, mask, value, 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return unsigned(::cuda_on_cpu::collective(::cuda_on_cpu::Op::kAdd, mask, value, 0));
}

// Integers only: floating atomics would make results depend on the order of blocks.
template <class T>
T atomicAdd(T* place, T value) {
  static_assert(std::is_integral_v<T>);
  return std::exchange(*place, T(*place + value));
}
template <class T>
T __ldg(const T* place) { return *place; }
template <class T>
T __ldcs(const T* place) { return *place; }
template <class T>
void __stcs(T* place, T value) { *place = value; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits ? std::countr_zero(unsigned(bits)) + 1 : 0; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
