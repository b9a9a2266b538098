"""Who waits for whom: clients take turns, nobody is stuck at the head, and too much is refused at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craftor.serving.admission import PATIENCE, FairQueue, Load, Rejected, admit
from craftor.serving.gate import Gate
from craftor.serving.settings import Token
from craftor.serving.work import ImageRequest, Row


def row(client: str = "a", *, cost: float = 1.0, guidance: float = 7.5, encoded: bool = True) -> Row:
    request = ImageRequest("star", seed=0, guidance_scale=guidance)
    return Row(request, (), torch.zeros(1, 1, 1), client, cost, encoded=encoded)


def test_who_asks_for_many_waits_for_who_asks_for_one() -> None:
    queue = FairQueue()
    many = [row("many") for _ in range(5)]
    for item in many:
        queue.push(item)
    first = queue.pop(2)
    one = row("one")
    queue.push(one)
    assert first is many[0] and queue.pop(2) is one
    assert [queue.pop(2) for _ in range(5)] == [*many[1:], None]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 5)), min_size=1, max_size=40))
def test_a_backlogged_client_gets_its_share(asked: list[tuple[str, float]]) -> None:
    """Among clients with work left, what each has been served differs by less than two of the largest rows."""
    queue = FairQueue()
    for client, cost in asked:
        queue.push(row(client, cost=cost))
    left = {client: sum(c for name, c in asked if name == client) for client, _ in asked}
    served = dict.fromkeys(left, 0.0)
    largest = max(cost for _, cost in asked)
    while (item := queue.pop(2)) is not None:
        served[item.client] += item.cost
        left[item.client] -= item.cost
        backlogged = [served[client] for client in left if left[client] > 1e-9]
        if len(backlogged) > 1:
            assert max(backlogged) - min(backlogged) <= 2 * largest
    assert len(queue) == 0


def test_a_misfit_is_overtaken_but_not_for_ever() -> None:
    queue = FairQueue()
    wide = row("wide")
    queue.push(wide)
    for _ in range(2 * PATIENCE):
        queue.push(row("narrow", guidance=1.0, cost=0.0))
    overtook = 0
    while (item := queue.pop(1)) is not None:
        overtook += item.client == "narrow"
    assert overtook == PATIENCE and queue.pop(2) is wide


def test_a_row_that_does_not_suit_is_overtaken_but_not_for_ever() -> None:
    queue = FairQueue()
    other = row("other")
    queue.push(other)
    for _ in range(2 * PATIENCE):
        queue.push(row("same", cost=0.0))
    overtook = 0
    while (item := queue.pop(2, lambda item: item is not other)) is not None:
        overtook += item.client == "same"
    assert overtook == PATIENCE and queue.pop(2) is other


def test_rows_that_are_still_being_encoded_hold_nobody_up() -> None:
    queue = FairQueue()
    slow, ready = row(encoded=False), row()
    queue.push(slow)
    queue.push(ready)
    assert queue.pop(2) is ready and queue.pop(2) is None
    slow.encoded = True
    assert queue.pop(2) is slow


def test_dropped_rows_are_gone() -> None:
    queue = FairQueue()
    rows = [row() for _ in range(3)]
    for item in rows:
        queue.push(item)
    queue.drop(rows[:2])
    assert list(queue) == rows[2:]


@pytest.mark.parametrize("left", [0, 1])
def test_dropped_rows_cost_their_client_nothing(left: int) -> None:
    queue = FairQueue()
    others, given_up = [row("other") for _ in range(3)], [row("fickle") for _ in range(9)]
    for item in (*others, *given_up):
        queue.push(item)
    queue.drop(given_up[: len(given_up) - left])
    again = row("fickle")
    queue.push(again)
    turns = [queue.pop(2) for _ in range(4 + left)]
    assert turns[: 2 + 2 * left] == [others[0], *given_up[9 - left :], *others[1 : 1 + left], again]
    assert queue.pop(2) is None


def test_admission_counts_seconds_of_work() -> None:
    admit(Load(0, 9), 100, bound=1)  # nothing waits: any size may come
    admit(Load(0.5, 9), 0.5, bound=1)
    with pytest.raises(Rejected, match=r"2.0 s of work is waiting and this adds 3.0 s; the limit is 4 s") as refused:
        admit(Load(2, 0), 3, bound=4)
    assert refused.value.retry_after == 1 and refused.value.reason == "queue_full"
    with pytest.raises(Rejected, match="done in about 5.0 s, but the deadline is in 4.0 s"):
        admit(Load(2, 0), 1, bound=4, expected=5, deadline=4)
    admit(Load(2, 0), 1, bound=4, expected=5, deadline=6)


def test_a_token_pays_for_work_that_is_taken_and_for_no_other() -> None:
    gate = Gate({"a": Token(sha256="0" * 64, requests_per_minute=4, seconds_per_minute=10.0)})
    for _ in range(2):
        with pytest.raises(Rejected, match="the queue is full"), gate.charge("a", 8.0):
            raise Rejected("the queue is full", 1, "queue_full")
    with gate.charge("a", 8.0):
        pass
    with pytest.raises(Rejected, match="your limit of 10 seconds of work a minute is spent") as spent:
        gate.charge("a", 8.0).__enter__()
    assert 30 <= spent.value.retry_after <= 36, "6 s of work at 10 s a minute"
    with pytest.raises(Rejected, match="your limit of 4 requests a minute is spent"):
        gate.charge("a", 0.1).__enter__()


def test_one_large_request_passes_a_full_allowance_and_is_paid_off() -> None:
    gate = Gate({"a": Token(sha256="0" * 64, seconds_per_minute=10.0)})
    with gate.charge("a", 600.0):
        pass
    with pytest.raises(Rejected, match="seconds of work") as spent:
        gate.charge("a", 1.0).__enter__()
    assert spent.value.retry_after > 3000
