// One generation, read chunk by chunk.
#pragma once

#include <cstddef>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "millrace/generation.h"

namespace millrace {

/// One generation: a range of chunks, read once, by one thread. Its end of life cancels what still
/// runs.
///
/// A start that the daemon refuses with a retry delay is tried again as long as nothing arrived. A
/// connection to a gateway that is lost later is made anew, and the generation goes on where it
/// was. What is beyond that is thrown as `MillraceError` where the stream is read.
class Stream {
 public:
  class Impl;
  class Iterator;

  explicit Stream(std::unique_ptr<Impl> impl);
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  ~Stream();

  /// The next chunk, waited for; nothing at the end.
  std::optional<Chunk> next();

  Iterator begin();
  Iterator end() noexcept;

  /// Reads what is left, and gives the finished generation.
  Generation wait();

  /// Cancels what still runs; reading ends. Any thread may call it.
  void close();

  /// The finished generation.
  /// @throws std::logic_error the stream was not read to its end.
  const Generation& result() const;

  /// Names it for `Client::resume`; empty before it has started, and where it cannot be resumed.
  const std::string& generation_id() const noexcept;

  /// Tokens that were read, by sample.
  const std::vector<int>& received_tokens() const noexcept;

  /// How often its connection was lost and it went on over another one.
  int num_resumes() const noexcept;

 private:
  std::unique_ptr<Impl> impl_;
};

/// Where a reader of a stream is. An input iterator: advancing one advances the stream.
class Stream::Iterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = Chunk;
  using difference_type = std::ptrdiff_t;
  using pointer = const Chunk*;
  using reference = const Chunk&;

  Iterator() = default;
  explicit Iterator(Impl* stream) : stream_(stream) { ++*this; }

  reference operator*() const { return *chunk_; }
  pointer operator->() const { return &*chunk_; }
  Iterator& operator++();
  void operator++(int) { ++*this; }

  friend bool operator==(const Iterator& a, const Iterator& b) noexcept {
    return a.chunk_.has_value() == b.chunk_.has_value();
  }
  friend bool operator!=(const Iterator& a, const Iterator& b) noexcept { return !(a == b); }

 private:
  Impl* stream_ = nullptr;
  std::optional<Chunk> chunk_;
};

}  // namespace millrace
