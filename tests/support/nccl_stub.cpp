// A libnccl for tests without a GPU: ranks are threads of one process, tensors are host memory, streams are numbers.
//
// It behaves as a non-blocking NCCL does: a call leaves its data with the group and returns "in progress", and
// ncclCommGetAsyncError says success once all ranks have made the same call and the result is written. It keeps a log
// of the calls and can be told to fail, to hang, or to be another version (stub_set). Written against nccl.h 2.32.3.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <climits>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#ifndef VERSION
#define VERSION 23203
#endif

namespace {

enum { Success = 0, SystemError = 2, InvalidArgument = 4, InvalidUsage = 5, RemoteError = 6, InProgress = 7 };

struct UniqueId { char bytes[128]; };

struct Config {  // nccl.h 2.28: ncclConfig_t
  size_t size;
  unsigned magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char* netName;
  int splitShare, trafficClass;
  const char* commName;
  int collnetEnable, CTAPolicy, shrinkShare, nvlsCTAs, nChannelsPerNetPeer, nvlinkCentricSched;
};

struct Offer { std::string call; std::vector<char> data; };

struct Group {
  int size = 0, joined = 0;
  std::map<uint64_t, std::map<int, Offer>> offers;  // of the n-th collective, by rank
};

struct Comm {
  Group* group;
  int rank;
  uint64_t calls = 0;
  std::function<bool()> pending;  // tries to complete the last call
  bool finalized = false, ended = false;
};

std::mutex mutex;
std::map<std::string, int> settings;
std::map<std::string, Group*> groups;
std::string log_text;

int setting(const char* name) { auto at = settings.find(name); return at == settings.end() ? 0 : at->second; }

template <typename... Parts> void note(Parts... parts) {
  std::ostringstream line;
  ((line << parts << ' '), ...);
  log_text += line.str() + "\n";
}

size_t width(int type) {
  static const size_t widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return widths[type];
}

double read(const char* at, int type) {
  switch (type) {
    case 0: return *reinterpret_cast<const int8_t*>(at);
    case 1: return *reinterpret_cast<const uint8_t*>(at);
    case 2: return *reinterpret_cast<const int32_t*>(at);
    case 4: return *reinterpret_cast<const int64_t*>(at);
    case 6: return *reinterpret_cast<const _Float16*>(at);
    case 7: return *reinterpret_cast<const float*>(at);
    case 8: return *reinterpret_cast<const double*>(at);
    case 9: { uint32_t bits = uint32_t(*reinterpret_cast<const uint16_t*>(at)) << 16; float f; memcpy(&f, &bits, 4); return f; }
  }
  abort();
}

void write(char* at, int type, double value) {
  switch (type) {
    case 0: *reinterpret_cast<int8_t*>(at) = value; return;
    case 1: *reinterpret_cast<uint8_t*>(at) = value; return;
    case 2: *reinterpret_cast<int32_t*>(at) = value; return;
    case 4: *reinterpret_cast<int64_t*>(at) = value; return;
    case 6: *reinterpret_cast<_Float16*>(at) = value; return;
    case 7: *reinterpret_cast<float*>(at) = value; return;
    case 8: *reinterpret_cast<double*>(at) = value; return;
    case 9: { float f = value; uint32_t bits; memcpy(&bits, &f, 4); *reinterpret_cast<uint16_t*>(at) = bits >> 16; return; }
  }
  abort();
}

// Leaves `bytes` of `send` with the group; `finish` gets the offers of all ranks once they are there.
int enqueue(Comm* comm, const std::string& call, const void* send, size_t bytes,
            std::function<void(std::map<int, Offer>&)> finish) {
  if (comm->ended || comm->pending) { note("misuse", comm->rank, call); return InvalidUsage; }
  if (int code = setting("fail")) return code;
  auto number = comm->calls++;
  Group* group = comm->group;
  auto start = static_cast<const char*>(send);
  group->offers[number][comm->rank] = {call, {start, start + bytes}};
  comm->pending = [=] {
    auto& offers = group->offers[number];
    if (int(offers.size()) < group->size) return false;
    finish(offers);
    return true;
  };
  return InProgress;
}

void sum(std::map<int, Offer>& offers, size_t count, int type, void* out) {
  for (size_t i = 0; i < count; i++) {
    double total = 0;
    for (auto& [rank, offer] : offers) total += read(offer.data.data() + i * width(type), type);
    write(static_cast<char*>(out) + i * width(type), type, total);
  }
}

using Lock = std::lock_guard<std::mutex>;

}  // namespace

