// The libraries load on glibc 2.28 though they are built with a newer one: what that has changed or added is called
// under its older name, or is here. CMakeLists.txt has the linker lead all calls of these functions to those called
// __wrap_...
#include <pthread.h>
#include <signal.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <cstdint>

#if defined(__x86_64__)
#define PYMTL_OLDEST "GLIBC_2.2.5"
#define PYMTL_STAT_VERSION 1
#else
#define PYMTL_OLDEST "GLIBC_2.17"
#define PYMTL_STAT_VERSION 0
#endif
#define PYMTL_OLD(name) __asm__(".symver old_" #name "," #name "@" PYMTL_OLDEST)

extern "C" {

PYMTL_OLD(exp);
PYMTL_OLD(log);
PYMTL_OLD(pthread_create);
PYMTL_OLD(pthread_detach);
PYMTL_OLD(pthread_join);
PYMTL_OLD(pthread_once);
PYMTL_OLD(pthread_sigmask);
PYMTL_OLD(__pthread_key_create);
__asm__(
    ".symver old_pthread_setname_np,pthread_setname_np@"
#if defined(__x86_64__)
    "GLIBC_2.12"
#else
    "GLIBC_2.17"
#endif
);

double old_exp(double x);
double old_log(double x);
int old_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument);
int old_pthread_detach(pthread_t thread);
int old_pthread_join(pthread_t thread, void** result);
int old_pthread_once(pthread_once_t* once, void (*call)());
int old_pthread_sigmask(int how, const sigset_t* set, sigset_t* before);
int old___pthread_key_create(pthread_key_t* key, void (*destroy)(void*));
int old_pthread_setname_np(pthread_t thread, const char* name);
int __fxstat(int version, int file, struct stat* status);

double __wrap_exp(double x) { return old_exp(x); }
double __wrap_log(double x) { return old_log(x); }
int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  return old_pthread_create(thread, attributes, start, argument);
}
int __wrap_pthread_detach(pthread_t thread) { return old_pthread_detach(thread); }
int __wrap_pthread_join(pthread_t thread, void** result) { return old_pthread_join(thread, result); }
int __wrap_pthread_once(pthread_once_t* once, void (*call)()) { return old_pthread_once(once, call); }
int __wrap_pthread_sigmask(int how, const sigset_t* set, sigset_t* before) {
  return old_pthread_sigmask(how, set, before);
}
int __wrap___pthread_key_create(pthread_key_t* key, void (*destroy)(void*)) {
  return old___pthread_key_create(key, destroy);
}
int __wrap_pthread_setname_np(pthread_t thread, const char* name) { return old_pthread_setname_np(thread, name); }
int __wrap_fstat(int file, struct stat* status) { return __fxstat(PYMTL_STAT_VERSION, file, status); }

// What libstdc++ asks of a glibc of 2.32 and of 2.36.
char __wrap___libc_single_threaded = 0;
uint32_t __wrap_arc4random() {
  uint32_t bits = 0;
  while (getrandom(&bits, sizeof bits, 0) != sizeof bits) {
  }
  return bits;
}

}  // extern "C"
