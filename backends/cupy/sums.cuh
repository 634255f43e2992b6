// --- sums over the rows

// the sum over a block of 32 x WARPS threads, in every thread; `shared` holds one number per warp
template <int WARPS> DI double over_block(double v, unsigned char* shared) {
  double* memory = reinterpret_cast<double*>(shared);
  UNROLL for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < WARPS ? memory[threadIdx.x % 32] : 0;
  UNROLL for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  __syncthreads();
  return v;
}

// 32 x DOWN threads hold N sums each, of adjacent columns: add them up over DOWN, and give column c to `write(c, sum)`
template <int DOWN, int N, class Write> DI void down(const real (&v)[N], real* memory, Write write) {
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  UNROLL for (int i = 0; i < N; ++i) memory[(y * 32 + x) * N + i] = v[i];
  __syncthreads();
  for (int c = threadIdx.x; c < 32 * N; c += 32 * DOWN) {
    real sum = 0;
    UNROLL for (int j = 0; j < DOWN; ++j) sum += memory[j * 32 * N + c];
    write(c, sum);
  }
  __syncthreads();
}

// the second step: what the blocks left, added up in their order
template <class U> DI void add_parts(const real* parts, U* out, int blocks, column_t columns, real* memory) {
  const column_t start = (column_t)blockIdx.x * 32, column = start + threadIdx.x % 32;
  real v[1] = {0};
  if (column < columns)
    for (int b = threadIdx.x / 32; b < blocks; b += 8) v[0] += parts[(long long)b * columns + column];
  down<8>(v, memory, [&](int c, real sum) { if (start + c < columns) from_real(out[start + c], sum); });
}
