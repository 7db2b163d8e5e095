// Stands in for the thread sanitizer's runtime: objects compiled with -fsanitize=thread call these functions at every
// access to memory, and this counts the accesses to the arrays that are watched: bytes asked for, and 32-byte sectors
// touched at least once. One thread.
#include <cstdint>
#include <vector>

namespace {

constexpr uintptr_t kSector = 32;
struct Side {
  int64_t asked = 0;
  std::vector<bool> touched;
};
struct Watched {
  uintptr_t begin, end;
  Side read, write;
};
std::vector<Watched> watched;

inline void count(void* pointer, uintptr_t size, bool is_write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  for (Watched& range : watched)
    if (at >= range.begin && at < range.end) {
      Side& side = is_write ? range.write : range.read;
      side.asked += int64_t(size);
      for (uintptr_t sector = (at - range.begin) / kSector; sector <= (at + size - 1 - range.begin) / kSector; ++sector)
        side.touched[sector] = true;
      return;
    }
}
int64_t sectors(const Side& side) {
  int64_t n = 0;
  for (const bool touched : side.touched) n += touched;
  return n * int64_t(kSector);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED void traffic_clear() { watched.clear(); }
EXPORTED void traffic_watch(void* pointer, int64_t size) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  const std::vector<bool> none(uintptr_t(size) / kSector + 1, false);
  watched.push_back({begin, begin + uintptr_t(size), {0, none}, {0, none}});
}
// Of the array watched first, second …: to[0] and to[1] read, to[2] and to[3] written; asked for, and in sectors.
EXPORTED void traffic_of(int64_t index, int64_t* to) {
  const Watched& range = watched[uintptr_t(index)];
  to[0] = range.read.asked, to[1] = sectors(range.read), to[2] = range.write.asked, to[3] = sectors(range.write);
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
#define ACCESS(bytes)                                                        \
  void __tsan_read##bytes(void* p) { count(p, bytes, false); }               \
  void __tsan_write##bytes(void* p) { count(p, bytes, true); }               \
  void __tsan_unaligned_read##bytes(void* p) { count(p, bytes, false); }     \
  void __tsan_unaligned_write##bytes(void* p) { count(p, bytes, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* p, long size) { count(p, uintptr_t(size), false); }
void __tsan_write_range(void* p, long size) { count(p, uintptr_t(size), true); }
}
