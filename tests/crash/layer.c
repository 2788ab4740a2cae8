/* Preloaded into a process (LD_PRELOAD), this counts every operation that changes a file below a folder, writes each
 * to a log, and at operation N lets something happen: a kill, a signal, a full or read-only disk, an I/O error, a jump
 * of the clock. Unarmed it only passes on. Operations of all threads are in one order.
 *
 * The log: a line "NUMBER KIND LENGTH OFFSET LENGTH_OF_PATH LENGTH_OF_SECOND\n", the paths, and what was written.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, KILL, SIGNAL, ERROR, CLOCK };

struct plan {
    char root[4096];
    int armed, fault, value, forever; /* value: a signal, an errno, or the seconds that the clock jumps */
    long at, count, struck;           /* operations are counted from 1 */
    int log;
};
static struct plan *plan;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;

struct plan *crash_plan(void) { return plan; }

__attribute__((constructor)) static void begin(void)
{
    plan = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (plan == MAP_FAILED) abort();
    plan->log = -1;
}

static int below(const char *path)
{
    size_t n = strlen(plan->root);
    return !strncmp(path, plan->root, n) && (path[n] == '/' || !path[n]);
}

/* Absolute path of what (folder, path) or a descriptor names; 0 where it is not below the root. */
static int place(char out[8192], int folder, const char *path)
{
    if (!plan || !plan->armed) return 0;
    char link[64];
    ssize_t n = 0;
    if (path == NULL || path[0] != '/') {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        n = syscall(SYS_readlinkat, AT_FDCWD, link, out, 4096);
        if (n < 0) return 0;
        out[n] = 0;
    }
    if (path != NULL) {
        while (path[0] == '.' && path[1] == '/') path += 2;
        snprintf(out + n, 8192 - n, "%s%s", n ? "/" : "", path);
    }
    return below(out);
}

static int has_room_to_fail(int error, const char *kind) /* what does not take room cannot lack it */
{
    return !(error == ENOSPC && (!strcmp(kind, "unlink") || !strcmp(kind, "rmdir") || !strcmp(kind, "chmod")));
}

/* Enters an operation: counts it, and does to it what is planned. 0: go on. Else errno, with the lock given back. */
static int enter(const char *kind, int *half)
{
    pthread_mutex_lock(&order);
    long now = ++plan->count;
    if (plan->fault == NONE || now < plan->at || (now > plan->at && !plan->forever)) return 0;
    if (plan->fault == KILL) {
        if (half && !*half) { *half = 1; return 0; }
        plan->struck = now;
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;) pause();
    }
    if (plan->fault == ERROR && !has_room_to_fail(plan->value, kind)) {
        if (now == plan->at && !plan->forever) plan->at++;
        return 0;
    }
    if (plan->fault == ERROR && plan->value == ENOSPC && half && now == plan->at && plan->struck == 0) {
        *half = 1; /* a disk that fills up takes a part first */
        plan->struck = now;
        if (!plan->forever) plan->at++;
        return 0;
    }
    plan->struck = plan->struck ? plan->struck : now;
    if (plan->fault == SIGNAL) {
        plan->fault = NONE;
        syscall(SYS_kill, getpid(), plan->value);
    } else if (plan->fault == ERROR) {
        pthread_mutex_unlock(&order);
        return plan->value;
    }
    return 0;
}

static void leave(long result, const char *kind, const char *path, const char *second, const void *data, long length,
                  long offset)
{
    int saved = errno;
    if (result >= 0 && plan->log >= 0) {
        char head[160];
        size_t a = strlen(path), b = second ? strlen(second) : 0;
        int n = snprintf(head, sizeof head, "%ld %s %ld %ld %zu %zu\n", plan->count, kind, length, offset, a, b);
        struct iovec parts[4] = {{head, n}, {(void *)path, a}, {(void *)second, b}, {(void *)data, data ? length : 0}};
        syscall(SYS_writev, plan->log, parts, 4);
    }
    pthread_mutex_unlock(&order);
    errno = saved;
}

#define FAIL(code) do { errno = (code); return -1; } while (0)

static long change(const char *kind, const char *path, const char *second, long length, long number, long a, long b,
                   long c, long d, long e)
{
    int error = enter(kind, NULL);
    if (error) FAIL(error);
    long result = syscall(number, a, b, c, d, e);
    leave(result, kind, path, second, NULL, length, 0);
    return result;
}

