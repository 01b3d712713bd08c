"""What is measured is what happened: operations, memory, and time in turns."""

import time

import torch
from torch import nn

from mumoe_fast.bench.measure import count_flops, describe_machine, interleaved_seconds, peak_bytes


def test_flops_count_a_multiply_add_as_two() -> None:
    x, layer = torch.randn(3, 5), nn.Linear(5, 7)
    assert count_flops(lambda: layer(x)) == 2 * 3 * 5 * 7


def test_flops_include_attention() -> None:
    q = torch.randn(2, 4, 6, 8)
    attend = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(q, q, q, is_causal=True)) == 2 * (2 * 2 * 4 * 6 * 6 * 8)


def test_peak_memory_is_the_most_held_at_once(device: torch.device) -> None:
    block = 1 << 20  # bytes; four-byte numbers

    def hold_two_of_three() -> None:
        first = torch.ones(block // 4, device=device)
        second = first + 1
        del first
        second.neg_()
        third = second * 2
        del second, third

    already = torch.ones(5 * block // 4, device=device)  # not counted: it was there before
    peak = peak_bytes(hold_two_of_three, device)
    assert 2 * block <= peak < 2 * block + block // 8
    del already


def test_peak_memory_sees_what_backward_holds(device: torch.device) -> None:
    x = torch.ones(1 << 18, device=device, requires_grad=True)

    def square_four_times() -> None:
        y = x
        for _ in range(4):
            y = y * y
        y.sum().backward()

    assert peak_bytes(square_four_times, device) >= 4 * (1 << 20)


def test_actions_take_turns_and_are_all_counted() -> None:
    calls: list[str] = []

    def act(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    actions = {"slow": lambda: act("slow", 0.02), "fast": lambda: act("fast", 0.001)}
    seconds = interleaved_seconds(actions, bursts=5, repeats=2)
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 5, "fast": 5}
    assert min(seconds["slow"]) >= 0.02
    assert min(seconds["fast"]) < 0.02
    assert calls[:2] == ["slow", "fast"], "one call each goes ahead, uncounted"
    bursts = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert all(first == second for first, second in bursts)
    assert all({a[0], b[0]} == {"slow", "fast"} for a, b in zip(bursts[::2], bursts[1::2], strict=True))


def test_a_slow_machine_is_measured_three_times() -> None:
    seconds = interleaved_seconds({"slow": lambda: time.sleep(0.01)}, bursts=50, repeats=1, limit=0.02)
    assert len(seconds["slow"]) == 3


def test_the_machine_is_named() -> None:
    facts = dict(describe_machine(torch.device("cpu")))
    assert torch.__version__ in facts["software"]
    assert facts["CPU"]
