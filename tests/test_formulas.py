"""The formulas of maps, worked by hand: two layers, three tokens (class token, 1 x 2 patches)."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vitrail.explain.formulas import (
    HeadFusion,
    accumulate_relevance,
    discard_lowest,
    fuse_heads,
    gradient_rollout_step,
    read_every_query,
    read_query,
    relevance_step,
    rollout,
)

Rows = list[list[float]]

# Each attention's rows sum to 1; times its gradient it gives the integers of PRODUCTS.
FIRST: Rows = [[0.5, 0.25, 0.25], [0, 1, 0], [0.5, 0, 0.5]]
SECOND: Rows = [[0.2, 0.4, 0.4], [0.5, 0.5, 0], [0, 0, 1]]
ATTENTIONS = [[FIRST, SECOND], [SECOND, FIRST]]
GRADIENTS: list[list[Rows]] = [
    [[[2, 4, -4], [1, 1, 1], [0, 0, 2]], [[5, -5, 5], [2, -4, 0], [3, 3, -1]]],
    [[[5, 5, 0], [0, 2, 0], [1, 1, 1]], [[0, 4, 4], [0, 1, 0], [-2, 0, -2]]],
]
PRODUCTS: list[list[Rows]] = [
    [[[1, 1, -1], [0, 1, 0], [0, 0, 1]], [[1, -2, 2], [1, -2, 0], [0, 0, -1]]],
    [[[1, 2, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 1], [0, 1, 0], [-1, 0, -1]]],
]


def batch(values: object) -> Tensor:
    """The hand-worked image, after another one that must not matter."""
    image = torch.tensor(values, dtype=torch.float32)
    return torch.stack([image.roll(1, dims=-1).flip(-2) * 2, image])


def layers(values: list[list[Rows]]) -> list[Tensor]:
    """One batch (B, A, T, T) a layer."""
    return [batch(layer) for layer in values]


def assert_flow(flow_BLTT: Tensor, *expected: Rows) -> None:
    """Compare the hand-worked image's flow, layer by layer."""
    torch.testing.assert_close(flow_BLTT[1], torch.tensor(expected, dtype=torch.float32))


def gradient_rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    ratio: float = 0,
    *,
    class_token: bool = False,
) -> Tensor:
    steps = map(gradient_rollout_step, attentions, gradients)
    return rollout([discard_lowest(step, ratio, class_token=class_token) for step in steps])


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    return accumulate_relevance(list(map(relevance_step, attentions, gradients)))


def test_the_gradients_are_those_worked_with() -> None:
    products = torch.tensor(ATTENTIONS) * torch.tensor(GRADIENTS)
    torch.testing.assert_close(products, torch.tensor(PRODUCTS).float())


@pytest.mark.parametrize(
    ("fusion", "first_row"),
    [("mean", [0.35, 0.325, 0.325]), ("max", [0.5, 0.4, 0.4]), ("min", [0.2, 0.25, 0.25])],
)
def test_heads_are_fused_entry_by_entry(fusion: HeadFusion, first_row: list[float]) -> None:
    fused_BTT = fuse_heads(batch([FIRST, SECOND]), fusion)
    torch.testing.assert_close(fused_BTT[1, 0], torch.tensor(first_row))


def test_rollout_by_hand() -> None:
    flow_BLTT = rollout([batch(FIRST), batch(SECOND)])
    assert_flow(
        flow_BLTT,
        [[0.75, 0.125, 0.125], [0, 1, 0], [0.25, 0, 0.75]],
        [[0.5, 0.275, 0.225], [0.1875, 0.78125, 0.03125], [0.25, 0, 0.75]],
    )


def test_rollout_divides_each_row_by_its_own_sum() -> None:
    flow_BLTT = rollout([batch([[0.5, 0.5, 1], [0, 1, 0], [1, 1, 1]])])
    assert_flow(flow_BLTT, [[1 / 2, 1 / 6, 1 / 3], [0, 1, 0], [1 / 4, 1 / 4, 1 / 2]])


def test_gradient_rollout_by_hand() -> None:
    # Heads' means, negatives zeroed: [[1, 0, .5], [.5, 0, 0], [0, 0, 0]] and
    # [[.5, 1.5, .5], [0, 1, 0], [0, 0, 0]]; then as any rollout.
    assert_flow(
        gradient_rollout(layers(ATTENTIONS), layers(GRADIENTS)),
        [[0.8, 0, 0.2], [1 / 3, 2 / 3, 0], [0, 0, 1]],
        [[3.4 / 7, 2 / 7, 1.6 / 7], [1 / 3, 2 / 3, 0], [0, 0, 1]],
    )


