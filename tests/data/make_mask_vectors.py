"""Writes mask_vectors.json, the golden vectors of the mask contract, with tridrop.masks.numpy_mask.

The vectors are frozen: run this to add records, and see that `git diff` shows additions only.
A change of an existing line is a change of the contract, which needs a new major version.

    python tests/data/make_mask_vectors.py
"""

import json
import math
from pathlib import Path

from tridrop.masks import numpy_mask

HERE = Path(__file__).resolve().parent
DOMAINS = ("elements", "drop_path")
DROP_PATH = 1
NEAR_2_62 = (1 << 62) - 3  # with two columns a global tensor has just under 2^63 elements


def record(
    name, seed, shape, p, *, stream=0, folds=(), domain=0, noise_shape=None, whole=None, origin=None
):
    """One vector. ``folds`` are nested fold_in calls; the stream they lead to is stored as well."""
    for fold in folds:
        seed, stream = numpy_mask.fold_in((seed, stream), fold)
    shard = None if whole is None else (whole, origin)
    keep = numpy_mask.keep_mask(
        (seed, stream), shape, p, noise_shape=noise_shape, shard=shard, domain=DOMAINS[domain]
    )
    assert keep.size <= 64
    assert whole is None or math.prod(whole) < 1 << 63
    return {
        "name": name,
        "seed": seed,
        "stream": stream,
        "folds": list(folds),
        "domain": domain,
        "global_shape": list(shape if whole is None else whole),
        "origin": list(origin or [0] * len(shape)),
        "shape": list(shape),
        "noise_shape": None if noise_shape is None else list(noise_shape),
        "p": p,
        "threshold": numpy_mask.threshold(p),
        "keep": "".join("01"[int(k)] for k in keep.flat),
    }


def tie(name, lane, parity, half, **where):
    """p * 2^32 is the bits of the decision in ``lane``, whose parity is given, plus a half.

    Half-even rounding then makes those bits the threshold itself, which keeps the element, or a
    number next to them.
    """
    for seed in range(1000):
        value = int(numpy_mask.bits(seed, (8,))[lane])
        if value % 2 == parity:
            return record(name, seed, (8,), (value + half) / 2**32, **where)
    raise AssertionError


def rare(name, p, wanted):
    """Four rows of eight around the first decision that is ``wanted`` where p makes it rare."""
    whole = (1 << 20, 8)
    keep = numpy_mask.keep_mask(77, whole, p)
    row = int((keep == wanted).any(axis=1).argmax())
    return record(name, 77, (4, 8), p, whole=whole, origin=(row - 1, 0))


