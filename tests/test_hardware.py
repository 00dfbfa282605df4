"""Number formats of processors and devices."""

import pytest
import torch

from vitrail.runtime.hardware import (
    choose_precision,
    multiplies_bfloat16,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"neon": True}, False),
    ],
)
def test_bfloat16_is_for_processors_that_are_faster_with_it(
    found: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert multiplies_bfloat16(CPU) is expected
    assert choose_precision("auto", CPU) == (torch.bfloat16 if expected else torch.float32)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    assert choose_precision("float32", CPU) == torch.float32


def test_mps_computes_in_float32() -> None:
    assert choose_precision("auto", torch.device("mps")) == torch.float32
