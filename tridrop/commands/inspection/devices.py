"""Published figures of GPUs, and which of its limits a kernel meets there.

A limit is a time an element, were nothing else in the way: bytes over the memory's bandwidth, or
instructions over the rate of what executes them on all multiprocessors at the boost clock. The
largest is the one that is met. Nothing here is measured, latencies and occupancy do not count, and
each limit is a bound that a real kernel stays above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# NVIDIA's CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", results a
# clock and multiprocessor for compute capabilities 8.0, 9.0 and 10.0: integer multiplications, also
# with addition, 64; integer additions, comparisons, shifts, logic 64; exponentials and the like 16.
# Issue: four schedulers a multiprocessor, each a warp instruction (32 threads) a clock, from the
# whitepapers below. A wide product (IMAD.WIDE) counts as one multiplication.
NVIDIA = {"issue": 128, "multiply": 64, "logic": 64, "special": 16}
# AMD's data sheet: 64 stream processors a compute unit, so 64 threads execute a vector instruction
# each clock. Of the rates of single instructions only LLVM's scheduling model of gfx940 tells
# (SISchedule.td): 32-bit multiplications at the full rate, exponentials and the like at a quarter.
AMD = {"issue": 64, "multiply": 64, "special": 16}


@dataclass(frozen=True)
class Device:
    """The published figures of a GPU."""

    name: str
    arch: str
    bandwidth: float
    """bytes of memory a second"""
    processors: int
    """multiprocessors or compute units"""
    clock: float
    """the boost clock in Hz: what the peak fp32 rate is stated at"""
    tensor: float
    """dense multiplications and additions of bf16 and fp16 matrices a second"""
    rates: Mapping[str, int]
    """threads' instructions a clock and processor, by unit"""
    source: str

    def times(self, units: Mapping[str, float], bytes_: float, flops: float) -> dict[str, float]:
        """Picoseconds an element by each limit.

        Args:
            units: instructions an element, by unit.
            bytes_: bytes of memory an element.
            flops: operations of 16-bit matrix products an element.
        """
        clock = self.clock * self.processors
        found = {"bandwidth": bytes_ / self.bandwidth}
        found |= {name: n / (clock * self.rates[name]) for name, n in units.items()}
        if flops:
            found["tensor"] = flops / self.tensor
        return {name: seconds * 1e12 for name, seconds in found.items()}


DEVICES = (
    Device(
        "A100", "sm_80", 2.039e12, 108, 1.41e9, 312e12, NVIDIA,
        "NVIDIA A100 Tensor Core GPU Architecture (whitepaper); A100 data sheet, 80 GB SXM",
    ),
    Device(
        "H100", "sm_90", 3.35e12, 132, 1.98e9, 989.4e12, NVIDIA,
        "NVIDIA H100 Tensor Core GPU Architecture (whitepaper); H100 data sheet, SXM: 3.35 TB/s, "
        "and 67 TFLOP/s of fp32, from which the clock",
    ),
    Device(
        "H200", "sm_90", 4.8e12, 132, 1.98e9, 989.4e12, NVIDIA,
        "NVIDIA H200 data sheet, SXM: 4.8 TB/s; the H100's processors",
    ),
    Device(
        "B200", "sm_100", 8.0e12, 148, 1.98e9, 2250e12, NVIDIA,
        "NVIDIA Blackwell Architecture Technical Brief: 8 TB/s, 2.25 PFLOP/s of dense bf16; HGX "
        "B200 data sheet: 75 TFLOP/s of fp32, from which the clock. NVIDIA names no number of "
        "multiprocessors there: 148 from Chips and Cheese, Nvidia's B200 (2025)",
    ),
    Device(
        "MI300X", "gfx942", 5.3e12, 304, 2.1e9, 1307.4e12, AMD,
        "AMD Instinct MI300X data sheet; AMD CDNA 3 Architecture (whitepaper)",
    ),
)  # fmt: skip


def of(arch: str) -> list[Device]:
    """The devices of an architecture."""
    return [device for device in DEVICES if device.arch == arch]
