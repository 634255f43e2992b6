// --- clusters: blocks that may write one another's shared memory (sm_90 on)
#ifndef XPNN_HOST
DI unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DI void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DI void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DI unsigned in_block(const void* p, unsigned rank) {
  unsigned r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
  return r;
}
DI void put(float* p, unsigned rank, float v) { asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(in_block(p, rank)), "f"(v) : "memory"); }
DI void put(double* p, unsigned rank, double v) { asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(in_block(p, rank)), "d"(v) : "memory"); }
#endif
