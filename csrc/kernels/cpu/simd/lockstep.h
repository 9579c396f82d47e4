// Vectors that go through the same operations side by side: each operation is done for all of them before the next
// one. A chain of dependent operations leaves most of a processor idle, and few look far enough ahead to find the next
// row's chain by themselves. Every vector's numbers are what they are alone.
#pragma once

#include "vector.h"

namespace pymtl {
namespace {

// How many updates of cells pay: as many as the registers hold the intermediate results of. Processors with AVX-512
// look far enough ahead. For NEON it was not measured, only seen in models of processors (llvm-mca): from a third less
// time to 7 % more; and a single sequence has three times as many sums under way.
#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(__ARM_NEON)
constexpr int kLockstep = 3;
#else
constexpr int kLockstep = 1;
#endif

template <typename V, int N>
struct Lockstep {
  V of[N];
};

// How many vectors an operand is made of; 0 of a plain one, which is the same for all of another operand's.
template <typename V>
constexpr int kMembers = 0;
template <typename V, int N>
constexpr int kMembers<Lockstep<V, N>> = N;

template <int J, typename V>
PYMTL_INLINE auto member(const V& value) {
  if constexpr (kMembers<V> > 0) {
    return value.of[J];
  } else {
    return value;
  }
}

template <typename Make, int... J>
PYMTL_INLINE auto lockstep_of(Make&& make, std::integer_sequence<int, J...>) {
  using V = decltype(make.template operator()<0>());
  return Lockstep<V, sizeof...(J)>{{make.template operator()<J>()...}};
}

// {make.operator()<0>(), make.operator()<1>(), ...}
template <int N, typename Make>
PYMTL_INLINE auto lockstep(Make&& make) {
  return lockstep_of(make, std::make_integer_sequence<int, N>{});
}

template <typename... Operands>
concept AnyLockstep = ((kMembers<Operands> > 0) || ...);

// operation(first operand, second operand, ...), member by member.
template <typename Operation, typename... Operands>
PYMTL_INLINE auto each(Operation&& operation, const Operands&... operands) {
  if constexpr (AnyLockstep<Operands...>) {
    constexpr int N = (kMembers<Operands> | ...);  // all that are not 0 are the same
    return lockstep<N>([&]<int J>() PYMTL_INLINE_LAMBDA { return operation(member<J>(operands)...); });
  } else {
    return operation(operands...);
  }
}

#define PYMTL_LOCKSTEP_OPERATOR(op)                                               \
  template <typename A, typename B>                                               \
    requires AnyLockstep<A, B>                                                    \
  PYMTL_INLINE auto operator op(const A& a, const B& b) {                         \
    return each([](auto x, auto y) PYMTL_INLINE_LAMBDA { return x op y; }, a, b); \
  }
PYMTL_LOCKSTEP_OPERATOR(+)
PYMTL_LOCKSTEP_OPERATOR(-)
PYMTL_LOCKSTEP_OPERATOR(*)
PYMTL_LOCKSTEP_OPERATOR(/)
PYMTL_LOCKSTEP_OPERATOR(|)
PYMTL_LOCKSTEP_OPERATOR(&)
PYMTL_LOCKSTEP_OPERATOR(<<)
PYMTL_LOCKSTEP_OPERATOR(>>)
PYMTL_LOCKSTEP_OPERATOR(>)
#undef PYMTL_LOCKSTEP_OPERATOR

template <typename V, int N>
PYMTL_INLINE auto operator-(const Lockstep<V, N>& x) {
  return each([](V one) PYMTL_INLINE_LAMBDA { return -one; }, x);
}

template <typename A, typename B, typename C>
  requires AnyLockstep<A, B, C>
PYMTL_INLINE auto fma(const A& a, const B& b, const C& c) {
  return each([](auto x, auto y, auto z) PYMTL_INLINE_LAMBDA { return fma(x, y, z); }, a, b, c);
}

template <typename A, typename B>
  requires AnyLockstep<A, B>
PYMTL_INLINE auto at_least(const A& x, const B& limit) {
  return each([](auto one, auto least) PYMTL_INLINE_LAMBDA { return at_least(one, least); }, x, limit);
}

template <typename A, typename B>
  requires AnyLockstep<A, B>
PYMTL_INLINE auto at_most(const A& x, const B& limit) {
  return each([](auto one, auto most) PYMTL_INLINE_LAMBDA { return at_most(one, most); }, x, limit);
}

template <typename T, typename Condition, typename A, typename B>
  requires AnyLockstep<Condition, A, B>
PYMTL_INLINE auto select(const Condition& condition, const A& yes, const B& no) {
  return each([](auto is, auto one, auto other) PYMTL_INLINE_LAMBDA { return select<T>(is, one, other); }, condition,
              yes, no);
}

// The bits of numbers as integers, and back.
template <typename T, typename V>
PYMTL_INLINE auto bits_of(const V& numbers) {
  return each([](auto one) PYMTL_INLINE_LAMBDA { return (IntVec<T>)one; }, numbers);
}

template <typename T, typename Integers>
PYMTL_INLINE auto from_bits(const Integers& bits) {
  return each([](auto one) PYMTL_INLINE_LAMBDA { return (Vec<T>)one; }, bits);
}

}  // namespace
}  // namespace pymtl
