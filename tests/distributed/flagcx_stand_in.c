/* SPDX-License-Identifier: Apache-2.0 */
/* A libflagcx for CPU tensors of one machine's processes, with the ABI of FlagCX 0.13's header. The tests build it.
 *
 * Ranks meet in a file of /dev/shm that the unique id names, and data moves through it. A call returns when it is done:
 * there are no streams, but a handle that was not made by streamCopy is refused. FLAGCX_STAND_IN_COUNTERS names a
 * directory for counters; FLAGCX_STAND_IN_FAULT makes calls fail, hang or kill the process, as
 * "flagcxAllReduce@1#3=die,…" (the third one, on rank 1; #0: every one).
 *
 * -DBEFORE_0_13: handles and ids as FlagCX made them before 0.13. -DWITHOUT_ALL_GATHER: a symbol is missing. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef enum { SUCCESS = 0, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 } result;
typedef enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 } data_type;
typedef enum { SUM, PROD, MAX, MIN, AVG } reduce_op;
typedef struct { char internal[256]; } unique_id;

enum { RANKS = 8, CHUNK = 1 << 18 };

typedef struct { _Atomic uint64_t written, read; char data[CHUNK]; } mailbox;

typedef struct {
  _Atomic int pids[RANKS], closed[RANKS];
  _Atomic uint64_t arrived[RANKS];
  char slots[RANKS][CHUNK];
  mailbox boxes[RANKS][RANKS]; /* [from][to] */
} meeting;

typedef struct { int rank, ranks; uint64_t barriers; meeting *shared; char name[64], error[128]; } communicator;
typedef struct { uint64_t magic; void *base; } stream;

static const uint64_t MAGIC = 0x73747265616d0001;

/* Counters and faults. */

typedef struct { char name[48]; _Atomic uint64_t calls, elements; } counter;
enum { COUNTERS = 32 };
static counter *counters;

static void count(const char *name, size_t elements) {
  if (!counters) {
    static counter nowhere[COUNTERS];
    const char *directory = getenv("FLAGCX_STAND_IN_COUNTERS");
    counters = nowhere;
    if (directory) {
      char path[4096];
      snprintf(path, sizeof path, "%s/%d", directory, (int)getpid());
      int file = open(path, O_RDWR | O_CREAT, 0600);
      if (file < 0 || ftruncate(file, sizeof nowhere)) { perror(path); abort(); }
      counters = mmap(NULL, sizeof nowhere, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      close(file);
    }
  }
  for (int i = 0; i < COUNTERS; i++) {
    if (!counters[i].name[0]) strncpy(counters[i].name, name, sizeof counters[i].name - 1);
    if (strcmp(counters[i].name, name)) continue;
    atomic_fetch_add(&counters[i].calls, 1);
    atomic_fetch_add(&counters[i].elements, elements);
    return;
  }
  abort();
}

static uint64_t calls_of(const char *name) {
  for (int i = 0; i < COUNTERS; i++)
    if (!strcmp(counters[i].name, name)) return counters[i].calls;
  return 0;
}

static result fault(const char *name, int rank) {
  const char *all = getenv("FLAGCX_STAND_IN_FAULT");
  char copy[512], *rest = copy, *one;
  if (!all) return SUCCESS;
  strncpy(copy, all, sizeof copy - 1);
  copy[sizeof copy - 1] = 0;
  while ((one = strsep(&rest, ","))) {
    char function[64], kind[16];
    int who;
    unsigned long nth;
    if (sscanf(one, "%63[^@]@%d#%lu=%15s", function, &who, &nth, kind) != 4) { fprintf(stderr, "bad fault %s\n", one); abort(); }
    if (strcmp(function, name) || who != rank || (nth && nth != calls_of(name))) continue;
    if (!strcmp(kind, "hang")) for (;;) pause();
    if (!strcmp(kind, "die")) kill(getpid(), SIGKILL);
    return INTERNAL_ERROR;
  }
  return SUCCESS;
}

#define ENTER(name, elements, rank) \
  do { \
    count(name, elements); \
    result planted = fault(name, rank); \
    if (planted) return planted; \
  } while (0)

/* Waiting for others. */

static int is_gone(int pid) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  int file = open(path, O_RDONLY);
  if (file < 0) return 1;
  ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  if (size <= 0) return 1;
  text[size] = 0;
  char *state = strrchr(text, ')');
  return !state || state[2] == 'Z' || state[2] == 'X';
}

static int lost_peer(communicator *comm) {
  for (int r = 0; r < comm->ranks; r++) {
    int pid = comm->shared->pids[r];
    if (r == comm->rank || !pid) continue;
    if (is_gone(pid)) {
      snprintf(comm->error, sizeof comm->error, "rank %d (process %d) is gone", r, pid);
      return 1;
    }
    if (comm->shared->closed[r]) {
      snprintf(comm->error, sizeof comm->error, "rank %d has left the communicator", r);
      return 1;
    }
  }
  return 0;
}

