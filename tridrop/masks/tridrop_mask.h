/* tridrop's masks in C, C++, CUDA and HIP: one header for host and device, without dependencies.
 * Apache-2.0; contract version 1.
 *
 * The bits are defined by tridrop's docs/mask-contract.md. For a kernel, compute the key and the
 * threshold on the host; in the kernel, one call makes eight decisions:
 *
 *     tridrop_key key = tridrop_key_of(seed, stream);
 *     uint64_t t = tridrop_threshold(p);                       // TRIDROP_REFUSED unless 0 <= p <= 1
 *     float scale = (float)tridrop_scale(t);
 *     uint32_t bits[8];
 *     tridrop_bits8(key, TRIDROP_ELEMENTS, row, col / 8, bits);  // columns from 8 * (col / 8)
 *     y[col] = bits[col % 8] >= t ? x[col] * scale : 0;
 *
 * On the host, tridrop_keep_mask and tridrop_attention_keep_mask fill whole masks.
 */
#ifndef TRIDROP_MASK_H
#define TRIDROP_MASK_H

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define TRIDROP_FN static __host__ __device__ __forceinline__
#else
#define TRIDROP_FN static inline
#endif

#define TRIDROP_ELEMENTS 0u
#define TRIDROP_DROP_PATH 1u
#define TRIDROP_ATTENTION 2u
#define TRIDROP_REFUSED UINT64_MAX

typedef struct {
  uint32_t k0, k1;
} tridrop_key;

/* The key of a pair (seed, stream), by arithmetic modulo 2^64. */
TRIDROP_FN tridrop_key tridrop_key_of(int64_t seed, int64_t stream) {
  uint64_t k = (uint64_t)seed + (uint64_t)stream * UINT64_C(0x9E3779B97F4A7C15);
  tridrop_key key;
  key.k0 = (uint32_t)k;
  key.k1 = (uint32_t)(k >> 32);
  return key;
}

/* fold_in((seed, old_stream), stream) is (seed, this number); for an int seed, old_stream is 0. */
TRIDROP_FN int64_t tridrop_fold_in(int64_t old_stream, int64_t stream) {
  uint64_t folded = (uint64_t)old_stream * UINT64_C(0xD1342543DE82EF95) + (uint64_t)stream;
  return folded >> 63 ? -(int64_t)~folded - 1 : (int64_t)folded;
}

/* T = round(p * 2^32), ties to even; TRIDROP_REFUSED if p is not in [0, 1]. */
TRIDROP_FN uint64_t tridrop_threshold(double p) {
  double exact = p * 4294967296.0, rest;
  uint64_t t;
  if (!(p >= 0.0 && p <= 1.0)) return TRIDROP_REFUSED;
  t = (uint64_t)exact;
  rest = exact - (double)t;
  return t + (rest > 0.5 || (rest == 0.5 && (t & 1)));
}

/* The factor of kept elements: 2^32 / (2^32 - T), or 0 if everything is dropped. */
TRIDROP_FN double tridrop_scale(uint64_t t) {
  return t < UINT64_C(4294967296) ? 4294967296.0 / (double)(UINT64_C(4294967296) - t) : 0.0;
}

