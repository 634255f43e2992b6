// --- rows that start anywhere: they go through shared memory, where they lie the same way across 16-byte borders as in
// global memory, so that whole packs come and go between the borders. `span` is what a warp's threads want together.

template <class U> DI U* alike(unsigned char* area, const U* span) {
  return reinterpret_cast<U*>(area + reinterpret_cast<unsigned long long>(span) % 16);
}

template <class U> DI void copy(U* __restrict__ to, const U* __restrict__ from, column_t length, int thread, int threads) {
  constexpr int EACH = 16 / sizeof(U);
  struct alignas(16) Border { U v[EACH]; };
  const column_t head = least<column_t>(length, (16 - reinterpret_cast<unsigned long long>(from) % 16) % 16 / sizeof(U));
  const column_t packs = (length - head) / EACH;
  if (thread < head) to[thread] = from[thread];
#pragma unroll 4
  for (column_t p = thread; p < packs; p += threads)
    *reinterpret_cast<Border*>(to + head + p * EACH) = *reinterpret_cast<const Border*>(from + head + p * EACH);
  const column_t tail = head + packs * EACH + thread;
  if (tail < length) to[tail] = from[tail];
}

template <int LANES, int PACKS, class U>
DI void load_staged(real (&v)[PACKS][WIDTH], const U* span, column_t length, column_t offset, column_t here, unsigned char* area) {
  U* at = alike(area, span);
  copy(at, span, length, threadIdx.x % 32, 32);
  __syncwarp();
  UNROLL for (int k = 0; k < PACKS; ++k) {
    UNROLL for (int i = 0; i < WIDTH; ++i) {
      const column_t e = k * LANES * WIDTH + i;
      v[k][i] = e < here ? to_real(at[offset + e]) : real(0);
    }
  }
  __syncwarp();
}

template <int LANES, int PACKS, class U>
DI void store_staged(U* span, const real (&v)[PACKS][WIDTH], column_t length, column_t offset, column_t here, unsigned char* area) {
  U* at = alike(area, span);
  UNROLL for (int k = 0; k < PACKS; ++k) {
    UNROLL for (int i = 0; i < WIDTH; ++i) {
      const column_t e = k * LANES * WIDTH + i;
      if (e < here) from_real(at[offset + e], v[k][i]);
    }
  }
  __syncwarp();
  copy(span, at, length, threadIdx.x % 32, 32);
  __syncwarp();
}

// rows with gaps between them, several to a warp
template <int LANES, int PACKS, int N, class U>
DI void load_each(real (&v)[PACKS][N], const U* row, column_t first, column_t columns) {
  UNROLL for (int k = 0; k < PACKS; ++k) {
    UNROLL for (int i = 0; i < N; ++i) {
      const column_t column = first + k * LANES * N + i;
      v[k][i] = column < columns ? to_real(row[column]) : real(0);
    }
  }
}

template <int LANES, int PACKS, int N, class U>
DI void store_each(U* row, const real (&v)[PACKS][N], column_t first, column_t columns) {
  UNROLL for (int k = 0; k < PACKS; ++k) {
    UNROLL for (int i = 0; i < N; ++i) {
      const column_t column = first + k * LANES * N + i;
      if (column < columns) from_real(row[column], v[k][i]);
    }
  }
}