static int patience(unsigned *turns, communicator *comm) {
  if (++*turns < 200) { sched_yield(); return 1; }
  struct timespec nap = {0, 50000};
  nanosleep(&nap, NULL);
  return *turns % 500 || !lost_peer(comm);
}

static result barrier(communicator *comm) {
  uint64_t turn = ++comm->barriers;
  unsigned turns = 0;
  atomic_store(&comm->shared->arrived[comm->rank], turn);
  for (int r = 0; r < comm->ranks; r++)
    while (atomic_load(&comm->shared->arrived[r]) < turn)
      if (!patience(&turns, comm)) return REMOTE_ERROR;
  return SUCCESS;
}

/* Arithmetic. */

static size_t size_of(data_type type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type <= BFLOAT16 ? sizes[type] : 0;
}

static float from_bf16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static uint16_t to_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  return value != value ? 0x7fc0 : (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

#define ITSELF(x) (x)
#define REDUCE(type, wide, load, store) \
  for (size_t i = 0; i < elements; i++) { \
    wide total = load(((const type *)comm->shared->slots[0])[i]); \
    for (int r = 1; r < comm->ranks; r++) { \
      wide next = load(((const type *)comm->shared->slots[r])[i]); \
      total = op == PROD ? total * next : op == MAX ? (next > total ? next : total) : op == MIN ? (next < total ? next : total) : total + next; \
    } \
    ((type *)target)[i] = store(op == AVG ? total / comm->ranks : total); \
  } \
  break

static void reduce_slots(communicator *comm, void *target, size_t elements, data_type type, reduce_op op) {
  switch (type) {
  case INT8: REDUCE(int8_t, int8_t, ITSELF, ITSELF);
  case UINT8: REDUCE(uint8_t, uint8_t, ITSELF, ITSELF);
  case INT32: REDUCE(int32_t, int32_t, ITSELF, ITSELF);
  case UINT32: REDUCE(uint32_t, uint32_t, ITSELF, ITSELF);
  case INT64: REDUCE(int64_t, int64_t, ITSELF, ITSELF);
  case UINT64: REDUCE(uint64_t, uint64_t, ITSELF, ITSELF);
  case FLOAT16: REDUCE(_Float16, float, ITSELF, ITSELF);
  case FLOAT32: REDUCE(float, float, ITSELF, ITSELF);
  case FLOAT64: REDUCE(double, double, ITSELF, ITSELF);
  case BFLOAT16: REDUCE(uint16_t, float, from_bf16, to_bf16);
  }
}

/* The work itself. `root` below 0: for all. */

typedef enum { OP_REDUCE, OP_BROADCAST, OP_GATHER, OP_SEND, OP_RECV } kind;
typedef struct { kind kind; communicator *comm; const char *send; char *recv; size_t elements, done; data_type type; reduce_op op; int root; } job;

static result collective(job *job) {
  communicator *comm = job->comm;
  size_t width = size_of(job->type), per_turn = CHUNK / width;
  for (size_t at = 0; at < job->elements; at += per_turn) {
    size_t elements = job->elements - at < per_turn ? job->elements - at : per_turn, bytes = elements * width;
    int is_root = job->root < 0 || job->root == comm->rank;
    result met;
    if (job->kind != OP_BROADCAST || is_root) memcpy(comm->shared->slots[comm->rank], job->send + at * width, bytes);
    if ((met = barrier(comm))) return met;
    if (job->kind == OP_REDUCE && is_root) reduce_slots(comm, job->recv + at * width, elements, job->type, job->op);
    if (job->kind == OP_BROADCAST) memcpy(job->recv + at * width, comm->shared->slots[job->root], bytes);
    if (job->kind == OP_GATHER)
      for (int r = 0; r < comm->ranks; r++) memcpy(job->recv + (r * job->elements + at) * width, comm->shared->slots[r], bytes);
    if ((met = barrier(comm))) return met;
  }
  return SUCCESS;
}

static int progress(job *job) { /* of a send or receive; 1: something moved */
  communicator *comm = job->comm;
  size_t bytes = job->elements * size_of(job->type) - job->done;
  mailbox *box = job->kind == OP_SEND ? &comm->shared->boxes[comm->rank][job->root] : &comm->shared->boxes[job->root][comm->rank];
  uint64_t written = atomic_load(&box->written), read = atomic_load(&box->read);
  size_t place = (job->kind == OP_SEND ? written : read) % CHUNK;
  size_t possible = job->kind == OP_SEND ? CHUNK - (written - read) : written - read;
  if (possible > CHUNK - place) possible = CHUNK - place;
  if (possible > bytes) possible = bytes;
  if (!possible) return 0;
  if (job->kind == OP_SEND) {
    memcpy(box->data + place, job->send + job->done, possible);
    atomic_store(&box->written, written + possible);
  } else {
    memcpy(job->recv + job->done, box->data + place, possible);
    atomic_store(&box->read, read + possible);
  }
  job->done += possible;
  return 1;
}

enum { JOBS = 1024 };
static _Thread_local job jobs[JOBS];
static _Thread_local int queued, depth;

static int comes_first(int i) { /* between two ranks, what was queued first moves first */
  for (int j = 0; j < i; j++)
    if (jobs[j].kind == jobs[i].kind && jobs[j].comm == jobs[i].comm && jobs[j].root == jobs[i].root &&
        jobs[j].done < jobs[j].elements * size_of(jobs[j].type))
      return 0;
  return 1;
}

static result run(void) {
  int total = queued;
  queued = 0;
  for (int i = 0; i < total; i++)
    if (jobs[i].kind < OP_SEND) {
      result met = collective(&jobs[i]);
      if (met) return met;
    }
  unsigned turns = 0;
  for (int left = 1; left;) {
    int moved = 0;
    communicator *waiting = NULL;
    left = 0;
    for (int i = 0; i < total; i++) {
      if (jobs[i].kind < OP_SEND || jobs[i].done == jobs[i].elements * size_of(jobs[i].type)) continue;
      left = 1;
      waiting = jobs[i].comm;
      if (comes_first(i)) moved |= progress(&jobs[i]);
    }
    if (moved) turns = 0;
    else if (left && !patience(&turns, waiting)) return REMOTE_ERROR;
  }
  return SUCCESS;
}

static result submit(job new, stream *on) {
  if (!on || on->magic != MAGIC || !size_of(new.type) || new.root >= new.comm->ranks) return INVALID_ARGUMENT;
  if (queued == JOBS) return INVALID_USAGE;
  jobs[queued++] = new;
  return depth ? SUCCESS : run();
}

/* The interface. */

result flagcxGetVersion(int *version) {
  const char *told = getenv("FLAGCX_STAND_IN_VERSION");
  *version = told ? atoi(told) : 10000;
  return SUCCESS;
}

const char *flagcxGetErrorString(result code) { (void)code; return "Not implemented."; }
const char *flagcxGetLastError(communicator *comm) { return comm ? comm->error : "Undefined: flagcxComm is not fully initialized."; }

static result make_unique_id(unique_id *id) {
  static int made;
  ENTER("flagcxGetUniqueId", 0, 0);
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/dev/shm/flagcx-stand-in-%d-%d", (int)getpid(), ++made);
  return SUCCESS;
}

#ifdef BEFORE_0_13
result flagcxGetUniqueId(unique_id **id) {
  if (!*id) *id = calloc(1, sizeof **id);
  return make_unique_id(*id);
}
#else
result flagcxGetUniqueId(unique_id *id) { return make_unique_id(id); }
#endif

result flagcxCommInitRank(communicator **comm, int ranks, unique_id *id, int rank) {
  ENTER("flagcxCommInitRank", 0, rank);
  if (ranks > RANKS) return INVALID_ARGUMENT;
  communicator *new = calloc(1, sizeof *new);
  new->rank = rank;
  new->ranks = ranks;
  snprintf(new->name, sizeof new->name, "%.63s", id->internal);
  int file = open(new->name, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(meeting))) return INTERNAL_ERROR;
  new->shared = mmap(NULL, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (new->shared == MAP_FAILED) return INTERNAL_ERROR;
  new->shared->pids[rank] = getpid();
  result met = barrier(new);
  if (rank == 0 || met) unlink(new->name);
  *comm = new;
  return met;
}

static result leave(communicator *comm) {
  comm->shared->closed[comm->rank] = 1;
  munmap(comm->shared, sizeof(meeting));
  free(comm);
  return SUCCESS;
}

result flagcxCommDestroy(communicator *comm) { ENTER("flagcxCommDestroy", 0, comm->rank); return leave(comm); }
result flagcxCommAbort(communicator *comm) { ENTER("flagcxCommAbort", 0, comm->rank); return leave(comm); }

result flagcxCommGetAsyncError(communicator *comm, int *error) {
  *error = lost_peer(comm) ? REMOTE_ERROR : SUCCESS;
  return SUCCESS;
}

result flagcxGroupStart(communicator *comm) { ENTER("flagcxGroupStart", 0, comm->rank); depth++; return SUCCESS; }

result flagcxGroupEnd(communicator *comm) {
  ENTER("flagcxGroupEnd", 0, comm->rank);
  if (!depth) return INVALID_USAGE;
  return --depth ? SUCCESS : run();
}

result flagcxAllReduce(const void *send, void *recv, size_t elements, data_type type, reduce_op op, communicator *comm, stream *on) {
  ENTER("flagcxAllReduce", elements, comm->rank);
  return submit((job){OP_REDUCE, comm, send, recv, elements, 0, type, op, -1}, on);
}

result flagcxReduce(const void *send, void *recv, size_t elements, data_type type, reduce_op op, int root, communicator *comm, stream *on) {
  ENTER("flagcxReduce", elements, comm->rank);
  return submit((job){OP_REDUCE, comm, send, recv, elements, 0, type, op, root}, on);
}

result flagcxBroadcast(const void *send, void *recv, size_t elements, data_type type, int root, communicator *comm, stream *on) {
  ENTER("flagcxBroadcast", elements, comm->rank);
  return submit((job){OP_BROADCAST, comm, send, recv, elements, 0, type, SUM, root}, on);
}

#ifndef WITHOUT_ALL_GATHER
result flagcxAllGather(const void *send, void *recv, size_t elements, data_type type, communicator *comm, stream *on) {
  ENTER("flagcxAllGather", elements, comm->rank);
  return submit((job){OP_GATHER, comm, send, recv, elements, 0, type, SUM, -1}, on);
}
#endif

result flagcxReduceScatter(const void *send, void *recv, size_t elements, data_type type, reduce_op op, communicator *comm, stream *on) {
  ENTER("flagcxReduceScatter", elements, comm->rank);
  result met = SUCCESS;
  for (int r = 0; r < comm->ranks && !met; r++)
    met = submit((job){OP_REDUCE, comm, (const char *)send + r * elements * size_of(type), recv, elements, 0, type, op, r}, on);
  return met;
}

result flagcxSend(const void *send, size_t elements, data_type type, int peer, communicator *comm, stream *on) {
  ENTER("flagcxSend", elements, comm->rank);
  return submit((job){OP_SEND, comm, send, NULL, elements, 0, type, SUM, peer}, on);
}

result flagcxRecv(void *recv, size_t elements, data_type type, int peer, communicator *comm, stream *on) {
  ENTER("flagcxRecv", elements, comm->rank);
  return submit((job){OP_RECV, comm, NULL, recv, elements, 0, type, SUM, peer}, on);
}

result flagcxAlltoAll(const void *send, void *recv, size_t elements, data_type type, communicator *comm, stream *on) {
  ENTER("flagcxAlltoAll", elements, comm->rank);
  result met = SUCCESS;
  depth++;
  for (int r = 0; r < comm->ranks && !met; r++) {
    size_t at = r * elements * size_of(type);
    met = submit((job){OP_SEND, comm, (const char *)send + at, NULL, elements, 0, type, SUM, r}, on);
    if (!met) met = submit((job){OP_RECV, comm, NULL, (char *)recv + at, elements, 0, type, SUM, r}, on);
  }
  depth--;
  return met ? met : depth ? SUCCESS : run();
}

/* The device's functions, in the header's order; of these only the stream handles have something behind them. */

static result stream_copy(stream **new, void *old) {
  ENTER("streamCopy", 0, -1);
  *new = calloc(1, sizeof **new);
  **new = (stream){MAGIC, old};
  return SUCCESS;
}

static result stream_free(stream *handle) { free(handle); return SUCCESS; }

static result not_here(void) { fprintf(stderr, "the stand-in for libflagcx has no such device function\n"); abort(); }

typedef struct {
  void *deviceSynchronize, *deviceMemcpy, *deviceMemset, *deviceMalloc, *deviceFree, *setDevice, *getDevice, *getDeviceCount, *getVendor,
      *hostGetDevicePointer, *streamCreate, *streamDestroy, *streamCopy, *streamFree, *streamSynchronize, *streamQuery, *streamWaitEvent,
      *eventCreate, *eventDestroy, *eventRecord, *eventSynchronize, *eventQuery,
#ifndef BEFORE_0_13
      *eventElapsedTime,
#endif
      *ipcMemHandleCreate, *ipcMemHandleGet, *ipcMemHandleOpen, *ipcMemHandleClose, *ipcMemHandleFree;
} device_handle;

static device_handle *make_device_handle(void) {
  void **table = calloc(1, sizeof(device_handle));
  for (size_t i = 0; i < sizeof(device_handle) / sizeof(void *); i++) table[i] = (void *)not_here;
  device_handle *handle = (device_handle *)table;
  handle->streamCopy = (void *)stream_copy;
  handle->streamFree = (void *)stream_free;
  return handle;
}

#ifdef BEFORE_0_13
typedef struct { unique_id *id; communicator *comm; device_handle *device; } handler_group;
result flagcxHandleInit(handler_group **group) {
  *group = calloc(1, sizeof **group);
  (*group)->device = make_device_handle();
  return SUCCESS;
}
#else
result flagcxDeviceHandleInit(device_handle **handle) { *handle = make_device_handle(); return SUCCESS; }
#endif
