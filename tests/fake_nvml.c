/* The calls of libnvidia-ml.so.1 that rtshpc makes, answered without a GPU; the real nvidia-ml-py loads it. Its driver's
   version begins with "fake", by which records know it. Two GPUs, GPU-aaaa-1 and GPU-bbbb-2; with FAKE_SLICES=N the second
   is in MIG mode and has N of the slices MIG-cccc-3 and MIG-dddd-4. Of device n, n GiB are used before the first
   reading, and 1 MiB more after each. Built with -DOLD it is a driver that has no memory v2 and no processes v3. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, LOST = 15 };
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned gpu, memory; } Utilisation;

static const char *NAMES[] = {"", "GPU-aaaa-1", "GPU-bbbb-2", "MIG-cccc-3", "MIG-dddd-4"};
static int readings = 0, energies = 0, utilisations = 0;

static int number(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
static int lost(void) { return getenv("FAKE_LOST_AFTER") && readings >= number("FAKE_LOST_AFTER", 0); }
static int known(long handle) { return handle <= 2 || handle - 2 <= number("FAKE_SLICES", 0); }

int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_NO_DRIVER") ? NO_DRIVER : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    return code == LOST ? "GPU is lost" : code == NO_DRIVER ? "Driver Not Loaded"
         : code == NOT_SUPPORTED ? "Not Supported" : "Not Found";
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) { strncpy(version, "fake 1.0", size); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (long n = 1; n <= 4; n++)
        if (known(n) && !strcmp(uuid, NAMES[n])) { *handle = (void *)n; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) { strncpy(uuid, NAMES[(long)handle], size); return OK; }
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { strncpy(name, "Fake GPU", size); return OK; }
int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *later) {
    if ((long)handle != 2) return NOT_SUPPORTED;
    *now = *later = number("FAKE_SLICES", 0) > 0;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { *count = (long)handle == 2 ? 7 : 0; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *gpu, unsigned index, void **handle) {
    if ((int)index >= number("FAKE_SLICES", 0)) return NOT_FOUND;
    *handle = (void *)(long)(index + 3);
    return OK;
}
int nvmlDeviceGetUtilizationRates(void *handle, Utilisation *rates) {
    if ((long)handle > 2) return NOT_SUPPORTED;
    rates->gpu = lost() ? 0 : utilisations++ % 2 ? 60 : 40;
    return lost() ? LOST : OK;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    if (getenv("FAKE_NO_ENERGY")) return NOT_SUPPORTED;
    *millijoules = 5000000 + (getenv("FAKE_ENERGY_STILL") ? 0 : 1500 * energies);
    if (energies++ >= number("FAKE_ENERGY_RESET_AT", 1 << 30)) *millijoules = 1500;
    return lost() ? LOST : OK;
}
static int processes(void *handle, unsigned *count, Process *listed) {
    if (*count < 2) { *count = 2; return TOO_SMALL; }
    *count = 2;
    listed[0].pid = 1;
    listed[0].used = 77ull << 20;
    listed[1].pid = number("FAKE_PID", getpid());
    listed[1].used = getenv("FAKE_NO_PROCESS_MEMORY") ? ~0ull : 300ull << 20;
    return lost() ? LOST : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, Process *listed) {
    return processes(handle, count, listed);
}
#ifndef OLD
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *listed) {
    return processes(handle, count, listed);
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory *memory) {
    if (lost()) return LOST;
    memory->total = 80ull << 30;
    memory->reserved = 500ull << 20;
    memory->used = ((unsigned long long)(long)handle << 30) + ((unsigned long long)readings++ << 20);
    memory->free = memory->total - memory->reserved - memory->used;
    return OK;
}
#endif
