// Products with matrices in few bits.
//
// Activations become fixed-point numbers of 8, 16 or 24 bits with a scale for each of the weights' groups: planes of
// signed bytes, the most significant first. So a group's part of a product is a sum of integers, code (u8) times byte
// (s8), which is exact in int32 lanes; only group sums are floats. The zero point is taken off with the group's sum
// of activations: sum((code - zero) * x) = sum(code * x) - zero * sum(x).
//
// Two forms. For up to max_streamed() rows of x, lanes lie along the columns of a few rows of the weights, which are read
// once and in order: memory is the limit. For more rows of x, a tile of 2 * kFloats rows of the weights is unpacked and
// transposed, so that lanes are rows of the weights and every lane has its own sum: arithmetic is the limit.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace jmoe {

struct QuantRows {
  int64_t columns;
  int64_t group_size;
  int64_t num_groups;
  int32_t weight_bits;
  int32_t num_planes;
  int64_t row_bytes;     // of `bytes`, from one row of x to the next
  int64_t field_offset;  // in a row: where the copy in the order of packed codes begins
  int64_t floats_stride;
  int8_t* bytes;  // of a row: [plane, columns] in order, then [vector, field, plane, kBytes] for each plane of codes
  float* scales;  // [row, floats_stride]: of each group, then zeros up to a whole vector
  float* sums;    // the same: what the group's activations add up to
};

// Small arrays stay in registers only if their loops are gone before compilers place them.
// (Not so where vectors are arrays: that takes compilers minutes.)
#ifdef JMOE_VECTORS_ARE_ARRAYS
#define JMOE_UNROLL
#else
#define JMOE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace JMOE_ISA {

// Rows of x up to which weights are streamed, by the bits of codes: for more of them tiles are faster, as measured.
constexpr int64_t max_streamed(int bits) { return bits == 3 ? 2 : bits == 8 ? 4 : 8; }
// Columns that are unpacked at a time: what bounds scratch space.
constexpr int64_t kTileColumns = 4096;
// Activations below this are zero: the inverse of their scale would not be a float.
constexpr float kSmallestScale = 1e-30f;