extern "C" {

void stub_set(const char* name, int value) { Lock lock(mutex); settings[name] = value; }
void stub_reset() { Lock lock(mutex); settings.clear(); log_text.clear(); groups.clear(); }
const char* stub_log() { Lock lock(mutex); static std::string copy; copy = log_text; return copy.c_str(); }
int stub_version() { return VERSION; }  // exported, so that another copy's could be called instead

int ncclGetVersion(int* version) {
  *version = setting("version") ? setting("version") : stub_version();
  return Success;
}

int ncclGetUniqueId(UniqueId* id) {
  static int next = 1;
  Lock lock(mutex);
  for (int i = 0; i < 128; i++) id->bytes[i] = char(next + i);  // bytes of all values, zero too
  next++;
  return Success;
}

const char* ncclGetErrorString(int code) { return code == RemoteError ? "remote process exited" : "unhandled system error"; }
const char* ncclGetLastError(void*) { return "socket closed\nby its peer"; }

int ncclCommInitRankConfig(Comm** out, int size, UniqueId id, int rank, Config* config) {
  Lock lock(mutex);
  note("init", rank, size, config->size, config->magic == 0xcafebeef, config->version, config->blocking,
       config->splitShare == INT_MIN, config->netName == nullptr, config->maxCTAs);
  if (int code = setting("fail")) { *out = nullptr; return code; }
  Group*& group = groups[std::string(id.bytes, 128)];
  if (!group) group = new Group;
  group->size = size;
  group->joined++;
  *out = new Comm{group, rank};
  Group* mine = group;
  (*out)->pending = [=] { return mine->joined == size; };
  return InProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* code) {
  Lock lock(mutex);
  if (comm->ended) note("misuse", comm->rank, "async_error");
  if (comm->pending && !setting("hang") && comm->pending()) comm->pending = nullptr;
  *code = setting("async_error") ? setting("async_error") : comm->pending ? InProgress : Success;
  return Success;
}

#ifndef LACKS_FINALIZE
int ncclCommFinalize(Comm* comm) {
  Lock lock(mutex);
  note("finalize", comm->rank);
  int polls = 3;
  comm->pending = [=]() mutable { return --polls == 0 && (comm->finalized = true); };
  return InProgress;
}
#endif

int ncclCommDestroy(Comm* comm) {
  Lock lock(mutex);
  note(comm->finalized ? "destroy" : "destroy too early", comm->rank);
  comm->ended = true;
  return Success;
}

int ncclCommAbort(Comm* comm) {
  Lock lock(mutex);
  note(comm->ended ? "misuse abort" : "abort", comm->rank);
  comm->ended = true;
  return Success;
}

int ncclAllReduce(const void* send, void* recv, size_t count, int type, int op, Comm* comm, void* stream) {
  Lock lock(mutex);
  note("all_reduce", comm->rank, count, type, op, uintptr_t(stream));
  return enqueue(comm, "all_reduce", send, count * width(type), [=](auto& offers) { sum(offers, count, type, recv); });
}

int ncclAllGather(const void* send, void* recv, size_t count, int type, Comm* comm, void* stream) {
  Lock lock(mutex);
  note("all_gather", comm->rank, count, type, uintptr_t(stream));
  size_t bytes = count * width(type);
  return enqueue(comm, "all_gather", send, bytes, [=](auto& offers) {
    for (auto& [rank, offer] : offers) memcpy(static_cast<char*>(recv) + rank * bytes, offer.data.data(), bytes);
  });
}

int ncclMemAlloc(void** out, size_t bytes) { *out = malloc(bytes); return Success; }
int ncclMemFree(void* memory) { free(memory); return Success; }
#ifndef LACKS_WINDOWS
int ncclCommWindowRegister(Comm*, void*, size_t, void**, int) { return InvalidUsage; }
int ncclCommWindowDeregister(Comm*, void*) { return InvalidUsage; }
#endif
}
