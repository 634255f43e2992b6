// Runs a CUDA kernel on the CPU: a fiber per thread, the blocks of a cluster side by side, one cluster after another.
//
// Warps run as far as they can before another one does, in an order that the seed chooses, which also turns the order of
// blocks around: the opposite of lockstep. Shared memory is poisoned and lies between pages that may not be touched, and so
// does every stack. An access outside of what is mapped, a trap of the undefined-behaviour sanitizer, a barrier that not all
// threads reach, and a deadlock end the launch with an error.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

struct Int3 { unsigned x, y, z; };
struct HostPlace { Int3 thread, block; unsigned rank; };

#if defined(__clang__)
#define ALONE __attribute__((noinline))
#else
#define ALONE __attribute__((noipa))  // also: assume nothing about which registers it leaves alone
#endif

extern "C" {
HostPlace* host_place;
// there under the address sanitizer, which then knows where shared memory ends
void __asan_poison_memory_region(const volatile void*, size_t) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));
}

namespace {

constexpr size_t STACK = 128 << 10, MOST_SHARED = 232448;
constexpr unsigned MOST_CLUSTER = 8;  // that every GPU with clusters has
enum Wait { RUNNING, BARRIER, WARP, CLUSTER, DONE };

struct Fiber {
  HostPlace place{};
  void* resume[5]{};
  ucontext_t start{};
  bool started = false, armed = false;  // armed: between arrival at the cluster's barrier and the wait for it
  Wait wait = RUNNING;
  int line = 0;
  unsigned generation = 0, arrived_in = 0;
};
struct Warp {
  unsigned arrived = 0, generation = 0, done = 0;
  int line = 0;
  uint64_t values[2][32];
};
struct Block {
  std::vector<Warp> warps;
  unsigned arrived = 0, generation = 0, done = 0, first = 0;
  int line = 0;
  bool started = false;
  unsigned char *memory = nullptr, *lowest = nullptr, *end = nullptr;  // around the memory, up to the guard pages: poison
};

std::vector<Fiber> fibers;
std::vector<Block> blocks;
unsigned threads, cluster_arrived, cluster_generation, cluster_done;
int cluster_line;
size_t dynamic;
Fiber* current;
Block* block_now;
void* scheduler[5];
std::string error;
void (*kernel)(void**);
void** arguments;

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
size_t pages(size_t n) { return (n + page() - 1) / page() * page(); }
std::string text(const char* what, int line) { return std::string(what) + " in line " + std::to_string(line); }

ALONE void to_scheduler() { __builtin_longjmp(scheduler, 1); }
ALONE void leave() {
  if (!__builtin_setjmp(current->resume)) to_scheduler();
}
void fail(const std::string& what) {
  const HostPlace& p = current->place;
  if (error.empty()) error = what + " (block " + std::to_string(p.block.x) + ", thread " + std::to_string(p.thread.x) + ")";
  to_scheduler();
}

void entry() {
  kernel(arguments);
  Fiber& f = *current;
  Block& b = *block_now;
  f.wait = DONE;
  if (b.arrived) fail(text("a thread ends while others wait at __syncthreads", b.line));
  Warp& w = b.warps[f.place.thread.x / 32];
  if (w.arrived) fail(text("a thread ends while others of its warp wait", w.line));
  if (f.armed) fail(text("a thread ends without a wait after its arrival at the cluster's barrier", f.line));
  ++w.done, ++b.done, ++cluster_done;
  leave();
}

bool ready(const Fiber& f, const Block& b) {
  switch (f.wait) {
    case RUNNING: return true;
    case BARRIER: return b.generation != f.generation;
    case WARP: return b.warps[f.place.thread.x / 32].generation != f.generation;
    case CLUSTER: return cluster_generation != f.generation;
    default: return false;
  }
}

// Stacks for so many fibers, each above a page that may not be touched; kept for the next launch.
char* stacks(size_t count) {
  static char* area;
  static size_t room;
  if (room >= count) return area;
  if (room) munmap(area, room * STACK);
  room = 0;
  void* made = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return nullptr;
  area = static_cast<char*>(made), room = count;
  for (size_t k = 0; k < count; ++k) mprotect(area + k * STACK, page(), PROT_NONE);
  return area;
}

ALONE void prepare(Fiber& f, char* stack) {
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = stack;
  f.start.uc_stack.ss_size = STACK;
  f.start.uc_link = nullptr;
  makecontext(&f.start, entry, 0);
}
ALONE void enter(Fiber& f) {
  if (f.started) __builtin_longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}
ALONE void run(Fiber& f) {
  current = &f;
  host_place = &f.place;
  f.wait = RUNNING;
  if (!__builtin_setjmp(scheduler)) enter(f);
}

// Runs the warps of a block, each as far as it goes.
bool turn(Block& b, unsigned turns, unsigned seed) {
  const unsigned warps = (threads + 31) / 32;
  unsigned step = 2 * seed + 1;
  while (std::gcd(step, warps) != 1) ++step;  // else some warps would have no turn
  bool any = false;
  for (unsigned k = 0; k < warps; ++k) {
    const unsigned w = seed == 0 ? k : seed == 1 ? warps - 1 - k : (k * step + turns * seed) % warps;
    for (bool progress = true; progress;) {
      progress = false;
      for (unsigned j = 0; j < 32; ++j) {
        const unsigned i = w * 32 + (seed & 1 ? 31 - j : j);
        if (i >= threads) continue;
        Fiber& f = fibers[b.first + i];
        if (!ready(f, b)) continue;
        any = progress = true;
        run(f);
        if (!error.empty()) return any;
      }
    }
  }
  return any;
}

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
struct sigaction old_actions[5];
pthread_t owner;  // the thread that launches

void on_signal(int number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), owner)) {  // not ours: a fault happens again, and goes to whom it went before
    for (int k = 0; k < 5; ++k)
      if (SIGNALS[k] == number) sigaction(number, &old_actions[k], nullptr);
    if (info->si_code <= 0) pthread_kill(pthread_self(), number);  // sent by somebody: again
    return;
  }
  char line[160];
  if (number == SIGFPE)
    std::snprintf(line, sizeof line, "undefined behaviour: an integer division");
  else if (number == SIGILL || number == SIGTRAP)
    std::snprintf(line, sizeof line, "undefined behaviour: a misaligned address, an index or a shift out of range, an overflow");
  else
    std::snprintf(line, sizeof line, "access out of bounds at address %p", info->si_addr);
  if (error.empty())
    error = std::string(line) + " (block " + std::to_string(current->place.block.x) + ", thread " + std::to_string(current->place.thread.x) + ")";
  to_scheduler();
}

