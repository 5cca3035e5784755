// Byte-pair encoding learned from weighted words with morpheme boundaries, called over ctypes; the same algorithm as
// tokenizers/morph_merges_python.py, which is the one to read first. Integers throughout: the same merges on every machine.

#include <cstdint>
#include <cstring>
#include <new>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kOne = int64_t{1} << 20;  // weight of an occurrence inside a morpheme; SCORE_ONE in Python

struct Pair {
  int64_t key;          // left id in the upper half, right id in the lower
  int64_t inside = 0;   // weighted occurrences between which no boundary lies
  int64_t across = 0;   // and those with one
  int64_t touched = 0;  // the step in which it last became more frequent
  std::vector<int32_t> words;  // that hold it, or held it once
};

struct Candidate {
  int64_t score, key;
  int32_t pair;
  // Ties go to the smaller (left id, right id), as in the `tokenizers` library.
  bool operator<(const Candidate& other) const { return score != other.score ? score < other.score : key > other.key; }
};

// Open addressing with linear probing: lookups by pair are most of the work, and std::unordered_map takes twice as long.
class PairIndex {
 public:
  PairIndex() : slots_(1 << 16, -1) {}
  int32_t find_or_add(int64_t key, std::vector<Pair>& pairs) {
    if (2 * (pairs.size() + 1) > slots_.size()) grow(pairs);
    for (uint64_t at = slot(key);; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at] < 0) {
        slots_[at] = static_cast<int32_t>(pairs.size());
        pairs.push_back(Pair{key});
        return slots_[at];
      }
      if (pairs[slots_[at]].key == key) return slots_[at];
    }
  }

 private:
  uint64_t slot(int64_t key) const {
    return (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull >> 20) & (slots_.size() - 1);
  }
  void grow(const std::vector<Pair>& pairs) {
    slots_.assign(2 * slots_.size(), -1);
    for (size_t i = 0; i < pairs.size(); ++i) {
      uint64_t at = slot(pairs[i].key);
      while (slots_[at] >= 0) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = static_cast<int32_t>(i);
    }
  }
  std::vector<int32_t> slots_;
};

class Trainer {
 public:
  Trainer(const uint8_t* text, const uint8_t* borders, const int64_t* ends, const int64_t* counts, int64_t num_words,
          const int32_t* byte_ids, int64_t keep)
      : counts_(counts), keep_(keep), ends_(ends, ends + num_words), lengths_(num_words) {
    int64_t size = num_words ? ends[num_words - 1] : 0;
    symbols_.resize(size);
    borders_.assign(borders, borders + size);
    for (int64_t i = 0; i < size; ++i) symbols_[i] = byte_ids[text[i]];
    for (int64_t w = 0; w < num_words; ++w) lengths_[w] = static_cast<int32_t>(ends_[w] - begin(w));
  }

  void add_token(const char* bytes, int64_t size) {
    ids_.emplace(std::string(bytes, size), static_cast<int32_t>(tokens_.size()));
    tokens_.emplace_back(bytes, size);
  }

  void run(int64_t vocab_size) {
    for (int64_t w = 0; w < static_cast<int64_t>(lengths_.size()); ++w)
      for (int32_t i = 1; i < lengths_[w]; ++i) add(w, begin(w) + i - 1, begin(w) + i);
    queue_changed();
    while (static_cast<int64_t>(tokens_.size()) < vocab_size && !heap_.empty()) {
      Candidate best = heap_.top();
      heap_.pop();
      int64_t score = score_of(pairs_[best.pair]);
      if (score != best.score) {  // it became rarer since; where it became more frequent, there is another entry
        if (score > 0 && score < best.score) heap_.push({score, best.key, best.pair});
        continue;
      }
      merge(best);
    }
  }

  std::vector<int32_t> merges;  // left, right, result; left, right, result; ...

  // For every byte of the text whether a token begins there.
  void copy_starts(uint8_t* starts) const {
    std::memset(starts, 0, borders_.size());
    for (int64_t w = 0; w < static_cast<int64_t>(lengths_.size()); ++w) {
      int64_t at = begin(w);
      for (int32_t i = 0; i < lengths_[w]; ++i) {
        starts[at] = 1;
        at += static_cast<int64_t>(tokens_[symbols_[begin(w) + i]].size());
      }
    }
  }

 private:
  int64_t begin(int64_t word) const { return word ? ends_[word - 1] : 0; }
  int64_t score_of(const Pair& pair) const { return kOne * pair.inside + keep_ * pair.across; }

  Pair& pair_at(int64_t left, int64_t right) {
    int64_t key = static_cast<int64_t>(symbols_[left]) << 32 | symbols_[right];
    return pairs_[index_.find_or_add(key, pairs_)];
  }

