"""The loop of plain_loop.py under Hugging Face Accelerate: any number of GPUs, accumulation, bf16.

    pip install "segmenter_fast[examples]"
    accelerate launch examples/accelerate_loop.py --steps 100 --output runs/accelerate

The loss goes through `model(images, target)`, so DistributedDataParallel sees it, and no process
ever holds a full-resolution logit.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from segmenter_fast import SegmenterModel, create_model
from segmenter_fast.data import Scenes  # stands for your data set: (uint8 image, uint8 labels)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser")
    parser.add_argument("--batch-size", type=int, default=8, help="of each process and pass")
    parser.add_argument("--accumulate", type=int, default=2, help="passes of a step")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic")
    parser.add_argument("--output", default="runs/accelerate", help="folder of the weights")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision="bf16" if args.bf16 else "no",
        cpu=args.cpu,
    )
    torch.manual_seed(0)
    data = Scenes(64, size=(96, 128))
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    model: SegmenterModel = create_model(
        "Seg-N-Mask/16", data.num_classes, (96, 128), class_names=data.class_names
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.mean, model.config.std))
    # The classifier that pretrained encoders carry gets no gradient, and DDP would wait for one.
    model.encoder.head.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    mean, std = mean.to(accelerator.device), std.to(accelerator.device)

    step = 0
    while step < args.steps:
        for images, target in loader:
            with accelerator.accumulate(model):
                loss = model((images / 255 - mean) / std, target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")
                step += 1
                if step == args.steps:
                    break
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