// Says which threads wait, for each line the first one.
void deadlock(unsigned x) {
  error = "deadlock in block " + std::to_string(x) + ":";
  std::vector<int> lines;
  for (auto& f : fibers) {
    if (f.wait == DONE || std::find(lines.begin(), lines.end(), f.line) != lines.end()) continue;
    lines.push_back(f.line);
    const auto count = std::count_if(fibers.begin(), fibers.end(), [&](Fiber& g) { return g.wait != DONE && g.line == f.line; });
    error += " thread " + std::to_string(f.place.thread.x) + text(" waits", f.line);
    error += count > 1 ? ", like " + std::to_string(count - 1) + " more;" : ";";
  }
}

// Fills a block's shared memory, and what is left around it up to the guard pages, with poison.
void poison(Block& b, bool tell) {
  std::memset(b.lowest, 0xff, b.end - b.lowest);
  if (!tell || !__asan_poison_memory_region) return;
  __asan_poison_memory_region(b.lowest, b.memory - b.lowest);
  __asan_poison_memory_region(b.memory + dynamic, b.end - b.memory - dynamic);
}
// Whether nothing was written there.
bool intact(const Block& b) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(b.lowest, b.end - b.lowest);
  unsigned char all = 0xff;
  for (const unsigned char* p = b.lowest; p < b.memory; ++p) all &= *p;
  for (const unsigned char* p = b.memory + dynamic; p < b.end; ++p) all &= *p;
  return all == 0xff;
}

}  // namespace

