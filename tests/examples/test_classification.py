"""What both image examples stand on: which samples a run sees, what is done to them, and what is held out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mumoe_fast.examples._classification import (
    Augmentation,
    Classification,
    Dataset,
    Order,
    check_labels,
    held_out_rows,
    shifted,
)
from mumoe_fast.examples._features import Rows


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(10, seed=0)
    seen = order.at(range(30)).view(3, 10)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 3
    assert not torch.equal(seen[0], Order(10, seed=1).at(range(10)))


@pytest.mark.parametrize("pieces", [(4, 4, 4, 4, 4), (7, 7, 6), (1, 19), (20,)])
def test_the_order_does_not_depend_on_how_it_is_asked_for(pieces: tuple[int, ...]) -> None:
    """Also across epochs, and by a run that starts in the middle."""
    expected = Order(6, seed=3).at(range(20))
    start, found = 0, []
    for length in pieces:
        found.append(Order(6, seed=3).at(range(start, start + length)))
        start += length
    assert torch.equal(torch.cat(found), expected)


def test_shifts_crop_the_image_that_is_padded_by_its_edge() -> None:
    images = torch.randn(40, 2, 5, 6)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    places = set()
    for image, source in zip(shifted(images, 2, range(40), seed=0), padded):
        crops = [(y, x) for y in range(5) for x in range(5) if torch.equal(source[:, y : y + 5, x : x + 6], image)]
        assert crops
        places.update(crops)
    assert {y for y, _ in places} == {x for _, x in places} == set(range(5))


def test_mixup_mixes_images_and_targets_in_one_share() -> None:
    images, targets = torch.eye(4).view(4, 1, 2, 2), torch.eye(4)
    mixed, mixed_targets = Augmentation(mixup=0.5)(images, targets, range(8, 12), seed=0)
    torch.testing.assert_close(mixed.flatten(1), mixed_targets)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(4))
    assert 0 < mixed_targets[0, 3] < 1
    other, _ = Augmentation(mixup=0.5)(images, targets, range(12, 16), seed=0)
    assert not torch.equal(mixed, other)


def test_a_batch_depends_on_the_samples_numbers_alone() -> None:
    """So micro-batches, in one process or several, are parts of the whole one."""
    data = Dataset(
        Rows(torch.randn(9, 1, 6, 6), torch.arange(9) % 3),
        Rows(torch.zeros(1, 1, 6, 6), torch.tensor([0])),
        ("a", "b", "c"),
    )
    task = Classification(nn.Linear(1, 1), data, augmentation=Augmentation(shift=2), seed=5)
    torch.manual_seed(1)
    x, targets = task.batch(range(4, 16))
    torch.manual_seed(2)
    parts = [task.batch(range(4, 10)), task.batch(range(10, 16))]
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    assert not torch.equal(task.batch(range(5, 17))[0], x)


def test_accuracy_counts_what_is_right() -> None:
    """Samples that are their own logits: 7 of 10 are labelled as their largest."""
    logits = torch.randn(10, 4)
    labels = logits.argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    held_out = Rows(logits, labels)
    task = Classification(nn.Linear(1, 1), Dataset(held_out, held_out, ("a", "b", "c", "d")), evaluated=2)
    figures = task.evaluate(nn.Identity(), complete=True)
    assert figures["accuracy"] == pytest.approx(0.7)
    assert figures["held-out loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert task.evaluate(nn.Identity(), complete=False)["accuracy"] == 0.5  # the first and the last


def test_the_last_fifth_of_every_class_is_held_out() -> None:
    labels = torch.tensor([0, 1] * 10 + [2])
    mask = held_out_rows(labels)
    assert mask.nonzero().flatten().tolist() == [16, 17, 18, 19]  # of the third, with one sample, none


def test_data_without_held_out_samples_are_refused() -> None:
    some, none = Rows(torch.ones(3, 2), torch.arange(3)), Rows(torch.ones(0, 2), torch.arange(0))
    with pytest.raises(ValueError, match=r"data: expected samples to learn from and samples held out.*got 3 and 0"):
        Dataset(some, none, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3), r"data: expected labels \(4,\) in int64, of at least one row, got \(3,\) in torch.float32"),
        (torch.zeros(5, dtype=torch.int64), r"labels \(4,\).*got \(5,\)"),
        (None, "got NoneType"),
        (torch.tensor([0, 1, -1, 2]), "labels from 0 on, got -1"),
    ],
)
def test_labels_that_are_none_are_refused(labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels("data", labels, 4)
