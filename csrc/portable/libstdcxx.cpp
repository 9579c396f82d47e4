// The libraries load with the libstdc++ of GCC 7, as torch does, though they are compiled with a newer one: what that
// has added is made here of what there was before. The functions go by their mangled names, as the linker sees them:
// the calls of each are led to the one called __wrap_... (see CMakeLists.txt).
#include <exception>
#include <ios>
#include <new>
#include <string>

extern "C" {

// std::stringstream(mode) and std::ostringstream(mode): those without arguments came with GCC 9.
void stringstream_of(void* self, std::ios_base::openmode mode) __asm__(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1ESt13_Ios_Openmode");
void ostringstream_of(void* self, std::ios_base::openmode mode) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1ESt13_Ios_Openmode");

void __wrap__ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  stringstream_of(self, std::ios_base::in | std::ios_base::out);
}
void __wrap__ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  ostringstream_of(self, std::ios_base::out);
}

// std::stringbuf::str() const: C++20 has it for temporaries and for others.
std::string str_of(const void* self) __asm__("_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");

std::string __wrap__ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv(const void* self) {
  return str_of(self);
}
std::string __wrap__ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv(void* self) { return str_of(self); }

// std::__throw_bad_array_new_length(), of GCC 11.
[[noreturn]] void __wrap__ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }

// What GCC 14 calls where an exception leaves a function that throws none.
void* exception_begins(void* exception) __asm__("__cxa_begin_catch");

[[noreturn]] void __wrap___cxa_call_terminate(void* exception) {
  if (exception != nullptr) exception_begins(exception);
  std::terminate();
}

// std::exception_ptr counts references by two functions since GCC 11, before within its copies and their end.
void exception_ptr_copy(void* self, const void* other) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void exception_ptr_end(void* self) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");

void __wrap__ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void* self) {
  void* copy;  // counts as long as nobody ends it
  exception_ptr_copy(&copy, self);
}
void __wrap__ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void* self) { exception_ptr_end(self); }

}  // extern "C"