/* Philox4x32-10: maps a counter of four words to four words. */
TRIDROP_FN void tridrop_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                               tridrop_key key, uint32_t words[4]) {
  int round;
  for (round = 0; round < 10; ++round) {
    uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ key.k0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ key.k1;
    c3 = (uint32_t)a;
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/* The bits of a lane, 0 to 7: a word, or the word with its halves swapped. */
TRIDROP_FN uint32_t tridrop_lane(const uint32_t words[4], unsigned lane) {
  uint32_t word = words[lane / 2];
  return lane % 2 ? word << 16 | word >> 16 : word;
}

/* The bits of the eight columns 8 * group .. 8 * group + 7 of a row. */
TRIDROP_FN void tridrop_bits8(tridrop_key key, uint32_t domain, uint64_t row, uint64_t group,
                              uint32_t bits[8]) {
  uint32_t words[4];
  unsigned lane;
  tridrop_philox((uint32_t)group, (uint32_t)row, (uint32_t)(row >> 32),
                 domain << 28 | (uint32_t)(group >> 32), key, words);
  for (lane = 0; lane < 8; ++lane) bits[lane] = tridrop_lane(words, lane);
}

/* The bits of one element, which is kept if they are >= T. */
TRIDROP_FN uint32_t tridrop_bits(tridrop_key key, uint32_t domain, uint64_t row, uint64_t col) {
  uint64_t group = col / 8;
  uint32_t words[4];
  tridrop_philox((uint32_t)group, (uint32_t)row, (uint32_t)(row >> 32),
                 domain << 28 | (uint32_t)(group >> 32), key, words);
  return tridrop_lane(words, (unsigned)(col % 8));
}

/* Attention: the bits of keys 32 * (group / 4) + 2 * (group % 4) + 8 * (i / 2) + i % 2, i = 0 .. 7:
 * a pair from each of the four octets of 32 keys, as in the accumulator of a tensor core. */
TRIDROP_FN void tridrop_attention_bits8(tridrop_key key, uint32_t batch, uint32_t head,
                                        uint32_t query, uint32_t group, uint32_t bits[8]) {
  uint32_t words[4];
  unsigned lane;
  tridrop_philox(query, group, batch, TRIDROP_ATTENTION << 28 | head, key, words);
  for (lane = 0; lane < 8; ++lane) bits[lane] = tridrop_lane(words, lane);
}

/* Attention: the bits of one probability; `at` is the index of the key. */
TRIDROP_FN uint32_t tridrop_attention_bits(tridrop_key key, uint32_t batch, uint32_t head,
                                           uint32_t query, uint64_t at) {
  uint32_t words[4];
  tridrop_philox(query, (uint32_t)(at / 32 * 4 + at % 8 / 2), batch,
                 TRIDROP_ATTENTION << 28 | head, key, words);
  return tridrop_lane(words, (unsigned)(at / 8 % 4 * 2 + at % 2));
}

/* Whether `local` indices from `origin` lie within `whole`, without a sum that overflows. */
TRIDROP_FN int tridrop_fits(int64_t local, int64_t origin, int64_t whole) {
  return local >= 0 && origin >= 0 && local <= whole && origin <= whole - local;
}

/* The mask of tridrop.keep_mask in row-major order: 1 where an element is kept, else 0.
 *
 * noise_shape has an entry per dimension: 1 if the mask is shared along it, else its size, or 0 for
 * its size; NULL shares none. global_shape and origin give the shape of a larger mask and the place
 * of this one in it; NULL and NULL if this is the whole. TRIDROP_DROP_PATH shares all dimensions but
 * the first, and takes no noise_shape. Returns 0; or -1, without writing to `keep`, if the contract
 * does not allow an argument. */
TRIDROP_FN int tridrop_keep_mask(int64_t seed, int64_t stream, int dims, const int64_t *shape,
                                 double p, const int64_t *noise_shape, const int64_t *global_shape,
                                 const int64_t *origin, uint32_t domain, unsigned char *keep) {
  const int64_t *whole = global_shape ? global_shape : shape;
  uint64_t t = tridrop_threshold(p), elements = 1, product = 1, cols, first, i;
  tridrop_key key = tridrop_key_of(seed, stream);
  int path = domain == TRIDROP_DROP_PATH, empty = 0, k, cols_shared = 0;
  if (t == TRIDROP_REFUSED || dims < 0 || domain > TRIDROP_DROP_PATH) return -1;
  if ((global_shape == NULL) != (origin == NULL)) return -1;
  if (path && (noise_shape || dims < 2)) return -1;
  for (k = 0; k < dims; ++k) {
    if (!tridrop_fits(shape[k], origin ? origin[k] : 0, whole[k])) return -1;
    if (noise_shape && noise_shape[k] >> 1 && noise_shape[k] != shape[k]) return -1;
    empty |= whole[k] == 0;
    elements *= (uint64_t)shape[k]; /* at most the product below, or not used */
  }
  for (k = 0; k < dims && !empty; ++k) {
    if (product > (uint64_t)INT64_MAX / (uint64_t)whole[k]) return -1;
    product *= (uint64_t)whole[k];
  }
  if (empty) return 0;
  cols = dims ? (uint64_t)shape[dims - 1] : 1;
  first = dims && origin ? (uint64_t)origin[dims - 1] : 0;
  if (dims) cols_shared = path || (noise_shape && noise_shape[dims - 1] == 1);
  for (i = 0; i < elements; i += cols) {
    uint64_t row = 0, stride = 1, left = cols ? i / cols : 0, col;
    uint32_t bits[8];
    for (k = dims - 2; k >= 0; --k) {
      uint64_t index = left % (uint64_t)shape[k] + (uint64_t)(origin ? origin[k] : 0);
      left /= (uint64_t)shape[k];
      if (path ? k == 0 : !(noise_shape && noise_shape[k] == 1)) row += index * stride;
      stride *= (uint64_t)whole[k];
    }
    if (cols_shared) {
      unsigned char one = tridrop_bits(key, domain, row, 0) >= t;
      for (col = 0; col < cols; ++col) keep[i + col] = one;
      continue;
    }
    for (col = first; col < first + cols; ++col) {
      if (col == first || col % 8 == 0) tridrop_bits8(key, domain, row, col / 8, bits);
      keep[i + col - first] = bits[col % 8] >= t;
    }
  }
  return 0;
}

/* The mask of tridrop.attention_keep_mask in row-major order: 1 where a probability is kept.
 *
 * shape is (batch, heads, queries, keys), and origin has the first coordinate of each; NULL means
 * zeros. Returns 0; or -1, without writing to `keep`, if the contract does not allow an argument. */
TRIDROP_FN int tridrop_attention_keep_mask(int64_t seed, int64_t stream, const int64_t shape[4],
                                           double p, const int64_t *origin, unsigned char *keep) {
  const int64_t limits[4] = {INT64_C(1) << 32, INT64_C(1) << 28, INT64_C(1) << 32,
                             INT64_C(1) << 35};
  int64_t start[4], b, h, q, tile;
  uint64_t t = tridrop_threshold(p);
  tridrop_key key = tridrop_key_of(seed, stream);
  int k;
  if (t == TRIDROP_REFUSED) return -1;
  for (k = 0; k < 4; ++k) {
    start[k] = origin ? origin[k] : 0;
    if (!tridrop_fits(shape[k], start[k], limits[k])) return -1;
  }
  for (b = start[0]; b < start[0] + shape[0]; ++b)
    for (h = start[1]; h < start[1] + shape[1]; ++h)
      for (q = start[2]; q < start[2] + shape[2]; ++q, keep += shape[3])
        for (tile = start[3] / 32; tile * 32 < start[3] + shape[3]; ++tile)
          for (k = 0; k < 4; ++k) {
            uint32_t bits[8];
            int lane;
            tridrop_attention_bits8(key, (uint32_t)b, (uint32_t)h, (uint32_t)q,
                                    (uint32_t)(tile * 4 + k), bits);
            for (lane = 0; lane < 8; ++lane) {
              int64_t at = tile * 32 + 2 * k + lane / 2 * 8 + lane % 2 - start[3];
              if (at >= 0 && at < shape[3]) keep[at] = bits[lane] >= t;
            }
          }
  return 0;
}

#endif
