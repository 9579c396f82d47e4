// The libraries load on glibc 2.28 though they are built with a newer one: what that has changed or added is called
// under its older name, or is here. CMakeLists.txt has the linker lead all calls of these functions to those called
// __wrap_..., and finds their names in this file.
#include <sys/random.h>
#include <sys/stat.h>

#include <cstdint>

// Goes on to the function of that name and an older version, as if its caller had called it.
#if defined(__x86_64__)
#define PYMTL_OLDEST "GLIBC_2.2.5"
#define PYMTL_JUMP "jmp"
#define PYMTL_PLT "@PLT"
#define PYMTL_STAT_VERSION 1
#else
#define PYMTL_OLDEST "GLIBC_2.17"
#define PYMTL_JUMP "b"
#define PYMTL_PLT ""
#define PYMTL_STAT_VERSION 0
#endif
#define PYMTL_OLD_OF(name, version)                                                                            \
  __asm__(".pushsection .text.__wrap_" #name                                                                   \
          ",\"ax\",%progbits\n.p2align 4\n"                                                                    \
          ".globl __wrap_" #name "\n.hidden __wrap_" #name "\n.type __wrap_" #name ",%function\n__wrap_" #name \
          ":\n" PYMTL_JUMP " old_" #name PYMTL_PLT "\n.size __wrap_" #name ",.-__wrap_" #name                  \
          "\n.popsection\n"                                                                                    \
          ".symver old_" #name "," #name "@" version)
#define PYMTL_OLD(name) PYMTL_OLD_OF(name, PYMTL_OLDEST)
#if defined(__x86_64__)
#define PYMTL_OLD_SINCE(name, version) PYMTL_OLD_OF(name, version)
#else
#define PYMTL_OLD_SINCE(name, version) PYMTL_OLD_OF(name, PYMTL_OLDEST)  // all that is older is of 2.17 there
#endif

// glibc 2.29 has new ones beside the old, and the linker takes those.
PYMTL_OLD(exp);
PYMTL_OLD(log);

// In libraries of their own before 2.34.
PYMTL_OLD(__pthread_key_create);
PYMTL_OLD(dlclose);
PYMTL_OLD(dlerror);
PYMTL_OLD_SINCE(dlmopen, "GLIBC_2.3.4");
PYMTL_OLD(dlopen);
PYMTL_OLD(dlsym);
PYMTL_OLD(dlvsym);
PYMTL_OLD(pthread_condattr_setpshared);
PYMTL_OLD(pthread_create);
PYMTL_OLD(pthread_detach);
PYMTL_OLD(pthread_getspecific);
PYMTL_OLD(pthread_join);
PYMTL_OLD(pthread_key_create);
PYMTL_OLD(pthread_key_delete);
PYMTL_OLD(pthread_kill);
PYMTL_OLD(pthread_mutex_trylock);
PYMTL_OLD(pthread_mutexattr_destroy);
PYMTL_OLD(pthread_mutexattr_init);
PYMTL_OLD(pthread_mutexattr_setpshared);
PYMTL_OLD(pthread_mutexattr_settype);
PYMTL_OLD(pthread_once);
PYMTL_OLD(pthread_rwlock_destroy);
PYMTL_OLD(pthread_rwlock_init);
PYMTL_OLD(pthread_rwlock_rdlock);
PYMTL_OLD(pthread_rwlock_timedrdlock);
PYMTL_OLD(pthread_rwlock_timedwrlock);
PYMTL_OLD(pthread_rwlock_tryrdlock);
PYMTL_OLD(pthread_rwlock_trywrlock);
PYMTL_OLD(pthread_rwlock_unlock);
PYMTL_OLD(pthread_rwlock_wrlock);
PYMTL_OLD(pthread_rwlockattr_destroy);
PYMTL_OLD(pthread_rwlockattr_init);
PYMTL_OLD(pthread_rwlockattr_setpshared);
PYMTL_OLD_SINCE(pthread_setname_np, "GLIBC_2.12");
PYMTL_OLD(pthread_setspecific);
PYMTL_OLD(pthread_sigmask);
PYMTL_OLD(pthread_spin_destroy);
PYMTL_OLD(pthread_spin_init);
PYMTL_OLD(pthread_spin_lock);
PYMTL_OLD(pthread_spin_trylock);
PYMTL_OLD(pthread_spin_unlock);
PYMTL_OLD(sem_destroy);
PYMTL_OLD(sem_init);
PYMTL_OLD(sem_post);
PYMTL_OLD(sem_timedwait);
PYMTL_OLD(sem_trywait);
PYMTL_OLD(sem_wait);
PYMTL_OLD(shm_open);
PYMTL_OLD(shm_unlink);

extern "C" {

int __fxstat(int version, int file, struct stat* status);

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
