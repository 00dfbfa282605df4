"""The benchmark: rounds, worker processes, what is measured, tables, growth, errors."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import bench
from speed import compare as compare_module
from speed import growth, ours, peers
from speed.compare import Bench, Comparison, compare, sizes
from speed.growth import Point, exponent, growth_json, measure_growth, plot_growth
from speed.jobs import (
    PEERS,
    PEERS_FOR,
    TITLES,
    Amounts,
    Job,
    Recipe,
    jobs_of,
    plain,
    why_unsupported,
)
from speed.report import below, comparison_json, comparison_table
from speed.worker import peak_mib
from speed.workers import BenchError, Worker, command, interleave, python_of, started
from vitrail.cli import guarded
from vitrail.config.presets import PRESETS, get_preset
from vitrail.config.settings import AugmentConfig, ModelConfig, TrainingConfig
from vitrail.data.datasets import Loaded
from vitrail.errors import ConfigError
from vitrail.weights.formats.convert import convert

BENCHMARKS = Path(ours.__file__).parents[1]

TINY = Recipe(
    ModelConfig(
        image_size=15, patch_size=5, embed_dim=6, n_layers=2, n_attention_heads=3, forward_mul=1.5,
        n_classes=7,
    ),
    AugmentConfig(crop_padding=1),
    TrainingConfig(batch_size=4, epochs=2, precision="float32"),
)  # fmt: skip

FAKE = """
import json, sys
spec = json.loads(sys.argv[1])
system, workload = spec["system"], spec["workload"]
if system == "vit-pytorch":
    sys.exit("ModuleNotFoundError: No module named 'vit_pytorch'")
print("a library says hello", file=sys.stderr)
operations = {"ours": [2e6, 6e6], "plain": [3e6, 9e6]}
print(json.dumps({"rest_mib": 10, "operations": operations}), flush=True)
rates = {"vitrail": 500, "reference": 200, "timm": 400, "transformers eager": 300}
rates["transformers sdpa"] = 1
if spec["precision"] == "bfloat16":
    rates |= {"vitrail": 900, "reference": 250, "timm": 100, "transformers eager": 700}
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if system == "transformers sdpa" and number == 2:
        sys.exit("RuntimeError: out of memory")
    if system == "torch":
        speed = 1e9 if request["size"][0] == request["size"][1] else 5e9
        done = speed * (BF16 if request["precision"] == "bfloat16" else 1)
    else:
        done = rates[system] * 2
    answer = {"done": done, "seconds": 1 if system == "torch" else 2, "peak_mib": 77 + number}
    print(json.dumps(answer), flush=True)
"""
"""A worker that answers at once, without torch: rates and a peer's failures are made up."""


def fake(bf16: float) -> Any:
    """Replace the workers' command lines; bfloat16 products are ``factor`` times as fast."""

    def fake_command(spec: Mapping[str, Any], python: Path | None = None) -> list[str]:
        words = json.dumps(spec, default=str)
        return [sys.executable, "-S", "-c", FAKE.replace("BF16", str(bf16)), words]

    return fake_command


@pytest.fixture
def beside(tmp_path: Path) -> Bench:
    """A comparison with all peers, of training steps and epochs."""
    recipe = Recipe().changed(batch_size=8)
    amounts = Amounts(rounds=3)
    return Bench(
        recipe, workloads=("step", "epoch"), amounts=amounts, python=Path("python"),
        reference_path=tmp_path, data_path=tmp_path,
    )  # fmt: skip


# Rounds and processes