// Codes of `kBits` bits, or of the part of them that is packed together (quant/packing.py: planes).
template <int kPlaneBits>
struct CodePlane {
  static constexpr int kFields = 8 / kPlaneBits;
  static int64_t group_bytes(int64_t group_size) { return group_size * kPlaneBits / 8; }
  static int64_t row_bytes(int64_t columns) { return columns * kPlaneBits / 8; }
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int64_t field_bytes(int plane_bits, int64_t columns, int num_planes) {
  const int64_t row_bytes = columns * plane_bits / 8;
  return round_up(row_bytes, kBytes) * (8 / plane_bits) * num_planes;
}

inline int64_t all_field_bytes(int bits, int64_t columns, int num_planes) {
  if (bits == 3) return field_bytes(2, columns, num_planes) + field_bytes(1, columns, num_planes);
  return field_bytes(bits, columns, num_planes);
}

inline QuantRows describe_rows(const QuantView& like, int bits) {
  QuantRows rows;
  rows.columns = like.columns;
  rows.group_size = like.group_size;
  rows.num_groups = like.num_groups();
  rows.weight_bits = like.bits;
  rows.num_planes = bits / 8;
  rows.field_offset = round_up(rows.num_planes * like.columns, 64);
  rows.row_bytes = round_up(rows.field_offset + all_field_bytes(like.bits, like.columns, rows.num_planes), 64);
  rows.floats_stride = round_up(rows.num_groups, 16) + 16;
  rows.bytes = nullptr;
  rows.scales = nullptr;
  rows.sums = nullptr;
  return rows;
}

inline int64_t quant_rows_bytes(const QuantView& like, int64_t num_rows, int bits) {
  const QuantRows rows = describe_rows(like, bits);
  const int64_t floats = 2 * rows.floats_stride * static_cast<int64_t>(sizeof(float));
  return round_up(sizeof(QuantRows), 64) + num_rows * (rows.row_bytes + floats);
}

inline QuantRows* make_quant_rows(const QuantView& like, int64_t num_rows, int bits, void* memory) {
  QuantRows* rows = static_cast<QuantRows*>(memory);
  *rows = describe_rows(like, bits);
  rows->bytes = static_cast<int8_t*>(memory) + round_up(sizeof(QuantRows), 64);
  rows->scales = reinterpret_cast<float*>(rows->bytes + num_rows * rows->row_bytes);
  rows->sums = rows->scales + num_rows * rows->floats_stride;
  return rows;
}

// Brings a plane of bytes into the order in which kPlaneBits-bit fields of packed codes come.
template <int kPlaneBits>
inline void order_like_codes(const QuantRows& rows, const int8_t* in_order, int plane, int8_t* out) {
  using Codes = CodePlane<kPlaneBits>;
  const int64_t group_bytes = Codes::group_bytes(rows.group_size);
  const int64_t piece = group_bytes < kBytes ? group_bytes : kBytes;
  const int64_t row_bytes = Codes::row_bytes(rows.columns);
  const int64_t stride = kBytes * rows.num_planes;  // from field to field
  for (int64_t byte = 0; byte < row_bytes; byte += piece) {
    const int64_t column = byte / group_bytes * rows.group_size + byte % group_bytes;
    int8_t* to = out + byte / kBytes * Codes::kFields * stride + plane * kBytes + byte % kBytes;
    for (int field = 0; field < Codes::kFields; ++field) {
      std::memcpy(to + field * stride, in_order + column + field * group_bytes, piece);
    }
  }
  if (row_bytes % kBytes != 0) {  // the rest of the last vector multiplies what is no code
    int8_t* last = out + row_bytes / kBytes * Codes::kFields * stride + plane * kBytes;
    for (int field = 0; field < Codes::kFields; ++field) {
      std::memset(last + field * stride + row_bytes % kBytes, 0, kBytes - row_bytes % kBytes);
    }
  }
}

// Group sizes are multiples of 16, so of kFloats.
inline void quantize_group(const float* x, int64_t size, int num_planes, int8_t* bytes, int64_t plane_stride,
                           float* scale_out, float* sum_out) {
  Floats largest = zero();
  Floats nothing = zero();  // or NaN, if there is a NaN or an infinity
  for (int64_t i = 0; i < size; i += kFloats) {
    const Floats v = load(x + i);
    largest = max(largest, abs(v));
    nothing = fma(v, zero(), nothing);
  }
  // The largest number of signed bytes, 127 in every one; of three, less what float32 may be wrong by.
  const float limit = num_planes == 1 ? 127.0f : num_planes == 2 ? 32639.0f : 8355709.0f;
  const float top = max_of(largest);
  const float scale = top > kSmallestScale ? top / limit : 0.0f;
  const float inverse = top > kSmallestScale ? limit / top : 0.0f;
  int64_t total = 0;
  for (int64_t i = 0; i < size; i += kFloats) {
    Ints q = to_ints(mul(load(x + i), broadcast(inverse)));
    int32_t lanes[kFloats];
    store_ints(lanes, q);
    for (int j = 0; j < kFloats; ++j) total += lanes[j];
    for (int plane = num_planes - 1; plane >= 0; --plane) {
      store_low_bytes(bytes + plane * plane_stride + i, q);
      q = shift_right<8>(add_ints(q, broadcast_int(128)));
    }
  }
  *scale_out = scale + sum(nothing);
  *sum_out = static_cast<float>(total) * *scale_out;
}

inline void quantize_rows(QuantRows* rows, const float* x, int64_t x_stride, int64_t first, int64_t num) {
  for (int64_t r = first; r < first + num; ++r) {
    int8_t* bytes = rows->bytes + r * rows->row_bytes;
    float* scales = rows->scales + r * rows->floats_stride;
    float* sums = rows->sums + r * rows->floats_stride;
    for (int64_t g = 0; g < rows->num_groups; ++g) {
      const int64_t column = g * rows->group_size;
      quantize_group(x + r * x_stride + column, rows->group_size, rows->num_planes, bytes + column, rows->columns,
                     scales + g, sums + g);
    }
    for (int64_t g = rows->num_groups; g < rows->floats_stride; ++g) scales[g] = sums[g] = 0.0f;
    int8_t* fields = bytes + rows->field_offset;
    for (int plane = 0; plane < rows->num_planes; ++plane) {
      const int8_t* in_order = bytes + plane * rows->columns;
      switch (rows->weight_bits) {
        case 8:
          order_like_codes<8>(*rows, in_order, plane, fields);
          break;
        case 4:
          order_like_codes<4>(*rows, in_order, plane, fields);
          break;
        case 3:
          order_like_codes<2>(*rows, in_order, plane, fields);
          order_like_codes<1>(*rows, in_order, plane, fields + field_bytes(2, rows->columns, rows->num_planes));
          break;
        default:
          order_like_codes<2>(*rows, in_order, plane, fields);
      }
    }
  }
}

// Scales and zero points of a row's groups in float32, a vector of groups at a time.
class RowGroups {
 public:
  // From group `first` on.
  JMOE_INLINE RowGroups(const QuantView& w, int64_t row, int64_t first = 0)
      : num_groups_(w.num_groups()),
        nested_size_(w.nested_size),
        width_(w.zeros == nullptr ? 2 : 4),
        nested_(w.nested != nullptr),
        whole_vectors_(num_groups_ % kFloats == 0 && nested_size_ % kFloats == 0),
        scales_(static_cast<const uint8_t*>(w.scales) + row * num_groups_ * (nested_ ? 1 : 2)),
        zeros_(w.zeros == nullptr ? nullptr
                                  : static_cast<const uint8_t*>(w.zeros) + row * num_groups_ * (nested_ ? 1 : 2)),
        nested_end_(nested_ ? first / nested_size_ * nested_size_ : 0),
        next_step_(w.nested + (nested_ ? (row * w.num_nested + first / nested_size_) * width_ : 0)),
        step_(next_step_),
        scale_step_(zero()),
        scale_base_(zero()),
        zero_step_(zero()),
        zero_base_(broadcast(static_cast<float>(1 << (w.bits - 1)))) {}

