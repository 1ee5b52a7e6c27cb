"""CLIP scores of many images: one image and one text at a time, as public scripts do it, against batches, in one run.

    python benchmarks/clip_scoring.py
    python benchmarks/clip_scoring.py --model ViT-B-32 --size 512 --n 4 --more 8 --bs 32 --texts all

The plain loop opens each image with Pillow, preprocesses it with the model's own transform, and encodes that image and
the text of its class; with `--texts all` the texts of all ten classes, which a rule that compares classes needs. Ours
is switched on a part at a time, so that the shares can be told apart: the texts encoded once; images in batches;
resized as a batch where the model is; bf16 where the chip has it. Weights are random: the time does not depend on them.
`tiny` is the CLIP that is trained on a set itself. A large model on a CPU is bound by its arithmetic: batches gain
little there, and the texts and the number format most.
"""

import argparse
import time

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from ltnb.clip import Clip
from ltnb.clip_training import CLIPS, ClipTraining, clip_config, new_clip
from ltnb.core import autocast, choose_precision, cpu_flags, seeded
from ltnb.team import Where
from PIL import Image

TEXTS = [f"a photo of a thing of class number {k}" for k in range(10)]


def build(name, side):
    "A model with random weights"
    if name in CLIPS:
        return new_clip(clip_config(side, ClipTraining(**CLIPS[name])), 0.5, 0.25, name)
    cfg = open_clip.get_model_config(name)
    with seeded(0, "clip"):
        model = open_clip.create_model(name)
    return Clip.of(model, open_clip.get_tokenizer(name), cfg, name)


def transform_of(clip):
    "What open_clip does with one image"
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**clip.config["preprocess_cfg"]), is_train=False)


@torch.no_grad()
def one_by_one(clip, images, labels, device, asked="own"):
    "The loop of public scripts"
    transform, out = transform_of(clip), []
    for x, y in zip(images, labels, strict=True):
        seen = transform(Image.fromarray(x.transpose(1, 2, 0)))[None].to(device)
        z = F.normalize(clip.model.encode_image(seen), dim=-1)
        for text in [TEXTS[y]] if asked == "own" else TEXTS:
            t = F.normalize(clip.model.encode_text(clip.tokenizer([text]).to(device)), dim=-1)
            if text == TEXTS[y]:
                out.append(float(z @ t.T))
    return np.array(out)


@torch.no_grad()
def texts_once(clip, images, labels, device):
    "The same with the texts kept"
    transform, t, out = transform_of(clip), clip.texts(TEXTS, Where(device)).to(device), []
    for x, y in zip(images, labels, strict=True):
        seen = transform(Image.fromarray(x.transpose(1, 2, 0)))[None].to(device)
        out.append(float(F.normalize(clip.model.encode_image(seen), dim=-1) @ t[y]))
    return np.array(out)


@torch.no_grad()
def in_batches(clip, images, labels, device, bs, precision="fp32"):
    "The images of a batch together, each preprocessed with Pillow"
    transform, t, out = transform_of(clip), clip.texts(TEXTS, Where(device)).to(device), []
    for i in range(0, len(images), bs):
        part = [transform(Image.fromarray(x.transpose(1, 2, 0))) for x in images[i : i + bs]]
        with autocast(device, precision):
            z = clip.model.encode_image(torch.stack(part).to(device))
        out.append((F.normalize(z.float(), dim=-1) * t[labels[i : i + bs]]).sum(1).cpu())
    return torch.cat(out).numpy()


def ours(clip, images, labels, device, bs, precision="fp32"):
    "As `clip_score` does it"
    z, t = clip.images(images, Where(device, precision), bs), clip.texts(TEXTS, Where(device))
    return (z * t[labels]).sum(1).numpy()


def rate(f, clip, images, labels, *more):
    "Images a second of the second call, and the scores"
    f(clip, images[:2], labels[:2], *more)
    clip._known.clear()
    start = time.perf_counter()
    scores = f(clip, images, labels, *more)
    return len(images) / (time.perf_counter() - start), scores


def report(name, speed, scores, base):
    far = float(np.abs(scores - base[1]).max())
    print(f"{name:<34} {speed:9.1f} {speed / base[0]:8.1f} {far:12.5f}", flush=True)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--model", default="tiny", help=f"of open_clip, or {', '.join(CLIPS)}")
    ap.add_argument("--n", type=int, default=64, help="images of the loop")
    ap.add_argument("--more", type=int, default=64, help="so many times more images for the batches")
    ap.add_argument("--size", type=int, default=8, help="of the images, pixels")
    ap.add_argument("--bs", type=int, default=256)
    ap.add_argument("--texts", choices=("own", "all"), default="own", help="that the plain loop encodes for an image")
    ap.add_argument("--device", default="cpu")
    a = ap.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (a.n * a.more, 3, a.size, a.size), dtype=np.uint8)
    labels = rng.integers(0, len(TEXTS), len(images))
    clip, precision = build(a.model, a.size), choose_precision("auto", a.device)
    clip.model.to(a.device)
    what = torch.cuda.get_device_name(a.device) if a.device != "cpu" else f"CPU ({', '.join(cpu_flags())})"
    print(f"{a.model}, images of {a.size} pixels, {what}, {torch.get_num_threads()} threads")
    print(f"{'':<34} {'images/s':>9} {'ratio':>8} {'largest gap':>12}")
    few = images[: a.n], labels[: a.n]
    base = rate(one_by_one, clip, *few, a.device, a.texts)
    report("one image, one text at a time", *base, base)
    report("+ texts once", *rate(texts_once, clip, *few, a.device), base)
    many = (("+ batches", in_batches, "fp32"), ("+ resized as a batch", ours, "fp32"))
    for name, f, p in (*many, (f"+ {precision}", ours, precision)):
        speed, scores = rate(f, clip, images, labels, a.device, a.bs, p)
        report(name, speed, scores[: a.n], base)