def records():
    yield record("one_group", 0, (8,), 0.5)
    yield record("small_matrix", 1, (3, 12), 0.5)
    yield record("three_dimensions", 42, (2, 3, 9), 0.3)
    yield record("scalar", 7, (), 0.5)
    yield record("scalar_dropped", 0, (), 0.5)
    yield record("one_dimension", 7, (37,), 0.25)
    yield record("one_column", 7, (20, 1), 0.5)

    for name, seed in (
        ("seed_past_2_32", (1 << 32) + 5),
        ("seed_low_half_5", 5),
        ("seed_largest", (1 << 63) - 1),
        ("seed_minus_1", -1),
        ("seed_smallest", -(1 << 63)),
    ):
        yield record(name, seed, (2, 16), 0.5)
    for name, stream in (
        ("stream_1", 1),
        ("stream_2", 2),
        ("stream_past_2_32", (1 << 32) + 1),
        ("stream_minus_1", -1),
        ("stream_smallest", -(1 << 63)),
        ("stream_largest", (1 << 63) - 1),
    ):
        yield record(name, 123456789, (2, 16), 0.5, stream=stream)
    yield record("fold_once", 9, (2, 16), 0.5, folds=(3,))
    yield record("fold_twice", 9, (2, 16), 0.5, folds=(3, 4))
    yield record("fold_twice_swapped", 9, (2, 16), 0.5, folds=(4, 3))
    yield record("fold_negative", -9, (2, 16), 0.5, folds=(-1, 1 << 40, 5))

    for p in (0.0, 1e-6, 0.001, 0.1, 0.5, 0.9, 1 - 1e-6, 1 - 2**-32, 1.0):
        yield record(f"p_{p!r}", 2024, (4, 16), p)
    yield rare("p_1e-06_dropped", 1e-6, False)
    yield rare("p_0.001_dropped", 0.001, False)
    yield rare("p_0.999999_kept", 1 - 1e-6, True)
    # bits = 0 needs luck; these show only that the threshold is what it should be
    for k in (0.5, 1.5, 2.5, 3.5):
        yield record(f"p_tie_{k}", 2024, (8,), k / 2**32)
    for lane in (6, 7):
        yield tie(f"p_tie_lane_{lane}_even_bits_up", lane, 0, 0.5)
        yield tie(f"p_tie_lane_{lane}_even_bits_down", lane, 0, -0.5)
        yield tie(f"p_tie_lane_{lane}_odd_bits_up", lane, 1, 0.5)
        yield tie(f"p_tie_lane_{lane}_odd_bits_down", lane, 1, -0.5)
    yield tie("p_tie_shared_kept", 0, 0, 0.5, noise_shape=(1,))
    yield tie("p_tie_shared_dropped", 0, 1, 0.5, noise_shape=(1,))

    matrix = (4, 3, 5)
    yield record("shared_first", 11, matrix, 0.5, noise_shape=(1, 3, 5))
    yield record("shared_middle", 11, matrix, 0.5, noise_shape=(4, 1, 5))
    yield record("shared_last", 11, matrix, 0.5, noise_shape=(4, 3, 1))
    yield record("shared_but_first", 11, matrix, 0.5, noise_shape=(4, 1, 1))
    yield record("shared_all", 11, matrix, 0.5, noise_shape=(1, 1, 1))
    yield record("shared_all_dropped", 0, matrix, 0.5, noise_shape=(1, 1, 1))
    yield record("shared_none", 11, matrix, 0.5, noise_shape=(None, 3, None))
    yield record("shared_inner_leading", 11, (2, 2, 3, 4), 0.5, noise_shape=(2, 1, 3, 4))

    yield record("shard_middle", 5, (2, 10), 0.5, whole=(6, 40), origin=(3, 13))
    yield record("shard_of_three", 5, (2, 2, 9), 0.5, whole=(5, 7, 30), origin=(2, 4, 5))
    yield record("shard_one_column", 5, (6, 1), 0.5, whole=(6, 40), origin=(0, 7))
    yield record(
        "shard_shared_middle", 5, (2, 2, 9), 0.5, noise_shape=(2, 1, 9),
        whole=(5, 7, 30), origin=(2, 4, 5),
    )  # fmt: skip
    yield record(
        "shard_shared_last", 5, (2, 2, 9), 0.5, noise_shape=(2, 2, 1),
        whole=(5, 7, 30), origin=(2, 4, 5),
    )  # fmt: skip
    # A local size of 1: the entry 1 shares, at index 0; the entry None keeps the origin's index.
    yield record(
        "shard_size_1_shared", 5, (1, 16), 0.5, noise_shape=(1, 16), whole=(5, 16), origin=(3, 0)
    )
    yield record(
        "shard_size_1_own", 5, (1, 16), 0.5, noise_shape=(None, 16), whole=(5, 16), origin=(3, 0)
    )

    at = 1 << 32
    yield record("rows_past_2_31", 6, (3, 8), 0.5, whole=(1 << 33, 8), origin=((1 << 31) - 1, 0))
    yield record("rows_past_2_32", 6, (3, 8), 0.5, whole=(1 << 33, 8), origin=(at - 1, 0))
    yield record(
        "rows_near_2_62", 6, (3, 2), 0.5, whole=(NEAR_2_62 + 2, 2), origin=(NEAR_2_62 - 1, 0)
    )
    yield record(
        "rows_past_2_32_by_flattening", 6, (2, 2, 8), 0.5,
        whole=(1 << 20, 1 << 20, 8), origin=(1 << 19, (1 << 19) + 3, 0),
    )  # fmt: skip
    yield record("cols_past_2_31", 6, (2, 18), 0.5, whole=(2, 1 << 33), origin=(0, (1 << 31) - 9))
    yield record("cols_past_2_32", 6, (2, 18), 0.5, whole=(2, 1 << 33), origin=(0, at - 9))
    yield record("cols_past_2_35", 6, (2, 18), 0.5, whole=(2, 1 << 36), origin=(0, (1 << 35) - 9))
    yield record("cols_near_2_62", 6, (1, 18), 0.5, whole=(1, 1 << 62), origin=(0, (1 << 62) - 21))
    yield record(
        "rows_and_cols_past_2_31", 6, (2, 9), 0.5, whole=(at, at >> 2), origin=(at - 2, 9999999)
    )

    yield record("drop_path", 3, (8, 4), 0.5, domain=DROP_PATH)
    yield record("drop_path_three_dimensions", 3, (8, 3, 2), 0.5, domain=DROP_PATH)
    yield record("drop_path_stream", 3, (16, 2), 0.25, stream=5, domain=DROP_PATH)
    yield record(
        "drop_path_shard", 3, (4, 2, 2), 0.5, domain=DROP_PATH, whole=(8, 3, 2), origin=(3, 1, 0)
    )
    yield record(
        "drop_path_shard_far", 3, (5, 2, 3), 0.5, domain=DROP_PATH,
        whole=(1 << 30, 1 << 10, 64), origin=((1 << 29) + 1, 100, 17),
    )  # fmt: skip