  // The kFloats groups from g on, which must be the ones after those of the call before; scales beyond the row's are 0.
  JMOE_INLINE void next(int64_t g, Floats* scales, Floats* zeros) {
    const bool some = !whole_vectors_ && num_groups_ - g < kFloats;
    const int64_t num = some ? num_groups_ - g : kFloats;
    if (nested_) {
      if (enter(g) || !whole_vectors_) read_steps(g, num);
      const auto codes = [&](const uint8_t* p) { return some ? load_u8_some(p + g, num) : load_u8(p + g); };
      *scales = fma(codes(scales_), scale_step_, scale_base_);
      *zeros = zeros_ != nullptr ? fma(codes(zeros_), zero_step_, zero_base_) : zero_base_;
    } else {
      const auto values = [&](const uint8_t* bytes) {
        const uint16_t* p = reinterpret_cast<const uint16_t*>(bytes) + g;
        return some ? load_bf16_some(p, num) : load_bf16(p);
      };
      *scales = values(scales_);
      *zeros = zeros_ != nullptr ? values(zeros_) : zero_base_;
    }
  }

 private:
  // Makes step_ the second-level parameters of group g; returns whether those of the group before it were others.
  JMOE_INLINE bool enter(int64_t g) {
    if (g < nested_end_) return false;
    step_ = next_step_;
    next_step_ += width_;
    nested_end_ += nested_size_;
    return true;
  }

  // Second-level parameters of each of the groups [g, g + num), of which the first is entered; zeros in other lanes.
  JMOE_INLINE void read_steps(int64_t g, int64_t num) {
    if (whole_vectors_ || g + num <= nested_end_) {
      set_steps([&](int i) { return whole_vectors_ ? broadcast(step_[i]) : broadcast_some(step_[i], num); });
    } else {
      float lanes[4][kFloats] = {};
      for (int64_t lane = 0; lane < num; ++lane) {
        enter(g + lane);
        for (int64_t i = 0; i < width_; ++i) lanes[i][lane] = step_[i];
      }
      set_steps([&](int i) { return load(lanes[i]); });
    }
  }

  template <typename Parameter>
  JMOE_INLINE void set_steps(Parameter parameter) {
    scale_step_ = parameter(0);
    scale_base_ = parameter(1);
    if (zeros_ == nullptr) return;
    zero_step_ = parameter(2);
    zero_base_ = parameter(3);
  }

