// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 against the known answers of Random123's kat_vectors, and the layout of the counter.
#include <set>

#include "check.h"
#include "core/philox.h"

using namespace gibbs;

static void check_known_answers() {
  const struct {
    uint32_t counter[4], key[2], answer[4];
  } vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& v : vectors) {
    const PhiloxOutput r = philox4x32(v.counter[0], v.counter[1], v.counter[2], v.counter[3], v.key[0], v.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(r.word[i] == v.answer[i], "word %d is %08x", i, r.word[i]);
  }
}

// Every coordinate, and every bit of it, must change the word: two equal words among so few would be a one in 2^16 accident.
static void check_every_coordinate_counts() {
  std::set<uint32_t> words;
  int count = 0;
  const auto add = [&](uint64_t seed, uint64_t chain, uint64_t sweep, uint32_t unit, uint32_t stream) {
    words.insert(random_word(random_stream(seed, chain, sweep, stream), unit));
    ++count;
  };
  add(0, 0, 0, 0, 0);
  for (int bit = 0; bit < 64; ++bit) add(uint64_t{1} << bit, 0, 0, 0, 0);
  for (int bit = 0; bit < 48; ++bit) add(0, uint64_t{1} << bit, 0, 0, 0);
  for (int bit = 0; bit < 44; ++bit) add(0, 0, uint64_t{1} << bit, 0, 0);
  for (int bit = 0; bit < 30; ++bit) add(0, 0, 0, uint32_t{1} << bit, 0);
  for (int bit = 0; bit < 4; ++bit) add(0, 0, 0, 0, uint32_t{1} << bit);
  CHECK(int(words.size()) == count, "%d of %d words differ", int(words.size()), count);
}

// No two units share any random bits: each plane's (counter, output word, byte) is used once.
static void check_units_are_distinct() {
  std::set<uint32_t> low;
  const RandomStream s = random_stream(1, 2, 3);
  for (uint32_t unit = 0; unit < 1024; ++unit) low.insert(random_low_bits(s, unit));
  CHECK(low.size() > 1020, "%d of 1024", int(low.size()));  // 0.03 collisions of 24 bits expected
  int ones = 0;
  for (uint32_t unit = 0; unit < 4096; ++unit) ones += __builtin_popcount(random_high_byte(s, unit));
  CHECK(ones > 16384 - 6 * 91 && ones < 16384 + 6 * 91, "%d ones in 32768 bits", ones);  // 6 standard deviations
}

int main() {
  check_known_answers();
  check_every_coordinate_counts();
  check_units_are_distinct();
}
