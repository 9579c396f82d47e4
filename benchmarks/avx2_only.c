// Preloaded, makes a process take its CPU for one that has AVX2 and nothing later:
//
//     cc -O2 -shared -fPIC benchmarks/avx2_only.c -o avx2_only.so
//     LD_PRELOAD=./avx2_only.so python benchmarks/grids.py
//
// A variable each tells torch and pymtl what to use; nothing tells ONNX Runtime and OpenVINO. Here the instruction
// CPUID faults, and the handler of the fault answers without the features of AVX-512, AVX-VNNI and AMX. Linux has to
// know how to make it fault on this CPU: /proc/cpuinfo says cpuid_fault then. What asked before, as the C library does
// for its memcpy, keeps what it chose.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

// Of leaf 7 (Intel's manual, volume 2, CPUID), registers of subleaves 0 and 1.
static const unsigned kAvx512InB = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const unsigned kAvx512InC = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
static const unsigned kAvx512AndAmxInD = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
static const unsigned kVnniAndBfloat16InA = BIT(4) | BIT(5) | BIT(21) | BIT(23);
static const unsigned kVnniAndAvx10InD = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);
static const unsigned kState = BIT(5) | BIT(6) | BIT(7) | BIT(17) | BIT(18);  // of leaf 13: what XSAVE keeps of them

static void let_cpuid_pass(int passes) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, passes); }

static void answer(int signal_number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* const registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* const instruction = (const unsigned char*)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {
    signal(signal_number, SIG_DFL);  // another fault: it comes again, and ends the process
    return;
  }
  const unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  let_cpuid_pass(1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  let_cpuid_pass(0);
  if (leaf == 7 && subleaf == 0) {
    b &= ~kAvx512InB;
    c &= ~kAvx512InC;
    d &= ~kAvx512AndAmxInD;
  } else if (leaf == 7 && subleaf == 1) {
    a &= ~kVnniAndBfloat16InA;
    d &= ~kVnniAndAvx10InD;
  } else if (leaf == 13 && subleaf == 0) {
    a &= ~kState;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
    fprintf(stderr, "avx2_only: this CPU's features cannot be hidden: %s\n", strerror(errno));
  }
}