  const int64_t num_groups_;
  const int64_t nested_size_;
  const int64_t width_;  // of second-level parameters
  const bool nested_;
  const bool whole_vectors_;  // no vector is cut off by the row's end, or by that of its second-level parameters
  const uint8_t* const scales_;
  const uint8_t* const zeros_;
  int64_t nested_end_;  // of the groups that step_ is for
  const float* next_step_;
  const float* step_;
  Floats scale_step_, scale_base_, zero_step_, zero_base_;
};

// kBytes bytes of a row from `byte` on; zeros beyond its end.
inline Ints load_codes(const uint8_t* row, int64_t byte, int64_t row_bytes) {
  if (byte + kBytes <= row_bytes) return load_ints(row + byte);
  return load_bytes_some(row + byte, row_bytes - byte);
}

template <int kPlaneBits, int kField>
inline Ints extract(Ints codes) {
  if constexpr (kPlaneBits == 8) {
    return codes;
  } else {
    constexpr int kMask = ((1 << kPlaneBits) - 1) * 0x01010101;
    return bit_and(shift_right_16<kField * kPlaneBits>(codes), broadcast_int(kMask));
  }
}

// ---- streamed: few rows of x

// Bytes from what is multiplied to what is fetched from memory into the second cache, and from there into the first. As
// measured: with one fetch into the first cache, for which few can be under way, a product waits for memory as long as
// it computes.
constexpr int64_t kAhead2 = 8192;
constexpr int64_t kAhead1 = 1024;

// Sums of code * x over one vector of packed codes, by lane.
template <int kPlaneBits, int kPlanes, int kTokens, int kField = 0>
JMOE_INLINE void dot_fields(Ints codes, const int8_t* const (&x)[kTokens], int64_t offset,
                            Ints (&acc)[kTokens][kPlanes]) {
  const Ints field = extract<kPlaneBits, kField>(codes);
  JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
    JMOE_UNROLL for (int p = 0; p < kPlanes; ++p) {
      const Ints activations = load_ints(x[t] + offset + (kField * kPlanes + p) * kBytes);
      acc[t][p] = dot<(kPlaneBits < 8)>(acc[t][p], field, activations);
    }
  }
  if constexpr (kField + 1 < 8 / kPlaneBits) dot_fields<kPlaneBits, kPlanes, kTokens, kField + 1>(codes, x, offset, acc);
}

// The value of planes of sums: exact in integers where they fit, which is for codes of up to 4 bits.
template <int kPlaneBits, int kPlanes>
JMOE_INLINE Floats join_planes(const Ints (&acc)[kPlanes]) {
  if constexpr (kPlanes == 1) {
    return to_floats(acc[0]);
  } else if constexpr (kPlanes == 2) {
    return to_floats(add_ints(shift_left<8>(acc[0]), acc[1]));
  } else if constexpr (kPlaneBits <= 4) {
    return to_floats(add_ints(shift_left<8>(add_ints(shift_left<8>(acc[0]), acc[1])), acc[2]));
  } else {
    return fma(to_floats(add_ints(shift_left<8>(acc[0]), acc[1])), broadcast(256.0f), to_floats(acc[2]));
  }
}

// For every vector of the packed codes of kFloats groups: to which of them its lanes belong.
struct GroupsOfLanes {
  int64_t group_bytes;
  Ints of_vector[256 / 4];

  void fill(int64_t bytes_of_group) {
    group_bytes = bytes_of_group;
    int shift = 0;  // no division: it is a power of two
    while ((int64_t{1} << shift) < group_bytes) ++shift;
    for (int64_t i = 0; i < group_bytes / 4; ++i) {
      int32_t groups[kFloats];
      for (int64_t j = 0; j < kFloats; ++j) groups[j] = static_cast<int32_t>((i * kBytes + 4 * j) >> shift);
      of_vector[i] = load_ints(groups);
    }
  }
};