def test_contestants_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def contestant(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    rates = interleave({"a": contestant("a"), "b": contestant("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert rates == {"a": [3, 5], "b": [4, 6]}


def test_a_worker_that_fails_to_start_is_reported_with_its_error() -> None:
    lost: dict[str, str] = {}
    commands = {
        name: fake(1)(Job(name, "float32", "step").spec(TINY)) for name in ("timm", "vit-pytorch")
    }
    with started(commands, lambda name, error: lost.update({name: str(error)})) as workers:
        assert workers["timm"].rate(1) == 400
        assert workers["timm"].peak_mib == 77
        assert list(workers) == ["timm"]
    assert lost == {"vit-pytorch": "ModuleNotFoundError: No module named 'vit_pytorch'"}


def test_a_worker_killed_between_two_requests_is_reported() -> None:
    with Worker([sys.executable, "-S", "-c", "print('{}')"]) as worker:
        worker.wait_ready()
        worker._process.wait()
        with pytest.raises(BenchError, match="ended with code 0"):
            worker.rate(1)


def test_peak_memory_excludes_the_parent_process() -> None:
    held = torch.ones(40 * 2**18)
    code = (
        "import sys, torch; sys.path.append(sys.argv[1]); "
        "from speed.worker import peak_mib; before = peak_mib('cpu');"
        "held = torch.ones(40 * 2**18); print(peak_mib('cpu') - before, before)"
    )
    peaks = subprocess.run(
        [sys.executable, "-c", code, BENCHMARKS], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(peaks[0]) >= 20
    assert float(peaks[1]) < peak_mib("cpu")
    del held


# The comparison


def test_all_systems_are_compared(beside: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "command", fake(3))
    found = compare(beside)
    rates = {row.job: row.rate for row in found.rows}
    assert rates[Job("vitrail", "bfloat16", "step")] == 900
    assert rates[Job("timm", "float32", "step")] == 400
    assert {job.system for job in rates if job.workload == "step"} == {
        "vitrail", "reference", "timm", "transformers eager",
    }  # fmt: skip
    assert all(len(row.rates) == 3 for row in found.rows)
    assert all(row.peak_mib == 77 + 3 and row.rest_mib == 10 for row in found.rows)
    ratios = comparison_json(found)["ours_over_best_of"]["step"]
    assert ratios == {"reference": 900 / 250, "timm": 900 / 400, "transformers eager": 900 / 700}
    remarks = "\n".join(found.remarks)
    assert "vit-pytorch (bfloat16) was skipped in step: ModuleNotFoundError" in remarks
    assert "transformers sdpa (float32) was skipped in step: RuntimeError: out of mem" in remarks
    assert remarks.count("transformers sdpa (float32)") == 1
    assert "reference was skipped in epoch: CIFAR-10, which it loads itself" in remarks


def test_shares_are_operations_over_the_speed_of_products(
    beside: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "command", fake(3))
    beside = replace(beside, workloads=("step", "inference"))
    rows = {row.job: row for row in compare(beside).rows}
    assert rows[Job("vitrail", "float32", "step")].of_product == pytest.approx(500 * 6e6 / 5e9)
    assert rows[Job("vitrail", "bfloat16", "step")].of_peak == pytest.approx(900 * 6e6 / 15e9)
    assert rows[Job("vitrail", "float32", "inference")].of_peak == pytest.approx(500 * 2e6 / 5e9)
    assert rows[Job("timm", "float32", "step")].of_product == pytest.approx(400 * 9e6 / 5e9)


def test_a_slow_bfloat16_is_skipped_with_a_note_unless_requested(
    beside: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "command", fake(0.1))
    found = compare(replace(beside, python=None))
    assert {row.job.precision for row in found.rows} == {"float32"}
    assert found.remarks == [
        "bfloat16 was skipped: its matrix products run at 0.5 GFLOP/s here, float32 at 5 "
        "(--precision bfloat16 measures it anyway)"
    ]
    asked = replace(beside, python=None, recipe=beside.recipe.changed(precision="bfloat16"))
    assert {row.job.precision for row in compare(asked).rows} == {"bfloat16"}


def test_a_failure_of_vitrail_itself_ends_the_benchmark(
    beside: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = FAKE.replace('"vit-pytorch"', '"vitrail"')
    monkeypatch.setattr(
        compare_module,
        "command",
        lambda spec, _=None: [
            sys.executable,
            "-S",
            "-c",
            broken.replace("BF16", "1"),
            json.dumps(spec, default=str),
        ],
    )
    with pytest.raises(BenchError, match=r"step \(float32\) cannot be measured: ModuleNotFound"):
        compare(replace(beside, python=None))


def test_the_table_is_complete(beside: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "command", fake(3))
    found = compare(replace(beside, workloads=("step",)))
    page = io.StringIO()
    Console(width=80, file=page).print(comparison_table(found, "a title"))
    lines = [line.split() for line in page.getvalue().splitlines() if " " in line.strip(" ─")]
    assert lines[0] == ["a", "title"]
    assert lines[2] == ["TRAINING", "STEP"]
    first, last = lines[3], lines[-1]
    assert first[:2] == ["reference,", "float32"]
    assert last == ["vitrail,", "bfloat16", "900", "±0%", "4.50", "36%", "36%", "80"]
    text = "\n".join(below(found, sizes(found)))
    assert f"({8 * 65} x 128 x 384)" in text
    assert (
        "Matrix products in bfloat16, GFLOP/s (best round): 15 at 520 x 128 x 384, 3 at 2048"
        in text
    )


def test_the_operations_of_a_class_token_are_counted() -> None:
    """Also with pool mean, which does not read it."""
    tokens = {}
    for pool, class_token in (("cls", None), ("mean", None), ("mean", True)):
        model = replace(TINY.model, pool=pool, class_token=class_token)  # type: ignore[arg-type]
        own = sizes(Comparison(Bench(replace(TINY, model=model))))["own"]
        tokens[pool, class_token] = own[0] // TINY.training.batch_size
    assert tokens == {("cls", None): 10, ("mean", None): 9, ("mean", True): 10}


def test_without_peers_the_table_says_how_to_get_them() -> None:
    assert any(
        "benchmarks/peers.sh" in line for line in below(Comparison(Bench(TINY)), {"own": (1, 2, 3)})
    )


def test_the_reference_runs_first_with_its_own_training_and_testing_loops() -> None:
    chosen = {"reference": None, "timm": "why not"}
    formats = ("float32", "bfloat16")
    jobs = [(job.system, job.precision) for job in jobs_of("test", formats, chosen)]
    assert jobs == [("reference", "float32"), ("vitrail", "float32"), ("vitrail", "bfloat16")]
    assert len(jobs_of("step", formats, chosen)) == 4


def test_a_shape_that_the_reference_does_not_support_is_skipped() -> None:
    assert "integer forward_mul" in str(why_unsupported("reference", "step", TINY.model))
    assert why_unsupported("timm", "step", TINY.model) is None
    assert "CIFAR-10 only" in str(
        why_unsupported("reference", "test", replace(TINY.model, forward_mul=2))
    )


# What is measured: our own work, in this process


@pytest.mark.parametrize("workload", [*TITLES, "attention", "predict"])
def test_our_workloads_run_and_count_images(workload: str, tmp_path: Path) -> None:
    more = {"device": "cpu", "images": 11, "folder": tmp_path, "data_path": tmp_path}
    measure, _ = ours.build(Job("vitrail", "float32", workload).spec(TINY, **more))
    done = {"test": 2 * 11, "predict": 2}.get(workload, 2 * 4)
    assert measure(2) == done


def test_training_can_run_for_any_number_of_steps() -> None:
    spec = Job("vitrail", "float32", "step").spec(TINY, device="cpu")
    ours.OneBatch.steps_per_epoch, kept = 3, ours.OneBatch.steps_per_epoch
    try:
        measure, _ = ours.build(spec)
        assert measure(2 * 3 + 5) == 11 * 4
    finally:
        ours.OneBatch.steps_per_epoch = kept


def test_operations_of_products_do_not_depend_on_repeats() -> None:
    spec = Job("torch", "float32", "product").spec(TINY, device="cpu")
    measure, about = ours.build(spec)
    done = measure({"precision": "float32", "size": (5, 7, 3)})
    assert done % (2 * 5 * 7 * 3) == 0
    assert done > 0
    assert set(about["operations"]) == {"ours", "plain"}


def test_the_references_weights_give_its_own_test_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = reference_weights()
    torch.save(state, tmp_path / "w.pt")
    found = convert(state, n_attention_heads=3)
    model = ours.VisionTransformer(found.config)
    model.load_state_dict(found.weights)
    images = ours.noise(TINY.config(), 9)
    monkeypatch.setattr(ours, "load_data", lambda *_, **__: Loaded({"test": images}))
    expected_BY = model.eval()(images.raw_BCHW / 127.5 - 1).detach()
    spec = Job("vitrail", "float32", "test").spec(
        TINY, device="cpu", images=5, folder=tmp_path, data_path=tmp_path
    )
    for shift, lowest, highest in ((0.0, 0, 1e-6), (0.4, 1e-3, 1)):
        expected_BY[:, 0] += shift
        torch.save(expected_BY[:5], tmp_path / "logits.pt")
        measure, about = ours.build(spec)
        assert lowest <= about["largest_difference"] <= highest
        assert measure(1) == 5


def reference_weights() -> dict[str, torch.Tensor]:
    """Weights of the reference's layout, for TINY's shape."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.conv1.weight": (6, 3, 5, 5), "embedding.conv1.bias": (6,),
        "embedding.pos_embedding": (1, 9, 6), "embedding.cls_token": (1, 1, 6),
        "norm.weight": (6,), "norm.bias": (6,),
        "classifier.fc1.weight": (6, 6), "classifier.fc1.bias": (6,),
        "classifier.fc2.weight": (7, 6), "classifier.fc2.bias": (7,),
    }  # fmt: skip
    square = [f"attention.{name}" for name in ("queries", "keys", "values", "out_projection")]
    for layer in range(2):
        sizes_of = dict.fromkeys(square, (6, 6)) | {"fc1": (9, 6), "fc2": (6, 9)}
        for name, shape in (sizes_of | {"norm1": (6,), "norm2": (6,)}).items():
            shapes[f"encoder.{layer}.{name}.weight"] = shape
            shapes[f"encoder.{layer}.{name}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# What is measured: the peers


@pytest.mark.parametrize("workload", ["step", "inference", "explanation"])
def test_workloads_of_a_peer_run_and_count_images(
    workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "class VisionTransformer(torch.nn.Module):\n"
        "    def __init__(self, n_layers, n_attention_heads, n_classes, **rest):\n"
        "        super().__init__()\n"
        "        self.shape = n_layers, n_attention_heads\n"
        "        self.head = torch.nn.LazyLinear(n_classes)\n"
        "        self.head(torch.zeros(1, 3 * rest['image_size'] ** 2))\n"
        "    def forward(self, x):\n"
        "        layers, heads = self.shape\n"
        "        attention = torch.full((layers * len(x), heads, 10, 10), 0.1)\n"
        "        return self.head(x.flatten(1)), attention\n"
    )
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "model", raising=False)
    spec = Job("reference", "float32", workload).spec(TINY, device="cpu")
    measure, about = peers.build({**spec, "reference_path": tmp_path})
    monkeypatch.delitem(sys.modules, "model")
    assert about == {"version": "its own code"}
    assert measure(2) == 2 * 4


def test_the_peers_rollout_is_ours() -> None:
    from vitrail.explain.formulas import rollout

    attention_BLATT = torch.rand(2, 3, 5, 10, 10).softmax(dim=-1)
    flow_BLTT = rollout(attention_BLATT.mean(dim=2).unbind(1))
    torch.testing.assert_close(peers.rollout(attention_BLATT.unbind(1)), flow_BLTT[:, -1, 0, 1:])


def test_a_peer_runs_by_path_and_isolated_in_its_own_interpreter() -> None:
    words = command({"system": "timm"}, Path("theirs"))
    assert words == ["theirs", "-I", peers.__file__, '{"system": "timm"}']


@pytest.mark.slow
def test_a_missing_peer_is_reported_by_its_own_interpreter() -> None:
    spec = Job("vit-pytorch", "float32", "step").spec(TINY, device="cpu")
    words = command(spec, Path(sys.executable))
    outcome = subprocess.run(words, capture_output=True, text=True, check=False, input="")
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("importlib.metadata.PackageNotFoundError"), outcome.stderr


def test_every_peer_has_a_model_and_its_workloads() -> None:
    assert set(peers.MODELS) == set(PEERS)
    assert set(peers.WORKLOADS) == set(PEERS_FOR) == set(TITLES)


def test_a_plain_model_has_the_shape_of_the_other_systems() -> None:
    model = get_preset("quick").model
    assert plain(model) == ModelConfig(embed_dim=64, n_layers=4, dropout=0.0)
    for preset in PRESETS:
        assert plain(get_preset(preset).model).stem == "patch"


# Growth


def test_growth_is_measured_along_every_axis(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int, int]] = []

    def record(spec: dict[str, Any]) -> list[str]:
        model = spec["config"]["model"]
        batch = spec["config"]["training"]["batch_size"]
        seen.append((spec["workload"], model["patch_size"], model["n_layers"], batch))
        return fake(1)({**spec, "system": "vitrail"})

    monkeypatch.setattr(growth, "command", record)
    recipe = Recipe().changed(n_layers=5, batch_size=9)
    points = measure_growth(recipe, device="cpu", rounds=1, quick=True)
    tokens = [p for p in points if (p.axis, p.series) == ("tokens", "attention")]
    assert [point.value for point in tokens] == [16, 64, 256]
    assert [point.seconds for point in tokens] == [9 / 500] * 3
    assert [point.work_mib for point in tokens] == [78 - 10] * 3
    assert [p.seconds for p in points if p.axis == "images"] == [1, 2, 4]
    assert {("step", 2, 5, 9), ("attention", 4, 12, 9), ("inference", 4, 5, 128)} <= set(seen)
    plot_growth(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_exponent_of_growth() -> None:
    points = [Point("images", n, "predict", 0.3 * n**1.5, 0) for n in (3, 10, 70)]
    assert exponent(points, "seconds") == pytest.approx(1.5)
    assert growth_json(points)["exponents"] == {"images, predict": pytest.approx(1.5)}


# The command


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--growth --peers x", "peers cannot be combined with growth"),
        ("--growth --workloads step", "workloads cannot be combined with growth"),
        ("--plot x.png", "plot requires growth"),
        ("--rounds 0", "rounds is 0"),
        ("--peers nowhere", "bash benchmarks/peers.sh nowhere"),
        ("--preset nothing", "unknown preset 'nothing'"),
        ("--roundz 3", "did you mean '--rounds'"),
        ("--image_size 32 64", "benchmark needs square images"),
    ],
)
def test_unmeasurable_settings_are_refused(
    words: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(bench.command, ["--device", "cpu", *words.split()]) == 2
    assert part in capsys.readouterr().err


def test_the_interpreter_of_an_environment_is_found(tmp_path: Path) -> None:
    assert python_of(Path(sys.executable)) == Path(sys.executable)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    assert python_of(tmp_path) == tmp_path / "bin/python"


def test_recipes_change_fields_of_any_section() -> None:
    changed = TINY.changed(n_layers=9, batch_size=3)
    assert (changed.model.n_layers, changed.training.batch_size) == (9, 3)
    assert changed.augment == TINY.augment
    with pytest.raises(ConfigError, match="square"):
        Recipe(ModelConfig(image_size=(8, 12))).config()


@pytest.mark.slow
def test_the_command_measures_in_real_processes(capfd: pytest.CaptureFixture[str]) -> None:
    words = (
        "--device cpu --embed_dim 8 --n_layers 1 --n_attention_heads 2 --patch_size 16 "
        "--batch_size 3 --precision float32 --workloads inference --rounds 2 --quick"
    )
    assert guarded(bench.command, words.split()) == 0
    captured = capfd.readouterr()
    assert "benchmarks/peers.sh" in captured.out
    result = json.loads(captured.out.splitlines()[-1])
    (row,) = result["rows"]
    assert (row["system"], row["workload"], len(row["rates"])) == ("vitrail", "inference", 2)
    assert row["peak_mib"] > row["rest_mib"] > 50
    assert 0 < row["of_peak"] <= row["of_product"]
    assert result["config"]["model"]["embed_dim"] == 8
