#include "forward.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace mtu {
namespace {

// Panels of a block that threads share, enough to reuse each weight often after it was read from memory.
constexpr int64_t kSharedPanels = 64;

// The experts that at least one of the samples [first, last] uses, in ascending order.
std::vector<int32_t> experts_of(const Problem& p, int64_t first, int64_t last) {
  std::vector<bool> is_used(p.E, !p.indices);
  if (p.indices)
    for (int64_t i = first * p.K; i < (last + 1) * p.K; ++i) is_used[p.indices[i]] = true;
  std::vector<int32_t> experts;
  for (int64_t e = 0; e < p.E; ++e)
    if (is_used[e]) experts.push_back(static_cast<int32_t>(e));
  return experts;
}

// Memory for the blocks of a call and for its threads. Each part starts at a cache line of its own.
struct Memory {
  int64_t x_hat, hidden, scratch;  // bytes of one block or thread
  int64_t blocks;
  torch::stable::Tensor bytes;

  Memory(const Layout& layout, int64_t panels, int64_t blocks, int64_t threads)
      : x_hat(rounded(layout.x_hat_panel * panels)),
        hidden(rounded(layout.hidden_panel * panels)),
        scratch(rounded(layout.scratch + layout.scratch_panel * panels)),
        blocks(blocks),
        bytes(torch::stable::empty({blocks * (x_hat + hidden) + threads * scratch},
                                   torch::headeronly::ScalarType::Byte)) {}

  Buffers buffers(int64_t block, int64_t thread) const {
    char* p = static_cast<char*>(bytes.mutable_data_ptr());
    char* of_block = p + block * (x_hat + hidden);
    return {of_block, of_block + x_hat, p + blocks * (x_hat + hidden) + thread * scratch};
  }

 private:
  static int64_t rounded(int64_t n) { return (n + 63) / 64 * 64; }
};

// For many tokens: each thread takes its own blocks through all three steps, so that x̂ and h stay in its cache.
void forward_by_tokens(const Problem& p, const Kernels& k, const Layout& layout, int64_t num_panels, int64_t threads) {
  const int64_t panels_per_sample = num_panels / p.B, panels = layout.block_panels;
  const Memory memory(layout, panels, threads, threads);
  parallel_for_parts(num_panels, panels, threads, [&](int64_t t, int64_t begin, int64_t end) {
    const Buffers buffers = memory.buffers(t, t);
    const std::vector<int32_t> experts = experts_of(p, begin / panels_per_sample, (end - 1) / panels_per_sample);
    const Block block = {begin, end, experts.data(), static_cast<int64_t>(experts.size())};
    k.normalize(p, block, buffers, 0, end - begin);
    k.expert_in(p, block, buffers, 0, layout.unit_tiles * block.num_experts);
    if (p.y) k.expert_out(p, block, buffers, 0, layout.column_tiles);
  });
}

// For few tokens: the threads share each step by its weights, so that each weight is read once.
void forward_by_weights(const Problem& p, const Kernels& k, const Layout& layout, int64_t num_panels, int64_t threads) {
  const int64_t panels_per_sample = num_panels / p.B;
  const int64_t blocks = (num_panels + kSharedPanels - 1) / kSharedPanels;
  const Memory memory(layout, (num_panels + blocks - 1) / blocks, 1, threads);
  auto shared = [&](auto step, const Block& block, int64_t n, int64_t part) {
    parallel_for_parts(n, part, threads, [&](int64_t t, int64_t begin, int64_t end) {
      step(p, block, memory.buffers(0, t), begin, end);
    });
  };
  // A part is a whole group of tiles, unless some threads would then have no work.
  const int64_t column_part = std::clamp<int64_t>(layout.column_tiles / (2 * threads), 1, layout.group);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = i * num_panels / blocks, end = (i + 1) * num_panels / blocks;
    const std::vector<int32_t> experts = experts_of(p, begin / panels_per_sample, (end - 1) / panels_per_sample);
    const Block block = {begin, end, experts.data(), static_cast<int64_t>(experts.size())};
    shared(k.normalize, block, end - begin, 1);
    shared(k.expert_in, block, layout.unit_tiles * block.num_experts, layout.group);
    if (p.y) shared(k.expert_out, block, layout.column_tiles, column_part);
  }
}

}  // namespace

void forward(const Problem& p, const Kernels& k) {
  const int64_t num_panels = p.B * ((p.L + kPanel - 1) / kPanel);
  if (num_panels == 0) return;
  const Layout layout = k.layout(p);
  const int64_t threads = torch::stable::get_num_threads();
  if (num_panels >= 2 * threads * layout.block_panels) forward_by_tokens(p, k, layout, num_panels, threads);
  else forward_by_weights(p, k, layout, num_panels, threads);
}

}  // namespace mtu