extern "C" {

unsigned char* host_memory() { return block_now->memory; }

void host_barrier(int line) {
  Block& b = *block_now;
  if (b.done) fail(text("a thread has ended before another one reaches __syncthreads", line));
  if (b.arrived && b.line != line) fail(text("__syncthreads", line) + " while others wait" + text("", b.line));
  b.line = line;
  if (++b.arrived == threads) { b.arrived = 0; ++b.generation; return; }
  current->wait = BARRIER, current->generation = b.generation, current->line = line;
  leave();
}

const uint64_t* host_exchange(unsigned mask, uint64_t value, int line) {
  Warp& w = block_now->warps[current->place.thread.x / 32];
  if (mask != 0xffffffffu) fail(text("a warp operation for a part of the warp", line));
  if (w.done) fail(text("a thread has ended before another one of its warp reaches a warp operation", line));
  if (w.arrived && w.line != line) fail(text("a warp operation", line) + " while others wait" + text("", w.line));
  w.line = line;
  const unsigned slot = w.generation & 1;
  w.values[slot][current->place.thread.x % 32] = value;
  if (++w.arrived == 32) { w.arrived = 0; ++w.generation; return w.values[slot]; }
  current->wait = WARP, current->generation = w.generation, current->line = line;
  leave();
  return w.values[slot];
}

void host_cluster_arrive(int line) {
  if (current->armed) fail(text("a second arrival at the cluster's barrier without a wait", line));
  if (cluster_done) fail(text("a thread has ended before another one reaches the cluster's barrier", line));
  if (cluster_arrived && cluster_line != line)
    fail(text("the cluster's barrier", line) + " while others have arrived" + text("", cluster_line));
  cluster_line = current->line = line;
  current->armed = true, current->arrived_in = cluster_generation;
  if (++cluster_arrived == threads * blocks.size()) { cluster_arrived = 0; ++cluster_generation; }
}

void host_cluster_wait(int line) {
  if (!current->armed) fail(text("a wait at the cluster's barrier without an arrival", line));
  current->armed = false;
  if (cluster_generation != current->arrived_in) return;
  current->wait = CLUSTER, current->generation = current->arrived_in, current->line = line;
  leave();
}

void* host_remote(const void* p, unsigned rank, size_t size) {
  const unsigned char* q = static_cast<const unsigned char*>(p);
  if (rank >= blocks.size()) fail("a block that is not in the cluster");
  if (q < block_now->memory || q + size > block_now->memory + dynamic) fail("not an address in shared memory");
  Block& other = blocks[rank];
  if (!other.started) fail("shared memory of a block that has not started: a cluster barrier is missing");
  if (other.done == threads) fail("shared memory of a block that has ended: a cluster barrier is missing");
  return other.memory + (q - block_now->memory);
}

// Runs one launch; returns nullptr, or what went wrong. With `guard`, faults become errors.
const char* host_launch(void (*call)(void**), void** args, unsigned gx, unsigned gy, unsigned count, size_t shared, unsigned cluster,
                        unsigned seed, int flush, int guard) {
  error.clear();
  if (shared > MOST_SHARED) return (error = "more shared memory than a block may have: " + std::to_string(shared)).c_str();
  if (count == 0 || count > 1024) return (error = "a block of " + std::to_string(count) + " threads").c_str();
  if (cluster == 0 || cluster > MOST_CLUSTER) return (error = "a cluster of " + std::to_string(cluster) + " blocks").c_str();
  if (gx == 0 || gy == 0 || gx > 0x7fffffff || gy > 0xffff)
    return (error = "a grid of " + std::to_string(gx) + " x " + std::to_string(gy) + " blocks").c_str();
  if (gx % cluster) return (error = "the grid is not a multiple of the cluster").c_str();
  kernel = call, arguments = args, threads = count, dynamic = shared;
  const size_t all = size_t(count) * cluster, room = pages(shared ? shared : 1) + 2 * page(), total = cluster * room;
  char* area = static_cast<char*>(mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  char* const stack = stacks(all);
  if (area == MAP_FAILED || !stack) {
    if (area != MAP_FAILED) munmap(area, total);
    return (error = "no memory for the blocks").c_str();
  }
  for (unsigned c = 0; c < cluster; ++c) {
    mprotect(area + c * room, page(), PROT_NONE);
    mprotect(area + (c + 1) * room - page(), page(), PROT_NONE);
  }
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  if (flush) _mm_setcsr(before | 0x8040);  // the GPU flushes subnormal single-precision numbers
#endif
  struct sigaction mine{};
  stack_t old_stack{}, own{};
  std::vector<char> signal_stack(64 << 10);
  if (guard) {
    owner = pthread_self();
    own.ss_sp = signal_stack.data(), own.ss_size = signal_stack.size();
    sigaltstack(&own, &old_stack);
    mine.sa_sigaction = on_signal, mine.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int k = 0; k < 5; ++k) sigaction(SIGNALS[k], &mine, &old_actions[k]);
  }
  for (unsigned v = 0; v < gy && error.empty(); ++v) {
    for (unsigned u = 0; u < gx && error.empty(); u += cluster) {
      const unsigned x = seed & 1 ? gx - cluster - u : u, y = seed & 1 ? gy - 1 - v : v;
      fibers.assign(all, Fiber());
      blocks.assign(cluster, Block());
      cluster_arrived = cluster_generation = cluster_done = 0;
      for (unsigned c = 0; c < cluster; ++c) {
        Block& b = blocks[c];
        b.warps.assign((count + 31) / 32, Warp());
        b.first = c * count;
        b.end = reinterpret_cast<unsigned char*>(area + (c + 1) * room - page());
        b.lowest = b.end - (room - 2 * page());
        b.memory = b.end - (shared + 15) / 16 * 16;
        poison(b, !guard);
        for (unsigned t = 0; t < count; ++t) {
          Fiber& f = fibers[b.first + t];
          f.place = {{t, 0, 0}, {x + c, y, 0}, c};
          prepare(f, stack + (size_t(b.first) + t) * STACK);
        }
      }
      for (unsigned turns = 0; cluster_done < all && error.empty(); ++turns) {
        bool any = false;
        for (unsigned j = 0; j < cluster && error.empty(); ++j) {
          const unsigned c = seed & 1 ? cluster - 1 - j : (j + turns * seed) % cluster;
          block_now = &blocks[c];
          block_now->started = true;
          any |= turn(*block_now, turns, seed);
        }
        if (!any && error.empty()) {
          deadlock(x);
        }
      }
      for (auto& b : blocks)
        if (!intact(b) && error.empty()) error = "a write next to shared memory (block " + std::to_string(x + (&b - &blocks[0])) + ")";
    }
  }
  if (guard) {
    for (int k = 0; k < 5; ++k) sigaction(SIGNALS[k], &old_actions[k], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
#if defined(__SSE__)
  _mm_setcsr(before);
#endif
  munmap(area, total);
  if (!error.empty() && __asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, all * STACK);  // left as they were
  return error.empty() ? nullptr : error.c_str();
}

}  // extern "C"