def attention(name, seed, shape, p, *, stream=0, origin=(0, 0, 0, 0)):
    """One vector of attention. The shape of the whole does not matter, so it is not stored."""
    shard = (numpy_mask.LIMITS, origin)  # which checks that these coordinates are allowed
    keep = numpy_mask.attention_keep_mask((seed, stream), shape, p, shard=shard)
    assert keep.size <= 128
    return {
        "name": name,
        "seed": seed,
        "stream": stream,
        "origin": list(origin),
        "shape": list(shape),
        "p": p,
        "threshold": numpy_mask.threshold(p),
        "keep": "".join("01"[int(k)] for k in keep.flat),
    }


def attention_tie(name, key, parity, half):
    """As tie(), for the decision on one of 32 keys."""
    for seed in range(1000):
        value = int(numpy_mask.attention_bits(seed, (1, 1, 1, 32)).flat[key])
        if value % 2 == parity:
            return attention(name, seed, (1, 1, 1, 32), (value + half) / 2**32)
    raise AssertionError


def attention_records():
    yield attention("attention_one_tile", 0, (1, 1, 1, 32), 0.5)
    yield attention("attention_three_tiles", 1, (1, 1, 1, 96), 0.5)
    yield attention("attention_small", 42, (2, 2, 3, 5), 0.5)
    yield attention("attention_one_key", 7, (2, 3, 4, 1), 0.5)

    for name, seed in (
        ("attention_seed_past_2_32", (1 << 32) + 5),
        ("attention_seed_minus_1", -1),
        ("attention_seed_smallest", -(1 << 63)),
    ):
        yield attention(name, seed, (1, 1, 2, 32), 0.5)
    for name, stream in (
        ("attention_stream_1", 1),
        ("attention_stream_past_2_32", (1 << 32) + 1),
        ("attention_stream_largest", (1 << 63) - 1),
    ):
        yield attention(name, 123456789, (1, 1, 2, 32), 0.5, stream=stream)

    for p in (0.0, 0.001, 0.1, 0.5, 0.9, 1 - 2**-32, 1.0):
        yield attention(f"attention_p_{p!r}", 2024, (1, 2, 2, 32), p)
    for key in (24, 31):
        yield attention_tie(f"attention_p_tie_key_{key}_even_bits_up", key, 0, 0.5)
        yield attention_tie(f"attention_p_tie_key_{key}_even_bits_down", key, 0, -0.5)
        yield attention_tie(f"attention_p_tie_key_{key}_odd_bits_up", key, 1, 0.5)
        yield attention_tie(f"attention_p_tie_key_{key}_odd_bits_down", key, 1, -0.5)

    for name, origin in (
        ("second_sequence", (1, 0, 0, 0)),
        ("second_head", (0, 1, 0, 0)),
        ("second_query", (0, 0, 1, 0)),
        ("second_key", (0, 0, 0, 1)),
        ("second_octet", (0, 0, 0, 8)),
        ("second_tile", (0, 0, 0, 32)),
        ("middle", (3, 5, 70, 43)),
        ("batch_past_2_31", ((1 << 31) - 1, 0, 0, 0)),
        ("batch_largest", ((1 << 32) - 2, 0, 0, 0)),
        ("head_largest", (0, (1 << 28) - 2, 0, 0)),
        ("query_past_2_31", (0, 0, (1 << 31) - 1, 0)),
        ("query_largest", (0, 0, (1 << 32) - 2, 0)),
        ("keys_past_2_31", (0, 0, 0, (1 << 31) - 5)),
        ("keys_past_2_32", (0, 0, 0, (1 << 32) - 5)),
        ("keys_past_2_34", (0, 0, 0, (1 << 34) - 5)),  # groups past 2^31
        ("keys_largest", (0, 0, 0, (1 << 35) - 9)),
        ("all_largest", ((1 << 32) - 2, (1 << 28) - 2, (1 << 32) - 2, (1 << 35) - 9)),
    ):
        yield attention(f"attention_{name}", 5, (2, 2, 2, 9), 0.5, origin=origin)


def main():
    source = "tests/data/make_mask_vectors.py, with tridrop.masks.numpy_mask"
    lists = [
        f'"{name}": [\n' + ",\n".join("  " + json.dumps(r) for r in rows) + "\n]"
        for name, rows in (("vectors", records()), ("attention", attention_records()))
    ]
    text = ",\n".join([f'"source": "{source}"', *lists])
    (HERE / "mask_vectors.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
