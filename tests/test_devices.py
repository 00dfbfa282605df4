"""Which number format a processor has, also where torch's private names are gone."""

import types
from typing import Any

import pytest
import torch

from vitrail.runtime.devices import choose_precision, multiplies_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"get_capabilities": lambda: {"avx512_bf16": True, "amx_bf16": False}}, True),
        ({"get_capabilities": lambda: {"avx512_bf16": False, "amx_bf16": True}}, True),
        ({"get_capabilities": lambda: {"avx512_f": True, "avx512_bf16": False}}, False),
        ({"get_capabilities": lambda: {"neon": True}}, False),
        ({"_is_avx512_bf16_supported": lambda: True}, True),
        ({"_is_amx_tile_supported": lambda: True}, True),
        ({"_is_avx512_bf16_supported": bool, "_is_amx_tile_supported": bool}, False),
        ({}, False),
    ],
)
def test_the_processor_is_asked_by_whatever_names_torch_has(
    names: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace(**names))
    assert multiplies_bfloat16(CPU) is expected
    assert choose_precision("auto", CPU) == (torch.bfloat16 if expected else torch.float32)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float32", CPU) == torch.float32


@pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities")
    or not hasattr(torch.cpu, "_is_avx512_bf16_supported"),
    reason="this torch has one of the two ways only",
)
def test_both_ways_to_ask_give_one_answer_for_this_processor() -> None:
    private = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert multiplies_bfloat16(CPU) is private


def test_mps_computes_in_float32() -> None:
    assert choose_precision("auto", torch.device("mps")) == torch.float32
