"""Every rank refuses a used run directory, though only rank 0 looks: else the others would wait for it."""

import torch.multiprocessing as mp

from jepa_scale.errors import InputError


def worker(rank, directory, queue):
    import torch.distributed as dist

    from jepa_scale.telemetry import prepare_run_dir

    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    heard = []
    for name in ("fresh", "used"):
        try:
            prepare_run_dir(directory / name, resume=False)
            heard.append("")
        except InputError as error:
            heard.append(str(error))
    queue.put((rank, heard))
    dist.destroy_process_group()


def test_all_ranks_raise_together(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").touch()
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (tmp_path, queue), nprocs=2)
    heard = dict(queue.get() for _ in range(2))
    assert heard[0] == heard[1] and heard[0][0] == "" and "used" in heard[0][1]
    assert (tmp_path / "fresh").is_dir()
