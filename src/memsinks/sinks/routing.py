"""Document id -> open sink blocks, by integer arithmetic alone.

The hash cuts the blocks that are not reserved into as many banks as a document opens blocks and picks one block of each bank, so
a document always opens distinct blocks. The result is the same on every device and rank, eager and compiled."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memsinks.sinks.config import SinkConfig

_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The splitmix64 hash of int64 values, as int64 bit patterns (splitmix64(0) = 0xe220a8397b1dcdaf).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + _signed(_INCREMENT)
    x = (x ^ shift(x, 30)) * _signed(_FIRST)
    x = (x ^ shift(x, 27)) * _signed(_SECOND)
    return x ^ shift(x, 31)


def _splitmix64_int(x: int) -> int:
    x = (x + _INCREMENT) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def bank_keys(config: SinkConfig, layers: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """One hash key for each of `count` banks (or neurons) of each layer, from the seed; int64 bit patterns [layers, count]."""
    if torch.compiler.is_compiling():
        return _bank_keys(config.seed, config.per_layer, layers, count, device)
    return _known_bank_keys(config.seed, config.per_layer, layers, count, device)


def _bank_keys(seed: int, per_layer: bool, layers: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    start = _splitmix64_int(seed)
    bases = [_splitmix64_int(start ^ (layer + 1 if per_layer else 0)) for layer in layers]
    keys = [[_signed(_splitmix64_int(base ^ (index + 1))) for index in range(count)] for base in bases]
    return torch.tensor(keys, dtype=torch.int64, device=device)


_known_bank_keys = functools.lru_cache(maxsize=64)(_bank_keys)
"""Python takes a microsecond for each key, of which Bernoulli routing has one a neuron. Nobody writes into the tensors."""


HASH_VERSION = 1
"""Changes whenever the same id would open other blocks; part of a checkpoint's fingerprint."""