// Adds the part of one plane of packed codes of a row that belongs to a vector of groups, [byte, end).
// kFactor: what a code of this plane is worth.
//
// Scales stay in registers. In memory they would have to be read across the boundaries of what was just written, which
// waits until that is no longer speculative: until the weights before it have come from memory.
template <int kPlaneBits, int kPlanes, int kTokens, int kFactor>
JMOE_INLINE void stream_plane(const uint8_t* row, int64_t byte, int64_t end, const Ints* group_of_lane,
                              const int8_t* const (&x)[kTokens], const Floats (&scales)[kTokens],
                              Floats (&total)[kTokens]) {
  while (byte < end) {
    prefetch_far(row + byte + kAhead2);
    prefetch(row + byte + kAhead1);
    const Ints codes = in_register(load_codes(row, byte, end));
    Ints acc[kTokens][kPlanes];
    JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
      JMOE_UNROLL for (int p = 0; p < kPlanes; ++p) acc[t][p] = zero_ints();
    }
    dot_fields<kPlaneBits>(codes, x, byte * (8 / kPlaneBits) * kPlanes, acc);
    const Ints group = *group_of_lane++;
    JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
      Floats scale = permute(scales[t], group);
      if constexpr (kFactor != 1) scale = mul(scale, broadcast(static_cast<float>(kFactor)));
      total[t] = fma(join_planes<kPlaneBits>(acc[t]), scale, total[t]);
    }
    byte += kBytes;
  }
}

// A row of the weights times kTokens rows of x, from `first_token` on; beyond the last one it is taken again.
// One row at a time: two are faster in a cache, and half as fast from memory.
template <int kBits, int kPlanes, int kTokens>
inline void stream_row(const QuantView& w, const GroupsOfLanes& low, const GroupsOfLanes& high, int64_t row,
                       const QuantRows& x, const Selection& selection, int64_t first_token, float (&y)[kTokens]) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  const uint8_t* codes = w.codes + row * w.row_bytes();
  const uint8_t* high_codes = codes + CodePlane<2>::row_bytes(w.columns);  // of 3 bits
  const int8_t* fields[kTokens];
  const int8_t* high_fields[kTokens];
  const float* x_scales[kTokens];
  const float* x_sums[kTokens];
  Floats total[kTokens];
  Floats offset[kTokens];
  JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
    const int64_t token = selection.row_of_x(first_token + t);
    fields[t] = x.bytes + token * x.row_bytes + x.field_offset;
    high_fields[t] = fields[t] + field_bytes(2, w.columns, kPlanes);
    x_scales[t] = x.scales + token * x.floats_stride;
    x_sums[t] = x.sums + token * x.floats_stride;
    total[t] = offset[t] = zero();
  }
  const int64_t num_groups = w.num_groups();
  RowGroups groups(w, row);
  for (int64_t g = 0; g < num_groups; g += kFloats) {
    Floats s, z;
    groups.next(g, &s, &z);
    const Floats both = mul(s, z);
    Floats scales[kTokens];
    JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
      scales[t] = mul(s, load(x_scales[t] + g));
      offset[t] = fma(both, load(x_sums[t] + g), offset[t]);
    }
    const int64_t end = g + kFloats < num_groups ? g + kFloats : num_groups;
    stream_plane<kLowBits, kPlanes, kTokens, 1>(codes, g * low.group_bytes, end * low.group_bytes, low.of_vector,
                                                fields, scales, total);
    if constexpr (kBits == 3) {
      stream_plane<1, kPlanes, kTokens, 4>(high_codes, g * high.group_bytes, end * high.group_bytes, high.of_vector,
                                           high_fields, scales, total);
    }
  }
  JMOE_UNROLL for (int t = 0; t < kTokens; ++t) y[t] = sum(sub(total[t], offset[t]));
}

template <int kBits, int kPlanes, int kTokens>
inline void stream_rows(const QuantView& w, const GroupsOfLanes& low, const GroupsOfLanes& high, int64_t first_row,
                        int64_t num_rows, const QuantRows& x, const Selection& selection, int64_t first_token) {
  for (int64_t row = 0; row < num_rows; ++row) {
    float y[kTokens];
    stream_row<kBits, kPlanes, kTokens>(w, low, high, first_row + row, x, selection, first_token, y);
    for (int t = 0; t < kTokens && first_token + t < selection.num_rows; ++t) {
      selection.y[(first_token + t) * selection.stride + row] = y[t];
    }
  }
}

