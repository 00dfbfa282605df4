"""Seeding: a function of seed, stream and index, without side effects."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrail
from vitrail.runtime import rng

CPU = torch.device("cpu")


def test_the_numbers_depend_on_the_seed_and_the_global_state_is_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draws = []
    for index in (0, 0, 1):
        with rng.seeded(1, "dropout", index, device=CPU):
            draws.append(torch.rand(3))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_generators_are_restored_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shape"), rng.seeded(1, "init", device=CPU):
        torch.rand(3).view(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_the_cpu_generators_of_other_devices_are_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    touched: list[Any] = []
    for module, name in (
        (torch.cuda, "manual_seed"), (torch.cuda, "manual_seed_all"), (torch.mps, "manual_seed"),
        (torch.xpu, "manual_seed_all"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, touched.append)
    with rng.seeded(1, "init", device=CPU):
        pass
    assert touched == []


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_devices_own_generator_is_seeded_and_restored(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = getattr(torch, kind)
    state: list[Any] = ["the user's"]
    monkeypatch.setattr(module, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(module, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(module, "manual_seed", lambda seed: state.__setitem__(0, seed))
    with rng.seeded(3, "dropout", 7, device=torch.device(kind)):
        assert state == [rng.derive_seed(3, "dropout", 7)]
    assert state == ["the user's"]


def test_no_two_files_draw_from_one_stream() -> None:
    files: dict[str, set[str]] = {}
    for path in Path(vitrail.__file__).parent.rglob("*.py"):
        call = r"rng\.(?:generator|derive_seed)\([^()]*?\"(\w+)\""
        for stream in re.findall(call, path.read_text(encoding="utf-8")):
            files.setdefault(stream, set()).add(path.name)
    assert {"explain", "ties", "shapes", "augment"} <= set(files)
    assert [stream for stream, where in files.items() if len(where) > 1] == []
