import torch

from jepa_scale.losses.infonce import NO_KEY
from jepa_scale.objectives.grid.queue import TargetQueue

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, 2)


def enter(queue: TargetQueue, *micros: tuple[list[int], list[int]], good=GOOD) -> None:
    for values, keys in micros:
        queue.observe(rows(*values), torch.tensor(keys, dtype=torch.int64), capacity=3)
    queue.update(good)


def test_the_newest_of_each_key_are_kept_in_the_order_of_the_global_batch():
    queue = TargetQueue(5, 2)
    assert queue.keys.tolist() == [NO_KEY] * 5
    enter(queue, ([10, 20], [1, 2]), ([30], [3]))
    assert queue.keys.tolist() == [1, 2, 3, NO_KEY, NO_KEY]
    enter(queue, ([21, 40], [2, 4]))  # 2 again, newer
    assert queue.keys.tolist() == [2, 4, 1, 3, NO_KEY]
    assert queue.rows[:4, 0].tolist() == [21, 40, 10, 30]
    enter(queue, ([50, 60, 70], [5, 6, 7]))  # the oldest go
    assert queue.keys.tolist() == [5, 6, 7, 2, 4]


def test_what_is_noted_enters_at_the_end_of_the_step():
    queue = TargetQueue(3, 2)
    queue.observe(rows(1), torch.tensor([1]), 1)
    assert queue.keys.tolist() == [NO_KEY] * 3
    queue.update(GOOD)
    assert queue.keys.tolist() == [1, NO_KEY, NO_KEY]
    enter(queue, ([float("nan")], [2]), good=BAD)
    assert queue.keys.tolist() == [1, NO_KEY, NO_KEY] and queue.rows.isfinite().all()
    enter(queue, ([3], [3]))  # and what was noted then is gone
    assert queue.keys.tolist() == [3, 1, NO_KEY]


def test_more_than_it_holds_may_come_at_once_and_empty_micro_batches_too():
    queue = TargetQueue(2, 2)
    enter(queue, ([1, 2, 3], [1, 2, 3]), ([4], [4]), ([], []))
    assert queue.keys.tolist() == [1, 2]


def test_its_rows_stay_in_fp32():
    queue = TargetQueue(2, 2).bfloat16()
    assert queue.rows.dtype == torch.float32 and set(queue.state_dict()) == {"rows", "keys"}
