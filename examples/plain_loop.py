"""A training loop by hand: your own batches, your own optimiser, five lines of segmenter_fast.

python examples/plain_loop.py --steps 100 --output runs/plain
"""

import argparse

import torch
from torch.utils.data import DataLoader

from segmenter_fast import create_model
from segmenter_fast.data import Scenes  # stands for your data set: (uint8 image, uint8 labels)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100, help="of the optimiser")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--amp", action="store_true", help="bfloat16 arithmetic")
parser.add_argument("--output", default="runs/plain", help="folder of the weights")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
data = Scenes(64, size=(96, 128))
loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
model = create_model("Seg-N-Mask/16", data.num_classes, (96, 128), class_names=data.class_names)
model.to(device).train()
mean, std = torch.tensor([model.config.mean, model.config.std], device=device)[..., None, None]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(args.steps):
    if step % len(loader) == 0:
        batches = iter(loader)
    images, target = (x.to(device) for x in next(batches))
    with torch.autocast(device, torch.bfloat16, enabled=args.amp):
        loss = model((images / 255 - mean) / std, target)  # labels 0 to K - 1; 255 is ignored
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained(args.output)  # segmenter-fast predict photo.jpg --weights runs/plain ...