def test_gradient_rollout_discards_but_never_the_class_token() -> None:
    # Eight of nine entries go: of [[1, 0, .5], [.5, 0, 0], [0, 0, 0]] the 1 stays, and column 0.
    one, its = layers(ATTENTIONS)[:1], layers(GRADIENTS)[:1]
    kept = gradient_rollout(one, its, 0.9, class_token=True)
    assert_flow(kept, [[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 1]])
    all_same = gradient_rollout(one, its, 0.9)
    assert_flow(all_same, [[1, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_relevance_by_hand() -> None:
    # Negatives zeroed, then heads' means: [[1, .5, 1], [.5, .5, 0], [0, 0, .5]] and
    # [[.5, 1.5, .5], [0, 1, 0], [0, 0, .5]].
    assert_flow(
        relevance(layers(ATTENTIONS), layers(GRADIENTS)),
        [[1, 0.5, 1], [0.5, 0.5, 0], [0, 0, 0.5]],
        [[2.75, 3, 2.25], [1, 2, 0], [0, 0, 1.25]],
    )


def test_relevance_is_chefers_without_the_identity() -> None:
    # Equation 6 as printed: R + A R from R = I. The identity would be 1 on a queried patch, where
    # all else is a hundredth, and 1 / N everywhere for the mean of the patches.
    expected_BTT = torch.eye(3).expand(2, 3, 3)
    for attention_BATT, gradient_BATT in zip(layers(ATTENTIONS), layers(GRADIENTS), strict=True):
        step_BTT = (gradient_BATT * attention_BATT).clamp(min=0).mean(dim=1)
        expected_BTT = expected_BTT + step_BTT @ expected_BTT
    flow_BTT = relevance(layers(ATTENTIONS), layers(GRADIENTS))[:, -1]
    torch.testing.assert_close(flow_BTT, expected_BTT - torch.eye(3))
    grid_GJ = (1, 2)
    head, first, second, mean = (
        read_query(flow_BTT, grid_GJ, class_token=True, query=query, mean_pool=mean)[1, 0].tolist()
        for query, mean in ((None, False), ((0, 0), False), ((0, 1), False), (None, True))
    )
    assert head == [3, 2.25]  # the class token's row never had the identity's 1
    assert first == [2, 0]
    assert second == [0, 1.25]
    assert mean == [1, 0.625]


def test_relevance_keeps_small_values_exact() -> None:
    # Beside the identity's 1 float32 would round these to multiples of 1.2e-7.
    tiny = [torch.full((1, 1, 2, 2), 1e-7)]
    flow_BLTT = relevance(tiny, [torch.ones(1, 1, 2, 2)])
    torch.testing.assert_close(flow_BLTT, torch.full((1, 1, 2, 2), 1e-7), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("share", "class_token", "expected"),
    [
        (0.0, False, [[0.1, 0.2, 0.7], [0.05, 0.6, 0.35], [0.3, 0.3, 0.4]]),
        # Four of nine would go, but the fourth equals the lowest kept.
        (0.45, False, [[0, 0, 0.7], [0, 0.6, 0.35], [0.3, 0.3, 0.4]]),
        (0.45, True, [[0.1, 0, 0.7], [0.05, 0.6, 0.35], [0.3, 0.3, 0.4]]),
        (0.8, False, [[0, 0, 0.7], [0, 0.6, 0], [0, 0, 0]]),
        (0.999, True, [[0.1, 0, 0.7], [0.05, 0, 0], [0.3, 0, 0]]),
    ],
)
def test_the_lowest_entries_of_each_image_are_discarded(
    share: float, class_token: bool, expected: Rows
) -> None:
    attention_BTT = batch([[0.1, 0.2, 0.7], [0.05, 0.6, 0.35], [0.3, 0.3, 0.4]])
    kept_BTT = discard_lowest(attention_BTT, share, class_token=class_token)
    torch.testing.assert_close(kept_BTT[1], torch.tensor(expected))


def test_discarding_leaves_its_argument_alone() -> None:
    attention_BTT = batch(FIRST)
    discard_lowest(attention_BTT, 0.7, class_token=True)
    torch.testing.assert_close(attention_BTT, batch(FIRST), atol=0, rtol=0)


def test_a_query_is_a_row_and_the_class_token_is_left_out() -> None:
    flow_BLTT = torch.arange(2 * 3 * 7 * 7.0).view(2, 3, 7, 7)
    head = read_query(flow_BLTT, (2, 3), class_token=True, query=None)
    patch = read_query(flow_BLTT, (2, 3), class_token=True, query=(1, 0))
    assert torch.equal(head, flow_BLTT[:, :, 0, 1:].view(2, 3, 2, 3))
    assert torch.equal(patch, flow_BLTT[:, :, 4, 1:].view(2, 3, 2, 3))


def test_without_a_class_token_the_head_reads_every_row() -> None:
    flow_BTT = torch.arange(5 * 6 * 6.0).view(5, 6, 6)
    head = read_query(flow_BTT, (2, 3), class_token=False, query=None)
    patch = read_query(flow_BTT, (2, 3), class_token=False, query=(1, 0))
    assert torch.equal(head, flow_BTT.mean(1).view(5, 2, 3))
    assert torch.equal(patch, flow_BTT[:, 3].view(5, 2, 3))


def test_a_mean_beside_a_class_token_reads_the_patches_rows() -> None:
    flow_BTT = torch.arange(2 * 7 * 7, dtype=torch.float32).view(2, 7, 7)
    map_BGJ = read_query(flow_BTT, (2, 3), class_token=True, query=None, mean_pool=True)
    assert torch.equal(map_BGJ.flatten(1), flow_BTT[:, 1:, 1:].mean(dim=1))


@pytest.mark.parametrize("class_token", [True, False])
def test_every_query_is_each_query(class_token: bool) -> None:
    flow_BTT = torch.rand(5, 6 + class_token, 6 + class_token)
    every_BNGJ = read_every_query(flow_BTT, (2, 3))
    for index in range(6):
        query = divmod(index, 3)
        one_BGJ = read_query(flow_BTT, (2, 3), class_token=class_token, query=query)
        assert torch.equal(every_BNGJ[:, index], one_BGJ)
