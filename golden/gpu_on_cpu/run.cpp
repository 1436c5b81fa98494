// Executes a GPU kernel, as it was rendered for CUDA or Metal, on the CPU under ThreadSanitizer. test_all.py, which compiles
// this, defines KERNEL (the source's file), LAUNCH (the call), SHARED_BYTES, and numbers the barriers: BARRIER(0), BARRIER(1), …
//
// Each thread of the GPU is a fiber. Work groups are under way at once, as far as there are numbers for their threads: each thread
// in turn runs on to its next barrier or mma, or to its end. ThreadSanitizer knows nothing of these turns; to it, threads are ordered by the barriers of their work group
// and by nothing else. Two accesses to one place, at least one a store, that no barrier orders, are a race, in whatever order
// they were run. pthread barriers would hide some: a thread that is already at the next one is taken to be ordered before one
// that has not yet left this one.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <set>
#include <ucontext.h>
#include <vector>
#if __has_feature(thread_sanitizer)
#include <sanitizer/tsan_interface.h>
const unsigned TOGETHER = 250;       // threads at once: ThreadSanitizer has 256 numbers for them
#else                                // results alone, of work groups of any size
const unsigned TOGETHER = 1024, __tsan_switch_to_fiber_no_sync = 0;
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_destroy_fiber(void*) {}
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#define AnnotateBenignRaceSized(...)
#define AnnotateIgnoreWritesBegin(...)
#define AnnotateIgnoreWritesEnd(...)
#endif
#define OUTSIDE __attribute__((no_sanitize("thread"), noinline))      // what is no part of the kernel
#if __has_feature(thread_sanitizer)
extern "C" {
void AnnotateBenignRaceSized(const char*, int, const volatile void*, long, const char*);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

struct uint3 { unsigned x, y, z; };
struct Fragments { int a[4], b[2]; };                                 // a thread's parts of two factors
struct Group {
  uint3 at;
  char phases[2];                                                     // the address of phases[i] is a name to ThreadSanitizer
  void* shared;
  Fragments fragments[1024];
};
// waits_at: the number of a barrier, or what is no barrier: -1 before the first, -2 and -3 in `mma`
struct Thread { Group* group; uint3 at; int waits_at = -1; bool ended = false; void* fiber; ucontext_t context; };

static Thread* now;
static void* scheduler_fiber;
static ucontext_t scheduler;
static std::set<int> left_out;     // the numbers of barriers that do nothing
static bool local_only = false;    // barriers order shared memory alone, as Metal's and OpenCL's do
static long phase = 0, races = 0;

extern "C" OUTSIDE void __tsan_on_report(void*) { races++; }

OUTSIDE static void yield() {
  Thread* me = now;
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
  swapcontext(&me->context, &scheduler);
}
OUTSIDE static void barrier(int number) {
  if (left_out.count(number)) return;
  Thread* me = now;
  char* passed = &me->group->phases[phase % 2];
  if (!local_only) __tsan_release(passed);
  me->waits_at = number;
  yield();
  if (!local_only) __tsan_acquire(passed);
}
template <class To, class From> OUTSIDE static To bits(From x) {
  union { From from; To to; } u = {x};
  return u.to;
}
OUTSIDE static float number(int pair, int which, bool bfloat16) {
  union { uint16_t half; __fp16 x; } u = {(uint16_t)((unsigned)pair >> 16*which)};
  return bfloat16 ? bits<float>((unsigned)u.half << 16) : u.x;
}
// mma.m16n8k16, c += a b, where each of the 32 threads of a warp has a part; ThreadSanitizer does not see it
OUTSIDE static void mma(const int* a, const int* b, int* c, const char* instruction) {
  Thread* me = now;
  unsigned lane = me->at.x % 32;
  Fragments* warp = &me->group->fragments[me->at.x - lane];
  warp[lane] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  me->waits_at = -2;
  yield();
  bool bfloat16 = strstr(instruction, "bf16");
  for (int n = 0; n < 4; n++) {
    const Fragments& row = warp[lane/4*4], &column = warp[(lane % 4*2 + n % 2)*4];
    float sum = bits<float>(c[n]);
    for (int k = 0; k < 16; k++)
      sum += number((&row)[k % 8/2].a[k/8*2 + n/2], k % 2, bfloat16)*number((&column)[k % 8/2].b[k/8], k % 2, bfloat16);
    c[n] = bits<int>(sum);
  }
  me->waits_at = -3;
  yield();
}
OUTSIDE static uint3 group_at() { return now->group->at; }
OUTSIDE static uint3 thread_at() { return now->at; }
template <class T> OUTSIDE static T& shared(int offset) { return *(T*)((char*)now->group->shared + offset); }

// ---- the words of CUDA and Metal
#define BARRIER(number) barrier(number)
#define SHARED(type, name, n, offset) auto& name = shared<type[n]>(offset)
struct alignas(8) float2 { float x, y; float2(float x, float y): x(x), y(y) {} float2() = default; };
struct alignas(16) float4 {
  float x, y, z, w;
  float4(float x, float y, float z, float w): x(x), y(y), z(z), w(w) {}
  float4() = default;
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct nv_bfloat16 { uint16_t bits; };
#define asm(...) mma(a_pk, b_pk, c_pk, #__VA_ARGS__)                   // the only assembler there is
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct half {
  __fp16 x;
  half(float f): x(f) {}
  half() = default;
  operator float() const { return x; }
};
static float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
#define blockIdx group_at()
#define threadIdx thread_at()
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __align__(n) __attribute__((aligned(n)))
#define kernel
#define device
#define constant const
#define threadgroup
namespace metal {}
#include KERNEL
#undef kernel
#undef device
#undef constant
#undef threadgroup

// ---- launching it
struct Any { void* p; template <class T> operator T*() const { return (T*)p; } };
static std::vector<char*> data;
OUTSIDE static Any arg(int i) { return {data[i]}; }
OUTSIDE static void start() {
  LAUNCH;
  now->ended = true;
  __tsan_release(&data);
  yield();
}

const int BEHIND = 256;              // bytes behind a buffer, which nobody may write, and which are NaNs to whoever reads them
static char* filled(unsigned bytes) { // with NaNs: what is read before it was written shows
  char* p = (char*)aligned_alloc(64, (bytes + BEHIND + 63)/64*64);
  memset(p, 0xff, bytes + BEHIND);
  return p;
}
OUTSIDE static int failed(const char* why) {
  fprintf(stderr, "%s\n", why);
  return 3;
}

OUTSIDE static int launch_groups(unsigned first, unsigned end, uint3 grid, uint3 block) {
  std::deque<Group> groups;
  std::deque<Thread> threads;
  std::vector<char*> memory;
  for (unsigned g = first; g < end; g++) {
    memory.push_back(filled(SHARED_BYTES));
    groups.push_back({{g % grid.x, g/grid.x % grid.y, g/grid.x/grid.y}, {}, memory.back()});
    if (local_only) AnnotateBenignRaceSized(__FILE__, __LINE__, memory.back(), SHARED_BYTES, "shared");
    for (unsigned t = 0; t < block.x*block.y*block.z; t++) {
      const size_t stack = 1 << 16;
      memory.push_back((char*)malloc(stack));
      threads.emplace_back();
      Thread& thread = threads.back();
      thread.group = &groups.back();
      thread.at = {t % block.x, t/block.x % block.y, t/block.x/block.y};
      thread.fiber = __tsan_create_fiber(0);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = memory.back();
      thread.context.uc_stack.ss_size = stack;
      makecontext(&thread.context, start, 0);
    }
  }
  for (bool more = true; more; phase++) {
    more = false;
    for (Thread& thread : threads) if (!thread.ended) {
      now = &thread;
      __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
      swapcontext(&scheduler, &thread.context);
      more |= !thread.ended;
    }
    Thread* one = nullptr;
    for (Thread& thread : threads) {
      if (!one || one->group != thread.group) one = &thread;
      if (thread.ended != one->ended || thread.waits_at != one->waits_at)
        return failed("threads of one work group wait at different barriers");
    }
  }
  for (Thread& thread : threads) __tsan_destroy_fiber(thread.fiber);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);       // what frees memory is ordered behind no thread
  for (char* p : memory) free(p);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  return 0;
}

int main(int, char** v) {            // in out barriers-left-out local-only grid block
  for (char* p = strtok(v[3], ","); p; p = strtok(nullptr, ",")) left_out.insert(atoi(p));
  local_only = atoi(v[4]);
  unsigned size[6];
  for (int i = 0; i < 6; i++) size[i] = atoi(v[5 + i]);
  std::vector<unsigned> bytes;
  FILE* in = fopen(v[1], "rb");
  for (unsigned n; fread(&n, 4, 1, in) == 1;) {
    data.push_back(filled(n));
    bytes.push_back(n);
    if (fread(data.back(), 1, n, in) != n) return failed("the buffers are cut off");
  }
  fclose(in);
  scheduler_fiber = __tsan_get_current_fiber();
  uint3 grid = {size[0], size[1], size[2]}, block = {size[3], size[4], size[5]};
  unsigned total = grid.x*grid.y*grid.z, threads = block.x*block.y*block.z;
  if (threads > TOGETHER) return failed("more threads in a work group than can be told apart");
  unsigned together = TOGETHER/threads;
  for (unsigned g = 0; g < total; g += together)
    if (int status = launch_groups(g, g + together < total ? g + together : total, grid, block)) return status;
  __tsan_acquire(&data);
  FILE* out = fopen(v[2], "wb");
  for (size_t i = 0; i < data.size(); i++) {
    for (int j = 0; j < BEHIND; j++) if (data[i][bytes[i] + j] != (char)0xff) return failed("a store behind a buffer");
    fwrite(data[i], 1, bytes[i], out);
  }
  fclose(out);
  printf("%ld\n", races);
  return 0;
}
