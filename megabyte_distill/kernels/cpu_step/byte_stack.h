// The byte mixers of an encoder or a decoder, one after the other (model/byte_stack.py).
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "conv_mixer.h"
#include "local_attention.h"
#include "mamba2.h"

namespace mbs {
namespace {

// Blocks one after the other, and how many bytes each slot has read.
struct Stack {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<int64_t> read, saved_read;
  Stack(Reader& in, int64_t slots) : read(slots), saved_read(slots) {
    for (int64_t left = in.number(); left > 0; left--) {
      switch (in.number()) {
        case 0: blocks.push_back(std::make_unique<ConvBlock>(in, slots)); break;
        case 1: blocks.push_back(std::make_unique<MambaBlock>(in, slots)); break;
        default: blocks.push_back(std::make_unique<AttentionBlock>(in, slots));
      }
    }
  }
  int64_t scratch() const {
    int64_t most = 0;
    for (auto& block : blocks) most = std::max(most, block->scratch());
    return most;
  }
  void prepare(const Bytes& bytes) {
    for (auto& block : blocks) block->prepare(bytes);
  }
  void run(const Bytes& bytes, float* x, float* normed, float* more) {
    for (auto& block : blocks) block->run(bytes, x, normed, more);
  }
  void reset(int64_t slot) {
    read[slot] = 0;
    for (auto& block : blocks) std::fill_n(block->of(slot), block->state_size, 0.0f);
  }
  void copy(int64_t slot, bool back) {
    if (back) read[slot] = saved_read[slot];
    else saved_read[slot] = read[slot];
    for (auto& block : blocks) {
      room(block->saved, int64_t(block->state.size()));
      float *own = block->of(slot), *kept = block->saved.data() + slot * block->state_size;
      std::copy_n(back ? kept : own, block->state_size, back ? own : kept);
    }
  }
  void replay(int64_t row, int64_t length, int64_t slot, int64_t count) {
    for (auto& block : blocks) block->replay(row, length, slot, read[slot], count);
    read[slot] += count;
  }
};

}  // namespace
}  // namespace mbs