template <int kBits, int kPlanes>
inline void stream(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows& x,
                   const Selection& selection) {
  // More planes leave fewer registers, and every form takes compilers its time.
  constexpr int kMost = kPlanes == 1 ? 4 : kPlanes == 2 ? 2 : 1;
  constexpr int64_t kRowsAtOnce = 16;  // which stay in a cache from one block of tokens to the next
  GroupsOfLanes low, high;
  low.fill(CodePlane<(kBits == 3 ? 2 : kBits)>::group_bytes(w.group_size));
  if constexpr (kBits == 3) high.fill(CodePlane<1>::group_bytes(w.group_size));
  for (int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    const int64_t rows = num_rows - row < kRowsAtOnce ? num_rows - row : kRowsAtOnce;
    Selection part = selection;
    part.y += row;
    for (int64_t token = 0; token < selection.num_rows;) {
      const int64_t left = selection.num_rows - token;
      if (kMost == 1 || left == 1) {
        stream_rows<kBits, kPlanes, 1>(w, low, high, first_row + row, rows, x, part, token);
        token += 1;
      } else if (kMost == 2 || left == 2) {
        stream_rows<kBits, kPlanes, (kMost > 1 ? 2 : 1)>(w, low, high, first_row + row, rows, x, part, token);
        token += 2;
      } else {
        stream_rows<kBits, kPlanes, kMost>(w, low, high, first_row + row, rows, x, part, token);
        token += kMost;
      }
    }
  }
}

// ---- tiles: many rows of x

constexpr int kTileRows = 2 * kFloats;
constexpr int kSums = kFloats == 16 ? 6 : 3;  // rows of x times planes that are multiplied at a time
constexpr int64_t kMaxTileGroups = kTileColumns / 16;

struct Tile {
  // Four codes of each of the tile's rows, for column 0, 4, 8, ...
  alignas(64) uint8_t codes[kTileColumns / 4][2][kBytes];
  alignas(64) float scales[kMaxTileGroups][2][kFloats];
  alignas(64) float offsets[kMaxTileGroups][2][kFloats];  // scale * zero point
};

// One for all forms of a product: each that had its own would cost every thread its memory, used or not.
inline Tile& tile_of_thread() {
  static thread_local Tile tile;
  return tile;
}

template <int kPlaneBits, int kField, bool kMore>
inline void store_fields(const Ints (&lanes)[kFloats], int64_t byte, int64_t end_byte, int64_t group_bytes,
                         int64_t group_size, int64_t first_column, int half, Tile* tile) {
  for (int i = 0; i < kFloats; ++i) {
    const int64_t b = byte + 4 * i;
    if (b >= end_byte) break;
    const int64_t column = b / group_bytes * group_size + kField * group_bytes + b % group_bytes - first_column;
    uint8_t* to = tile->codes[column / 4][half];
    Ints field = extract<kPlaneBits, kField>(lanes[i]);
    if constexpr (kMore) field = bit_or(load_ints(to), shift_left<2>(field));  // the third bit of codes
    store_ints(to, field);
  }
  if constexpr (kField + 1 < 8 / kPlaneBits) {
    store_fields<kPlaneBits, kField + 1, kMore>(lanes, byte, end_byte, group_bytes, group_size, first_column, half,
                                                tile);
  }
}

template <int kPlaneBits, bool kMore>
inline void unpack_plane(const uint8_t* const (&rows)[kFloats], int64_t row_bytes, int64_t group_size,
                         int64_t first_column, int64_t num_columns, int half, Tile* tile) {
  const int64_t group_bytes = CodePlane<kPlaneBits>::group_bytes(group_size);
  const int64_t begin = first_column * kPlaneBits / 8;
  const int64_t end = begin + num_columns * kPlaneBits / 8;
  for (int64_t byte = begin; byte < end; byte += kBytes) {
    Ints lanes[kFloats];
    for (int i = 0; i < kFloats; ++i) {
      lanes[i] = load_codes(rows[i], byte, row_bytes);
      prefetch(rows[i] + byte + 4 * kBytes);
    }
    transpose(lanes);
    store_fields<kPlaneBits, 0, kMore>(lanes, byte, end, group_bytes, group_size, first_column, half, tile);
  }
}

