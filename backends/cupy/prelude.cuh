// What emitted kernels are made of. T is the arrays' dtype, real what is computed in, column_t a column's number.
#define DI __device__ __forceinline__
#define UNROLL _Pragma("unroll")
constexpr int WIDTH = 16 / sizeof(T);  // elements of T in one load or store

template <class U> struct alignas(16) Pack { U v[WIDTH]; };

template <class A> DI A least(A a, A b) { return b < a ? b : a; }
DI real maximum(real a, real b) { return a != a || a > b ? a : b; }  // NaN wins
DI real minimum(real a, real b) { return a != a || a < b ? a : b; }
DI long long maximum(long long a, long long b) { return a > b ? a : b; }
DI long long minimum(long long a, long long b) { return a < b ? a : b; }
DI real magnitude(real v) { return fabs(v); }
DI long long magnitude(long long v) { return v < 0 ? -v : v; }
DI long long whole(long long v) { return v; }
DI long long whole(unsigned long long v) { return v > 0x7fffffffffffffffull ? 0x7fffffffffffffffll : (long long)v; }
template <class I> DI long long whole(I v) { return v; }

// a / b for many a and one b, as a product; b is brought near 1 first, so that 1 / b neither overflows nor vanishes
struct Divisor {
  real scale, inverse;
  DI explicit Divisor(real b) {
    const real size = b < 0 ? -b : b;
    scale = size > real(HUGE_DIVISOR) ? real(1 / SHIFT) : size < real(1 / HUGE_DIVISOR) ? real(SHIFT) : real(1);
    inverse = real(1) / (b * scale);
  }
  DI real divide(real a) const { return a * scale * inverse; }
};

// --- reductions: of a thread's elements, of a group of lanes, of a row's chunks; always in this order

struct Max {
  static DI real none() { return -INF; }
  static DI real of(real a, real b) { return maximum(a, b); }
};
struct Sum {
  static DI real none() { return 0; }
  static DI real of(real a, real b) { return a + b; }
};

template <class Op> DI void clear(real (&v)[WIDTH]) {
  UNROLL for (int i = 0; i < WIDTH; ++i) v[i] = Op::none();
}

template <class Op, int LANES> DI real over_lanes(real v) {
  UNROLL for (int o = LANES / 2; o; o /= 2) v = Op::of(v, __shfl_xor_sync(0xffffffffu, v, o, LANES));
  return v;
}

template <class Op, int LANES> DI real over_group(real (&v)[WIDTH]) {
  UNROLL for (int n = WIDTH / 2; n; n /= 2) {
    UNROLL for (int i = 0; i < n; ++i) v[i] = Op::of(v[i], v[i + n]);
  }
  return over_lanes<Op, LANES>(v[0]);
}

template <class Op> DI real over_chunks(const real* parts, int chunks) {
  real v = Op::none();
  for (int c = threadIdx.x % 32; c < chunks; c += 32) v = Op::of(v, parts[c]);
  return over_lanes<Op, 32>(v);
}

// one value for all elements, such as the gradient of a row that does not count: asked once, not for every element
template <int PACKS> DI void fill(real (&v)[PACKS][WIDTH], real value) {
  UNROLL for (int k = 0; k < PACKS; ++k) {
    UNROLL for (int i = 0; i < WIDTH; ++i) v[k][i] = value;
  }
}

// --- a chunk of a row, in registers. `first` is this thread's first column; columns from `columns` on are not there.

// rows that start on 16-byte borders; WHOLE ones end there too
template <int LANES, bool WHOLE, int PACKS, class U>
DI void load(real (&v)[PACKS][WIDTH], const U* row, column_t first, column_t columns) {
  UNROLL for (int k = 0; k < PACKS; ++k) {
    const column_t column = first + k * LANES * WIDTH;
    Pack<U> p = {};
    if (column + WIDTH <= columns) {
      p = *reinterpret_cast<const Pack<U>*>(row + column);
    } else if (!WHOLE) {
      UNROLL for (int i = 0; i < WIDTH; ++i) if (column + i < columns) p.v[i] = row[column + i];
    }
    UNROLL for (int i = 0; i < WIDTH; ++i) v[k][i] = to_real(p.v[i]);
  }
}

template <int LANES, bool WHOLE, int PACKS, class U>
DI void store(U* row, const real (&v)[PACKS][WIDTH], column_t first, column_t columns) {
  UNROLL for (int k = 0; k < PACKS; ++k) {
    const column_t column = first + k * LANES * WIDTH;
    Pack<U> p;
    UNROLL for (int i = 0; i < WIDTH; ++i) from_real(p.v[i], v[k][i]);
    if (column + WIDTH <= columns) {
      *reinterpret_cast<Pack<U>*>(row + column) = p;
    } else if (!WHOLE) {
      UNROLL for (int i = 0; i < WIDTH; ++i) if (column + i < columns) row[column + i] = p.v[i];
    }
  }
}
