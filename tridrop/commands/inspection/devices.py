"""Published figures of GPUs, and the limits on a kernel's speed that follow from them.

A limit is the time per element that one resource alone would take: bytes over the memory bandwidth,
or instructions over the rate at which all multiprocessors execute them. The rate is taken at the
clock for which the vendor states the rate of matrix products, so that all limits refer to one
clock. The largest limit is the one that the kernel meets. Nothing here is measured, and latencies
and occupancy are not considered; a real kernel takes longer than each limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# NVIDIA's CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", results per
# clock and multiprocessor for compute capabilities 8.0, 9.0 and 10.0: integer multiplications, also
# with addition, 64; integer additions, comparisons, shifts, logic 64; exponentials and the like 16.
# Issue: four schedulers per multiprocessor, each with one warp instruction (32 threads) per clock,
# from the whitepapers below. A wide product (IMAD.WIDE) counts as one multiplication.
NVIDIA = {"issue": 128, "multiply": 64, "logic": 64, "special": 16}
# AMD's data sheet: 64 stream processors per compute unit, so 64 threads execute a vector
# instruction per clock. The rates of single instructions are only in LLVM's scheduling model of
# gfx940 (SISchedule.td): 32-bit multiplications at the full rate, exponentials and the like at a
# quarter.
AMD = {"issue": 64, "multiply": 64, "special": 16}


@dataclass(frozen=True)
class Device:
    """The published figures of a GPU."""

    name: str
    arch: str
    bandwidth: float
    """bytes of memory per second"""
    processors: int
    """multiprocessors or compute units"""
    clock: float
    """Hz: the clock for which the rate of matrix products is stated, `tensor` over `processors` and
    `products`"""
    tensor: float
    """dense multiplications and additions of bf16 and fp16 matrices per second"""
    products: int
    """the same per clock and processor"""
    rates: Mapping[str, int]
    """instructions of threads per clock and processor, for each unit"""
    source: str

    def times(self, units: Mapping[str, float], bytes_: float, flops: float) -> dict[str, float]:
        """Picoseconds per element for each limit.

        Args:
            units: instructions per element, for each unit.
            bytes_: bytes of memory per element.
            flops: operations of 16-bit matrix products per element.
        """
        clock = self.clock * self.processors
        found = {"bandwidth": bytes_ / self.bandwidth}
        found |= {name: n / (clock * self.rates[name]) for name, n in units.items()}
        if flops:
            found["tensor"] = flops / self.tensor
        return {name: seconds * 1e12 for name, seconds in found.items()}


DEVICES = (
    Device(
        "A100", "sm_80", 2.039e12, 108, 1.41e9, 312e12, 2048, NVIDIA,
        "NVIDIA A100 Tensor Core GPU Architecture (whitepaper); A100 data sheet, 80 GB SXM",
    ),
    Device(
        "H100", "sm_90", 3.35e12, 132, 1.83e9, 989.4e12, 4096, NVIDIA,
        "NVIDIA H100 Tensor Core GPU Architecture (whitepaper): 989.4 TFLOP/s of dense bf16 from "
        "528 tensor cores with 512 fused multiply-adds per clock, which gives the clock "
        "(the 67 TFLOP/s of fp32 are stated at 1.98 GHz); H100 data sheet, SXM: 3.35 TB/s",
    ),
    Device(
        "H200", "sm_90", 4.8e12, 132, 1.83e9, 989.4e12, 4096, NVIDIA,
        "NVIDIA H200 data sheet, SXM: 4.8 TB/s; the H100's processors and clock",
    ),
    Device(
        "B200", "sm_100", 8.0e12, 148, 1.86e9, 2250e12, 8192, NVIDIA,
        "NVIDIA Blackwell Architecture Technical Brief: 8 TB/s, 2.25 PFLOP/s of dense bf16, twice "
        "the H100's per clock and multiprocessor, which gives the clock (the 75 TFLOP/s of fp32 in "
        "the HGX B200 data sheet are stated at 1.98 GHz). NVIDIA does not state the number of "
        "multiprocessors there: 148 is from Chips and Cheese, Nvidia's B200 (2025)",
    ),
    Device(
        "MI300X", "gfx942", 5.3e12, 304, 2.1e9, 1307.4e12, 2048, AMD,
        "AMD Instinct MI300X data sheet; AMD CDNA 3 Architecture (whitepaper)",
    ),
)  # fmt: skip


def of(arch: str) -> list[Device]:
    """The devices of an architecture."""
    return [device for device in DEVICES if device.arch == arch]


class Room(NamedTuple):
    """The resources that a multiprocessor or compute unit has for its programs."""

    registers: int
    """registers of 32 bits; for AMD, vector registers"""
    shared: int
    """bytes of shared memory"""
    reserved: int
    """bytes of shared memory that each program takes in addition to its own"""
    threads: int
    warp: int
    """threads per warp"""


# NVIDIA: CUDA C++ Programming Guide, technical specifications by compute capability. AMD: CDNA 3
# ISA, four SIMD units of 512 vector registers (both kinds together) for up to eight waves.
ROOMS = {
    "sm_80": Room(65536, 164 << 10, 1 << 10, 2048, 32),
    "sm_90": Room(65536, 228 << 10, 1 << 10, 2048, 32),
    "sm_100": Room(65536, 228 << 10, 1 << 10, 2048, 32),
    "gfx942": Room(4 * 512 * 64, 64 << 10, 0, 2048, 64),
}
MOST_PROGRAMS = 32
SCHEDULERS = 4  # or SIMD units, each with a quarter of the registers and threads
GRANULE = 8  # registers per thread are allocated in multiples of this


def programs(arch: str, registers: int, shared: int, threads: int) -> int:
    """The programs that a processor holds at a time; 0 if one needs more than the processor has.

    Args:
        arch: a key of ``ROOMS``.
        registers: registers per thread.
        shared: bytes of shared memory per program.
        threads: threads per program.
    """
    room = ROOMS[arch]
    given = -(-max(registers, 1) // GRANULE) * GRANULE * room.warp
    warps = min(room.registers // SCHEDULERS // given, room.threads // SCHEDULERS // room.warp)
    found = SCHEDULERS * warps // -(-threads // room.warp)
    if shared:
        found = min(found, room.shared // (shared + room.reserved))
    return min(found, MOST_PROGRAMS)