template <int kBits>
inline void unpack_tile(const QuantView& w, int64_t first_row, int64_t end_row, int64_t first_column,
                        int64_t num_columns, Tile* tile) {
  const int64_t first_group = first_column / w.group_size;
  const int64_t num_groups = num_columns / w.group_size;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* rows[kFloats];
    for (int i = 0; i < kFloats; ++i) {
      const int64_t wanted = first_row + half * kFloats + i;
      const int64_t row = wanted < end_row ? wanted : end_row - 1;
      rows[i] = w.codes + row * w.row_bytes();
      RowGroups groups(w, row, first_group);
      for (int64_t g = 0; g < num_groups; g += kFloats) {
        Floats s, z;
        groups.next(first_group + g, &s, &z);
        float scales[kFloats];
        float offsets[kFloats];
        store(scales, s);
        store(offsets, mul(s, z));
        for (int j = 0; j < kFloats; ++j) {
          tile->scales[g + j][half][i] = scales[j];
          tile->offsets[g + j][half][i] = offsets[j];
        }
      }
    }
    if constexpr (kBits == 3) {
      unpack_plane<2, false>(rows, CodePlane<2>::row_bytes(w.columns), w.group_size, first_column, num_columns, half,
                             tile);
      for (int i = 0; i < kFloats; ++i) rows[i] += CodePlane<2>::row_bytes(w.columns);
      unpack_plane<1, true>(rows, CodePlane<1>::row_bytes(w.columns), w.group_size, first_column, num_columns, half,
                            tile);
    } else {
      unpack_plane<kBits, false>(rows, w.row_bytes(), w.group_size, first_column, num_columns, half, tile);
    }
  }
}

// Adds a tile's columns to kTokens rows of y.
template <int kBits, int kPlanes, int kTokens>
inline void multiply_tile(const Tile& tile, int64_t num_columns, const QuantRows& x, const int64_t (&token)[kTokens],
                          int64_t first_column, Floats (&y)[kTokens][2]) {
  const int64_t first_group = first_column / x.group_size;
  const int64_t num_groups = num_columns / x.group_size;
  const int8_t* bytes[kTokens];
  const float* x_scales[kTokens];
  const float* x_sums[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    bytes[t] = x.bytes + token[t] * x.row_bytes + first_column;
    x_scales[t] = x.scales + token[t] * x.floats_stride + first_group;
    x_sums[t] = x.sums + token[t] * x.floats_stride + first_group;
  }
  const int64_t group_size = x.group_size;
  const int64_t plane = x.columns;
  const uint8_t* codes = tile.codes[0][0];
  for (int64_t g = 0; g < num_groups; ++g) {
    Ints acc[kTokens][2][kPlanes];
    JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
      JMOE_UNROLL for (int h = 0; h < 2; ++h) {
        JMOE_UNROLL for (int p = 0; p < kPlanes; ++p) acc[t][h][p] = zero_ints();
      }
    }
    for (int64_t i = 0; i < group_size; i += 4) {
      const Ints low = load_ints(codes);
      const Ints high = load_ints(codes + kBytes);
      codes += 2 * kBytes;
      JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
        JMOE_UNROLL for (int p = 0; p < kPlanes; ++p) {
          int32_t four;
          std::memcpy(&four, bytes[t] + p * plane + i, sizeof(four));
          const Ints activations = broadcast_int(four);
          acc[t][0][p] = dot<(kBits < 8)>(acc[t][0][p], low, activations);
          acc[t][1][p] = dot<(kBits < 8)>(acc[t][1][p], high, activations);
        }
      }
    }
    JMOE_UNROLL for (int t = 0; t < kTokens; ++t) bytes[t] += group_size;
    JMOE_UNROLL for (int h = 0; h < 2; ++h) {
      const Floats scale = load(tile.scales[g][h]);
      const Floats offset = load(tile.offsets[g][h]);
      JMOE_UNROLL for (int t = 0; t < kTokens; ++t) {
        // A lane has the whole group's sum here, so 24 bits of codes of 4 bits do not fit into integers.
        const Floats value = join_planes<(kPlanes == 3 ? 8 : kBits)>(acc[t][h]);
        y[t][h] = fma(value, mul(scale, broadcast(x_scales[t][g])), y[t][h]);
        y[t][h] = sub(y[t][h], mul(offset, broadcast(x_sums[t][g])));
      }
    }
  }
}

