"""Three usual ways to train, as small loops: what `end_to_end.py` clocks beside `recipes/train.py`.

    python -m tests.benchmarks.peers timm --data FOLDER --lines FILE ...

Neither timm's train.py, torchvision's references/classification nor accelerate's complete_cv_example is in a package,
so each loop does what its original does with the parts that are: loader, transforms, model and engine. They read an
image folder with `train` and `validation`, draw random resized crops and flips, and take SGD steps in float32. After
each step, and after the evaluation at the end, a line goes into `--lines`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_loaders(args: argparse.Namespace, ranks: int) -> tuple[Iterable, Iterable]:
    """As in timm's train.py: its folder data set, its loader with the prefetcher's uint8 batches."""
    from timm.data import create_dataset, create_loader

    def loader(split: str, training: bool) -> Iterable:
        folder = create_dataset("", root=args.data, split=split, is_training=training, batch_size=args.batch)
        return create_loader(
            folder,
            (3, args.size, args.size),
            args.batch,
            is_training=training,
            use_prefetcher=False,
            num_workers=args.workers,
            distributed=ranks > 1,
            interpolation="bilinear" if training else "bicubic",  # the filter of these models in timm
            mean=MEAN,
            std=STD,
            color_jitter=None,
            persistent_workers=training,
        )

    return loader("train", True), loader("validation", False)


def torchvision_loaders(args: argparse.Namespace, ranks: int) -> tuple[Iterable, Iterable]:
    """As in torchvision's references and accelerate's example: ImageFolder, transforms of PIL images, a DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    end = (transforms.ToTensor(), transforms.Normalize(MEAN, STD))
    crop = (transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip())
    centre = (transforms.Resize(args.size * 8 // 7), transforms.CenterCrop(args.size))

    def loader(split: str, steps: tuple, training: bool) -> DataLoader:
        folder = ImageFolder(os.path.join(args.data, split), transforms.Compose([*steps, *end]))
        sampler = DistributedSampler(folder, shuffle=training) if ranks > 1 and args.peer != "accelerate" else None
        how = {"shuffle": training and sampler is None, "sampler": sampler, "drop_last": training}
        return DataLoader(folder, args.batch, num_workers=args.workers, persistent_workers=training, **how)

    return loader("train", crop, True), loader("validation", centre, False)


def endless(loader: Iterable) -> Iterable[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def train(args: argparse.Namespace) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if ranks > 1 and args.peer != "accelerate":
        dist.init_process_group("gloo")  # before the loaders, whose samplers ask for the rank
    model: nn.Module = timm.create_model(args.model, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    loaders = (timm_loaders if args.peer == "timm" else torchvision_loaders)(args, ranks)
    if args.peer == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer, *loaders = accelerator.prepare(model, optimizer, *loaders)
    elif ranks > 1:
        model = DistributedDataParallel(model)
    first = int(os.environ.get("RANK", 0)) == 0
    with open(args.lines if first else os.devnull, "a", buffering=1) as log:
        for step, (images, labels) in zip(range(args.steps), endless(loaders[0])):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            accelerator.backward(loss) if args.peer == "accelerate" else loss.backward()
            optimizer.step()
            log.write(f"train {step + 1} {loss.item():.3f}\n")
        model.eval()
        right = torch.zeros(2)
        with torch.no_grad():
            for images, labels in loaders[1]:
                right += torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)])
        if ranks > 1:
            dist.all_reduce(right)
        log.write(f"eval {right.tolist()}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("timm", "torchvision", "accelerate"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--model", required=True)
    for number in ("size", "batch", "steps", "workers"):
        parser.add_argument(f"--{number}", type=int, required=True)
    train(parser.parse_args())
