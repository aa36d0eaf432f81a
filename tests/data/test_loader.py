"""The loader's processes: the same pixels however they are cut, bounded memory, nothing left behind whatever dies."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DEMO, ROOT

from lars.commands import show
from lars.data.augment import draws_of, training_image
from lars.data.index import Index, build_indexes
from lars.data.loader import Loader, data_line, evaluation_batches, training_batches
from lars.data.order import Order
from lars.data.reader import Reader
from lars.data.source import DataError, Source
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe


@pytest.fixture(scope="module")
def recipe(tiny: tuple[str, ...]) -> Recipe:
    return config.load(DEMO / "resnet50.yaml", [*tiny, "augment.scale=[0.3,1.0]"])


@pytest.fixture(scope="module")
def index(recipe: Recipe) -> Index:
    return build_indexes(recipe.data, 10)[0]


def batches_of(recipe: Recipe, index: Index, slots: list[range], first: int, last: int, workers: int = 2) -> Loader:
    recipe.data.workers = workers
    return training_batches(Order(index, 0, 96, 4), index, recipe, slots, first, last)


def stream(
    recipe: Recipe, index: Index, micro: int, processes: int, first: int, last: int, workers: int
) -> tuple[np.ndarray, ...]:
    """ids, pixels and labels of the steps [first, last), put together from what each process gets."""
    got = []
    for rank in range(processes):
        share = 96 // processes
        slots = [range(s, s + micro) for s in range(rank * share, (rank + 1) * share, micro)]
        parts = [
            (b.ids, b.images.clone().numpy(), b.labels.numpy())
            for b in batches_of(recipe, index, slots, first, last, workers)
        ]
        got.append(
            [np.concatenate(column).reshape(last - first, share, *column[0].shape[1:]) for column in zip(*parts)]
        )
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*got))


def test_pixels_do_not_depend_on_processes_passes_workers_or_where_the_run_resumed(
    recipe: Recipe, index: Index
) -> None:
    whole = stream(recipe, index, 8, 1, 0, 24, workers=1)  # 2.3 epochs
    for micro, processes, first, workers in ((96, 1, 0, 2), (4, 3, 7, 3), (16, 2, 11, 2), (48, 2, 23, 1)):
        again = stream(recipe, index, micro, processes, first, 24, workers)
        assert all(np.array_equal(a, b[first:]) for a, b in zip(again, whole))
    ids = whole[0].reshape(-1)
    assert np.array_equal(np.sort(ids[:1009]), np.arange(1009)) and np.array_equal(
        np.sort(ids[1009:2018]), np.arange(1009)
    )


def test_pixels_are_those_of_the_named_sample_in_its_epoch(recipe: Recipe, index: Index) -> None:
    """Control: the file read as a whole by another road, and the augmentation called directly."""
    rows = [row for name in index.files for row in pq.read_table(name).to_pylist()]
    order = Order(index, 0, 96, 4)
    for step, batch in enumerate(batches_of(recipe, index, [range(96)], 9, 12), start=9):
        assert np.array_equal(batch.ids, order.ids(step, range(96)))
        draws = draws_of(0, order.epoch_of(step, range(96)), batch.ids)
        for slot in range(0, 96, 5):
            row = rows[batch.ids[slot]]
            expected = training_image(row["image"]["bytes"], recipe.augment, 28, draws[slot])
            assert (
                np.array_equal(batch.images[slot].permute(1, 2, 0).numpy(), expected)
                and batch.labels[slot] == row["label"]
            )


def test_images_grow_with_the_step_and_are_the_same_samples_crop(recipe: Recipe, index: Index) -> None:
    """Control: the augmentation called directly, and the order of a recipe whose images do not grow."""
    growing = dataclasses.replace(recipe, augment=dataclasses.replace(recipe.augment))
    growing.augment.crop = "random_resized_crop"
    growing.augment.sizes, growing.augment.size_epochs = [12, 28, 20], [0.35, 0.7]  # from the steps 4 and 8 on
    rows = [row for name in index.files for row in pq.read_table(name).to_pylist()]
    order = Order(index, 0, 96, 4)
    slots = [range(0, 48), range(48, 96)]
    for first in (0, 5):  # from the beginning, and resumed
        batches = batches_of(growing, index, slots, first, 10)
        for number, batch in enumerate(batches):
            step, part = first + number // 2, slots[number % 2]
            size = (12, 28, 20)[(step >= 4) + (step >= 8)]
            assert np.array_equal(batch.ids, order.ids(step, part)) and batch.images.shape == (48, 3, size, size)
            draws = draws_of(0, order.epoch_of(step, part), batch.ids)
            for place in range(0, 48, 7):
                data = rows[batch.ids[place]]["image"]["bytes"]
                expected = training_image(data, growing.augment, size, draws[place])
                assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), expected)
        assert number == 2 * (10 - first) - 1


@pytest.mark.parametrize("memory", [1e9, 1e5])
def test_a_row_group_is_read_once_an_epoch_or_there_is_a_warning(
    memory: float, recipe: Recipe, index: Index, caplog, monkeypatch
) -> None:
    monkeypatch.setattr("lars.data.reader._SPARE", 0)
    order = Order(index, 0, 96, 4, window=4)
    wanted = np.zeros((3, index.samples), bool)
    for step in range(21):
        for sample, epoch in zip(order.ids(step, range(96)), order.epoch_of(step, range(96))):
            wanted[epoch, sample] = True
    reader = Reader(index, recipe.data, 10, lambda epoch: wanted[epoch].copy(), needed=memory)
    passes = [
        (order.ids(step, range(s, s + 8)), order.epoch_of(step, range(s, s + 8)))
        for step in range(21)
        for s in range(0, 96, 8)
    ]
    taken = [samples.ids for samples in reader.samples(passes)]
    assert np.array_equal(np.concatenate(taken), np.concatenate([ids for ids, _ in passes]))
    groups = len(index.rows)
    if memory == 1e9:
        assert reader.reads == 2 * groups and not caplog.records and not reader.sizes and not reader.held
    else:
        assert reader.reads > 2 * groups and "row groups are read more than once" in caplog.text


_READ = """
import hashlib, pickle, sys
import numpy as np
from lars.data.reader import Reader
index, data, ids = pickle.load(sys.stdin.buffer)
wanted = np.isin(np.arange(index.samples), ids)
reader = Reader(index, data, 10, lambda epoch: wanted.copy(), needed=0.0)
samples = next(reader.samples([(ids, np.zeros_like(ids))]))
assert [*map(len, samples.images)] and "pandas" not in sys.modules
print(samples.labels.tolist(), hashlib.sha256(b"".join(samples.images)).hexdigest())
"""


def test_a_reader_does_not_import_pandas(recipe: Recipe, index: Index) -> None:
    """It would at each start of a loader, on every rank but the first, which has it from `datasets`."""
    ids = np.arange(3, index.samples, 7)
    sent = pickle.dumps((index, recipe.data, ids))
    done = subprocess.run([sys.executable, "-c", _READ], input=sent, capture_output=True, cwd=ROOT)
    assert not done.returncode, done.stderr.decode()
    rows = [row for file in index.files for row in pq.read_table(file).to_pylist()]
    digest = hashlib.sha256(b"".join(rows[i]["image"]["bytes"] for i in ids)).hexdigest()
    assert done.stdout.decode() == f"{[rows[i]['label'] for i in ids]} {digest}\n"


def resident(pids: list[int]) -> int:
    """Bytes of memory that these processes have for themselves or share, each page once."""
    total = 0
    for pid in pids:
        total += sum(
            int(kb) * 1024 for kb in re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        )
    return total


@pytest.mark.parametrize("workers", [1, 3])
def test_ten_epochs_leave_memory_flat_and_nothing_behind(workers: int, recipe: Recipe, index: Index) -> None:
    others = ("sem.", "torch_", "deepspeed")  # of libraries that other tests use meanwhile

    def names() -> set[str]:
        shared = {n for n in os.listdir("/dev/shm") if not n.startswith(others)}
        return shared | {n for n in os.listdir("/tmp") if "lars" in n}

    before, descriptors = names(), len(os.listdir("/proc/self/fd"))
    batches = batches_of(recipe, index, [range(s, s + 8) for s in range(0, 96, 8)], 0, 10 * 1009 // 96, workers)
    children, marks = list(batches.children), []
    for number, _ in enumerate(batches):
        if number % 126 == 125:  # an epoch
            marks.append(resident(children))
    assert len(marks) == 10 and max(marks[2:]) < 1.03 * marks[1] + 2**20, marks
    assert not any(psutil.pid_exists(child) for child in children)
    assert names() == before and len(os.listdir("/proc/self/fd")) <= descriptors


def _hold_a_loader(keys: tuple[str, ...], pipe) -> None:
    recipe = config.load(DEMO / "resnet50.yaml", list(keys))
    index, _ = build_indexes(recipe.data, 10)
    batches = batches_of(recipe, index, [range(96)], 0, 1000)
    next(batches)
    pipe.send(list(batches.children))
    time.sleep(60)


def test_a_parent_that_is_killed_takes_its_loader_along(tiny: tuple[str, ...]) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    parent = context.Process(target=_hold_a_loader, args=(tiny, theirs))
    parent.start()
    children = ours.recv()
    for child in children:
        os.kill(child, signal.SIGTERM)  # a launcher ends its whole process group: the loader leaves that to its parent
    time.sleep(0.2)
    assert len(children) == 3 and all(psutil.Process(child).status() != psutil.STATUS_ZOMBIE for child in children)
    parent.kill()
    parent.join()
    end = time.time() + 10
    while any(
        psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE for child in children
    ):
        assert time.time() < end
        time.sleep(0.1)


@pytest.mark.parametrize("role", ["reading", "decoding"])
def test_a_process_of_the_loader_that_is_killed_is_an_error_and_no_hang(
    role: str, recipe: Recipe, index: Index
) -> None:
    batches = batches_of(recipe, index, [range(96)], 0, 1000)
    next(batches)
    for child in [child for child, what in batches.children.items() if what == role]:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(DataError, match=f"a {role} process of the loader was ended by SIGKILL"):
        for _ in range(10):  # what was decoded before is still delivered
            next(batches)
    batches.close()


def test_an_exception_in_a_decoder_is_an_error_and_no_hang(recipe: Recipe, index: Index, monkeypatch, capfd) -> None:
    monkeypatch.setattr("lars.data.processes.training_image", lambda *a: 1 / 0)
    batches = batches_of(recipe, index, [range(96)], 0, 5)
    with pytest.raises(
        DataError,
        match=r"ZeroDivisionError: division by zero "
        r"\(sample \d+: 'train_\d+.png', row \d+ of row group \d+ of .*parquet\)",
    ):
        next(batches)
    batches.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_loader_whose_user_waits_can_be_interrupted(recipe: Recipe, index: Index, monkeypatch) -> None:
    monkeypatch.setattr(Source, "read", lambda *a: time.sleep(60))
    batches = batches_of(recipe, index, [range(96)], 0, 5)
    batches.stop = lambda: True
    started = time.time()
    stand_in = batches.take(96)
    assert (
        isinstance(stand_in.data_error, InterruptedError)
        and time.time() - started < 5
        and stand_in.images.shape == (96, 3, 28, 28)
    )
    batches.close()


def test_a_file_that_changes_under_a_run_stops_it(tmp_path: Path, recipe: Recipe) -> None:
    import shutil

    shutil.copytree(recipe.data.path, tmp_path / "data")
    mine = config.load(DEMO / "resnet50.yaml", [f"data.path={tmp_path / 'data'}", "global_batch=96", "bn_group=4"])
    train, val = build_indexes(mine.data, 10)
    file = Path(val.files[0])
    os.utime(file, ns=(1, 1))
    batches = evaluation_batches(val, mine, 50, range(4))
    with pytest.raises(DataError, match="has changed since the run began"):
        next(batches)
    batches.close()


def test_another_footer_than_the_index_was_made_from_stops_it(recipe: Recipe, index: Index) -> None:
    """A process reads the footers of its files itself; `then` is what rank 0 saw."""
    then = tuple(footer._replace(sha256="0" * 64) for footer in index.footers)
    batches = batches_of(recipe, dataclasses.replace(index, footers=then), [range(96)], 0, 1)
    with pytest.raises(DataError, match="has another footer than when the run began"):
        next(batches)
    batches.close()


def test_the_start_says_what_a_process_reads_and_warns_of_files_sorted_by_class(
    tmp_path: Path, recipe: Recipe, index: Index, caplog
) -> None:
    import pyarrow.parquet as pq

    plan = BatchPlan.of(recipe, index.samples, 2)
    assert "data: 2 files of 21 row groups; a process reads 11 of them an epoch" in data_line(recipe, index, plan)
    assert not caplog.records
    table = pq.read_table(recipe.data.path + "/train-00000-of-00005.parquet").sort_by("label")
    for split in ("train", "validation"):
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=20)
    sorted_index, _ = build_indexes(config.load(DEMO / "resnet50.yaml", [f"data.path={tmp_path}"]).data, 10)
    data_line(recipe, sorted_index, BatchPlan.of(recipe, sorted_index.samples, 2))
    assert "the files are sorted by class" in caplog.text


def test_lars_show_draws_what_training_gets(tiny: tuple[str, ...], tmp_path: Path) -> None:
    recipe = config.load(DEMO / "resnet50.yaml", list(tiny))
    train, _ = build_indexes(recipe.data, 10)
    shown = show.some_samples(train, recipe)
    assert [label for _, label, _ in shown] == list(range(8))
    per_epoch = train.samples // 96 + 1
    order = Order(train, recipe.seed, 96, recipe.bn_group)
    batches = training_batches(order, train, recipe, [range(96)], 0, 2 * per_epoch, torch.device("cpu"), lambda: False)
    found: dict[int, list] = {}
    for _ in range(2 * per_epoch):
        batch = batches.take(96)
        for sample, image in zip(batch.ids.tolist(), batch.images):
            found.setdefault(sample, []).append(image.permute(1, 2, 0).numpy().copy())
    batches.close()
    for sample, _, data in shown:
        evaluation, *epochs = show.views(recipe, sample, data)
        assert evaluation.shape == epochs[0].shape and len(epochs) == 7
        assert all(np.array_equal(one, other) for one, other in zip(found[sample][:2], epochs))
    assert show.main([str(DEMO / "resnet50.yaml"), *tiny, "--out", str(tmp_path / "a/sheet.png")]) == 0
    assert (tmp_path / "a/sheet.png").stat().st_size > 10_000