/* Files that are opened */
static int opened(int folder, const char *path, int flags, mode_t mode)
{
    char where[8192];
    int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (!changes || (flags & O_TMPFILE) == O_TMPFILE || !place(where, folder, path))
        return syscall(SYS_openat, folder, path, flags, mode);
    int error = enter("open", NULL);
    if (error) FAIL(error);
    int result = syscall(SYS_openat, folder, path, flags, mode);
    leave(result, "open", where, NULL, NULL, !!(flags & O_TRUNC), 0);
    return result;
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }
int open(const char *p, int flags, ...) { MODE return opened(AT_FDCWD, p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE return opened(AT_FDCWD, p, flags, mode); }
int openat(int f, const char *p, int flags, ...) { MODE return opened(f, p, flags, mode); }
int openat64(int f, const char *p, int flags, ...) { MODE return opened(f, p, flags, mode); }
int __open_2(const char *p, int flags) { return opened(AT_FDCWD, p, flags, 0); }
int __open64_2(const char *p, int flags) { return opened(AT_FDCWD, p, flags, 0); }
int __openat_2(int f, const char *p, int flags) { return opened(f, p, flags, 0); }
int __openat64_2(int f, const char *p, int flags) { return opened(f, p, flags, 0); }
int creat(const char *p, mode_t mode) { return opened(AT_FDCWD, p, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *p, mode_t mode) { return opened(AT_FDCWD, p, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* Bytes that are written; offset -1: at the descriptor's place */
static ssize_t written(int file, const void *data, size_t length, off_t offset)
{
    char where[8192];
    if (!place(where, file, NULL))
        return offset < 0 ? syscall(SYS_write, file, data, length) : syscall(SYS_pwrite64, file, data, length, offset);
    int half = 0, error = enter("write", &half);
    if (error) FAIL(error);
    if (half) length = length / 2 + (length == 1 && plan->fault == ERROR);
    ssize_t result = offset < 0 ? syscall(SYS_write, file, data, length)
                                : syscall(SYS_pwrite64, file, data, length, offset);
    off_t at = offset < 0 ? syscall(SYS_lseek, file, 0, SEEK_CUR) - result : offset;
    leave(result, "write", where, NULL, data, result, at);
    if (half && plan->fault == KILL) enter("write", &half);
    return result;
}
ssize_t write(int f, const void *d, size_t n) { return written(f, d, n, -1); }
ssize_t pwrite(int f, const void *d, size_t n, off_t o) { return written(f, d, n, o); }
ssize_t pwrite64(int f, const void *d, size_t n, off64_t o) { return written(f, d, n, o); }
ssize_t writev(int f, const struct iovec *parts, int count)
{
    char where[8192];
    if (!place(where, f, NULL)) return syscall(SYS_writev, f, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) { /* one operation for each part, as a disk may stop between them */
        ssize_t n = parts[i].iov_len ? written(f, parts[i].iov_base, parts[i].iov_len, -1) : 0;
        if (n < 0) return total ? total : -1;
        total += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return total;
}
/* Copies inside the kernel: callers fall back to reading and writing. */
ssize_t copy_file_range(int a, off64_t *b, int c, off64_t *d, size_t n, unsigned flags)
{
    char where[8192];
    if (place(where, c, NULL)) FAIL(EXDEV);
    return syscall(SYS_copy_file_range, a, b, c, d, n, flags);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t n)
{
    char where[8192];
    if (place(where, to, NULL)) FAIL(EINVAL);
    return syscall(SYS_sendfile, to, from, offset, n);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t n) { return sendfile64(to, from, offset, n); }

/* Names, sizes, flushing */
#define ONE(kind, folder, p, length, ...) \
    char where[8192]; if (!place(where, folder, p)) return syscall(__VA_ARGS__); \
    return change(kind, where, NULL, length, __VA_ARGS__)

int renameat2(int f, const char *a, int g, const char *b, unsigned n)
{
    char one[8192], two[8192];
    int x = place(one, f, a), y = place(two, g, b);
    if (!x && !y) return syscall(SYS_renameat2, f, a, g, b, n);
    return change("rename", one, two, 0, SYS_renameat2, f, (long)a, g, (long)b, n);
}
int renameat(int f, const char *a, int g, const char *b) { return renameat2(f, a, g, b, 0); }
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }
int linkat(int f, const char *a, int g, const char *b, int flags)
{
    char one[8192], two[8192];
    int x = place(one, f, a), y = place(two, g, b);
    if (!x && !y) return syscall(SYS_linkat, f, a, g, b, flags);
    return change("link", one, two, 0, SYS_linkat, f, (long)a, g, (long)b, flags);
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *target, int f, const char *p)
{
    char where[8192];
    if (!place(where, f, p)) return syscall(SYS_symlinkat, target, f, p);
    return change("symlink", where, target, 0, SYS_symlinkat, (long)target, f, (long)p, 0, 0);
}
int symlink(const char *target, const char *p) { return symlinkat(target, AT_FDCWD, p); }
int unlinkat(int f, const char *p, int flags)
{
    ONE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", f, p, 0, SYS_unlinkat, f, (long)p, flags, 0, 0);
}
int unlink(const char *p) { return unlinkat(AT_FDCWD, p, 0); }
int rmdir(const char *p) { return unlinkat(AT_FDCWD, p, AT_REMOVEDIR); }
int mkdirat(int f, const char *p, mode_t mode) { ONE("mkdir", f, p, 0, SYS_mkdirat, f, (long)p, mode, 0, 0); }
int mkdir(const char *p, mode_t mode) { return mkdirat(AT_FDCWD, p, mode); }
int fchmodat(int f, const char *p, mode_t mode, int flags)
{
    (void)flags;
    ONE("chmod", f, p, 0, SYS_fchmodat, f, (long)p, mode, 0, 0);
}
int chmod(const char *p, mode_t mode) { return fchmodat(AT_FDCWD, p, mode, 0); }
int fchmod(int f, mode_t mode) { ONE("chmod", f, NULL, 0, SYS_fchmod, f, mode, 0, 0, 0); }
int truncate64(const char *p, off64_t n) { ONE("truncate", AT_FDCWD, p, n, SYS_truncate, (long)p, n, 0, 0, 0); }
int truncate(const char *p, off_t n) { return truncate64(p, n); }
int ftruncate64(int f, off64_t n) { ONE("truncate", f, NULL, n, SYS_ftruncate, f, n, 0, 0, 0); }
int ftruncate(int f, off_t n) { return ftruncate64(f, n); }
int fsync(int f) { ONE("fsync", f, NULL, 0, SYS_fsync, f, 0, 0, 0, 0); }
int fdatasync(int f) { ONE("fsync", f, NULL, 0, SYS_fdatasync, f, 0, 0, 0, 0); }

/* The clock on the wall; the steady one is left alone */
static long jumped(void) { return plan && plan->armed && plan->fault == CLOCK && plan->struck ? plan->value : 0; }
int clock_gettime(clockid_t which, struct timespec *t)
{
    int result = syscall(SYS_clock_gettime, which, t);
    if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) t->tv_sec += jumped();
    return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