template <int kBits, int kPlanes, int kTokens>
inline void multiply_block(const Tile& tile, int64_t first_column, int64_t num_columns, int64_t num_rows,
                           const QuantRows& x, const Selection& selection, int64_t first_token) {
  int64_t token[kTokens];
  Floats y[kTokens][2];
  float rows[2][kFloats] = {};
  for (int t = 0; t < kTokens; ++t) {
    token[t] = selection.row_of_x(first_token + t);
    y[t][0] = y[t][1] = zero();
    if (first_column > 0 && first_token + t < selection.num_rows) {
      std::memcpy(rows, selection.y + (first_token + t) * selection.stride, num_rows * sizeof(float));
      y[t][0] = load(rows[0]);
      y[t][1] = load(rows[1]);
    }
  }
  multiply_tile<kBits, kPlanes, kTokens>(tile, num_columns, x, token, first_column, y);
  for (int t = 0; t < kTokens && first_token + t < selection.num_rows; ++t) {
    store(rows[0], y[t][0]);
    store(rows[1], y[t][1]);
    std::memcpy(selection.y + (first_token + t) * selection.stride, rows, num_rows * sizeof(float));
  }
}

template <int kBits, int kPlanes>
inline void tiled(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows& x,
                  const Selection& selection) {
  Tile& tile = tile_of_thread();
  constexpr int kTokens = kSums / kPlanes > 0 ? kSums / kPlanes : 1;
  constexpr int kFewer = kTokens > 4 ? 4 : kTokens > 1 ? kTokens - 1 : 1;
  const int64_t columns_at_once = kTileColumns / w.group_size * w.group_size;
  for (int64_t r0 = 0; r0 < num_rows; r0 += kTileRows) {
    const int64_t tile_rows = num_rows - r0 < kTileRows ? num_rows - r0 : kTileRows;
    Selection part = selection;
    part.y += r0;
    for (int64_t first_column = 0; first_column < w.columns; first_column += columns_at_once) {
      const int64_t rest = w.columns - first_column;
      const int64_t num_columns = rest < columns_at_once ? rest : columns_at_once;
      unpack_tile<kBits>(w, first_row + r0, first_row + r0 + tile_rows, first_column, num_columns, &tile);
      for (int64_t token = 0; token < part.num_rows;) {
        const int64_t left = part.num_rows - token;
        // Two smaller blocks rather than a full one and a nearly empty one.
        if (left <= kFewer || (left > kTokens && left <= 2 * kFewer)) {
          multiply_block<kBits, kPlanes, kFewer>(tile, first_column, num_columns, tile_rows, x, part, token);
          token += kFewer;
        } else {
          multiply_block<kBits, kPlanes, kTokens>(tile, first_column, num_columns, tile_rows, x, part, token);
          token += kTokens;
        }
      }
    }
  }
}

template <int kBits, int kPlanes>
inline void product_in_form(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows& x,
                            const Selection& selection) {
  if (selection.num_rows <= max_streamed(kBits)) {
    stream<kBits, kPlanes>(w, first_row, num_rows, x, selection);
  } else {
    tiled<kBits, kPlanes>(w, first_row, num_rows, x, selection);
  }
}

template <int kBits>
inline void product_of_bits(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows& x,
                            const Selection& selection) {
  switch (x.num_planes) {
    case 1:
      return product_in_form<kBits, 1>(w, first_row, num_rows, x, selection);
    case 2:
      return product_in_form<kBits, 2>(w, first_row, num_rows, x, selection);
    default:
      return product_in_form<kBits, 3>(w, first_row, num_rows, x, selection);
  }
}

inline void quant_product(const QuantView& w, int64_t first_row, int64_t num_rows, const QuantRows* x,
                          const Selection& selection) {
  switch (w.bits) {
    case 8:
      return product_of_bits<8>(w, first_row, num_rows, *x, selection);
    case 4:
      return product_of_bits<4>(w, first_row, num_rows, *x, selection);
    case 3:
      return product_of_bits<3>(w, first_row, num_rows, *x, selection);
    default:
      return product_of_bits<2>(w, first_row, num_rows, *x, selection);
  }
}

}  // namespace JMOE_ISA
}  // namespace jmoe