  void add(int64_t word, int64_t left, int64_t right) {
    Pair& pair = pair_at(left, right);
    (borders_[right] ? pair.across : pair.inside) += counts_[word];
    if (pair.words.empty() || pair.words.back() != word) pair.words.push_back(static_cast<int32_t>(word));
    if (pair.touched != step_) {
      pair.touched = step_;
      changed_.push_back(static_cast<int32_t>(&pair - pairs_.data()));
    }
  }

  void subtract(int64_t word, int64_t left, int64_t right) {
    Pair& pair = pair_at(left, right);
    (borders_[right] ? pair.across : pair.inside) -= counts_[word];
  }

  void queue_changed() {
    for (int32_t i : changed_)
      if (int64_t score = score_of(pairs_[i]); score > 0) heap_.push({score, pairs_[i].key, i});
    changed_.clear();
    ++step_;
  }

  void merge(const Candidate& best) {
    auto left = static_cast<int32_t>(best.key >> 32), right = static_cast<int32_t>(best.key & 0xffffffff);
    std::string text = tokens_[left] + tokens_[right];
    auto known = ids_.find(text);  // two pairs can spell the same token
    int32_t result = known == ids_.end() ? static_cast<int32_t>(tokens_.size()) : known->second;
    if (known == ids_.end()) add_token(text.data(), static_cast<int64_t>(text.size()));
    merges.insert(merges.end(), {left, right, result});
    std::vector<int32_t> words = std::move(pairs_[best.pair].words);
    pairs_[best.pair].words.clear();
    for (int32_t word : words) merge_word(word, left, right, result);
    queue_changed();
  }

  void merge_word(int32_t word, int32_t left, int32_t right, int32_t result) {
    int64_t first = begin(word), end = first + lengths_[word], out = first;
    for (int64_t in = first; in < end; ++in, ++out) {
      bool here = symbols_[in] == left && in + 1 < end && symbols_[in + 1] == right && (keep_ > 0 || !borders_[in + 1]);
      if (!here) {
        symbols_[out] = symbols_[in], borders_[out] = borders_[in];
        continue;
      }
      // What is left of `out` is written already, what is right of `in` not yet read: the neighbours are at out-1 and in+2.
      subtract(word, in, in + 1);
      uint8_t border = borders_[in];
      if (out > first) {
        symbols_[out] = left, borders_[out] = border;
        subtract(word, out - 1, out);
      }
      if (in + 2 < end) subtract(word, in + 1, in + 2);
      ++in;
      symbols_[in] = symbols_[out] = result, borders_[out] = border;
      if (out > first) add(word, out - 1, out);
      if (in + 1 < end) add(word, in, in + 1);
    }
    lengths_[word] = static_cast<int32_t>(out - first);
  }

  const int64_t* counts_;
  const int64_t keep_;  // weight of an occurrence across a boundary, of kOne
  std::vector<int64_t> ends_;
  std::vector<int32_t> lengths_;   // in symbols; a word's symbols lie at the beginning of its place
  std::vector<int32_t> symbols_;
  std::vector<uint8_t> borders_;   // whether a boundary lies before the symbol
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<Pair> pairs_;
  PairIndex index_;
  std::priority_queue<Candidate> heap_;
  std::vector<int32_t> changed_;
  int64_t step_ = 1;
};

}  // namespace

extern "C" {

// Learns merges until there are vocab_size tokens; null where memory runs out. Free the result with bpe_free.
//   text, borders [ends[num_words - 1]]: the words' bytes in a row, and whether a morpheme boundary lies before each.
//   tokens, token_ends [num_tokens]: the vocabulary to begin with; byte_ids [256]: where in it the bytes are.
//   keep: weight of an occurrence across a boundary, 0 to 2^20; at 0 no boundary is merged over.
void* bpe_train(const uint8_t* text, const uint8_t* borders, const int64_t* ends, const int64_t* counts, int64_t num_words,
                const char* tokens, const int64_t* token_ends, int64_t num_tokens, const int32_t* byte_ids,
                int64_t vocab_size, int64_t keep) {
  try {
    auto* trainer = new Trainer(text, borders, ends, counts, num_words, byte_ids, keep);
    for (int64_t i = 0; i < num_tokens; ++i) {
      int64_t begin = i ? token_ends[i - 1] : 0;
      trainer->add_token(tokens + begin, token_ends[i] - begin);
    }
    trainer->run(vocab_size);
    return trainer;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

int64_t bpe_num_merges(const void* trainer) {
  return static_cast<int64_t>(static_cast<const Trainer*>(trainer)->merges.size()) / 3;
}

// merges [num_merges, 3]; starts: for every byte of the text whether a token begins there.
void bpe_result(const void* trainer, int32_t* merges, uint8_t* starts) {
  const auto& learned = static_cast<const Trainer*>(trainer)->merges;
  std::memcpy(merges, learned.data(), learned.size() * sizeof(int32_t));
  static_cast<const Trainer*>(trainer)->copy_starts(starts);
}

void bpe_free(void* trainer) { delete static_cast<Trainer*>(trainer); }
}
